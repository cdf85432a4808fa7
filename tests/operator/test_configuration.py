"""From the resource and its Secrets to what the relay is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from ruamel.yaml import YAML

from mailsluice_operator.children.configuration import Built, Secret, Unusable, build, hostname, own_logins, smtp_user
from mailsluice_operator.resource.models import SmtpRelay, relay_from, user_from
from mailsluice_operator.resource.validation import admitted
from mailsluice_relay.config import (
    Engine,
    EngineType,
    FailureAction,
    RateLimitKey,
    User,
    decode,
    encode,
    is_supported_hash,
)
from mailsluice_relay.delivery.oauth import Grant
from mailsluice_relay.delivery.target import target_of

ROOT = Path(__file__).resolve().parents[2]
BCRYPT = "$2b$10$IACI.x37fVDOprQytsuhaeWnGGmQwF6NkJtIbSJ97fVJryUdwnZYG"
SERVER = {"tls.crt": b"-----BEGIN CERTIFICATE-----\nours", "tls.key": b"PRIVATE KEY", "ca.crt": b"authority"}
PEM_CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
PEM_KEY = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


def pem(key: Any) -> str:
    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return text.decode()


P256 = pem(ec.generate_private_key(ec.SECP256R1()))
ED25519 = pem(Ed25519PrivateKey.generate())

UPSTREAM = {"name": "provider", "host": "smtp.provider.test"}


def relay(**spec: Any) -> SmtpRelay:
    manifest = {
        "apiVersion": "mailsluice.dev/v1alpha1",
        "kind": "SmtpRelay",
        "metadata": {"name": "outbound", "namespace": "mail", "uid": "relay-uid"},
        "spec": {"upstreams": [UPSTREAM], **spec},
    }
    return relay_from(admitted(manifest))


def secret(version: str = "1", uid: str = "uid", **data: str | bytes) -> Secret:
    """`tls_crt` stands for the key tls.crt."""
    values = {key.replace("_", "."): value.encode() if isinstance(value, str) else value for key, value in data.items()}
    return Secret(values, uid, version)


def built(spec: dict[str, Any], **secrets: Secret) -> Built:
    return build(
        relay(**spec), secrets={name.replace("_", "-"): value for name, value in secrets.items()}, server=SERVER
    )


def messages(spec: dict[str, Any], **secrets: Secret) -> list[str]:
    with pytest.raises(Unusable) as caught:
        built(spec, **secrets)
    return [fact.message for fact in caught.value.facts]


WITH_USERS = {"authentication": {"users": [{"secretRef": {"name": "users"}}]}}
WITH_DKIM = {"dkim": [{"domain": "example.test", "selector": "s1", "privateKeySecretRef": {"name": "s"}}]}
WITH_LOGIN = {"upstreams": [{**UPSTREAM, "credentialsSecretRef": {"name": "login"}}]}


def test_the_relay_can_read_what_is_built() -> None:
    configuration = built(WITH_USERS, users=secret(htpasswd=f"shop@example.test:{BCRYPT}")).configuration
    assert decode(encode(configuration)) == configuration


def test_pods_bind_ports_that_need_no_privilege() -> None:
    listeners = built({}).configuration.listeners
    assert [(listener.name, listener.port, str(listener.mode)) for listener in listeners] == [
        ("smtp", 2025, "StartTLS"),
        ("submissions", 2465, "ImplicitTLS"),
        ("submission", 2587, "StartTLS"),
    ]
    assert all(listener.authentication_required for listener in listeners)
    assert not any(listener.proxy_trusted_networks for listener in listeners)


def test_a_listener_behind_a_balancer_knows_whom_to_believe() -> None:
    behind = {"name": "lb", "port": 10587, "proxyProtocol": {"trustedNetworks": ["10.1.2.16/28", "fd00::/64"]}}
    (listener,) = built({"listeners": [behind]}).configuration.listeners
    assert listener.proxy_trusted_networks == ("10.1.2.16/28", "fd00::/64")


def test_the_host_name_is_that_of_the_service_unless_another_is_given() -> None:
    assert hostname(relay()) == "outbound.mail.svc"
    assert built({"hostname": "mail.example.test"}).configuration.hostname == "mail.example.test"


def test_durations_and_sizes_become_seconds_and_octets() -> None:
    configuration = built(
        {
            "limits": {"messageSize": "10Mi", "idleTimeout": "90s"},
            "queue": {"lifetime": "1h30m", "storage": {"size": "1G"}},
            "rateLimits": [{"name": "day", "unit": "Bytes", "limit": "2G", "burst": 500, "window": "24h"}],
        }
    ).configuration
    assert (configuration.limits.message_size, configuration.limits.idle_timeout) == (10 * 1024 * 1024, 90.0)
    assert (configuration.queue.lifetime, configuration.queue.maximum_bytes) == (5400.0, 900_000_000)
    (limit,) = configuration.rate_limits
    assert (limit.limit, limit.burst, limit.window, limit.per) == (2_000_000_000, 500, 86400.0, RateLimitKey.USER)


def test_the_stores_url_goes_to_the_credentials_and_nowhere_else() -> None:
    spec = {
        "rateLimitStore": {
            "urlSecretRef": {"name": "valkey"},
            "caSecretRef": {"name": "authority"},
            "onFailure": "Defer",
        }
    }
    url, certificate = "rediss://user:sesame@valkey.test:6379/0", "-----BEGIN CERTIFICATE-----\n"
    made = built(spec, valkey=secret(url=f"{url}\n"), authority=secret(**{"ca.crt": certificate}))
    store = made.configuration.rate_limit_store
    assert store is not None
    assert store.on_failure == "Defer"
    assert made.files[f"{store.credentials}.url"] == url.encode()
    assert made.files[str(store.ca)] == certificate.encode()
    assert b"sesame" not in msgspec.json.encode(made.configuration)
    assert made.degraded == ()


def test_what_is_no_url_of_a_store_is_told_without_showing_it() -> None:
    spec = {"rateLimitStore": {"urlSecretRef": {"name": "valkey"}}}
    with pytest.raises(Unusable, match=r"Secret mail/valkey key url is not the URL of a store") as error:
        built(spec, valkey=secret(url="valkey.test:6379?sesame"))
    assert "sesame" not in str(error.value)


def test_engines_are_told_with_their_addresses() -> None:
    spec = {
        "spam": {
            "engines": [
                {"name": "rspamd", "type": "Rspamd", "url": "http://rspamd.test:11333", "timeout": "5s"},
                {"name": "clamd", "type": "ClamAV", "address": "clamd.test:3310", "onFailure": "Defer"},
            ]
        }
    }
    made = built(spec)
    assert made.configuration.spam.engines == (
        Engine(name="rspamd", type=EngineType.RSPAMD, url="http://rspamd.test:11333", timeout=5.0),
        Engine(name="clamd", type=EngineType.CLAM_AV, address="clamd.test:3310", on_failure=FailureAction.DEFER),
    )
    assert made.degraded == ()


# --- Users ------------------------------------------------------------------------------------------------------------


def test_every_line_of_htpasswd_is_a_login_with_the_senders_of_its_source() -> None:
    spec = {"authentication": {"users": [{"secretRef": {"name": "users"}, "senders": ["*@example.test"]}]}}
    text = f"# people\nshop@example.test:{BCRYPT}\n\ncron@example.test:{BCRYPT}\n"
    users = built(spec, users=secret(htpasswd=text)).configuration.authentication.users
    assert [(user.login, user.hashes, user.senders) for user in users] == [
        ("cron@example.test", (BCRYPT,), ("*@example.test",)),
        ("shop@example.test", (BCRYPT,), ("*@example.test",)),
    ]


def test_a_basic_auth_password_becomes_a_hash_that_stays_until_its_secret_changes() -> None:
    def hashed(version: str, uid: str = "uid") -> str:
        users = secret(version, uid, username="shop@example.test", password="swordfish")
        (user,) = built(WITH_USERS, users=users).configuration.authentication.users
        assert user.login == "shop@example.test"
        (text,) = user.hashes
        return text

    first = hashed("1")
    assert is_supported_hash(first)
    assert first == hashed("1")
    assert first != hashed("2"), "another version of the Secret"
    assert first != hashed("1", "other"), "another Secret with the same password"


def test_another_key_of_the_secret_may_be_named() -> None:
    spec = {"authentication": {"users": [{"secretRef": {"name": "users", "key": "people"}}]}}
    users = secret(people=f"shop@example.test:{BCRYPT}", username="x", password="y")
    assert [user.login for user in built(spec, users=users).configuration.authentication.users] == ["shop@example.test"]


def test_granted_users_stand_beside_the_relays_own() -> None:
    user = user_from(
        {
            "metadata": {"name": "news", "namespace": "shop"},
            "spec": {
                "relayRef": {"name": "outbound"},
                "login": "news@shop.example.test",
                "rateLimits": [{"name": "day", "unit": "Recipients", "limit": 1000, "window": "24h"}],
            },
        }
    )
    owner = relay(authentication={"suspendedLogins": ["News@shop.example.test"]})
    granted = smtp_user(user, owner, (BCRYPT,))
    assert granted.suspended
    assert granted.namespace == "shop"
    configuration = build(owner, secrets={}, users=[granted], server=SERVER).configuration
    assert configuration.authentication.users == (granted,)
    assert configuration.authentication.users[0].rate_limits[0].per is RateLimitKey.USER


def test_the_relays_own_logins_are_known_before_others_are_granted() -> None:
    users = secret(htpasswd=f"Shop@example.test:{BCRYPT}")
    assert own_logins(relay(**WITH_USERS), {"users": users}) == {"shop@example.test"}
    assert own_logins(relay(**WITH_USERS), {}) == frozenset()
    assert own_logins(relay(**WITH_USERS), {"users": secret(htpasswd="nonsense")}) == frozenset()


# --- Upstreams --------------------------------------------------------------------------------------------------------


def test_credentials_are_files_and_never_part_of_the_configuration() -> None:
    result = built(WITH_LOGIN, login=secret(username="platform@example.test\n", password="swordfish\n"))
    assert result.files["upstream-provider.username"] == b"platform@example.test"
    assert result.files["upstream-provider.password"] == b"swordfish"
    assert result.configuration.upstreams[0].credentials == "upstream-provider"
    assert b"swordfish" not in msgspec.json.encode(result.configuration)


def test_a_preset_gives_host_port_and_tls() -> None:
    spec = {
        "upstreams": [
            {"name": "ses", "preset": "AmazonSES", "region": "eu-west-1", "credentialsSecretRef": {"name": "login"}},
            {"name": "yandex", "preset": "Yandex", "credentialsSecretRef": {"name": "login"}},
            {"name": "gmail", "preset": "Gmail", "credentialsSecretRef": {"name": "login"}},
        ]
    }
    upstreams = built(spec, login=secret(username="u", password="p")).configuration.upstreams
    assert [(upstream.host, upstream.port, str(upstream.tls)) for upstream in upstreams] == [
        ("email-smtp.eu-west-1.amazonaws.com", 587, "StartTLS"),
        ("smtp.yandex.com", 465, "ImplicitTLS"),
        ("smtp.gmail.com", 587, "StartTLS"),
    ]
    assert {upstream.mechanisms for upstream in upstreams} == {("PLAIN", "LOGIN")}


@pytest.mark.parametrize(
    ("tls", "port"), [({}, 587), ({"mode": "StartTLS"}, 587), ({"mode": "ImplicitTLS"}, 465), ({"mode": "Plain"}, 587)]
)
def test_the_port_follows_from_tls(tls: dict[str, str], port: int) -> None:
    assert built({"upstreams": [{**UPSTREAM, "tls": tls}]}).configuration.upstreams[0].port == port


def test_what_an_upstream_takes_is_divided_by_the_replicas() -> None:
    limits = {"connections": 10, "messagesPerSecond": 14, "messagesPerDay": 50000}
    configuration = build(
        relay(upstreams=[{**UPSTREAM, "limits": limits}]), secrets={}, server=SERVER, replicas=4
    ).configuration
    assert configuration.replicas == 4
    divided = configuration.upstreams[0].limits
    assert (divided.connections, divided.messages_per_second, divided.messages_per_day) == (2, 3.5, 12500)
    many = build(relay(upstreams=[{**UPSTREAM, "limits": limits}]), secrets={}, server=SERVER, replicas=100)
    assert many.configuration.upstreams[0].limits.connections == 1


def grant(kind: str = "RefreshToken", **changes: str) -> Secret:
    """An OAuth grant; `client_id` stands for client-id."""
    data = {
        "grant": kind,
        "user": "mail@example.test\n",
        "client-id": "client",
        "token-url": "https://login.example.test/token",
        "refresh-token": "r3fr3sh\n",
        "client-secret": "swordfish",
        "private-key": P256,
        "scope": "https://mail.example.test/",
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    return Secret({key: value.encode() for key, value in data.items()}, "uid", "1")


@pytest.mark.parametrize("kind", ["RefreshToken", "ClientCredentials", "JWTBearer"])
@pytest.mark.parametrize(
    ("upstream", "mechanisms"),
    [
        ({"name": "up", "preset": "Gmail"}, ("XOAUTH2",)),
        ({"name": "up", "preset": "Outlook"}, ("XOAUTH2",)),
        ({"name": "up", "preset": "Microsoft365"}, ("XOAUTH2",)),
        ({"name": "up", "host": "smtp.provider.test"}, ("XOAUTH2", "OAUTHBEARER")),
    ],
)
def test_a_grant_becomes_files_and_the_relay_takes_them(
    upstream: dict[str, Any], mechanisms: tuple[str, ...], kind: str
) -> None:
    result = built({"upstreams": [{**upstream, "credentialsSecretRef": {"name": "oauth"}}]}, oauth=grant(kind))
    (made,) = result.configuration.upstreams
    assert made.mechanisms == mechanisms
    assert result.files["upstream-up.refresh-token"] == b"r3fr3sh"
    assert result.degraded == ()
    encoded = msgspec.json.encode(result.configuration)
    assert not any(secret in encoded for secret in (b"r3fr3sh", b"swordfish", b"PRIVATE"))
    login = target_of(0, made, result.files, hostname="relay.test").login
    assert isinstance(login, Grant)
    assert (login.type, login.user) == (kind, "mail@example.test")


@pytest.mark.parametrize(
    ("preset", "changes", "wrong"),
    [
        ("Gmail", {"grant": "Password"}, "in the key grant than RefreshToken, ClientCredentials, JWTBearer; write one"),
        ("Gmail", {"token_url": "http://login.example.test/"}, "has no https address in the key token-url"),
        ("Gmail", {"token_url": "https://login.example.test:port/"}, "has no https address in the key token-url"),
        ("Gmail", {"user": "a\1b"}, "has a control character in the key user"),
        ("Gmail", {"refresh_token": " "}, "has nothing in the key refresh-token; fill it"),
        ("Gmail", {"grant": "ClientCredentials", "client_secret": ""}, "has nothing in the key client-secret"),
        ("Gmail", {"grant": "JWTBearer", "private_key": PEM_KEY.decode()}, "has no private key in PEM form"),
        ("Gmail", {"grant": "JWTBearer", "private_key": ED25519}, "than RSA of at least 2048 bits or P-256; make one"),
        ("SendGrid", {}, "holds an OAuth grant, and this provider takes a password"),
    ],
)
def test_a_grant_that_cannot_work_is_told_without_showing_it(preset: str, changes: dict[str, str], wrong: str) -> None:
    oauth = grant(changes.pop("grant", "RefreshToken"), **changes)
    spec = {"upstreams": [{"name": "up", "preset": preset, "credentialsSecretRef": {"name": "oauth"}}]}
    (message,) = messages(spec, oauth=oauth)
    assert wrong in message
    assert not any(secret in message for secret in ("r3fr3sh", "swordfish"))


def test_what_a_grant_may_leave_out_may_also_be_empty() -> None:
    spec = {"upstreams": [{"name": "up", "preset": "Gmail", "credentialsSecretRef": {"name": "oauth"}}]}
    files = built(spec, oauth=grant(scope="", client_secret="\n")).files
    assert not {"upstream-up.scope", "upstream-up.client-secret"} & files.keys()


def test_a_provider_that_takes_oauth_alone_gets_no_password() -> None:
    spec = {"upstreams": [{"name": "up", "preset": "Outlook", "credentialsSecretRef": {"name": "login"}}]}
    (message,) = messages(spec, login=secret(username="u", password="p"))
    assert "has no key grant: this provider takes OAuth alone" in message


def test_a_relay_that_passes_through_has_no_quota() -> None:
    queue = built({"queue": {"mode": "PassThrough"}}).configuration.queue
    assert (queue.mode, queue.maximum_bytes) == ("PassThrough", None)


def test_direct_delivery_takes_tls_as_it_comes() -> None:
    spec = {"hostname": "mail.example.test", "upstreams": [{"name": "internet", "type": "DirectToMX"}]}
    (made,) = built(spec).configuration.upstreams
    assert (made.type, made.host, made.port, made.tls) == ("DirectToMX", "", 25, "Opportunistic")
    assert target_of(0, made, {}, hostname="mail.example.test").login is None
    strict = {**spec, "upstreams": [{"name": "internet", "type": "DirectToMX", "tls": {"mode": "StartTLS"}}]}
    assert built(strict).configuration.upstreams[0].tls == "StartTLS"


# --- Suspicion --------------------------------------------------------------------------------------------------------


def test_a_rule_that_is_left_out_runs_with_its_defaults_and_one_of_score_zero_does_not() -> None:
    spam = {"rules": {"linkShortener": {"score": 0}, "recipientBurst": {"limit": 10, "window": "5m"}}}
    rules = built({"spam": spam}).configuration.spam.rules
    assert rules["linkShortener"].score == 0.0
    assert (rules["recipientBurst"].limit, rules["recipientBurst"].window) == (10, 300.0)
    assert rules["executableAttachment"].score == 8.0


def test_by_default_suspicion_counts_and_marks_only() -> None:
    spam = built({}).configuration.spam
    assert (spam.suspect_at, spam.hold_at, spam.reject_at) == (5.0, None, None)


# --- Certificates and keys --------------------------------------------------------------------------------------------


def test_the_operators_certificate_is_served_unless_another_is_named() -> None:
    assert built({}).files["tls.crt"] == SERVER["tls.crt"]
    named = built({"tls": {"secretRef": {"name": "cert"}}}, cert=secret(tls_crt=PEM_CERTIFICATE, tls_key=PEM_KEY))
    assert named.files == {"tls.crt": PEM_CERTIFICATE, "tls.key": PEM_KEY}


def test_authorities_and_signing_keys_are_files() -> None:
    spec = {
        "tls": {"clientCASecretRef": {"name": "clients"}},
        "upstreams": [{**UPSTREAM, "tls": {"caSecretRef": {"name": "backup", "key": "bundle.pem"}}}],
        "dkim": [{"domain": "example.test", "selector": "s1", "privateKeySecretRef": {"name": "dkim"}}],
    }
    result = built(
        spec,
        clients=secret(ca_crt=PEM_CERTIFICATE),
        backup=secret(bundle_pem=PEM_CERTIFICATE),
        dkim=secret(tls_key=ED25519),
    )
    assert result.configuration.tls.client_ca == "client-ca.crt"
    assert result.configuration.upstreams[0].ca == "upstream-provider.ca.crt"
    assert result.configuration.dkim[0].key == "dkim-0.key"
    assert {"client-ca.crt", "upstream-provider.ca.crt", "dkim-0.key"} < result.files.keys()


# --- Revisions --------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_octets() -> None:
    login = secret(username="u", password="p")
    assert encode(built(WITH_LOGIN, login=login).configuration) == encode(built(WITH_LOGIN, login=login).configuration)


def test_a_change_of_the_resource_changes_the_revision_alone() -> None:
    before, after = built({}).configuration, built({"hostname": "other.example.test"}).configuration
    assert before.revision != after.revision
    assert before.credentials_revision == after.credentials_revision


def test_a_new_version_of_a_secret_changes_both_revisions_whatever_it_holds() -> None:
    first = built(WITH_LOGIN, login=secret("1", username="u", password="p")).configuration
    second = built(WITH_LOGIN, login=secret("2", username="u", password="p")).configuration
    assert first.credentials_revision != second.credentials_revision
    assert first.revision != second.revision


def test_a_password_does_not_reach_the_revision() -> None:
    first = built(WITH_LOGIN, login=secret(username="u", password="p")).configuration
    second = built(WITH_LOGIN, login=secret(username="u", password="another")).configuration
    assert first == second, "the revision would be an oracle for guessing"


def test_a_renewed_certificate_changes_the_credentials() -> None:
    renewed = build(relay(), secrets={}, server={**SERVER, "tls.crt": b"renewed"}).configuration
    assert built({}).configuration.credentials_revision != renewed.credentials_revision


# --- What is missing or wrong -----------------------------------------------------------------------------------------


def test_a_missing_secret_is_named_with_its_field() -> None:
    assert messages(WITH_USERS) == [
        "spec.authentication.users[0].secretRef: Secret mail/users does not exist; create it or name another."
    ]


def test_everything_that_is_wrong_is_told_at_once() -> None:
    assert len(messages({**WITH_USERS, **WITH_LOGIN})) == 2


@pytest.mark.parametrize(
    ("spec", "content", "wrong"),
    [
        (WITH_USERS, {}, "has no key htpasswd and no username and password; write one with `mailsluice passwd`."),
        (WITH_USERS, {"htpasswd": "shop@example.test"}, "key htpasswd, line 1: no colon"),
        (
            WITH_USERS,
            {"htpasswd": "a@b.test:swordfish"},
            "key htpasswd, line 1: the hash of a@b.test is in no supported",
        ),
        (WITH_USERS, {"htpasswd": f"a@b.test:{BCRYPT}\nA@b.test:{BCRYPT}"}, "has the login A@b.test twice; remove one"),
        (WITH_USERS, {"htpasswd": b"\xff:x"}, "has something else than UTF-8 text in the key htpasswd; write it anew"),
        (WITH_USERS, {"username": "a@b.test"}, "has no key password; add it."),
        (WITH_LOGIN, {"password": "p"}, "has no key username; add it."),
        (WITH_LOGIN, {"username": "u", "password": "\n"}, "has nothing in the key password; fill it."),
        (WITH_LOGIN, {"grant": "RefreshToken", "user": "u"}, "has no key client-id; add it."),
        ({"tls": {"secretRef": {"name": "s"}}}, {"tls_crt": "x"}, "has no key tls.key; add it."),
        ({"tls": {"secretRef": {"name": "s"}}}, {"tls_crt": "x", "tls_key": PEM_KEY}, "has no certificate in PEM form"),
        (
            {"tls": {"secretRef": {"name": "s"}}},
            {"tls_crt": PEM_CERTIFICATE, "tls_key": "x"},
            "has no private key in PEM",
        ),
        ({"tls": {"clientCASecretRef": {"name": "s"}}}, {"other": "x"}, "has no key ca.crt; add it."),
        (WITH_DKIM, {"other": "x"}, "has no key tls.key; add it."),
        (WITH_DKIM, {"tls_key": PEM_KEY}, "has no private key in PEM form, without a password, in the key tls.key"),
        (WITH_DKIM, {"tls_key": P256}, "has another kind of key in the key tls.key than RSA of at least 1024 bits or"),
    ],
)
def test_wrong_content_is_told_without_showing_it(
    spec: dict[str, Any], content: dict[str, str | bytes], wrong: str
) -> None:
    held = secret(**content)
    (message,) = messages(spec, users=held, login=held, s=held)
    assert wrong in message
    assert message.startswith("spec.")
    assert "swordfish" not in message


def test_one_login_in_two_secrets_is_nobodys() -> None:
    spec = {"authentication": {"users": [{"secretRef": {"name": "one"}}, {"secretRef": {"name": "two"}}]}}
    (message,) = messages(
        spec, one=secret(htpasswd=f"shop@example.test:{BCRYPT}"), two=secret(htpasswd=f"SHOP@example.test:{BCRYPT}")
    )
    assert message == (
        "spec.authentication.users[1].secretRef: Secret mail/two has the login SHOP@example.test, which Secret one has "
        "too; remove one of them."
    )


# --- The example ------------------------------------------------------------------------------------------------------


def test_the_full_example_can_be_built() -> None:
    example = YAML(typ="safe").load(ROOT / "examples/full.yaml")
    login = secret(username="u", password="p")
    secrets = {
        "client-ca": secret(ca_crt=PEM_CERTIFICATE),
        "tenant-a-users": secret(htpasswd=f"shop@example.test:{BCRYPT}"),
        "cron-login": secret(username="cron@example.test", password="p"),
        "valkey": secret(url="redis://valkey.mail.svc:6379/0"),
        "ses-login": login,
        "backup-ca": secret(ca_crt=PEM_CERTIFICATE),
        "backup-login": login,
        "gmail-oauth": grant(),
        "dkim-example": secret(tls_key=ED25519),
    }
    result = build(relay_from(admitted(example)), secrets=secrets, server=SERVER)
    assert [upstream.name for upstream in result.configuration.upstreams] == ["ses", "backup", "finance"]
    assert decode(encode(result.configuration)) == result.configuration
    assert isinstance(result.configuration.authentication.users[0], User)
