"""The real engines of Debian, each started here with a directory and a port of its own; nothing leaves the machine.

Neither the mail that every engine takes for spam (GTUBE) nor the file that every scanner takes for a virus (EICAR)
stands anywhere as a file: both are put together when a test runs.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import shutil
import socket
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mailsluice_relay.config import Engine, EngineType
from mailsluice_relay.envelope import Content, Mailbox
from mailsluice_relay.spool.content import ContentWriter
from mailsluice_relay.suspicion.engine import EngineVerdict, Submission
from mailsluice_relay.suspicion.panel import Panel

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*" + b"GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL" + b"*C.34X"
EICAR = rb"X5O!P%@AP[4\PZX54(P^)7CC)7}" + b"$EICAR-STANDARD-" + b"ANTIVIRUS-TEST-FILE!$H+H*"
MEGABYTE = 1024 * 1024
START = 90.0
"""Seconds that an engine may take to answer: spamd compiles its rules first."""

# What Rspamd was told, as symbols with options.
RSPAMD_RULE = """
local told = {
  TOLD_USER = function(task) return task:get_user() end,
  TOLD_FROM = function(task) return task:get_from('smtp')[1].addr end,
  TOLD_RCPT = function(task) return task:get_recipients('smtp')[1].addr end,
  TOLD_IP = function(task) return tostring(task:get_from_ip()) end,
  TOLD_HELO = function(task) return task:get_helo() end,
  TOLD_SUBJECT = function(task) return task:get_subject() end,
  TOLD_SIZE = function(task) return tostring(task:get_size()) end,
}
for name, tell in pairs(told) do
  rspamd_config:register_symbol({
    name = name, score = 0.5,
    callback = function(task)
      local value = tell(task)
      return value == os.getenv(name), 1.0, value
    end,
  })
