"""The weight hosts as the driver sees them: who has which unit, and which versions there are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine.arrays import Array
from actors.engine.training_values import EMBEDDING_UNIT, TIED_INPUT, Unit
from actors.hosting import Host
from actors.weights import Published, WeightHostActor, WeightHostSpec
from cluster.training.errors import HostsLostError, TrainingError
from cluster.training.events import HostBytes
from cluster.training.rounds import Round
from placement.train import PlannedSlot

_START_TIMEOUT_S = 120.0
SILENCE_S = 60.0
"""After which a host that does not say that it is there is given up."""


class WeightTable:
    """References to the published weights by unit and version."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._trained = {unit.name for unit in units if unit.trained}
        self._versions: dict[str, dict[int, Any]] = {unit.name: {} for unit in units}
        self._frozen: dict[str, Any] = {}

    def put(self, published: Published) -> None:
        if published.trained is not None:
            self._versions[published.unit][published.version] = published.trained
        if published.frozen is not None:
            self._frozen[published.unit] = published.frozen

    def has(self, units: Sequence[str], version: int) -> bool:
        """Whether the version of all those units is published."""
        return all(unit not in self._trained or version in self._versions[unit] for unit in units)

    def references(self, units: Sequence[str], version: int) -> dict[str, tuple[Any, Any]]:
        """Return (trained, frozen) references by unit; None where a unit has no such part."""
        return {unit: (self._versions[unit].get(version), self._frozen.get(unit)) for unit in units}

    def drop_below(self, version: int) -> None:
        """Forget versions that no round will ask for again."""
        for versions in self._versions.values():
            for old in [number for number in versions if number < version]:
                del versions[old]


@dataclass(frozen=True, slots=True)
class StepNorms:
    """The gradients of a step, all summed."""

    norm: float
    non_finite: tuple[str, ...]
    """Units whose gradients are not all finite."""


