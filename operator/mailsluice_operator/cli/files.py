"""Commands on files, without a cluster: check, run, render, passwd."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from mailsluice_operator import local
from mailsluice_operator.cli.output import console, reported
from mailsluice_operator.resource.files import Severity, check_files
from mailsluice_relay.config import hash_password

DEFAULT_IMAGE = "mailsluice-relay"

Files = Annotated[
    list[Path],
    typer.Option("--file", "-f", help="YAML with SmtpRelay, SmtpUser and Secret objects; may be given again."),
]


def check(
    files: Files,
    strict: Annotated[bool, typer.Option(help="Objects that the files do not hold are errors too.")] = False,
) -> None:
    """Validate files without a cluster: schema, rules, references. Exit code 1 when something is wrong."""
    findings = check_files(files, strict=strict)
    for finding in findings:
        print(finding)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    if errors:
        raise typer.Exit(1)
    console.print(
        f"{plural(len(files), 'file')} checked: no errors, {plural(len(findings), 'warning')}",
        style="green",
        highlight=False,
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def render(
    files: Files,
    relay: Annotated[str | None, typer.Option(help="Which SmtpRelay, where the files hold several.")] = None,
    image: Annotated[str, typer.Option(help="The relay's image, as the operator is told it.")] = DEFAULT_IMAGE,
) -> None:
    """Print the objects that the operator would make of the files, as YAML. Secret values are left out."""
    with reported():
        YAML().dump_all(local.render(files, relay, image), sys.stdout)


def run(
    files: Files,
    relay: Annotated[str | None, typer.Option(help="Which SmtpRelay, where the files hold several.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The queue; a second run on it continues. Default: in the user's state directory."),
    ] = None,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        list[str] | None, typer.Option(metavar="LISTENER=PORT", help="Port of one listener; 0 picks a free one.")
    ] = None,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz and /readyz; 0 picks a free one.")
    ] = 9090,
    ready_file: Annotated[Path | None, typer.Option(help="JSON written when every listener accepts.")] = None,
) -> None:
    """Run one SmtpRelay of the files on this machine, without a cluster.

    SIGTERM or Ctrl-C drains and ends. A changed file, or SIGHUP, is taken over while it runs.
    """
    with reported():
        local.run(
            local.LocalRelay(
                files,
                name=relay,
                data_directory=data_dir,
                bind=bind,
                ports=dict(map(listener_port, port or ())),
                http_port=http_port,
            ),
            ready_file=ready_file,
        )


def passwd(login: Annotated[str, typer.Argument(help="The full e-mail address.")]) -> None:
    """Print a htpasswd line for LOGIN: the password is asked for, or read from standard input."""
    local_part, _, domain = login.partition("@")
    if not local_part or not domain or "@" in domain or ":" in login or any(map(str.isspace, login)):
        raise SystemExit(f"mailsluice: {login}: not a login; give the full e-mail address, as in shop@example.com")
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password for {login}: ")
        if getpass.getpass("Again: ") != password:
            raise SystemExit("mailsluice: the passwords differ; nothing was written")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise SystemExit("mailsluice: an empty password lets everybody in; give one")
    print(f"{login}:{hash_password(password, os.urandom(16))}")


def listener_port(text: str) -> tuple[str, int]:
    """`LISTENER=PORT` as a pair."""
    name, equals, number = text.partition("=")
    if not (name and equals and number.isascii() and number.isdecimal() and int(number) < 65536):
        raise typer.BadParameter(f"{text}: expected LISTENER=PORT, as in submission=10587")
    return name, int(number)
