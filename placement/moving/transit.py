"""While layers move, their receiver holds what it had and what it gets: does that fit?"""

from __future__ import annotations

from placement.costs import stage_kv_bytes, stage_weight_bytes
from placement.cutting.plan import StagePlacement, StagesPlan
from placement.workload import ModelProfile


def tight_devices(
    old: StagesPlan, new: StagesPlan, profile: ModelProfile, *, kv_tokens: int
) -> tuple[str, ...]:
    """Return the devices of both plans whose memory cannot hold both parts at once.

    Such a device must let go of layers before it takes others in, and their KV is lost.

    Args:
        old: In force.
        new: To be in force.
        profile: Of the model of both.
        kv_tokens: For which every layer that is held reserves memory, all lanes together.
    """
    before = {stage.device_id: stage for stage in old.stages}
    return tuple(
        stage.device_id
        for stage in new.stages
        if stage.device_id in before
        and _both_bytes(before[stage.device_id], stage, profile, kv_tokens) > stage.memory_cap_bytes
    )


def _both_bytes(
    old: StagePlacement, new: StagePlacement, profile: ModelProfile, kv_tokens: int
) -> int:
    """Weights and KV of the layers that are held, each once, and the larger step's activations."""

    def held_bytes(first: int, end: int) -> int:
        if first >= end:
            return 0
        kv_bytes = stage_kv_bytes(profile, first, end, kv_tokens)
        return stage_weight_bytes(profile, first, end) + kv_bytes

    both = held_bytes(old.first_layer, old.end_layer) + held_bytes(new.first_layer, new.end_layer)
    shared = held_bytes(max(old.first_layer, new.first_layer), min(old.end_layer, new.end_layer))
    return both - shared + max(old.activation_bytes, new.activation_bytes)
