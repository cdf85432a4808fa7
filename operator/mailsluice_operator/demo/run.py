"""Runs the demo: starts upstream and relay, lets the applications send, keeps the counts current."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
from aiosmtpd.smtp import SMTP, Envelope, Session
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live

from mailsluice_operator.demo.applications import PASSWORDS, Application, applications, flood
from mailsluice_operator.demo.view import PlainView, TerminalView, Totals, View, conclude
from mailsluice_operator.local import LocalRelay, Started
from mailsluice_relay.config import hash_password

TIMEOUT: Final = 10.0
"""Seconds for the mail to come out at the end, and for each look at the metrics."""

RESOURCES: Final = """\
apiVersion: v1
kind: Secret
metadata: {{name: demo-users, namespace: demo}}
stringData:
  htpasswd: |
{htpasswd}
---
apiVersion: mailsluice.dev/v1alpha1
kind: SmtpRelay
metadata: {{name: demo, namespace: demo}}
spec:
  hostname: relay.example.test
  authentication:
    users:
    - secretRef: {{name: demo-users}}
  senders:
    allowedDomains: [example.test]
    ownership: Enforce
  rateLimits:
  - {{name: user-minute, per: User, unit: Messages, limit: 10, window: 1m}}
  upstreams:
  - name: catcher
    host: 127.0.0.1
    port: {port}
    tls: {{mode: Plain}}
"""


class Catcher:
    """The embedded upstream: takes every mail and counts it."""

    def __init__(self) -> None:
        self.delivered = 0
        self._arrival = asyncio.Condition()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 (aiosmtpd's name)
        async with self._arrival:
            self.delivered += 1
            self._arrival.notify_all()
        return "250 2.0.0 OK"

    async def all_of(self, count: int) -> None:
        """Returns when `count` mails have come."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: self.delivered >= count)


async def run(view: View, senders: list[Application]) -> Totals:
    """Run the demo to its end; shows its course on `view`."""
    catcher = Catcher()
    upstream = await asyncio.get_running_loop().create_server(
        lambda: SMTP(catcher, hostname="upstream.example.org"), "127.0.0.1", 0
    )
    port = upstream.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="mailsluice-demo-") as folder:
        async with upstream:
            return await _run(view, senders, catcher, port, Path(folder))


async def _run(view: View, senders: list[Application], catcher: Catcher, port: int, folder: Path) -> Totals:
    resources = folder / "demo.yaml"
    htpasswd = "\n".join(
        f"    {login}:{hash_password(password, login.encode())}" for login, password in PASSWORDS.items()
    )
    resources.write_text(RESOURCES.format(htpasswd=htpasswd, port=port))
    relay = LocalRelay(
        [resources],
        data_directory=folder / "data",
        ports={"smtp": 0, "submissions": 0, "submission": 0},
        http_port=0,
        quiet=True,
    )
    async with relay.started() as started, watch(started, catcher, view, senders) as totals:
        # One after the other, so that the reader can follow; the flood goes on beside the rest.
        flooding = [sender for sender in senders if sender.send is flood]
        others = [sender for sender in senders if sender.send is not flood]
        beside = asyncio.gather(*(asyncio.to_thread(sender.send, started, sender) for sender in flooding))
        for sender in others:
            await asyncio.to_thread(sender.send, started, sender)
        await beside
        accepted = sum(sender.sent for sender in senders)
        async with asyncio.timeout(TIMEOUT):
            await catcher.all_of(accepted)
        await refresh(totals, started, catcher)
        view.show(totals, senders)
    return totals


@contextlib.asynccontextmanager
async def watch(started: Started, catcher: Catcher, view: View, senders: list[Application]) -> AsyncIterator[Totals]:
    """Keeps `Totals` current from the relay's metrics, four times a second, while the applications send."""
    totals = Totals()

    async def follow() -> None:
        while True:
            await refresh(totals, started, catcher)
            view.show(totals, senders)
            await asyncio.sleep(0.25)

    following = asyncio.create_task(follow())
    try:
        yield totals
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def refresh(totals: Totals, started: Started, catcher: Catcher) -> None:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as client,
        client.get(f"http://{started.http}/metrics") as response,
    ):
        text = await response.text()
    sessions: Counter[str] = Counter(dict.fromkeys(totals.sessions, 0))
    reasons: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "mailsluice_sessions_total":
                sessions[sample.labels["result"]] += int(sample.value)
                if sample.labels["result"] == "rejected" and sample.value:
                    reasons[sample.labels["reason"]] += int(sample.value)
            elif sample.name == "mailsluice_messages_total" and sample.labels["result"] == "deferred" and sample.value:
                reasons[sample.labels["reason"]] += int(sample.value)
    totals.sessions = dict(sessions)
    totals.refused_reasons = dict(reasons)
    totals.delivered = catcher.delivered


def main(console: Console, as_json: bool) -> None:
    """The command: live on a terminal, plain lines elsewhere, JSON last when asked."""
    console.print("A relay, an upstream that catches its mail, and eight applications: all on this machine.\n")
    senders = applications()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            totals = asyncio.run(run(TerminalView(live), senders))
    else:
        totals = asyncio.run(run(PlainView(console.print), senders))
    conclude(console, totals, senders)
    if as_json:
        print(
            json.dumps(
                {
                    "sessions": totals.sessions,
                    "delivered": totals.delivered,
                    "refused_reasons": totals.refused_reasons,
                }
            )
        )
