"""The relay's configuration: the one language that the operator writes and the relay reads.

On disk it is a directory as the kubelet mounts it:

    config/config.json.gz     this file's `Configuration`, gzipped deterministically
    credentials/revision      the same text as `Configuration.credentials_revision`
    credentials/tls.crt       the server certificate chain; tls.key its key; ca.crt what clients verify it with
    credentials/client-ca.crt whom client certificates must come from
    credentials/NAME.*        what an upstream or a DKIM key refers to by NAME (`Upstream.credentials`, `Dkim.key`)

Durations are seconds, sizes are octets (RFC 1870). Pure: bytes in, values out; `reload` does the reading.
"""

from __future__ import annotations

import base64
import enum
import gzip
import hashlib
import io
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta

MAXIMUM_ENCODED_SIZE: Final = 900 * 1024
"""Octets of config.json.gz: a Secret holds 1 MiB (Kubernetes API limit), with room for metadata."""

MAXIMUM_DECODED_SIZE: Final = 64 * 1024 * 1024
"""Octets after decompression; a configuration of 10,000 users takes about 3 MB."""


REQUIRED_OAUTH_KEYS: Final = ("grant", "user", "client-id", "token-url")
OAUTH_KEYS: Final = (*REQUIRED_OAUTH_KEYS, "scope", "client-secret", "refresh-token", "private-key")
"""What an OAuth grant may consist of; one of the last three always (`OAUTH_SECRETS`)."""

Credentials = Mapping[str, bytes]
"""The files of credentials/ by name, as they were read together."""


class ConfigurationError(ValueError):
    """The configuration cannot be used. The text names the field and the remedy, and never a secret's value."""


class ListenerMode(enum.StrEnum):
    PLAIN = "Plain"
    START_TLS = "StartTLS"
    IMPLICIT_TLS = "ImplicitTLS"


class UpstreamTLSMode(enum.StrEnum):
    PLAIN = "Plain"
    OPPORTUNISTIC = "Opportunistic"
    START_TLS = "StartTLS"
    IMPLICIT_TLS = "ImplicitTLS"


class LoginFormat(enum.StrEnum):
    FULL = "Full"
    SHORT = "Short"
    EITHER = "Either"


class Ownership(enum.StrEnum):
    ENFORCE = "Enforce"
    LOG = "Log"
    OFF = "Off"


class RateLimitKey(enum.StrEnum):
    """What a limit is counted for. A new dimension is a line here and a line in `policy.rates.key_of`."""

    USER = "User"
    NAMESPACE = "Namespace"
    SOURCE_NETWORK = "SourceNetwork"
    SENDER_DOMAIN = "SenderDomain"
    RELAY = "Relay"


class RateLimitUnit(enum.StrEnum):
    MESSAGES = "Messages"
    RECIPIENTS = "Recipients"
    BYTES = "Bytes"


class RateLimitAction(enum.StrEnum):
    DEFER = "Defer"
    REJECT = "Reject"


class FailureAction(enum.StrEnum):
    """What becomes of mail while somebody who is asked about it does not answer."""

    ALLOW = "Allow"
    DEFER = "Defer"


class EngineType(enum.StrEnum):
    """Which protocol a spam engine speaks."""

    RSPAMD = "Rspamd"
    SPAM_ASSASSIN = "SpamAssassin"
    CLAM_AV = "ClamAV"


class QueueMode(enum.StrEnum):
    PERSISTENT = "Persistent"
    PASS_THROUGH = "PassThrough"


class UpstreamType(enum.StrEnum):
    SMARTHOST = "Smarthost"
    DIRECT_TO_MX = "DirectToMX"


class OAuthGrant(enum.StrEnum):
    """By what an upstream's access tokens are got (RFC 6749 sections 6 and 4.4, RFC 7523 section 2.1)."""

    REFRESH_TOKEN = "RefreshToken"
    CLIENT_CREDENTIALS = "ClientCredentials"
    JWT_BEARER = "JWTBearer"


OAUTH_SECRETS: Final[Mapping[OAuthGrant, str]] = {
    OAuthGrant.REFRESH_TOKEN: "refresh-token",
    OAuthGrant.CLIENT_CREDENTIALS: "client-secret",
    OAuthGrant.JWT_BEARER: "private-key",
}
"""What each kind of grant cannot do without. A client-secret goes along with a refresh token where there is one."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Immutable; an unknown field is an error, so that a typing mistake is never a silent default."""


