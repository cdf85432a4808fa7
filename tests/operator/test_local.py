"""`mailsluice run`: the main job without a cluster, with real processes, sockets and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from mailsluice_relay.config import hash_password

MAILSLUICE = str(Path(sys.executable).with_name("mailsluice"))
LOGIN, PASSWORD = "shop@example.test", "shop-password"

RELAY = """\
apiVersion: v1
kind: Secret
metadata: {{name: shop-users}}
stringData:
  htpasswd: |
    {user}
---
apiVersion: mailsluice.dev/v1alpha1
kind: SmtpRelay
metadata: {{name: outbound}}
spec:
  hostname: mail.example.test
  authentication:
    users:
    - secretRef: {{name: shop-users}}
  senders:
    allowedDomains: [example.test]
  upstreams:
  - name: provider
    host: 127.0.0.1
    port: {port}
    tls: {{mode: Plain}}
  queue: {{retry: {{initial: 1s, maximum: 2s}}}}
"""


class Sink:
    """The next server: keeps the subject of what it took."""

    def __init__(self) -> None:
        self.subjects: list[str] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        lines = envelope.content.decode().splitlines()
        self.subjects += [line.removeprefix("Subject: ") for line in lines if line.startswith("Subject: ")]
        return "250 2.0.0 OK"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: str, holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def sink_on(port: int) -> Iterator[Sink]:
    sink = Sink()
    controller = Controller(sink, hostname="127.0.0.1", port=port, server_hostname="sink.example.test")
    controller.start()
    try:
        yield sink
    finally:
        controller.stop()


class Running:
    """A `mailsluice run` process, and how to talk to its relay."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready

    @contextlib.contextmanager
    def client(self, listener: str, password: str | None = PASSWORD) -> Iterator[smtplib.SMTP]:
        host, port = self.ready["listeners"][listener].split(":")
        context = ssl.create_default_context(cafile=self.ready["ca"])
        context.check_hostname = False
        client: smtplib.SMTP
        if listener == "submissions":
            client = smtplib.SMTP_SSL(host, int(port), context=context, timeout=20)
        else:
            client = smtplib.SMTP(host, int(port), timeout=20)
            client.starttls(context=context)
        with client:
            if password is not None:
                client.login(LOGIN, password)
            yield client

    def readiness(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.ready['http']}/readyz", timeout=10) as reply:
            return json.loads(reply.read())


def message(subject: str) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = LOGIN, "customer@example.org", subject
    mail.set_content("Hello\n")
    return mail


def write_resources(path: Path, upstream_port: int, password: str = PASSWORD) -> None:
    user = f"{LOGIN}:{hash_password(password, b'0123456789abcdef')}"
    draft = path.with_suffix(".draft")
    draft.write_text(RELAY.format(user=user, port=upstream_port))
    draft.replace(path)


