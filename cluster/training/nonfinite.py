"""Where numbers stopped being finite: which layer, for the error that ends a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from actors.engine.arrays import as_tensor
from cluster.training.executor import SlotExecutor
from cluster.training.hosts import WeightHosts
from cluster.training.rounds import Boundary, Round


async def where_not_finite(
    weights: WeightHosts,
    executor: SlotExecutor,
    rounds: Sequence[Round],
    again: Callable[[Round, int], Round],
    dtype: torch.dtype,
) -> str:
    """Say which layer, of which micro-batch, first held what is not finite.

    `again` makes the round that runs one micro-batch of another once more, without training, and
    keeps every layer's input.
    """
    bad_units = await weights.non_finite_units()
    if bad_units:
        return f"weights of {', '.join(bad_units)} are not finite"
    suspect, m = next(
        ((r, m) for r in rounds for m, loss in sorted(r.losses.items()) if not math.isfinite(loss)),
        (rounds[0], 0),
    )
    which = f"micro-batch {suspect.first_micro_batch + m}"
    probe = again(suspect, m)
    await executor.submit(probe)
    for layer in sorted(boundary.layer for boundary, _ in probe.outputs):
        array = await probe.outputs[Boundary("hidden", layer), 0]
        if not bool(as_tensor(array, dtype).isfinite().all()):
            return f"layer {layer - 1} is the first whose output is not finite ({which})"
    fused = next(slot for slot in suspect.slots if slot.kind == "fused")
    layers = f"layers {fused.first_layer} to {fused.end_layer - 1}, " * (
        fused.first_layer < fused.end_layer
    )
    return f"all layers below {fused.first_layer} are finite: look at {layers}the head ({which})"


def one_of(round_: Round, m: int, *, index: int, reference: object) -> Round:
    """Return a round that runs one micro-batch of another forward and keeps all it passes."""
    slots = round_.slots
    return Round(
        index=index,
        step=round_.step,
        number=round_.number + _LATER,
        slots=slots,
        batches=(round_.batches[m],),
        batches_reference=reference,
        first_micro_batch=round_.first_micro_batch + m,
        scales=round_.scales,
        version=round_.version,
        declared_s=round_.declared_s,
        is_trained=False,
        saves_all=True,
    )


_LATER = int(np.iinfo(np.int32).max)
