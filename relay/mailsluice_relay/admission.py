"""Who may send: authentication, ownership, limits and suspicion, composed to one verdict at each step of a session.

The order at each step is from cheap to dear, and from what the client can mend to what it cannot: who are you, may you
write as that, how much, what does it look like. A configuration is compiled whole to a `_Policy` and swapped in one
assignment; limits, failures and histories outlive it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import structlog

from mailsluice_relay import reply
from mailsluice_relay.auth.directory import Directory
from mailsluice_relay.auth.passwords import BusyError, Verifier
from mailsluice_relay.auth.sasl import Attempt, Evidence
from mailsluice_relay.auth.throttle import Throttle
from mailsluice_relay.config import (
    Configuration,
    ConfigurationError,
    Credentials,
    ListenerMode,
    Ownership,
    RateLimitAction,
    User,
    login_key,
)
from mailsluice_relay.envelope import Client, Content, Envelope, Login, Mailbox, Recipient
from mailsluice_relay.limit_store.target import Target, target_of
from mailsluice_relay.metrics import USER_LIMIT, Metrics
from mailsluice_relay.policy.networks import Networks, source_network
from mailsluice_relay.policy.ownership import NULL_SENDER, Domains, Rights, domain_key, is_local_name, rights
from mailsluice_relay.policy.rates import (
    Charge,
    MemoryStore,
    Quantity,
    Store,
    StoreUnavailableError,
    Subject,
    charges_of,
)
from mailsluice_relay.reply import Reason, Reply, Verdict
from mailsluice_relay.smtp import header
from mailsluice_relay.suspicion.behaviour import History
from mailsluice_relay.suspicion.engine import Submission
from mailsluice_relay.suspicion.panel import EngineState, Panel
from mailsluice_relay.suspicion.rules import BODY_PREFIX, Hit, Judge, Mail, Opinion

if TYPE_CHECKING:
    from mailsluice_relay.limit_store.store import SharedStore, StoreState

_log = structlog.get_logger(__name__)

_INVALID: Final = Verdict(reply.CREDENTIALS_INVALID, Reason.CREDENTIALS_INVALID)
_NO_CREDENTIALS: Final[Credentials] = MappingProxyType({})
_ENGINE_UNAVAILABLE: Final = Verdict(reply.ENGINE_UNAVAILABLE, Reason.ENGINE_UNAVAILABLE)
_STORE_UNAVAILABLE: Final = Verdict(reply.LIMIT_STORE_UNAVAILABLE, Reason.LIMIT_STORE_UNAVAILABLE)
_UNAVAILABLE: Final = Verdict(reply.AUTHENTICATION_UNAVAILABLE, Reason.AUTHENTICATION_UNAVAILABLE)
_MAXIMUM_SHOWN: Final = 200
"""Characters of an address in a reply."""
_LOCAL_PART: Final = re.compile(r"[^\s<>@]+@")


@dataclass(frozen=True, slots=True)
class Authentication:
    """How an AUTH exchange ended. `login` is None unless it succeeded."""

    login: Login | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be done with a message."""

    verdict: Verdict
    """Positive: it may be queued. Else its reply is the answer to the data."""
    content: Content
    """With the relay's header fields when the verdict is positive."""
    suspected: bool = False
    held: bool = False
    reason: Reason = Reason.ACCEPTED
    score: float = 0.0
    charges: tuple[Charge, ...] = ()
    """What `Admission.refund` gives back."""
    charged_by: Store | None = None
    """To whom it does: the store may be another one by then."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """Who sends: a configured user, or nobody but the network that lets the client in."""

    user: User | None
    rights: Rights | None
    network: str

    @property
    def name(self) -> str:
        return self.user.login if self.user is not None else f"network {self.network}"

    @property
    def key(self) -> str:
        return login_key(self.user.login) if self.user is not None else f"network {self.network}"


class _Policy:
    """One configuration, compiled. Raises ConfigurationError."""

    def __init__(
        self,
        configuration: Configuration,
        credentials: Credentials,
        *,
        key: bytes,
        monotonic: Callable[[], float],
        before: Panel | None = None,
    ) -> None:
        self.configuration = configuration
        self.limit_store = target_of(configuration, credentials)
        authentication = configuration.authentication
        self.directory = Directory(authentication, key=key)
        self.rights = {user.login: rights(user.login, user.senders) for user in authentication.users}
        self.allowed_networks = Networks(authentication.allowed_networks, "authentication.allowedNetworks")
        self.sender_domains = Domains(configuration.senders.allowed_domains, "senders.allowedDomains")
        self.recipient_domains = Domains(configuration.recipients.allowed_domains, "recipients.allowedDomains")
        # Without a list, a client that is let in by its network may send as what the logins own, and no more.
        self.network_domains = self.sender_domains or Domains(
            {user.login.rpartition("@")[2] for user in authentication.users if "@" in user.login},
            "authentication.users",
        )
        self.judge = Judge(configuration.spam)
        self.panel = Panel(configuration.spam.engines, monotonic, before)
        self.listeners = {listener.name: listener for listener in configuration.listeners}
        self.ownership = configuration.senders.ownership
        self.default_from = _default_from(configuration.senders.default_from)

    def lets_in(self, client: Client) -> bool:
        """Whether the client may send without a login."""
        listener = self.listeners.get(client.listener)
        return (
            listener is not None
            and not listener.authentication_required
            and not client.is_balancer  # whoever it connects for, the address is not theirs
            and client.address in self.allowed_networks
        )

    def login_required(self, client: Client) -> Verdict:
        """What a client without login is told: first TLS, where AUTH is not offered without."""
        listener = self.listeners.get(client.listener)
        if (
            client.tls is None
            and listener is not None
            and listener.mode is ListenerMode.START_TLS
            and not listener.allow_plaintext_authentication
        ):
            return Verdict(reply.TLS_REQUIRED, Reason.TLS_REQUIRED)
        return Verdict(reply.AUTHENTICATION_REQUIRED, Reason.AUTHENTICATION_REQUIRED)

    def owns(self, identity: _Identity, sender: Mailbox | None) -> bool:
        """Whether the address is the identity's own, as far as the relay looks at that."""
        if identity.rights is None:  # who has no login was granted nothing, `<>` neither
            return sender is not None
        if self.ownership is Ownership.OFF or (sender is not None and sender == self.default_from):
            return True
        return identity.rights.owns(sender)

    def sender_refused(self, identity: _Identity, sender: Mailbox | None) -> Reason | None:
        """Why this identity may not send as this address; None: it may."""
        enforced = identity.rights is None or self.ownership is not Ownership.LOG
        if enforced and not self.owns(identity, sender):
            return Reason.SENDER_NOT_OWNED
        if sender is None:
            return None
        domains = self.sender_domains if identity.rights is not None else self.network_domains
        if identity.rights is None and not domains:
            return Reason.SENDER_DOMAIN_NOT_ALLOWED
        return None if domains.allows(sender.domain) else Reason.SENDER_DOMAIN_NOT_ALLOWED


