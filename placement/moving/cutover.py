"""Cut-overs: the pause in which KV follows the layers that change devices.

KV only grows at its end, so most of it can be copied while the old stages still serve; the pause
then carries what was added meanwhile (one round of pre-copy: Clark et al., "Live Migration of
Virtual Machines", NSDI 2005). Links carry their shares at the same time. Where it is quicker, or
the only way, the KV is computed again instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from placement.costs import transfer_s
from placement.errors import InfeasiblePlanError
from placement.moving.moves import CopyTask, CopyTerms, Piece, Step, Wires


@dataclass(frozen=True, kw_only=True, slots=True)
class KvState:
    """The KV of the sequences in flight."""

    tokens_in_use: int
    reserved_tokens: int | None = None
    """KV tokens that every layer occupies memory for; None: those in use. A pool allocated in
    full keeps its whole size."""
    growth_tokens_per_s: float | None = None
    """Tokens added per second while copying; None: KV is not copied ahead of the pause."""
    recompute_tokens_per_s: float | None = None
    """Rate at which the new stages compute the KV of the sequences again; None: they cannot."""

    def __post_init__(self) -> None:
        for name in ("tokens_in_use", "reserved_tokens", "growth_tokens_per_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({value}) must be 0 or more and finite")
        rate = self.recompute_tokens_per_s
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"recompute_tokens_per_s ({rate}) must be above 0 and finite")

    @property
    def memory_tokens(self) -> int:
        return self.tokens_in_use if self.reserved_tokens is None else self.reserved_tokens

    @property
    def recompute_s(self) -> float:
        if not self.tokens_in_use:
            return 0.0
        rate = self.recompute_tokens_per_s
        return math.inf if rate is None else self.tokens_in_use / rate


class _Shift(NamedTuple):
    """KV that follows its layer."""

    source: str
    target: str
    num_bytes: int


def with_pauses(
    steps: Sequence[Step],
    task: CopyTask,
    wires: Wires,
    terms: CopyTerms,
    kv: KvState,
    kv_bytes: Mapping[Piece, int],
) -> list[Step]:
    """Price every step's releases: the switch, and the KV that follows its layers.

    `kv_bytes` are those of one token, by layer. Where KV is lost, its device gone or its layer
    released before another had it, the sequences are computed again from their first token, for
    every layer, at the last step. O(moves + releases).

    Raises:
        InfeasiblePlanError: KV can neither follow its layers nor be computed again.
    """
    holders: dict[Piece, set[str]] = {}
    for device_id, pieces in task.held.items():
        for piece in pieces & kv_bytes.keys():
            holders.setdefault(piece, set()).add(device_id)
    is_lost = holders.keys() != kv_bytes.keys()
    priced, switches = [], []
    for step in steps:
        shifts = []
        for release in step.releases:
            if (left := holders.get(release.piece)) is not None:
                left.remove(release.device_id)
                num_bytes = kv_bytes[release.piece] * kv.tokens_in_use
                is_lost = is_lost or not left
                shifts += [_Shift(release.device_id, target, num_bytes) for target in left]
        switched = replace(step, pause_s=terms.switch_s if step.releases else 0.0)
        switches.append(switched)
        priced.append(_cut_over(switched, [s for s in shifts if s.num_bytes], wires, kv))
        for move in step.moves:
            if move.is_last and move.piece in kv_bytes:
                holders.setdefault(move.piece, set()).add(move.target)
    if is_lost:
        switches[-1] = replace(switches[-1], pause_s=switches[-1].pause_s + _replay_s(kv))
        return switches
    return priced


def _replay_s(kv: KvState) -> float:
    if math.isinf(kv.recompute_s):
        raise InfeasiblePlanError(
            f"the KV of {kv.tokens_in_use} tokens is lost with its device, or would be, and cannot "
            f"be computed again; give recompute_tokens_per_s, or drop the sequences "
            f"(tokens_in_use=0)"
        )
    return kv.recompute_s


def _cut_over(step: Step, shifts: Sequence[_Shift], wires: Wires, kv: KvState) -> Step:
    """Ship the KV of a step, or compute it again where that is no slower."""
    if not shifts:
        return step
    ahead_s, fraction = 0.0, 1.0
    if kv.growth_tokens_per_s is not None:
        ahead_s = _ship_s(shifts, wires, 1.0)
        fraction = min(1.0, kv.growth_tokens_per_s * ahead_s / kv.tokens_in_use)
    ship_s = _ship_s(shifts, wires, fraction)
    if math.isinf(min(ship_s, kv.recompute_s)):
        pairs = sorted({f"{shift.source} to {shift.target}" for shift in shifts})
        raise InfeasiblePlanError(
            f"KV of {kv.tokens_in_use} tokens has to follow its layers and a link is missing "
            f"({', '.join(pairs)}); declare it, or give recompute_tokens_per_s"
        )
    if kv.recompute_s <= ship_s:
        return replace(step, pause_s=step.pause_s + kv.recompute_s)
    num_bytes = sum(shift.num_bytes for shift in shifts)
    ahead_bytes = num_bytes if kv.growth_tokens_per_s is not None else 0
    return replace(
        step,
        pause_s=step.pause_s + ship_s,
        kv_bytes=ahead_bytes + math.ceil(fraction * num_bytes),
        kv_ahead_s=ahead_s,
    )


def _ship_s(shifts: Sequence[_Shift], wires: Wires, fraction: float) -> float:
    """Return when the busiest link has carried a fraction of the KV; infinite: there is none."""
    loads: dict[tuple[str | None, str], float] = {}
    latest_s = 0.0
    for shift in shifts:
        rate = wires.rate(shift.source, shift.target)
        if rate is None:
            return math.inf
        key = wires.key(shift.source, shift.target)
        loads[key] = loads.get(key, 0.0) + fraction * shift.num_bytes
        latest_s = max(latest_s, transfer_s(rate, loads[key]))
    return latest_s
