"""Starts the servers that dialogues are played into: Mailsluice, and Debian's Postfix, Exim and OpenSMTPD.

All are set up alike: the same five listeners on free ports of loopback, the same login, certificate, size and number
of recipients. Beyond that each one is as its makers ship it. The foreign servers run in a root directory of their own
(tools/interop-servers), of which every run gets a copy by hard links; nothing of this machine's mail set-up is read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import bcrypt
import trustme

from corpus import Dialogue
from mailsluice_relay.config import (
    Authentication,
    Configuration,
    FailureLimit,
    Failures,
    Limits,
    Listener,
    ListenerMode,
    Relay,
    Senders,
    Upstream,
    UpstreamTLSMode,
    User,
    encode,
)
from player import LOGIN, PASSWORD, Address, BrokenError, Connection

HOSTNAME: Final = "relay.test"
MESSAGE_SIZE: Final = 100_000
RECIPIENTS: Final = 100
"""The least that a server must take (RFC 5321 section 4.5.3.1.8)."""
START: Final = 60.0
"""Seconds that a server may take to answer on all its ports."""
ROOTS: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mailsluice" / "interop"


class UnavailableError(Exception):
    """A server cannot be started here. The text says why, and what to do."""


@dataclass(frozen=True)
class Certificates:
    """What the servers show, and what the player trusts."""

    chain: bytes
    key: bytes
    context: ssl.SSLContext

    @classmethod
    def make(cls) -> Certificates:
        authority = trustme.CA()
        issued = authority.issue_cert(HOSTNAME)
        context = ssl.create_default_context()
        authority.configure_trust(context)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return cls(chain, issued.private_key_pem.bytes(), context)


@dataclass(frozen=True)
class Ports:
    open: int
    lenient: int
    mixed: int
    submission: int
    submissions: int
    """0: there is none."""

    @classmethod
    def free(cls) -> Ports:
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(5)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            return cls(*(probe.getsockname()[1] for probe in probes))


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    addresses: Mapping[str, Address]
    """By listener."""
    has_tls: bool = True

    def plays(self, dialogue: Dialogue) -> bool:
        return self.has_tls or not dialogue.needs_tls


Starter = Callable[[Certificates], contextlib.AbstractContextManager[Server]]


# --- Mailsluice -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def mailsluice(certificates: Certificates) -> Iterator[Server]:
    ports = Ports.free()
    configuration = Configuration(
        revision="1",
        credentials_revision="1",
        relay=Relay(name="dialogues", namespace="mail"),
        hostname=HOSTNAME,
        listeners=(
            Listener(name="open", port=ports.open, mode=ListenerMode.PLAIN, authentication_required=False),
            Listener(
                name="lenient",
                port=ports.lenient,
                mode=ListenerMode.PLAIN,
                authentication_required=False,
                normalize_line_endings=True,
            ),
            Listener(name="mixed", port=ports.mixed, mode=ListenerMode.START_TLS, authentication_required=False),
            Listener(name="submission", port=ports.submission, mode=ListenerMode.START_TLS),
            Listener(name="submissions", port=ports.submissions, mode=ListenerMode.IMPLICIT_TLS),
        ),
        authentication=Authentication(
            users=(User(login=LOGIN, hashes=(_hash(),)),),
            allowed_networks=("127.0.0.0/8",),
            # Dialogues with wrong passwords come from one address; what one connection may do stays as it is.
            failures=Failures(
                per_network_and_user=FailureLimit(limit=10_000, window=600),
                per_network=FailureLimit(limit=10_000, window=600),
            ),
        ),
        senders=Senders(allowed_domains=("example.test",)),
        # Nothing is there, so mail stays queued until the directory is removed.
        upstreams=(Upstream(name="nowhere", host="127.0.0.1", port=1, tls=UpstreamTLSMode.PLAIN),),
        limits=Limits(message_size=MESSAGE_SIZE, recipients_per_message=RECIPIENTS),
    )
    with tempfile.TemporaryDirectory(prefix="mailsluice-dialogues-") as name:
        directory = Path(name)
        for path, octets in {
            "config/config.json.gz": encode(configuration),
            "credentials/revision": b"1",
            "credentials/tls.crt": certificates.chain,
            "credentials/tls.key": certificates.key,
        }.items():
            _write(directory / "etc" / path, octets)
        (directory / "data").mkdir()
        program = str(Path(sys.executable).with_name("mailsluice-relay"))
        arguments = ["--config-dir", str(directory / "etc"), "--data-dir", str(directory / "data"), "--http-port", "0"]
        with _running("mailsluice", [program, "serve", *arguments, "--grace", "1"], directory / "log") as process:
            yield _ready("mailsluice", ports, certificates, process, directory / "log")


# --- Postfix ----------------------------------------------------------------------------------------------------------
POSTFIX_MAIN: Final = f"""\
compatibility_level = 3.6
queue_directory = /var/spool/postfix
data_directory = /var/lib/postfix
daemon_directory = /usr/lib/postfix/sbin
command_directory = /usr/sbin
mail_owner = postfix
setgid_group = postdrop
maillog_file = /var/log/postfix.log
myhostname = {HOSTNAME}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_peername_lookup = no
mydestination =
alias_maps =
local_recipient_maps =
default_transport = discard:
relay_transport = discard:
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
message_size_limit = {MESSAGE_SIZE}
smtpd_recipient_limit = {RECIPIENTS}
smtpd_error_sleep_time = 0
smtpd_tls_cert_file = /etc/tls.crt
smtpd_tls_key_file = /etc/tls.key
smtpd_sasl_path = smtpd
cyrus_sasl_config_path = /etc/postfix/sasl
"""
POSTFIX_QUEUES: Final = (
    *("incoming", "active", "deferred", "hold", "corrupt", "saved", "maildrop"),
    *("bounce", "defer", "trace", "flush", "private", "public"),
)
# As Debian's own master.cf has `submission` and `submissions`.
POSTFIX_MASTER: Final = """\
127.0.0.1:{ports.open} inet n - n - - smtpd
127.0.0.1:{ports.lenient} inet n - n - - smtpd
  -o smtpd_forbid_bare_newline=normalize -o smtpd_forbid_bare_newline_exclusions=
