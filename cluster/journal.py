"""Accepted requests on disk, so that a gateway that dies forgets none of them.

SQLite in write-ahead mode: a request is there before its first token is drawn, and its outputs when
it has ended. Tokens in between are not written: they are drawn again, and are the same.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack

from actors.engine.requests import Request, RequestOutput
from cluster.runstate import run_folder

_TABLE = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    request BLOB NOT NULL,
    outputs BLOB,
    changed_unix_s REAL NOT NULL
)
"""
_BUSY_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


def journal_file(deployment: str) -> Path:
    """Return where a deployment of this name writes down what it has accepted."""
    return run_folder() / f"{deployment}.requests.sqlite3"


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that was accepted."""

    request: Request
    owner: str
    """The client whose key it came with."""
    outputs: tuple[RequestOutput, ...] | None
    """None: it has not ended."""


class Journal:
    """The requests of one deployment that clients have named; calls block for a moment.

    Safe to use from several threads.
    """

    def __init__(
        self,
        file: Path,
        *,
        keep_s: float,
        unix_s: Callable[[], float] = lambda: datetime.now(UTC).timestamp(),
    ) -> None:
        """`keep_s` is for how long outputs are kept after a request has ended."""
        self._keep_s = keep_s
        self._unix_s = unix_s
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        self._connection = sqlite3.connect(
            file, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(_TABLE)

    def accept(self, request: Request, owner: str) -> None:
        """Write a request down before it runs."""
        body = msgpack.packb(request.to_wire())
        self._execute(
            "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, NULL, ?)",
            (request.id, owner, body, self._unix_s()),
        )

    def finish(self, request_id: str, outputs: Sequence[RequestOutput]) -> None:
        """Keep what a request became, for a client that did not hear the end of it."""
        body = msgpack.packb([output.to_wire() for output in outputs])
        self._execute(
            "UPDATE requests SET outputs = ?, changed_unix_s = ? WHERE id = ?",
            (body, self._unix_s(), request_id),
        )

    def forget(self, request_id: str) -> None:
        """A request was given up, or refused after all."""
        self._execute("DELETE FROM requests WHERE id = ?", (request_id,))

    def forget_old(self) -> list[str]:
        """Drop what ended long ago; returns the ids."""
        oldest = self._unix_s() - self._keep_s
        rows = self._execute(
            "DELETE FROM requests WHERE outputs IS NOT NULL AND changed_unix_s < ? RETURNING id",
            (oldest,),
        )
        return [row[0] for row in rows]

    def entries(self) -> list[Entry]:
        """Return all that is kept, the oldest first."""
        rows = self._execute(
            "SELECT request, owner, outputs FROM requests ORDER BY changed_unix_s, id", ()
        )
        return [entry for row in rows if (entry := _entry(*row)) is not None]

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()


def _entry(request: bytes, owner: str, outputs: bytes | None) -> Entry | None:
    """Return what a row holds; None: it is another version's, or damaged."""
    try:
        return Entry(
            Request.from_wire(msgpack.unpackb(request)),
            owner,
            None
            if outputs is None
            else tuple(RequestOutput.from_wire(o) for o in msgpack.unpackb(outputs)),
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        _log.warning("a request of the journal cannot be read and is left out: %r", error)
        return None
