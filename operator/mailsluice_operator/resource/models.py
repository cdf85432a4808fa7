"""The resources SmtpRelay and SmtpUser: every field, its meaning, its default and its rules.

The CustomResourceDefinitions are generated from here (`crd`); a field's docstring is what `kubectl explain` shows.
Durations and sizes are kept as written; `quantities` turns them into seconds and octets.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from mailsluice_operator.resource.pod import (
    LabelSelector,
    NetworkPolicyPeer,
    PodTemplate,
    ResourceRequirements,
)
from mailsluice_operator.resource.presets import PRESETS
from mailsluice_operator.resource.schema import (
    ATOMIC,
    HAS_NO_HOST_BITS,
    IS_NETWORK,
    LOGIN_PATTERN,
    OPTIONAL_ADDRESS_PATTERN,
    SET,
    Address,
    Annotations,
    DomainPattern,
    Domains,
    Duration,
    Hostname,
    ItemName,
    Labels,
    NamespaceName,
    Network,
    Networks,
    ObjectName,
    Port,
    Positive,
    Quantity,
    Rule,
    Score,
    SecretKey,
    SenderPattern,
    Senders,
    Size,
    Struct,
    TolerantStruct,
    list_map,
    rules,
    well_formed,
)
from mailsluice_operator.resource.status import ObjectMeta, SmtpRelayStatus, SmtpUserStatus
from mailsluice_relay.config import (
    ListenerMode,
    LoginFormat,
    Ownership,
    QueueMode,
    RateLimitAction,
    RateLimitKey,
    RateLimitUnit,
    UpstreamTLSMode,
    UpstreamType,
)

GROUP: Final = "mailsluice.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

# --- References -------------------------------------------------------------------------------------------------------


class SecretReference(Struct, frozen=True, kw_only=True):
    """A Secret of the relay's namespace, with the keys that its use prescribes."""

    name: ObjectName
    """Name of the Secret."""


