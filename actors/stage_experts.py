"""The side of those who use sharded experts, stages and training devices: their links to them, the
map in force, and what they have counted.

Knows no Ray.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors import wire
from actors.engine.batch import StepBatch
from actors.expert_links import ExpertLinks, Patience
from actors.expert_routes import MapRoutes
from placement.sharding.division import RowDivision
from placement.sharding.expert_map import ExpertMap
from placement.sharding.loads import ExpertLoads, LoadSummary, Phase
from placement.sharding.reactive import ReactiveTerms
from placement.sharding.recording import PHASES

_MOST_STEPS = 1000
"""Kept for whoever records them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertAccess:
    """How the stages of a node reach experts that are elsewhere."""

    fingerprint: str
    """Of the checkpoint."""
    layers: tuple[int, ...]
    """The model's layers with experts."""
    num_experts: int
    """Of each."""
    node: str
    """The stages'."""
    latency_s: Mapping[str, float] = field(default_factory=dict)
    """By other node: a message there and back."""
    patience: Patience = field(default_factory=Patience)
    guests: ReactiveTerms | None = None
    """When experts may be guests of a device; None: never."""
    is_frozen: bool = False
    """Nobody wants the gradients of their weights."""
    is_recorded: bool = False
    """The rows of each step are kept until somebody takes them."""


class StageExperts:
    """`links` runs rows from the stage's thread; everything else may come from any."""

    def __init__(
        self,
        access: ExpertAccess,
        name: str,
        keys: wire.WireKeys,
        *,
        host: str,
        beside: wire.Address,
    ) -> None:
        """`name`, `host` and `beside` are for the inbox that workers answer to."""
        self._access = access
        self._index = {layer: index for index, layer in enumerate(access.layers)}
        self._loads = ExpertLoads(len(access.layers), access.num_experts)
        self._counting = threading.Lock()
        self._phase: Phase = "prefill"
        self._rows_LE = np.zeros((len(access.layers), access.num_experts), dtype=np.int32)
        """Of the step that runs."""
        self._steps: dict[Phase, deque[NDArray[np.int32]]] = {
            phase: deque(maxlen=_MOST_STEPS) for phase in PHASES
        }
        self._version = -1
        self._device_ids: frozenset[str] = frozenset()
        self._using = threading.Lock()
        """Held while the map changes."""
        self.links = ExpertLinks(
            name,
            keys,
            access.fingerprint,
            host=host,
            beside=beside,
            patience=access.patience,
            is_frozen=access.is_frozen,
            on_rows=self._count,
        )

    @contextmanager
    def step(self, batch: StepBatch) -> Iterator[None]:
        """Run a step within: its rows are counted by its kind, and divided by one map."""
        is_decode = all(rows.length == 1 for rows in batch.rows)
        self._phase = "decode" if is_decode else "prefill"
        self._rows_LE[:] = 0
        with self.links.step():
            yield
        if self._access.is_recorded:
            with self._counting:
                self._steps[self._phase].append(self._rows_LE.copy())

    def use(self, current: ExpertMap, workers: Mapping[str, wire.Address], settle_s: float) -> bool:
        """Divide rows by this map from the next step on; one older than that in force is ignored.

        Where a device is no more, from the next layer on. Returns whether no call runs by the map
        before any more, for which it waits so long; asked again with the same map, it only waits.
        """
        access = self._access
        with self._using:
            if current.version < self._version:
                return True
            if current.version > self._version:
                division = RowDivision(current, access.node, access.latency_s, access.guests)
                is_recovery = not self._device_ids <= set(current.device_ids)
                self.links.use(MapRoutes(division, access.layers, workers), at_once=is_recovery)
                self._version, self._device_ids = current.version, frozenset(current.device_ids)
        return self.links.settle(settle_s)

    def loads(self) -> dict[Phase, LoadSummary]:
        """Return what the windows show, of all layers with experts: of those that run elsewhere
        no step."""
        with self._counting:
            return {phase: window.summary() for phase, window in self._loads.windows.items()}

    def take_steps(self) -> dict[Phase, NDArray[np.int32]]:
        """Return the rows of the steps since the last time, [steps, layers, experts]; where nobody
        took them for long, of the latest."""
        with self._counting:
            taken = {phase: list(steps) for phase, steps in self._steps.items()}
            for steps in self._steps.values():
                steps.clear()
        none = np.zeros((0, *self._rows_LE.shape), dtype=np.int32)
        return {phase: np.stack(steps) if steps else none for phase, steps in taken.items()}

    def _count(self, layer: int, counts_E: Sequence[int]) -> None:
        rows_E = np.array(counts_E, dtype=np.int64)
        self._rows_LE[self._index[layer]] = rows_E
        with self._counting:
            self._loads.add(self._phase, self._index[layer], rows_E)


class ExpertUser:
    """An actor that may use sharded experts: what an `ExpertCrew` asks of it."""

    _experts: StageExperts | None

    def expert_caller(self) -> wire.Address:
        """Return where expert workers answer this actor."""
        return self._elsewhere.links.address

    def use_experts(
        self, current: ExpertMap, workers: Mapping[str, wire.Address], settle_s: float
    ) -> bool:
        """Divide rows by this map beside steps; see `StageExperts.use`."""
        return self._elsewhere.use(current, workers, settle_s)

    def lose_experts(self, workers: list[wire.Address]) -> None:
        """Wait for these workers no more; their rows wait for another map."""
        self._elsewhere.links.lose(workers)

    def expert_loads(self) -> dict[Phase, LoadSummary]:
        """Return the rows that experts of this actor's layers got lately."""
        return self._elsewhere.loads()

    def expert_steps(self) -> dict[Phase, NDArray[np.int32]]:
        """Return what steps have asked of the experts; see `StageExperts.take_steps`."""
        return self._elsewhere.take_steps()

    @property
    def _elsewhere(self) -> StageExperts:
        assert self._experts is not None, "experts are in their layers"
        return self._experts
