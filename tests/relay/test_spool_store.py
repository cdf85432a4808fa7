"""What the queue promises: what was put is there after any end of the process; what is damaged harms nothing else."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mailsluice_relay.envelope import BodyType, Content, Envelope, Mailbox, Message, Notify, Recipient
from mailsluice_relay.spool.content import MemoryBody
from mailsluice_relay.spool.errors import SpoolError, SpoolFull
from mailsluice_relay.spool.record import Progress, RecipientStatus, Standing, State, entry_of
from mailsluice_relay.spool.spool import Quota, Spool
from mailsluice_relay.spool.store import MIGRATIONS, Settlement, Store

LARGE = b"0123456789abcdef" * 40_000
MIDDLING = LARGE[:100_000]
"""In memory as long as it is read, and a file in the queue."""
ROOMY = Quota(maximum_messages=1_000_000, disk_reserve=0)


@asynccontextmanager
async def opened(tmp_path: Path, quota: Quota = ROOMY) -> Any:
    spool = Spool(tmp_path / "data", quota)
    await spool.open(now=0.0)
    try:
        yield spool
    finally:
        await spool.close()


def database(tmp_path: Path) -> sqlite3.Connection:
    return sqlite3.connect(tmp_path / "data" / "queue.sqlite3", isolation_level=None)


async def ids(spool: Spool, now: float = 1e12) -> list[str]:
    return [entry.queue_id for entry in (await spool.due(now, None, 1000)).entries]


async def text(spool: Spool, queue_id: str) -> bytes | None:
    content = await spool.content(queue_id)
    return None if content is None else b"".join(content.chunks())


@pytest.mark.parametrize("body", [b"Hello.\r\n", b"", MIDDLING, LARGE])
async def test_a_message_comes_back_whole_after_a_restart(tmp_path: Path, make_message: Any, body: bytes) -> None:
    message = make_message(
        body=body,
        sender="jürgen@münchen.test",
        to=(
            Recipient(Mailbox('"a b"', "Example.ORG"), Notify.SUCCESS | Notify.FAILURE, "rfc822;A+20b@x"),
            Recipient(Mailbox("c", "example.org"), Notify.NEVER),
            Recipient(Mailbox("Postmaster", "")),
        ),
        ret="HDRS",
        envid="QQ314159",
        internationalized=True,
    )
    wanted = b"".join(message.content.chunks())
    async with opened(tmp_path) as spool:
        await spool.put(message)
    async with opened(tmp_path) as spool:
        entry = await spool.get(message.queue_id)
        assert entry is not None
        assert entry.envelope == message.envelope
        assert (entry.login, entry.listener, entry.client_address) == ("app@example.test", "submission", "192.0.2.1")
        assert entry.state is State.ACTIVE
        assert await text(spool, message.queue_id) == wanted


async def test_concurrent_messages_share_commits(tmp_path: Path, make_message: Any) -> None:
    commits = 0

    class Counting(Store):
        def commit(self) -> None:
            nonlocal commits
            commits += 1
            super().commit()

    async with opened(tmp_path) as spool:
        spool._store.__class__ = Counting
        await asyncio.gather(*(spool.put(make_message()) for _ in range(200)))
        assert commits < 50
        assert len(await ids(spool)) == 200


async def test_due_comes_in_order_of_time_page_by_page(tmp_path: Path, make_message: Any) -> None:
    async with opened(tmp_path) as spool:
        for when in (10.0, 30.0, 20.0, 10.0, 99.0):
            await spool.put(make_message(queue_id=f"Q{when:.0f}-{spool.number(State.ACTIVE)}", received_at=when))
        seen, cursor = [], None
        while True:
            page = await spool.due(50.0, cursor, 2)
            seen += [entry.queue_id for entry in page.entries]
            if page.cursor is None:
                break
            cursor = page.cursor
        assert seen == ["Q10-0", "Q10-3", "Q20-2", "Q30-1"]
        assert await spool.next_due(50.0) == 99.0
        assert await spool.oldest() == 10.0


async def test_an_attempt_is_recorded_per_recipient(tmp_path: Path, make_message: Any) -> None:
    message = make_message(to=("a@x.test", "b@x.test"))
    progress = Progress(
        (RecipientStatus(Standing.DELIVERED, 1, "250 OK"), RecipientStatus(Standing.PENDING, 1, "451 later")), 1
    )
    async with opened(tmp_path) as spool:
        await spool.put(message)
        await spool.settle(Settlement(message.queue_id, progress, next_attempt=5000.0))
        assert (spool.number(State.ACTIVE), spool.number(State.DEFERRED)) == (0, 1)
    async with opened(tmp_path) as spool:
        entry = await spool.get(message.queue_id)
        assert entry.progress == progress
        assert entry.pending == [1]
        assert (entry.state, entry.next_attempt) == (State.DEFERRED, 5000.0)
        assert await ids(spool, 4999.0) == []
        assert await spool.flush(2000.0) == 1
        assert await ids(spool, 2000.0) == [message.queue_id]


@pytest.mark.parametrize("body", [MIDDLING, LARGE])
async def test_a_settled_message_leaves_nothing_behind(tmp_path: Path, make_message: Any, body: bytes) -> None:
    message = make_message(body=body)
    async with opened(tmp_path) as spool:
        await spool.put(message)
        assert [path.name for path in (tmp_path / "data" / "bodies").iterdir()] == [message.queue_id]
        await spool.settle(Settlement(message.queue_id, None))
        assert spool.is_empty
        assert spool.octets == 0
    assert list((tmp_path / "data" / "bodies").iterdir()) == []
    assert database(tmp_path).execute("SELECT count(*) FROM contents").fetchone() == (0,)


async def test_a_body_that_cannot_be_made_a_file_leaves_nothing(tmp_path: Path, make_message: Any) -> None:
    message = make_message(body=MIDDLING)
    async with opened(tmp_path) as spool:
        incoming = tmp_path / "data" / "incoming"
        incoming.rmdir()
        with pytest.raises(SpoolError):
            await spool.put(message)
        assert spool.is_empty
        assert await ids(spool) == []
        incoming.mkdir()
        await spool.put(message)
        assert await text(spool, message.queue_id) == b"".join(message.content.chunks())


async def test_what_comes_in_one_group_is_done_in_its_order(tmp_path: Path, make_message: Any) -> None:
    """New and settled messages are gathered; whatever looks at them finds them there, or gone."""
    old = [make_message() for _ in range(70)]
    new = [make_message() for _ in range(70)]
    async with opened(tmp_path) as spool:
        await asyncio.gather(*map(spool.put, old))
        results = await asyncio.gather(
            *map(spool.put, new),
            spool.move(new[0].queue_id, frm=[State.ACTIVE], to=State.HELD, next_attempt=None),
            *(spool.settle(Settlement(message.queue_id, None)) for message in old),
            spool.remove(old[0].queue_id),
            spool.remove(new[1].queue_id),
        )
        assert [result for result in results if isinstance(result, bool)] == [True, False, True]
        assert await ids(spool) == [message.queue_id for message in new[2:]]
        assert (spool.number(State.ACTIVE), spool.number(State.HELD)) == (68, 1)
        assert spool.octets == sum(message.content.size for message in [new[0], *new[2:]])
    assert database(tmp_path).execute("SELECT count(*) FROM contents").fetchone() == (69,)


async def test_a_bounce_and_its_cause_are_one_transaction(tmp_path: Path, make_message: Any) -> None:
    """A bounce that cannot be written leaves the message where it was."""
    message, bounce = make_message(), make_message(sender=None)
    async with opened(tmp_path) as spool:
        await spool.put(message)
        await spool.put(bounce)
        with pytest.raises(SpoolError, match="UNIQUE"):
            await spool.settle(Settlement(message.queue_id, None, notices=((entry_of(bounce), bounce.content),)))
        assert set(await ids(spool)) == {message.queue_id, bounce.queue_id}
        assert spool.number(State.ACTIVE) == 2


async def test_one_bad_operation_does_not_spoil_its_group(tmp_path: Path, make_message: Any) -> None:
    first = make_message()
    async with opened(tmp_path) as spool:
        await spool.put(first)
        others = [make_message() for _ in range(20)]
        twice = make_message(queue_id=first.queue_id)
        results = await asyncio.gather(*map(spool.put, [*others, twice]), return_exceptions=True)
        assert [type(r) for r in results if isinstance(r, Exception)] == [SpoolError]
        assert len(await ids(spool)) == 21
        assert spool.number(State.ACTIVE) == 21


async def test_held_stays_held_whatever_an_attempt_under_way_says(tmp_path: Path, make_message: Any) -> None:
    message = make_message()
    async with opened(tmp_path) as spool:
        await spool.put(message)
        assert await spool.move(message.queue_id, frm=(State.ACTIVE,), to=State.HELD, next_attempt=None)
        await spool.settle(Settlement(message.queue_id, Progress((RecipientStatus(),), 1), next_attempt=1.0))
        assert spool.number(State.HELD) == 1
        assert await ids(spool) == []
        assert await spool.flush(1e12) == 0


async def test_the_quota_holds_for_concurrent_messages(tmp_path: Path, make_message: Any) -> None:
    messages = [make_message(body=b"x" * 1000) for _ in range(50)]
    size = messages[0].content.size
    async with opened(tmp_path, Quota(1000, maximum_bytes=10 * size, disk_reserve=0)) as spool:
        results = await asyncio.gather(*map(spool.put, messages), return_exceptions=True)
        refused = sum(isinstance(r, SpoolFull) for r in results)
        assert 40 <= refused < 50
        assert spool.octets == (50 - refused) * size
        await spool.remove((await ids(spool))[0])
        await spool.put(make_message(body=b"x" * 1000))
    async with opened(tmp_path, Quota(maximum_messages=10, disk_reserve=0)) as spool:
        assert not spool.has_room()
        await spool.remove((await ids(spool))[0])
        assert spool.has_room()


async def test_the_disk_reserve_is_left_alone(tmp_path: Path, make_message: Any) -> None:
    async with opened(tmp_path, Quota(1000, disk_reserve=1 << 60)) as spool:
        message = make_message(body=LARGE)
        with pytest.raises(SpoolFull):
            await spool.put(message)
    assert list((tmp_path / "data" / "incoming").iterdir()) == []


async def test_a_full_database_refuses_and_keeps_nothing(tmp_path: Path, make_message: Any) -> None:
    """SQLite's own limit stands in for the disk's: the error is the same SQLITE_FULL."""
    async with opened(tmp_path) as spool:
        await spool.put(make_message())
        spool._connection.execute("PRAGMA max_page_count = 20")
        messages = [make_message(body=b"y" * 50_000) for _ in range(10)]
        results = await asyncio.gather(*map(spool.put, messages), return_exceptions=True)
        refused = sum(isinstance(r, SpoolFull) for r in results)
        assert refused >= 8
        assert len(await ids(spool)) == 11 - refused
        await spool.remove((await ids(spool))[0])  # what is there can still be settled


async def test_only_the_owner_can_read_the_queue(tmp_path: Path, make_message: Any) -> None:
    async with opened(tmp_path) as spool:
        await spool.put(make_message(body=LARGE))
        files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
        assert len(files) >= 4
        assert {oct(path.stat().st_mode & 0o077) for path in files} == {"0o0"}


async def test_only_one_process_has_the_queue(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(SpoolError, match="in use by another process"):
            await Spool(tmp_path / "data", ROOMY).open(now=0.0)
    async with opened(tmp_path):
        pass


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    database(tmp_path).execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(SpoolError, match="run the release that wrote it"):
        await Spool(tmp_path / "data", ROOMY).open(now=0.0)


async def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, make_message: Any) -> None:
    kept = make_message(body=LARGE)
    async with opened(tmp_path) as spool:
        await spool.put(kept)
    (tmp_path / "data" / "bodies" / "orphan").write_bytes(b"x")
    (tmp_path / "data" / "incoming" / "half.body").write_bytes(b"x")
    async with opened(tmp_path):
        assert [path.name for path in (tmp_path / "data" / "bodies").iterdir()] == [kept.queue_id]
        assert list((tmp_path / "data" / "incoming").iterdir()) == []


async def _lose_the_body(tmp_path: Path, queue_id: str) -> None:
    (tmp_path / "data" / "bodies" / queue_id).unlink()


async def _cut_the_body(tmp_path: Path, queue_id: str) -> None:
    (tmp_path / "data" / "bodies" / queue_id).write_bytes(LARGE[:100])


async def _garble_the_record(tmp_path: Path, queue_id: str) -> None:
    database(tmp_path).execute("UPDATE messages SET record = x'c1c1c1' WHERE queue_id = ?", (queue_id,))


async def _garble_the_progress(tmp_path: Path, queue_id: str) -> None:
    database(tmp_path).execute("UPDATE messages SET progress = x'93900000' WHERE queue_id = ?", (queue_id,))


async def _lose_the_content(tmp_path: Path, queue_id: str) -> None:
    connection = database(tmp_path)
    (number,) = connection.execute("SELECT id FROM messages WHERE queue_id = ?", (queue_id,)).fetchone()
    connection.execute("DELETE FROM contents WHERE id = ?", (number,))


@pytest.mark.parametrize(
    "damage", [_lose_the_body, _cut_the_body, _garble_the_record, _garble_the_progress, _lose_the_content]
)
async def test_a_damaged_message_is_quarantined_and_the_others_go_on(
    tmp_path: Path, make_message: Any, damage: Callable[[Path, str], Awaitable[None]]
) -> None:
    bad, good = make_message(body=LARGE), make_message(body=LARGE)
    async with opened(tmp_path) as spool:
        await spool.put(bad)
        await spool.put(good)
    await damage(tmp_path, bad.queue_id)
    async with opened(tmp_path) as spool:
        readable = [queue_id for queue_id in await ids(spool) if await spool.content(queue_id) is not None]
        assert readable == [good.queue_id]
        assert spool.number(State.QUARANTINED) == 1
        assert await ids(spool) == [good.queue_id]


async def test_a_damaged_database_is_moved_aside_and_saved_from(tmp_path: Path, make_message: Any) -> None:
    messages = [make_message(body=b"z" * 3000) for _ in range(200)]
    async with opened(tmp_path) as spool:
        await asyncio.gather(*map(spool.put, messages))
    path = tmp_path / "data" / "queue.sqlite3"
    octets = bytearray(path.read_bytes())
    for page in range(1, len(octets) // 8192, 3):  # every third page is lost, some of them of an index
        octets[page * 8192 : page * 8192 + 4096] = b"\xff" * 4096
    path.write_bytes(octets)
    async with opened(tmp_path) as spool:
        saved = await ids(spool)
        assert set(saved) < {message.queue_id for message in messages}
        await spool.put(make_message())
        assert len(await ids(spool)) == len(saved) + 1
    assert [p.name for p in (tmp_path / "data" / "quarantine" / "0").iterdir()] == ["queue.sqlite3"]


async def test_what_is_no_database_at_all_does_not_keep_the_relay_from_starting(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "queue.sqlite3").write_bytes(b"not a database, whatever else" * 100)
    async with opened(tmp_path) as spool:
        assert spool.is_empty


def test_a_queue_of_20_000_opens_fast_and_in_little_memory(tmp_path: Path) -> None:
    """Never all at once: a page of what is due, and the counts."""

    async def fill() -> None:
        async with opened(tmp_path) as spool:
            template = Envelope(Mailbox("a", "b.test"), BodyType.SEVEN_BIT, recipients=[Recipient(Mailbox("c", "d"))])
            for start in range(0, 20_000, 1000):
                await asyncio.gather(
                    *(
                        spool.put(
                            Message(
                                f"N{n:08}",
                                template,
                                Content(b"Subject: x\r\n", MemoryBody(b"m" * 2000)),
                                "l",
                                "",
                                "",
                                float(n),
                            )
                        )
                        for n in range(start, start + 1000)
                    )
                )

    async def reopen() -> tuple[float, int]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        async with opened(tmp_path) as spool:
            took = time.perf_counter() - started
            assert spool.number(State.ACTIVE) == 20_000
            page = await spool.due(1e12, None, 500)
            assert len(page.entries) == 500
            assert page.cursor is not None
        return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    asyncio.run(fill())
    took, grown = asyncio.run(reopen())
    assert took < 2.0
    assert grown < 20 * 1024  # KiB