class SecretKeyReference(Struct, frozen=True, kw_only=True):
    """One key of a Secret of the relay's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: SecretKey | None = None
    """Key in it. Default: the customary one, ca.crt for authorities, tls.key for private keys, url for addresses."""


class IssuerReference(Struct, frozen=True, kw_only=True):
    """A cert-manager issuer."""

    name: ObjectName
    """Name of the issuer."""
    kind: Annotated[str, Meta(min_length=1, max_length=63)] = "Issuer"
    """Kind of the issuer: Issuer (of the relay's namespace), ClusterIssuer or an external issuer's kind."""
    group: Annotated[str, Meta(min_length=1, max_length=253)] = "cert-manager.io"
    """API group of the issuer."""


class AllowedNamespaces(Struct, frozen=True, kw_only=True):
    """Namespaces that a grant is for."""

    from_: Literal["Same", "All", "Selector"] = "Same"
    """Same: the relay's namespace. All: every namespace. Selector: those whose labels match `selector`."""
    selector: LabelSelector | None = None
    """Labels of the namespaces; with from: Selector. Example: {matchLabels: {mail: tenant-a}}."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(self.from == 'Selector') == has(self.selector)",
            "selector belongs to from: Selector and to that alone; set both or neither",
            field_path=".selector",
        ),
    )


# --- Listeners and TLS ------------------------------------------------------------------------------------------------


class ProxyProtocol(Struct, frozen=True, kw_only=True):
    """The PROXY protocol, by which a load balancer tells the client's address."""

    trusted_networks: Annotated[Networks, Meta(min_length=1)]
    """Networks of the load balancers, in CIDR notation. A PROXY header is required from these, and nobody else may
    connect. Example: [10.1.2.16/28]."""


ListenerName = Annotated[str, Meta(min_length=1, max_length=15, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]


class Listener(Struct, frozen=True, kw_only=True):
    """A port that clients connect to."""

    name: ListenerName
    """Name of the listener, the Service's port and the metric label: at most 15 lower-case letters, digits, hyphens."""
    port: Port
    """Port of the Service. Pods bind ports below 1024 plus 2000 (25 as 2025), others as they are. Example: 587."""
    mode: ListenerMode = ListenerMode.START_TLS
    """Plain: no TLS. StartTLS: TLS after the STARTTLS command (RFC 3207), which AUTH needs. ImplicitTLS: TLS from the
    first octet (RFC 8314)."""
    authentication: Literal["Required", "Optional"] = "Required"
    """Required: every client logs in. Optional: clients of `authentication.allowedNetworks` need not."""
    allow_plaintext_authentication: bool = False
    """Offer AUTH without TLS. Passwords can then be read on the way."""
    normalize_line_endings: bool = False
    """Turn bare CR and bare LF into CRLF instead of refusing the message. For old applications only."""
    proxy_protocol: ProxyProtocol | None = None
    """Expect the PROXY protocol of a load balancer on this port."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.mode != 'Plain' || self.authentication != 'Required' || self.allowPlaintextAuthentication",
            "nobody could log in: authentication is Required, but AUTH is not offered without TLS; use mode "
            "StartTLS or ImplicitTLS, or set allowPlaintextAuthentication: true on this listener",
            field_path=".mode",
        ),
        Rule(
            "!(self.name in ['http', 'metrics'])",
            "the names http and metrics are the relay's own; choose another name",
            field_path=".name",
        ),
    )


DEFAULT_LISTENERS: Final = (
    Listener(name="smtp", port=25, mode=ListenerMode.START_TLS),
    Listener(name="submissions", port=465, mode=ListenerMode.IMPLICIT_TLS),
    Listener(name="submission", port=587, mode=ListenerMode.START_TLS),
)

HTTP_PORT: Final = 9090
"""Port of /metrics, /healthz and /readyz in a pod; no listener may bind it."""

PRIVILEGED_PORT_OFFSET: Final = 2000


def bound_port(port: int) -> int:
    """What a pod binds for a Service port: pods run without the right to bind ports below 1024."""
    return port + PRIVILEGED_PORT_OFFSET if port < 1024 else port


_BOUND = "({0} < 1024 ? {0} + 2000 : {0})"
Listeners = Annotated[
    tuple[Listener, ...],
    Meta(min_length=1, max_length=16),
    list_map("name"),
    rules(
        Rule(
            "self.all(one, self.exists_one(other, other.port == one.port))",
            "ports must be unique; give each listener a port of its own",
        ),
        Rule(
            f"self.all(one, self.exists_one(other, {_BOUND.format('other.port')} == {_BOUND.format('one.port')}))",
            "pods bind ports below 1024 plus 2000 (25 as 2025), and two listeners would bind the same; change one",
        ),
        Rule(
            f"self.all(one, one.port != {HTTP_PORT})",
            f"port {HTTP_PORT} is the relay's own, for /metrics and /readyz; choose another port",
        ),
    ),
]


class ListenerTLS(Struct, frozen=True, kw_only=True):
    """The certificate that clients see, and what the relay asks of them. Without secretRef and issuerRef the operator
    makes the certificate with an authority of its own and publishes ca.crt."""

    secret_ref: SecretReference | None = None
    """A Secret with tls.crt and tls.key (kubernetes.io/tls); changes are taken up without a restart."""
    issuer_ref: IssuerReference | None = None
    """The cert-manager issuer to get a certificate from."""
    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    """Oldest TLS version that clients may use."""
    client_ca_secret_ref: SecretKeyReference | None = msgspec.field(default=None, name="clientCASecretRef")
    """Authorities of client certificates; key ca.crt if not given. Clients may then present one."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule("!(has(self.secretRef) && has(self.issuerRef))", "set secretRef or issuerRef, not both; remove one"),
    )


# --- Authentication ---------------------------------------------------------------------------------------------------


class UserSource(Struct, frozen=True, kw_only=True):
    """A Secret with logins."""

    secret_ref: SecretKeyReference
    """A Secret with the key htpasswd (`login:hash` lines, as `mailsluice passwd` writes them), or of type
    kubernetes.io/basic-auth with username and password. `key` names another key than htpasswd."""
    senders: Senders = ()
    """What its logins may send as, on top of their own address: user@domain, *@domain, *@*.domain, <> for bounces."""


LoginTemplate = Annotated[str, Meta(min_length=1, max_length=320, pattern=r"^[^\s]+$")]
LoginTemplates = Annotated[tuple[LoginTemplate, ...], Meta(max_length=64), SET]


class SmtpUserGrant(Struct, frozen=True, kw_only=True):
    """Which namespaces may create SmtpUsers for this relay, and what these may claim."""

    allowed_namespaces: AllowedNamespaces = AllowedNamespaces()
    """Namespaces whose SmtpUsers are accepted. Default: the relay's own."""
    logins: Annotated[LoginTemplates, Meta(min_length=1)]
    """Logins that may be claimed; * stands for any text, {namespace} for the SmtpUser's namespace.
    Example: ["*@{namespace}.example.test"]."""
    senders: LoginTemplates = ()
    """Senders that may be claimed on top of the login. Example: ["*@{namespace}.example.test"]."""


class ServiceAccountTokens(Struct, frozen=True, kw_only=True):
    """Login of pods with their ServiceAccount token as the password. Needs a cluster-wide operator."""

    audience: Annotated[str, Meta(min_length=1, max_length=253)] = "mailsluice"
    """Audience that the token must be for."""
    allowed_namespaces: AllowedNamespaces = AllowedNamespaces()
    """Namespaces whose ServiceAccounts may log in. Default: the relay's own."""
    login: LoginTemplate
    """The login that a ServiceAccount gets; {serviceAccount} and {namespace} stand for its own.
    Example: "{serviceAccount}@{namespace}.example.test"."""
    senders: LoginTemplates = ()
    """What it may send as, on top of the login."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.login.contains('{serviceAccount}') && "
            "(self.login.contains('{namespace}') || self.allowedNamespaces.from == 'Same')",
            "login must hold {serviceAccount}, and {namespace} when other namespaces are allowed; otherwise two "
            "ServiceAccounts share one login",
            field_path=".login",
        ),
    )


class ClientCertificates(Struct, frozen=True, kw_only=True):
    """Login with a TLS client certificate (SASL EXTERNAL)."""

    login_from: Literal["EmailSAN", "CommonName"] = "EmailSAN"
    """Which part of the certificate is the login."""


class FailureLimit(Struct, frozen=True, kw_only=True):
    """Failed logins in a window of time."""

    limit: Positive
    """Failures that are allowed."""
    window: Duration
    """In which time. Example: 10m."""


class Failures(Struct, frozen=True, kw_only=True):
    """When failed logins are answered with a refusal. Successes are never counted."""

    per_connection: Annotated[int, Meta(ge=1, le=100)] = 3
    """Failures after which the connection is closed."""
    per_network_and_user: FailureLimit = FailureLimit(limit=10, window="10m")
    """Failures of one login from one network (/24, or /64 of IPv6). Default 10 in 10m."""
    per_network: FailureLimit = FailureLimit(limit=50, window="10m")
    """Failures from one network, of any login. Default 50 in 10m."""


class Authentication(Struct, frozen=True, kw_only=True):
    """Who may send."""

    login_format: LoginFormat = LoginFormat.FULL
    """Full: the login is the full e-mail address, and a short one gets a clear answer. Short: the account name.
    Either: both."""
    users: Annotated[
        tuple[UserSource, ...],
        Meta(max_length=64),
        ATOMIC,
        rules(
            Rule(
                "self.all(one, self.exists_one(other, other.secretRef.name == one.secretRef.name))",
                "each Secret may be named once; remove the repetition",
            )
        ),
    ] = ()
    """Secrets with the relay's own logins."""
    smtp_users: SmtpUserGrant | None = None
    """Let other namespaces create logins for themselves with SmtpUser. Left out: nobody may."""
    service_account_tokens: ServiceAccountTokens | None = None
    """Let pods log in with their ServiceAccount token."""
    client_certificates: ClientCertificates | None = None
    """Let clients log in with a certificate; needs tls.clientCASecretRef."""
    allowed_networks: Annotated[
        tuple[Network, ...],
        Meta(max_length=64),
        SET,
        rules(
            IS_NETWORK,
            HAS_NO_HOST_BITS,
            Rule(
                "self.all(network, !isCIDR(network) || "
                "cidr(network).prefixLength() >= (cidr(network).ip().family() == 4 ? 8 : 32))",
                "networks must be no wider than /8 (IPv6: /32): this would be an open relay; name the networks of your "
                "applications",
            ),
        ),
    ] = ()
    """Networks in CIDR notation that need not log in on listeners with authentication: Optional. Mind that Kubernetes
    may hide client addresses behind a node's (see service.externalTrafficPolicy). Example: [10.20.0.0/16]."""
    suspended_logins: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=320)], ...], Meta(max_length=256), SET
    ] = ()
    """Logins whose mail is put off (450) until they are taken off this list; of any source."""
    failures: Failures = Failures()
    """When failed logins are answered with a refusal."""