Positive = Annotated[int, Meta(gt=0)]
Seconds = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(min_length=1, max_length=63)]


class Relay(Struct, frozen=True, kw_only=True):
    """Which resource this is. `uid` keys hashes in trace headers; it is not a secret by itself."""

    name: str
    namespace: str
    uid: str = ""


class Listener(Struct, frozen=True, kw_only=True):
    name: Name
    port: Port
    """What the process binds; 0 picks a free port (`mailsluice run --port`)."""
    mode: ListenerMode = ListenerMode.START_TLS
    authentication_required: bool = True
    """False only together with `Authentication.allowed_networks`: others must still log in."""
    allow_plaintext_authentication: bool = False
    normalize_line_endings: bool = False
    """Bare CR and bare LF become CRLF before scanning and signing, instead of 550 5.5.2."""
    proxy_trusted_networks: tuple[str, ...] = ()
    """Not empty: a PROXY header is required, from these networks only (haproxy PROXY protocol, 2.2)."""


class TLS(Struct, frozen=True, kw_only=True):
    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    client_ca: str | None = None
    """File in credentials/ with the CAs of client certificates."""


class RateLimit(Struct, frozen=True, kw_only=True):
    name: Name
    unit: RateLimitUnit
    limit: Positive
    window: Seconds
    per: RateLimitKey = RateLimitKey.USER
    burst: Positive | None = None
    """How much may come at once; None: the whole limit."""
    action: RateLimitAction = RateLimitAction.DEFER


class RateLimitStore(Struct, frozen=True, kw_only=True):
    """Where the replicas count together. Without one each process counts for itself."""

    credentials: str
    """File credentials/NAME.url: a redis:// or rediss:// URL, which may hold a password."""
    ca: str | None = None
    """File in credentials/ with CAs to trust besides the system's."""
    on_failure: FailureAction = FailureAction.ALLOW
    """While it cannot be reached: Allow, each process counts for itself; Defer, 451."""


class User(Struct, frozen=True, kw_only=True):
    """One login. `hashes` are in crypt(3) or PHC form; several while a password is being rotated."""

    login: Annotated[str, Meta(min_length=1, max_length=320)]
    hashes: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()
    """Sender patterns on top of the login's own address: `user@domain`, `*@domain`, `*@*.domain`, `<>`."""
    namespace: str | None = None
    """The SmtpUser's namespace; None for users of the relay itself."""
    rate_limits: tuple[RateLimit, ...] = ()
    suspended: bool = False


class FailureLimit(Struct, frozen=True, kw_only=True):
    limit: Positive
    window: Seconds


class Failures(Struct, frozen=True, kw_only=True):
    """Failed AUTH attempts before a refusal; successes are never counted (Mailu #634)."""

    per_connection: Positive = 3
    per_network_and_user: FailureLimit = FailureLimit(limit=10, window=600.0)
    per_network: FailureLimit = FailureLimit(limit=50, window=600.0)


