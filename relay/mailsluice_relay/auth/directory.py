"""Who a login name means: the directory of configured users. Pure.

How two spellings of a login are compared is `config.login_key`, which the operator shares.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from mailsluice_relay.config import (
    HASH_FORMATS,
    Authentication,
    ConfigurationError,
    LoginFormat,
    User,
    hash_password,
    is_supported_hash,
    login_key,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Whose password is to be verified: of a user, or of nobody (`user` is None) at the cost of one."""

    user: User | None
    hashes: tuple[str, ...]


class Directory:
    """The users of one configuration. Raises ConfigurationError, naming the login and never a hash."""

    def __init__(self, authentication: Authentication, *, key: bytes) -> None:
        self._format = authentication.login_format
        self._key = key
        self._users: dict[str, User] = {}
        by_local_part: dict[str, list[User]] = {}
        for user in authentication.users:
            name = login_key(user.login)
            if name in self._users:
                raise ConfigurationError(
                    f"authentication.users: {user.login} stands twice (as {self._users[name].login}); logins differ in "
                    "more than the case of their letters"
                )
            for hashed in user.hashes:
                if not is_supported_hash(hashed):
                    raise ConfigurationError(
                        f"authentication.users: {user.login}: a hash is in no supported format; use {HASH_FORMATS}"
                    )
            self._users[name] = user
            by_local_part.setdefault(name.rpartition("@")[0] or name, []).append(user)
        self._short: Mapping[str, User] = {
            local_part: users[0] for local_part, users in by_local_part.items() if len(users) == 1
        }
        self._decoys = tuple(user.hashes for user in authentication.users if user.hashes) or (
            (hash_password("nobody", bytes(16)),),
        )

    def user(self, login: str) -> User | None:
        """The user of this full login, as a `Login.name` has it."""
        return self._users.get(login_key(login))

    def is_short(self, login: str) -> bool:
        """Whether the login is to be refused for its form alone, so that known and unknown ones read the same."""
        return self._format is LoginFormat.FULL and "@" not in login

    def candidate(self, login: str) -> Candidate:
        """Whose hashes to verify a password against.

        Nobody's are those of some user, always the same one for the same login: how long it takes tells nothing
        about which logins exist.
        """
        user = self._resolve(login)
        if user is not None and user.hashes:
            return Candidate(user, user.hashes)
        digest = hmac.digest(self._key, login_key(login).encode("utf-8", "surrogatepass"), "sha256")
        return Candidate(None, self._decoys[int.from_bytes(digest[:8], "big") % len(self._decoys)])

    def _resolve(self, login: str) -> User | None:
        name = login_key(login)
        if "@" in name:
            return None if self._format is LoginFormat.SHORT else self._users.get(name)
        if self._format is LoginFormat.FULL:
            return None
        # An account that several domains have is nobody's: the full address tells them apart (Either).
        return self._users.get(name) or self._short.get(name)
