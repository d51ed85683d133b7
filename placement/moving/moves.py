"""Moves: copies of a model's pieces between devices, in steps that never overfill a memory.

A piece is what moves as a whole: a layer, the embedding, the head, or one expert of one layer. In
every step some devices first release pieces (others hold them), then copies run: at the same time
on different links, one after another on the same link. A copy serves once its step has ended, so
pieces are loaded before they are released and every piece stays live somewhere, unless an outage
is allowed.

Which order fits memory at every moment is NP-hard in general (Hall, Hartline, Karlin, Saia and
Wilkes, "On Algorithms for Efficient Data Migration", SODA 2001). This is a greedy order that
releases only where room is short; where full devices wait for each other it takes a piece out of
the way to a device with room. It may give up although an order exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from placement.costs import occupied_s
from placement.errors import InfeasiblePlanError
from placement.topology import LinkRate, Topology

Part = Literal["embedding", "expert", "head", "layer"]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Piece:
    """What moves as a whole."""

    part: Part
    layer: int = -1
    """-1: it belongs to no layer."""
    expert: int = -1

    def __str__(self) -> str:
        if self.part == "expert":
            return f"expert {self.expert} of layer {self.layer}"
        return f"layer {self.layer}" if self.part == "layer" else f"the {self.part}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Bytes [first_byte, first_byte + num_bytes) of a piece, copied to `target`."""

    piece: Piece
    source: str | None
    """Device id; None: the checkpoint on the target's node."""
    target: str
    first_byte: int
    num_bytes: int
    is_last: bool
    """The piece is whole after it."""
    is_detour: bool = False
    """The target only keeps the piece while a full device takes in something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A device drops a piece; from here on others serve it."""

    device_id: str
    piece: Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Releases, then copies that run together."""

    releases: tuple[Release, ...]
    moves: tuple[Move, ...]
    copy_s: float
    """Until the busiest link has carried its copies."""
    is_live: bool
    """Every piece is whole on some device throughout the step; if not, nothing is served."""
    pause_s: float = 0.0
    """Nothing is served while the releases change who serves."""
    kv_bytes: int = 0
    """KV that follows its layers at the releases."""
    kv_ahead_s: float = 0.0
    """Background seconds in which most of that KV is copied before the pause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTerms:
    """How copies may be made."""

    step_budget_bytes: int | None = None
    """Most bytes one step copies, all links together; a larger piece takes several steps.
    None: without limit."""
    checkpoint_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Rate at which a node's devices read the checkpoint, for the nodes that hold it."""
    switch_s: float = 0.0
    """Pause of a step that releases something, beside the KV it moves."""
    allow_outage: bool = False
    """A piece may leave its last device when nothing else makes room and the checkpoint has it;
    nothing is served until it is back."""

    def __post_init__(self) -> None:
        if self.step_budget_bytes is not None and self.step_budget_bytes < 1:
            raise ValueError(f"step_budget_bytes ({self.step_budget_bytes}) must be at least 1")
        if not (math.isfinite(self.switch_s) and self.switch_s >= 0):
            raise ValueError(f"switch_s ({self.switch_s}) must be 0 or more and finite")
        for node, rate in self.checkpoint_bytes_per_s.items():
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(
                    f"checkpoint_bytes_per_s of {node} ({rate}) must be above 0 and finite; "
                    f"leave out a node without the checkpoint"
                )


class Wires:
    """What carries a copy: the link between two nodes, or a node's checkpoint."""

    def __init__(self, topology: Topology, terms: CopyTerms) -> None:
        self._topology = topology
        self._node = {device.id: device.node for device in topology.devices}
        self._checkpoints = {
            node: LinkRate(bandwidth_bytes_per_s=rate, latency_s=0.0)
            for node, rate in terms.checkpoint_bytes_per_s.items()
        }

    def key(self, source: str | None, target: str) -> tuple[str | None, str]:
        """Name the wire: copies with the same key wait for each other."""
        return (None if source is None else self._node[source], self._node[target])

    def rate(self, source: str | None, target: str) -> LinkRate | None:
        """Return what the wire can do; None: there is none."""
        if source is None:
            return self._checkpoints.get(self._node[target])
        return self._topology.rate(self._node[source], self._node[target])


class CopyTask(NamedTuple):
    """Who holds what, who shall, and what fits."""

    held: Mapping[str, frozenset[Piece]]
    """By device."""
    wanted: Mapping[str, frozenset[Piece]]
    copy_bytes: Mapping[Piece, int]
    memory_bytes: Mapping[Piece, int]
    """What a piece occupies from the first byte of its copy on."""
    room_bytes: Mapping[str, int]
    rank: Mapping[tuple[str, Piece], int]
    """Of each wanted copy: lower comes first."""


