"""Rspamd: its HTTP protocol (/checkv2). The field User tells it that the mail is outgoing, and whose it is."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
import msgspec

from mailsluice_relay import config
from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.suspicion.engine import MAXIMUM_ANSWER, EngineError, EngineVerdict, Submission

MAXIMUM_RECIPIENTS: Final = 100
"""Rcpt fields in a request; the head of one has to fit what a server reads."""

_UNFIT = re.compile(r"[\x00-\x1f\x7f]")
_SHOWN: Final = 100


class _Answer(msgspec.Struct):
    """What is read of the answer."""

    score: float
    required_score: float = 0.0
    action: str = ""
    symbols: dict[str, msgspec.Raw] = {}


class Rspamd:
    """Raises ConfigurationError."""

    def __init__(self, engine: config.Engine) -> None:
        if not engine.url.startswith(("http://", "https://")):
            raise ConfigurationError(f"spam.engines: {engine.name} needs a url, such as http://rspamd:11333")
        self._url = f"{engine.url.rstrip('/')}/checkv2"

    async def check(self, submission: Submission) -> EngineVerdict:
        try:
            # A connection of its own: one that was kept may be closed just now, and a POST is not sent twice.
            async with aiohttp.request(
                "POST", self._url, data=_octets(submission), headers=_fields(submission), allow_redirects=False
            ) as response:
                answer = await response.content.read(MAXIMUM_ANSWER)
                is_whole = response.content.at_eof()
        except aiohttp.ClientError as error:
            raise EngineError(str(error)[:_SHOWN] or type(error).__name__) from error
        if response.status != 200:
            raise EngineError(f"it answered {response.status}")
        if not is_whole:
            raise EngineError(f"its answer is longer than {MAXIMUM_ANSWER} octets")
        return _verdict(answer)


def _verdict(octets: bytes) -> EngineVerdict:
    try:
        answer = msgspec.json.decode(octets, type=_Answer)
    except msgspec.MsgspecError as error:
        raise EngineError(f"its answer is not Rspamd's: {error}"[:_SHOWN]) from error
    score = answer.score
    if answer.action == "reject":  # some modules set the action alone
        score = max(score, answer.required_score)
    if not math.isfinite(score):
        raise EngineError("its score is no number")
    return EngineVerdict(score=score, symbols=tuple(answer.symbols))


def _fields(submission: Submission) -> list[tuple[str, str]]:
    fields = [
        ("Content-Type", "message/rfc822"),
        ("Content-Length", str(submission.content.size)),
        ("Queue-Id", submission.queue_id),
        ("IP", submission.client_address),
        ("Helo", submission.hello),
        ("From", str(submission.sender) if submission.sender is not None else "<>"),
        *(("Rcpt", str(recipient)) for recipient in submission.recipients[:MAXIMUM_RECIPIENTS]),
    ]
    if submission.login is not None:
        fields.append(("User", submission.login))
    # Clients and configured names choose these: nothing of theirs may become a field of its own.
    return [(name, _UNFIT.sub("", value)) for name, value in fields if value]


async def _octets(submission: Submission) -> AsyncIterator[bytes]:
    for piece in submission.content.chunks():
        yield piece
