"""How a connection begins where something stands before SMTP: a load balancer's PROXY header, implicit TLS.

Whatever it is, it takes a bounded time, counts as a connection from the moment of accepting, and ends in a session that
is counted. Of the header not an octet more is read than belongs to it, so that the TLS handshake finds all of its own.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final

import structlog

from mailsluice_relay import reply
from mailsluice_relay.config import ListenerMode
from mailsluice_relay.reply import Reason, Verdict
from mailsluice_relay.session import TLS_HANDSHAKE_TIMEOUT, TLS_SHUTDOWN_TIMEOUT, Service, Session
from mailsluice_relay.smtp.proxy import Header, HeaderReader, ProxyError

log = structlog.get_logger()

PROXY_TIMEOUT: Final = 5.0
"""Seconds for the whole header, which a balancer sends first of all (HAProxy's document asks for at least 3)."""
ACCEPTED_AT_ONCE: Final = 64
"""Connections, before others get their turn."""
ACCEPT_PAUSE: Final = 1.0
"""Seconds, when the process has no file descriptor left: trying on would only burn CPU."""


class Acceptor:
    """Accepts connections on a listening socket and brings each as far as its greeting."""

    def __init__(self, listening: socket.socket, service: Callable[[], Service]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = listening
        self._service = service
        self._openings: set[asyncio.Task[None]] = set()
        self._resumption: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Accept nothing more, and drop what has not come as far as its greeting."""
        if self._resumption is not None:
            self._resumption.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for opening in self._openings:
            opening.cancel()

    def _resume(self) -> None:
        self._resumption = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, (address, port, *_) = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No traceback: it would tell nothing more, once a second.
                log.error("listener.cannot_accept", error=error.strerror, pause=ACCEPT_PAUSE)  # noqa: TRY400 - see above
                self._loop.remove_reader(self._socket)
                self._resumption = self._loop.call_later(ACCEPT_PAUSE, self._resume)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = Session(self._service())
            session.arrive(address, port)
            opening = self._loop.create_task(_open(connection, session))
            self._openings.add(opening)
            opening.add_done_callback(self._openings.discard)


async def _open(connection: socket.socket, session: Session) -> None:
    """Bring a connection to its greeting, or end its session here."""
    begun, reason = False, None
    try:
        begun = await _begin(connection, session)
    except ssl.SSLError:
        reason = Reason.TLS_HANDSHAKE
    except OSError:  # gone, or silent for too long: a port scan, a balancer that looks whether somebody listens
        pass
    finally:  # after a cancellation, too
        if not begun:
            session.abandon(reason)
            connection.close()


async def _begin(connection: socket.socket, session: Session) -> bool:
    """Whether the session has the connection now. Raises OSError, of which ssl.SSLError is one."""
    service = session.service
    implicit_tls = service.listener.mode is ListenerMode.IMPLICIT_TLS
    if session.is_refused and not service.gate.may_tell(session):
        return False
    if service.trusted_balancers is not None:
        try:
            header = await _read_header(connection, session)
        except ProxyError as error:
            log.warning("session.no_proxy_header", client=session.client.address, error=str(error))
            session.refuse(Verdict(reply.PROXY_REQUIRED, Reason.PROXY_PROTOCOL))
            if implicit_tls:  # whoever it is may not even speak TLS
                return False
        else:
            if header is None:
                return False
            session.introduce(header)
    session.locate()
    if session.is_refused and not service.gate.may_tell(session):
        return False
    loop = asyncio.get_running_loop()
    if implicit_tls:
        await loop.connect_accepted_socket(
            lambda: session,
            connection,
            ssl=service.tls_context,
            ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT,
            ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
        )
    else:
        await loop.connect_accepted_socket(lambda: session, connection)
    return True


async def _read_header(connection: socket.socket, session: Session) -> Header | None:
    """None when the balancer went without a word, as one does that looks whether somebody listens.

    Raises ProxyError, and OSError.
    """
    trusted = session.service.trusted_balancers
    if trusted is None or session.client.address not in trusted:
        raise ProxyError("not a trusted load balancer")
    loop = asyncio.get_running_loop()
    reader, header, began = HeaderReader(), None, False
    try:
        async with asyncio.timeout(PROXY_TIMEOUT):
            while header is None:
                data = await loop.sock_recv(connection, reader.wanted)
                if not data:
                    if began:
                        raise ProxyError("the header is cut off")
                    return None
                began = True
                header = reader.feed(data)
    except TimeoutError:
        raise ProxyError(f"no header within {PROXY_TIMEOUT:g} s") from None
    return header
