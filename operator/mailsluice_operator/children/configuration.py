"""What a relay is told: SmtpRelay, the Secrets that it names and its granted users in, the relay's configuration out.

Pure and deterministic: the same arguments give the same octets, and revisions are made from what Secrets are (uid and
resourceVersion), never from what they hold.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from mailsluice_operator.children.facts import Fact
from mailsluice_operator.resource import models
from mailsluice_operator.resource.models import SmtpRelay, SmtpUser, bound_port
from mailsluice_operator.resource.not_yet import not_yet
from mailsluice_operator.resource.presets import OAUTH_MECHANISMS, PRESETS
from mailsluice_operator.resource.quantities import octets, seconds
from mailsluice_operator.resource.references import (
    Data,
    Purpose,
    SecretUse,
    is_basic_auth,
    is_oauth,
    secret_uses,
    wrong_content,
)
from mailsluice_relay import config
from mailsluice_relay.config import Configuration, QueueMode, UpstreamTLSMode, UpstreamType

REVISION_LENGTH: Final = 16
"""Hexadecimal digits of a revision: 64 bits tell the revisions of one relay apart, and fit a label."""
DEFAULT_STORAGE: Final = models.Storage()
CLIENT_AUTHORITIES: Final = "client-ca.crt"
STORE_CREDENTIALS: Final = "rate-limit-store"
STORE_AUTHORITIES: Final = "rate-limit-store.ca.crt"
SERVER_FILES: Final = ("tls.crt", "tls.key", "ca.crt")


class Unusable(Exception):  # noqa: N818 - a verdict, in the words of the condition
    """No configuration can be made. Each fact names the object, the field and the remedy, and no value of a Secret."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self.facts = tuple(facts)
        super().__init__("; ".join(fact.message for fact in self.facts))


@dataclass(frozen=True)
class Secret:
    """A Secret of the relay's namespace as it was read."""

    data: Data
    uid: str
    resource_version: str

    @property
    def salt(self) -> bytes:
        """For the hash of the one password in it: the same until the Secret changes, and never that of another."""
        return hmac.digest(self.uid.encode(), self.resource_version.encode(), hashlib.sha256)[:16]

    @property
    def former_salt(self) -> bytes:
        """For the hash of a second password in it, the one that was replaced."""
        return hmac.digest(self.uid.encode(), f"{self.resource_version}/former".encode(), hashlib.sha256)[:16]


@dataclass(frozen=True)
class Built:
    """The configuration and the files that go with it."""

    configuration: Configuration
    files: config.Credentials
    """credentials/ without `revision`."""
    degraded: tuple[Fact, ...] = ()
    """What the resource says and this release does not do; the relay works without it."""


HashPassword = Callable[[str, bytes], str]
"""Password and salt to a hash; `mailsluice_relay.config.hash_password`, or something that remembers its results."""


