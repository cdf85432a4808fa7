"""How many wrong passwords are heard before a network is sent away. Pure: time is an argument.

Only failures count: counting successes stops newsletters (Mailu #634). A limit for a login alone would let anybody
lock its owner out (Mailu #2880), so a failure counts for the network with the login, and for the network. Whoever has
logged in from a network before is spared the second: in a cluster that hides client addresses all pods are one
network, and one of them with an old password must not silence the rest.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from typing import Final

from mailsluice_relay.config import FailureLimit, Failures

MAXIMUM_KEYS: Final = 20_000
"""Networks and pairs remembered, each; about 8 MB at most. The longest untouched goes first."""

KNOWN_SECONDS: Final = 24 * 3600.0
"""How long a login counts as known to its network after a success."""


class _Window:
    """The times of the last failures by key: over the limit while as many as the limit are within the window."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def is_over(self, key: str, limit: FailureLimit, now: float) -> bool:
        times = self._failures.get(key)
        return times is not None and len(times) >= limit.limit and times[-limit.limit] > now - limit.window

    def add(self, key: str, limit: FailureLimit, now: float) -> None:
        times = self._failures.get(key)
        if times is None or times.maxlen != limit.limit:
            times = self._failures[key] = deque(times or (), limit.limit)
        self._failures.move_to_end(key)
        times.append(now)
        if len(self._failures) > MAXIMUM_KEYS:
            self._failures.popitem(last=False)

    def forget(self, key: str) -> None:
        self._failures.pop(key, None)


class Throttle:
    """Failed logins by network and login. `network` is a prefix (`policy.networks.source_network`)."""

    def __init__(self, failures: Failures) -> None:
        self._limits = failures
        self._pairs = _Window()
        self._networks = _Window()
        self._known: OrderedDict[str, float] = OrderedDict()

    def reconfigure(self, failures: Failures) -> None:
        self._limits = failures

    def refuses(self, network: str, login: str, now: float) -> bool:
        """Whether an attempt is refused unheard."""
        pair = _pair(network, login)
        if self._pairs.is_over(pair, self._limits.per_network_and_user, now):
            return True
        if self._known.get(pair, now) > now:
            return False
        return self._networks.is_over(network, self._limits.per_network, now)

    def failed(self, network: str, login: str, now: float) -> None:
        self._pairs.add(_pair(network, login), self._limits.per_network_and_user, now)
        self._networks.add(network, self._limits.per_network, now)

    def succeeded(self, network: str, login: str, now: float) -> None:
        pair = _pair(network, login)
        self._pairs.forget(pair)
        self._known[pair] = now + KNOWN_SECONDS
        self._known.move_to_end(pair)
        if len(self._known) > MAXIMUM_KEYS:
            self._known.popitem(last=False)


def _pair(network: str, login: str) -> str:
    """A key of fixed length: the login is the client's, and as long as it likes."""
    return hashlib.blake2b(f"{network} {login}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
