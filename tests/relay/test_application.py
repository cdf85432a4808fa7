"""A relay process lives no longer than its parts: one that delivers nothing any more must not look well."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mailsluice_relay import reload
from mailsluice_relay.app import Application, Options, UnexpectedEndError
from mailsluice_relay.config import Configuration, Listener, ListenerMode, Relay, Upstream
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.envelope import Message
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.spool.spool import Spool

CONFIGURATION = Configuration(
    revision="1",
    credentials_revision="1",
    relay=Relay(name="out", namespace="mail"),
    hostname="relay.test",
    listeners=(Listener(name="smtp", port=0, mode=ListenerMode.PLAIN),),
    upstreams=(Upstream(name="provider", host="127.0.0.1", port=9),),
)


class UnforeseenError(Exception):
    """Something that nobody thought of."""


@pytest.fixture
def application(tmp_path: Path) -> Application:
    for name in ("config", "credentials", "data"):
        (tmp_path / name).mkdir()
    options = Options(tmp_path, tmp_path / "data", bind=("127.0.0.1",), http_port=0, grace=5.0)
    return Application(options, reload.Loaded(CONFIGURATION, {"revision": b"1"}))


async def listening(application: Application, running: asyncio.Task[None]) -> None:
    async with asyncio.timeout(10):
        while not application.health.listening:
            assert not running.done()
            await asyncio.sleep(0.005)


async def queued_in(directory: Path) -> int:
    """How many messages the next process on this directory finds."""
    dispatcher = Dispatcher(
        CONFIGURATION,
        {},
        directory=directory,
        metrics=Metrics(),
        now=time.time,
        monotonic=time.monotonic,
        random=random.SystemRandom(),
    )
    await dispatcher.start()
    try:
        counts = dispatcher.counts()
        return counts.active + counts.deferred
    finally:
        await dispatcher.stop(0.0)


async def test_it_ends_when_nothing_is_delivered_any_more_and_keeps_what_it_took(
    application: Application, make_message: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = asyncio.create_task(application.run())
    await listening(application, running)
    assert (await application.dispatcher.submit(make_message())).code == 250

    def fail(*_: object) -> Awaitable[Any]:
        raise UnforeseenError("the feeder")

    monkeypatch.setattr(Spool, "due", fail)
    await application.dispatcher.flush()  # which makes it look at the store
    async with asyncio.timeout(10):
        with pytest.raises(UnexpectedEndError, match="dispatcher") as caught:
            await running
    assert isinstance(caught.value.__cause__, UnforeseenError)
    monkeypatch.undo()
    assert await queued_in(application.options.data_directory) == 1


@pytest.mark.parametrize("fault", [UnforeseenError("the watch"), None], ids=["fails", "ends"])
async def test_it_ends_when_no_configuration_would_be_read_any_more(
    application: Application, monkeypatch: pytest.MonkeyPatch, fault: UnforeseenError | None
) -> None:
    async def changes(*_: object) -> AsyncIterator[reload.Loaded]:
        if fault is not None:
            raise fault
        nothing: tuple[reload.Loaded, ...] = ()
        for loaded in nothing:
            yield loaded

    monkeypatch.setattr(reload, "changes", changes)
    async with asyncio.timeout(10):
        with pytest.raises(UnexpectedEndError, match="configuration") as caught:
            await application.run()
    assert caught.value.__cause__ is fault


async def test_a_stop_is_no_failure(application: Application) -> None:
    running = asyncio.create_task(application.run())
    await listening(application, running)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(10):
        await running