# --- Senders, recipients, limits --------------------------------------------------------------------------------------


class SenderPolicy(Struct, frozen=True, kw_only=True):
    """As whom may be sent."""

    allowed_domains: Domains = ()
    """Domains that any sender must belong to. A plain name matches exactly, *.name its subdomains. Empty: what the
    logins own."""
    ownership: Ownership = Ownership.ENFORCE
    """Enforce: a login sends as itself and as its senders, in the envelope and in From. Log: others are accepted and
    logged. Off: any sender of allowedDomains."""
    default_from: Address | None = None
    """Sender that replaces root@localhost and other addresses without a real domain; the original goes to Reply-To."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.ownership != 'Off' || (has(self.allowedDomains) && size(self.allowedDomains) > 0)",
            "ownership: Off needs allowedDomains, so that not every sender can be forged; list your domains",
            field_path=".allowedDomains",
            reason="FieldValueRequired",
        ),
    )


class RecipientPolicy(Struct, frozen=True, kw_only=True):
    """To whom may be sent."""

    allowed_domains: Domains = ()
    """Domains that may be sent to. A plain name matches exactly, *.name its subdomains. Empty: any."""
    redirect_to: Annotated[str, Meta(max_length=320, pattern=OPTIONAL_ADDRESS_PATTERN)] | None = None
    """Send everything to this one address instead, for staging. Empty: no."""


_COUNT_RULE = Rule(
    "self.unit == 'Bytes' || (type(self.limit) == int && (!has(self.burst) || type(self.burst) == int))",
    "limit and burst must be whole numbers unless unit is Bytes; sizes such as 2G count octets",
    field_path=".limit",
)


class RateLimit(Struct, frozen=True, kw_only=True):
    """How much may be sent in a window of time. A message counts against all limits or none, after its data."""

    name: ItemName
    """Name of the limit, in replies and metrics."""
    per: RateLimitKey = RateLimitKey.USER
    """For what is counted: User (login), Namespace (of an SmtpUser or ServiceAccount), SourceNetwork (/24, or /64 of
    IPv6), SenderDomain, or Relay (everything)."""
    unit: RateLimitUnit = RateLimitUnit.MESSAGES
    """What is counted: Messages, Recipients or Bytes."""
    limit: Size
    """How much in one window: a number, or for Bytes a size. Examples: 60, 2G, 500Mi."""
    window: Duration
    """In which time. Examples: 1m, 1h, 24h."""
    burst: Size | None = None
    """How much may come at once. Default: the whole limit."""
    action: RateLimitAction = RateLimitAction.DEFER
    """Defer: 450, the client tries again. Reject: 550."""

    RULES: ClassVar[tuple[Rule, ...]] = (_COUNT_RULE,)


class RateLimitStore(Struct, frozen=True, kw_only=True):
    """A store that all replicas count in. Without it rateLimits hold for each replica."""

    url_secret_ref: SecretKeyReference
    """Secret with the store's address; key url if not given. Example of the value: redis://valkey.mail.svc:6379/0;
    with TLS and a login rediss://user:password@valkey.mail.svc:6379/0."""
    ca_secret_ref: SecretKeyReference | None = None
    """Authorities to trust besides the public ones, for a rediss:// address; key ca.crt if not given."""
    on_failure: Literal["Allow", "Defer"] = "Allow"
    """While the store cannot be reached. Allow: each replica counts for itself. Defer: 451."""


# --- Suspicion --------------------------------------------------------------------------------------------------------


class ForgedHeaderFrom(Struct, frozen=True, kw_only=True):
    """From: names somebody other than the login, though ownership lets it pass."""

    score: Score = 6.0
    """Added to the message's score. 0: the rule is off."""