class _Job(NamedTuple):
    rank: int
    piece: Piece
    target: str


def order_moves(task: CopyTask, wires: Wires, terms: CopyTerms) -> tuple[Step, ...]:
    """Order the copies and releases that turn `held` into `wanted`.

    Every copy comes from the holder, or the checkpoint, that would be done with it first in its
    step (ties: lowest device id, the checkpoint last). O(copies x (holders + releases)) for every
    time that something blocks.

    Raises:
        InfeasiblePlanError: `wanted` does not fit, no link or checkpoint brings a piece, or full
            devices wait for each other.
    """
    for device_id, pieces in sorted(task.wanted.items()):
        need = sum(task.memory_bytes[piece] for piece in pieces)
        if need > task.room_bytes[device_id]:
            raise InfeasiblePlanError(
                f"{device_id} would hold {need} bytes (weights and reserved KV) and offers "
                f"{task.room_bytes[device_id]}; plan it fewer pieces, or reserve fewer KV tokens"
            )
    return _Order(task, wires, terms).run()


class _Order:
    """The steps so far, the step in the making, and who holds what by then."""

    def __init__(self, task: CopyTask, wires: Wires, terms: CopyTerms) -> None:
        self._task, self._wires, self._terms = task, wires, terms
        self._held = {device_id: set(pieces) for device_id, pieces in task.held.items()}
        self._free = {
            device_id: task.room_bytes[device_id] - sum(task.memory_bytes[p] for p in pieces)
            for device_id, pieces in task.held.items()
        }
        self._holders: dict[Piece, set[str]] = {
            piece: set() for pieces in task.wanted.values() for piece in pieces
        }
        for device_id, pieces in task.held.items():
            for piece in pieces:
                self._holders[piece].add(device_id)
        self._num_missing = sum(not holders for holders in self._holders.values())
        self._detoured: set[Piece] = set()
        self._steps: list[Step] = []
        self._begin()

    def run(self) -> tuple[Step, ...]:
        pending = sorted(
            _Job(self._task.rank[device_id, piece], piece, device_id)
            for device_id, pieces in self._task.wanted.items()
            for piece in pieces - self._held[device_id]
        )
        while pending:
            blocked = [job for job in pending if not self._place(job)]
            if len(blocked) < len(pending):
                self._end()
            elif not (self._detour(blocked) or self._give_up_a_piece(blocked)):
                raise InfeasiblePlanError(self._why_blocked(blocked[0]))
            pending = blocked
        for device_id in sorted(self._held):
            for piece in sorted(self._held[device_id] - self._task.wanted[device_id]):
                self._release(device_id, piece)
        if self._releases:
            self._end()
        return tuple(self._steps)

    def _begin(self) -> None:
        self._releases: list[Release] = []
        self._moves: list[Move] = []
        self._busy_s: dict[tuple[str | None, str], float] = {}
        self._copied_bytes = 0

    def _end(self) -> None:
        """Close the step: what arrived whole is live from here on."""
        self._steps.append(
            Step(
                releases=tuple(self._releases),
                moves=tuple(self._moves),
                copy_s=max(self._busy_s.values(), default=0.0),
                is_live=not self._num_missing,
            )
        )
        for move in self._moves:
            if move.is_last:
                self._num_missing -= not self._holders[move.piece]
                self._holders[move.piece].add(move.target)
                self._held[move.target].add(move.piece)
        self._begin()

    def _place(self, job: _Job) -> bool:
        """Copy a piece in this step, if a source has it and there is, or can be made, room."""
        source = self._source(job.piece, job.target)
        if source is None or not self._can_hold(job.target, job.piece):
            return False
        self._make_room(job.target, job.piece)
        self._copy(job.piece, source.device_id, job.target)
        return True

    def _copy(
        self, piece: Piece, source: str | None, target: str, *, is_detour: bool = False
    ) -> None:
        """Add the copy, over as many steps as the budget asks for."""
        num_bytes, first, budget = self._task.copy_bytes[piece], 0, self._terms.step_budget_bytes
        self._free[target] -= self._task.memory_bytes[piece]
        while True:
            if budget is not None and num_bytes and self._copied_bytes == budget:
                self._end()
            left = num_bytes - first
            chunk = left if budget is None else min(left, budget - self._copied_bytes)
            move = Move(
                piece=piece,
                source=source,
                target=target,
                first_byte=first,
                num_bytes=chunk,
                is_last=chunk == left,
                is_detour=is_detour,
            )
            self._busy_s[self._wires.key(source, target)] = self._done_s(source, target, chunk)
            self._moves.append(move)
            self._copied_bytes += chunk
            first += chunk
            if move.is_last:
                return

    def _done_s(self, source: str | None, target: str, num_bytes: int) -> float:
        """Return when a copy that joins this step would be done; infinite: it has no wire."""
        rate = self._wires.rate(source, target)
        if rate is None:
            return math.inf
        begin_s = self._busy_s.get(self._wires.key(source, target), rate.latency_s)
        return begin_s + occupied_s(rate, num_bytes)

    def _source(self, piece: Piece, target: str) -> _Source | None:
        """Return whence the piece arrives first; None: from nowhere yet."""
        num_bytes = self._task.copy_bytes[piece]
        candidates: list[str | None] = [*sorted(self._holders[piece]), None]
        done_s, at = min((self._done_s(c, target, num_bytes), i) for i, c in enumerate(candidates))
        return None if math.isinf(done_s) else _Source(candidates[at])

    def _releasable(self, device_id: str) -> list[Piece]:
        """Return what the device may drop at the beginning of this step."""
        reading = {move.piece for move in self._moves if move.source == device_id}
        surplus = self._held[device_id] - self._task.wanted[device_id] - reading
        return sorted(piece for piece in surplus if len(self._holders[piece]) > 1)

    def _can_hold(self, device_id: str, piece: Piece) -> bool:
        short = self._task.memory_bytes[piece] - self._free[device_id]
        if short <= 0:
            return True
        return short <= sum(self._task.memory_bytes[p] for p in self._releasable(device_id))

    def _make_room(self, device_id: str, piece: Piece) -> None:
        """Release all that the device may drop, if the piece does not fit otherwise."""
        if self._task.memory_bytes[piece] > self._free[device_id]:
            for surplus in self._releasable(device_id):
                self._release(device_id, surplus)

    def _release(self, device_id: str, piece: Piece) -> None:
        self._held[device_id].remove(piece)
        self._holders[piece].remove(device_id)
        self._num_missing += not self._holders[piece]
        self._free[device_id] += self._task.memory_bytes[piece]
        self._releases.append(Release(device_id=device_id, piece=piece))

    def _detour(self, blocked: Sequence[_Job]) -> bool:
        """Take the piece that is cheapest to take there and on out of a full device's way."""
        best = min(self._detours(blocked), default=None)
        if best is None:
            return False
        _, piece, via, source = best
        self._make_room(via, piece)
        self._copy(piece, source, via, is_detour=True)
        self._detoured.add(piece)
        self._end()
        self._release(source, piece)
        return True

    def _detours(self, blocked: Sequence[_Job]) -> Iterator[tuple[float, Piece, str, str]]:
        """Yield (seconds there and on, piece, via, from); no piece makes two detours."""
        goals = {job.piece: job.target for job in reversed(blocked)}
        for source in sorted({job.target for job in blocked}):
            surplus = self._held[source] - self._task.wanted[source] - self._detoured
            for piece in sorted(surplus & goals.keys()):
                for via in sorted(self._held.keys() - {source}):
                    num_bytes = self._task.copy_bytes[piece]
                    seconds = self._done_s(source, via, num_bytes)
                    seconds += self._done_s(via, goals[piece], num_bytes)
                    if math.isfinite(seconds) and self._can_hold(via, piece):
                        yield seconds, piece, via, source

    def _give_up_a_piece(self, blocked: Sequence[_Job]) -> bool:
        """Release the piece that is quickest to read again from the checkpoint, if allowed."""
        if not self._terms.allow_outage:
            return False
        goals = {job.piece: job.target for job in reversed(blocked)}
        choices = [
            (self._done_s(None, goals[piece], self._task.copy_bytes[piece]), piece, holder)
            for holder in {job.target for job in blocked}
            for piece in (self._held[holder] - self._task.wanted[holder]) & goals.keys()
        ]
        seconds, piece, holder = min(choices, default=(math.inf, blocked[0].piece, ""))
        if math.isinf(seconds):
            return False
        self._release(holder, piece)
        return True

    def _why_blocked(self, job: _Job) -> str:
        need, free = self._task.memory_bytes[job.piece], self._free[job.target]
        if self._source(job.piece, job.target) is None:
            holders = ", ".join(sorted(self._holders[job.piece])) or "no live device"
            return (
                f"{job.piece} cannot reach {job.target}: {holders} holds it, no link leads there "
                f"and checkpoint_bytes_per_s names no checkpoint on its node; declare one of them"
            )
        return (
            f"{job.piece} needs {need} bytes on {job.target}, which has {free} free of "
            f"{self._task.room_bytes[job.target]} and can release nothing before others hold it; "
            f"no device has room to keep a piece meanwhile. Free {need - free} bytes (fewer "
            f"reserved KV tokens, a lower headroom_fraction, one more device), or set allow_outage "
            f"with a checkpoint rate."
        )


class _Source(NamedTuple):
    device_id: str | None
    """None: the checkpoint."""
