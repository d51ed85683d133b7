"""Expert workers in processes of their own, without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

from actors import wire
from actors.expert import ExpertSpec, ExpertWorker

_SPAWN = multiprocessing.get_context("spawn")


class ExpertProcess:
    """One worker; the constructor returns before it has loaded."""

    def __init__(self, spec: ExpertSpec, keys: wire.WireKeys, monitor: wire.Address) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=_serve, args=(spec, keys, monitor, theirs), daemon=True
        )
        self._process.start()
        self._address: wire.Address | None = None

    def ready(self) -> wire.Address:
        """Wait until it has loaded; returns where it receives."""
        if self._address is None:
            self._address = self._pipe.recv()
        return self._address

    def connect(
        self, callers: Sequence[wire.Address], siblings: Mapping[str, wire.Address]
    ) -> None:
        self._pipe.send((callers, siblings))
        self._pipe.recv()

    def kill(self) -> None:
        """End it as SIGKILL does. Safe to call twice."""
        self._process.kill()
        self._process.join()


def _serve(spec: ExpertSpec, keys: wire.WireKeys, monitor: wire.Address, pipe: Any) -> None:
    worker = ExpertWorker(spec, keys, monitor)
    pipe.send(worker.ready())
    while True:
        worker.connect(*pipe.recv())
        pipe.send(None)