class RecipientBurst(Struct, frozen=True, kw_only=True):
    """One login suddenly writes to very many."""

    score: Score = 4.0
    """Added to the message's score. 0: the rule is off."""
    limit: Positive = 200
    """Recipients of one login that are usual."""
    window: Duration = "1m"
    """In which time."""


class UnknownRecipients(Struct, frozen=True, kw_only=True):
    """Many of a login's recipients do not exist, as with bought address lists."""

    score: Score = 8.0
    """Added to the message's score. 0: the rule is off."""
    percent: Annotated[float, Meta(ge=0, le=100)] = 30.0
    """Share of refused recipients from which it counts."""
    minimum: Positive = 20
    """Recipients that there must have been."""
    window: Duration = "1h"
    """In which time."""


class NewNetworks(Struct, frozen=True, kw_only=True):
    """One login is used from many networks, as stolen ones are."""

    score: Score = 3.0
    """Added to the message's score. 0: the rule is off."""
    limit: Positive = 5
    """Networks that are usual."""
    window: Duration = "1h"
    """In which time."""


class VolumeAnomaly(Struct, frozen=True, kw_only=True):
    """A login sends far more than it used to."""

    score: Score = 4.0
    """Added to the message's score. 0: the rule is off."""
    deviations: Annotated[float, Meta(ge=1, le=100)] = 6.0
    """Standard deviations above its own average from which it counts."""


class SameBodyFanOut(Struct, frozen=True, kw_only=True):
    """The same text goes out in many messages."""

    score: Score = 4.0
    """Added to the message's score. 0: the rule is off."""
    limit: Positive = 50
    """Messages with one text that are usual."""
    window: Duration = "10m"
    """In which time."""


class LinkShortener(Struct, frozen=True, kw_only=True):
    """The text holds a link of a link shortener."""

    score: Score = 2.0
    """Added to the message's score. 0: the rule is off."""


class ExecutableAttachment(Struct, frozen=True, kw_only=True):
    """A program is attached."""

    score: Score = 8.0
    """Added to the message's score. 0: the rule is off."""


class SpamRules(Struct, frozen=True, kw_only=True):
    """The rules and their scores. A rule that is left out runs with its defaults; score: 0 switches it off."""

    forged_header_from: ForgedHeaderFrom | None = None
    """From: names somebody other than the login, though ownership lets it pass."""
    recipient_burst: RecipientBurst | None = None
    """One login suddenly writes to very many."""
    unknown_recipients: UnknownRecipients | None = None
    """Many of a login's recipients do not exist."""
    new_networks: NewNetworks | None = None
    """One login is used from many networks."""
    volume_anomaly: VolumeAnomaly | None = None
    """A login sends far more than it used to."""
    same_body_fan_out: SameBodyFanOut | None = None
    """The same text goes out in many messages."""
    link_shortener: LinkShortener | None = None
    """The text holds a link of a link shortener."""
    executable_attachment: ExecutableAttachment | None = None
    """A program is attached."""


SpamRule = (
    ForgedHeaderFrom
    | RecipientBurst
    | UnknownRecipients
    | NewNetworks
    | VolumeAnomaly
    | SameBodyFanOut
    | LinkShortener
    | ExecutableAttachment
)
DEFAULT_SPAM_RULES: Final[dict[str, SpamRule]] = {
    "forged_header_from": ForgedHeaderFrom(),
    "recipient_burst": RecipientBurst(),
    "unknown_recipients": UnknownRecipients(),
    "new_networks": NewNetworks(),
    "volume_anomaly": VolumeAnomaly(),
    "same_body_fan_out": SameBodyFanOut(),
    "link_shortener": LinkShortener(),
    "executable_attachment": ExecutableAttachment(),
}
"""What a rule that is left out runs with, by its attribute in SpamRules."""

EngineAddress = Annotated[str, Meta(min_length=3, max_length=320, pattern=r"^[^\s/@]+:[0-9]{1,5}$")]


class Engine(Struct, frozen=True, kw_only=True):
    """A content scanner that is asked about every message."""

    name: ItemName
    """Name of the engine, in metrics."""
    type: Literal["Rspamd", "SpamAssassin", "ClamAV"]
    """Which protocol it speaks."""
    url: Annotated[str, Meta(min_length=8, max_length=1024, pattern=r"^https?://[^\s]+$")] | None = None
    """Where Rspamd is. Example: http://rspamd.mail.svc:11333."""
    address: EngineAddress | None = None
    """host:port of SpamAssassin's spamd or of ClamAV's clamd. Example: clamd.mail.svc:3310."""
    timeout: Duration = "10s"
    """How long to wait for its answer."""
    on_failure: Literal["Allow", "Defer"] = "Allow"
    """When it does not answer. Allow: the message goes on without it. Defer: 451."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type == 'Rspamd' ? has(self.url) && !has(self.address) : has(self.address) && !has(self.url)",
            "type Rspamd takes url, the others address; set that one alone",
        ),
    )


class Spam(Struct, frozen=True, kw_only=True):
    """When mail is suspected, and what then. By default it is counted and marked, and goes out."""

    suspect_at: Score | None = 5.0
    """Score from which a message counts as suspected and is marked with X-Mailsluice-Suspicion."""
    hold_at: Score | None = None
    """Score from which a message is accepted but held in the queue, for a person to release. Left out: never."""
    reject_at: Score | None = None
    """Score from which a message is refused (550). Left out: never."""
    rules: SpamRules = SpamRules()
    """The rules and their scores."""
    engines: Annotated[tuple[Engine, ...], Meta(max_length=8), list_map("name")] = ()
    """Content scanners that are asked about every message."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.holdAt) || !has(self.suspectAt) || self.suspectAt <= self.holdAt",
            "holdAt must not be below suspectAt; raise it",
            field_path=".holdAt",
        ),
        Rule(
            "!has(self.rejectAt) || !has(self.holdAt) || self.holdAt <= self.rejectAt",
            "rejectAt must not be below holdAt; raise it",
            field_path=".rejectAt",
        ),
        Rule(
            "!has(self.rejectAt) || !has(self.suspectAt) || self.suspectAt <= self.rejectAt",
            "rejectAt must not be below suspectAt; raise it",
            field_path=".rejectAt",
        ),
    )


