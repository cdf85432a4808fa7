"""A relay's pods: what they report, and the nudge that makes the kubelet hand them a new configuration at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mailsluice_operator.children.metadata import REVISION_ANNOTATION
from mailsluice_operator.cluster.client import NotFoundError
from mailsluice_operator.cluster.objects import POD, Object, Reference, annotations_of
from mailsluice_operator.reconcile.context import Context, Key, PodReport
from mailsluice_operator.status import PodView

FRESH: Final = 30.0
"""Seconds for which a pod's report is good enough, so that queue counts do not write a status every moment."""
FRESH_WHILE_CHANGING: Final = 2.0
"""The same while a pod still has to take up a configuration or to empty its queue."""
FRESH_SILENCE: Final = 10.0
"""The same for no answer: the pod has just started, or a NetworkPolicy hides it and each try takes two seconds."""
_UNSCHEDULABLE: Final = ("PodScheduled", "False", "Unschedulable")


@dataclass
class _Answer:
    at: float
    report: PodReport | None


class Pods:
    """Reports of pods by their uid."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._answers: dict[Key, dict[str, _Answer]] = {}

    def of(self, relay: Key) -> list[Object]:
        """The relay's pods, by name."""
        members = self._context.store.labelled(relay.namespace, relay.name)
        return [body for where, body in members.items() if where.kind is POD]

    def forget(self, relay: Key) -> None:
        self._answers.pop(relay, None)

    async def views(self, relay: Key, revision: str, *, changing: bool) -> tuple[PodView, ...]:
        """The relay's pods as they report themselves; asked anew when the last answer is too old.

        `changing` says that an answer is waited for, so that an older one than a few seconds is too old.
        """
        pods = self.of(relay)
        answers = self._answers.setdefault(relay, {})
        now = self._context.monotonic()
        uids = {pod["metadata"]["uid"] for pod in pods}
        for gone in answers.keys() - uids:
            del answers[gone]
        stale = [pod for pod in pods if _address(pod) and self._too_old(answers, pod, revision, now, changing)]
        reports = await asyncio.gather(*(self._context.probe(_address(pod)) for pod in stale))
        for pod, report in zip(stale, reports, strict=True):
            answers[pod["metadata"]["uid"]] = _Answer(now, report)
        return tuple(_view(pod, answers.get(pod["metadata"]["uid"])) for pod in pods)

    @staticmethod
    def _too_old(answers: Mapping[str, _Answer], pod: Object, revision: str, now: float, changing: bool) -> bool:
        answer = answers.get(pod["metadata"]["uid"])
        if answer is None:
            return True
        if answer.report is None:
            return now - answer.at >= FRESH_SILENCE
        return now - answer.at >= (FRESH_WHILE_CHANGING if changing or answer.report.revision != revision else FRESH)

    async def nudge(self, relay: Key, revision: str) -> None:
        """Patch an annotation of each running pod once a revision: the kubelet then refreshes its mounts at once.

        Without it a mounted Secret follows within the kubelet's sync period and cache delay, about a minute.
        """
        for pod in self.of(relay):
            if pod["status"].get("phase") != "Running" or annotations_of(pod).get(REVISION_ANNOTATION) == revision:
                continue
            where = Reference(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
            try:
                self._context.store.put(
                    POD, await self._context.cluster.annotate(where, {REVISION_ANNOTATION: revision})
                )
            except NotFoundError:  # it went meanwhile, and its successor mounts the newest anyway
                self._context.store.discard(where)


def drained(views: Sequence[PodView], name: str) -> dict[int, int | None]:
    """How many messages each ordinal still has, of the pods that have taken up that they are to drain."""
    found: dict[int, int | None] = {}
    for view in views:
        ordinal = view.name.removeprefix(f"{name}-")
        if ordinal.isdigit() and view.draining:
            found[int(ordinal)] = view.queued
    return found


def is_ready(pod: Object) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod["status"].get("conditions") or ()
    )


def _address(pod: Object) -> str:
    """Empty for a pod that has none, or whose container does not run."""
    return pod["status"].get("podIP", "") if pod["status"].get("phase") == "Running" else ""


def _view(pod: Object, answer: _Answer | None) -> PodView:
    report = answer.report if answer is not None else None
    unschedulable = None
    running = pod["status"].get("phase") == "Running"  # the scheduler may have written last, all the same
    for condition in () if running else pod["status"].get("conditions") or ():
        if (condition["type"], condition["status"], condition.get("reason")) == _UNSCHEDULABLE:
            unschedulable = condition.get("message") or "no reason given"
    return PodView(
        name=pod["metadata"]["name"],
        ready=is_ready(pod),
        running=running,
        revision=report.revision if report is not None else None,
        draining=report is not None and report.draining,
        queued=report.queued if report is not None else None,
        oldest_seconds=report.oldest_seconds if report is not None else 0.0,
        configuration_error=report.configuration_error if report is not None else "",
        upstreams_down=report.upstreams_down if report is not None else (),
        limit_store_error=report.limit_store_error if report is not None else None,
        engines_down=report.engines_down if report is not None else (),
        unschedulable=unschedulable,
    )
