"""Log lines that tell of nothing wrong may wait a little; nothing is lost, and the order stays."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from mailsluice_relay.app import LOG_DELAY, LOG_LINES, LogStream


class Output(io.BytesIO):
    def __init__(self) -> None:
        super().__init__()
        self.written = asyncio.Event()

    def write(self, octets: Any) -> int:
        self.written.set()
        return super().write(octets)


async def test_what_tells_of_nothing_wrong_goes_together_soon() -> None:
    output = Output()
    stream = LogStream(output)
    stream.info(b"one")
    stream.info(b"two")
    assert output.getvalue() == b""
    async with asyncio.timeout(LOG_DELAY + 5):
        await output.written.wait()
    assert output.getvalue() == b"one\ntwo\n"


async def test_a_warning_goes_at_once_behind_what_was_said_before_it() -> None:
    output = io.BytesIO()
    stream = LogStream(output)
    stream.info(b"before")
    stream.warning(b"trouble")
    assert output.getvalue() == b"before\ntrouble\n"


async def test_no_more_than_a_few_lines_are_kept_back() -> None:
    output = io.BytesIO()
    stream = LogStream(output)
    for _ in range(LOG_LINES):
        stream.info(b"line")
    assert output.getvalue() == b"line\n" * LOG_LINES


def test_without_an_event_loop_nothing_waits() -> None:
    output = io.BytesIO()
    LogStream(output).info(b"starting")
    assert output.getvalue() == b"starting\n"