# --- Upstreams --------------------------------------------------------------------------------------------------------


class UpstreamTLS(Struct, frozen=True, kw_only=True):
    """TLS towards an upstream."""

    mode: UpstreamTLSMode | None = None
    """StartTLS: TLS after STARTTLS, with a verified certificate, or no mail. ImplicitTLS: the same from the first
    octet. Opportunistic: TLS if offered, unverified. Plain: none. Default: the preset's, with DirectToMX Opportunistic,
    else StartTLS."""
    ca_secret_ref: SecretKeyReference | None = None
    """Authorities to trust; key ca.crt if not given. Default: the public ones."""


class Match(Struct, frozen=True, kw_only=True):
    """Which mail an upstream is for."""

    senders: Senders = ()
    """Patterns of the envelope sender: user@domain, *@domain, *@*.domain."""
    recipients: Annotated[tuple[SenderPattern, ...], Meta(max_length=256), SET] = ()
    """Patterns of the recipient."""


class UpstreamLimits(Struct, frozen=True, kw_only=True):
    """What the upstream takes, from the whole relay; it is divided by the replicas."""

    connections: Annotated[int, Meta(ge=1, le=1000)] = 10
    """Connections at a time."""
    messages_per_second: Annotated[float, Meta(ge=0.001, le=100000)] | None = None
    """Messages a second. Left out: as fast as it takes them."""
    messages_per_day: Positive | None = None
    """Messages in 24 hours. Left out: no limit."""


Preset = Annotated[str, Meta(extra_json_schema={"enum": list(PRESETS)})]
_WITH_REGION = [name for name, preset in PRESETS.items() if preset.takes_region]
_NEED_REGION = [name for name, preset in PRESETS.items() if preset.needs_region]
_REGIONS = {name: sorted(preset.regions) for name, preset in PRESETS.items() if preset.regions}


class Upstream(Struct, frozen=True, kw_only=True):
    """A server that takes the mail: set preset, or host, or type: DirectToMX."""

    name: ItemName
    """Name of the upstream, in metrics."""
    type: UpstreamType = UpstreamType.SMARTHOST
    """Smarthost: one server takes everything. DirectToMX: the mail servers of each recipient's domain."""
    preset: Preset | None = None
    """A provider; host, port, TLS mode and AUTH mechanisms follow from it."""
    region: Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] | None = None
    """Region of the provider. Example: eu-west-1."""
    host: Hostname | None = None
    """Host name or address of the server. Example: smtp.example.test."""
    port: Port | None = None
    """Port of the server. Default: the preset's, else 587, or 465 with ImplicitTLS."""
    tls: UpstreamTLS = UpstreamTLS()
    """TLS towards the server."""
    credentials_secret_ref: SecretReference | None = None
    """Secret with username and password, or with an OAuth grant. Left out: no login."""
    allow_plaintext_authentication: bool = False
    """Log in without verified TLS. The password can then be read on the way."""
    priority: Annotated[int, Meta(ge=0, le=65535)] = 10
    """Of the upstreams that match, the lowest number is tried first, as with MX records."""
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Share of the mail among upstreams of one priority."""
    match: Match | None = None
    """Which mail it is for. Left out: what no other upstream matches."""
    limits: UpstreamLimits = UpstreamLimits()
    """What the server takes, from the whole relay."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(has(self.preset) ? 1 : 0) + (has(self.host) ? 1 : 0) + (self.type == 'DirectToMX' ? 1 : 0) == 1",
            "set exactly one of preset, host and type: DirectToMX",
        ),
        Rule(
            f"!has(self.preset) || !(self.preset in {_NEED_REGION}) || has(self.region)",
            f"the presets {', '.join(_NEED_REGION)} need region, such as eu-west-1",
            field_path=".region",
            reason="FieldValueRequired",
        ),
        Rule(
            f"!has(self.region) || (has(self.preset) && self.preset in {_WITH_REGION})",
            f"region goes with the presets {', '.join(_WITH_REGION)} alone; remove it",
            field_path=".region",
            reason="FieldValueForbidden",
        ),
        *(
            Rule(
                f"!has(self.region) || !has(self.preset) || self.preset != '{name}' || self.region in {regions}",
                f"the preset {name} has the regions {', '.join(regions)}; choose one, or remove region for the usual",
                field_path=".region",
            )
            for name, regions in _REGIONS.items()
        ),
        Rule(
            "!has(self.preset) || has(self.credentialsSecretRef)",
            "a preset needs credentialsSecretRef: these providers take no mail without login",
            field_path=".credentialsSecretRef",
            reason="FieldValueRequired",
        ),
        Rule(
            "self.type != 'DirectToMX' || "
            "!(has(self.credentialsSecretRef) || has(self.port) || has(self.tls.caSecretRef))",
            "type: DirectToMX takes no credentialsSecretRef, port or tls.caSecretRef: the servers are other people's; "
            "remove them",
            reason="FieldValueForbidden",
        ),
        Rule(
            "!has(self.credentialsSecretRef) || self.allowPlaintextAuthentication || !has(self.tls.mode) || "
            "self.tls.mode in ['StartTLS', 'ImplicitTLS']",
            "credentials would be sent in clear text: use mode StartTLS or ImplicitTLS, or set "
            "allowPlaintextAuthentication: true on this upstream",
            field_path=".tls.mode",
        ),
    )


