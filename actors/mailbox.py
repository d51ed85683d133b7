"""Where a running slot waits for what other actors and the driver send it. No Ray here."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any


class SlotCancelledError(RuntimeError):
    """The driver took the slot back; its device goes on with the next one."""


class Mailbox:
    """Items of one slot by key; many threads may put, one takes."""

    def __init__(self) -> None:
        self._items: dict[Hashable, Any] = {}
        self._changed = threading.Condition()
        self._is_cancelled = False
        self._failure: BaseException | None = None

    def put(self, key: Hashable, item: Any) -> None:
        with self._changed:
            self._items[key] = item
            self._changed.notify_all()

    def cancel(self) -> None:
        """Make `take` raise from now on."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Make `take` raise what went wrong where the items come from."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def is_cancelled(self) -> bool:
        with self._changed:
            return self._is_cancelled

    def check(self) -> None:
        """Raise SlotCancelledError once the slot was taken back."""
        if self.is_cancelled:
            raise SlotCancelledError

    def take(self, key: Hashable, timeout_s: float, *, cancellable: bool = True) -> Any:
        """Return the item, which leaves the box.

        Raises:
            SlotCancelledError: The slot was taken back.
            TimeoutError: It did not come in time.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: key in self._items or self._failure or (cancellable and self._is_cancelled),
                timeout_s,
            )
            if cancellable and self._is_cancelled:
                raise SlotCancelledError
            if self._failure is not None:
                raise self._failure
            if key not in self._items:
                raise TimeoutError(f"{key} did not come within {timeout_s:g} s")
            return self._items.pop(key)
