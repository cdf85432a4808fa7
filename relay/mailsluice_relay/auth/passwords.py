"""Passwords against hashes: which format a hash has, and verifying off the event loop without being starved.

A hash is made to be slow. So it is computed in a thread, by few at a time, and neither a flood of wrong passwords nor
a burst of right ones may keep the others waiting:

- what is waiting is bounded, and for one source more tightly: beyond that `BusyError`, for the client 454;
- who asks the same question at the same time waits for the one answer;
- a password that was right is remembered for a while, as a keyed digest of login, hash and password. Nothing there can
  be turned back, and a changed hash is another digest, so a rotated password ends at once.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import argon2
import bcrypt
from argon2.exceptions import InvalidHashError, VerificationError
from passlib.hash import sha512_crypt

from mailsluice_relay.config import scrypt

MAXIMUM_PASSWORD: Final = 1024
"""Octets. Longer ones are wrong without being hashed: SHA-512-crypt's cost grows with the password's length."""

_BCRYPT_OCTETS: Final = 72
"""What bcrypt looks at. crypt(3) and htpasswd cut there silently when they make a hash; so does verifying it."""

_ARGON2: Final = argon2.PasswordHasher()


class BusyError(Exception):
    """Too many passwords wait to be verified."""


def matches(password: str, hashed: str) -> bool:
    """Whether the password gives this hash. Slow by design; blocks. `hashed` has passed `is_supported_hash`."""
    octets = password.encode("utf-8", "surrogatepass")
    if not octets or b"\0" in octets or len(octets) > MAXIMUM_PASSWORD:
        return False
    if hashed.startswith("$2"):
        return bcrypt.checkpw(octets[:_BCRYPT_OCTETS], hashed.encode())
    if hashed.startswith("$argon2id$"):
        try:
            return _ARGON2.verify(hashed, octets)
        except (VerificationError, InvalidHashError):  # a mismatch is an exception there
            return False
    if hashed.startswith("$scrypt$"):
        _, _, costs, salt, expected = hashed.split("$")
        log_n, r, p = (int(cost.partition("=")[2]) for cost in costs.split(","))
        wanted = _unpadded(expected)
        return hmac.compare_digest(scrypt(octets, _unpadded(salt), log_n, r, p, len(wanted)), wanted)
    if hashed.startswith("$6$"):
        return bool(sha512_crypt.verify(octets, hashed))
    raise ValueError("not a supported hash")


def _unpadded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


class Verifier:
    """Verifies passwords for a whole process. `key` is random and lives as long as the process."""

    def __init__(
        self,
        *,
        key: bytes,
        monotonic: Callable[[], float],
        threads: int = 2,
        waiting: int = 64,
        waiting_per_source: int = 16,
        remembered: int = 10_000,
        remembered_seconds: float = 300.0,
        check: Callable[[str, str], bool] = matches,
    ) -> None:
        self._key = key
        self._monotonic = monotonic
        self._waiting = waiting
        self._waiting_per_source = waiting_per_source
        self._remembered = remembered
        self._remembered_seconds = remembered_seconds
        self._check = check
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="password")
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._asked: dict[bytes, asyncio.Future[bool]] = {}
        self._asking: Counter[str] = Counter()

    async def verify(
        self, login: str, password: str, hashes: Sequence[str], source: str, *, is_decoy: bool = False
    ) -> bool:
        """Whether the password gives one of the hashes. `source` is who shares one share of the waiting places.

        With `is_decoy` the hashes are not the login's: it takes as long, is never right, and is not remembered, since
        the next answer's speed would tell that it had been somebody's. Raises BusyError.
        """
        digest = self._digest(login, password, hashes)
        if self._is_remembered(digest):
            return True
        future = self._asked.get(digest)
        if future is None:
            if len(self._asked) >= self._waiting or self._asking[source] >= self._waiting_per_source:
                raise BusyError
            future = asyncio.get_running_loop().run_in_executor(
                self._executor, functools.partial(self._any, password, tuple(hashes))
            )
            self._asked[digest] = future
            self._asking[source] += 1
            future.add_done_callback(functools.partial(self._answered, digest, source, is_decoy))
        # A client that hangs up must not take the answer from the others who wait for it.
        return await asyncio.shield(future) and not is_decoy

    def close(self) -> None:
        """Stop the threads; what waits is given up. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._right.clear()

    def _any(self, password: str, hashes: Sequence[str]) -> bool:
        return any(self._check(password, hashed) for hashed in hashes)

    def _answered(self, digest: bytes, source: str, is_decoy: bool, future: asyncio.Future[bool]) -> None:
        del self._asked[digest]
        self._asking[source] -= 1
        if self._asking[source] <= 0:
            del self._asking[source]
        if not is_decoy and not future.cancelled() and future.exception() is None and future.result():
            self._right[digest] = self._monotonic() + self._remembered_seconds
            while len(self._right) > self._remembered:
                self._right.popitem(last=False)

    def _is_remembered(self, digest: bytes) -> bool:
        until = self._right.get(digest)
        if until is None:
            return False
        if until <= self._monotonic():
            del self._right[digest]
            return False
        return True

    def _digest(self, login: str, password: str, hashes: Sequence[str]) -> bytes:
        digest = hmac.new(self._key, digestmod="sha256")
        for part in (login, password, *hashes):
            octets = part.encode("utf-8", "surrogatepass")
            digest.update(len(octets).to_bytes(4, "big") + octets)
        return digest.digest()