def build(
    relay: SmtpRelay,
    *,
    secrets: Mapping[str, Secret],
    users: Iterable[config.User] = (),
    server: config.Credentials,
    replicas: int = 1,
    volume: int | None = None,
    drain_from_ordinal: int | None = None,
    hash_password: HashPassword = config.hash_password,
) -> Built:
    """The configuration of a relay. Raises Unusable with everything that is missing or wrong.

    `secrets` are those that `secret_uses` lists, by name, as far as they exist. `users` are the granted SmtpUsers.
    `server` is the operator's own certificate (tls.crt, tls.key, ca.crt); not read when tls.secretRef names one.
    `replicas` divide what an upstream takes. `volume` is the size of the smallest volume that a queue has already.
    """
    uses = secret_uses(relay)
    if facts := [*_wrong_secrets(relay, uses, secrets)]:
        raise Unusable(facts)
    own = _own_users(relay, uses, secrets, hash_password)
    files = _files(relay, uses, secrets, server)
    spec = relay.spec
    configuration = Configuration(
        revision="",
        credentials_revision=_credentials_revision(uses, secrets, files),
        relay=config.Relay(name=relay.metadata.name, namespace=relay.metadata.namespace, uid=relay.metadata.uid),
        hostname=hostname(relay),
        listeners=tuple(map(_listener, relay.spec.listeners)),
        tls=config.TLS(
            minimum_version=spec.tls.minimum_version,
            client_ca=CLIENT_AUTHORITIES if spec.tls.client_ca_secret_ref is not None else None,
        ),
        authentication=config.Authentication(
            login_format=spec.authentication.login_format,
            users=tuple(sorted((*own, *users), key=lambda user: user.login)),
            allowed_networks=spec.authentication.allowed_networks,
            failures=_failures(spec.authentication.failures),
        ),
        senders=config.Senders(
            allowed_domains=spec.senders.allowed_domains,
            ownership=spec.senders.ownership,
            default_from=spec.senders.default_from,
        ),
        recipients=config.Recipients(
            allowed_domains=spec.recipients.allowed_domains, redirect_to=spec.recipients.redirect_to or None
        ),
        rate_limits=tuple(rate_limit(limit, limit.per) for limit in spec.rate_limits),
        rate_limit_store=_rate_limit_store(spec.rate_limit_store),
        spam=_spam(spec.spam),
        upstreams=tuple(
            _upstream(upstream, max(replicas, 1), has_grant=_has_grant(upstream, secrets))
            for upstream in spec.upstreams
        ),
        queue=_queue(spec.queue, volume),
        bounces=config.Bounces(address=spec.bounces.address),
        dkim=tuple(
            config.Dkim(domain=signature.domain, selector=signature.selector, key=_dkim_file(index))
            for index, signature in enumerate(spec.dkim)
        ),
        limits=config.Limits(
            message_size=octets(spec.limits.message_size),
            recipients_per_message=spec.limits.recipients_per_message,
            connections=spec.limits.connections,
            connections_per_network=spec.limits.connections_per_network,
            idle_timeout=seconds(spec.limits.idle_timeout),
            session_timeout=seconds(spec.limits.session_timeout),
        ),
        logging=config.Logging(
            level=spec.logging.level, format=spec.logging.format, redact_addresses=spec.logging.redact_addresses
        ),
        monitoring=config.Monitoring(user_metrics_limit=spec.monitoring.user_metrics_limit),
        replicas=max(replicas, 1),
        drain_from_ordinal=drain_from_ordinal,
    )
    return Built(
        msgspec.structs.replace(configuration, revision=_revision(configuration)), files, tuple(_not_effective(relay))
    )


def hostname(relay: SmtpRelay) -> str:
    """The relay's name in greetings and certificates: its own, or that of its Service."""
    return relay.spec.hostname or f"{relay.metadata.name}.{relay.metadata.namespace}.svc"


def own_logins(relay: SmtpRelay, secrets: Mapping[str, Secret]) -> frozenset[str]:
    """The logins of the relay's own users, as `login_key` has them, of those Secrets that are there and in order."""
    found: set[str] = set()
    for use in secret_uses(relay):
        secret = secrets.get(use.name)
        if use.purpose is Purpose.USERS and secret is not None and wrong_content(use, secret.data) is None:
            found.update(config.login_key(login) for login, _ in _logins(use, secret, lambda _password, _salt: ""))
    return frozenset(found)


def smtp_user(user: SmtpUser, relay: SmtpRelay, hashes: tuple[str, ...]) -> config.User:
    """A granted SmtpUser as the relay knows it."""
    return config.User(
        login=user.spec.login,
        hashes=hashes,
        senders=user.spec.senders,
        namespace=user.metadata.namespace,
        rate_limits=tuple(rate_limit(limit, config.RateLimitKey.USER) for limit in user.spec.rate_limits),
        suspended=_is_suspended(relay, user.spec.login),
    )


