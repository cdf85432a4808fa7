"""Which senders a login owns: tricks with addresses do not make one more."""

import pytest

from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.envelope import Mailbox
from mailsluice_relay.policy.ownership import Domains, domain_key, is_local_name, rights

GRANTS = ("cron@example.test", "*@batch.example.test", "*@*.team.test", "bob+news@example.test", "*@faß.test")
LOGIN = "bob@example.test"


def mailbox(address: str) -> Mailbox:
    local_part, _, domain = address.rpartition("@")
    return Mailbox(local_part, domain)


@pytest.mark.parametrize(
    "address",
    [
        "bob@example.test",
        "Bob@EXAMPLE.test",
        '"bob"@example.test',
        '"b\\ob"@example.test',
        "cron@example.test",
        "bob+news@example.test",
        "anything@batch.example.test",
        '"two words"@batch.example.test',
        "x@a.team.test",
        "x@a.b.team.test",
        "x@faß.test",
        "x@xn--fa-hia.test",
        "x@XN--FA-HIA.test",
    ],
)
def test_owned(address: str) -> None:
    assert rights(LOGIN, GRANTS).owns(mailbox(address))


@pytest.mark.parametrize(
    "address",
    [
        "alice@example.test",
        "bob+x@example.test",  # only as granted
        "bob@sub.example.test",
        "bob@example.test.evil.test",
        "bob@notexample.test",
        "bob@evilexample.test",
        "x@team.test",  # *.team.test are its subdomains
        "x@evilteam.test",
        "x@batch.example.test.",
        "x@.team.test\N{FULLWIDTH FULL STOP}evil.test",
        "x@fass.test",  # IDNA 2003 takes it for faß.test
        "bob@ex\u0430mple.test",  # a Cyrillic a
        "bob@\uff45xample.test",  # a fullwidth e
        "bob@example\u3002test",
        "b\u043eb@example.test",
        "bob\u200b@example.test",
        '"bob@example.test"@evil.test',
        '"bob@example.test\\"@evil.test',
        "bob@example.test@evil.test",
        "bob%evil.test@example.test",
        "evil.test!bob@example.test",
        "=?utf-8?q?bob?=@example.test",
        "bob @example.test",
        "bob@[192.0.2.1]",
        "bob@",
        "*@example.test",
        "@example.test",
    ],
)
def test_not_owned(address: str) -> None:
    assert not rights(LOGIN, GRANTS).owns(mailbox(address))


def test_the_null_sender_is_owned_by_grant_alone() -> None:
    assert not rights(LOGIN, GRANTS).owns(None)
    assert rights(LOGIN, ["<>"]).owns(None)
    assert not rights(LOGIN, ["<>"]).owns(mailbox("alice@example.test"))


def test_a_login_that_is_no_address_owns_what_it_is_granted() -> None:
    assert not rights("cron", ()).owns(mailbox("cron@example.test"))
    assert rights("cron", ["cron@example.test"]).owns(mailbox("cron@example.test"))


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "example.test",
        "@example.test",
        "bob@",
        "*",
        "a*@example.test",
        "a@*.example.test",
        "*@a.*.test",
        "*@*",
        "<x>",
    ],
)
def test_what_is_no_pattern_is_an_error_that_names_the_login(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match=r"authentication\.users: bob@example\.test"):
        rights(LOGIN, [pattern])


def test_allowed_domains_match_exactly_or_below() -> None:
    domains = Domains(["example.test", "*.example.test", "*.only-below.test"], "senders.allowedDomains")
    for allowed in ("example.test", "EXAMPLE.test", "a.example.test", "a.b.example.test", "x.only-below.test"):
        assert domains.allows(allowed)
    for refused in ("only-below.test", "notexample.test", "example.test.evil.test", "example.test.", "", "[192.0.2.1]"):
        assert not domains.allows(refused)
    assert Domains([], "any").allows("anything.test")


@pytest.mark.parametrize("name", ["", "*", "*.", "a*.test", "user@example.test"])
def test_what_is_no_domain_is_an_error_that_names_the_field(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"senders\.allowedDomains"):
        Domains([name], "senders.allowedDomains")


def test_an_invalid_internationalized_domain_equals_nothing() -> None:
    assert domain_key("a\u200bb.test") is None
    assert domain_key("ex\u0430mple..test") is None
    assert domain_key("münchen.test") == domain_key("xn--mnchen-3ya.test")


def test_names_of_machines_are_told_from_domains() -> None:
    for name in ("localhost", "LOCALHOST", "web-1", "web.localdomain", "host.local", "x.svc.cluster.local", ""):
        assert is_local_name(name)
    for name in ("example.test", "local.example.test", "[192.0.2.1]"):
        assert not is_local_name(name)
