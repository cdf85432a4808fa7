"""The operator's Prometheus metrics: each stands once, here, under the name that dashboards rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mailsluice_operator.cluster.objects import SMTP_RELAY, SMTP_USER, Kind
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.reconcile.context import Key
from mailsluice_operator.reconcile.reconciler import KINDS

RESULTS = ("success", "error")
VERBS = ("get", "list", "apply", "patch", "create", "update", "delete")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All metrics of one process, in a registry of its own."""

    def __init__(self, store: Store, watched: Iterable[Kind], wall_clock: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._wall_clock = wall_clock
        self._reconciles = Counter(
            "mailsluice_operator_reconciles", "Reconciles that ended.", ["kind", "result"], registry=r
        )
        self._reconcile_seconds = Histogram(
            "mailsluice_operator_reconcile_seconds", "Length of a reconcile.", ["kind"], buckets=SECONDS, registry=r
        )
        self._depth = Gauge("mailsluice_operator_work_queue_depth", "Keys that are due and wait.", registry=r)
        self._wait = Histogram(
            "mailsluice_operator_work_queue_wait_seconds",
            "From when a key was due to its turn.",
            buckets=SECONDS,
            registry=r,
        )
        self._requests = Counter(
            "mailsluice_operator_api_requests",
            "Requests to the API server beside the watches; code 'error' is no answer.",
            ["verb", "code"],
            registry=r,
        )
        self._last_event = Gauge(
            "mailsluice_operator_watch_last_event_timestamp_seconds",
            "When the watch last told something.",
            ["resource"],
            registry=r,
        )
        self._leader = Gauge("mailsluice_operator_leader", "1 while this process reconciles.", registry=r)
        r.register(_Resources(store))
        for kind in KINDS:
            self._reconcile_seconds.labels(kind.name)
            for result in RESULTS:
                self._reconciles.labels(kind.name, result)
        for verb in VERBS:
            self._requests.labels(verb, "201" if verb == "create" else "200")
        for kind in watched:
            self._last_event.labels(kind.plural)

    def request(self, verb: str, code: str) -> None:
        self._requests.labels(verb, code).inc()

    def reconciled(self, key: Key, seconds: float, *, failed: bool) -> None:
        self._reconciles.labels(key.kind.name, "error" if failed else "success").inc()
        self._reconcile_seconds.labels(key.kind.name).observe(seconds)

    def waited(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def read_depth_from(self, depth: Callable[[], float]) -> None:
        self._depth.set_function(depth)

    def saw_event(self, kind: Kind) -> None:
        self._last_event.labels(kind.plural).set(self._wall_clock())

    def leads(self, leading: bool) -> None:
        self._leader.set(1 if leading else 0)


class _Resources(Collector):
    """Relays and users by readiness, counted when asked."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        for name, kind in (("relays", SMTP_RELAY), ("users", SMTP_USER)):
            counts = {"true": 0, "false": 0}
            for body in self._store.all(kind):
                conditions = (body.get("status") or {}).get("conditions") or ()
                ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
                counts["true" if ready else "false"] += 1
            family = GaugeMetricFamily(f"mailsluice_operator_{name}", f"{kind.name} objects.", labels=["ready"])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family