def rate_limit(limit: models.RateLimit | models.UserRateLimit, per: config.RateLimitKey) -> config.RateLimit:
    return config.RateLimit(
        name=limit.name,
        per=per,
        unit=limit.unit,
        limit=octets(limit.limit),
        window=seconds(limit.window),
        burst=octets(limit.burst) if limit.burst is not None else None,
        action=limit.action,
    )


# --- What is wrong ----------------------------------------------------------------------------------------------------


def _not_effective(relay: SmtpRelay) -> Iterator[Fact]:
    for item in not_yet(relay):
        yield Fact("NotYetSupported", f"{item.field}: {item.message}.")


def _wrong_secrets(relay: SmtpRelay, uses: tuple[SecretUse, ...], secrets: Mapping[str, Secret]) -> Iterator[Fact]:
    for use in uses:
        named = f"{use.field}: Secret {relay.metadata.namespace}/{use.name}"
        secret = secrets.get(use.name)
        if secret is None:
            yield Fact("SecretNotFound", f"{named} does not exist; create it or name another.")
        elif (wrong := wrong_content(use, secret.data)) is not None:
            yield Fact("SecretInvalid", f"{named} {wrong}.")


# --- Users ------------------------------------------------------------------------------------------------------------


def _own_users(
    relay: SmtpRelay, uses: tuple[SecretUse, ...], secrets: Mapping[str, Secret], hash_password: HashPassword
) -> list[config.User]:
    sources = [use for use in uses if use.purpose is Purpose.USERS]
    users: dict[str, config.User] = {}
    held_by: dict[str, str] = {}
    for use, source in zip(sources, relay.spec.authentication.users, strict=True):
        for login, hashed in _logins(use, secrets[use.name], hash_password):
            folded = config.login_key(login)
            if folded in users:
                raise Unusable(
                    [
                        Fact(
                            "SecretInvalid",
                            f"{use.field}: Secret {relay.metadata.namespace}/{use.name} has the login {login}, which "
                            f"Secret {held_by[folded]} has too; remove one of them.",
                        )
                    ]
                )
            held_by[folded] = use.name
            users[folded] = config.User(
                login=login,
                hashes=(hashed,),
                senders=source.senders,
                suspended=_is_suspended(relay, login),
            )
    return list(users.values())


def _logins(use: SecretUse, secret: Secret, hash_password: HashPassword) -> tuple[tuple[str, str], ...]:
    """Logins and hashes in a Secret whose content is in order."""
    if is_basic_auth(use, secret.data):
        login, password = secret.data["username"].decode().strip(), secret.data["password"].decode()
        return ((login, hash_password(password, secret.salt)),)
    return config.parse_htpasswd(secret.data[use.key].decode())


def _is_suspended(relay: SmtpRelay, login: str) -> bool:
    return config.login_key(login) in map(config.login_key, relay.spec.authentication.suspended_logins)


def _failures(failures: models.Failures) -> config.Failures:
    def limit(of: models.FailureLimit) -> config.FailureLimit:
        return config.FailureLimit(limit=of.limit, window=seconds(of.window))

    return config.Failures(
        per_connection=failures.per_connection,
        per_network_and_user=limit(failures.per_network_and_user),
        per_network=limit(failures.per_network),
    )


# --- Listeners, suspicion, queue --------------------------------------------------------------------------------------


def _listener(listener: models.Listener) -> config.Listener:
    return config.Listener(
        name=listener.name,
        port=bound_port(listener.port),
        mode=listener.mode,
        authentication_required=listener.authentication == "Required",
        allow_plaintext_authentication=listener.allow_plaintext_authentication,
        normalize_line_endings=listener.normalize_line_endings,
        proxy_trusted_networks=listener.proxy_protocol.trusted_networks if listener.proxy_protocol is not None else (),
    )


def _rate_limit_store(store: models.RateLimitStore | None) -> config.RateLimitStore | None:
    if store is None:
        return None
    return config.RateLimitStore(
        credentials=STORE_CREDENTIALS,
        ca=STORE_AUTHORITIES if store.ca_secret_ref is not None else None,
        on_failure=config.FailureAction(store.on_failure),
    )


