"""What the host optimizer holds, and that moments in 8 bits learn as float32 ones do."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from weight_shards import every_mode, run, shard, unit, values

from actors.engine.chunks import CHUNK_VALUES
from actors.engine.optimizer import WeightShard
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import ParameterInfo, Unit

# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "state", "gradient", "sync_bytes", "async_bytes"),
    [
        ("float32", "float32", "float32", 16, 20),
        ("bfloat16", "float32", "float32", 16, 18),
        ("bfloat16", "float32", "bfloat16", 14, 16),
        ("float32", "8bit", "float32", 10 + 1 / 32, 14 + 1 / 32),
        ("bfloat16", "8bit", "float32", 10 + 1 / 32, 12 + 1 / 32),
        ("bfloat16", "8bit", "bfloat16", 8 + 1 / 32, 10 + 1 / 32),
    ],
)
def test_bytes_of_a_trained_parameter(
    weight: str, state: str, gradient: str, sync_bytes: float, async_bytes: float
) -> None:
    num_values = 256 * 40
    for asynchronous, expected in ((False, sync_bytes), (True, async_bytes)):
        mode = OptimizerSettings.model_validate(
            {
                "weight_dtype": weight,
                "state": state,
                "gradient_dtype": gradient,
                "asynchronous": asynchronous,
            }
        )
        made = shard(mode, unit(decayed=num_values - 256, others=256))
        run(made, range(1))
        assert made.host_bytes().total / num_values == expected


@every_mode
def test_a_step_makes_nothing_as_large_as_its_unit_but_the_new_weights(
    mode: OptimizerSettings,
) -> None:
    num_values = 2 * CHUNK_VALUES
    made = shard(mode, unit(decayed=num_values, others=0))
    gradient = values(num_values, seed=1)
    made.add("layer 0", 0, 0, gradient, expected=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        made.add("layer 0", 0, 1, gradient, expected=2)
        made.squared_norm()
        stepped = made.step("layer 0", learning_rate=1e-3, scale=0.5)

    events = memory.events()
    assert events is not None
    *small, large = sorted(event.self_cpu_memory_usage for event in events)
    assert large == stepped.nbytes
    assert max(small) <= 4 * num_values / 256


# --- 8 bits learn as float32 does -------------------------------------------------------------


def learn(mode: OptimizerSettings, num_steps: int) -> tuple[list[float], torch.Tensor]:
    """Fit a small network to a random one; return the losses and the weights."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    student, teacher = (
        torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
        for _ in range(2)
    )
    parameters = list(student.parameters())
    shapes = tuple(ParameterInfo(str(i), tuple(p.shape)) for i, p in enumerate(parameters))
    layer = Unit("layer 0", shapes, (), sum(p.numel() for p in parameters))
    made = WeightShard([layer], mode)
    made.load("layer 0", torch.nn.utils.parameters_to_vector(parameters))
    losses = []
    for step in range(num_steps):
        weights = made.published("layer 0").float().clone()
        torch.nn.utils.vector_to_parameters(weights, parameters)
        inputs = torch.randn(32, 32, generator=generator)
        loss = (student(inputs) - teacher(inputs).detach()).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        made.add("layer 0", step, 0, flat, expected=1)
        made.step("layer 0", learning_rate=3e-3, scale=1.0)
        losses.append(loss.item())
    return losses, made.published("layer 0")


@pytest.mark.parametrize("weight", ["float32", "bfloat16"])
def test_eight_bit_moments_learn_as_float32_moments_do(weight: str) -> None:
    modes = [
        OptimizerSettings.model_validate({"state": state, "weight_dtype": weight})
        for state in ("float32", "8bit")
    ]
    (exact, _), (coded, _) = (learn(mode, 600) for mode in modes)

    assert sum(exact[-50:]) < 0.1 * sum(exact[:50])
    assert sum(coded[-50:]) == pytest.approx(sum(exact[-50:]), rel=0.05)
    assert sum(coded[250:350]) == pytest.approx(sum(exact[250:350]), rel=0.05)


def test_updates_of_eight_bit_moments_point_where_those_of_float32_do() -> None:
    """Gradients that differ in size by orders of magnitude, and shrink at rates of their own."""
    num_values = 256 * 16
    layer = unit(decayed=num_values, others=0)
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(num_values, generator=generator)) * 1e-4
    rate = torch.rand(num_values, generator=generator) * 0.01
    shards = [
        WeightShard([layer], OptimizerSettings.model_validate({"state": s, "weight_decay": 0}))
        for s in ("float32", "8bit")
    ]
    updates: list[torch.Tensor] = []
    for step in range(800):
        noise = torch.randn(num_values, generator=generator)
        gradient = size * torch.exp(-rate * step) * noise
        updates = []
        for each in shards:
            each.load("layer 0", torch.zeros(num_values)) if step == 0 else each.adopt(
                "layer 0", torch.zeros(num_values)
            )
            each.add("layer 0", step, 0, gradient, expected=1)
            updates.append(each.step("layer 0", learning_rate=1.0, scale=1.0))
        if step % 50 == 49:
            assert torch.cosine_similarity(updates[0], updates[1], dim=0) > 0.99
            assert (updates[1].norm() / updates[0].norm()).item() == pytest.approx(1, abs=0.02)