class WeightHosts:
    """One host a node; units are shared out by their size."""

    def __init__(self, units: Sequence[Unit], *, is_tied: bool, rounds_per_step: int) -> None:
        self.units = tuple(units)
        self.table = WeightTable(units)
        self._is_tied = is_tied
        self._actors: list[Any] = []
        self._host_of: dict[str, Any] = {}
        self._adds: list[Any] = []
        self._rounds_per_step = rounds_per_step
        self._step = 0
        """Whose gradients the hosts are summing."""
        self._early: list[tuple[Round, PlannedSlot, Mapping[str, Any]]] = []
        self._hung = ""
        """Why a host was ended that others will find dead."""

    async def start(self, spec: WeightHostSpec, hosts: Sequence[Host]) -> None:
        """Start the actors and load the checkpoint's own weights as version 0."""
        self.stop()
        self.table = WeightTable(self.units)
        for host, share in zip(hosts, share_units(self.units, len(hosts)), strict=True):
            if not share:
                continue
            options = {
                "num_cpus": 0,
                "max_restarts": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(
                    node_id=host.ray_node_id, soft=False
                ),
            }
            own = WeightHostSpec(
                model=spec.model,
                allow_unverified=spec.allow_unverified,
                units=tuple(share),
                lora=spec.lora,
                experts_elsewhere=spec.experts_elsewhere,
                optimizer=spec.optimizer,
                seed=spec.seed,
                threads=spec.threads,
            )
            actor = WeightHostActor.options(**options).remote(own)
            self._actors.append(actor)
            self._host_of |= dict.fromkeys(share, actor)
        with self._losses():
            await asyncio.wait_for(
                asyncio.gather(*(actor.ready.remote() for actor in self._actors)), _START_TIMEOUT_S
            )
            await self._publish_all("load", lambda _: None)

    async def check(self) -> None:
        """Ask all hosts whether they are there; one that hangs is ended, so that no call waits.

        Raises:
            HostsLostError: One is lost, and with a lost node what its devices had made.
        """
        asked = [
            actor.ready.options(concurrency_group="control").remote() for actor in self._actors
        ]
        actors = list(self._actors)
        answers = await asyncio.gather(
            *(asyncio.wait_for(answer, SILENCE_S) for answer in asked),
            return_exceptions=True,
        )
        for actor, answer in zip(actors, answers, strict=True):
            if actor not in self._actors or not isinstance(answer, BaseException):
                continue  # it was replaced meanwhile
            if isinstance(answer, TimeoutError):
                self._hung = f"it hung for {SILENCE_S:g} s"
                ray.kill(actor)
            with self._losses():
                raise answer

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._host_of, self._adds, self._early = [], {}, [], []
        self._hung = ""

    def resume_at(self, step: int) -> None:
        """Sum gradients of this step next, after `restore` of every unit."""
        self._step = step

    async def restore(
        self, unit: str, version: int, weights: Array, state: Mapping[str, Array]
    ) -> None:
        """Put a unit back to what a checkpoint holds."""
        with self._losses():
            host = self._host_of[unit]
            self.table.put(await host.restore.remote(unit, version, weights, dict(state)))

    def add(self, round_: Round, slot: PlannedSlot, gradients: Mapping[str, Any]) -> None:
        """Hand a slot's gradients on to the hosts of their units.

        Those of the next step wait here until this step's optimizer was called.
        """
        if round_.step > self._step:
            self._early.append((round_, slot, gradients))
            return
        for name, gradient in gradients.items():
            unit = EMBEDDING_UNIT if name == TIED_INPUT else name
            parts = self._parts(unit)
            order = parts * round_.number
            if parts == 2 and (slot.kind != "fused" or name == TIED_INPUT):
                order += 1
            expected = parts * self._rounds_per_step
            add = self._host_of[unit].add
            self._adds.append(add.remote(unit, round_.step, order, gradient, expected))

    async def norms(self) -> StepNorms:
        """Wait until all gradients of the step are summed; returns their norm."""
        with self._losses():
            await asyncio.gather(*self._adds)
            self._adds = []
            parts = await asyncio.gather(*(actor.squared_norms.remote() for actor in self._actors))
        squares: dict[str, float] = {}
        for part in parts:
            squares |= part
        # In the order of the units, so that the sum does not depend on who has which.
        total = sum(squares[unit.name] for unit in self.units if unit.name in squares)
        bad = tuple(name for name, value in squares.items() if not value < float("inf"))
        return StepNorms(norm=total**0.5, non_finite=bad)

    async def step(
        self, version: int, *, learning_rate: float, scale: float, on_change: Callable[[], None]
    ) -> None:
        """Step every unit; each new version is in the table as soon as it is published."""
        stepping = self._publish_all("step", lambda _: on_change(), version, learning_rate, scale)
        self._step += 1
        early, self._early = self._early, []
        for waiting in early:
            self.add(*waiting)
        with self._losses():
            await stepping

    async def export(self, unit: str) -> tuple[Array, dict[str, Array]]:
        """Return a unit's weights and optimizer state."""
        with self._losses():
            exported: tuple[Array, dict[str, Array]] = await self._host_of[unit].export.remote(unit)
        return exported

    async def non_finite_units(self) -> list[str]:
        """Return the units whose weights are not all finite."""
        with self._losses():
            parts = await asyncio.gather(*(a.non_finite_units.remote() for a in self._actors))
        return [unit for part in parts for unit in part]

    async def host_bytes(self) -> HostBytes:
        """Return what all hosts hold."""
        with self._losses():
            parts = await asyncio.gather(*(actor.host_bytes.remote() for actor in self._actors))
        return HostBytes(
            num_trained=sum(unit.num_trained for unit in self.units),
            num_frozen=sum(unit.num_frozen for unit in self.units),
            weight_bytes=sum(held.weights * held.versions for held, _ in parts),
            residual_bytes=sum(held.residuals for held, _ in parts),
            gradient_bytes=sum(held.gradients for held, _ in parts),
            moment_bytes=sum(held.moments for held, _ in parts),
            frozen_bytes=sum(frozen_bytes for _, frozen_bytes in parts),
        )

    def _parts(self, unit: str) -> int:
        """How many gradients a round has for a unit: two for an embedding that is the head too."""
        return 2 if self._is_tied and unit == EMBEDDING_UNIT else 1

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Turn the death of a host into one error."""
        try:
            yield
        except (RayActorError, ObjectLostError, TimeoutError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if "creation task" in lines[0]:
                raise TrainingError(f"a weight host did not start: {lines[-1]}") from error
            raise HostsLostError(f"a weight host is lost: {self._hung or lines[0]}") from error
        except RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TrainingError(f"a weight host failed: {lines[-1]}") from error

    def _publish_all(
        self, method: str, on_published: Callable[[Published], None], *arguments: Any
    ) -> Awaitable[Any]:
        """Call all hosts at once; the awaitable ends when everything is published."""

        async def follow(stream: Any) -> None:
            async for reference in stream:
                published = await reference
                self.table.put(published)
                on_published(published)

        calls = [getattr(actor, method).options(num_returns="streaming") for actor in self._actors]
        streams = [call.remote(*arguments) for call in calls]
        return asyncio.gather(*(follow(stream) for stream in streams))


def share_units(units: Sequence[Unit], num_hosts: int) -> list[list[str]]:
    """Give each host a contiguous run of units of about equal size."""
    weights = [unit.num_trained * 4 + unit.num_frozen for unit in units]
    total, taken = sum(weights), 0
    shares: list[list[str]] = [[] for _ in range(num_hosts)]
    for unit, weight in zip(units, weights, strict=True):
        middle = taken + weight / 2
        shares[min(num_hosts - 1, int(middle * num_hosts / max(1, total)))].append(unit.name)
        taken += weight
    return shares
