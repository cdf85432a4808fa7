"""ClamAV: clamd's INSTREAM (man clamd). It looks for malware, and scores nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from mailsluice_relay import config
from mailsluice_relay.suspicion.engine import (
    EngineError,
    EngineVerdict,
    Submission,
    UnscannableError,
    address_of,
    exchange,
)

_CHUNK: Final = 64 * 1024
_FOUND = re.compile(r"stream: (.{1,200}) FOUND\0?\n?")
_CLEAN = re.compile(r"stream: OK\0?\n?")


class ClamAV:
    """Raises ConfigurationError."""

    def __init__(self, engine: config.Engine) -> None:
        self._address = address_of(engine.address)

    async def check(self, submission: Submission) -> EngineVerdict:
        answer = (await exchange(self._address, _stream(submission))).decode("utf-8", "replace")
        if found := _FOUND.fullmatch(answer):
            return EngineVerdict(malware=found[1])
        if _CLEAN.fullmatch(answer):
            return EngineVerdict()
        if "size limit exceeded" in answer:
            raise UnscannableError(
                f"a message of {submission.content.size} octets is over its StreamMaxLength; raise that"
            )
        raise EngineError(f"it answered {answer[:100]!r}")


def _stream(submission: Submission) -> Iterator[bytes]:
    """The command, and chunks with their length in front, ended by an empty one."""
    yield b"zINSTREAM\0"
    for piece in submission.content.chunks():
        for start in range(0, len(piece), _CHUNK):
            chunk = piece[start : start + _CHUNK]
            yield len(chunk).to_bytes(4, "big") + chunk
    yield bytes(4)
