"""The rules of the status: what each condition means, and that the same observation is the same status."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest

from mailsluice_operator.children.facts import Fact
from mailsluice_operator.resource.status import Condition, DNSRecord, SmtpRelayStatus, SmtpUserStatus
from mailsluice_operator.status import PodView, RelayView, UpstreamDown, endpoints, relay_status, user_status

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
LATER = NOW + datetime.timedelta(hours=1)
CURRENT = PodView(name="out-0", ready=True, revision="r1", queued=0)
WORKING = {
    "generation": 3,
    "wanted_replicas": 1,
    "replicas": 1,
    "ready_replicas": 1,
    "updated_replicas": 1,
    "revision": "r1",
    "pods": (CURRENT,),
}


def status(before: SmtpRelayStatus | None = None, now: datetime.datetime = NOW, **view: Any) -> SmtpRelayStatus:
    return relay_status(before or SmtpRelayStatus(), RelayView(**{**WORKING, **view}), now)


def of(found: SmtpRelayStatus | SmtpUserStatus, kind: str) -> Condition:
    (condition,) = [condition for condition in found.conditions if condition.type == kind]
    return condition


def truth(found: SmtpRelayStatus) -> dict[str, str]:
    return {condition.type: condition.status for condition in found.conditions}


HEALTHY = {
    "Ready": "True",
    "Reconciling": "False",
    "Stalled": "False",
    "ConfigurationValid": "True",
    "Degraded": "False",
    "Paused": "False",
}


@pytest.mark.parametrize(
    ("view", "differs"),
    [
        ({}, {}),
        ({"ready_replicas": 0}, {"Ready": "False", "Reconciling": "True"}),
        ({"wanted_replicas": 2}, {"Reconciling": "True"}),
        ({"rolled_out": False}, {"Reconciling": "True"}),
        ({"pods": (PodView(name="out-0", ready=True, revision="r0"),)}, {"Reconciling": "True"}),
        ({"pods": (PodView(name="out-0", ready=True),)}, {}),  # one that cannot be reached is not waited for
        (
            {"invalid": Fact("SecretNotFound", "x")},
            {"Stalled": "True", "ConfigurationValid": "False", "Degraded": "Unknown"},
        ),
        (
            {"invalid": Fact("SecretNotFound", "x"), "degraded": (Fact("QueueOld", "x"),)},
            {"Stalled": "True", "ConfigurationValid": "False", "Degraded": "True"},
        ),
        ({"blocked": Fact("NameTaken", "x")}, {"Stalled": "True"}),
        ({"degraded": (Fact("QueueOld", "x"),)}, {"Degraded": "True"}),
        (
            {"pods": (PodView(name="a", ready=True, revision="r1", upstreams_down=(UpstreamDown("u", "e"),)),)},
            {"Degraded": "True"},
        ),
        (
            {"pods": (PodView(name="a", ready=True, revision="r1", limit_store_error="no answer"),)},
            {"Degraded": "True"},
        ),
        (
            {"pods": (PodView(name="a", ready=True, revision="r1", engines_down=(("clamd", "e"),)),)},
            {"Degraded": "True"},
        ),
        ({"paused": True}, {"Paused": "True"}),
        ({"deleting": Fact("Draining", "x")}, {"Ready": "False", "Reconciling": "True"}),
        (
            {"wanted_replicas": 0, "replicas": 0, "ready_replicas": 0, "updated_replicas": 0, "pods": ()},
            {"Ready": "False"},
        ),
    ],
)
def test_each_observation_changes_the_conditions_that_it_is_about(view: Any, differs: dict[str, str]) -> None:
    assert truth(status(**view)) == {**HEALTHY, **differs}


def test_a_relay_with_a_broken_configuration_stays_ready_on_the_last_good_one() -> None:
    broken = Fact("SecretInvalid", "spec.x: Secret a/b has no key c; add it.")
    assert of(status(invalid=broken), "Ready").status == "True"
    never = status(invalid=broken, revision="", ready_replicas=0, pods=())
    assert of(never, "Ready").reason == "SecretInvalid"
    assert of(never, "ConfigurationValid").message == broken.message


def test_the_same_observation_later_is_the_same_status() -> None:
    first = status()
    assert status(first, LATER) == first


def test_a_conditions_time_moves_only_when_its_status_flips() -> None:
    first = status()
    second = status(first, LATER, ready_replicas=0)
    assert of(second, "Ready").last_transition_time == "2026-01-01T01:00:00Z"
    assert of(second, "Paused").last_transition_time == "2026-01-01T00:00:00Z"
    third = status(second, LATER + datetime.timedelta(hours=1), ready_replicas=0, wanted_replicas=2)
    assert of(third, "Ready").message != of(second, "Ready").message
    assert of(third, "Ready").last_transition_time == "2026-01-01T01:00:00Z"


def test_several_shortcomings_are_one_condition_with_everyones_words() -> None:
    found = of(status(degraded=(Fact("A", "First."), Fact("B", "Second."), Fact("B", "Second."))), "Degraded")
    assert (found.reason, found.message) == ("A", "First. Second.")


def test_pods_that_run_the_revision_are_counted() -> None:
    pods = (CURRENT, PodView(name="out-1", ready=True, revision="r0"), PodView(name="out-2", ready=False))
    configuration = status(pods=pods).configuration
    assert configuration is not None
    assert (configuration.revision, configuration.pods_current, configuration.pods_total) == ("r1", 1, 3)


def test_what_is_not_known_now_is_kept() -> None:
    first = status(users=5, queued=7)
    second = status(first)
    assert (second.users, second.queued_messages) == (5, 7)


def test_every_condition_tells_the_generation_it_is_about() -> None:
    found = status(generation=9)
    assert {condition.observed_generation for condition in found.conditions} == {9} == {found.observed_generation}


def test_endpoints_name_host_and_port() -> None:
    assert [(e.name, e.address) for e in endpoints("out.mail.svc", [("smtp", 25)])] == [("smtp", "out.mail.svc:25")]
    assert endpoints("2001:db8::1", [("smtp", 25)])[0].address == "[2001:db8::1]:25"


def test_a_refused_user_is_neither_accepted_nor_ready_and_gets_no_login() -> None:
    common: dict[str, Any] = {
        "generation": 1,
        "login": "a@b.test",
        "secret_name": "a-smtp",
        "suspended": False,
        "now": NOW,
    }
    refused = user_status(SmtpUserStatus(), refused=Fact("NotAllowed", "x"), unready=None, **common)
    assert (of(refused, "Accepted").reason, of(refused, "Ready").reason) == ("NotAllowed", "NotAllowed")
    assert refused.login is None
    waiting = user_status(refused, refused=None, unready=Fact("RelayNotReady", "x"), **common)
    assert (of(waiting, "Accepted").status, of(waiting, "Ready").status) == ("True", "False")
    ready = user_status(waiting, refused=None, unready=None, **common)
    assert (of(ready, "Ready").status, ready.login, ready.secret_name) == ("True", "a@b.test", "a-smtp")


@pytest.mark.parametrize(
    ("refuses", "reason"), [(False, "UpstreamUnreachable"), (True, "UpstreamAuthenticationFailed")]
)
def test_an_upstream_that_refuses_the_login_is_told_apart(refuses: bool, reason: str) -> None:
    pod = PodView(name="a", ready=True, revision="r1", upstreams_down=(UpstreamDown("provider", "no", refuses),))
    found = of(status(pods=(pod, CURRENT)), "Degraded")
    assert found.reason == reason
    assert "provider" in found.message


def test_who_is_asked_about_mail_and_does_not_answer_is_named_once() -> None:
    pods = tuple(
        PodView(
            name=name,
            ready=True,
            revision="r1",
            limit_store_error="connection refused",
            engines_down=(("clamd", "no verdict within 20 s"), ("rspamd", "it answered 500")),
        )
        for name in ("out-0", "out-1")
    )
    found = of(status(pods=pods), "Degraded")
    assert found.reason == "LimitStoreUnavailable"
    for words in ("connection refused", "Engine clamd", "no verdict within 20 s", "Engine rspamd"):
        assert found.message.count(words) == 1


def test_mail_that_waits_too_long_degrades_and_its_age_writes_no_status() -> None:
    def waiting(seconds: float) -> SmtpRelayStatus:
        return status(pods=(dataclasses.replace(CURRENT, oldest_seconds=seconds),))

    assert of(waiting(3599), "Degraded").status == "False"
    assert of(waiting(3700), "Degraded").reason == "QueueOld"
    assert waiting(3700) == waiting(9000)
    assert truth(waiting(3700))["Ready"] == "True"


def test_a_pod_that_refuses_a_configuration_is_named_with_its_reason() -> None:
    refusing = dataclasses.replace(CURRENT, revision="r0", configuration_error="listeners: cannot change")
    found = status(pods=(refusing,))
    assert of(found, "Degraded").reason == "ConfigurationRefused"
    assert "out-0" in of(found, "Degraded").message
    assert "listeners: cannot change" in of(found, "Degraded").message


def test_records_for_dns_stay_while_they_cannot_be_made_up() -> None:
    record = DNSRecord(name="example.test", type="TXT", value="v=spf1 -all", purpose="SPF")
    before = status(dns_records=(record,))
    assert before.dns_records == (record,)
    assert status(before).dns_records == (record,)
    assert status(before, dns_records=()).dns_records == ()
