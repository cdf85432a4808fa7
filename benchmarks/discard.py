"""Servers that take mail and drop it: Mailsluice's sessions with all of its policy, and a bare aiosmtpd.

A process of its own: `python -m benchmarks.discard mailsluice|no-hash|aiosmtpd DIRECTORY`. It says {"port": n} on its
standard output once it accepts. `mailsluice` is everything that the relay does up to the queue; `no-hash` is the same
with a login that needs no password's hash; `aiosmtpd` is that library with an empty handler, on the same event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import trustme
import uvloop
from aiosmtpd import smtp

from benchmarks.relays import Running, configuration
from mailsluice_relay import app, reply
from mailsluice_relay.admission import Admission, Authentication
from mailsluice_relay.auth.sasl import Attempt
from mailsluice_relay.config import Credentials, Listener, ListenerMode, decode
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.envelope import Client, Envelope, Login, Message
from mailsluice_relay.listener import Listeners
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason, Reply, Verdict

PASSWORD = "benchmark"
BCRYPT_COST = 12


class Discarding(Dispatcher):
    """Takes every message for granted: no queue, no delivery."""

    async def submit(self, message: Message) -> Reply:
        message.content.body.close()
        return reply.queued(message.queue_id)

    def refuses(self) -> Reply | None:
        return None

    def passage(self, envelope: Envelope) -> None:
        """There is none: messages come here."""


class NoHash(Admission):
    """Knows everybody at once."""

    async def authenticate(self, client: Client, attempt: Attempt) -> Authentication:
        return Authentication(Login(attempt.login, attempt.mechanism), Verdict(reply.AUTHENTICATED, Reason.ACCEPTED))


async def mailsluice(directory: Path, admission_type: type[Admission]) -> None:
    listeners = (
        Listener(name="plain", port=0, mode=ListenerMode.PLAIN, authentication_required=False),
        Listener(name="submission", port=0),
    )
    hashes = (bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(BCRYPT_COST)).decode(),)
    settings = decode(configuration(listeners, 1, hashes=hashes))
    certificate = trustme.CA().issue_cert("relay.example.test")
    credentials: Credentials = {
        "tls.crt": b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        "tls.key": certificate.private_key_pem.bytes(),
    }
    app.configure_logging(settings)
    metrics = Metrics()
    metrics.configure(settings, {})
    (directory / "data" / "incoming").mkdir(parents=True)
    dispatcher = Discarding(
        settings,
        credentials,
        directory=directory / "data",
        metrics=metrics,
        now=time.time,
        monotonic=time.monotonic,
        random=random.SystemRandom(),
    )
    admission = admission_type(settings, metrics=metrics, monotonic=time.monotonic, now=time.time)
    serving = Listeners(
        settings,
        credentials,
        bind=("127.0.0.1",),
        admission=admission,
        dispatcher=dispatcher,
        metrics=metrics,
        now=time.time,
        monotonic=time.monotonic,
    )
    await serving.start()
    _tell({name: port for name, (_, port) in serving.addresses.items()})
    await asyncio.Event().wait()


class Handler:
    """aiosmtpd's hook for a whole message."""

    async def handle_DATA(self, server: smtp.SMTP, session: smtp.Session, envelope: smtp.Envelope) -> str:  # noqa: N802 - aiosmtpd's
        return "250 OK"


async def aiosmtpd() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: smtp.SMTP(Handler(), hostname="relay.example.test", enable_SMTPUTF8=True, loop=loop),
        "127.0.0.1",
        0,
        backlog=1024,
    )
    _tell({"plain": server.sockets[0].getsockname()[1]})
    await asyncio.Event().wait()


def _tell(ports: dict[str, int]) -> None:
    print(json.dumps(ports), flush=True)


@contextlib.contextmanager
def running(kind: str, directory: Path) -> Iterator[tuple[Running, dict[str, int]]]:
    """Such a server, and the ports of its listeners."""
    directory.mkdir(parents=True)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.discard", kind, str(directory)], stdout=subprocess.PIPE, stderr=log
        )
    try:
        if process.stdout is None or not (line := process.stdout.readline()):
            raise RuntimeError(f"the server {kind} did not start; see {directory / 'log'}")
        ports = json.loads(line)
        yield Running(ports["plain"], process.pid), ports
    finally:
        process.terminate()
        process.wait()


def main(kind: str, directory: Path) -> None:
    match kind:
        case "mailsluice":
            uvloop.run(mailsluice(directory, Admission))
        case "no-hash":
            uvloop.run(mailsluice(directory, NoHash))
        case "aiosmtpd":
            uvloop.run(aiosmtpd())
        case _:
            raise SystemExit(f"no such server: {kind}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