def _spam(spam: models.Spam) -> config.Spam:
    rules: dict[str, config.SpamRule] = {}
    for field in msgspec.structs.fields(models.SpamRules):
        settings = getattr(spam.rules, field.name) or models.DEFAULT_SPAM_RULES[field.name]
        given = msgspec.structs.asdict(settings)
        if "window" in given:
            given["window"] = seconds(given["window"])
        # Those of score 0 as well: the relay takes an empty table for all rules at their defaults.
        rules[field.encode_name] = config.SpamRule(**given)
    return config.Spam(
        suspect_at=spam.suspect_at,
        hold_at=spam.hold_at,
        reject_at=spam.reject_at,
        rules=rules,
        engines=tuple(
            config.Engine(
                name=engine.name,
                type=config.EngineType(engine.type),
                url=engine.url or "",
                address=engine.address or "",
                timeout=seconds(engine.timeout),
                on_failure=config.FailureAction(engine.on_failure),
            )
            for engine in spam.engines
        ),
    )


def _queue(queue: models.Queue, existing: int | None) -> config.Queue:
    volume = octets((queue.storage or DEFAULT_STORAGE).size)
    if existing is not None:
        volume = min(volume, existing)
    return config.Queue(
        mode=queue.mode,
        lifetime=seconds(queue.lifetime),
        delay_warning=seconds(queue.delay_warning) if queue.delay_warning is not None else None,
        retry=config.Retry(
            initial=seconds(queue.retry.initial), maximum=seconds(queue.retry.maximum), factor=queue.retry.factor
        ),
        # A tenth stays free for the database's journal and the file system's own needs.
        maximum_bytes=volume * 9 // 10 if queue.mode is QueueMode.PERSISTENT else None,
    )


# --- Upstreams --------------------------------------------------------------------------------------------------------


def _has_grant(upstream: models.Upstream, secrets: Mapping[str, Secret]) -> bool:
    credentials = upstream.credentials_secret_ref
    return credentials is not None and is_oauth(secrets[credentials.name].data)


