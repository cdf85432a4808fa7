"""Delivery by MX records: a real DNS server and real SMTP servers, on loopback addresses of their own."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trustme

from mailsluice_relay import config
from mailsluice_relay.config import UpstreamLimits, UpstreamTLSMode
from mailsluice_relay.delivery import direct as direct_module
from mailsluice_relay.delivery import mx
from mailsluice_relay.delivery.client import Mail, Timeouts
from mailsluice_relay.delivery.direct import Direct
from mailsluice_relay.delivery.mx import Destination, is_public
from mailsluice_relay.delivery.outcome import Delivered, Failed, Retry, UndeliverableError
from mailsluice_relay.delivery.pool import Clocks
from mailsluice_relay.delivery.target import Target, target_of
from mailsluice_relay.envelope import Content, Mailbox, Recipient
from mailsluice_relay.spool.content import MemoryBody

SHORT = Timeouts(connect=1, greeting=1, command=1, data=1, block=1, end_of_data=1, quit=0.5)


async def found(names: Any, domain: str, **settings: Any) -> list[Destination]:
    return list(await names.exchangers(**settings).destinations(domain, hostname="relay.test"))


async def verdict(names: Any, domain: str, **settings: Any) -> Failed | Retry:
    with pytest.raises(UndeliverableError) as caught:
        await found(names, domain, **settings)
    return caught.value.outcome


# --- where to -----------------------------------------------------------------------------------------------------
async def test_servers_come_by_preference_with_all_their_addresses(names: Any) -> None:
    names.zone = {
        ("example.org", "MX"): ["20 second.example.org.", "10 first.example.org."],
        ("first.example.org", "A"): ["192.0.2.1", "192.0.2.2"],
        ("first.example.org", "AAAA"): ["2001:db8::1"],
        ("second.example.org", "A"): ["192.0.2.3"],
    }
    destinations = [(d.host, d.address) for d in await found(names, "Example.ORG")]
    assert {*destinations[:2]} == {("first.example.org", "192.0.2.1"), ("first.example.org", "192.0.2.2")}
    assert destinations[2:] == [("first.example.org", "2001:db8::1"), ("second.example.org", "192.0.2.3")]


async def test_equals_come_in_any_order(names: Any) -> None:
    names.zone = {
        ("example.org", "MX"): [f"10 {name}.example.org." for name in "abcd"],
        **{(f"{name}.example.org", "A"): ["192.0.2.1"] for name in "abcd"},
    }
    generator = random.Random(1).random
    firsts = {(await found(names, "example.org", random=generator))[0].host for _ in range(40)}
    assert len(firsts) == 4


async def test_without_mx_the_domain_itself_is_the_server(names: Any) -> None:
    names.zone = {("example.org", "A"): ["192.0.2.1"]}
    assert await found(names, "example.org") == [Destination("example.org", "192.0.2.1")]


async def test_a_name_that_people_write_is_looked_up_as_dns_has_it(names: Any) -> None:
    names.zone = {("xn--bcher-kva.example.org", "A"): ["192.0.2.1"]}
    assert await found(names, "bücher.example.org")


@pytest.mark.parametrize(
    ("zone", "status"),
    [
        ({}, "5.1.2"),
        ({("example.org", "MX"): ["0 ."]}, "5.1.10"),
        ({("example.org", "TXT"): ["v=spf1"]}, "5.4.4"),
        ({("example.org", "MX"): ["10 gone.example.org."]}, "5.4.4"),
        ({("example.org", "MX"): ["10 mx.example.org."], ("mx.example.org", "TXT"): ["x"]}, "5.4.4"),
        (
            {
                ("example.org", "MX"): ["10 relay.test.", "20 behind.example.org."],
                ("behind.example.org", "A"): ["192.0.2.1"],
            },
            "5.4.6",
        ),
    ],
)
async def test_what_can_never_be_delivered_fails(
    names: Any, zone: dict[tuple[str, str], list[str]], status: str
) -> None:
    names.zone = zone
    outcome = await verdict(names, "example.org")
    assert isinstance(outcome, Failed)
    assert outcome.status == status


async def test_a_server_that_is_nearer_than_we_are_gets_the_mail(names: Any) -> None:
    names.zone = {
        ("example.org", "MX"): ["5 near.example.org.", "10 relay.test.", "20 far.example.org."],
        ("near.example.org", "A"): ["192.0.2.1"],
        ("far.example.org", "A"): ["192.0.2.2"],
        ("relay.test", "A"): ["192.0.2.3"],
    }
    assert [d.host for d in await found(names, "example.org")] == ["near.example.org"]


@pytest.mark.parametrize("failing", ["example.org", "mx.example.org"])
async def test_name_servers_in_trouble_put_mail_off(names: Any, failing: str) -> None:
    names.zone = {("example.org", "MX"): ["10 mx.example.org."], ("mx.example.org", "A"): ["192.0.2.1"]}
    names.failing.add(failing)
    outcome = await verdict(names, "example.org")
    assert isinstance(outcome, Retry)
    assert not outcome.is_upstream_problem


async def test_a_silent_name_server_is_given_up(names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "LOOKUP_TIMEOUT", 0.5)
    names.silent = True
    assert isinstance(await verdict(names, "example.org"), Retry)


async def test_answers_are_kept(names: Any) -> None:
    names.zone = {("example.org", "MX"): ["10 mx.example.org."], ("mx.example.org", "A"): ["192.0.2.1"]}
    finder = names.exchangers()
    for _ in range(5):
        await finder.destinations("example.org", hostname="relay.test")
    assert names.asked.count(("example.org", "MX")) == 1


@pytest.mark.parametrize(
    ("domain", "expected"),
    [("[192.0.2.1]", "192.0.2.1"), ("[IPv6:2001:db8::1]", "2001:db8::1"), ("[127.0.0.1]", None), ("[x]", None)],
)
async def test_an_address_in_brackets_is_itself(names: Any, domain: str, expected: str | None) -> None:
    if expected is None:
        assert isinstance(await verdict(names, domain, allows=is_public), Failed)
    else:
        assert [d.address for d in await found(names, domain, allows=is_public)] == [expected]
    assert names.asked == []


async def test_nobody_makes_us_talk_to_ourselves_by_a_record_of_theirs(names: Any) -> None:
    names.zone = {("example.org", "MX"): ["10 mx.example.org."], ("mx.example.org", "A"): ["127.0.0.1", "192.0.2.1"]}
    assert [d.address for d in await found(names, "example.org", allows=is_public)] == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("192.0.2.1", True),
        ("10.0.0.1", True),
        ("2001:db8::1", True),
        ("127.0.0.2", False),
        ("0.0.0.0", False),  # noqa: S104 - nothing is bound
        ("224.0.0.1", False),
        ("169.254.169.254", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("fe80::1", False),
    ],
)
def test_what_an_mx_record_may_point_to(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


# --- delivery -----------------------------------------------------------------------------------------------------
MakeDirect = Callable[..., Awaitable[Direct]]


def unverified() -> ssl.SSLContext:
    """As `target_of` makes it for Opportunistic."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.fixture
