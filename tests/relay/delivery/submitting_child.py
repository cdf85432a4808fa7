"""A process to be killed: submits messages as fast as it can, and writes the id of each that got its 250.

Arguments: data directory, port of the upstream, prefix of the ids, size of the bodies.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

import uvloop

from mailsluice_relay import config
from mailsluice_relay.dispatch import Dispatcher
from mailsluice_relay.envelope import Envelope, Mailbox, Message, Recipient
from mailsluice_relay.metrics import Metrics


async def submit(dispatcher: Dispatcher, queue_id: str, size: int) -> None:
    writer = dispatcher.new_content()
    writer.write(f"Subject: {queue_id}\r\n\r\n".encode() + b"0123456789abcdef\r\n" * (size // 18))
    message = Message(
        queue_id,
        Envelope(Mailbox("app", "example.test"), recipients=[Recipient(Mailbox("a", "x.test"))]),
        writer.finish(),
        "app@example.test",
        "submission",
        "192.0.2.1",
        time.time(),
    )
    reply = await dispatcher.submit(message)
    if reply.code == 250:
        print(queue_id, flush=True)


async def main(directory: str, port: int, prefix: str, size: int) -> None:
    upstream = config.Upstream(name="up", host="127.0.0.1", port=port, tls=config.UpstreamTLSMode.PLAIN)
    configuration = config.Configuration(
        revision="1",
        credentials_revision="1",
        relay=config.Relay(name="r", namespace="n"),
        hostname="relay.test",
        listeners=(config.Listener(name="submission", port=0),),
        upstreams=(upstream,),
    )
    dispatcher = Dispatcher(
        configuration,
        {},
        directory=Path(directory),
        metrics=Metrics(),
        now=time.time,
        monotonic=time.monotonic,
        random=random.Random(),
    )
    await dispatcher.start()

    async def session(number: int) -> None:
        for count in range(1_000_000):
            await submit(dispatcher, f"{prefix}{number:02}{count:06}", size)

    await asyncio.gather(*(session(number) for number in range(20)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
