"""Takes messages, makes them durable, and sees each through to its end.

A message that has just been taken goes to its lane with its content, without being read again; one that finds no room
there, or waits for another attempt, is fetched from the store when it is due. While a message is in a lane or under way
it is claimed, so that the walk over the store passes it by; nothing is written for that, and after a kill everything is
simply due again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog

from mailsluice_relay.config import Configuration, Credentials, Queue, QueueMode
from mailsluice_relay.delivery.allowance import AllowanceBook
from mailsluice_relay.delivery.client import Timeouts
from mailsluice_relay.delivery.outcome import Delivered
from mailsluice_relay.delivery.pool import Clocks, UpstreamState
from mailsluice_relay.dispatch.conclusion import Conclusion, Result, conclude
from mailsluice_relay.dispatch.feedback import OnSettled, tally
from mailsluice_relay.dispatch.lane import Item, Lane
from mailsluice_relay.dispatch.passage import Passage
from mailsluice_relay.dispatch.upstreams import Upstreams, mailbox_of
from mailsluice_relay.dispatch.view import QueuedMessage, matches, summary
from mailsluice_relay.dkim import Key, Signer, signed
from mailsluice_relay.dsn import Action, RecipientReport, build
from mailsluice_relay.envelope import Content, Envelope, Mailbox, Message, Recipient
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import INTERNAL_ERROR, QUEUE_FULL, SHUTTING_DOWN, Reply, queued
from mailsluice_relay.spool.content import ContentWriter, MemoryBody
from mailsluice_relay.spool.errors import SpoolError, SpoolFull, translated
from mailsluice_relay.spool.identifier import QueueIds
from mailsluice_relay.spool.reader import Cursor
from mailsluice_relay.spool.record import Entry, Standing, State, entry_of
from mailsluice_relay.spool.spool import Quota, Spool
from mailsluice_relay.spool.store import Settlement

if TYPE_CHECKING:
    from mailsluice_relay.delivery.mx import MailExchangers

CONTENT_MEMORY: Final = 32 * 1024 * 1024
"""Octets of content kept in memory for messages just taken; the rest is read again when its turn comes."""
PAGE: Final = 250
"""Entries fetched at once."""
GLANCE: Final = 5.0
"""Seconds after which the store is looked at even when nothing is known to be due; also how old `oldest` may be."""
WRITE_AGAIN: Final = (1.0, 30.0)
"""Seconds, growing, between attempts to record an outcome while the disk is full or broken."""

_WAITING: Final = (State.ACTIVE, State.DEFERRED)

log = structlog.get_logger("mailsluice.dispatch")


class Randomness(Protocol):
    """What is used of `random.Random`."""

    def random(self) -> float: ...

    def getrandbits(self, k: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class QueueCounts:
    active: int
    deferred: int
    held: int
    oldest_seconds: float
    bytes: int


class Dispatcher:
    def __init__(
        self,
        configuration: Configuration,
        credentials: Credentials,
        *,
        directory: Path,
        metrics: Metrics,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        random: Randomness,
        ordinal: int | None = None,
        on_settled: OnSettled | None = None,
        timeouts: Timeouts | None = None,
        exchangers: MailExchangers | None = None,
    ) -> None:
        """`ordinal` is the pod's, for `drain_from_ordinal`. Raises ConfigurationError."""
        self._configuration = configuration
        self._metrics = metrics
        self._delivery_seconds = functools.cache(metrics.delivery_seconds.labels)
        self._clocks = Clocks(now, monotonic, random.random)
        self._ordinal = ordinal
        self._on_settled = on_settled
        self._new_queue_id = QueueIds(now, random.getrandbits)
        targets = Upstreams.prepare(configuration, credentials)
        self._signer = Signer(configuration, credentials)
        self._upstreams = Upstreams(
            clocks=self._clocks,
            metrics=metrics,
            on_up=self._look,
            timeouts=timeouts,
            exchangers=exchangers,
            book=AllowanceBook(directory / "allowances.json"),
        )
        self._upstreams.apply(configuration, credentials, targets)
        self._lanes = {name: Lane(slots) for name, slots in self._upstreams.slots.items()}
        self._spool = Spool(directory, _quota(configuration))
        self._claimed: dict[str, Item] = {}
        self._released: set[str] = set()
        """What was settled while a page was being read: it may be on that page, and must not be sent again."""
        self._content_octets = 0
        self._behind = True
        """There may be mail in the store that is due and not claimed."""
        self._next_look = 0.0
        """When the feeder will look at the store next."""
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._submissions: set[asyncio.Future[Reply]] = set()
        self._feeder: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None] | None = None
        self._oldest: float | None = None
        self._is_stopping = False
        self._is_open = False

    # --- life ---------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Open the spool, recovering what is there, and begin to deliver. Raises SpoolError."""
        self._failed = asyncio.get_running_loop().create_future()
        await self._spool.open(now=self._clocks.now())
        self._is_open = True
        self._observe()
        if self.draining:
            await self._spool.flush(self._clocks.now())
        self._upstreams.check()
        self._feeder = asyncio.get_running_loop().create_task(self._feed(), name="dispatch-feed")
        self._feeder.add_done_callback(self._note_failure)

    @property
    def failed(self) -> asyncio.Future[None]:
        """Has the exception of the first task that a fault ended; nothing may be delivered from then on.

        What was taken is on the disk, and goes on in the next process. There is one after `start`.
        """
        if self._failed is None:
            raise RuntimeError("the dispatcher has not been started")
        return self._failed

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (fault := task.exception()) is None:
            return
        self._ended.set()  # whoever waits for the queue to empty need not wait for this one
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(fault)

    async def stop(self, grace: float) -> None:
        """Deliver what goes within `grace` seconds, then close; the rest stays on the disk."""
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._has_work():
                    self._ended.clear()
                    await self._ended.wait()
        if self._submissions:  # their clients wait for an answer, and the disk does not take long
            await asyncio.wait(list(self._submissions))
        if not self._is_open:
            return
        self._is_open = False
        tasks = [*self._tasks, *([] if self._feeder is None else [self._feeder])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._upstreams.close()
        await self._spool.close()

    def _has_work(self) -> bool:
        is_fed = self._feeder is not None and not self._feeder.done()
        return bool(self._claimed or self._submissions or (self._behind and is_fed))

    @staticmethod
    def check(configuration: Configuration, credentials: Credentials) -> None:
        """Raises ConfigurationError where `reconfigure` would; nothing changes."""
        Upstreams.prepare(configuration, credentials)
        Signer(configuration, credentials)

    def reconfigure(self, configuration: Configuration, credentials: Credentials) -> None:
        """Take a new configuration, whole or not at all. Raises ConfigurationError."""
        targets = Upstreams.prepare(configuration, credentials)
        signer = Signer(configuration, credentials)
        was_draining = self.draining
        self._configuration, self._signer = configuration, signer
        self._upstreams.apply(configuration, credentials, targets)
        self._spool.quota = _quota(configuration)
        before = self._lanes
        self._lanes = {}
        for name, slots in self._upstreams.slots.items():
            lane = self._lanes[name] = before.pop(name) if name in before else Lane(slots)
            lane.slots = slots
        for lane in before.values():  # the store still has it, and it is routed anew from there
            while lane.waiting:
                self._release(lane.waiting.pop())
        if self._is_open:
            if self.draining and not was_draining:
                self._spawn(self._deliver_at_once())
            self._look()

    @property
    def draining(self) -> bool:
        """This pod is to go: it takes nothing, and delivers what it holds at once (`drainFromOrdinal`)."""
        first = self._configuration.drain_from_ordinal
        return first is not None and self._ordinal is not None and self._ordinal >= first

    async def _deliver_at_once(self) -> None:
        with contextlib.suppress(SpoolError):  # the disk is in trouble: what waits comes when its time comes
            await self.flush()

    @property
    def _queue(self) -> Queue:
        """The queue's settings; a pod that drains does not wait longer and longer."""
        queue = self._configuration.queue
        if not self.draining:
            return queue
        return msgspec.structs.replace(queue, retry=msgspec.structs.replace(queue.retry, maximum=queue.retry.initial))

    def _observe(self) -> None:
        for state in (*_WAITING, State.HELD):
            self._metrics.queue_messages.labels(state.value).set_function(_number_of(self._spool, state))
        self._metrics.queue_bytes.set_function(lambda: float(self._spool.octets))
        self._metrics.queue_oldest.set_function(lambda: self.counts().oldest_seconds)

    # --- taking mail --------------------------------------------------------------------------------------------------
    def new_queue_id(self) -> str:
        return self._new_queue_id()

    def new_content(self) -> ContentWriter:
        return self._spool.new_content()

    def refuses(self) -> Reply | None:
        """What to answer to MAIL when nothing may be taken now."""
        if self._is_stopping or self.draining or not self._is_open:
            return SHUTTING_DOWN
        return None if self._spool.has_room() else QUEUE_FULL

    def passage(self, envelope: Envelope) -> Passage | None:
        """With PassThrough, this transaction's way to its upstream; None: mail is queued (`submit`)."""
        if self._configuration.queue.mode is not QueueMode.PASS_THROUGH:
            return None
        return Passage(
            self._upstreams,
            envelope,
            metrics=self._metrics,
            now=self._clocks.now,
            sign=self._signed,
            redirect_to=mailbox_of(self._configuration.recipients.redirect_to),
        )

    async def submit(self, message: Message) -> Reply:
        """250 only when the message is on the disk. The content is the queue's from here on, whatever the answer.

        Goes on when the caller is cancelled: a client that hangs up after its last dot has handed its mail over.
        """
        if not self._is_open:
            message.content.body.close()
            return SHUTTING_DOWN
        redirect = mailbox_of(self._configuration.recipients.redirect_to)
        if redirect is not None:
            message = _redirected(message, redirect)
        if self._spool.keeps_in_database(message.content):
            submission = self._put(message)
        else:
            submission = asyncio.get_running_loop().create_task(self._put_file(message))
        self._submissions.add(submission)
        submission.add_done_callback(self._submitted)
        return await asyncio.shield(submission)

    def _submitted(self, submission: asyncio.Future[Reply]) -> None:
        self._submissions.discard(submission)
        self._ended.set()

    def _put(self, message: Message) -> asyncio.Future[Reply]:
        """Queue a small message: nothing waits but for the disk, so that there is no task."""
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def written(entry: Entry | None, error: BaseException | None) -> None:
            try:
                answer.set_result(self._taken(message, entry, error))
            except Exception as fault:  # noqa: BLE001 - a fault of ours, which belongs to whoever waits
                answer.set_exception(fault)

        if keys := self._keys(message):
            message = replace(message, content=signed(message.content, keys, now=self._clocks.now()))
        try:
            self._spool.begin(message, written)
        except SpoolFull as error:
            written(None, error)
        return answer

    async def _put_file(self, message: Message) -> Reply:
        """Queue a message whose body is to be a file: making and syncing it take a while, and so does signing."""
        try:
            message = await self._signed(message)
            return self._taken(message, await self._spool.put(message), None)
        except OSError as error:
            return self._taken(message, None, translated(error))
        except SpoolError as error:
            return self._taken(message, None, error)

    async def _signed(self, message: Message) -> Message:
        keys = self._keys(message)
        if keys:
            content = await asyncio.to_thread(signed, message.content, keys, now=self._clocks.now())
            message = replace(message, content=content)
        return message

    def _keys(self, message: Message) -> Sequence[Key]:
        """Those that a message is signed with (DKIM): its author's."""
        return self._signer.keys_for(message.content) if self._signer else ()

    def _taken(self, message: Message, entry: Entry | None, error: BaseException | None) -> Reply:
        """The answer to a message that is on the disk now, or of which nothing was kept."""
        if entry is not None:
            self._offer(entry, message.content)
            return queued(message.queue_id)
        if isinstance(error, SpoolFull):
            log.warning("queue_full", queue_id=message.queue_id, error=str(error))
            return QUEUE_FULL
        log.error("queue_failed", queue_id=message.queue_id, error=str(error))
        return INTERNAL_ERROR

    # --- lanes --------------------------------------------------------------------------------------------------------
    def _offer(self, entry: Entry, content: Content | None) -> bool:
        """Put a message in its lane; False when it has to wait in the store."""
        if entry.state not in _WAITING or entry.queue_id in self._claimed:
            return True
        name = self._upstreams.lane_of(entry)
        lane = self._lanes[name]
        if not lane.has_room(entry.login or ""):
            self._behind = True
            return False
        item = Item(entry, name)
        if content is not None:
            octets = content.size if isinstance(content.body, MemoryBody) else len(content.header)
            if self._content_octets + octets <= CONTENT_MEMORY:
                item.content, item.octets = content, octets
                self._content_octets += octets
        self._claimed[entry.queue_id] = item
        lane.add(item)
        self._start(lane)
        return True

    def _start(self, lane: Lane) -> None:
        if self._is_open:
            while (item := lane.next()) is not None:
                self._spawn(self._see_through(item, lane))
        if self._behind and lane.has_drained:
            self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._note_failure)

    def _release(self, item: Item) -> None:
        """The message is the store's alone again."""
        queue_id = item.entry.queue_id
        if self._claimed.get(queue_id) is item:
            del self._claimed[queue_id]
            self._released.add(queue_id)
        self._content_octets -= item.octets
        item.content, item.octets = None, 0
        self._ended.set()

    def _look(self) -> None:
        """Walk over what is due in the store."""
        self._behind = True
        self._wake.set()

    async def _feed(self) -> None:
        """Fetch what is due from the store, a page at a time, as lanes have room for it."""
        cursor: Cursor | None = None
        failures = 0
        while True:
            try:
                cursor, pause = await self._fetch(cursor)
                failures = 0
            except SpoolError as error:
                log.error("queue_unreadable", error=str(error))  # noqa: TRY400 - the disk's state, not a fault to trace
                failures += 1
                cursor, pause = None, min(WRITE_AGAIN[0] * 2**failures, WRITE_AGAIN[1])
            self._ended.set()
            self._next_look = self._clocks.now() + pause
            if pause > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
            self._wake.clear()

    async def _fetch(self, cursor: Cursor | None) -> tuple[Cursor | None, float]:
        """One page; where to go on, and how long to wait before that."""
        now = self._clocks.now()
        if cursor is None:
            self._behind = False
        self._released.clear()
        page = await self._spool.due(now, cursor, PAGE)
        for entry in page.entries:
            if entry.queue_id not in self._released:
                self._offer(entry, None)
        self._oldest = await self._spool.oldest()
        if page.cursor is not None:
            self._behind = True
            has_room = any(lane.has_drained for lane in self._lanes.values())
            return page.cursor, 0.0 if has_room else GLANCE
        if self._behind:
            return None, GLANCE
        due = await self._spool.next_due(now)
        return None, GLANCE if due is None else min(max(due - self._clocks.now(), 0.0), GLANCE)

    # --- one message --------------------------------------------------------------------------------------------------
    async def _see_through(self, item: Item, lane: Lane) -> None:
        """One attempt for one message: deliver, then record what came of it."""
        is_over = True
        try:
            entry = item.entry
            try:
                content = item.content or await self._spool.content(entry.queue_id)
                results = {} if content is None else await self._upstreams.deliver(entry, content, preferred=item.lane)
            finally:
                lane.delivered()
                self._start(lane)
            if content is not None:  # None: removed, or just quarantined
                await self._conclude(entry, content, results)
        except SpoolError as error:  # it is still due, and found again
            log.error("message_unreadable", queue_id=item.entry.queue_id, error=str(error))  # noqa: TRY400 - the disk's state, not a fault to trace
        except Exception:
            # A fault of ours, perhaps after the upstream took the mail: it stays claimed, so that it is not sent over
            # and over; the next start tries it again.
            log.exception("message_stuck", queue_id=item.entry.queue_id)
            is_over = False
        finally:
            lane.recorded()
            if is_over:
                self._release(item)
            self._start(lane)

    async def _conclude(self, entry: Entry, content: Content, results: Mapping[int, Result]) -> None:
        now = self._clocks.now()
        conclusion = conclude(entry, results, self._queue, now=now, random=self._clocks.random)
        notices = self._notices(entry, content, conclusion, now)
        await self._record(Settlement(entry.queue_id, conclusion.progress, conclusion.next_attempt, tuple(notices)))
        if conclusion.next_attempt is not None and conclusion.next_attempt < self._next_look:
            self._next_look = conclusion.next_attempt
            self._wake.set()
        self._count(entry, results, conclusion, now)
        for notice, text in notices:
            self._offer(notice, text)

    async def _record(self, settlement: Settlement) -> None:
        """Until it is recorded the message stays claimed: sending it again would be a duplicate."""
        wait = WRITE_AGAIN[0]
        while True:
            try:
                await self._spool.settle(settlement)
                return
            except SpoolError as error:
                log.error("outcome_not_recorded", queue_id=settlement.queue_id, error=str(error), again_in=wait)  # noqa: TRY400 - the disk's state, not a fault to trace
            await asyncio.sleep(wait)
            wait = min(wait * 2, WRITE_AGAIN[1])

    def _notices(
        self, entry: Entry, content: Content, conclusion: Conclusion, now: float
    ) -> list[tuple[Entry, Content]]:
        notices = []
        for action, reports in conclusion.reports.items():
            to = self._whom_to_tell(entry, action, reports)
            if to is not None:
                notices.append(self._notice(entry, content, reports, to, now))
        return notices

    def _whom_to_tell(self, entry: Entry, action: Action, reports: list[RecipientReport]) -> Mailbox | None:
        """The sender. What has none is itself a notification: never answered, but its failure is shown to somebody."""
        if entry.envelope.sender is not None:
            return entry.envelope.sender
        address = mailbox_of(self._configuration.bounces.address)
        is_our_own = any(report.recipient.mailbox == address for report in reports)
        return address if action is Action.FAILED and not is_our_own else None

    def _notice(
        self, entry: Entry, content: Content, reports: list[RecipientReport], to: Mailbox, now: float
    ) -> tuple[Entry, Content]:
        hostname = self._configuration.hostname
        queue_id = self.new_queue_id()
        notification = build(
            reports,
            original=entry.envelope,
            content=content,
            queue_id=entry.queue_id,
            received_at=entry.received_at,
            retry_until=entry.received_at + self._configuration.queue.lifetime,
            to=to,
            hostname=hostname,
            sender=self._configuration.bounces.address or f"MAILER-DAEMON@{hostname}",
            notification_id=queue_id,
            now=now,
        )
        text = Content(notification.header, MemoryBody(notification.body))
        if self._signer and (keys := self._signer.keys_for(text)):
            text = signed(text, keys, now=now)
        message = Message(queue_id, notification.envelope, text, None, "", "", now, reason="notification")
        return entry_of(message), text

    def _count(self, entry: Entry, results: Mapping[int, Result], conclusion: Conclusion, now: float) -> None:
        for bounce in conclusion.bounces:
            self._metrics.bounces.labels(bounce).inc()
        if self._on_settled is not None and entry.login is not None:
            self._on_settled(entry.login, *tally(result.outcome for result in results.values()))
        for position, result in results.items():
            outcome = result.outcome
            if isinstance(outcome, Delivered) and result.upstream is not None:
                self._delivery_seconds(result.upstream).observe(now - entry.received_at)
            # Nobody could be tried: 100,000 messages that wait for an upstream to come back would fill the log.
            write = log.info if result.upstream is not None else log.debug
            write(
                _EVENTS[conclusion.recipients[position].standing],
                queue_id=entry.queue_id,
                login=entry.login,
                to=self._shown(entry.envelope.recipients[position].mailbox),
                upstream=result.upstream,
                answer=conclusion.recipients[position].reply,
                seconds=round(now - entry.received_at, 3),
            )

    def _shown(self, mailbox: Mailbox) -> str:
        return f"***@{mailbox.domain}" if self._configuration.logging.redact_addresses else str(mailbox)

    # --- queue control ------------------------------------------------------------------------------------------------
    def counts(self) -> QueueCounts:
        oldest = 0.0 if self._oldest is None else max(0.0, self._clocks.now() - self._oldest)
        if not self._is_open:
            return QueueCounts(0, 0, 0, 0.0, 0)
        active, deferred, held = (self._spool.number(state) for state in (*_WAITING, State.HELD))
        return QueueCounts(active, deferred, held, oldest if active or deferred else 0.0, self._spool.octets)

    def upstream_states(self) -> Mapping[str, UpstreamState]:
        return self._upstreams.states()

    async def list_messages(
        self,
        *,
        state: str | None = None,
        login: str | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        limit: int = 1000,
    ) -> list[QueuedMessage]:
        """Messages in the order in which they came. Addresses are compared without case; all filters must fit."""
        found: list[QueuedMessage] = []
        row = 0
        while True:
            page = await self._spool.page(state=state, login=login, after=row, limit=PAGE)
            for entry in page.entries:
                if matches(entry, sender, recipient):
                    found.append(summary(entry))
                    if len(found) >= limit:
                        return found
            if page.cursor is None:
                return found
            row = page.cursor.row

    async def show(self, queue_id: str) -> QueuedMessage | None:
        """One message, with its header section."""
        entry = await self._spool.get(queue_id)
        content = None if entry is None else await self._spool.content(queue_id)
        return None if entry is None or content is None else summary(entry, content.header)

    async def hold(self, queue_id: str) -> bool:
        """Do not send it before it is released. What is being sent at this moment may still go."""
        done = await self._spool.move(queue_id, frm=_WAITING, to=State.HELD, next_attempt=None)
        if done:
            self._withdraw(queue_id)
        return done

    async def release(self, queue_id: str) -> bool:
        """Send a held message now."""
        done = await self._spool.move(queue_id, frm=(State.HELD,), to=State.ACTIVE, next_attempt=self._clocks.now())
        self._look()
        return done

    async def requeue(self, queue_id: str) -> bool:
        """Try a message again from the start, whatever it waits for: attempts and waiting time are forgotten."""
        done = await self._spool.restart(queue_id, self._clocks.now())
        self._look()
        return done

    async def remove(self, queue_id: str) -> bool:
        """Forget a message, without a word to its sender."""
        done = await self._spool.remove(queue_id)
        if done:
            self._withdraw(queue_id)
            log.info("removed", queue_id=queue_id)
        return done

    async def flush(self) -> int:
        """Try everything now that waits for its next attempt, also at upstreams that are down; how many that are."""
        number = await self._spool.flush(self._clocks.now())
        self._upstreams.probe()
        self._look()
        return number

    def _withdraw(self, queue_id: str) -> None:
        item = self._claimed.get(queue_id)
        if item is not None and not item.is_running:
            item.withdrawn = True
            self._release(item)


_EVENTS: Final = {Standing.DELIVERED: "delivered", Standing.PENDING: "deferred", Standing.FAILED: "failed"}


def _quota(configuration: Configuration) -> Quota:
    return Quota(configuration.queue.maximum_messages, configuration.queue.maximum_bytes)


def _number_of(spool: Spool, state: State) -> Callable[[], float]:
    return lambda: float(spool.number(state))


def _redirected(message: Message, to: Mailbox) -> Message:
    """Staging: everything goes to one address, whomever it was for (`recipients.redirectTo`)."""
    envelope: Envelope = replace(message.envelope, recipients=[Recipient(to)])
    return replace(message, envelope=envelope)