class Admission:
    """Decides for all sessions of a process. Raises ConfigurationError."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        credentials: Credentials = _NO_CREDENTIALS,
        metrics: Metrics,
        monotonic: Callable[[], float],
        now: Callable[[], float],
        key: bytes | None = None,
    ) -> None:
        self._metrics = metrics
        self._monotonic = monotonic
        self._now = now
        # It decides nothing that can be seen from outside, so that a test needs none and a process has its own.
        self._key = key or os.urandom(32)  # noqa: TID251 - a secret of this object alone
        self._policy = self._compiled(configuration, credentials, None)
        self._verifier = Verifier(key=self._key, monotonic=monotonic)
        self._throttle = Throttle(configuration.authentication.failures)
        self._own_counts = MemoryStore(monotonic)
        self._shared_counts = self._shared_store(self._policy.limit_store)
        self._retired: set[asyncio.Task[None]] = set()
        self._history = History()

    async def start(self) -> None:
        """Look after whatever is asked about mail, before there is any."""
        if self._shared_counts is not None:
            self._shared_counts.start()

    def check(self, configuration: Configuration, credentials: Credentials) -> None:
        """Whether `reconfigure` would take this configuration. Raises ConfigurationError; changes nothing."""
        self._compiled(configuration, credentials, None)

    def reconfigure(self, configuration: Configuration, credentials: Credentials = _NO_CREDENTIALS) -> None:
        """Use this configuration from the next step of any session on. Raises ConfigurationError and keeps the old."""
        self._policy = self._compiled(configuration, credentials, self._policy.panel)
        self._throttle.reconfigure(configuration.authentication.failures)
        old = self._shared_counts
        if (old.target if old is not None else None) != self._policy.limit_store:
            self._shared_counts = self._shared_store(self._policy.limit_store)
            if self._shared_counts is not None:
                self._shared_counts.start()
            if old is not None:
                task = asyncio.get_running_loop().create_task(old.retire())
                self._retired.add(task)
                task.add_done_callback(self._retired.discard)

    @property
    def asks_others(self) -> bool:
        """Whether `mail` and `message` may wait: for the store of limits, or for a spam engine."""
        return self._shared_counts is not None or bool(self._policy.panel)

    def _compiled(self, configuration: Configuration, credentials: Credentials, before: Panel | None) -> _Policy:
        return _Policy(configuration, credentials, key=self._key, monotonic=self._monotonic, before=before)

    @property
    def spam_rules(self) -> tuple[str, ...]:
        """The rules in force, by name."""
        return self._policy.judge.rules

    def learn(self, login: str, settled: int, unknown: int) -> None:
        """What came of recipients of a login: how many are settled, and how many of those do not exist."""
        self._policy.judge.learn(self._history.of(login_key(login)), settled, unknown, self._monotonic())

    @property
    def engine_states(self) -> Mapping[str, EngineState]:
        """How each spam engine is, by its name."""
        return self._policy.panel.states

    @property
    def limit_store_state(self) -> StoreState | None:
        """How the store of rate limits is; None: there is none."""
        return self._shared_counts.state if self._shared_counts is not None else None

    async def close(self) -> None:
        self._verifier.close()
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
        if self._shared_counts is not None:
            await self._shared_counts.close()

    def _shared_store(self, target: Target | None) -> SharedStore | None:
        if target is None:
            self._metrics.limit_store_up.set(1)
            return None
        # Its library takes 11 MB, which only those relays have that count together.
        from mailsluice_relay.limit_store.store import SharedStore

        return SharedStore(target, local=self._own_counts, metrics=self._metrics)

    @property
    def _store(self) -> Store:
        return self._shared_counts if self._shared_counts is not None else self._own_counts

    # --- AUTH -------------------------------------------------------------------------------------------------------

    async def authenticate(self, client: Client, attempt: Attempt) -> Authentication:
        """Who logs in. Changes nothing of the client: the session does."""
        authentication = await self._authenticate(client, attempt)
        verdict = authentication.verdict
        result = "success" if authentication.login else "error" if verdict.reason is _UNAVAILABLE.reason else "failure"
        self._metrics.authentications.labels(attempt.mechanism, result, verdict.reason).inc()
        return authentication

    async def _authenticate(self, client: Client, attempt: Attempt) -> Authentication:
        directory = self._policy.directory
        network = source_network(client.address)
        login = login_key(attempt.login)
        if self._throttle.refuses(network, login, self._monotonic()):
            return Authentication(None, Verdict(reply.TOO_MANY_FAILURES, Reason.TOO_MANY_FAILURES))
        if attempt.evidence is not Evidence.PASSWORD:  # not offered yet; and a token is not to be tried as a password
            return self._failed(client, network, login, _INVALID)
        if directory.is_short(attempt.login):
            return self._failed(client, network, login, Verdict(reply.SHORT_LOGIN, Reason.SHORT_LOGIN))
        # Nobody may act for another (RFC 4616 section 2: the server decides whether authcid may act as authzid).
        if attempt.authorization and login_key(attempt.authorization) != login:
            return self._failed(client, network, login, _INVALID)
        candidate = directory.candidate(attempt.login)
        try:
            is_right = await self._verifier.verify(
                login, attempt.password, candidate.hashes, network, is_decoy=candidate.user is None
            )
        except BusyError:
            return Authentication(None, _UNAVAILABLE)
        user = candidate.user
        if user is None or not is_right:
            return self._failed(client, network, login, _INVALID)
        self._throttle.succeeded(network, login, self._monotonic())
        return Authentication(
            Login(user.login, attempt.mechanism, user.namespace), Verdict(reply.AUTHENTICATED, Reason.ACCEPTED)
        )

    def _failed(self, client: Client, network: str, login: str, verdict: Verdict) -> Authentication:
        self._throttle.failed(network, login, self._monotonic())
        allowed = self._policy.configuration.authentication.failures.per_connection
        if client.authentication_failures + 1 >= allowed:
            return Authentication(None, Verdict(reply.TOO_MANY_FAILURES, Reason.TOO_MANY_FAILURES))
        return Authentication(None, verdict)

    # --- MAIL, RCPT -------------------------------------------------------------------------------------------------

    async def mail(self, client: Client, envelope: Envelope) -> Verdict:
        """The reverse-path: who sends, may they write as that, and is there anything left of their limits."""
        policy = self._policy
        identity = self._identify(policy, client)
        if isinstance(identity, Verdict):
            return identity
        if policy.default_from is not None and envelope.sender is not None and is_local_name(envelope.sender.domain):
            envelope.sender = policy.default_from
        reason = policy.sender_refused(identity, envelope.sender)
        if reason is not None:
            return Verdict(_sender_refused(reason, identity, envelope.sender, reply.sender_not_owned), reason)
        if not policy.owns(identity, envelope.sender):
            _log.warning(
                "sender not owned",
                reason=Reason.SENDER_NOT_OWNED,
                session=client.session_id,
                login=self._logged(identity.name),
                sender=self._logged(str(envelope.sender or NULL_SENDER)),
            )
        least = Quantity(messages=1, recipients=1, octets=envelope.declared_size or 1)
        try:
            decision = await self._store.peek(self._charges(policy, identity, client, envelope, least))
        except StoreUnavailableError:
            return _STORE_UNAVAILABLE
        if decision.exceeded is not None:
            return self._rate_limited(decision.exceeded, decision.retry_after)
        return Verdict(reply.SENDER_OK, Reason.ACCEPTED)

    def recipient(self, client: Client, envelope: Envelope, recipient: Recipient) -> Verdict:
        """The forward-path: is its domain one that mail may go to."""
        domain = recipient.mailbox.domain
        if not self._policy.recipient_domains.allows(domain):
            return Verdict(
                reply.recipient_domain_not_allowed(_shown(domain or str(recipient.mailbox))),
                Reason.RECIPIENT_DOMAIN_NOT_ALLOWED,
            )
        return Verdict(reply.RECIPIENT_OK, Reason.ACCEPTED)

    # --- the data ---------------------------------------------------------------------------------------------------

    async def message(self, client: Client, envelope: Envelope, content: Content, *, queue_id: str) -> Judgement:
        """The whole message: its authors, its limits, its looks. Charges the limits when it may be queued."""
        policy = self._policy
        identity = self._identify(policy, client)
        if isinstance(identity, Verdict):  # gone or suspended since MAIL
            return _refused(identity, content)
        try:
            fields, authors = _read_header(policy, envelope, content)
        except header.HeaderError as error:
            return _refused(Verdict(reply.header_malformed(str(error)), Reason.HEADER_MALFORMED), content)
        if header.received_count(fields) > header.MAXIMUM_RECEIVED:
            return _refused(Verdict(reply.MAIL_LOOP, Reason.MAIL_LOOP), content)

        for author in authors:
            reason = policy.sender_refused(identity, author.mailbox)
            if reason is not None:
                answer = _sender_refused(reason, identity, author.mailbox, reply.header_from_not_owned)
                if reason is Reason.SENDER_NOT_OWNED:
                    reason = Reason.HEADER_FROM_NOT_OWNED
                return _refused(Verdict(answer, reason), content)

        quantity = Quantity(messages=1, recipients=len(envelope.recipients), octets=content.size)
        charges = self._charges(policy, identity, client, envelope, quantity)
        try:
            decision = await self._store.charge(charges)
        except StoreUnavailableError:
            return _refused(_STORE_UNAVAILABLE, content)
        if decision.exceeded is not None:
            return _refused(self._rate_limited(decision.exceeded, decision.retry_after), content)

        opinion = policy.judge.opinion(
            Mail(
                fields=fields,
                body=_prefix(content.body.chunks(), BODY_PREFIX),
                authors=authors,
                owns=lambda mailbox: policy.owns(identity, mailbox),
                recipients=len(envelope.recipients),
                network=identity.network,
                now=self._monotonic(),
                behaviour=self._history.of(identity.key),
            )
        )
        trace = header.Trace(
            hostname=policy.configuration.hostname,
            hello=client.hello,
            client_address=client.address,
            protocol=header.protocol(
                extended=client.extended,
                tls=client.tls is not None,
                authenticated=client.login is not None,
                internationalized=envelope.internationalized,
            ),
            queue_id=queue_id,
            date=self._now(),
        )
        if policy.panel and not opinion.rejected:
            scanned = Content(header.prepare(fields, trace, sender=envelope.sender, suspected=""), content.body)
            verdict, found = await self._scan(policy, identity, client, envelope, scanned, queue_id)
            opinion = policy.judge.weighed((*opinion.hits, *found))
            if verdict is not None and not (verdict.reply.is_transient and opinion.rejected):
                if verdict.reply.is_transient and decision.taken_by is not None:
                    decision.taken_by.refund(charges)  # it comes again
                self._count(opinion, identity, client, queue_id)
                return _refused(verdict, content)
        self._count(opinion, identity, client, queue_id)
        if opinion.rejected:
            return Judgement(
                Verdict(reply.spam_rejected(opinion.reason), opinion.reason),
                content,
                suspected=True,
                reason=opinion.reason,
                score=opinion.score,
            )
        prepared = header.prepare(fields, trace, sender=envelope.sender, suspected=_mark(opinion))
        reason = opinion.reason if opinion.suspected else Reason.ACCEPTED
        return Judgement(
            Verdict(reply.OK, reason),
            Content(prepared, content.body),
            suspected=opinion.suspected,
            held=opinion.held,
            reason=reason,
            score=opinion.score,
            charges=charges,
            charged_by=decision.taken_by,
        )

    async def _scan(
        self, policy: _Policy, identity: _Identity, client: Client, envelope: Envelope, content: Content, queue_id: str
    ) -> tuple[Verdict | None, list[Hit]]:
        """What the engines say of a message: why it is not taken, if so, and what adds to its score."""
        answers = await policy.panel.ask(
            Submission(
                content=content,
                queue_id=queue_id,
                login=identity.user.login if identity.user is not None else None,
                client_address=client.address,
                hello=client.hello,
                sender=envelope.sender,
                recipients=tuple(recipient.mailbox for recipient in envelope.recipients),
            )
        )
        verdict: Verdict | None = None
        hits: list[Hit] = []
        for answer in answers:
            found = answer.verdict
            if answer.seconds is not None:
                self._metrics.spam_engine_seconds.labels(answer.engine).observe(answer.seconds)
            if found is None:
                self._metrics.spam_engine_failures.labels(answer.engine).inc()
                if answer.defers and verdict is None:
                    verdict = _ENGINE_UNAVAILABLE
                continue
            if found.malware:
                verdict = Verdict(reply.malware_found(_shown(found.malware)), Reason.MALWARE)
                _log.warning(
                    "malware",
                    reason=Reason.MALWARE,
                    engine=answer.engine,
                    observed=found.malware,
                    login=self._logged(identity.name),
                    network=identity.network,
                    session=client.session_id,
                    queue_id=queue_id,
                )
            if found.score > 0:  # an engine that likes a message takes nothing off what the rules saw
                symbols = ",".join(found.symbols)[:_MAXIMUM_SHOWN]
                hits.append(Hit(answer.engine, Reason.SPAM, found.score, symbols, "", is_engine=True))
        return verdict, hits

    def refund(self, judgement: Judgement) -> None:
        """Give back what `message` charged: the spool did not take it."""
        if judgement.charged_by is not None:
            judgement.charged_by.refund(judgement.charges)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _identify(self, policy: _Policy, client: Client) -> _Identity | Verdict:
        """Who the client is now. Asked at every message, so that who was removed or suspended stops at once."""
        network = source_network(client.address)
        if client.login is None:
            return _Identity(None, None, network) if policy.lets_in(client) else policy.login_required(client)
        user = policy.directory.user(client.login.name)
        if user is None:
            return Verdict(reply.AUTHENTICATION_REQUIRED, Reason.AUTHENTICATION_REQUIRED)
        if user.suspended:
            return Verdict(reply.login_suspended(_shown(user.login)), Reason.LOGIN_SUSPENDED)
        return _Identity(user, policy.rights[user.login], network)

    def _charges(
        self, policy: _Policy, identity: _Identity, client: Client, envelope: Envelope, quantity: Quantity
    ) -> tuple[Charge, ...]:
        user = identity.user
        subject = Subject(
            user=identity.key,
            namespace=(user and user.namespace) or policy.configuration.relay.namespace,
            network=identity.network,
            sender_domain=(domain_key(envelope.sender.domain) or "") if envelope.sender is not None else "",
        )
        own = user.rate_limits if user is not None else ()
        return charges_of(policy.configuration.rate_limits, own, subject, quantity)

    def _rate_limited(self, charge: Charge, retry_after: float) -> Verdict:
        limit = charge.limit
        self._metrics.rate_limited.labels(USER_LIMIT if charge.is_own else limit.name).inc()
        if math.isinf(retry_after):
            return Verdict(reply.more_than_limit(limit.name), Reason.RATE_LIMITED)
        is_final = limit.action is RateLimitAction.REJECT
        return Verdict(reply.rate_limited(limit.name, retry_after, is_final), Reason.RATE_LIMITED)

    def _count(self, opinion: Opinion, identity: _Identity, client: Client, queue_id: str) -> None:
        self._metrics.spam_score.observe(opinion.score)
        for hit in opinion.hits:
            if not hit.is_engine:
                self._metrics.spam_rule_hits.labels(hit.rule).inc()
        # Engines find a little in any message.
        told = [hit for hit in opinion.hits if opinion.suspected or not hit.is_engine]
        if told:
            _log.warning(
                "suspicion",
                reason=opinion.reason,
                score=opinion.score,
                hits=[
                    {
                        "rule": hit.rule,
                        "reason": hit.reason,
                        "observed": self._logged(hit.observed),
                        "threshold": hit.threshold,
                        "score": hit.score,
                    }
                    for hit in told
                ],
                login=self._logged(identity.name),
                network=identity.network,
                session=client.session_id,
                queue_id=queue_id,
            )

    def _logged(self, text: str) -> str:
        """Text with addresses in it, as far as the log may show them."""
        return _LOCAL_PART.sub("***@", text) if self._policy.configuration.logging.redact_addresses else text


def _default_from(address: str | None) -> Mailbox | None:
    if address is None:
        return None
    local_part, _, domain = address.rpartition("@")
    key = domain_key(domain)
    if not local_part or not local_part.isascii() or key is None:
        raise ConfigurationError(f"senders.defaultFrom: {address!r} is no ASCII address; expected user@domain")
    return Mailbox(local_part, key)


def _read_header(
    policy: _Policy, envelope: Envelope, content: Content
) -> tuple[tuple[header.Field, ...], tuple[header.Author, ...]]:
    """The fields as they are sent on, and their authors. Raises HeaderError."""
    fields = header.parse(content.header)
    authors = header.authors(fields, internationalized=envelope.internationalized)
    if policy.default_from is not None:
        fields = header.readdress(fields, authors, is_local_name, policy.default_from)
        authors = header.authors(fields, internationalized=envelope.internationalized)
    if envelope.sender is None and not any(author.field == "from" for author in authors):
        raise header.HeaderError("From is missing, and the reverse-path is <>")
    return fields, authors


def _sender_refused(
    reason: Reason, identity: _Identity, sender: Mailbox | None, not_owned: Callable[[str, str], Reply]
) -> Reply:
    if reason is Reason.SENDER_DOMAIN_NOT_ALLOWED and sender is not None:
        return reply.sender_domain_not_allowed(_shown(sender.domain))
    return not_owned(_shown(identity.name), NULL_SENDER if sender is None else _shown(str(sender)))


def _shown(text: str) -> str:
    """Text of the client's or the configuration's, fit for a reply: replies are ASCII (RFC 5321 section 4.2)."""
    return text.encode("ascii", "backslashreplace").decode()[:_MAXIMUM_SHOWN]


def _refused(verdict: Verdict, content: Content) -> Judgement:
    return Judgement(verdict, content, reason=verdict.reason)


def _prefix(chunks: Iterable[bytes], limit: int) -> bytes:
    """The first octets of a body, reading no more of it than that takes."""
    taken: list[bytes] = []
    room = limit
    for chunk in chunks:
        taken.append(chunk[:room])
        room -= len(taken[-1])
        if room <= 0:
            break
    return taken[0] if len(taken) == 1 else b"".join(taken)


def _mark(opinion: Opinion) -> str:
    """The text of the header field for whoever gets a suspected message: names and numbers, nothing of the client's."""
    if not opinion.suspected:
        return ""
    return f"{opinion.reason}; score={opinion.score:g}; rules={','.join(hit.rule for hit in opinion.hits)}"