class Authentication(Struct, frozen=True, kw_only=True):
    login_format: LoginFormat = LoginFormat.FULL
    users: tuple[User, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    failures: Failures = Failures()


class Senders(Struct, frozen=True, kw_only=True):
    allowed_domains: tuple[str, ...] = ()
    """A plain name matches exactly, `*.name` its subdomains. Empty: what the logins own."""
    ownership: Ownership = Ownership.ENFORCE
    default_from: str | None = None


class Recipients(Struct, frozen=True, kw_only=True):
    allowed_domains: tuple[str, ...] = ()
    redirect_to: str | None = None


class SpamRule(Struct, frozen=True, kw_only=True):
    """Settings of one rule of `suspicion.rules`; which of the optional ones a rule reads stands there.
    None: its default there.

    A score of 0 switches the rule off.
    """

    score: float
    limit: Positive | None = None
    window: Seconds | None = None
    percent: float | None = None
    minimum: Positive | None = None
    deviations: float | None = None


class Engine(Struct, frozen=True, kw_only=True):
    """A content scanner that is asked about every message."""

    name: Name
    type: EngineType
    url: str = ""
    """Of Rspamd; the others have `address`, host:port."""
    address: str = ""
    timeout: Seconds = 10.0
    on_failure: FailureAction = FailureAction.ALLOW
    """When it gives no verdict: Allow, the message goes on without it; Defer, 451."""


class Spam(Struct, frozen=True, kw_only=True):
    """Thresholds of the score; None: never. `suspect_at <= hold_at <= reject_at`."""

    suspect_at: float | None = 5.0
    hold_at: float | None = None
    reject_at: float | None = None
    rules: dict[str, SpamRule] = {}
    """By name; empty: all rules with their defaults."""
    engines: tuple[Engine, ...] = ()


class UpstreamLimits(Struct, frozen=True, kw_only=True):
    """Of this process; the operator has divided the relay's by its replicas."""

    connections: Positive = 10
    messages_per_second: float | None = None
    messages_per_day: Positive | None = None


class Upstream(Struct, frozen=True, kw_only=True):
    name: Name
    type: UpstreamType = UpstreamType.SMARTHOST
    host: str = ""
    port: Port = 587
    tls: UpstreamTLSMode = UpstreamTLSMode.START_TLS
    ca: str | None = None
    """File in credentials/ with the CAs to trust; None: the system's."""
    allow_plaintext_authentication: bool = False
    mechanisms: tuple[str, ...] = ("PLAIN", "LOGIN", "SCRAM-SHA-256", "CRAM-MD5")
    """SASL mechanisms to use, best first, where the upstream offers them and the credentials are of their kind."""
    credentials: str | None = None
    """Files credentials/NAME.username and credentials/NAME.password, or an OAuth grant: NAME.grant, NAME.user,
    NAME.client-id, NAME.token-url and what `OAUTH_SECRETS` says, with NAME.scope and others as the server wants it."""
    priority: int = 10
    """Lower is tried first (as in MX)."""
    weight: Positive = 1
    match_senders: tuple[str, ...] = ()
    match_recipients: tuple[str, ...] = ()
    limits: UpstreamLimits = UpstreamLimits()


class Retry(Struct, frozen=True, kw_only=True):
    initial: Seconds = 60.0
    maximum: Seconds = 3600.0
    factor: Annotated[float, Meta(ge=1)] = 2.0


class Queue(Struct, frozen=True, kw_only=True):
    mode: QueueMode = QueueMode.PERSISTENT
    lifetime: Seconds = 48 * 3600.0
    delay_warning: Seconds | None = 4 * 3600.0
    """After how long a `delayed` DSN goes out, where NOTIFY asks for it; None: never."""
    retry: Retry = Retry()
    maximum_bytes: Positive | None = None
    """Quota of the spool; None: what the disk has, less a reserve."""
    maximum_messages: Positive = 1_000_000


class Bounces(Struct, frozen=True, kw_only=True):
    address: str | None = None


class Dkim(Struct, frozen=True, kw_only=True):
    domain: str
    selector: str
    key: str
    """File in credentials/ with the PEM private key."""


class Limits(Struct, frozen=True, kw_only=True):
    message_size: Positive = 25 * 1024 * 1024
    recipients_per_message: Annotated[int, Meta(ge=1)] = 500
    connections: Positive = 1000
    connections_per_network: Positive = 50
    idle_timeout: Seconds = 300.0
    session_timeout: Seconds = 1800.0


class Logging(Struct, frozen=True, kw_only=True):
    level: Literal["Debug", "Info", "Warning", "Error"] = "Info"
    format: Literal["JSON", "Text"] = "JSON"
    redact_addresses: bool = False


class Monitoring(Struct, frozen=True, kw_only=True):
    user_metrics_limit: Annotated[int, Meta(ge=0)] = 500


class Configuration(Struct, frozen=True, kw_only=True):
    """Everything that a relay process is told. `revision` names this content, for metrics and status."""

    version: Literal[1] = 1
    revision: str
    credentials_revision: str
    """Must equal credentials/revision, so that two halves mounted apart are never mixed."""
    relay: Relay
    hostname: str
    listeners: Annotated[tuple[Listener, ...], Meta(min_length=1, max_length=16)]
    tls: TLS = TLS()
    authentication: Authentication = Authentication()
    senders: Senders = Senders()
    recipients: Recipients = Recipients()
    rate_limits: tuple[RateLimit, ...] = ()
    rate_limit_store: RateLimitStore | None = None
    spam: Spam = Spam()
    upstreams: Annotated[tuple[Upstream, ...], Meta(min_length=1)]
    queue: Queue = Queue()
    bounces: Bounces = Bounces()
    dkim: tuple[Dkim, ...] = ()
    limits: Limits = Limits()
    logging: Logging = Logging()
    monitoring: Monitoring = Monitoring()
    replicas: Positive = 1
    drain_from_ordinal: int | None = None
    """Pods of this ordinal and above take no new mail and deliver what they hold."""


def encode(configuration: Configuration) -> bytes:
    """The content of config.json.gz: the same configuration always gives the same octets.

    Raises ConfigurationError over MAXIMUM_ENCODED_SIZE.
    """
    packed = gzip.compress(msgspec.json.encode(configuration, order="deterministic"), compresslevel=9, mtime=0)
    if len(packed) > MAXIMUM_ENCODED_SIZE:
        raise ConfigurationError(
            f"the configuration takes {len(packed)} octets compressed, over the {MAXIMUM_ENCODED_SIZE} that a "
            "Secret can carry; spread the users over several relays"
        )
    return packed


def decode(packed: bytes) -> Configuration:
    """The configuration in the octets of config.json.gz. Raises ConfigurationError."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            text = stream.read(MAXIMUM_DECODED_SIZE + 1)
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"config.json.gz is not gzip: {error}; write it with `encode`") from error
    if len(text) > MAXIMUM_DECODED_SIZE:
        raise ConfigurationError(f"config.json.gz unpacks to more than {MAXIMUM_DECODED_SIZE} octets")
    try:
        return msgspec.json.decode(text, type=Configuration)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"config.json.gz: {error}") from error


_STORE_SCHEMES: Final = {"redis": False, "rediss": True, "valkey": False, "valkeys": True}
"""Whether the scheme means TLS."""
_STORE_URL: Final = "expected redis://HOST:6379/0, or rediss://USER:PASSWORD@HOST:6379/0 for TLS"


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a store of rate limits is, and the login there."""

    host: str
    port: int
    database: int
    is_encrypted: bool
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)


