"""What the operator reads of a relay's /readyz is what a relay writes there."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import pytest

from mailsluice_operator.app import probe
from mailsluice_operator.app.probe import PodProbe
from mailsluice_relay import config
from mailsluice_relay.app import Application, Options
from mailsluice_relay.dispatch import QueueCounts
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Mailbox, Recipient
from mailsluice_relay.reload import Loaded


@dataclass
class Octets:
    octets: bytes

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        yield self.octets

    def close(self) -> None:
        pass


@pytest.fixture
def closed() -> Iterator[int]:
    """A port that nobody listens on, and nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - the relay sets no event for it, and the wait is bounded
            await asyncio.sleep(0.02)


async def test_services_that_a_relay_asks_in_vain_are_seen(tmp_path: Path, closed: int) -> None:
    configuration = config.Configuration(
        revision="r7",
        credentials_revision="c1",
        relay=config.Relay(name="out", namespace="mail"),
        hostname="relay.example.test",
        listeners=(
            config.Listener(name="smtp", port=0, mode=config.ListenerMode.PLAIN, allow_plaintext_authentication=True),
        ),
        authentication=config.Authentication(users=(config.User(login="ann@example.test"),)),
        upstreams=(config.Upstream(name="provider", host="127.0.0.1", port=closed),),
        rate_limit_store=config.RateLimitStore(credentials="store"),
        spam=config.Spam(
            engines=(config.Engine(name="clamd", type=config.EngineType.CLAM_AV, address=f"127.0.0.1:{closed}"),)
        ),
    )
    options = Options(tmp_path, tmp_path / "data", ("127.0.0.1",), 0, grace=0.0)
    options.data_directory.mkdir()
    credentials = {"store.url": f"redis://:sesame@127.0.0.1:{closed}/0".encode()}
    relay = Application(options, Loaded(configuration, credentials))
    async with relay._started(), aiohttp.ClientSession() as session:
        ask = PodProbe(session, relay.administration.address[1])

        async def store_is_seen() -> bool:
            report = await ask("127.0.0.1")
            return report is not None and report.limit_store_error is not None

        await eventually(store_is_seen)
        client = Client("s1", "smtp", "192.0.2.7", 40000, login=Login("ann@example.test", "PLAIN"))
        envelope = Envelope(Mailbox("ann", "example.test"), recipients=[Recipient(Mailbox("to", "other.test"))])
        content = Content(b"From: ann@example.test\r\n", Octets(b"Hello\r\n"))
        judgement = await relay.admission.message(client, envelope, content, queue_id="Q1")
        assert judgement.verdict.is_positive  # onFailure Allow, both of them
        report = await ask("127.0.0.1")
    assert report is not None
    assert report.revision == "r7"
    assert [name for name, _ in report.engines_down] == ["clamd"]
    assert "sesame" not in str(report)


def test_what_is_read_of_a_queue_is_told_by_a_relay() -> None:
    told = {field.name for field in dataclasses.fields(QueueCounts)}
    assert {field.encode_name for field in msgspec.structs.fields(probe._Queue)} <= told