# --- Queue, bounces, signatures ---------------------------------------------------------------------------------------


class Storage(Struct, frozen=True, kw_only=True):
    """The volume of each replica's queue."""

    size: Quantity = "1Gi"
    """Size of each volume. A full one is answered with 452."""
    class_name: ObjectName | None = None
    """StorageClass. Default: the cluster's default class."""


class Retry(Struct, frozen=True, kw_only=True):
    """When delivery is tried again."""

    initial: Duration = "1m"
    """Before the first retry."""
    maximum: Duration = "1h"
    """The longest between two tries."""
    factor: Annotated[float, Meta(ge=1, le=10)] = 2.0
    """By how much the time grows from one try to the next."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!({well_formed('self.initial', 'self.maximum')}) || duration(self.initial) <= duration(self.maximum)",
            "maximum must not be shorter than initial; raise it",
            field_path=".maximum",
        ),
    )


class OnDelete(Struct, frozen=True, kw_only=True):
    """What becomes of queued mail when the resource is deleted."""

    drain_for: Duration = "10m"
    """How long to deliver what is queued. What is left then keeps the resource from going, until it is delivered or the
    annotation mailsluice.dev/discard-queue: "true" gives it up."""


class Queue(Struct, frozen=True, kw_only=True):
    """Where accepted mail waits."""

    mode: QueueMode = QueueMode.PERSISTENT
    """Persistent: on a volume of each replica; accepted mail survives everything but the volume's loss. PassThrough: no
    queue, the client gets the upstream's answer."""
    storage: Storage | None = None
    """The volume of each replica; with mode Persistent. Default: 1Gi of the default class."""
    lifetime: Duration = "48h"
    """How long delivery is tried before the sender gets a bounce."""
    delay_warning: Duration | None = "4h"
    """After how long a sender who asked for it is told of the delay (RFC 3461 NOTIFY=DELAY)."""
    retry: Retry = Retry()
    """When delivery is tried again."""
    on_delete: OnDelete = OnDelete()
    """What becomes of queued mail when the resource is deleted."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.mode != 'PassThrough' || !has(self.storage)",
            "mode: PassThrough keeps nothing and takes no storage; remove it",
            field_path=".storage",
            reason="FieldValueForbidden",
        ),
    )


class Bounces(Struct, frozen=True, kw_only=True):
    """Bounces that the relay writes."""

    address: Address | None = None
    """Envelope sender of bounces where the provider refuses <>, and receiver of what nobody else gets."""


class Dkim(Struct, frozen=True, kw_only=True):
    """A DKIM signature (RFC 6376) for mail of one domain."""

    domain: Annotated[DomainPattern, rules(Rule("!self.startsWith('*')", "must be one domain, without *"))]
    """Domain of the From header, and of the signature."""
    selector: Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-_A-Za-z0-9]*[A-Za-z0-9])?$")]
    """Selector; the public key is at SELECTOR._domainkey.DOMAIN."""
    private_key_secret_ref: SecretKeyReference
    """Secret with the private key in PEM form; key tls.key if not given."""


# --- Everything else of a relay ---------------------------------------------------------------------------------------


class Limits(Struct, frozen=True, kw_only=True):
    """What one pod takes on."""

    message_size: Size = "25Mi"
    """Largest message, in octets (RFC 1870)."""
    recipients_per_message: Annotated[int, Meta(ge=1, le=50000)] = 500
    """Recipients of one message; the rest get 452."""
    connections: Annotated[int, Meta(ge=1, le=100000)] = 1000
    """Connections of a pod; further ones get 421."""
    connections_per_network: Annotated[int, Meta(ge=1, le=100000)] = 50
    """Connections from one network (/24, or /64 of IPv6)."""
    idle_timeout: Duration = "5m"
    """How long a client may be silent (RFC 5321, 4.5.3.2)."""
    session_timeout: Duration = "30m"
    """How long a session may last."""


class Service(Struct, frozen=True, kw_only=True):
    """The Service in front of the pods."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """How it is reached."""
    annotations: Annotations = msgspec.field(default_factory=dict)
    """Annotations, for load balancers and DNS controllers."""
    labels: Labels = msgspec.field(default_factory=dict)
    """Labels."""
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    """Local keeps the client's address; Cluster hides it behind a node's. Default Local."""
    load_balancer_source_ranges: Networks = ()
    """Networks that the load balancer lets through; with type LoadBalancer."""
    load_balancer_class: Annotated[str, Meta(min_length=1, max_length=317)] | None = None
    """Class of the load balancer; with type LoadBalancer."""
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    """IPv4, IPv6 or both. Default: the cluster's."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type == 'LoadBalancer' || !(has(self.loadBalancerSourceRanges) || has(self.loadBalancerClass))",
            "loadBalancerSourceRanges and loadBalancerClass go with type: LoadBalancer; remove them",
        ),
        Rule(
            "self.type != 'ClusterIP' || !has(self.externalTrafficPolicy)",
            "externalTrafficPolicy goes with type: NodePort or LoadBalancer; remove it",
            field_path=".externalTrafficPolicy",
        ),
    )