127.0.0.1:{ports.mixed} inet n - n - - smtpd
  -o smtpd_tls_security_level=may -o smtpd_sasl_auth_enable=yes -o smtpd_tls_auth_only=yes
127.0.0.1:{ports.submission} inet n - n - - smtpd
  -o smtpd_tls_security_level=encrypt -o smtpd_sasl_auth_enable=yes -o smtpd_tls_auth_only=yes
  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
127.0.0.1:{ports.submissions} inet n - n - - smtpd
  -o smtpd_tls_wrappermode=yes -o smtpd_sasl_auth_enable=yes
  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
error unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


@contextlib.contextmanager
def postfix(certificates: Certificates) -> Iterator[Server]:
    ports = Ports.free()
    with _root("postfix", certificates, {"postfix": 90, "postdrop": 91}) as root:
        _write(root / "etc/postfix/main.cf", POSTFIX_MAIN.encode())
        _write(root / "etc/postfix/master.cf", POSTFIX_MASTER.format(ports=ports).encode())
        _write(
            root / "etc/postfix/sasl/smtpd.conf",
            b"pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n",
        )
        for name in (*(f"spool/postfix/{queue}" for queue in POSTFIX_QUEUES), "lib/postfix"):
            (root / "var" / name).mkdir(parents=True, exist_ok=True)
            os.chown(root / "var" / name, 90, 0)
        (root / "var/spool/postfix/pid").mkdir(exist_ok=True)
        user, _, domain = LOGIN.partition("@")
        subprocess.run(
            ["chroot", str(root), "/usr/sbin/saslpasswd2", "-p", "-c", "-u", domain, user],
            input=PASSWORD.encode(),
            check=True,
            capture_output=True,
        )
        os.chown(root / "etc/sasldb2", 90, 0)
        yield from _foreign("postfix", root, ["/usr/lib/postfix/sbin/master", "-d"], ports, certificates)


