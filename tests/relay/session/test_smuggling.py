"""SMTP smuggling from end to end: client, relay, queue, and an upstream that takes nearly anything for an end."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mailsluice_relay.admission import Admission
from mailsluice_relay.config import Configuration, Upstream, UpstreamTLSMode
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.listener import Listeners
from mailsluice_relay.metrics import Metrics

VARIANTS = [
    b"\n.\n",
    b"\r.\r",
    b"\r.\n",
    b"\n.\r",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\r\r\n.\r\n",
    b"\n\r.\n\r",
]
"""The union of hannob/smtpsmug and The-Login/SMTP-Smuggling-Tools, with `\\r\\n.\\0\\r\\n`, which the former means."""

FROM = b"From: app@example.test\r\n"
TRANSACTION = b"MAIL FROM:<app@example.test>\r\nRCPT TO:<person@example.org>\r\nDATA\r\n"
SMUGGLED = TRANSACTION.replace(b"person", b"victim") + FROM + b"Subject: smuggled\r\n\r\nevil\r\n.\r\n"


class LenientUpstream:
    """Ends lines at CR LF, CR or LF, and the data at a line that holds a dot and perhaps NULs."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bytes]] = []
        """Commands and text of each."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 lenient.test ESMTP\r\n")
        buffer, commands, text, in_data = b"", b"", b"", False
        while chunk := await reader.read(65536):
            buffer += chunk
            while match := re.search(rb"\r\n|\n|\r(?!\Z)", buffer):
                line, buffer = buffer[: match.start()], buffer[match.end() :]
                if in_data:
                    if line.strip(b"\0") == b".":
                        self.messages.append((commands, text))
                        commands, text, in_data = b"", b"", False
                        writer.write(b"250 taken\r\n")
                    else:
                        text += line + b"\n"
                    continue
                verb = line[:4].upper()
                commands += line + b"\n" if verb in {b"MAIL", b"RCPT"} else b""
                in_data = verb == b"DATA"
                writer.write(b"354 go\r\n" if in_data else b"221 bye\r\n" if verb == b"QUIT" else b"250 yes\r\n")
        writer.close()


class Chain:
    """A relay with its queue in front of the lenient upstream."""

    def __init__(self, listeners: Listeners, upstream: LenientUpstream) -> None:
        self.listeners = listeners
        self.upstream = upstream

    async def send(self, listener: str, text: bytes) -> bytes:
        """One message by a client that looks at nothing; all that the relay said after 354."""
        reader, writer = await asyncio.open_connection(*self.listeners.addresses[listener])
        writer.write(b"EHLO client.test\r\n")
        while (await reader.readline())[:4] != b"250 ":
            pass
        writer.write(TRANSACTION)
        while not (await reader.readline()).startswith(b"354"):
            pass
        writer.write(text)
        async with asyncio.timeout(10):
            answer = await reader.readline()
        writer.write_eof()
        answer += await reader.read()
        writer.close()
        return answer

    async def delivered(self, subject: bytes) -> None:
        async with asyncio.timeout(10):
            while not any(subject in text for _, text in self.upstream.messages):  # noqa: ASYNC110 - nothing to wait on
                await asyncio.sleep(0.005)


@pytest.fixture
async def chain(configuration: Configuration, credentials: Any, tmp_path: Path) -> AsyncIterator[Chain]:
    upstream = LenientUpstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    configuration = msgspec.structs.replace(
        configuration,
        upstreams=(Upstream(name="lenient", host="127.0.0.1", port=port, tls=UpstreamTLSMode.PLAIN),),
    )
    metrics = Metrics()
    metrics.configure(configuration, {})
    clocks = {"now": time.time, "monotonic": time.monotonic}
    admission = Admission(configuration, metrics=metrics, **clocks)
    dispatcher = Dispatcher(
        configuration,
        credentials,
        directory=tmp_path,
        metrics=metrics,
        random=random.Random(1),
        ordinal=None,
        **clocks,
    )
    await dispatcher.start()
    listeners = Listeners(
        configuration,
        credentials,
        bind=("127.0.0.1",),
        admission=admission,
        dispatcher=dispatcher,
        metrics=metrics,
        **clocks,
    )
    await listeners.start()
    yield Chain(listeners, upstream)
    await listeners.stop(0.0)
    await dispatcher.stop(1.0)
    await admission.close()
    server.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("listener", ["open", "lenient"])
async def test_one_message_in_is_at_most_one_message_out(chain: Chain, listener: str, variant: bytes) -> None:
    answer = await chain.send(listener, FROM + b"Subject: carrier\r\n\r\nbody" + variant + SMUGGLED)
    await chain.send(listener, FROM + b"Subject: marker\r\n\r\nafter\r\n.\r\n")
    await chain.delivered(b"Subject: marker")
    if answer.startswith(b"250"):
        assert listener == "lenient"
        await chain.delivered(b"Subject: carrier")
    else:
        assert answer.startswith(b"550 5.5.2")
    assert answer.count(b"\r\n") == 1
    assert len(chain.upstream.messages) == 1 + answer.startswith(b"250")
    assert not any(b"victim" in commands for commands, _ in chain.upstream.messages)
