"""What every reconcile works with: the cluster as known and as reachable, the clocks, and the operator's settings."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mailsluice_operator.children.facts import Fact
from mailsluice_operator.children.metadata import timestamp
from mailsluice_operator.children.workload import PodSettings
from mailsluice_operator.cluster.client import ApiError, Cluster
from mailsluice_operator.cluster.events import Recent
from mailsluice_operator.cluster.objects import NAMESPACE, Kind, Object, Reference
from mailsluice_operator.cluster.store import Store
from mailsluice_operator.reconcile.index import Index
from mailsluice_operator.status import UpstreamDown

log = logging.getLogger(__name__)

Key = Reference
"""What the work queue holds: the address of a SmtpRelay, of a SmtpUser, or of a Secret that may have lost its use."""


@dataclass(frozen=True)
class PodReport:
    """What a pod's /readyz answered."""

    revision: str
    draining: bool
    queued: int | None
    oldest_seconds: float = 0.0
    configuration_error: str = ""
    upstreams_down: tuple[UpstreamDown, ...] = ()
    limit_store_error: str | None = None
    engines_down: tuple[tuple[str, str], ...] = ()


Probe = Callable[[str], Awaitable[PodReport | None]]
"""Asks the pod at an address; None when it did not answer in time."""


@dataclass
class Context:
    """Shared by all reconciles; the queue makes sure that one key is worked on once at a time."""

    cluster: Cluster
    store: Store
    index: Index
    settings: PodSettings
    now: Callable[[], datetime.datetime]
    monotonic: Callable[[], float]
    randomness: Callable[[int], bytes]
    probe: Probe
    enqueue: Callable[[Key, float], None]
    namespaced: bool = False
    """Only some namespaces are watched, and Namespaces themselves cannot be."""
    unserved: frozenset[Kind] = frozenset()
    """Kinds of children that this cluster does not know."""
    own_logins: dict[Key, frozenset[str]] = field(default_factory=dict)
    """Each relay's own users, as `login_key` has them and as its last reconcile read them."""
    recent: Recent = field(init=False)

    def __post_init__(self) -> None:
        self.recent = Recent(self.monotonic)

    def namespace_goes(self, namespace: str) -> bool:
        """The namespace is being deleted, with everything in it. With a Role alone that cannot be known."""
        body = self.store.get(Reference(NAMESPACE, "", namespace))
        return body is not None and "deletionTimestamp" in body["metadata"]

    async def tell(self, about: Object, fact: Fact, *, warning: bool = True) -> None:
        """Post an Event, once for as long as it is news. The condition carries the same words and is what counts."""
        if not self.recent.is_news((about["metadata"]["uid"], *fact)):
            return
        kind = "Warning" if warning else "Normal"
        try:
            await self.cluster.post_event(
                about, kind=kind, reason=fact.reason, message=fact.message, at=timestamp(self.now())
            )
        except ApiError as error:  # a namespace that goes takes no Events, and a quota may be full
            log.warning("no Event about %s: %s", about["metadata"]["name"], error)
