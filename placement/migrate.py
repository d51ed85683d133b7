"""From one plan to the next: what moves, in which order, for how long, and is it worth it.

The parts of the new plan are handed out among interchangeable devices so that the fewest bytes move
(`placement.moving.handout`), weights are copied in the background in an order that fits memory at
every moment (`placement.moving.moves`), and a device that releases a layer it ran hands over in a
pause (`placement.moving.cutover`).

It is worth it when the seconds saved per step, times the steps until the load drifts again, exceed
the pause and the part of the background copying that is not hidden.

Where memory forces more than one cut-over, a device may run layers that are not contiguous between
two of them; `num_cut_overs` tells.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from placement.costs import memory_cap_bytes
from placement.moving.cutover import KvState, with_pauses
from placement.moving.handout import (
    Holdings,
    Pieces,
    Renaming,
    check_known,
    hand_out,
    hand_out_layers,
    interchangeable_groups,
    renamings,
)
from placement.moving.moves import (
    CopyTask,
    CopyTerms,
    Move,
    Piece,
    Release,
    Step,
    Wires,
    order_moves,
)
from placement.stages import StagesPlan
from placement.topology import Topology
from placement.workload import ModelProfile

NO_KV = KvState(tokens_in_use=0)
"""Experts keep none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What the new plan is expected to save."""

    old_step_s: float
    new_step_s: float
    steps: float
    """Expected until the load, or the cluster, differs again."""
    slowdown_fraction: float
    """Share of serving that is lost while copies run in the background; 0: they are hidden."""

    def __post_init__(self) -> None:
        for name in ("old_step_s", "new_step_s", "steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({value}) must be 0 or more and finite")
        if not 0.0 <= self.slowdown_fraction <= 1.0:
            raise ValueError(f"slowdown_fraction ({self.slowdown_fraction}) must be from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationPlan:
    """The steps from one plan to the next, what they cost, and what they bring."""

    steps: tuple[Step, ...]
    renamed: tuple[Renaming, ...]
    """Apply to the new plan (`renamed_stages`, `renamed_holdings`) for what is reached."""
    least_bytes: int
    """Weights that devices must receive. No hand-out among interchangeable devices needs fewer
    bytes, the KV in use of moved layers counted with them."""
    moved_bytes: int
    """Weights that the steps copy; more than `least_bytes` only by detours and outages."""
    kv_bytes: int
    background_s: float
    pause_s: float
    gain_s: float
    cost_s: float
    worth_it: bool
    reason: str

    @property
    def num_cut_overs(self) -> int:
        """Times at which a device hands over to another."""
        return sum(1 for step in self.steps if step.releases)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        for step in value["steps"]:
            step["releases"], step["moves"] = list(step["releases"]), list(step["moves"])
        return value | {name: list(value[name]) for name in ("steps", "renamed")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MigrationPlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["steps"] = tuple(_step_from_json(step) for step in value["steps"])
        fields["renamed"] = tuple(Renaming(**renaming) for renaming in value["renamed"])
        return cls(**fields)


def _step_from_json(value: Mapping[str, Any]) -> Step:
    fields = dict(value)
    for name, kind in (("releases", Release), ("moves", Move)):
        fields[name] = tuple(kind(**(f | {"piece": Piece(**f["piece"])})) for f in value[name])
    return Step(**fields)


def migrate_stages(
    old: StagesPlan,
    new: StagesPlan,
    profile: ModelProfile,
    topology: Topology,
    *,
    kv: KvState,
    outlook: Outlook,
    terms: CopyTerms | None = None,
    headroom_fraction: float = 0.1,
    activation_bytes: int = 0,
    interchangeable: Sequence[Collection[str]] | None = None,
) -> MigrationPlan:
    """Order the moves that turn the stages of `old` into those of `new`.

    Old stages on devices that the topology lacks are lost: their weights come from the
    checkpoint, the KV is computed again, and nothing is served before. `activation_bytes` stay
    free on every device. `interchangeable` names groups of devices that may take each other's
    stage; None: those with equal figures on the same node, which have equal links. A tied head
    is a copy of the embedding. O(devices^3) for the hand-out, then as `order_moves`.

    Raises:
        InfeasiblePlanError: Memory, links or lost KV rule it out; the message says what would help.
        ValueError: A plan is not of this model or has unknown devices, or a setting is malformed.
    """
    _check_plan("old", old, profile)
    _check_plan("new", new, profile)
    check_known({stage.device_id for stage in new.stages}, topology)
    terms = terms or CopyTerms()
    copy_bytes = _stage_bytes(profile)
    kv_bytes = {p: profile.layers[p.layer].kv_bytes_per_token for p in copy_bytes if p.layer >= 0}
    held, planned = (_stage_pieces(plan, profile, topology) for plan in (old, new))
    actual = hand_out(
        held,
        planned,
        interchangeable_groups(topology, interchangeable, {}),
        _with_tokens(copy_bytes, kv_bytes, kv.tokens_in_use),
    )
    wanted = {actual[device_id]: pieces for device_id, pieces in planned.items()}
    task = CopyTask(
        held=held,
        wanted=wanted,
        copy_bytes=copy_bytes,
        memory_bytes=_with_tokens(copy_bytes, kv_bytes, kv.memory_tokens),
        room_bytes={
            device.id: max(
                0, memory_cap_bytes(device.memory_bytes, headroom_fraction) - activation_bytes
            )
            for device in topology.devices
        },
        rank=_stage_ranks(held, wanted, profile.num_layers),
    )
    wires = Wires(topology, terms)
    steps = with_pauses(order_moves(task, wires, terms), task, wires, terms, kv, kv_bytes)
    return _assemble(steps, renamings(actual, None), task, outlook)


def migrate_experts(
    old: Holdings,
    new: Holdings,
    topology: Topology,
    *,
    expert_bytes: Sequence[int],
    room_bytes: Mapping[str, int],
    outlook: Outlook,
    terms: CopyTerms | None = None,
    interchangeable: Sequence[Collection[str]] | None = None,
) -> MigrationPlan:
    """Order the copies that turn the experts held by `old` into those of `new`.

    `expert_bytes` are those of one expert of each layer; `room_bytes` what each device has for
    experts, spare copies included. Layers are balanced one by one, so interchangeable devices
    (`migrate_stages`; also with equal room) take each other's experts layer by layer, or, where
    that would exceed a room, all layers at once. A copy serves from the step after it on.

    Raises:
        InfeasiblePlanError: Memory or links rule it out; the message says what would help.
        ValueError: `new` drops an expert or has unknown devices, or a setting is malformed.
    """
    terms = terms or CopyTerms()
    check_known(new.keys(), topology)
    check_known(room_bytes.keys(), topology)
    held, planned = (_expert_pieces(part, topology, len(expert_bytes)) for part in (old, new))
    everywhere = {piece for pieces in planned.values() for piece in pieces}
    if dropped := sorted({p for pieces in held.values() for p in pieces} - everywhere):
        raise ValueError(
            f"the new plan has no copy of {len(dropped)} experts that are held "
            f"({dropped[0]} first); every expert needs at least 1"
        )
    copy_bytes = {piece: expert_bytes[piece.layer] for piece in everywhere}
    room = {device.id: room_bytes.get(device.id, 0) for device in topology.devices}
    groups = interchangeable_groups(topology, interchangeable, room)
    wanted, renamed = hand_out_layers(held, planned, groups, copy_bytes, len(expert_bytes))
    if any(sum(copy_bytes[p] for p in wanted[d]) > room[d] for d in room):
        actual = hand_out(held, planned, groups, copy_bytes)
        wanted = {actual[device_id]: pieces for device_id, pieces in planned.items()}
        renamed = renamings(actual, None)
    live = {piece for pieces in held.values() for piece in pieces}
    rank = {(d, p): p.layer + 1 if p in live else 0 for d in wanted for p in wanted[d]}
    task = CopyTask(held, wanted, copy_bytes, copy_bytes, room, rank)
    wires = Wires(topology, terms)
    steps = with_pauses(order_moves(task, wires, terms), task, wires, terms, NO_KV, {})
    return _assemble(steps, renamed, task, outlook)


def _stage_bytes(profile: ModelProfile) -> dict[Piece, int]:
    """Return every piece's weights; a tied head is the embedding."""
    embedding, head = profile.embedding.weight_bytes, profile.head.weight_bytes
    pieces = {
        Piece(part="layer", layer=index): layer.weight_bytes
        for index, layer in enumerate(profile.layers)
    }
    if profile.head_is_embedding:
        return pieces | {Piece(part="embedding"): max(embedding, head)}
    return pieces | {Piece(part="embedding"): embedding, Piece(part="head"): head}


