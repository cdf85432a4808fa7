"""`mailsluice`, also as `kubectl mailsluice`: the command for people. A file a room; this one is the front door."""

from __future__ import annotations

from typing import Annotated

import typer

from mailsluice_operator.cli import files, objects, queue
from mailsluice_operator.cli.output import console

main = typer.Typer(
    help="Outgoing mail for a cluster: check and run relays, look after their queues.\n\n"
    "Start with `mailsluice demo`; then `mailsluice check -f relay.yaml` and `mailsluice run -f relay.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@main.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object of the counts.")] = False,
) -> None:
    """Run a relay here, send through it as eight applications, and show what it made of them. Takes a few seconds."""
    from mailsluice_operator import demo as demonstration  # half a second that the other commands need not wait

    demonstration.main(console, as_json)


main.command()(files.check)
main.command()(files.run)
main.command()(files.render)
main.command()(files.passwd)
main.add_typer(queue.queue, name="queue")
main.command()(objects.relays)
main.command()(objects.users)