async def direct_of(names: Any) -> AsyncIterator[MakeDirect]:
    made = []

    async def make(port: int, limits: UpstreamLimits | None = None, **fields: Any) -> Direct:
        settings = {"tls": UpstreamTLSMode.OPPORTUNISTIC, "context": unverified(), **fields}
        target = Target(name="internet", host="", port=port, hostname="relay.test", **settings)
        made.append(
            Direct(
                target,
                limits or UpstreamLimits(),
                exchangers=names.exchangers(),
                clocks=Clocks(time.time, time.monotonic, lambda: 0.5),
                on_throttled=lambda _seconds: None,
                timeouts=SHORT,
            )
        )
        return made[-1]

    yield make
    for item in made:
        await item.close()


def mail(*to: str) -> Mail:
    recipients = [Recipient(Mailbox(*address.rsplit("@", 1))) for address in to]
    return Mail(Mailbox("app", "example.test"), recipients, Content(b"Subject: x\r\n", MemoryBody(b"Hello.\r\n")))


async def test_each_domain_gets_its_mail_in_one_transaction(
    names: Any, make_upstream: Any, direct_of: MakeDirect
) -> None:
    one = await make_upstream()
    two = await make_upstream(address="127.0.0.2", port=one.port, answers={"RCPT TO:<no@": "550 5.1.1 no"})
    names.zone = {("one.test", "A"): ["127.0.0.1"], ("two.test", "A"): ["127.0.0.2"]}
    direct = await direct_of(one.port)
    outcomes = await direct.deliver(mail("a@one.test", "no@two.test", "b@ONE.test", "c@two.test", "d@nowhere.test"))
    assert [type(outcome) for outcome in outcomes] == [Delivered, Failed, Delivered, Delivered, Failed]
    assert [outcome.host for outcome in outcomes] == ["one.test", "two.test", "one.test", "two.test", ""]
    assert [item.recipients for item in one.received] == [["RCPT TO:<a@one.test>", "RCPT TO:<b@ONE.test>"]]
    assert [item.recipients for item in two.received] == [["RCPT TO:<c@two.test>"]]


