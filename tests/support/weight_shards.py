"""Weight shards of one or more small units, with steps of random gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from actors.engine.optimizer import WeightShard
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import ParameterInfo, Unit

MODES = [
    OptimizerSettings(weight_dtype=weight, state=state, gradient_dtype=gradient)
    for weight, state, gradient in product(
        ("float32", "bfloat16"), ("float32", "8bit"), ("float32", "bfloat16")
    )
]
SIMPLE = OptimizerSettings()


def _name_of(mode: OptimizerSettings) -> str:
    return f"{mode.weight_dtype}-{mode.state}-{mode.gradient_dtype}"


every_mode = pytest.mark.parametrize("mode", MODES, ids=_name_of)


def unit(name: str = "layer 0", decayed: int = 700, others: int = 90) -> Unit:
    matrix, bias = ParameterInfo("matrix", (decayed,)), ParameterInfo("bias", (others,))
    return Unit(name, (matrix, bias), (), decayed)


def shard(settings: OptimizerSettings = SIMPLE, *units: Unit) -> WeightShard:
    """Make a shard of units with small random weights."""
    units = units or (unit(),)
    made = WeightShard(units, settings)
    for index, each in enumerate(units):
        made.load(each.name, values(each.num_trained, seed=100 + index) * 0.1)
    return made


def values(num_values: int, seed: int) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def run(made: WeightShard, steps: range, name: str = "layer 0") -> torch.Tensor:
    """Take steps with two random gradients each, one of them early and one given twice."""
    for step in steps:
        num_values = len(made.published(name))
        gradients = [values(num_values, seed=2 * step + order) * 1e-2 for order in (0, 1)]
        assert not made.add(name, step, 1, gradients[1], expected=2)
        assert made.add(name, step, 0, gradients[0], expected=2)
        assert made.add(name, step, 1, gradients[0], expected=2)
        made.step(name, learning_rate=1e-2 / (1 + step), scale=0.5)
    return made.published(name)
