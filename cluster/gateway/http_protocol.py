"""uvicorn's HTTP/1.1 protocol with what it lacks against clients that hold connections and wait.

A connection above the limit is answered 503 and closed. A client that has the server waiting (for
the head of a request, for the end of a body that is answered already, or for room to write to) is
cut off after a while; bodies that are still to be answered have a deadline where they are read.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may keep the server waiting."""

    max_connections: int
    wait_s: float


class GuardedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._overdue: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        is_full = len(self.connections) >= self._limits.max_connections
        super().connection_made(transport)
        if is_full:
            transport.write(_TURNED_AWAY)
            transport.close()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless it comes behind a request that is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            # As if the client had gone: what runs for it ends, and has nothing more to send.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._limits.wait_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def _watch(self) -> None:
        """Run the clock while the client is to speak and nothing else waits for it."""
        theirs = self.conn.their_state
        is_answered = self.conn.our_state is h11.DONE and theirs is h11.SEND_BODY
        if self.transport.is_closing() or (theirs is not h11.IDLE and not is_answered):
            self._stop_watching()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(self._limits.wait_s, self._cut_off)

    def _stop_watching(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cut_off(self) -> None:
        self._overdue = None
        # Not close(): a client that does not read either would keep what is unsent.
        self.transport.abort()
