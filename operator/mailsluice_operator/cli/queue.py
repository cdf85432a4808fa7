"""Queue commands: each is carried out by `mailsluice-relay queue` where the queue is, in pods or on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from mailsluice_operator import kubectl, local
from mailsluice_operator.cli.output import console, reported

queue = typer.Typer(
    help="Look after queued mail, on the cluster (`--relay`) or on this machine (`--data-dir`).", no_args_is_help=True
)

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; kubectl's own default.")]
OfRelay = Annotated[str | None, typer.Option("--relay", help="Name of a SmtpRelay on the cluster.")]
DataDirectory = Annotated[Path | None, typer.Option("--data-dir", help="Data directory of `mailsluice run`.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QueueId = Annotated[str, typer.Argument(help="The queue id, as in `250 2.0.0 OK: queued as ID`.")]

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
    state: Annotated[str, typer.Option(help="Only these: active, deferred or held.")] = "",
    login: Annotated[str, typer.Option(help="Only what this login sent.")] = "",
    recipient: Annotated[str, typer.Option(help="Only mail to this address.")] = "",
) -> None:
    """List queued messages, oldest first."""
    given = {"--state": state, "--login": login, "--recipient": recipient}
    filters = [text for pair in given.items() if pair[1] for text in pair]
    _everywhere("list", filters, namespace, relay, data_dir, as_json)


@queue.command()
def flush(
    namespace: Namespace = None, relay: OfRelay = None, data_dir: DataDirectory = None, as_json: AsJSON = False
) -> None:
    """Try everything that waits for its next attempt now."""
    _everywhere("flush", [], namespace, relay, data_dir, as_json)


def _per_message(action: str) -> Callable[..., None]:
    def command(
        queue_id: QueueId,
        namespace: Namespace = None,
        relay: OfRelay = None,
        data_dir: DataDirectory = None,
        as_json: AsJSON = False,
    ) -> None:
        with reported():
            if data_dir is not None:
                _print(action, [_here(data_dir, action, queue_id)], as_json)
                return
            for pod in _pods(namespace, relay):
                try:
                    answer = kubectl.exec_in(pod, namespace, *_command(action, queue_id))
                except kubectl.KubectlError as error:
                    if "no message" not in str(error):
                        raise
                    continue
                _print(action, [answer], as_json)
                return
            raise SystemExit(f"mailsluice: no message {queue_id} in the queue of {relay}; it may have been delivered")

    return command


for _action, _help in PER_MESSAGE.items():
    queue.command(_action, help=_help)(_per_message(_action))


def _everywhere(
    action: str, filters: list[str], namespace: str | None, relay: str | None, data_dir: Path | None, as_json: bool
) -> None:
    """Carry out `action` on every queue of the relay and show the answers together."""
    with reported():
        if data_dir is not None:
            answers = [_here(data_dir, action, *filters)]
        else:
            command = _command(action, *filters)
            answers = [kubectl.exec_in(pod, namespace, *command) for pod in _pods(namespace, relay)]
        _print(action, answers, as_json)


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


def _print(action: str, answers: list[str], as_json: bool) -> None:
    found: list[Any] = [json.loads(answer) for answer in answers]
    if action == "list":
        rows = sorted((row for listed in found for row in listed), key=lambda row: str(row["queue_id"]))
        console.print_json(data=rows) if as_json else _print_table(rows)
    elif as_json or action == "show":
        console.print_json(data=found[0] if len(found) == 1 else found)
    elif action == "flush":
        console.print(f"{sum(answer['flushed'] for answer in found)} messages are tried now")
    else:
        console.print(f"{found[0]['id']}: {action} done")


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.print("the queue holds no such message")
        return
    table = Table(
        "ID", "STATE", "AGE", "SIZE", "LOGIN", "SENDER", "RECIPIENTS", "LAST ANSWER", box=None, pad_edge=False
    )
    now = time.time()
    for row in rows:
        recipients = row["recipients"]
        more = f" +{len(recipients) - 1}" if len(recipients) > 1 else ""
        table.add_row(
            row["queue_id"],
            row["state"],
            f"{(now - row['received_at']) / 60:.0f}m",
            str(row["size"]),
            row["login"] or "-",
            row["sender"] or "<>",
            f"{recipients[0]['address']}{more}" if recipients else "-",
            recipients[0]["reply"] if recipients else "-",
        )
    console.print(table)