# --- Exim -------------------------------------------------------------------------------------------------------------
EXIM: Final = """\
primary_hostname = {hostname}
local_interfaces = <; 127.0.0.1.{ports.open} ; 127.0.0.1.{ports.lenient} ; 127.0.0.1.{ports.mixed} ; \
  127.0.0.1.{ports.submission} ; 127.0.0.1.{ports.submissions}
tls_on_connect_ports = {ports.submissions}
tls_advertise_hosts = ${{if inlist{{$received_port}}{{{ports.submission}:{ports.mixed}}}{{*}}{{}}}}
tls_certificate = /etc/tls.crt
tls_privatekey = /etc/tls.key
auth_advertise_hosts = ${{if eq{{$tls_in_cipher}}{{}}{{}}{{*}}}}
message_size_limit = {size}
recipients_max = {recipients}
dsn_advertise_hosts = *
rfc1413_hosts =
host_lookup =
log_file_path = /var/log/exim4/%s
acl_smtp_rcpt = rcpt

begin acl
rcpt:
  accept condition = ${{if inlist{{$received_port}}{{{ports.open}:{ports.lenient}:{ports.mixed}}}}}
  accept authenticated = *
  deny message = relay not permitted

begin routers
discard:
  driver = redirect
  data = :blackhole:

begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_prompts = :
  server_condition = ${{if and{{{{eq{{$auth2}}{{{login}}}}}{{eq{{$auth3}}{{{password}}}}}}}}}
  server_set_id = $auth2
login:
  driver = plaintext
  public_name = LOGIN
  server_prompts = Username:: : Password::
  server_condition = ${{if and{{{{eq{{$auth1}}{{{login}}}}}{{eq{{$auth2}}{{{password}}}}}}}}}
  server_set_id = $auth1
"""


@contextlib.contextmanager
def exim(certificates: Certificates) -> Iterator[Server]:
    ports = Ports.free()
    with _root("exim", certificates, {"Debian-exim": 90}) as root:
        values = {"hostname": HOSTNAME, "size": MESSAGE_SIZE, "recipients": RECIPIENTS}
        _write(
            root / "etc/exim.conf",
            EXIM.format(ports=ports, login=LOGIN, password=PASSWORD, **values).encode(),
        )
        for name in ("spool/exim4", "log/exim4"):
            (root / "var" / name).mkdir(parents=True, exist_ok=True)
            os.chown(root / "var" / name, 90, 90)
        os.chown(root / "etc/tls.key", 0, 90)
        (root / "etc/tls.key").chmod(0o640)
        yield from _foreign("exim", root, ["/usr/sbin/exim4", "-bdf", "-C", "/etc/exim.conf"], ports, certificates)


# --- OpenSMTPD --------------------------------------------------------------------------------------------------------
OPENSMTPD: Final = """\
pki server cert "/etc/tls.crt"
pki server key "/etc/tls.key"
table logins {{ "{login}" = "{hash}" }}
smtp max-message-size "{size}"
smtp limit max-rcpt {recipients}
listen on 127.0.0.1 port {ports.open} hostname {hostname}
listen on 127.0.0.1 port {ports.lenient} hostname {hostname}
listen on 127.0.0.1 port {ports.mixed} tls pki server auth-optional <logins> hostname {hostname}
listen on 127.0.0.1 port {ports.submission} tls-require pki server auth <logins> hostname {hostname}
action "nowhere" relay host smtp://127.0.0.1:1
match from auth for any action "nowhere"
match from src 127.0.0.0/8 for any action "nowhere"
"""


@contextlib.contextmanager
def opensmtpd(certificates: Certificates) -> Iterator[Server]:
    # Its TLS does not work with OpenSSL 3, which Debian 12 has (OpenSMTPD/OpenSMTPD#1171): it offers STARTTLS as it
    # should, and every handshake fails.
    ports = replace(Ports.free(), submissions=0)
    with _root("opensmtpd", certificates, {"opensmtpd": 90, "opensmtpq": 91}) as root:
        values = {"hostname": HOSTNAME, "size": MESSAGE_SIZE, "recipients": RECIPIENTS}
        _write(root / "etc/smtpd.conf", OPENSMTPD.format(ports=ports, login=LOGIN, hash=_hash(), **values).encode())
        (root / "etc/tls.key").chmod(0o400)
        for name, mode in {"run": 0o755, "var/spool/smtpd": 0o711, "var/lib/opensmtpd/empty": 0o755}.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name).chmod(mode)
        (root / "var/run").symlink_to("../run")
        yield from _foreign("opensmtpd", root, ["/usr/sbin/smtpd", "-d", "-f", "/etc/smtpd.conf"], ports, certificates)