def _upstream(upstream: models.Upstream, replicas: int, *, has_grant: bool) -> config.Upstream:
    preset = PRESETS.get(upstream.preset) if upstream.preset is not None else None
    host = preset.host_of(upstream.region) if preset is not None else upstream.host
    mode = upstream.tls.mode or _default_tls(upstream)
    credentials = upstream.credentials_secret_ref
    limits, match = upstream.limits, upstream.match
    of_any_server = OAUTH_MECHANISMS if has_grant else config.Upstream(name="default").mechanisms
    mechanisms = preset.mechanisms if preset is not None else of_any_server
    return config.Upstream(
        name=upstream.name,
        type=upstream.type,
        host=host or "",
        port=upstream.port or _default_port(upstream, mode),
        tls=mode,
        ca=_authorities_file(upstream.name) if upstream.tls.ca_secret_ref is not None else None,
        allow_plaintext_authentication=upstream.allow_plaintext_authentication,
        mechanisms=tuple(name for name in mechanisms if (name in OAUTH_MECHANISMS) is has_grant),
        credentials=_credentials_name(upstream.name) if credentials is not None else None,
        priority=upstream.priority,
        weight=upstream.weight,
        match_senders=match.senders if match is not None else (),
        match_recipients=match.recipients if match is not None else (),
        limits=config.UpstreamLimits(
            connections=max(limits.connections // replicas, 1),
            messages_per_second=limits.messages_per_second / replicas if limits.messages_per_second else None,
            messages_per_day=max(limits.messages_per_day // replicas, 1) if limits.messages_per_day else None,
        ),
    )


def _default_tls(upstream: models.Upstream) -> UpstreamTLSMode:
    if upstream.type is UpstreamType.DIRECT_TO_MX:
        # Other people's servers: half of the world has certificates that nobody can verify (RFC 7435).
        return UpstreamTLSMode.OPPORTUNISTIC
    return PRESETS[upstream.preset].tls if upstream.preset is not None else UpstreamTLSMode.START_TLS


def _default_port(upstream: models.Upstream, mode: UpstreamTLSMode) -> int:
    if upstream.type is UpstreamType.DIRECT_TO_MX:
        return 25
    if upstream.preset is not None and upstream.tls.mode is None:
        return PRESETS[upstream.preset].port
    return 465 if mode is UpstreamTLSMode.IMPLICIT_TLS else 587


# --- Files and revisions ----------------------------------------------------------------------------------------------


def _credentials_name(upstream: str) -> str:
    return f"upstream-{upstream}"


def _authorities_file(upstream: str) -> str:
    return f"upstream-{upstream}.ca.crt"


def _dkim_file(index: int) -> str:
    # By number: a domain of 253 characters would not fit the key of a Secret.
    return f"dkim-{index}.key"


def _files(
    relay: SmtpRelay, uses: tuple[SecretUse, ...], secrets: Mapping[str, Secret], server: config.Credentials
) -> dict[str, bytes]:
    spec = relay.spec
    by_field = {use.field: use for use in uses}

    def value(field: str) -> bytes:
        use = by_field[field]
        return secrets[use.name].data[use.key]

    if spec.tls.secret_ref is not None:
        server = secrets[spec.tls.secret_ref.name].data
    files = {name: server[name] for name in SERVER_FILES if name in server}
    if spec.tls.client_ca_secret_ref is not None:
        files[CLIENT_AUTHORITIES] = value("spec.tls.clientCASecretRef")
    if (store := spec.rate_limit_store) is not None:
        files[f"{STORE_CREDENTIALS}.url"] = value("spec.rateLimitStore.urlSecretRef").strip()
        if store.ca_secret_ref is not None:
            files[STORE_AUTHORITIES] = value("spec.rateLimitStore.caSecretRef")
    for index, upstream in enumerate(spec.upstreams):
        if upstream.tls.ca_secret_ref is not None:
            files[_authorities_file(upstream.name)] = value(f"spec.upstreams[{index}].tls.caSecretRef")
        if upstream.credentials_secret_ref is not None:
            data = secrets[upstream.credentials_secret_ref.name].data
            name = _credentials_name(upstream.name)
            if is_oauth(data):
                found = {key: data[key].strip() for key in config.OAUTH_KEYS if key in data}
                files |= {f"{name}.{key}": value for key, value in found.items() if value}
                continue
            files[f"{name}.username"] = data["username"].strip()
            # Editors and `kubectl create secret --from-file` leave a line feed, which no password ends with.
            files[f"{name}.password"] = data["password"].rstrip(b"\r\n")
    for index, _ in enumerate(spec.dkim):
        files[_dkim_file(index)] = value(f"spec.dkim[{index}].privateKeySecretRef")
    return files


def _credentials_revision(
    uses: tuple[SecretUse, ...], secrets: Mapping[str, Secret], files: Mapping[str, bytes]
) -> str:
    """Changes whenever a file may have: by which Secrets they come from, and by the certificates, which are public."""
    digest = hashlib.sha256()
    for use in uses:
        if use.purpose is not Purpose.USERS:
            secret = secrets[use.name]
            digest.update(f"{use.field}\0{use.name}\0{use.key}\0{secret.uid}\0{secret.resource_version}\n".encode())
    for name in ("tls.crt", "ca.crt"):
        digest.update(hashlib.sha256(files.get(name, b"")).digest())
    return digest.hexdigest()[:REVISION_LENGTH]


def _revision(configuration: Configuration) -> str:
    canonical = msgspec.json.encode(configuration, order="deterministic")
    return hashlib.sha256(canonical).hexdigest()[:REVISION_LENGTH]
