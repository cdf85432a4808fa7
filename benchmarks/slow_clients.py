"""What slow clients do to a normal one: `python -m benchmarks.slow_clients`, half a minute; exit 1 above LIMIT.

200 connections drip an octet every second: within a command line, within the text of a message, within a TLS handshake.
A normal client meanwhile sends mail after mail, a session each. Rounds with and without the slow ones alternate; the
figure is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import smtplib
import statistics
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

import trustme

from benchmarks import relays
from benchmarks.load import RECIPIENT, SENDER, percentile
from benchmarks.machine import free_port
from mailsluice_relay.config import Listener, ListenerMode

SLOW: Final = 200
ROUNDS: Final = 5
SESSIONS: Final = 150
LIMIT: Final = 1.5
"""Of the normal client's median session with the slow ones to that without."""

_TRANSACTION: Final = (
    b"EHLO slow.test\r\n",
    b"MAIL FROM:<%b>\r\nRCPT TO:<%b>\r\nDATA\r\n"
    % (
        SENDER.encode(),
        RECIPIENT.encode(),
    ),
)
_KINDS: Final = ("command", "text", "handshake")


def drip(ports: dict[str, int], connected: Event, stop: Event) -> None:
    """A process of its own: the slow clients."""

    async def client(kind: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", ports["tls" if kind == "handshake" else "plain"])
        if kind == "text":
            await reader.readline()
            for command in _TRANSACTION:
                writer.write(command)
                await reader.readuntil(b" HELP\r\n" if command.startswith(b"EHLO") else b"354 ")
        octets = {"command": b"EHLO ", "text": b"Subject: ", "handshake": b"\x16\x03\x01\x3f\xff"}[kind]
        while not stop.is_set():
            writer.write(octets[:1])
            octets = octets[1:] or b"x"
            await asyncio.sleep(1.0)
        writer.transport.abort()

    async def all_of_them() -> None:
        clients = [asyncio.create_task(client(_KINDS[number % len(_KINDS)])) for number in range(SLOW)]
        await asyncio.sleep(2.0)
        assert not any(task.done() for task in clients), "the relay has sent slow clients away already"
        connected.set()
        await asyncio.gather(*clients)

    asyncio.run(all_of_them())


def normal(port: int) -> list[float]:
    """Seconds that each session took, from connecting to the reply to QUIT."""
    text = f"From: <{SENDER}>\r\nTo: <{RECIPIENT}>\r\nSubject: normal\r\n\r\n" + "x" * 78 + "\r\n"
    seconds = []
    for _ in range(SESSIONS):
        began = time.perf_counter()
        with smtplib.SMTP("127.0.0.1", port, local_hostname="client.test", timeout=30) as client:
            client.sendmail(SENDER, [RECIPIENT], text)
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> int:
    certificate = trustme.CA().issue_cert("relay.example.test")
    credentials = {
        "tls.crt": b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        "tls.key": certificate.private_key_pem.bytes(),
    }
    listeners = (
        Listener(name="plain", port=0, mode=ListenerMode.PLAIN, authentication_required=False),
        Listener(name="tls", port=0, mode=ListenerMode.IMPLICIT_TLS),
    )
    ports: dict[str, int] = {}
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="mailsluice-slow-") as name,
        relays.mailsluice(
            Path(name), free_port(), listeners=listeners, credentials=credentials, ports=ports
        ) as running,
    ):
        normal(ports["plain"])
        for _ in range(ROUNDS):
            alone.append(normal(ports["plain"]))
            connected, stop = multiprocessing.Event(), multiprocessing.Event()
            slow = multiprocessing.Process(target=drip, args=(ports, connected, stop))
            slow.start()
            if not connected.wait(20):
                raise SystemExit(f"the slow clients could not connect to relay {running.pid}")
            beside.append(normal(ports["plain"]))
            stop.set()
            slow.join()
    ratio = statistics.median(
        statistics.median(with_them) / statistics.median(without)
        for without, with_them in zip(alone, beside, strict=True)
    )
    for label, rounds in (("alone", alone), (f"beside {SLOW} slow clients", beside)):
        values = [1000 * value for seconds in rounds for value in seconds]
        print(f"{label:24} median {statistics.median(values):6.2f} ms   95 % {percentile(values, 95):6.2f} ms")
    print(f"ratio of the medians, median of {ROUNDS} rounds: {ratio:.2f} (limit {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
