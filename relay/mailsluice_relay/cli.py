"""`mailsluice-relay`: the command of the relay's pod. People use `mailsluice`, which calls this one where the queue is."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from mailsluice_relay import app
from mailsluice_relay.config import ConfigurationError

DEFAULT_DATA = Path("/var/lib/mailsluice")
COLUMNS = ("id", "state", "age", "size", "login", "sender", "recipients", "error")

main = typer.Typer(
    help="Run a relay, and look after its queue.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
queue = typer.Typer(help="Look after the queue of the relay that runs on a data directory.", no_args_is_help=True)
main.add_typer(queue, name="queue")

DataDirectory = Annotated[
    Path,
    typer.Option(
        "--data-dir", envvar="MAILSLUICE_DATA_DIR", help="The relay's data directory: its queue and its control socket."
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
QueueId = Annotated[str, typer.Argument(help="The queue id, as in `250 2.0.0 OK: queued as ID`.")]


@main.command()
def serve(
    config_dir: Annotated[
        Path, typer.Option(help="Directory with config/ and credentials/, as the operator mounts them.")
    ],
    data_dir: DataDirectory = DEFAULT_DATA,
    bind: Annotated[
        list[str] | None, typer.Option(help="Address to listen on; may be given twice (IPv4 and IPv6).")
    ] = None,
    http_port: Annotated[int, typer.Option(help="Port of /metrics, /healthz and /readyz; 0 picks one.")] = 9090,
    ready_file: Annotated[Path | None, typer.Option(help="Written (JSON) when every listener accepts.")] = None,
    grace: Annotated[float, typer.Option(help="Seconds to finish sessions and deliveries after SIGTERM.")] = 25.0,
) -> None:
    """Accept mail, make it durable, deliver it. Runs until SIGTERM; SIGHUP reads the configuration again."""
    try:
        app.serve(
            app.Options(
                config_directory=config_dir,
                data_directory=data_dir,
                bind=tuple(bind or ("127.0.0.1",)),
                http_port=http_port,
                ready_file=ready_file,
                grace=grace,
            )
        )
    except ConfigurationError as error:
        raise SystemExit(f"mailsluice-relay: {error}") from error
    except OSError as error:
        raise SystemExit(f"mailsluice-relay: cannot start: {error}") from error


@queue.command("list")
def list_messages(
    data_dir: DataDirectory = DEFAULT_DATA,
    as_json: AsJSON = False,
    state: Annotated[str, typer.Option(help="Only these: active, deferred or held.")] = "",
    login: Annotated[str, typer.Option(help="Only what this login sent.")] = "",
    recipient: Annotated[str, typer.Option(help="Only mail to this address.")] = "",
    limit: Annotated[int, typer.Option(help="How many at most.")] = 1000,
) -> None:
    """List queued messages, oldest first."""
    query = {name: value for name, value in (("state", state), ("login", login), ("recipient", recipient)) if value}
    found = ask(data_dir, "GET", "/queue", query | {"limit": str(limit)})
    print_json(found) if as_json else print_table(found)


@queue.command()
def show(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Show one message: envelope, state of each recipient, last answer of the upstream."""
    print_json(ask(data_dir, "GET", f"/queue/{queue_id}"))


@queue.command()
def flush(data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Try everything that waits for its next attempt now."""
    done = ask(data_dir, "POST", "/queue/flush")
    print_json(done) if as_json else print(f"{done['flushed']} messages are tried now")


def act(data_dir: Path, queue_id: str, action: str, as_json: bool) -> None:
    done = ask(data_dir, "POST", f"/queue/{queue_id}/{action}")
    print_json(done) if as_json else print(f"{queue_id}: {action} done")


@queue.command()
def hold(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Keep a message from being sent until it is released."""
    act(data_dir, queue_id, "hold", as_json)


@queue.command()
def release(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Send a held message."""
    act(data_dir, queue_id, "release", as_json)


@queue.command()
def requeue(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Try a message again from the start: attempts and waiting time are forgotten."""
    act(data_dir, queue_id, "requeue", as_json)


@queue.command()
def remove(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA, as_json: AsJSON = False) -> None:
    """Throw a message away. Nobody is told."""
    act(data_dir, queue_id, "remove", as_json)


def ask(data_dir: Path, method: str, path: str, query: Mapping[str, str] | None = None) -> Any:
    """The relay's answer over its control socket; ends the command with a message where there is none."""
    try:
        status, answer = asyncio.run(_ask(data_dir / "control.sock", method, path, query or {}))
    except (OSError, aiohttp.ClientError) as error:
        raise SystemExit(
            f"mailsluice-relay: no relay runs on {data_dir}: {error}; start it, or name --data-dir"
        ) from error
    if status >= 400:
        raise SystemExit(f"mailsluice-relay: {answer['error']}")
    return answer


async def _ask(control: Path, method: str, path: str, query: Mapping[str, str]) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(control)), timeout=aiohttp.ClientTimeout(total=60)
        ) as session,
        session.request(method, f"http://relay{path}", params=query) as response,
    ):
        return response.status, await response.json()


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns in plain text, as wide as their content."""
    lines = [[name.upper() for name in COLUMNS], *([cell(row.get(name)) for name in COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if not rows:
        print("the queue holds no such message", file=sys.stderr)


def cell(value: object) -> str:
    if isinstance(value, list):
        more = f" +{len(value) - 1}" if len(value) > 1 else ""
        return f"{value[0]}{more}" if value else "-"
    return "-" if value in (None, "") else str(value)
