"""Where numbers stopped being finite: which layer, for the error that ends a run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import torch
from ray.exceptions import RayError

from actors.engine.arrays import as_tensor
from actors.engine.training_values import EMBEDDING_UNIT, layer_unit
from actors.pool_values import SlotKey, SlotTask
from cluster.training.hosts import WeightHosts
from cluster.training.pooled_device import PooledDevice
from cluster.training.rounds import Round

_PROBE_TIMEOUT_S = 60.0
_ATTEMPT = -1
"""No visit has it once it is sent to a device."""


async def where_not_finite(
    weights: WeightHosts,
    devices: Sequence[PooledDevice],
    rounds: Sequence[Round],
    dtype: torch.dtype,
) -> str:
    """Say which layer, of which micro-batch, first held what is not finite.

    The layers run once more, one at a time, on the roomiest of `devices`: beside the dispatcher,
    for what it has queued may wait for weights that a run which ends here never publishes.
    """
    bad_units = await weights.non_finite_units()
    if bad_units:
        return f"weights of {', '.join(bad_units)} are not finite"
    suspect, m = next(
        ((r, m) for r in rounds for m, loss in sorted(r.losses.items()) if not math.isfinite(loss)),
        (rounds[0], 0),
    )
    which = f"micro-batch {suspect.first_micro_batch + m}"
    if not devices:
        return f"no device is left to find the layer that it began in ({which})"
    pooled = max(devices, key=lambda pooled: pooled.device.memory_bytes)
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            layer = await _first_layer(weights, pooled, suspect, m, dtype)
    except TimeoutError:
        return f"which layer it began in was not found within {_PROBE_TIMEOUT_S:g} s ({which})"
    except RayError as error:
        fact = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return f"which layer it began in could not be found: {fact} ({which})"
    if layer is None:
        return f"the outputs of all layers are finite: look at the head, or the gradients ({which})"
    return f"layer {layer} is the first whose output is not finite ({which})"


async def _first_layer(
    weights: WeightHosts, pooled: PooledDevice, round_: Round, m: int, dtype: torch.dtype
) -> int | None:
    """Return the first layer whose output is not finite; None: all are."""
    hidden, loads = None, None
    for layer in range(max(slot.end_layer for slot in round_.slots)):
        task = SlotTask(
            key=SlotKey(round_.step, round_.number, layer, _ATTEMPT),
            kind="forward",
            first_layer=layer,
            end_layer=layer + 1,
            grain="none",
            is_kept=False,
            saves=(),
            first_micro_batch=round_.first_micro_batch + m,
            scales=round_.scales,
            is_trained=False,
            version=round_.version,
        )
        units = [layer_unit(layer)] if layer else [EMBEDDING_UNIT, layer_unit(layer)]
        references = weights.table.references(units, round_.version)
        hidden, loads = await pooled.run_alone(task, references, round_.batches[m], hidden, loads)
        if not bool(as_tensor(await hidden, dtype).isfinite().all()):
            return layer
    return None