def _with_tokens(
    copy_bytes: Mapping[Piece, int], kv_bytes: Mapping[Piece, int], tokens: int
) -> dict[Piece, int]:
    return {p: weights + kv_bytes.get(p, 0) * tokens for p, weights in copy_bytes.items()}


def _stage_pieces(plan: StagesPlan, profile: ModelProfile, topology: Topology) -> Pieces:
    """Return what every device of the topology holds; other devices are lost."""
    pieces: dict[str, set[Piece]] = {device.id: set() for device in topology.devices}
    head = Piece(part="embedding" if profile.head_is_embedding else "head")
    for stage in plan.stages:
        held = pieces.get(stage.device_id, set())
        held.update(Piece(part="layer", layer=i) for i in range(stage.first_layer, stage.end_layer))
        if stage.first_layer == 0:
            held.add(Piece(part="embedding"))
        if stage.end_layer == profile.num_layers:
            held.add(head)
    return {device_id: frozenset(held) for device_id, held in pieces.items()}


def _expert_pieces(holdings: Holdings, topology: Topology, num_layers: int) -> Pieces:
    for device_id, layers in sorted(holdings.items()):
        if len(layers) != num_layers:
            raise ValueError(
                f"{device_id} has experts for {len(layers)} layers and expert_bytes has "
                f"{num_layers}; give one set per layer, empty where it holds none"
            )
    return {
        device.id: frozenset(
            Piece(part="expert", layer=layer, expert=expert)
            for layer, experts in enumerate(holdings.get(device.id, ()))
            for expert in experts
        )
        for device in topology.devices
    }


