"""Commands that list the resources of the cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mailsluice_operator import kubectl
from mailsluice_operator.cli.output import console, print_table, reported

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; kubectl's own default.")]
Everywhere = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")]


def relays(namespace: Namespace = None, everywhere: Everywhere = False) -> None:
    """List the SmtpRelays of the cluster and why each does or does not take mail."""
    columns = ("name", "namespace", "ready", "reason", "replicas", "queued", "users")
    with reported():
        found = kubectl.get("smtprelays.mailsluice.dev", namespace, everywhere)
    print_objects(columns, [relay_row(relay) for relay in found], "SmtpRelay")


def users(namespace: Namespace = None, everywhere: Everywhere = False) -> None:
    """List the SmtpUsers of the cluster and whether their relay took them."""
    columns = ("name", "namespace", "login", "ready", "reason", "relay")
    with reported():
        found = kubectl.get("smtpusers.mailsluice.dev", namespace, everywhere)
    print_objects(columns, [user_row(user) for user in found], "SmtpUser")


def relay_row(relay: dict[str, Any]) -> list[str]:
    status = relay.get("status", {})
    ready = condition(relay, "Ready")
    return [
        relay["metadata"]["name"],
        relay["metadata"]["namespace"],
        ready.get("status", "Unknown"),
        ready.get("reason", "-"),
        str(status.get("replicas", 0)),
        str(status.get("queuedMessages", 0)),
        str(status.get("users", 0)),
    ]


def user_row(user: dict[str, Any]) -> list[str]:
    ready = condition(user, "Ready")
    reference = user["spec"]["relayRef"]
    return [
        user["metadata"]["name"],
        user["metadata"]["namespace"],
        user["spec"]["login"],
        ready.get("status", "Unknown"),
        ready.get("reason", "-"),
        f"{reference.get('namespace', user['metadata']['namespace'])}/{reference['name']}",
    ]


def condition(found: dict[str, Any], kind: str) -> dict[str, str]:
    return next((entry for entry in found.get("status", {}).get("conditions", ()) if entry["type"] == kind), {})


def print_objects(columns: tuple[str, ...], rows: list[list[str]], kind: str) -> None:
    if not rows:
        console.print(f"no {kind} found; try --all-namespaces")
        return
    print_table([name.upper() for name in columns], rows)
