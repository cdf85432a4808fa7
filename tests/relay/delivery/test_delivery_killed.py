"""What got 250 is delivered, whatever happens to the process: kill -9 under load, at moments of all kinds."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mailsluice_relay import config
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.metrics import Metrics

CHILD = Path(__file__).with_name("submitting_child.py")
KILLS = int(os.environ.get("MAILSLUICE_KILLS", "3"))
"""For each size; `make kills` has 100."""


def ids(texts: list[bytes]) -> list[str]:
    return [text.split(b"\r\n", 1)[0].removeprefix(b"Subject: ").decode() for text in texts]


async def killed_after(acknowledgements: int, *arguments: str) -> list[str]:
    """Run the child until it has acknowledged so many, kill it, and return all that it acknowledged."""
    child = await asyncio.create_subprocess_exec(sys.executable, CHILD, *arguments, stdout=subprocess.PIPE, stderr=None)
    assert child.stdout is not None
    acknowledged: list[str] = []
    async with asyncio.timeout(60):
        while len(acknowledged) < acknowledgements:
            line = await child.stdout.readline()
            if line.count(b" ") == 0 and line:
                acknowledged.append(line.decode().strip())
    os.kill(child.pid, signal.SIGKILL)
    rest = await child.stdout.read()
    await child.wait()
    # A line without its end was not written whole; its message may or may not be there.
    acknowledged += [line.decode() for line in rest.split(b"\n")[:-1] if b" " not in line]
    return acknowledged


@pytest.mark.parametrize(("size", "load"), [(500, 400), (400_000, 30)])
async def test_kill_9_under_load_loses_nothing_that_was_acknowledged(
    make_upstream: Any, tmp_path: Path, until: Any, size: int, load: int
) -> None:
    server = await make_upstream()
    chance = random.Random(size)
    acknowledged: list[str] = []
    for number in range(KILLS):
        moment = chance.randrange(load // 4, load)
        acknowledged += await killed_after(moment, str(tmp_path / "data"), str(server.port), f"K{number}", str(size))

    upstream = config.Upstream(name="up", host="127.0.0.1", port=server.port, tls=config.UpstreamTLSMode.PLAIN)
    dispatcher = Dispatcher(
        config.Configuration(
            revision="1",
            credentials_revision="1",
            relay=config.Relay(name="r", namespace="n"),
            hostname="relay.test",
            listeners=(config.Listener(name="submission", port=0),),
            upstreams=(upstream,),
        ),
        {},
        directory=tmp_path / "data",
        metrics=Metrics(),
        now=time.time,
        monotonic=time.monotonic,
        random=random.Random(1),
    )
    await dispatcher.start()
    try:
        await until(lambda: dispatcher.counts().active + dispatcher.counts().deferred == 0, seconds=60)
    finally:
        await dispatcher.stop(5.0)
    delivered = ids(server.texts())
    assert len(acknowledged) >= load // 2
    assert set(acknowledged) <= set(delivered)
    whole = {len(text) for text in server.texts()}
    assert len(whole) == 1  # nothing was cut
    # Duplicates only of what was under way, or being recorded, when the process was killed: at most so many each time.
    assert len(delivered) - len(set(delivered)) <= KILLS * 20
    assert list((tmp_path / "data" / "bodies").iterdir()) == []