def _stage_ranks(held: Pieces, wanted: Pieces, num_layers: int) -> dict[tuple[str, Piece], int]:
    """Rank lost pieces first, then by distance to the layers that the device keeps.

    So a device that grows by neighbouring layers holds contiguous ones at any time.
    """
    live = {piece for pieces in held.values() for piece in pieces}
    ends = {"embedding": -1, "head": num_layers}
    ranks = {}
    for device_id, pieces in wanted.items():
        kept = [ends.get(p.part, p.layer) for p in pieces & held[device_id]] or [0]
        for piece in pieces:
            at = ends.get(piece.part, piece.layer)
            distance = min(abs(at - layer) for layer in kept)
            ranks[device_id, piece] = 1 + distance if piece in live else 0
    return ranks


def _check_plan(name: str, plan: StagesPlan, profile: ModelProfile) -> None:
    ends = [0, *(stage.end_layer for stage in plan.stages)]
    if ends != [*(stage.first_layer for stage in plan.stages), profile.num_layers]:
        raise ValueError(
            f"the {name} plan covers {ends[-1]} layers of {plan.model} and {profile.name} has "
            f"{profile.num_layers}; give two plans of this model"
        )


def _assemble(
    steps: Sequence[Step], renamed: Sequence[Renaming], task: CopyTask, outlook: Outlook
) -> MigrationPlan:
    missing = [
        task.copy_bytes[piece]
        for device_id, pieces in task.wanted.items()
        for piece in pieces - task.held[device_id]
    ]
    background_s = math.fsum(s.copy_s * s.is_live + s.kv_ahead_s for s in steps)
    pause_s = math.fsum(s.copy_s * (not s.is_live) + s.pause_s for s in steps)
    gain_s = (outlook.old_step_s - outlook.new_step_s) * outlook.steps
    cost_s = pause_s + outlook.slowdown_fraction * background_s
    live = {piece for pieces in task.held.values() for piece in pieces}
    is_cut_off = any(pieces - live for pieces in task.wanted.values())
    return MigrationPlan(
        steps=tuple(steps),
        renamed=tuple(renamed),
        least_bytes=sum(missing),
        moved_bytes=sum(move.num_bytes for step in steps for move in step.moves),
        kv_bytes=sum(step.kv_bytes for step in steps),
        background_s=background_s,
        pause_s=pause_s,
        gain_s=gain_s,
        cost_s=cost_s,
        worth_it=bool(steps) and (is_cut_off or gain_s > cost_s),
        reason=_reason(steps, outlook, is_cut_off, gain_s, pause_s, background_s),
    )


def _reason(
    steps: Sequence[Step],
    outlook: Outlook,
    is_cut_off: bool,
    gain_s: float,
    pause_s: float,
    background_s: float,
) -> str:
    if not steps:
        return "every device holds what the new plan gives it; nothing moves"
    cost = (
        f"{pause_s:.3g} s of pause and {outlook.slowdown_fraction:.0%} of {background_s:.3g} s of "
        f"background copying"
    )
    if is_cut_off:
        return f"some pieces are on no device, so nothing is served until they are; costs {cost}"
    change = f"{outlook.old_step_s * 1e3:.3g} ms a step becomes {outlook.new_step_s * 1e3:.3g} ms"
    if gain_s <= 0:
        return f"{change}, which saves nothing; costs {cost}"
    return f"{change}, which saves {gain_s:.3g} s over {outlook.steps:g} steps; costs {cost}"
