"""What the Prometheus operator is told of a relay: where its metrics are, and what to alert on.

Alerts are few and about what senders feel or a provider will punish; docs/alerts.md says what to do about each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mailsluice_operator.children.metadata import Object, Owner, child, relay_labels, selector
from mailsluice_operator.children.network import HTTP_PORT_NAME
from mailsluice_operator.resource.models import SmtpRelay
from mailsluice_relay.config import QueueMode

MONITORING: Final = "monitoring.coreos.com/v1"
QUEUE_OLD: Final = 3600
"""Seconds after which a message that still waits is news: by then it has been tried several times."""


def pod_monitor(relay: SmtpRelay, owner: Owner) -> Object | None:
    """Has Prometheus scrape every pod; the series get the label `relay`."""
    if not relay.spec.monitoring.pod_monitor:
        return None
    endpoint: Object = {
        "port": HTTP_PORT_NAME,
        "path": "/metrics",
        "relabelings": [{"action": "replace", "targetLabel": "relay", "replacement": owner.name}],
    }
    spec: Object = {"selector": {"matchLabels": selector(owner.name)}, "podMetricsEndpoints": [endpoint]}
    labels = {**relay.spec.monitoring.labels, **relay_labels(owner.name)}
    return child(MONITORING, "PodMonitor", owner.name, owner, labels=labels, spec=spec)


def prometheus_rule(relay: SmtpRelay, owner: Owner) -> Object | None:
    """The alerts of one relay."""
    if not relay.spec.monitoring.rules:
        return None
    group: Object = {"name": f"mailsluice-{owner.namespace}-{owner.name}", "rules": list(_alerts(relay, owner))}
    labels = {**relay.spec.monitoring.labels, **relay_labels(owner.name)}
    return child(MONITORING, "PrometheusRule", owner.name, owner, labels=labels, spec={"groups": [group]})


def _alerts(relay: SmtpRelay, owner: Owner) -> Iterator[Object]:
    """By namespace and pod, which every way of scraping pods sets, so that they hold without our PodMonitor too."""
    names = "[0-9]+" if relay.spec.queue.mode is QueueMode.PERSISTENT else "[a-z0-9]+-[a-z0-9]{5}"
    pods = f'namespace="{owner.namespace}",pod=~"{owner.name}-{names}"'
    named = f"SmtpRelay {owner.namespace}/{owner.name}"

    def alert(name: str, expression: str, lasting: str, severity: str, summary: str) -> Object:
        return {
            "alert": name,
            "expr": expression,
            "for": lasting,
            "labels": {"severity": severity, "relay": owner.name, "namespace": owner.namespace},
            "annotations": {"summary": f"{named}: {summary}"},
        }

    yield alert(
        "MailsluiceRelayDown",
        f"absent(up{{{pods}}} == 1)",
        "5m",
        "critical",
        "no pod answers; applications cannot send",
    )
    yield alert(
        "MailsluiceUpstreamDown",
        f"max by (upstream) (mailsluice_upstream_up{{{pods}}}) == 0",
        "10m",
        "critical",
        "upstream {{ $labels.upstream }} takes no mail from any pod",
    )
    yield alert(
        "MailsluiceQueueOld",
        f"max(mailsluice_queue_oldest_seconds{{{pods}}}) > {QUEUE_OLD}",
        "10m",
        "warning",
        "a message waits for {{ $value | humanizeDuration }}",
    )
    yield alert(
        "MailsluiceMessagesDeferred",
        f'sum(rate(mailsluice_messages_total{{{pods},result="deferred"}}[15m])) > '
        f"0.2 * sum(rate(mailsluice_messages_total{{{pods}}}[15m]))",
        "15m",
        "warning",
        "{{ $value | humanize }} messages a second are put off: over a limit, or the queue is full",
    )
    yield alert(
        "MailsluiceSuspectedSpam",
        f'sum(increase(mailsluice_messages_total{{{pods},result=~"suspected|held"}}[30m])) > 20',
        "0m",
        "warning",
        "{{ $value | humanize }} messages of the last half hour look like spam; a login may be stolen",
    )
    yield alert(
        "MailsluicePolicyBounces",
        f'sum(increase(mailsluice_bounces_total{{{pods},class="policy"}}[1h])) > 20',
        "0m",
        "warning",
        "{{ $value | humanize }} recipients of the last hour were refused by policy; a provider may block the account",
    )
    yield alert(
        "MailsluiceLimitStoreDown",
        f"min(mailsluice_limit_store_up{{{pods}}}) == 0",
        "5m",
        "warning",
        "a pod cannot use the store of spec.rateLimitStore",
    )
    yield alert(
        "MailsluiceEngineFailing",
        f"sum by (engine) (increase(mailsluice_spam_engine_failures_total{{{pods}}}[15m])) > 10",
        "5m",
        "warning",
        "engine {{ $labels.engine }} gave no verdict on {{ $value | humanize }} messages of a quarter of an hour",
    )
    yield alert(
        "MailsluiceCertificateExpiring",
        f"min(mailsluice_certificate_expiry_timestamp_seconds{{{pods}}}) - time() < 7 * 86400",
        "1h",
        "warning",
        "the certificate that clients see ends in {{ $value | humanizeDuration }}",
    )
    yield alert(
        "MailsluiceConfigurationRefused",
        f"min by (pod) (mailsluice_configuration_reload_success{{{pods}}}) == 0",
        "10m",
        "warning",
        "pod {{ $labels.pod }} refused the newest configuration and keeps the one before",
    )