class NetworkPolicy(Struct, frozen=True, kw_only=True):
    """A NetworkPolicy for the pods: who may connect to the listeners."""

    enabled: bool = False
    """Whether to make one."""
    from_: Annotated[tuple[NetworkPolicyPeer, ...], Meta(max_length=32), ATOMIC] = ()
    """Who may connect to the listeners. Empty: everybody."""


class DisruptionBudget(Struct, frozen=True, kw_only=True):
    """A PodDisruptionBudget for the pods."""

    max_unavailable: Annotated[int, Meta(ge=0)] | Annotated[str, Meta(max_length=4, pattern=r"^[0-9]{1,3}%$")] = 1
    """Pods that may be evicted at a time: a number or a percentage."""


class Autoscaling(Struct, frozen=True, kw_only=True):
    """Replicas by load, with a HorizontalPodAutoscaler on this resource; instead of `replicas`."""

    min_replicas: Annotated[int, Meta(ge=1, le=100)] = 1
    """Fewest pods."""
    max_replicas: Annotated[int, Meta(ge=1, le=100)]
    """Most pods."""
    queued_messages_per_replica: Positive | None = None
    """Queued messages that one pod should have; needs a metrics adapter."""
    cpu_utilization: Annotated[int, Meta(ge=1, le=100)] | None = None
    """Percent of the CPU request that pods should use."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "maxReplicas must not be below minReplicas; raise it",
            field_path=".maxReplicas",
        ),
        Rule(
            "has(self.queuedMessagesPerReplica) || has(self.cpuUtilization)",
            "set queuedMessagesPerReplica or cpuUtilization, or both: there is nothing to scale by",
        ),
    )


class Monitoring(Struct, frozen=True, kw_only=True):
    """What Prometheus is told. Every pod serves /metrics on port 9090 in any case."""

    pod_monitor: bool = False
    """Make a PodMonitor; needs the Prometheus operator."""
    rules: bool = False
    """Make a PrometheusRule with alerts; needs the Prometheus operator."""
    labels: Labels = msgspec.field(default_factory=dict)
    """Labels of both, by which Prometheus selects them. Example: {release: prometheus}."""
    user_metrics_limit: Annotated[int, Meta(ge=0, le=10000)] = 500
    """Logins that get metrics of their own; the rest count under user="other"."""


class Logging(Struct, frozen=True, kw_only=True):
    """The relay's log."""

    level: Literal["Debug", "Info", "Warning", "Error"] = "Info"
    """Least severity that is logged."""
    format: Literal["JSON", "Text"] = "JSON"
    """Form of the lines."""
    redact_addresses: bool = False
    """Log addresses without their local part."""


