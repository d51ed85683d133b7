"""Who did what to a deployment: one JSON object a line, appended and on the disk before it counts.

    {"time": "2026-01-31T12:00:00.000+00:00", "deployment": "tiny", "act": "publish",
     "who": "alice", "source": "10.0.0.7:51234", "outcome": "done", "adapter": "helpful"}

`who` is a key's name, `owner` for the holder of the deployment's token, or empty for a caller who
is not known. Nothing secret is ever passed in; texts are cut off at a length that fits any of ours.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cluster.rates import TokenBucket
from cluster.runstate import run_folder

Act = Literal[
    "publish",
    "remove_adapter",
    "abort",
    "shut_down",
    "authenticate",
    "authorize",
    "create_key",
    "revoke_key",
    "drain",
    "rebalance",
]

DONE = "done"
REFUSED = "refused"
_MOST_CHARACTERS = 300
_REFUSALS_PER_MINUTE = 30
"""Refused callers beyond that are counted in the next line instead of having one each: whoever
knocks must not fill the disk."""


def default_audit_file() -> Path:
    """Return the file of all this user's deployments on this machine."""
    return run_folder() / "audit.jsonl"


class AuditLog:
    """An audit file, open for appending. Several processes may share it; so may threads."""

    def __init__(
        self,
        path: Path,
        *,
        deployment: str = "",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `OSError` when the file cannot be written."""
        self.path = path
        self._deployment = deployment
        self._now = now
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._refusals = TokenBucket(_REFUSALS_PER_MINUTE, monotonic_s())
        self._untold = 0
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise OSError(
                f"the audit file {path} cannot be written ({error.strerror}); set "
                "gateway.audit_file to another"
            ) from None

    def record(
        self, act: Act, *, who: str, source: str, outcome: str = DONE, **details: str | int | float
    ) -> None:
        """Append one act. Blocks until it is on the disk: call it from a thread, not from a loop.

        Raises:
            OSError: It could not be written.
        """
        entry = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "deployment": self._deployment,
            "act": act,
            "who": who,
            "source": source,
            "outcome": outcome,
            **details,
        }
        line = json.dumps({name: _cut(value) for name, value in entry.items()}) + "\n"
        with self._lock:
            # One write for a whole line: lines of several processes do not mix.
            os.write(self._descriptor, line.encode())
            os.fsync(self._descriptor)

    def wants_refusal(self) -> bool:
        """Whether a refused caller is to have a line now; counts those that are not."""
        with self._lock:
            now_s = self._monotonic_s()
            if self._refusals.wait_s(1, now_s) > 0:
                self._untold += 1
                return False
            self._refusals.take(1, now_s)
            return True

    def record_refusal(
        self, act: Act, *, who: str, source: str, what: str, outcome: str = REFUSED
    ) -> None:
        """Append a refused call for which `wants_refusal` was true, and how many had no line."""
        with self._lock:
            untold, self._untold = self._untold, 0
        self.record(act, who=who, source=source, outcome=outcome, what=what, untold_before=untold)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _cut(value: str | float) -> str | float:
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        return value[:_MOST_CHARACTERS] + "..."
    return value
