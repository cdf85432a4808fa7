"""Queue commands: each is carried out by `mailsluice-relay queue` where the queue is, in pods or on this machine."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mailsluice_operator import kubectl, local
from mailsluice_operator.cli.output import console, print_table, reported

queue = typer.Typer(
    help="Look after queued mail, on the cluster (`--relay`) or on this machine (`--data-dir`).", no_args_is_help=True
)

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; kubectl's own default.")]
OfRelay = Annotated[str | None, typer.Option("--relay", help="Name of a SmtpRelay on the cluster.")]
DataDirectory = Annotated[Path | None, typer.Option("--data-dir", help="Data directory of `mailsluice run`.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QueueId = Annotated[str, typer.Argument(help="The queue id, as in `250 2.0.0 OK: queued as ID`.")]


class QueueState(enum.StrEnum):
    """As the relay tells them."""

    ACTIVE = "active"
    DEFERRED = "deferred"
    HELD = "held"
    QUARANTINED = "quarantined"


PER_MESSAGE: Final = {
    "show": "Show one message: envelope, state of each recipient, last answer of the upstream.",
    "hold": "Keep a message from being sent until it is released.",
    "release": "Send a held message.",
    "requeue": "Try a message again from the start: attempts and waiting time are forgotten.",
    "remove": "Throw a message away. Nobody is told.",
}


@queue.command("list")
def list_messages(
    namespace: Namespace = None,
    relay: OfRelay = None,
    data_dir: DataDirectory = None,
    as_json: AsJSON = False,
    state: Annotated[QueueState | None, typer.Option(help="Only these.")] = None,
    login: Annotated[str, typer.Option(help="Only what this login sent.")] = "",
    recipient: Annotated[str, typer.Option(help="Only mail to this address.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many of each pod at most.")] = 1000,
) -> None:
    """List queued messages, oldest first."""
    given = {"--state": state or "", "--login": login, "--recipient": recipient, "--limit": str(limit)}
    filters = [text for pair in given.items() if pair[1] for text in pair]
    answers = _everywhere("list", filters, namespace, relay, data_dir)
    rows = sorted((row for listed in answers for row in listed), key=lambda row: str(row["queue_id"]))
    console.print_json(data=rows) if as_json else _print_table(rows)
    if any(len(listed) == limit for listed in answers):
        print(f"mailsluice: only the oldest {limit} of a queue are listed; --limit lists more", file=sys.stderr)


@queue.command()
def flush(
    namespace: Namespace = None, relay: OfRelay = None, data_dir: DataDirectory = None, as_json: AsJSON = False
) -> None:
    """Try everything that waits for its next attempt now."""
    answers = _everywhere("flush", [], namespace, relay, data_dir)
    flushed = sum(answer["flushed"] for answer in answers)
    console.print_json(data={"flushed": flushed}) if as_json else console.print(f"{flushed} messages are tried now")


def _per_message(action: str) -> Callable[..., None]:
    def command(
        queue_id: QueueId,
        namespace: Namespace = None,
        relay: OfRelay = None,
        data_dir: DataDirectory = None,
        as_json: AsJSON = False,
    ) -> None:
        _refuse_both(relay, data_dir)
        with reported():
            if data_dir is not None:
                _print(action, _here(data_dir, action, queue_id), as_json)
                return
            for pod in _pods(namespace, relay):
                try:
                    answer = kubectl.exec_in(pod, namespace, *_command(action, queue_id))
                except kubectl.KubectlError as error:
                    if "no message" not in str(error):
                        raise
                    continue
                _print(action, answer, as_json)
                return
            raise SystemExit(f"mailsluice: no message {queue_id} in the queue of {relay}; it may have been delivered")

    return command


for _action, _help in PER_MESSAGE.items():
    queue.command(_action, help=_help)(_per_message(_action))


def _everywhere(
    action: str, filters: list[str], namespace: str | None, relay: str | None, data_dir: Path | None
) -> list[Any]:
    """Carry out `action` on every queue of the relay; their answers."""
    _refuse_both(relay, data_dir)
    with reported():
        if data_dir is not None:
            return [json.loads(_here(data_dir, action, *filters))]
        command = _command(action, *filters)
        return [json.loads(kubectl.exec_in(pod, namespace, *command)) for pod in _pods(namespace, relay)]


def _refuse_both(relay: str | None, data_dir: Path | None) -> None:
    if relay is not None and data_dir is not None:
        raise typer.BadParameter("give --relay (cluster) or --data-dir (this machine), not both")


def _command(action: str, *arguments: str) -> tuple[str, ...]:
    return ("mailsluice-relay", "queue", action, *arguments)


def _pods(namespace: str | None, relay: str | None) -> list[str]:
    if relay is None:
        raise SystemExit("mailsluice: which queue? give --relay NAME (cluster) or --data-dir DIR (this machine)")
    pods = kubectl.pods_of(relay, namespace)
    if not pods:
        raise SystemExit(f"mailsluice: relay {relay} has no running pod in this namespace; see `mailsluice relays -A`")
    return pods


def _here(data_dir: Path, action: str, *arguments: str) -> str:
    command = [local.relay_program(), "queue", action, *arguments, "--data-dir", str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no shell)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def _print(action: str, answer: str, as_json: bool) -> None:
    found: dict[str, Any] = json.loads(answer)
    if as_json or action == "show":
        console.print_json(data=found)
    else:
        console.print(f"{found['id']}: {action} done")


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.print("the queue holds no such message")
        return
    now = time.time()
    columns = ("ID", "STATE", "AGE", "SIZE", "LOGIN", "SENDER", "RECIPIENTS", "LAST ANSWER")
    print_table(columns, [_cells(row, now) for row in rows])


def _cells(row: dict[str, Any], now: float) -> list[str]:
    recipients = row["recipients"]
    more = f" +{len(recipients) - 1}" if len(recipients) > 1 else ""
    return [
        row["queue_id"],
        row["state"],
        f"{(now - row['received_at']) / 60:.0f}m",
        str(row["size"]),
        row["login"] or "-",
        row["sender"] or "<>",
        f"{recipients[0]['address']}{more}" if recipients else "-",
        recipients[0]["reply"] if recipients else "-",
    ]
