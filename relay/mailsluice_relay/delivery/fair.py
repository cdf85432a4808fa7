"""A queue in which everybody gets a turn: one item of each key in turn, whatever the others have waiting. Pure.

The key is the login, so that a newsletter never delays a password reset. Priorities go here, as the order of `_turns`.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._turns: deque[str] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def count(self, key: str) -> int:
        return len(self._waiting.get(key, ()))

    def push(self, key: str, item: T) -> None:
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = deque()
            self._turns.append(key)
        waiting.append(item)
        self._length += 1

    def pop(self) -> T:
        """The first item of whose turn it is. Raises IndexError when nothing waits."""
        key = self._turns.popleft()
        waiting = self._waiting[key]
        item = waiting.popleft()
        if waiting:
            self._turns.append(key)
        else:
            del self._waiting[key]
        self._length -= 1
        return item