@contextlib.contextmanager
def running(resources: Path, data: Path) -> Iterator[Running]:
    ready_file = data.with_suffix(".ready")
    ready_file.unlink(missing_ok=True)
    ports = [text for name in ("smtp", "submissions", "submission") for text in ("--port", f"{name}=0")]
    process = subprocess.Popen(
        [
            *(MAILSLUICE, "run", "-f", str(resources), "--data-dir", str(data), "--http-port", "0"),
            *(*ports, "--ready-file", str(ready_file)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually("the relay is ready", lambda: ready_file.exists() or process.poll() is not None, 60)
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield Running(process, json.loads(ready_file.read_text()))
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def test_mail_goes_through_both_ports_of_submission(tmp_path: Path) -> None:
    port = free_port()
    write_resources(tmp_path / "relay.yaml", port)
    with sink_on(port) as sink, running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
        for listener in ("submissions", "submission", "smtp"):
            with relay.client(listener) as client:
                client.send_message(message(listener))
        eventually("three mails", lambda: len(sink.subjects) == 3)
        assert sorted(sink.subjects) == ["smtp", "submission", "submissions"]


def test_nobody_sends_without_login(tmp_path: Path) -> None:
    write_resources(tmp_path / "relay.yaml", free_port())
    with running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
        with relay.client("submission", None) as client:
            client.ehlo()
            code, text = client.mail(LOGIN)
        assert code == 530
        assert text.startswith(b"5.7.0 Authentication required: configure your mail client to log in")
        host, port = relay.ready["listeners"]["smtp"].split(":")
        with smtplib.SMTP(host, int(port), timeout=20) as client:
            client.ehlo()
            code, text = client.mail(LOGIN)
        assert code == 530
        assert text.startswith(b"5.7.0 Must issue a STARTTLS command first")


def test_what_got_250_arrives_after_kill_9(tmp_path: Path) -> None:
    port = free_port()
    write_resources(tmp_path / "relay.yaml", port)
    with running(tmp_path / "relay.yaml", tmp_path / "data") as relay, relay.client("submissions") as client:
        for number in range(20):
            client.send_message(message(f"mail {number}"))
        os.kill(relay.ready["pid"], signal.SIGKILL)
        relay.process.wait(timeout=20)
    with sink_on(port) as sink, running(tmp_path / "relay.yaml", tmp_path / "data"):
        eventually("all mails", lambda: len(set(sink.subjects)) == 20)
        assert set(sink.subjects) == {f"mail {number}" for number in range(20)}


def test_a_changed_file_is_taken_over_without_a_restart(tmp_path: Path) -> None:
    resources = tmp_path / "relay.yaml"
    write_resources(resources, free_port())
    with running(resources, tmp_path / "data") as relay:
        before = relay.readiness()["revision"]
        write_resources(resources, free_port(), password="another-password")
        eventually("the new revision", lambda: relay.readiness()["revision"] != before)
        with relay.client("submission", "another-password"):
            pass
        with pytest.raises(smtplib.SMTPAuthenticationError), relay.client("submission", PASSWORD):
            pass


def test_files_are_followed_through_every_replacement(tmp_path: Path) -> None:
    resources = tmp_path / "relay.yaml"
    write_resources(resources, free_port())
    with running(resources, tmp_path / "data") as relay:
        for password in ("first-change", "second-change", "third-change"):
            write_resources(resources, free_port(), password)  # by renaming, as editors and sed -i do

            def is_taken(password: str = password) -> bool:
                try:
                    with relay.client("submission", password):
                        return True
                except smtplib.SMTPAuthenticationError:
                    return False

            eventually(password, is_taken)


def test_the_end_of_a_killed_relay_is_named(tmp_path: Path) -> None:
    write_resources(tmp_path / "relay.yaml", free_port())
    with running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
        os.kill(json.loads((tmp_path / "data" / "ready.json").read_text())["pid"], signal.SIGKILL)
        assert relay.process.wait(timeout=30) == 1
        assert relay.process.stderr is not None
        assert "was killed by signal 9" in relay.process.stderr.read()


def test_the_queue_is_shown_as_it_is(tmp_path: Path) -> None:
    """The next server's words are not markup, and an id is never cut."""

    class Greylisting:
        async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
            return "450 4.7.1 greylisted [/policy] [red]retry"

    controller = Controller(Greylisting(), hostname="127.0.0.1", port=free_port(), server_hostname="sink.example.test")
    controller.start()
    write_resources(tmp_path / "relay.yaml", controller.port)
    queue = [MAILSLUICE, "queue"]
    where = ["--data-dir", str(tmp_path / "data")]

    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*queue, *arguments, *where], capture_output=True, text=True, timeout=60, check=False)

    try:
        with running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
            with relay.client("submission") as client:
                client.send_message(message("greylisted"))
            eventually("the answer", lambda: "450 4.7.1 greylisted [/policy] [red]retry" in asked("list").stdout)
            queue_id = json.loads(asked("list", "--json").stdout)[0]["queue_id"]
            assert queue_id in asked("list").stdout
            assert asked("hold", queue_id).returncode == 0
            again = asked("hold", queue_id)
            assert again.returncode == 1
            assert f"message {queue_id} is held: nothing to hold" in again.stderr
            assert asked("list", "--state", "bogus").returncode == 2
            assert asked("list", "--relay", "x").returncode == 2
            assert asked("remove", queue_id).returncode == 0
            assert f"no message {queue_id} in the queue" in asked("show", queue_id).stderr
    finally:
        controller.stop()


def test_a_broken_file_is_told_and_changes_nothing(tmp_path: Path) -> None:
    resources = tmp_path / "relay.yaml"
    write_resources(resources, free_port())
    good = resources.read_text()
    with running(resources, tmp_path / "data") as relay:
        resources.write_text(good.replace("name: provider", "name: provider\n    preset: Nobody"))
        os.kill(relay.ready["pid"], signal.SIGHUP)
        assert relay.process.stderr is not None
        told = ""
        while "not taken" not in told:
            told = relay.process.stderr.readline()
            assert told, "the process has ended"
        assert "spec.upstreams[0].preset" in told
        with relay.client("submission"):
            pass


def test_a_second_run_leaves_the_first_alone(tmp_path: Path) -> None:
    write_resources(tmp_path / "relay.yaml", free_port())
    with running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
        second = subprocess.run(
            [MAILSLUICE, "run", "-f", str(tmp_path / "relay.yaml"), "--data-dir", str(tmp_path / "data")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert "is used by another run" in second.stderr
        assert (tmp_path / "data" / "control.sock").exists()
        with relay.client("submission"):
            pass


def test_sigterm_ends_it_with_success(tmp_path: Path) -> None:
    write_resources(tmp_path / "relay.yaml", free_port())
    with running(tmp_path / "relay.yaml", tmp_path / "data") as relay:
        relay.process.terminate()
        assert relay.process.wait(timeout=60) == 0
