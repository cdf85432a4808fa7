"""SpamAssassin: spamd's SYMBOLS command (spamd/PROTOCOL in its sources)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

from mailsluice_relay import config
from mailsluice_relay.suspicion.engine import EngineError, EngineVerdict, Submission, address_of, exchange

MAXIMUM_SENT: Final = 500 * 1024
"""Octets of a message that spamd gets to see: its rules take time in proportion, and spam is at the front. spamc asks
nothing about larger messages, which lets them pass who fill theirs up."""

_STATUS = re.compile(rb"SPAMD/[0-9.]+ ([0-9]+) ([A-Z_]+)")
_SCORE = re.compile(rb"(?mi)^Spam: *(?:True|False|Yes|No) *; *(-?[0-9.]+) */ *-?[0-9.]+ *\r?$")


class SpamAssassin:
    """Raises ConfigurationError."""

    def __init__(self, engine: config.Engine) -> None:
        self._address = address_of(engine.address)

    async def check(self, submission: Submission) -> EngineVerdict:
        answer = await exchange(self._address, _request(submission))
        head, _, body = answer.partition(b"\r\n\r\n")
        status, score = _STATUS.match(head), _SCORE.search(head)
        if status is None:
            raise EngineError("it does not speak spamd's protocol")
        if int(status[1]) != 0:
            raise EngineError(f"it answered {status[1].decode()} {status[2].decode()}")
        try:
            points = float(score[1]) if score is not None else math.nan
        except ValueError:
            points = math.nan
        if not math.isfinite(points):
            raise EngineError("its answer has no score")
        symbols = body.decode("ascii", "replace").strip()
        return EngineVerdict(score=points, symbols=tuple(filter(None, map(str.strip, symbols.split(",")))))


def _request(submission: Submission) -> Iterator[bytes]:
    room = min(submission.content.size, MAXIMUM_SENT)
    yield b"SYMBOLS SPAMC/1.5\r\nContent-length: %d\r\n\r\n" % room
    for piece in submission.content.chunks():
        yield piece[:room]
        room -= len(piece[:room])
        if room <= 0:
            break