def parse_store_url(octets: bytes) -> StoreAddress:
    """The URL of a Valkey or Redis server. Raises ConfigurationError, which shows nothing of it."""
    try:
        url = urlsplit(octets.decode().strip())
        port = url.port or 6379
    except ValueError:  # its text would show the URL
        raise ConfigurationError(f"cannot be read as a URL; {_STORE_URL}") from None
    database = url.path.strip("/") or "0"
    if url.scheme not in _STORE_SCHEMES or not url.hostname or not (database.isascii() and database.isdigit()):
        raise ConfigurationError(f"is not the URL of a store; {_STORE_URL}")
    if url.query or url.fragment:
        raise ConfigurationError(f"has something after the number of the database; {_STORE_URL}")
    return StoreAddress(
        host=url.hostname,
        port=port,
        database=int(database),
        is_encrypted=_STORE_SCHEMES[url.scheme],
        username=unquote(url.username) if url.username else None,
        password=unquote(url.password) if url.password else None,
    )


def is_https(url: str) -> bool:
    """Whether credentials may be sent there."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is none
    except ValueError:
        return False
    return parts.scheme == "https" and bool(parts.hostname) and url.isascii() and url.isprintable() and " " not in url


SCRYPT_COST: Final = (14, 8, 1)
"""log2(N), r and p of `hash_password`: 16 MiB and about 45 ms of one core a hash."""
_SCRYPT_KEY_LENGTH: Final = 32
_SCRYPT_MAXIMUM_MEMORY: Final = 64 * 1024 * 1024

_B64 = r"[A-Za-z0-9+/]"
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|1[0-5])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_SHA512_CRYPT = re.compile(r"\$6\$(?:rounds=([1-9][0-9]{3,6})\$)?[./A-Za-z0-9]{0,16}\$[./A-Za-z0-9]{86}")
_ARGON2ID = re.compile(rf"\$argon2id\$v=19\$m=([0-9]{{1,7}}),t=([0-9]{{1,3}}),p=([0-9]{{1,2}})\${_B64}+\${_B64}+")
_SCRYPT = re.compile(rf"\$scrypt\$ln=([0-9]{{1,2}}),r=([0-9]{{1,3}}),p=([0-9]{{1,2}})\$({_B64}+)\$({_B64}+)")

HASH_FORMATS: Final = "bcrypt ($2y$), argon2id, scrypt ($scrypt$) or SHA-512-crypt ($6$)"


_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def login_key(login: str) -> str:
    """The form in which two spellings of one login are equal; two users with one key are an error.

    The case of ASCII letters does not count, in the local part too: the standard leaves that to the owner of the
    domain (RFC 5321 section 2.4), and no mail server that people log in to tells `Bob` from `bob`. Other characters
    are compared after NFC, because keyboards differ in how they compose an accent.
    """
    return unicodedata.normalize("NFC", login).translate(_ASCII_LOWER)


def is_supported_hash(text: str) -> bool:
    """Whether the relay can verify a password against this hash, and at a cost that a login may have.

    The bounds are there because verifying costs what the hash says: 64 MiB (scrypt) or 256 MiB (argon2id) of memory,
    cost 15 (bcrypt), 1,000,000 rounds (SHA-512-crypt).
    """
    if _BCRYPT.fullmatch(text):
        return True
    if found := _SHA512_CRYPT.fullmatch(text):
        return 1000 <= int(found[1] or 5000) <= 1_000_000
    if found := _ARGON2ID.fullmatch(text):
        memory, passes, lanes = int(found[1]), int(found[2]), int(found[3])
        return 8 * lanes <= memory <= 256 * 1024 and 1 <= passes <= 64 and 1 <= lanes <= 16
    if found := _SCRYPT.fullmatch(text):
        log_n, r, p = int(found[1]), int(found[2]), int(found[3])
        return (
            all(len(found[part]) % 4 != 1 for part in (4, 5))  # base64 without padding
            and 1 <= p <= 16
            and r >= 1
            and 1 <= log_n < 16 * r  # RFC 7914 section 2: N < 2^(128 * r / 8)
            and 128 * r * 2**log_n <= _SCRYPT_MAXIMUM_MEMORY
        )
    return False


def hash_password(password: str, salt: bytes) -> str:
    """The password in the PHC form of scrypt (RFC 7914), as passlib writes it. The same arguments give the same text.

    `salt` has at least 16 octets and is never used for two passwords.
    """
    if len(salt) < 16:
        raise ValueError("a salt has at least 16 octets")
    log_n, r, p = SCRYPT_COST
    digest = scrypt(password.encode(), salt, log_n, r, p)
    return f"$scrypt$ln={log_n},r={r},p={p}${_unpadded(salt)}${_unpadded(digest)}"


def scrypt(password: bytes, salt: bytes, log_n: int, r: int, p: int, length: int = _SCRYPT_KEY_LENGTH) -> bytes:
    """RFC 7914; OpenSSL needs somewhat more than the 128 * r * N octets to be allowed."""
    return hashlib.scrypt(password, salt=salt, n=2**log_n, r=r, p=p, maxmem=_SCRYPT_MAXIMUM_MEMORY * 2, dklen=length)


def _unpadded(octets: bytes) -> str:
    return base64.b64encode(octets).decode().rstrip("=")


def parse_htpasswd(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs of login and hash, in the order of an htpasswd file; blank lines and `#` lines are skipped.

    Raises ConfigurationError, which names the line and never shows what stands after the colon (nor a line without
    one: it may be a password).
    """
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        login, colon, hashed = line.partition(":")
        login, hashed = login.strip(), hashed.strip()
        if not colon:
            raise ConfigurationError(f"line {number}: no colon; a line is LOGIN:HASH, as `mailsluice passwd` prints it")
        if not login:
            raise ConfigurationError(f"line {number}: no login before the colon")
        if any(character.isspace() or not character.isprintable() for character in login):
            raise ConfigurationError(f"line {number}: the login has a space or a control character")
        if len(login) > 320:
            raise ConfigurationError(f"line {number}: the login is longer than 320 characters")
        if not is_supported_hash(hashed):
            raise ConfigurationError(
                f"line {number}: the hash of {login} is in no supported format; use {HASH_FORMATS}, for example from "
                "`mailsluice passwd`"
            )
        pairs.append((login, hashed))
    return tuple(pairs)