async def test_the_next_server_takes_what_the_first_cannot(
    names: Any, make_upstream: Any, direct_of: MakeDirect
) -> None:
    backup = await make_upstream(address="127.0.0.2")
    names.zone = {
        ("example.org", "MX"): ["10 down.example.org.", "20 up.example.org."],
        ("down.example.org", "A"): ["127.0.0.3"],
        ("up.example.org", "A"): ["127.0.0.2"],
    }
    direct = await direct_of(backup.port)
    (outcome,) = await direct.deliver(mail("a@example.org"))
    assert (type(outcome), outcome.host) == (Delivered, "up.example.org")


@pytest.mark.parametrize("answers", [{"RCPT": "550 5.1.1 no"}, {".": "451 4.7.1 slower"}, {".": "close"}])
async def test_a_refusal_or_a_loss_after_the_text_is_no_case_for_the_next_server(
    names: Any, make_upstream: Any, direct_of: MakeDirect, answers: dict[str, str]
) -> None:
    first = await make_upstream(answers=answers)
    second = await make_upstream(address="127.0.0.2", port=first.port)
    names.zone = {
        ("example.org", "MX"): ["10 first.example.org.", "20 second.example.org."],
        ("first.example.org", "A"): ["127.0.0.1"],
        ("second.example.org", "A"): ["127.0.0.2"],
    }
    direct = await direct_of(first.port)
    (outcome,) = await direct.deliver(mail("a@example.org"))
    assert not isinstance(outcome, Delivered)
    assert second.connections == 0


@pytest.mark.parametrize("offers_tls", [True, False])
async def test_tls_is_used_where_it_is_offered_whoever_signed_the_certificate(
    names: Any, make_upstream: Any, direct_of: MakeDirect, offers_tls: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("another.test").configure_cert(context)
    server = await make_upstream(tls=context if offers_tls else None)
    names.zone = {("example.org", "A"): ["127.0.0.1"]}
    direct = await direct_of(server.port)
    (outcome,) = await direct.deliver(mail("a@example.org"))
    assert isinstance(outcome, Delivered)
    assert ("STARTTLS" in server.commands) is offers_tls


async def test_connections_to_one_destination_are_bounded_and_kept(
    names: Any, make_upstream: Any, direct_of: MakeDirect
) -> None:
    server = await make_upstream()
    names.zone = {("example.org", "A"): ["127.0.0.1"]}
    direct = await direct_of(server.port, UpstreamLimits(connections=4))
    outcomes = await asyncio.gather(*(direct.deliver(mail("a@example.org")) for _ in range(40)))
    assert {type(outcome) for (outcome,) in outcomes} == {Delivered}
    assert server.most_open <= 2
    assert server.connections <= 2
    assert direct.connections <= 2


async def test_one_domain_that_hangs_does_not_stop_the_others(
    names: Any, make_upstream: Any, direct_of: MakeDirect
) -> None:
    hanging = await make_upstream(answers={"GREETING": "hang"})
    good = await make_upstream(address="127.0.0.2", port=hanging.port)
    names.zone = {("hangs.test", "A"): ["127.0.0.1"], ("good.test", "A"): ["127.0.0.2"]}
    direct = await direct_of(hanging.port, UpstreamLimits(connections=4))
    stuck = asyncio.create_task(direct.deliver(mail("a@hangs.test")))
    (outcome,) = await direct.deliver(mail("a@good.test"))
    assert isinstance(outcome, Delivered)
    assert not stuck.done()
    assert good.received
    assert isinstance((await stuck)[0], Retry)


async def test_destinations_are_forgotten(
    names: Any, make_upstream: Any, direct_of: MakeDirect, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr(direct_module, "MAXIMUM_POOLS", 3)
    server = await make_upstream(address="0.0.0.0")  # noqa: S104 - all of loopback
    names.zone = {(f"d{number}.test", "A"): [f"127.0.0.{number}"] for number in range(1, 10)}
    direct = await direct_of(server.port)
    for number in range(1, 10):
        (outcome,) = await direct.deliver(mail(f"a@d{number}.test"))
        assert isinstance(outcome, Delivered)
    assert direct.connections == 3
    await until(lambda: server.open == 3)


def test_the_configuration_needs_no_host_and_verifies_nobody() -> None:
    upstream = config.Upstream(
        name="internet", type=config.UpstreamType.DIRECT_TO_MX, port=25, tls=UpstreamTLSMode.OPPORTUNISTIC
    )
    target = target_of(0, upstream, {}, hostname="relay.test")
    assert (target.port, target.login) == (25, None)
    assert target.context is not None
    assert target.context.verify_mode is ssl.CERT_NONE