FOREIGN: Final[Mapping[str, Starter]] = {"postfix": postfix, "exim": exim, "opensmtpd": opensmtpd}


def version(name: str) -> str:
    """Of a foreign server's package. Raises UnavailableError."""
    package = {"postfix": "postfix", "exim": "exim4-daemon-light", "opensmtpd": "opensmtpd"}[name]
    try:
        archives = (ROOTS / name / "packages").read_text().splitlines()[1:]
    except FileNotFoundError:
        raise UnavailableError(f"{name} is not there: run tools/interop-servers") from None
    return next(archive.split("_")[1] for archive in archives if archive.startswith(f"{package}_"))


# --- shared -----------------------------------------------------------------------------------------------------------
def _hash() -> str:
    return bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


def _write(path: Path, octets: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a hard link
    path.write_bytes(octets)


@contextlib.contextmanager
def _root(name: str, certificates: Certificates, accounts: Mapping[str, int]) -> Iterator[Path]:
    """A copy of a server's root directory, with what every server needs in it. Raises UnavailableError."""
    if os.geteuid() != 0:
        raise UnavailableError(f"{name} runs in a root directory of its own and changes its user: this needs root")
    version(name)
    runs = ROOTS / ".runs"
    runs.mkdir(exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=runs))
    try:
        root.chmod(0o755)
        shutil.copytree(ROOTS / name, root, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
        users = {"root": 0, "nobody": 65534, **accounts}
        groups = {"root": 0, "nogroup": 65534, "mail": 8, **accounts}
        _write(
            root / "etc/passwd",
            "".join(
                f"{user}:x:{number}:{number}::/nonexistent:/bin/false\n" for user, number in users.items()
            ).encode(),
        )
        _write(root / "etc/group", "".join(f"{group}:x:{number}:\n" for group, number in groups.items()).encode())
        _write(root / "etc/hosts", f"127.0.0.1 localhost {HOSTNAME}\n".encode())
        _write(root / "etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n")
        _write(root / "etc/tls.crt", certificates.chain)
        _write(root / "etc/tls.key", certificates.key)
        for folder in ("dev", "tmp", "var/log", "var/lib", "var/spool"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for device in ("null", "zero", "random", "urandom"):
            try:
                os.mknod(root / "dev" / device, 0o020666, Path("/dev", device).stat().st_rdev)
            except PermissionError as error:
                raise UnavailableError(
                    f"{name} needs /dev/{device} in its root directory: mknod is not allowed here"
                ) from error
            (root / "dev" / device).chmod(0o666)
        yield root
    finally:
        shutil.rmtree(root)


def _foreign(name: str, root: Path, command: list[str], ports: Ports, certificates: Certificates) -> Iterator[Server]:
    with _running(name, ["chroot", str(root), *command], root / "output") as process:
        yield _ready(name, ports, certificates, process, root / "output")


@contextlib.contextmanager
def _running(name: str, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and its children, ended together."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _ready(name: str, ports: Ports, certificates: Certificates, process: subprocess.Popen[bytes], log: Path) -> Server:
    """Wait until every listener greets. Raises UnavailableError with what the server said."""
    addresses = {
        "open": Address(ports.open, False, certificates.context),
        "lenient": Address(ports.lenient, False, certificates.context),
        "mixed": Address(ports.mixed, False, certificates.context),
        "submission": Address(ports.submission, False, certificates.context),
    }
    if ports.submissions:
        addresses["submissions"] = Address(ports.submissions, True, certificates.context)
    deadline = time.monotonic() + START
    for listener, address in addresses.items():
        while not _greets(address):
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise UnavailableError(f"{name} does not answer on {listener} (exit code {process.poll()}): {said}")
            time.sleep(0.05)
    return Server(name, addresses, has_tls=ports.submissions != 0)


def _greets(address: Address) -> bool:
    try:
        with Connection(address) as connection:
            greeted = connection.answer().code == "220"
            connection.send(b"QUIT\r\n")
            return greeted
    except (OSError, BrokenError):
        return False
