"""Bytes of host memory that a trained parameter takes, counted from the tensors that are held."""

from __future__ import annotations

import torch
from figures import Figure

from actors.engine.optimizer import WeightShard
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import ParameterInfo, Unit

ROUNDPIPE_BYTES = 20.0
"""Half-precision weights and gradients, float32 copies of both, and Adam's moments."""
_SIZES = (1024, 1024)


def memory_figures(*, quick: bool) -> list[Figure]:
    """Count every mode; nothing is timed, so `quick` changes nothing."""
    del quick
    return [
        _figure("bfloat16 weights, float32 AdamW, synchronous", 18.0, {}),
        _figure("bfloat16 weights, float32 AdamW, asynchronous", 18.0, {"asynchronous": True}),
        _figure("bfloat16 weights, 8-bit moments, synchronous", 12.0, {"state": "8bit"}),
        _figure(
            "bfloat16 weights and gradients, 8-bit moments, asynchronous",
            12.0,
            {"state": "8bit", "gradient_dtype": "bfloat16", "asynchronous": True},
        ),
    ]


def _figure(name: str, most: float, changes: dict[str, object]) -> Figure:
    settings = OptimizerSettings.model_validate({"weight_dtype": "bfloat16"} | changes)
    unit = Unit("layer 0", (ParameterInfo("weight", _SIZES),), (), unit_size := 1024 * 1024)
    shard = WeightShard([unit], settings)
    shard.load(unit.name, torch.zeros(unit_size, dtype=torch.bfloat16))
    shard.add(unit.name, 0, 0, torch.ones(unit_size), expected=1)
    shard.step(unit.name, learning_rate=1e-3, scale=1.0)
    shard.add(unit.name, 1, 0, torch.ones(unit_size), expected=1)
    held = shard.host_bytes().total / unit.num_trained
    return Figure(
        figure=f"host bytes a trained parameter: {name}",
        value=held,
        baseline=ROUNDPIPE_BYTES,
        ratio=held / ROUNDPIPE_BYTES,
        target=f"<= {most:g}",
        met=held <= most,
    )
