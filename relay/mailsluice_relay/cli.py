"""`mailsluice-relay`: the command of the relay's pod.

People use `mailsluice`, which calls this one where the queue is; so its queue commands answer in JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from mailsluice_relay import app
from mailsluice_relay.config import ConfigurationError
from mailsluice_relay.spool.errors import SpoolError

DEFAULT_DATA = Path("/var/lib/mailsluice")
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
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz and /readyz; 0 picks one.")
    ] = 9090,
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
    except (ConfigurationError, SpoolError) as error:
        raise SystemExit(f"mailsluice-relay: {error}") from error
    except OSError as error:
        raise SystemExit(f"mailsluice-relay: cannot start: {error}") from error


@queue.command("list")
def list_messages(
    data_dir: DataDirectory = DEFAULT_DATA,
    state: Annotated[str, typer.Option(help="Only these: active, deferred or held.")] = "",
    login: Annotated[str, typer.Option(help="Only what this login sent.")] = "",
    recipient: Annotated[str, typer.Option(help="Only mail to this address.")] = "",
    limit: Annotated[int, typer.Option(help="How many at most.")] = 1000,
) -> None:
    """List queued messages, oldest first."""
    query = {name: value for name, value in (("state", state), ("login", login), ("recipient", recipient)) if value}
    ask(data_dir, "GET", "/queue", query | {"limit": str(limit)})


@queue.command()
def show(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Show one message: envelope, state of each recipient, last answer of the upstream."""
    ask(data_dir, "GET", f"/queue/{queue_id}")


@queue.command()
def flush(data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Try everything that waits for its next attempt now."""
    ask(data_dir, "POST", "/queue/flush")


@queue.command()
def hold(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Keep a message from being sent until it is released."""
    ask(data_dir, "POST", f"/queue/{queue_id}/hold")


@queue.command()
def release(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Send a held message."""
    ask(data_dir, "POST", f"/queue/{queue_id}/release")


@queue.command()
def requeue(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Try a message again from the start: attempts and waiting time are forgotten."""
    ask(data_dir, "POST", f"/queue/{queue_id}/requeue")


@queue.command()
def remove(queue_id: QueueId, data_dir: DataDirectory = DEFAULT_DATA) -> None:
    """Throw a message away. Nobody is told."""
    ask(data_dir, "POST", f"/queue/{queue_id}/remove")


def ask(data_dir: Path, method: str, path: str, query: Mapping[str, str] | None = None) -> None:
    """Print the relay's answer over its control socket; end the command with a message where there is none."""
    try:
        status, answer = asyncio.run(_ask(data_dir / "control.sock", method, path, query or {}))
    except (OSError, aiohttp.ClientError) as error:
        raise SystemExit(
            f"mailsluice-relay: no relay runs on {data_dir} (nothing answers at its control.sock); start it, or name "
            "the data directory of one that runs"
        ) from error
    if status >= 400:
        raise SystemExit(f"mailsluice-relay: {answer['error']}")
    print(json.dumps(answer, indent=2, ensure_ascii=False))


async def _ask(control: Path, method: str, path: str, query: Mapping[str, str]) -> tuple[int, Any]:
    connector = aiohttp.UnixConnector(str(control))
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.request(method, f"http://relay{path}", params=query) as response,
    ):
        return response.status, await response.json()