end
"""


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int

    kind: EngineType

    @property
    def engine(self) -> Engine:
        where = f"127.0.0.1:{self.port}"
        place = {"url": f"http://{where}"} if self.kind is EngineType.RSPAMD else {"address": where}
        return Engine(name=self.kind.lower(), type=self.kind, timeout=60.0, **place)


def program(name: str, package: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"no {name}; on Debian: apt-get install --no-install-recommends {package}")
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(kind: EngineType, directory: Path, port: int, *command: str, **environment: str) -> Iterator[Running]:
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **environment}, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{command[0]} does not answer: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
        yield Running(process, port, kind)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


TOLD = {
    "TOLD_USER": "ann@example.test",
    "TOLD_FROM": "news@example.test",
    "TOLD_RCPT": "bob@other.test",
    "TOLD_IP": "192.0.2.7",
    "TOLD_HELO": "app-1",
    "TOLD_SUBJECT": "Hello",
}


@pytest.fixture(scope="module")
def rspamd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path, directory, port = program("rspamd", "rspamd"), tmp_path_factory.mktemp("rspamd"), free_port()
    (directory / "told.lua").write_text(RSPAMD_RULE)
    (directory / "rspamd.conf").write_text(
        f"""
        options {{
          pidfile = "{directory}/pid"; tempdir = "{directory}"; filters = ""; gtube_patterns = "all";
          url_tld = "/usr/share/rspamd/effective_tld_names.dat";
          dns {{ nameserver = ["127.0.0.1:9"]; timeout = 0.01; retransmits = 1; }}
        }}
        logging {{ type = "console"; level = "warning"; }}
        actions {{ reject = 15; add_header = 6; }}
        lua = "{directory}/told.lua"
        worker "normal" {{ bind_socket = "127.0.0.1:{port}"; count = 1; }}
        """
    )
    options = ("--no-fork", "--insecure", "--config", str(directory / "rspamd.conf"))
    yield from start(EngineType.RSPAMD, directory, port, path, *options, **TOLD)


@pytest.fixture(scope="module")
def spamd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path, directory, port = program("spamd", "spamd"), tmp_path_factory.mktemp("spamd"), free_port()
    where = ("--listen", "127.0.0.1", "--port", str(port), "--pidfile", str(directory / "pid"), "--syslog", "stderr")
    owner = ("--username", "nobody") if os.geteuid() == 0 else ()
    options = ("--local", "--nouser-config", "--min-children", "1", "--max-children", "2", *owner)
    yield from start(EngineType.SPAM_ASSASSIN, directory, port, path, *where, *options)


@pytest.fixture(scope="module")
def clamd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path, directory, port = program("clamd", "clamav-daemon"), tmp_path_factory.mktemp("clamd"), free_port()
    database = directory / "database"
    database.mkdir()
    # NAME:any type:any offset:the octets. No signatures are fetched.
    (database / "local.ndb").write_text(f"Local.Eicar:0:*:{EICAR.hex()}\n")
    settings = {
        "DatabaseDirectory": database,
        "TCPSocket": port,
        "TCPAddr": "127.0.0.1",
        "Foreground": "yes",
        "TemporaryDirectory": directory,
        "StreamMaxLength": "30M",
        **({"User": "root"} if os.geteuid() == 0 else {}),
    }
    (directory / "clamd.conf").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    yield from start(EngineType.CLAM_AV, directory, port, path, "--config-file", str(directory / "clamd.conf"))


@dataclass
class Octets:
    octets: bytes

    @property
    def size(self) -> int:
        return len(self.octets)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.octets), 64 * 1024):
            yield self.octets[start : start + 64 * 1024]

    def close(self) -> None:
        pass


HEADER = (
    b"Received: from app-1 (192.0.2.7) by relay.example.test with ESMTPSA id Q1; Tue, 24 Nov 2026 12:00:00 +0000\r\n"
    b"Date: Tue, 24 Nov 2026 12:00:00 +0000\r\n"
    b"Message-ID: <1@relay.example.test>\r\n"
    b"From: Ann <news@example.test>\r\n"
    b"To: Bob <bob@other.test>\r\n"
    b"Subject: Hello\r\n"
)
LETTER = b"Dear Bob,\r\n\r\nthe report that you asked for is ready. Shall we go through it on Friday?\r\n\r\nAnn\r\n"


def mail(body: bytes, header: bytes = HEADER) -> Submission:
    return Submission(
        content=Content(header, Octets(body)),
        queue_id="Q1",
        login="ann@example.test",
        client_address="192.0.2.7",
        hello="app-1",
        sender=Mailbox("news", "example.test"),
        recipients=(Mailbox("bob", "other.test"),),
    )


def attached(octets: bytes, *, filler: int = 0) -> Submission:
    """A letter with an attachment, and one of random length before it."""
    header = HEADER + b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n'

    def part(kind: bytes, content: bytes) -> bytes:
        encoded = base64.encodebytes(content).replace(b"\n", b"\r\n")
        return b"--b\r\nContent-Type: %s\r\nContent-Transfer-Encoding: base64\r\n\r\n%s" % (kind, encoded)

    return mail(
        part(b"text/plain", LETTER)
        + (part(b"image/png", os.urandom(filler)) if filler else b"")
        + part(b"application/octet-stream", octets)
        + b"--b--\r\n",
        header,
    )


async def verdict(running: Running, submission: Submission) -> EngineVerdict:
    (answer,) = await Panel((running.engine,), time.monotonic).ask(submission)
    assert answer.verdict is not None
    return answer.verdict


# --- Rspamd -----------------------------------------------------------------------------------------------------------


async def test_rspamd_knows_what_everybody_takes_for_spam(rspamd: Running) -> None:
    found = await verdict(rspamd, mail(GTUBE + b"\r\n"))
    assert found.score >= 15
    assert "GTUBE" in found.symbols


async def test_rspamd_is_told_that_the_mail_is_outgoing_and_whose(rspamd: Running) -> None:
    found = await verdict(rspamd, mail(LETTER))
    assert {symbol for symbol in found.symbols if symbol.startswith("TOLD_")} == set(TOLD)
    assert found.score == pytest.approx(0.5 * len(TOLD))


async def test_rspamd_takes_twenty_five_megabytes(rspamd: Running) -> None:
    found = await verdict(rspamd, attached(b"x", filler=18 * MEGABYTE))
    assert "TOLD_SUBJECT" in found.symbols


# --- SpamAssassin -----------------------------------------------------------------------------------------------------


async def test_spamd_knows_what_everybody_takes_for_spam(spamd: Running) -> None:
    found = await verdict(spamd, mail(GTUBE + b"\r\n"))
    assert found.score > 900
    assert "GTUBE" in found.symbols


async def test_spamd_lets_a_letter_pass(spamd: Running) -> None:
    assert (await verdict(spamd, mail(LETTER))).score < 5


async def test_spamd_finds_spam_in_front_of_ten_megabytes(spamd: Running) -> None:
    found = await verdict(spamd, mail(GTUBE + b"\r\n" + b"x" * 70 + b"\r\n" * 5_000_000))
    assert "GTUBE" in found.symbols


# --- ClamAV -----------------------------------------------------------------------------------------------------------


async def test_clamd_finds_a_virus_in_an_attachment(clamd: Running) -> None:
    assert (await verdict(clamd, attached(EICAR))).malware == "Local.Eicar.UNOFFICIAL"


async def test_clamd_finds_it_behind_eighteen_megabytes(clamd: Running) -> None:
    found = await verdict(clamd, attached(EICAR, filler=18 * MEGABYTE))
    assert found.malware == "Local.Eicar.UNOFFICIAL"


async def test_clamd_finds_nothing_in_a_letter(clamd: Running) -> None:
    assert await verdict(clamd, mail(LETTER)) == EngineVerdict()


async def test_clamd_says_what_is_too_long_for_it(clamd: Running) -> None:
    panel = Panel((clamd.engine,), time.monotonic)
    (answer,) = await panel.ask(mail(b"x" * 40 * MEGABYTE))
    assert answer.verdict is None
    assert panel.states["clamav"].up


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def panel(rspamd: Running, spamd: Running, clamd: Running) -> Panel:
    return Panel((rspamd.engine, spamd.engine, clamd.engine), time.monotonic)


async def test_all_three_at_once_about_many_messages(panel: Panel) -> None:
    submissions = [mail(LETTER)] * 20 + [attached(EICAR)]
    rounds = await asyncio.gather(*(panel.ask(submission) for submission in submissions))
    assert all(answer.verdict is not None for answers in rounds for answer in answers)
    found = [[answer.verdict.malware for answer in answers if answer.verdict] for answers in rounds]
    assert found == [["", "", ""]] * 20 + [["", "", "Local.Eicar.UNOFFICIAL"]]


async def test_a_message_on_disk_is_never_whole_in_memory(panel: Panel, tmp_path: Path) -> None:
    writer = ContentWriter(tmp_path)
    writer.write(HEADER + b"\r\n")
    for _ in range(24):
        writer.write((b"x" * 70 + b"\r\n") * (MEGABYTE // 72))
    content = writer.finish()
    tracemalloc.start()
    try:
        answers = await panel.ask(dataclasses.replace(mail(b""), content=content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        content.body.close()
    assert all(answer.verdict is not None for answer in answers)
    assert peak < 2 * MEGABYTE
