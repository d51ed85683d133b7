"""A thread that serves until it is told to stop, and whose failure does not go unnoticed."""

from __future__ import annotations

import threading
from collections.abc import Callable

_JOIN_TIMEOUT_S = 10.0


class ServingLoop:
    """Runs `turn` over and over on a thread of its own."""

    def __init__(self, name: str, turn: Callable[[], None]) -> None:
        self._turn = turn
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self) -> None:
        """Block until the loop ends; raises what ended it, if that was a failure."""
        self._stopping.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the loop after its present turn. Safe to call twice, and before `start`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:  # noqa: BLE001 - raised again by `watch`
            self._failure = error
            self._stopping.set()
