"""All engines of one configuration, asked about a message at the same time.

An engine that lets several messages in a row wait in vain is left alone for a while, so that mail does not crawl at the
pace of a time-out; then one message tries it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from mailsluice_relay import config
from mailsluice_relay.config import ConfigurationError, EngineType, FailureAction
from mailsluice_relay.suspicion.clamav import ClamAV
from mailsluice_relay.suspicion.engine import Engine, EngineError, EngineVerdict, Submission, UnscannableError
from mailsluice_relay.suspicion.rspamd import Rspamd
from mailsluice_relay.suspicion.spamassassin import SpamAssassin

ENGINES: Final[Mapping[EngineType, Callable[[config.Engine], Engine]]] = {
    EngineType.RSPAMD: Rspamd,
    EngineType.SPAM_ASSASSIN: SpamAssassin,
    EngineType.CLAM_AV: ClamAV,
}

CONCURRENT: Final = 32
"""Messages that one engine is asked about at once. The others wait, within their time-out: an engine with more
connections than workers answers none of them sooner."""
TIMEOUTS: Final = 3
"""In a row, after which an engine is not asked for a while."""
REST: Final = 5.0
"""Seconds of that while."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineState:
    """For people and /readyz."""

    up: bool
    last_error: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking one engine."""

    engine: str
    verdict: EngineVerdict | None
    """None: it failed."""
    seconds: float | None
    """None: it was not asked."""
    defers: bool
    """It failed, and mail is to wait for it."""


class _Member:
    """One engine, with what is known of its health."""

    def __init__(self, settings: config.Engine, monotonic: Callable[[], float]) -> None:
        self.settings = settings
        self._engine = ENGINES[settings.type](settings)
        self._monotonic = monotonic
        self._turns = asyncio.Semaphore(CONCURRENT)
        self._timeouts = 0
        self._rests_until = 0.0
        self._error = ""

    @property
    def state(self) -> EngineState:
        return EngineState(up=not self._error, last_error=self._error)

    async def ask(self, submission: Submission) -> Answer:
        started = self._monotonic()
        if self._timeouts >= TIMEOUTS:
            if started < self._rests_until:
                return self._answer(None, None)
            self._rests_until = started + REST  # this one tries; those that come meanwhile do not
        try:
            async with asyncio.timeout(self.settings.timeout), self._turns:
                verdict = await self._engine.check(submission)
        except TimeoutError:
            self._timeouts += 1
            self._rests_until = self._monotonic() + REST
            self._failed(f"no verdict within {self.settings.timeout:g} s")
        except UnscannableError as error:
            self._log_failure(str(error))
        except (EngineError, OSError) as error:
            self._timeouts = 0  # this one at least did not keep anybody waiting
            self._failed(str(error) or type(error).__name__)
        else:
            self._timeouts = 0
            if self._error:
                _log.info("engine.up", engine=self.settings.name)
                self._error = ""
            return self._answer(verdict, self._monotonic() - started)
        return self._answer(None, self._monotonic() - started)

    def _failed(self, error: str) -> None:
        self._error = error
        self._log_failure(error)

    def _log_failure(self, error: str) -> None:
        _log.warning("engine.failed", engine=self.settings.name, error=error, on_failure=self.settings.on_failure)

    def _answer(self, verdict: EngineVerdict | None, seconds: float | None) -> Answer:
        defers = verdict is None and self.settings.on_failure is FailureAction.DEFER
        return Answer(self.settings.name, verdict, seconds, defers)


class Panel:
    """The engines. Raises ConfigurationError."""

    def __init__(
        self, engines: tuple[config.Engine, ...], monotonic: Callable[[], float], before: Panel | None = None
    ) -> None:
        """What is known of the health of engines that stay as they are is taken over from `before`."""
        known: dict[config.Engine, _Member] = {}
        if before is not None:
            known = {member.settings: member for member in before._members}
        self._members: list[_Member] = [known.get(settings) or _Member(settings, monotonic) for settings in engines]
        names = [settings.name for settings in engines]
        if len(set(names)) < len(names):
            raise ConfigurationError("spam.engines: two have the same name; rename one")

    def __bool__(self) -> bool:
        return bool(self._members)

    @property
    def states(self) -> dict[str, EngineState]:
        return {member.settings.name: member.state for member in self._members}

    async def ask(self, submission: Submission) -> list[Answer]:
        """What each engine says, in the order of the configuration."""
        return list(await asyncio.gather(*(member.ask(submission) for member in self._members)))
