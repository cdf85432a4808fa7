"""The relay's Prometheus metrics: each stands once, here, under the name that dashboards rely on.

Label values are closed sets or configured names; nothing that a client chooses freely becomes one. Every series that
can exist from the start exists from the start, at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mailsluice_relay.config import Configuration
from mailsluice_relay.reply import SUSPICION_REASONS, Reason, Result

SIZES = tuple(1024.0 * 4**step for step in range(8))
"""1 KiB to 16 MiB."""
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0)
DELIVERY = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0)
SCORES = (-5.0, 0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 50.0)

SESSION_REASONS: Mapping[Result, frozenset[Reason]] = {
    Result.SUSPECTED_SPAM: SUSPICION_REASONS,
    Result.ACCEPTED: frozenset({Reason.ACCEPTED}),
    Result.REJECTED: frozenset(Reason) - SUSPICION_REASONS - {Reason.ACCEPTED, Reason.NONE},
    Result.NONE: frozenset({Reason.NONE}),
}
"""The reasons that each result of a session can have."""
MESSAGE_REASONS: Mapping[str, frozenset[Reason]] = {
    "accepted": frozenset({Reason.ACCEPTED}),
    "suspected": SUSPICION_REASONS,
    "held": SUSPICION_REASONS,
    "deferred": frozenset(
        {
            Reason.LOGIN_SUSPENDED,
            Reason.RATE_LIMITED,
            Reason.LIMIT_STORE_UNAVAILABLE,
            Reason.ENGINE_UNAVAILABLE,
            Reason.QUEUE_FULL,
            Reason.SHUTTING_DOWN,
            Reason.INTERNAL_ERROR,
            Reason.UPSTREAM_REFUSED,
            Reason.UPSTREAM_UNAVAILABLE,
        }
    ),
    "rejected": SUSPICION_REASONS
    | {
        Reason.TLS_REQUIRED,
        Reason.AUTHENTICATION_REQUIRED,
        Reason.SENDER_NOT_OWNED,
        Reason.HEADER_FROM_NOT_OWNED,
        Reason.SENDER_DOMAIN_NOT_ALLOWED,
        Reason.RATE_LIMITED,
        Reason.MALWARE,
        Reason.LINE_ENDING,
        Reason.HEADER_MALFORMED,
        Reason.MAIL_LOOP,
        Reason.MESSAGE_TOO_BIG,
        Reason.UPSTREAM_REFUSED,
    },
}
"""The reasons that each result of a message can have: what MAIL, and what comes after it, is refused for."""
AUTHENTICATION_REASONS: Mapping[str, frozenset[Reason]] = {
    "success": frozenset({Reason.ACCEPTED}),
    "failure": frozenset({Reason.CREDENTIALS_INVALID, Reason.SHORT_LOGIN, Reason.TOO_MANY_FAILURES}),
    "error": frozenset({Reason.AUTHENTICATION_UNAVAILABLE}),
}
"""The reasons that each result of an AUTH exchange can have."""
OFFERED_MECHANISMS = ("PLAIN", "LOGIN")
RECIPIENT_RESULTS = ("accepted", "deferred", "rejected")
QUEUE_STATES = ("active", "deferred", "held")
DELIVERY_RESULTS = ("delivered", "deferred", "failed")
BOUNCE_CLASSES = ("permanent", "expired", "policy")
OTHER_USER = "other"
USER_LIMIT = "smtp-user"
"""The `limit` label of all limits that users have of their own: tenants name those."""


class Metrics:
    """All metrics of one process, in a registry of its own (so that tests and `demo` can have several)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.sessions = Counter(
            "mailsluice_sessions",
            "Sessions that ended, by result and first reason.",
            ["listener", "result", "reason"],
            registry=r,
        )
        self.sessions_active = Gauge("mailsluice_sessions_active", "Sessions open now.", ["listener"], registry=r)
        self.messages = Counter("mailsluice_messages", "Messages offered, by result.", ["result", "reason"], registry=r)
        self.recipients = Counter("mailsluice_recipients", "RCPT commands, by result.", ["result"], registry=r)
        self.message_size = Histogram(
            "mailsluice_message_size_bytes", "Size of accepted messages.", buckets=SIZES, registry=r
        )
        self.session_seconds = Histogram("mailsluice_session_seconds", "Length of sessions.", buckets=SLOW, registry=r)
        self.accept_seconds = Histogram(
            "mailsluice_accept_seconds", "From the end of data to its 250.", buckets=FAST, registry=r
        )
        self.authentications = Counter(
            "mailsluice_authentications", "AUTH exchanges.", ["mechanism", "result", "reason"], registry=r
        )
        self.tls_sessions = Counter("mailsluice_tls_sessions", "TLS handshakes completed.", ["version"], registry=r)
        self.rate_limited = Counter("mailsluice_rate_limited", "Messages over a limit.", ["limit"], registry=r)
        self.limit_store_up = Gauge(
            "mailsluice_limit_store_up", "1 while the store of rate limits answers, or none is configured.", registry=r
        )
        self.limit_store_failures = Counter(
            "mailsluice_limit_store_failures", "Calls of the store of rate limits that failed.", registry=r
        )
        self.spam_score = Histogram("mailsluice_spam_score", "Score of judged messages.", buckets=SCORES, registry=r)
        self.spam_rule_hits = Counter("mailsluice_spam_rule_hits", "Messages that a rule hit.", ["rule"], registry=r)
        self.spam_engine_seconds = Histogram(
            "mailsluice_spam_engine_seconds", "Answer time of spam engines.", ["engine"], buckets=FAST, registry=r
        )
        self.spam_engine_failures = Counter(
            "mailsluice_spam_engine_failures", "Spam engine calls that failed.", ["engine"], registry=r
        )
        self.queue_messages = Gauge("mailsluice_queue_messages", "Messages in the queue.", ["state"], registry=r)
        self.queue_oldest = Gauge("mailsluice_queue_oldest_seconds", "Age of the oldest message not held.", registry=r)
        self.queue_bytes = Gauge("mailsluice_queue_bytes", "Octets in the queue.", registry=r)
        self.delivery_attempts = Counter(
            "mailsluice_delivery_attempts", "Recipients tried, by outcome.", ["upstream", "result"], registry=r
        )
        self.delivery_seconds = Histogram(
            "mailsluice_delivery_seconds", "From 250 to the upstream's 250.", ["upstream"], buckets=DELIVERY, registry=r
        )
        self.upstream_up = Gauge("mailsluice_upstream_up", "1 while the upstream takes mail.", ["upstream"], registry=r)
        self.upstream_connections = Gauge(
            "mailsluice_upstream_connections", "Connections open to the upstream.", ["upstream"], registry=r
        )
        self.upstream_throttled = Counter(
            "mailsluice_upstream_throttled_seconds", "Time spent slowed down by the upstream.", ["upstream"], registry=r
        )
        self.bounces = Counter("mailsluice_bounces", "Recipients that failed for good.", ["class"], registry=r)
        self.user_messages = Counter(
            "mailsluice_user_messages",
            "Messages by login (bounded; the rest is `other`).",
            ["user", "result"],
            registry=r,
        )
        self.user_recipients = Counter(
            "mailsluice_user_recipients", "Recipients by login (bounded; the rest is `other`).", ["user"], registry=r
        )
        self.configuration_info = Gauge(
            "mailsluice_configuration_info", "1 for the revision in force.", ["revision"], registry=r
        )
        self.configuration_reload_success = Gauge(
            "mailsluice_configuration_reload_success", "1 if the last configuration read was taken.", registry=r
        )
        self.certificate_expiry = Gauge(
            "mailsluice_certificate_expiry_timestamp_seconds",
            "End of the server certificate.",
            ["listener"],
            registry=r,
        )
        self.build_info = Gauge("mailsluice_build_info", "1; the version is a label.", ["version"], registry=r)
        self._users: frozenset[str] = frozenset()

        self.limit_store_up.set(1)
        for message_result, reasons in MESSAGE_REASONS.items():
            for reason in reasons:
                self.messages.labels(message_result, reason)
        for result in RECIPIENT_RESULTS:
            self.recipients.labels(result)
        for state in QUEUE_STATES:
            self.queue_messages.labels(state)
        for bounce in BOUNCE_CLASSES:
            self.bounces.labels(bounce)
        for version in ("TLSv1.2", "TLSv1.3"):
            self.tls_sessions.labels(version)
        for mechanism in OFFERED_MECHANISMS:
            for authentication_result, reasons in AUTHENTICATION_REASONS.items():
                for reason in reasons:
                    self.authentications.labels(mechanism, authentication_result, reason)

    def configure(
        self, configuration: Configuration, certificate_expiry: Mapping[str, float], spam_rules: Iterable[str] = ()
    ) -> None:
        """Make the series that this configuration names.

        `certificate_expiry` maps a listener to seconds since the epoch; `spam_rules` are those in force.
        """
        self.configuration_info.clear()
        self.configuration_info.labels(configuration.revision).set(1)
        for listener in configuration.listeners:
            self.sessions_active.labels(listener.name)
            for session_result, reasons in SESSION_REASONS.items():
                for reason in reasons:
                    self.sessions.labels(listener.name, session_result, reason)
        for name, when in certificate_expiry.items():
            self.certificate_expiry.labels(name).set(when)
        for upstream in configuration.upstreams:
            for delivery_result in DELIVERY_RESULTS:
                self.delivery_attempts.labels(upstream.name, delivery_result)
            self.delivery_seconds.labels(upstream.name)
            self.upstream_up.labels(upstream.name)
            self.upstream_connections.labels(upstream.name)
            self.upstream_throttled.labels(upstream.name)
        for limit in configuration.rate_limits:
            self.rate_limited.labels(limit.name)
        if any(user.rate_limits for user in configuration.authentication.users):
            self.rate_limited.labels(USER_LIMIT)
        for rule in spam_rules:
            self.spam_rule_hits.labels(rule)
        for engine in configuration.spam.engines:
            self.spam_engine_seconds.labels(engine.name)
            self.spam_engine_failures.labels(engine.name)
        names = [user.login for user in configuration.authentication.users]
        self._users = frozenset(names[: configuration.monitoring.user_metrics_limit])
        for name in (*self._users, OTHER_USER):
            self.user_recipients.labels(name)
            for message_result in MESSAGE_REASONS:
                self.user_messages.labels(name, message_result)

    def user(self, login: str | None) -> str:
        """The `user` label of a login: itself among the first configured ones, else `other`."""
        return login if login in self._users and login is not None else OTHER_USER
