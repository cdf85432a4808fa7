"""What admission decides at AUTH, MAIL, RCPT and after the data."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest

from mailsluice_relay import reply
from mailsluice_relay.admission import Admission, Judgement
from mailsluice_relay.auth.sasl import Attempt
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    ConfigurationError,
    FailureLimit,
    Failures,
    Listener,
    ListenerMode,
    LoginFormat,
    Ownership,
    RateLimit,
    RateLimitAction,
    RateLimitKey,
    RateLimitUnit,
    Recipients,
    Relay,
    Senders,
    Spam,
    SpamRule,
    Upstream,
    User,
    hash_password,
)
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Mailbox, Recipient, TLSState
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.reply import Reason

ANN = User(login="ann@example.test", hashes=(hash_password("s3cret", bytes(16)),))
BOB = User(login="bob@example.test", hashes=ANN.hashes, senders=("*@batch.test", "<>"))
SUSPENDED = User(login="sue@example.test", hashes=ANN.hashes, suspended=True)
USERS = (ANN, BOB, SUSPENDED)


def configuration(**more: object) -> Configuration:
    settings: dict[str, object] = {
        "revision": "r1",
        "credentials_revision": "c1",
        "relay": Relay(name="relay", namespace="mail"),
        "hostname": "relay.example.test",
        "listeners": (
            Listener(name="submission", port=0),
            Listener(name="submissions", port=0, mode=ListenerMode.IMPLICIT_TLS),
            Listener(name="open", port=0, authentication_required=False),
        ),
        "authentication": Authentication(users=USERS),
        "upstreams": (Upstream(name="up", host="up.test"),),
        **more,
    }
    return msgspec.convert(settings, Configuration)


@dataclass
class Octets:
    octets: bytes

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        yield self.octets

    def close(self) -> None:
        pass


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """An admission with its clock, and the words to ask it."""

    def __init__(self, **settings: object) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        first = configuration(**settings)
        self.metrics.configure(first, {})
        self.admission = Admission(first, metrics=self.metrics, monotonic=self.clock, now=lambda: 1_700_000_000.0)

    def reconfigure(self, **settings: object) -> None:
        self.admission.reconfigure(configuration(**settings))

    async def login(
        self, login: str, password: str, *, client: Client | None = None, authorization: str = ""
    ) -> tuple[Login | None, reply.Verdict]:
        attempt = Attempt("PLAIN", login, authorization, password)
        result = await self.admission.authenticate(client or stranger(), attempt)
        return result.login, result.verdict

    async def mail(self, client: Client, sender: str, **more: object) -> reply.Verdict:
        return await self.admission.mail(client, envelope(sender, **more))

    async def message(self, client: Client, text: str, sender: str = "ann@example.test", to: int = 1) -> Judgement:
        return await self.admission.message(client, envelope(sender, to=to), content(text), queue_id="Q1")

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def envelope(sender: str, *, to: int = 1, declared_size: int | None = None) -> Envelope:
    recipients = [Recipient(Mailbox(f"to{number}", "other.test")) for number in range(to)]
    mailbox = Mailbox(*sender.rsplit("@", 1)) if sender else None
    return Envelope(mailbox, recipients=recipients, declared_size=declared_size)


def content(text: str) -> Content:
    head, _, body = text.replace("\n", "\r\n").encode().partition(b"\r\n\r\n")
    return Content(head + b"\r\n", Octets(body))


def stranger(listener: str = "submission", address: str = "192.0.2.7", *, tls: bool = True) -> Client:
    state = TLSState("TLSv1.3", "X") if tls else None
    return Client("s1", listener, address, 40000, hello="app-1", extended=True, tls=state)


def logged_in(user: User = ANN, address: str = "192.0.2.7") -> Client:
    client = stranger(address=address)
    client.login = Login(user.login, "PLAIN", user.namespace)
    return client


LETTER = "From: Ann <ann@example.test>\nSubject: Hello\n\nHello there, how are you today, my dear friend?\n"

Make = Callable[..., World]


@pytest.fixture
async def world() -> AsyncIterator[Make]:
    made: list[World] = []

    def make(**settings: object) -> World:
        made.append(World(**settings))
        return made[-1]

    yield make
    for one in made:
        await one.admission.close()


# --- AUTH -----------------------------------------------------------------------------------------------------------


async def test_the_right_password_logs_in_as_the_configured_login(world: Make) -> None:
    here = world()
    client = stranger()
    login, verdict = await here.login("ANN@Example.Test", "s3cret", client=client)
    assert login == Login("ann@example.test", "PLAIN", None)
    assert verdict == reply.Verdict(reply.AUTHENTICATED, Reason.ACCEPTED)
    assert client.login is None  # the session's to set
    assert here.sample("mailsluice_authentications_total", mechanism="PLAIN", result="success", reason="accepted") == 1


async def test_wrong_unknown_and_foreign_authorization_read_the_same(world: Make) -> None:
    here = world()
    answers = [
        await here.login("ann@example.test", "wrong"),
        await here.login("nobody@example.test", "s3cret"),
        await here.login("ann@example.test", "s3cret", authorization="bob@example.test"),
        await here.login("ann@example.test", ""),
    ]
    assert answers == [(None, reply.Verdict(reply.CREDENTIALS_INVALID, Reason.CREDENTIALS_INVALID))] * 4
    labels = {"mechanism": "PLAIN", "result": "failure", "reason": "credentials_invalid"}
    assert here.sample("mailsluice_authentications_total", **labels) == 4


async def test_one_may_authorize_as_oneself(world: Make) -> None:
    login, _ = await world().login("ann@example.test", "s3cret", authorization="Ann@example.test")
    assert login is not None


async def test_a_short_login_is_told_so_known_or_not_and_right_or_not(world: Make) -> None:
    here = world()
    answers = [await here.login(*pair) for pair in (("ann", "s3cret"), ("ann", "wrong"), ("nobody", "x"))]
    assert answers == [(None, reply.Verdict(reply.SHORT_LOGIN, Reason.SHORT_LOGIN))] * 3


async def test_a_short_login_where_it_is_allowed(world: Make) -> None:
    here = world(authentication=Authentication(users=USERS, login_format=LoginFormat.EITHER))
    login, _ = await here.login("ann", "s3cret")
    assert login is not None
    assert login.name == "ann@example.test"


async def test_the_last_failure_of_a_connection_closes_it(world: Make) -> None:
    here = world(authentication=Authentication(users=USERS, failures=Failures(per_connection=3)))
    client = stranger()
    verdicts = []
    for _ in range(3):
        _, verdict = await here.login("ann@example.test", "wrong", client=client)
        client.authentication_failures += 1
        verdicts.append(verdict)
    assert [verdict.reply.code for verdict in verdicts] == [535, 535, 421]
    assert verdicts[-1].reply.close
    assert verdicts[-1].reason is Reason.TOO_MANY_FAILURES


FEW_FAILURES = Failures(per_connection=100, per_network_and_user=FailureLimit(limit=2, window=60.0))


async def test_guessing_is_stopped_in_its_network_and_not_where_the_owner_is(world: Make) -> None:
    here = world(authentication=Authentication(users=USERS, failures=FEW_FAILURES))
    bad, home = stranger(address="198.51.100.1"), stranger(address="192.0.2.7")
    for _ in range(2):
        await here.login("ann@example.test", "wrong", client=bad)
    _, verdict = await here.login("ann@example.test", "s3cret", client=bad)
    assert verdict.reason is Reason.TOO_MANY_FAILURES
    login, _ = await here.login("ann@example.test", "s3cret", client=home)
    assert login is not None
    here.clock.now += 61
    login, _ = await here.login("ann@example.test", "s3cret", client=bad)
    assert login is not None


async def test_a_flood_of_guesses_is_put_off_and_known_logins_still_work(world: Make) -> None:
    generous = Failures(
        per_connection=10_000,
        per_network_and_user=FailureLimit(limit=10_000, window=60.0),
        per_network=FailureLimit(limit=10_000, window=60.0),
    )
    here = world(authentication=Authentication(users=USERS, failures=generous))
    await here.login("ann@example.test", "s3cret")
    flood = [asyncio.create_task(here.login("bob@example.test", f"guess {n}")) for n in range(40)]
    await asyncio.sleep(0)
    login, _ = await here.login("ann@example.test", "s3cret")
    assert login is not None
    verdicts = [verdict for _, verdict in await asyncio.gather(*flood)]
    assert {verdict.reason for verdict in verdicts} == {Reason.CREDENTIALS_INVALID, Reason.AUTHENTICATION_UNAVAILABLE}
    put_off = [verdict for verdict in verdicts if verdict.reason is Reason.AUTHENTICATION_UNAVAILABLE]
    assert {verdict.reply.code for verdict in put_off} == {454}
    labels = {"mechanism": "PLAIN", "result": "error", "reason": "authentication_unavailable"}
    assert here.sample("mailsluice_authentications_total", **labels) == len(put_off)


# --- MAIL -----------------------------------------------------------------------------------------------------------


async def test_without_login_the_client_is_told_to_use_tls_first_then_to_log_in(world: Make) -> None:
    here = world()
    before = await here.mail(stranger(tls=False), "ann@example.test")
    assert before == reply.Verdict(reply.TLS_REQUIRED, Reason.TLS_REQUIRED)
    for client in (stranger(), stranger("submissions")):
        verdict = await here.mail(client, "ann@example.test")
        assert verdict == reply.Verdict(reply.AUTHENTICATION_REQUIRED, Reason.AUTHENTICATION_REQUIRED)


async def test_where_plaintext_logins_are_allowed_tls_is_not_asked_for(world: Make) -> None:
    here = world(listeners=(Listener(name="submission", port=0, allow_plaintext_authentication=True),))
    verdict = await here.mail(stranger(tls=False), "ann@example.test")
    assert verdict.reason is Reason.AUTHENTICATION_REQUIRED


@pytest.mark.parametrize(
    ("user", "sender", "reason"),
    [
        (ANN, "ann@example.test", Reason.ACCEPTED),
        (ANN, "Ann@EXAMPLE.test", Reason.ACCEPTED),
        (ANN, "bob@example.test", Reason.SENDER_NOT_OWNED),
        (ANN, "ann@other.test", Reason.SENDER_NOT_OWNED),
        (ANN, "", Reason.SENDER_NOT_OWNED),
        (BOB, "", Reason.ACCEPTED),
        (BOB, "x@batch.test", Reason.ACCEPTED),
    ],
)
async def test_ownership(world: Make, user: User, sender: str, reason: Reason) -> None:
    verdict = await world().mail(logged_in(user), sender)
    assert verdict.reason is reason
    if reason is Reason.SENDER_NOT_OWNED:
        assert (verdict.reply.code, verdict.reply.status) == (553, "5.7.1")
        assert f"{user.login} may not send as {sender or '<>'}" in verdict.reply.text


async def test_allowed_domains_bound_what_is_owned(world: Make) -> None:
    here = world(senders=Senders(allowed_domains=("example.test",)))
    verdict = await here.mail(logged_in(BOB), "x@batch.test")
    assert (verdict.reply.code, verdict.reason) == (550, Reason.SENDER_DOMAIN_NOT_ALLOWED)
    assert (await here.mail(logged_in(BOB), "bob@example.test")).is_positive


@pytest.mark.parametrize("ownership", [Ownership.LOG, Ownership.OFF])
async def test_ownership_that_is_not_enforced_still_keeps_to_the_domains(world: Make, ownership: Ownership) -> None:
    here = world(senders=Senders(ownership=ownership, allowed_domains=("example.test",)))
    assert (await here.mail(logged_in(), "boss@example.test")).is_positive
    assert (await here.mail(logged_in(), "boss@other.test")).reason is Reason.SENDER_DOMAIN_NOT_ALLOWED
    judgement = await here.message(logged_in(), "From: boss@other.test\n\nx")
    assert judgement.reason is Reason.SENDER_DOMAIN_NOT_ALLOWED


async def test_an_unprintable_sender_makes_a_printable_reply(world: Make) -> None:
    verdict = await world().mail(logged_in(), "b\u00f6b@example.test")
    assert verdict.reply.text.isascii()
    assert verdict.reply.text.isprintable()


async def test_who_is_suspended_or_removed_stops_at_the_next_mail(world: Make) -> None:
    here = world()
    client = logged_in()
    assert (await here.mail(client, "ann@example.test")).is_positive
    here.reconfigure(authentication=Authentication(users=(msgspec.structs.replace(ANN, suspended=True),)))
    verdict = await here.mail(client, "ann@example.test")
    assert (verdict.reply.code, verdict.reply.status, verdict.reason) == (450, "4.7.1", Reason.LOGIN_SUSPENDED)
    assert (await here.message(client, LETTER)).reason is Reason.LOGIN_SUSPENDED
    here.reconfigure(authentication=Authentication(users=(BOB,)))
    assert (await here.mail(client, "ann@example.test")).reason is Reason.AUTHENTICATION_REQUIRED
    assert (await here.message(client, LETTER)).reason is Reason.AUTHENTICATION_REQUIRED


async def test_a_suspended_user_may_log_in_to_be_told_so(world: Make) -> None:
    here = world()
    login, _ = await here.login("sue@example.test", "s3cret")
    assert login is not None
    assert (await here.mail(logged_in(SUSPENDED), "sue@example.test")).reason is Reason.LOGIN_SUSPENDED


OPEN = Authentication(users=USERS, allowed_networks=("192.0.2.0/24",))


async def test_a_network_that_is_let_in_sends_as_the_allowed_domains_only(world: Make) -> None:
    here = world(authentication=OPEN, senders=Senders(allowed_domains=("app.test",)))
    inside = stranger("open")
    assert (await here.mail(inside, "any@app.test")).is_positive
    assert (await here.mail(inside, "ann@example.test")).reason is Reason.SENDER_DOMAIN_NOT_ALLOWED
    assert (await here.mail(inside, "")).reason is Reason.SENDER_NOT_OWNED
    judgement = await here.message(inside, "From: boss@corp.test\n\nx", sender="any@app.test")
    assert (judgement.verdict.reply.code, judgement.reason) == (550, Reason.SENDER_DOMAIN_NOT_ALLOWED)
    assert (await here.message(inside, "From: x@app.test\n\nx", sender="any@app.test")).verdict.is_positive


async def test_without_allowed_domains_a_network_sends_as_the_domains_of_the_logins(world: Make) -> None:
    here = world(authentication=OPEN)
    assert (await here.mail(stranger("open"), "any@example.test")).is_positive
    assert (await here.mail(stranger("open"), "any@app.test")).reason is Reason.SENDER_DOMAIN_NOT_ALLOWED
    nobody = world(authentication=Authentication(allowed_networks=("192.0.2.0/24",)))
    assert (await nobody.mail(stranger("open"), "any@app.test")).reason is Reason.SENDER_DOMAIN_NOT_ALLOWED


@pytest.mark.parametrize(
    "client",
    [stranger("open", "198.51.100.1"), stranger("submission"), stranger("submissions"), stranger("gone")],
    ids=["other network", "listener with login", "implicit TLS", "unknown listener"],
)
async def test_nobody_else_sends_without_login(world: Make, client: Client) -> None:
    verdict = await world(authentication=OPEN).mail(client, "any@example.test")
    assert verdict.reason is Reason.AUTHENTICATION_REQUIRED


async def test_the_account_of_a_machine_sends_as_the_default(world: Make) -> None:
    here = world(senders=Senders(default_from="noreply@example.test"))
    sent = envelope("root@localhost")
    assert (await here.admission.mail(logged_in(), sent)).is_positive
    assert sent.sender == Mailbox("noreply", "example.test")
    judgement = await here.message(logged_in(), "From: root@localhost\n\nx", sender="noreply@example.test")
    assert b"\r\nFrom: noreply@example.test\r\nReply-To: root@localhost\r\n" in judgement.content.header
    assert (await world().mail(logged_in(), "root@localhost")).reason is Reason.SENDER_NOT_OWNED


# --- RCPT -----------------------------------------------------------------------------------------------------------


async def test_recipient_domains(world: Make) -> None:
    here = world(recipients=Recipients(allowed_domains=("other.test",)))
    sent = envelope("ann@example.test")
    assert here.admission.recipient(logged_in(), sent, Recipient(Mailbox("a", "OTHER.test"))).is_positive
    for refused in (Mailbox("a", "third.test"), Mailbox("postmaster", ""), Mailbox("a", "x.other.test")):
        verdict = here.admission.recipient(logged_in(), sent, Recipient(refused))
        assert (verdict.reply.code, verdict.reason) == (550, Reason.RECIPIENT_DOMAIN_NOT_ALLOWED)
    assert world().admission.recipient(logged_in(), sent, Recipient(Mailbox("a", "third.test"))).is_positive


# --- the data -------------------------------------------------------------------------------------------------------


async def test_a_letter_gets_the_relays_header_fields_and_keeps_its_body(world: Make) -> None:
    judgement = await world().message(logged_in(), LETTER)
    assert judgement.verdict.is_positive
    assert (judgement.suspected, judgement.held, judgement.reason) == (False, False, Reason.ACCEPTED)
    text = b"".join(judgement.content.chunks()).decode()
    assert text.startswith(
        "Received: from app-1 ([192.0.2.7])\r\n\tby relay.example.test with ESMTPSA id Q1;\r\n\tTue, 14 Nov 2023"
    )
    assert "Message-ID: <Q1@relay.example.test>\r\n" in text
    assert "ann@example.test" not in text.partition("\r\nFrom: ")[0]
    assert text.endswith("\r\n\r\nHello there, how are you today, my dear friend?\r\n")


@pytest.mark.parametrize(
    "head",
    [
        "From: boss@example.test",
        "From: ann@example.test, boss@example.test",
        "From: ann@example.test\nSender: boss@example.test",
        "From: ann@example.test\nResent-From: boss@example.test",
        "From: ann@example.test\nResent-Sender: boss@example.test",
        "From: Team: ann@example.test, boss@example.test;",
        "from:boss@example.test",
        "From:\n boss@example.test",
    ],
)
async def test_every_author_must_be_owned(world: Make, head: str) -> None:
    judgement = await world().message(logged_in(), f"{head}\n\nx")
    assert (judgement.verdict.reply.code, judgement.reason) == (550, Reason.HEADER_FROM_NOT_OWNED)
    assert "ann@example.test may not send as boss@example.test" in judgement.verdict.reply.text
    assert judgement.charges == ()


async def test_a_header_with_two_readings_is_refused(world: Make) -> None:
    judgement = await world().message(logged_in(), "From: ann@example.test\nFrom: boss@example.test\n\nx")
    assert (judgement.verdict.reply.code, judgement.reason) == (550, Reason.HEADER_MALFORMED)
    assert "from stands twice" in judgement.verdict.reply.text


async def test_a_bounce_needs_an_author(world: Make) -> None:
    judgement = await world().message(logged_in(BOB), "Subject: x\n\nx", sender="")
    assert judgement.reason is Reason.HEADER_MALFORMED


async def test_a_message_that_goes_round_is_refused(world: Make) -> None:
    trace = "Received: from x by y; z\n"
    judgement = await world().message(logged_in(), trace * 51 + LETTER)
    assert (judgement.verdict.reply, judgement.reason) == (reply.MAIL_LOOP, Reason.MAIL_LOOP)
    assert (await world().message(logged_in(), trace * 50 + LETTER)).verdict.is_positive


def limit(name: str, amount: int, **more: object) -> RateLimit:
    return msgspec.convert(
        {"name": name, "unit": RateLimitUnit.MESSAGES, "limit": amount, "window": 60.0, **more}, RateLimit
    )


async def test_a_used_up_limit_is_said_after_the_data_and_then_at_mail(world: Make) -> None:
    here = world(rate_limits=(limit("user-minute", 2),))
    client = logged_in()
    for _ in range(2):
        assert (await here.mail(client, "ann@example.test")).is_positive
        assert (await here.message(client, LETTER)).verdict.is_positive
    for verdict in ((await here.mail(client, "ann@example.test")), (await here.message(client, LETTER)).verdict):
        assert (verdict.reply.code, verdict.reply.status, verdict.reason) == (450, "4.7.1", Reason.RATE_LIMITED)
        assert "user-minute" in verdict.reply.text
        assert "retry after 30 s" in verdict.reply.text
    assert here.sample("mailsluice_rate_limited_total", limit="user-minute") == 2
    assert (await here.mail(logged_in(BOB), "bob@example.test")).is_positive
    here.clock.now += 30
    assert (await here.mail(client, "ann@example.test")).is_positive


async def test_a_limit_that_rejects_does_so_for_good(world: Make) -> None:
    here = world(rate_limits=(limit("day", 1, action=RateLimitAction.REJECT),))
    await here.message(logged_in(), LETTER)
    verdict = await here.mail(logged_in(), "ann@example.test")
    assert (verdict.reply.code, verdict.reply.status) == (550, "5.7.1")


async def test_a_message_over_a_limit_by_itself_is_not_asked_to_come_again(world: Make) -> None:
    here = world(
        rate_limits=(limit("few", 3, unit=RateLimitUnit.RECIPIENTS), limit("small", 900, unit=RateLimitUnit.BYTES))
    )
    assert (await here.message(logged_in(), LETTER, to=4)).verdict.reply.code == 550
    assert (await here.mail(logged_in(), "ann@example.test", declared_size=901)).reply.code == 550
    assert (await here.message(logged_in(), LETTER, to=3)).verdict.is_positive


async def test_what_the_spool_did_not_take_is_not_charged(world: Make) -> None:
    here = world(rate_limits=(limit("user-minute", 1),))
    judgement = await here.message(logged_in(), LETTER)
    here.admission.refund(judgement)
    assert (await here.message(logged_in(), LETTER)).verdict.is_positive
    refused = await here.message(logged_in(), LETTER)
    here.admission.refund(refused)
    assert not (await here.message(logged_in(), LETTER)).verdict.is_positive


async def test_limits_outlive_a_new_configuration(world: Make) -> None:
    here = world(rate_limits=(limit("user-minute", 1),))
    await here.message(logged_in(), LETTER)
    here.reconfigure(rate_limits=(limit("user-minute", 1),), revision="r2")
    assert not (await here.mail(logged_in(), "ann@example.test")).is_positive


async def test_a_users_own_limit_holds_inside_the_relays(world: Make) -> None:
    own = msgspec.structs.replace(ANN, rate_limits=(limit("tenant-chose-this", 1),))
    here = world(authentication=Authentication(users=(own, BOB)), rate_limits=(limit("user-minute", 5),))
    await here.message(logged_in(own), LETTER)
    verdict = await here.mail(logged_in(own), "ann@example.test")
    assert "tenant-chose-this" in verdict.reply.text
    assert here.sample("mailsluice_rate_limited_total", limit="smtp-user") == 1
    assert here.sample("mailsluice_rate_limited_total", limit="tenant-chose-this") is None


async def test_limits_by_namespace_network_and_domain_are_shared(world: Make) -> None:
    team = [User(login=f"{name}@example.test", namespace="team") for name in ("u1", "u2")]
    for per in (RateLimitKey.NAMESPACE, RateLimitKey.SOURCE_NETWORK, RateLimitKey.SENDER_DOMAIN, RateLimitKey.RELAY):
        here = world(authentication=Authentication(users=tuple(team)), rate_limits=(limit("shared", 1, per=per),))
        text = "From: u1@example.test\n\nx"
        assert (await here.message(logged_in(team[0]), text, sender="u1@example.test")).verdict.is_positive
        assert not (await here.mail(logged_in(team[1]), "u2@example.test")).is_positive


PROGRAM = (
    "From: ann@example.test\nContent-Type: multipart/mixed; boundary=b\n\n"
    "--b\nContent-Type: application/octet-stream; name=a.exe\n\nx\n--b--\n"
)


async def test_a_suspected_message_is_marked_and_goes(world: Make) -> None:
    here = world()
    judgement = await here.message(logged_in(), PROGRAM)
    assert judgement.verdict.is_positive
    assert (judgement.suspected, judgement.held) == (True, False)
    assert judgement.reason is Reason.EXECUTABLE_ATTACHMENT
    assert judgement.score == 8
    mark = b"X-Mailsluice-Suspected: executable_attachment; score=8; rules=executableAttachment\r\n"
    assert mark in judgement.content.header
    assert here.sample("mailsluice_spam_rule_hits_total", rule="executableAttachment") == 1
    assert here.sample("mailsluice_spam_score_count") == 1


async def test_thresholds_hold_and_reject(world: Make) -> None:
    held = await world(spam=Spam(hold_at=8)).message(logged_in(), PROGRAM)
    assert (held.verdict.is_positive, held.suspected, held.held) == (True, True, True)
    rejected = await world(spam=Spam(reject_at=8)).message(logged_in(), PROGRAM)
    assert (rejected.verdict.reply.code, rejected.suspected, rejected.held) == (550, True, False)
    assert "executable_attachment" in rejected.verdict.reply.text
    assert rejected.verdict.reason is Reason.EXECUTABLE_ATTACHMENT


async def test_a_forged_author_that_ownership_lets_through_is_suspected(world: Make) -> None:
    here = world(senders=Senders(ownership=Ownership.LOG))
    judgement = await here.message(logged_in(), "From: boss@corp.test\n\nx")
    assert judgement.verdict.is_positive
    assert (judgement.suspected, judgement.reason) == (True, Reason.FORGED_HEADER_FROM)


async def test_behaviour_is_counted_by_login_and_outlives_a_new_configuration(world: Make) -> None:
    spam = Spam(suspect_at=1, rules={"recipientBurst": SpamRule(score=1, limit=10, window=60.0)})
    here = world(spam=spam)
    assert not (await here.message(logged_in(), LETTER, to=10)).suspected
    here.reconfigure(spam=spam, revision="r2")
    assert (await here.message(logged_in(), LETTER)).reason is Reason.RECIPIENT_BURST
    other = await here.message(logged_in(BOB), LETTER.replace("ann@", "bob@"), sender="bob@example.test")
    assert not other.suspected


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"authentication": Authentication(users=(User(login="a@b.test", hashes=("hunter2",)),))}, "a@b.test"),
        ({"authentication": Authentication(users=(User(login="a@b.test", senders=("*",)),))}, "a@b.test"),
        ({"authentication": Authentication(allowed_networks=("ten",))}, "authentication.allowedNetworks"),
        ({"senders": Senders(allowed_domains=("a b@c",))}, "senders.allowedDomains"),
        ({"senders": Senders(default_from="nobody")}, "senders.defaultFrom"),
        ({"recipients": Recipients(allowed_domains=("*",))}, "recipients.allowedDomains"),
        ({"spam": Spam(rules={"nonsense": SpamRule(score=1)})}, "nonsense"),
    ],
)
async def test_a_bad_configuration_names_its_field_and_the_old_one_stays(
    world: Make, settings: dict[str, object], named: str
) -> None:
    here = world()
    with pytest.raises(ConfigurationError) as error:
        here.reconfigure(**settings)
    assert named in str(error.value)
    assert "hunter2" not in str(error.value)
    login, _ = await here.login("ann@example.test", "s3cret")
    assert login is not None


async def test_ten_thousand_users_are_taken_at_once(world: Make) -> None:
    users = tuple(User(login=f"u{number}@example.test", hashes=ANN.hashes) for number in range(10_000))
    here = world(authentication=Authentication(users=users))
    login, _ = await here.login("u9999@example.test", "s3cret")
    assert login is not None


async def test_a_login_whose_recipients_do_not_exist_is_suspected(world: Make) -> None:
    w = world(spam=Spam(suspect_at=5.0, rules={"unknownRecipients": SpamRule(score=8)}))
    w.admission.learn("BOB@example.test", 100, 100)
    w.admission.learn("Ann@Example.Test", 60, 2)
    assert not (await w.message(logged_in(), LETTER)).suspected
    w.admission.learn("ann@example.test", 40, 30)
    judgement = await w.message(logged_in(), LETTER)
    assert judgement.suspected
    assert judgement.reason is Reason.UNKNOWN_RECIPIENTS
