"""The configuration directory: what is read together belongs together, and what cannot be used changes nothing."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mailsluice_relay import reload
from mailsluice_relay.config import Configuration, ConfigurationError, Listener, ListenerMode, Relay, Upstream, encode
from mailsluice_relay.reload import HalfConfigurationError, Loaded, changes, load


def configuration(revision: str, credentials: str = "c1", **fields: object) -> Configuration:
    values: dict[str, object] = {
        "revision": revision,
        "credentials_revision": credentials,
        "relay": Relay(name="r", namespace="n"),
        "hostname": "relay.example.test",
        "listeners": (Listener(name="smtp", port=0, mode=ListenerMode.PLAIN),),
        "upstreams": (Upstream(name="u", host="upstream.example.test"),),
    }
    return Configuration(**values | fields)  # type: ignore[arg-type]  # the fields are the test's


def mount(directory: Path, files: dict[str, bytes], generation: int) -> None:
    """What the kubelet does with a Secret volume: a new directory, then `..data` renamed over the old link."""
    directory.mkdir(parents=True, exist_ok=True)
    versioned = directory / f"..generation_{generation}"
    versioned.mkdir()
    for name, content in files.items():
        (versioned / name).write_bytes(content)
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(Path("..data") / name)
    draft = directory / "..data_tmp"
    draft.symlink_to(versioned.name)
    draft.replace(directory / "..data")


def mount_both(directory: Path, wanted: Configuration, generation: int) -> None:
    mount(directory / "config", {"config.json.gz": encode(wanted)}, generation)
    mount(directory / "credentials", {"revision": wanted.credentials_revision.encode()}, generation)


async def until_noticed(waiting: asyncio.Future[Any], directory: Path) -> None:
    """Until a change in the directory is noticed: nothing else tells that the watch stands."""
    while not waiting.done():
        (directory / "touched").touch()
        await asyncio.wait({waiting}, timeout=0.05)


def test_both_halves_are_read(tmp_path: Path) -> None:
    wanted = configuration("r1")
    mount_both(tmp_path, wanted, 1)
    loaded = load(tmp_path)
    assert loaded.configuration == wanted
    assert loaded.credentials == {"revision": b"c1"}


def test_halves_of_two_revisions_are_never_mixed(tmp_path: Path) -> None:
    mount_both(tmp_path, configuration("r1"), 1)
    mount(tmp_path / "config", {"config.json.gz": encode(configuration("r2", "c2"))}, 2)
    with pytest.raises(HalfConfigurationError, match="c2"):
        load(tmp_path)


def test_a_file_that_the_configuration_names_must_be_there(tmp_path: Path) -> None:
    upstream = Upstream(name="provider", host="h", credentials="upstream.provider")
    mount_both(tmp_path, configuration("r1", upstreams=(upstream,)), 1)
    with pytest.raises(ConfigurationError, match=r"upstreams\[provider\].*upstream\.provider\.username"):
        load(tmp_path)


def test_an_oauth_grant_is_credentials_too(tmp_path: Path) -> None:
    upstream = Upstream(name="provider", host="h", credentials="up")
    wanted = configuration("r1", upstreams=(upstream,))
    files = {"revision": b"c1", "up.grant": b"RefreshToken", "up.user": b"u", "up.token-url": b"https://t.test/"}
    mount(tmp_path / "config", {"config.json.gz": encode(wanted)}, 1)
    mount(tmp_path / "credentials", files, 1)
    with pytest.raises(ConfigurationError, match=r"upstreams\[provider\].*up\.client-id"):
        load(tmp_path)
    mount(tmp_path / "credentials", {**files, "up.client-id": b"c"}, 2)
    assert load(tmp_path).credentials["up.client-id"] == b"c"


@pytest.mark.parametrize("content", [b"", b"not gzip", encode(configuration("r1"))[:-9]])
def test_a_torn_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    mount(tmp_path / "config", {"config.json.gz": content}, 1)
    mount(tmp_path / "credentials", {"revision": b"c1"}, 1)
    with pytest.raises(ConfigurationError, match=r"config\.json\.gz"):
        load(tmp_path)


async def test_a_swap_of_the_mount_is_noticed_and_a_broken_one_reported(tmp_path: Path) -> None:
    mount_both(tmp_path, configuration("r1"), 1)
    stop, force = asyncio.Event(), asyncio.Event()
    found = changes(tmp_path, stop, force)
    waiting = asyncio.ensure_future(anext(found))
    async with asyncio.timeout(20):
        await until_noticed(waiting, tmp_path / "config")
        mount_both(tmp_path, configuration("r2", "c2"), 2)
        seen = await waiting
        while isinstance(seen, Loaded) and seen.configuration.revision != "r2":
            seen = await anext(found)
        assert isinstance(seen, Loaded)
        mount(tmp_path / "config", {"config.json.gz": b"broken"}, 3)
        while isinstance(seen, Loaded):
            seen = await anext(found)
        assert "config.json.gz" in str(seen)
    stop.set()
    await found.aclose()


async def test_the_second_half_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount_both(tmp_path, configuration("r1"), 1)
    stop, force = asyncio.Event(), asyncio.Event()
    found = changes(tmp_path, stop, force)
    mount(tmp_path / "config", {"config.json.gz": encode(configuration("r2", "c2"))}, 2)
    force.set()
    refused = asyncio.Event()
    loop = asyncio.get_running_loop()

    def look(directory: Path) -> Loaded:
        try:
            return load(directory)
        except HalfConfigurationError:
            loop.call_soon_threadsafe(refused.set)
            raise

    monkeypatch.setattr(reload, "load", look)
    waiting = asyncio.ensure_future(anext(found))
    async with asyncio.timeout(20):
        await refused.wait()  # one half was seen, and found too new
        assert not waiting.done()
        mount(tmp_path / "credentials", {"revision": b"c2"}, 2)
        seen = await waiting
    assert isinstance(seen, Loaded)
    assert seen.configuration.revision == "r2"
    stop.set()
    await found.aclose()
