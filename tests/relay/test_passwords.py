"""Which hashes are taken, and that verifying them can be neither starved nor read back."""

import asyncio
import gc
import threading

import argon2
import bcrypt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passlib.hash import scrypt as passlib_scrypt
from passlib.hash import sha512_crypt

from mailsluice_relay.auth.passwords import BusyError, Verifier, matches
from mailsluice_relay.config import ConfigurationError, hash_password, is_supported_hash, parse_htpasswd

PASSWORD = "päss wörd:1"
SALT = bytes(range(16))
# A salt of our own: tests that are named after a hash must have the same name in every process.
BCRYPT = bcrypt.hashpw(PASSWORD.encode(), b"$2b$04$abcdefghijklmnopqrstuu").decode()
HASHES = {
    "bcrypt 2b": BCRYPT,
    "bcrypt 2y, as htpasswd -B": BCRYPT.replace("$2b$", "$2y$"),
    "bcrypt 2a": BCRYPT.replace("$2b$", "$2a$"),
    "argon2id": argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD),
    "scrypt of passlib": passlib_scrypt.using(rounds=4, block_size=8, parallelism=1).hash(PASSWORD),
    "scrypt of ours": hash_password(PASSWORD, SALT),
    "sha512-crypt": sha512_crypt.using(rounds=5000).hash(PASSWORD),
    "sha512-crypt with rounds": sha512_crypt.using(rounds=1000).hash(PASSWORD),
}


@pytest.mark.parametrize("hashed", HASHES.values(), ids=HASHES)
def test_each_format_knows_its_password_and_no_other(hashed: str) -> None:
    assert is_supported_hash(hashed)
    assert matches(PASSWORD, hashed)
    for wrong in (PASSWORD + " ", PASSWORD.upper(), "", PASSWORD + "\0", "x" * 5000, "\udcff"):
        assert not matches(wrong, hashed)


def test_our_scrypt_is_what_passlib_verifies() -> None:
    assert passlib_scrypt.verify(PASSWORD, hash_password(PASSWORD, SALT))


def test_hashing_is_deterministic_and_salted() -> None:
    assert hash_password(PASSWORD, SALT) == hash_password(PASSWORD, SALT)
    assert hash_password(PASSWORD, SALT) != hash_password(PASSWORD, SALT[::-1])
    with pytest.raises(ValueError, match="16 octets"):
        hash_password(PASSWORD, b"short")


@pytest.mark.parametrize(
    "hashed",
    [
        "",
        "plain text",
        "$apr1$abcdefgh$0123456789abcdefghijkl",
        "{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=",
        "$1$salt$0123456789abcdefghijk.",
        "$5$salt$" + "x" * 43,
        BCRYPT.replace("$04$", "$31$"),
        BCRYPT[:-1],
        BCRYPT + "\n",
        HASHES["argon2id"].replace("argon2id", "argon2i"),
        HASHES["argon2id"].replace("m=64", "m=4194304"),
        HASHES["scrypt of ours"].replace("ln=14", "ln=30"),
        HASHES["scrypt of ours"].replace("p=1", "p=999"),
        HASHES["scrypt of ours"].replace("r=8", "r=0"),
        HASHES["sha512-crypt with rounds"].replace("rounds=1000", "rounds=9999999"),
    ],
)
def test_weak_broken_and_ruinous_hashes_are_refused(hashed: str) -> None:
    assert not is_supported_hash(hashed)


@settings(deadline=None)  # other work on the machine is no fault of the code
@given(st.sampled_from(sorted(HASHES)), st.integers(0, 120), st.characters())
def test_whatever_is_supported_can_be_verified(name: str, position: int, character: str) -> None:
    hashed = HASHES[name]
    changed = hashed[:position] + character + hashed[position + 1 :]
    costly = ("m=64,", "ln=4,", "$04$", "rounds=1000", "$6$")
    if is_supported_hash(changed) and any(cost in changed for cost in costly):
        matches("anything", changed)


