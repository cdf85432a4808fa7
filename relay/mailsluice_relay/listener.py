"""The listeners: sockets, certificates, how many connections there may be, and how they end.

A new configuration applies to new connections (and STARTTLS of old ones goes by what was in force when they came).
Which listeners there are, and on which ports, changes only with a new process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import structlog
from cryptography import x509

from mailsluice_relay import reply
from mailsluice_relay.config import Configuration, ConfigurationError, Credentials, Listener, ListenerMode
from mailsluice_relay.metrics import Metrics
from mailsluice_relay.opening import Acceptor
from mailsluice_relay.reply import Reply
from mailsluice_relay.session import Service, Session

if TYPE_CHECKING:
    from mailsluice_relay.admission import Admission
    from mailsluice_relay.dispatch import Dispatcher

log = structlog.get_logger()

BACKLOG: Final = 1024
TOLD_AT_ONCE: Final = 64
"""Sessions over the limits that may do a TLS handshake to be told so; further ones are just dropped."""

_VERSIONS: Final = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


class Connections:
    """The sessions that there are, and how many more there may be: in all, and for one network (/24, /64)."""

    def __init__(self, limit: int, limit_per_network: int) -> None:
        self.limit = limit
        self.limit_per_network = limit_per_network
        self.sessions: dict[Session, str] = {}
        """With the network that each counts for; empty as long as that is not known."""
        self._networks: dict[str, int] = {}
        self._told: set[Session] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self, session: Session) -> Reply | None:
        if len(self.sessions) >= self.limit:
            return reply.TOO_MANY_CONNECTIONS
        self.sessions[session] = ""
        self._empty.clear()
        return None

    def locate(self, session: Session) -> Reply | None:
        network = network_of(session.client.address)
        count = self._networks.get(network, 0)
        if count >= self.limit_per_network:
            self.leave(session)
            return reply.TOO_MANY_CONNECTIONS
        self._networks[network] = count + 1
        self.sessions[session] = network
        return None

    def may_tell(self, session: Session) -> bool:
        if session not in self._told:
            if len(self._told) >= TOLD_AT_ONCE:
                return False
            self._told.add(session)
        return True

    def leave(self, session: Session) -> None:
        self._told.discard(session)
        network = self.sessions.pop(session, "")
        if network:
            if self._networks[network] > 1:
                self._networks[network] -= 1
            else:
                del self._networks[network]
        if not self.sessions:
            self._empty.set()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()


class Listeners:
    """All listeners of a process. Raises ConfigurationError."""

    def __init__(
        self,
        configuration: Configuration,
        credentials: Credentials,
        *,
        bind: tuple[str, ...],
        admission: Admission,
        dispatcher: Dispatcher,
        metrics: Metrics,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._bind = bind
        self._admission = admission
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._now = now
        self._monotonic = monotonic
        self._configuration = configuration
        self._servers: list[asyncio.Server | Acceptor] = []
        self._addresses: dict[str, tuple[str, int]] = {}
        self._connections = Connections(configuration.limits.connections, configuration.limits.connections_per_network)
        # Unique in a process; the process is known by its pod. Not a secret, so nothing random is needed.
        began, numbers = format(round(now() * 1000), "x"), itertools.count(1)
        self._new_session_id = lambda: f"{began}-{next(numbers):x}"
        self._expiry: dict[str, float] = {}
        self._services: dict[str, Service] = {}
        self._use(configuration, credentials)

    @property
    def addresses(self) -> Mapping[str, tuple[str, int]]:
        """Where each listener is reached, with the real ports; known once started."""
        return self._addresses

    def certificate_expiry(self) -> Mapping[str, float]:
        """The end of each TLS listener's certificate, in seconds since the epoch."""
        return self._expiry

    def check(self, configuration: Configuration, credentials: Credentials) -> None:
        """Whether `reconfigure` would take it. Raises ConfigurationError."""
        self._check_listeners(configuration)
        self._services_of(configuration, credentials)

    def reconfigure(self, configuration: Configuration, credentials: Credentials) -> None:
        """New certificates, limits and settings for new connections. Raises ConfigurationError and keeps the old."""
        self._check_listeners(configuration)
        self._use(configuration, credentials)

    def _check_listeners(self, configuration: Configuration) -> None:
        def bound(listener: Listener) -> tuple[object, ...]:
            return listener.name, listener.port, listener.mode, bool(listener.proxy_trusted_networks)

        if list(map(bound, configuration.listeners)) != list(map(bound, self._configuration.listeners)):
            raise ConfigurationError(
                "listeners: names, ports, modes, and whether the PROXY protocol is spoken, cannot change while "
                "running; restart the relay"
            )

    def _use(self, configuration: Configuration, credentials: Credentials) -> None:
        encrypted = [listener.name for listener in configuration.listeners if listener.mode is not ListenerMode.PLAIN]
        services = self._services_of(configuration, credentials)
        self._expiry = dict.fromkeys(encrypted, _expiry(credentials)) if encrypted else {}
        self._services = services
        self._connections.limit = configuration.limits.connections
        self._connections.limit_per_network = configuration.limits.connections_per_network
        self._configuration = configuration

    def _services_of(self, configuration: Configuration, credentials: Credentials) -> dict[str, Service]:
        context = tls_context(configuration, credentials)
        return {
            listener.name: Service(
                configuration=configuration,
                listener=listener,
                admission=self._admission,
                dispatcher=self._dispatcher,
                metrics=self._metrics,
                gate=self._connections,
                now=self._now,
                new_session_id=self._new_session_id,
                tls_context=context,
            )
            for listener in configuration.listeners
        }

    async def start(self) -> None:
        """Listen on every address. Raises ConfigurationError, naming the listener, where that cannot be."""
        for listener in self._configuration.listeners:
            port = listener.port
            for host in self._bind:
                try:
                    address = await self._listen(listener, host, port)
                except OSError as error:
                    await self.stop(0.0)
                    raise ConfigurationError(
                        f"listeners.{listener.name}.port: cannot listen on {host} port {port}: "
                        f"{error.strerror or error}; choose another port or address"
                    ) from error
                # Port 0 is free to the first address only; the others take the same one.
                port = address[1]
                self._addresses.setdefault(listener.name, address)

    async def _listen(self, listener: Listener, host: str, port: int) -> tuple[str, int]:
        loop = asyncio.get_running_loop()
        name = listener.name
        if listener.mode is ListenerMode.IMPLICIT_TLS or listener.proxy_trusted_networks:
            listening = await _listening_socket(host, port)
            self._servers.append(Acceptor(listening, lambda: self._services[name]))
            bound = listening.getsockname()
        else:
            server = await loop.create_server(lambda: Session(self._services[name]), host, port, backlog=BACKLOG)
            self._servers.append(server)
            bound = server.sockets[0].getsockname()
        return bound[0], bound[1]

    async def stop(self, grace: float) -> None:
        """Accept nothing more, send idle sessions away, let running transactions finish within `grace` seconds."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        sessions = self._connections.sessions
        for session in tuple(sessions):
            session.shut_down()
        try:
            async with asyncio.timeout(grace):
                await self._connections.wait_until_empty()
        except TimeoutError:
            log.warning("listeners.sessions_dropped", sessions=len(sessions), grace=grace)
            for session in tuple(sessions):
                session.abort()


async def _listening_socket(host: str, port: int) -> socket.socket:
    """As `create_server` makes it. Raises OSError."""
    family, kind, protocol, _, address = (
        await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def network_of(address: str) -> str:
    """What counts as one client network: a /24, or a /64 of IPv6."""
    if ":" not in address:
        return address.rpartition(".")[0]
    return str(ipaddress.ip_network((address, 64), strict=False))


def tls_context(configuration: Configuration, credentials: Credentials) -> ssl.SSLContext:
    """The server's TLS from credentials/tls.crt and tls.key. Raises ConfigurationError.

    Where no listener uses TLS it has no certificate, and no handshake succeeds with it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[configuration.tls.minimum_version]
    # The client chooses where hardware differs (RFC 8446 appendix B.4 suites are all good); no renegotiation.
    context.options |= ssl.OP_NO_RENEGOTIATION
    if all(listener.mode is ListenerMode.PLAIN for listener in configuration.listeners):
        return context
    chain, key = (_credential(credentials, name) for name in ("tls.crt", "tls.key"))
    try:
        _load(context, chain, key)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            "credentials/tls.crt, tls.key: not a PEM certificate chain with its private key "
            f"({getattr(error, 'reason', None) or 'unreadable'}); put the pair of one issuance there"
        ) from error
    if configuration.tls.client_ca is not None:
        try:
            context.load_verify_locations(cadata=_credential(credentials, configuration.tls.client_ca).decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigurationError(
                f"tls.clientCA: credentials/{configuration.tls.client_ca} holds no PEM certificates; put the CA's there"
            ) from error
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _load(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Load a certificate and its key. `ssl` reads files alone: these are in memory, and never on a disk."""
    with os.fdopen(os.memfd_create("tls"), "w+b", buffering=0) as file:
        file.write(chain.rstrip() + b"\n" + key)
        # The empty password keeps OpenSSL from asking on the terminal when the key is encrypted.
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")


def _credential(credentials: Credentials, name: str) -> bytes:
    try:
        return credentials[name]
    except KeyError:
        raise ConfigurationError(f"credentials/{name} is missing; the configuration refers to it") from None


def _expiry(credentials: Credentials) -> float:
    try:
        return x509.load_pem_x509_certificate(_credential(credentials, "tls.crt")).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ConfigurationError("credentials/tls.crt: the first certificate cannot be read; check it") from error
