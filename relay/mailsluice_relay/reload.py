"""Reads the configuration directory, and reads it again when it changes.

A new configuration is read whole and checked whole before anybody sees it; one that cannot be used is refused, and the
one in force stays. The kubelet swaps the symbolic link `..data` of each mounted Secret atomically (but the two Secrets
not together), so the directory itself is watched, and a revision that only one half has yet is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import watchfiles

from mailsluice_relay.config import REQUIRED_OAUTH_KEYS, Configuration, ConfigurationError, Credentials, decode

CONFIGURATION_FILE: Final = "config.json.gz"
REVISION_FILE: Final = "revision"
MAXIMUM_FILE_SIZE: Final = 1024 * 1024
"""Octets; a Secret cannot hold more."""
RESYNC: Final = 30_000
"""Milliseconds after which the directory is read without a notification, for file systems that send none."""
HALF_WAIT: Final = 0.25
"""Seconds between looks while one half is older than the other."""
HALF_LIMIT: Final = 120.0
"""Seconds after which a half that does not come is an error; the kubelet's sync period is 60."""


class HalfConfigurationError(ConfigurationError):
    """config/ and credentials/ are of different revisions: the second one has not been mounted yet."""


@dataclass(frozen=True, slots=True)
class Loaded:
    configuration: Configuration
    credentials: Credentials


def load(directory: Path) -> Loaded:
    """The configuration in `directory` (see `config` for its layout). Raises ConfigurationError, naming the file."""
    configuration = decode(_read(_current(directory / "config") / CONFIGURATION_FILE))
    credentials = _read_all(_current(directory / "credentials"))
    revision = credentials.get(REVISION_FILE, b"").decode("ascii", "replace").strip()
    if revision != configuration.credentials_revision:
        raise HalfConfigurationError(
            f"credentials/revision is {revision or 'missing'}, but the configuration {configuration.revision} "
            f"belongs to {configuration.credentials_revision}; the other Secret is not mounted yet"
        )
    _check_references(configuration, credentials)
    return Loaded(configuration, credentials)


async def changes(
    directory: Path, stop: asyncio.Event, force: asyncio.Event
) -> AsyncIterator[Loaded | ConfigurationError]:
    """What `load` gives whenever it may have changed: on a notification, every RESYNC, and when `force` is set."""
    watched = watchfiles.awatch(
        directory / "config",
        directory / "credentials",
        watch_filter=None,
        recursive=False,
        debounce=50,
        step=10,
        rust_timeout=RESYNC,
        yield_on_timeout=True,
        stop_event=stop,
    )
    notified = asyncio.ensure_future(anext(watched, None))
    try:
        while not stop.is_set():
            forced = asyncio.ensure_future(force.wait())
            await asyncio.wait({notified, forced}, return_when=asyncio.FIRST_COMPLETED)
            forced.cancel()
            force.clear()
            if notified.done():
                if notified.result() is None:
                    return
                notified = asyncio.ensure_future(anext(watched, None))
            if not stop.is_set():
                yield await _load_when_whole(directory, stop)
    finally:
        notified.cancel()


async def _load_when_whole(directory: Path, stop: asyncio.Event) -> Loaded | ConfigurationError:
    waited = 0.0
    while True:
        try:
            return await asyncio.to_thread(load, directory)
        except HalfConfigurationError as error:
            if waited >= HALF_LIMIT or stop.is_set():
                return error
        except ConfigurationError as error:
            return error
        await asyncio.sleep(HALF_WAIT)
        waited += HALF_WAIT


def _current(mount: Path) -> Path:
    """The directory that the mount shows now, so that all files of one reading are of one swap."""
    data = mount / "..data"
    return data.resolve() if data.is_symlink() else mount


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_FILE_SIZE + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    if len(content) > MAXIMUM_FILE_SIZE:
        raise ConfigurationError(f"{path}: over {MAXIMUM_FILE_SIZE} octets")
    return content


def _read_all(folder: Path) -> dict[str, bytes]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("..") and entry.is_file())
    except OSError as error:
        raise ConfigurationError(f"{folder}: {error.strerror}") from error
    return {name: _read(folder / name) for name in names}


def _check_references(configuration: Configuration, credentials: Credentials) -> None:
    """Everything that the configuration names in credentials/ is there."""
    wanted: list[tuple[str, str]] = []
    if any(listener.mode != "Plain" for listener in configuration.listeners):
        wanted += [("listeners", "tls.crt"), ("listeners", "tls.key")]
    if configuration.tls.client_ca is not None:
        wanted.append(("tls.client_ca", configuration.tls.client_ca))
    if (store := configuration.rate_limit_store) is not None:
        wanted += [("rate_limit_store", name) for name in (f"{store.credentials}.url", store.ca) if name is not None]
    for upstream in configuration.upstreams:
        field = f"upstreams[{upstream.name}]"
        if upstream.credentials is not None:
            has_grant = f"{upstream.credentials}.grant" in credentials
            parts = REQUIRED_OAUTH_KEYS if has_grant else ("username", "password")
            wanted += [(field, f"{upstream.credentials}.{part}") for part in parts]
        if upstream.ca is not None:
            wanted.append((field, upstream.ca))
    wanted += [(f"dkim[{key.domain}]", key.key) for key in configuration.dkim]
    for field, name in wanted:
        if name not in credentials:
            raise ConfigurationError(f"{field}: credentials/{name} is missing")