def test_htpasswd_lines() -> None:
    text = f"# comment\r\n\r\nann@example.test:{BCRYPT}\r\nbob@example.test:{HASHES['argon2id']}"
    assert parse_htpasswd(text) == (("ann@example.test", BCRYPT), ("bob@example.test", HASHES["argon2id"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"ann@example.test:{BCRYPT}\ns3cret", "line 2: no colon"),
        (":s3cret", "line 1: no login"),
        ("ann@example.test:s3cret", "line 1: the hash of ann@example.test is in no supported format"),
        (f"ann example:{BCRYPT}:s3cret", "line 1: the login has a space"),
        (f"{'a' * 400}:s3cret", "line 1: the login is longer"),
    ],
)
def test_htpasswd_errors_name_the_line_and_no_secret(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        parse_htpasswd(text)
    assert "s3cret" not in str(error.value)


class Gate:
    """A check that waits until it is let go, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = threading.Event()
        self.entered = threading.Event()

    def __call__(self, password: str, hashed: str) -> bool:
        self.asked += 1
        self.entered.set()
        self.open.wait(10)
        return password == hashed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_right_password_is_remembered_until_it_expires() -> None:
    gate, clock = Gate(), Clock()
    gate.open.set()
    verifier = Verifier(key=b"k", monotonic=clock, check=gate, remembered_seconds=60)
    for _ in range(3):
        assert await verifier.verify("ann", "p", ("p",), "net")
    assert gate.asked == 1
    clock.now += 61
    assert await verifier.verify("ann", "p", ("p",), "net")
    assert gate.asked == 2
    verifier.close()


async def test_a_wrong_password_is_never_remembered() -> None:
    gate = Gate()
    gate.open.set()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate)
    assert not await verifier.verify("ann", "wrong", ("p",), "net")
    assert not await verifier.verify("ann", "wrong", ("p",), "net")
    assert gate.asked == 2
    verifier.close()


async def test_what_is_remembered_is_of_that_login_that_hash_and_that_password() -> None:
    gate = Gate()
    gate.open.set()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate)
    assert await verifier.verify("ann", "p", ("p",), "net")
    assert not await verifier.verify("ann", "p", ("rotated",), "net")
    assert not await verifier.verify("annp", "", ("p",), "net")
    assert await verifier.verify("bob", "p", ("p",), "net")
    assert gate.asked == 4
    verifier.close()


async def test_a_decoy_is_hashed_each_time_and_never_right() -> None:
    gate = Gate()
    gate.open.set()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate)
    for _ in range(2):
        assert not await verifier.verify("nobody", "p", ("p",), "net", is_decoy=True)
    assert gate.asked == 2
    verifier.close()


async def test_any_of_several_hashes_will_do() -> None:
    verifier = Verifier(key=b"k", monotonic=Clock())
    old, new = hash_password("old", SALT), bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()
    assert await verifier.verify("ann", "old", (old, new), "net")
    assert await verifier.verify("ann", "new", (old, new), "net")
    assert not await verifier.verify("ann", "neither", (old, new), "net")
    verifier.close()


async def test_no_password_is_kept_in_memory() -> None:
    verifier = Verifier(key=b"k", monotonic=Clock(), check=lambda password, hashed: True)
    secret = "correct horse " + "battery staple"
    assert await verifier.verify("ann", secret, ("p",), "net")
    reachable, seen = [verifier.__dict__], set()
    while reachable:
        thing = reachable.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert not (isinstance(thing, str) and thing == secret)
        assert not (isinstance(thing, bytes) and secret.encode() in thing)
        if isinstance(thing, dict | list | tuple | set):
            reachable.extend(gc.get_referents(thing))
    verifier.close()


async def test_many_who_ask_the_same_cost_one_hash_and_one_who_leaves_takes_nothing_away() -> None:
    gate = Gate()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate, waiting=2, waiting_per_source=1)
    asking = [asyncio.create_task(verifier.verify("ann", "p", ("p",), "net")) for _ in range(50)]
    await asyncio.to_thread(gate.entered.wait, 10)
    asking[0].cancel()
    gate.open.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1:] == [True] * 49
    assert gate.asked == 1
    verifier.close()


async def test_a_flood_from_one_source_leaves_room_for_others_and_a_full_queue_is_said() -> None:
    gate = Gate()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate, threads=1, waiting=3, waiting_per_source=2)
    flood = [asyncio.create_task(verifier.verify("ann", f"guess {n}", ("p",), "bad")) for n in range(5)]
    await asyncio.to_thread(gate.entered.wait, 10)
    other = asyncio.create_task(verifier.verify("bob", "p", ("p",), "good"))
    late = asyncio.create_task(verifier.verify("cid", "p", ("p",), "third"))
    with pytest.raises(BusyError):
        await late
    gate.open.set()
    answers = await asyncio.gather(*flood, return_exceptions=True)
    assert answers[:2] == [False, False]
    assert all(isinstance(answer, BusyError) for answer in answers[2:])
    assert await other
    assert await verifier.verify("cid", "p", ("p",), "third")
    verifier.close()


async def test_hashing_leaves_the_event_loop_alone() -> None:
    gate = Gate()
    verifier = Verifier(key=b"k", monotonic=Clock(), check=gate)
    asking = asyncio.create_task(verifier.verify("ann", "p", ("p",), "net"))
    await asyncio.to_thread(gate.entered.wait, 10)
    assert not asking.done()  # and we are here, while it hashes
    gate.open.set()
    assert await asking
    verifier.close()