class SmtpRelaySpec(Struct, frozen=True, kw_only=True):
    """What is wanted."""

    hostname: Hostname | None = None
    """Name of the relay in its greeting, in EHLO towards upstreams and in certificates. Default: the Service's name.
    Example: mail.example.test."""
    paused: bool = False
    """Leave everything as it is: the operator changes nothing. Deletion is not held up."""
    image: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\s]+$")] | None = None
    """Image of the relay, from the operator's allow list. Default: the operator's."""
    replicas: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Number of pods; not together with autoscaling. Default 1. 0: the queue is delivered, then there are no pods."""
    autoscaling: Autoscaling | None = None
    """Number of pods by load, instead of replicas."""
    listeners: Listeners = DEFAULT_LISTENERS
    """Ports that clients connect to. Default: smtp (25, StartTLS), submissions (465, ImplicitTLS), submission (587,
    StartTLS)."""
    tls: ListenerTLS = ListenerTLS()
    """The certificate that clients see, and what the relay asks of them."""
    authentication: Authentication = Authentication()
    """Who may send."""
    senders: SenderPolicy = SenderPolicy()
    """As whom may be sent."""
    recipients: RecipientPolicy = RecipientPolicy()
    """To whom may be sent."""
    rate_limits: Annotated[tuple[RateLimit, ...], Meta(max_length=32), list_map("name")] = ()
    """How much may be sent."""
    rate_limit_store: RateLimitStore | None = None
    """A store that all replicas count in."""
    spam: Spam = Spam()
    """When mail is suspected, and what then."""
    upstreams: Annotated[tuple[Upstream, ...], Meta(min_length=1, max_length=32), list_map("name")]
    """Servers that take the mail; at least one."""
    queue: Queue = Queue()
    """Where accepted mail waits."""
    bounces: Bounces = Bounces()
    """Bounces that the relay writes."""
    dkim: Annotated[tuple[Dkim, ...], Meta(max_length=64), list_map("domain", "selector")] = ()
    """DKIM signatures."""
    limits: Limits = Limits()
    """What one pod takes on."""
    service: Service = Service()
    """The Service in front of the pods."""
    network_policy: NetworkPolicy | None = None
    """Who may connect to the pods."""
    disruption_budget: DisruptionBudget | None = None
    """How many pods may be evicted at a time."""
    monitoring: Monitoring = Monitoring()
    """What Prometheus is told."""
    logging: Logging = Logging()
    """The relay's log."""
    resources: ResourceRequirements | None = None
    """CPU and memory of each pod. Example: {requests: {cpu: 100m, memory: 96Mi}, limits: {memory: 256Mi}}."""
    pod_template: PodTemplate | None = None
    """What is added to the pods; a closed subset of core/v1's PodTemplateSpec."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        # An autoscaler writes `replicas` by the scale subresource, so both may stand in a stored object: the rule asks
        # whether autoscaling was already on before this write.
        Rule(
            "!(has(self.replicas) && has(self.autoscaling)) || "
            "(oldSelf.hasValue() && has(oldSelf.value().autoscaling))",
            "set replicas or autoscaling, not both; remove replicas",
            field_path=".replicas",
            reason="FieldValueForbidden",
            optional_old_self=True,
        ),
        Rule(
            "self.listeners.all(listener, listener.authentication != 'Optional') || "
            "(has(self.authentication.allowedNetworks) && size(self.authentication.allowedNetworks) > 0)",
            "authentication: Optional on a listener needs authentication.allowedNetworks, the networks that need not "
            "log in; list them, or use Required",
            field_path=".authentication.allowedNetworks",
            reason="FieldValueRequired",
        ),
        Rule(
            "has(self.hostname) || self.upstreams.all(upstream, upstream.type != 'DirectToMX')",
            "type: DirectToMX needs hostname, a name that resolves to the address that mail comes from",
            field_path=".hostname",
            reason="FieldValueRequired",
        ),
        Rule(
            "!has(self.authentication.clientCertificates) || has(self.tls.clientCASecretRef)",
            "authentication.clientCertificates needs tls.clientCASecretRef, whom the certificates must come from",
            field_path=".tls.clientCASecretRef",
            reason="FieldValueRequired",
        ),
        Rule(
            "self.queue.mode != 'PassThrough' || !has(self.spam.holdAt)",
            "queue.mode: PassThrough has no queue to hold mail in; remove spam.holdAt",
            field_path=".spam.holdAt",
            reason="FieldValueForbidden",
        ),
    )


class SmtpRelay(TolerantStruct, frozen=True, kw_only=True):
    """Outgoing mail as a resource: relay pods that applications log in to and that pass their mail on to upstreams."""

    metadata: ObjectMeta
    spec: SmtpRelaySpec
    """What is wanted."""
    status: SmtpRelayStatus = SmtpRelayStatus()
    """What the operator saw and did last."""
    api_version: str = API_VERSION
    kind: str = "SmtpRelay"


# --- SmtpUser ---------------------------------------------------------------------------------------------------------


class RelayReference(Struct, frozen=True, kw_only=True):
    """A SmtpRelay."""

    name: ObjectName
    """Name of the relay."""
    namespace: NamespaceName | None = None
    """Its namespace. Default: that of the SmtpUser."""


class UserRateLimit(Struct, frozen=True, kw_only=True):
    """How much this login may send in a window of time, on top of the relay's own limits."""

    name: ItemName
    """Name of the limit, in replies and metrics."""
    unit: RateLimitUnit = RateLimitUnit.MESSAGES
    """What is counted: Messages, Recipients or Bytes."""
    limit: Size
    """How much in one window: a number, or for Bytes a size. Examples: 60, 2G, 500Mi."""
    window: Duration
    """In which time. Examples: 1m, 1h, 24h."""
    burst: Size | None = None
    """How much may come at once. Default: the whole limit."""
    action: RateLimitAction = RateLimitAction.DEFER
    """Defer: 450, the client tries again. Reject: 550."""

    RULES: ClassVar[tuple[Rule, ...]] = (_COUNT_RULE,)


class Rotation(Struct, frozen=True, kw_only=True):
    """Regular change of the password."""

    every: Duration
    """How often the password changes. Example: 720h."""
    overlap: Duration = "24h"
    """How long the former password is still taken."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!({well_formed('self.overlap', 'self.every')}) || duration(self.overlap) < duration(self.every)",
            "overlap must be shorter than every, or old passwords never end; shorten it",
            field_path=".overlap",
        ),
    )


class SmtpUserSpec(Struct, frozen=True, kw_only=True):
    """What is wanted."""

    relay_ref: RelayReference
    """The relay to send through."""
    login: Annotated[str, Meta(min_length=1, max_length=320, pattern=LOGIN_PATTERN)]
    """The login: the full e-mail address, within what the relay grants this namespace."""
    senders: Senders = ()
    """What it may send as, on top of the login; within what the relay grants. Examples: news@shop.example.test,
    *@shop.example.test."""
    rate_limits: Annotated[tuple[UserRateLimit, ...], Meta(max_length=16), list_map("name")] = ()
    """How much it may send, on top of the relay's own limits."""
    secret_name: ObjectName | None = None
    """Secret to write into this namespace, of type servicebinding.io/smtp with type, provider, host, port, username,
    password, tls, ca.crt and uri. Default: the SmtpUser's name with -smtp."""
    rotation: Rotation | None = None
    """Regular change of the password. Left out: it stays."""


class SmtpUser(TolerantStruct, frozen=True, kw_only=True):
    """A login at a SmtpRelay, asked for by the application's own namespace, which gets a Secret to send with."""

    metadata: ObjectMeta
    spec: SmtpUserSpec
    """What is wanted."""
    status: SmtpUserStatus = SmtpUserStatus()
    """What the operator saw and did last."""
    api_version: str = API_VERSION
    kind: str = "SmtpUser"


def relay_from(obj: dict[str, Any]) -> SmtpRelay:
    """The model of an object as the API server gives it. Raises msgspec.ValidationError, which names the field."""
    return msgspec.convert(obj, SmtpRelay)


def user_from(obj: dict[str, Any]) -> SmtpUser:
    """The model of an object as the API server gives it. Raises msgspec.ValidationError, which names the field."""
    return msgspec.convert(obj, SmtpUser)
