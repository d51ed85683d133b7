"""The host optimizer: torch's AdamW over versions that stay, and exact resume."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from weight_shards import MODES, SIMPLE, every_mode, run, shard, unit, values

from actors.engine.chunks import CHUNK_VALUES
from actors.engine.optimizer import WeightShard
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import ParameterInfo, Unit

# --- AdamW ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_fifty_steps_equal_torchs_adamw_on_the_parameters(clip_norm: float | None) -> None:
    torch.manual_seed(0)
    shapes = [(48, 33), (7, 48), (48,), (1,)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters[:2], "weight_decay": 0.1},
            {"params": parameters[2:], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        fused=True,
    )
    layer = Unit(
        "layer 0",
        tuple(ParameterInfo(str(i), shape) for i, shape in enumerate(shapes)),
        (),
        48 * 33 + 7 * 48,
    )
    made = WeightShard(
        [layer], OptimizerSettings(beta1=0.8, beta2=0.95, weight_decay=0.1, clip_norm=clip_norm)
    )
    made.load("layer 0", torch.cat([p.detach().flatten() for p in parameters]))

    for step in range(50):
        learning_rate = 1e-2 * (1 + step % 3)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 0.1
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        scale = 1.0
        if clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            scale = (clip_norm / (norm + 1e-6)).item()
        optimizer.step()
        made.add("layer 0", step, 0, flat, expected=1)
        assert math.sqrt(made.squared_norm()["layer 0"]) == pytest.approx(flat.norm().item())
        made.step("layer 0", learning_rate=learning_rate, scale=scale)

    expected = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(made.published("layer 0"), expected, rtol=1e-7, atol=1e-7)


@every_mode
def test_a_unit_of_several_chunks_is_stepped_as_its_parts_are(mode: OptimizerSettings) -> None:
    long = unit(decayed=CHUNK_VALUES + 300, others=CHUNK_VALUES // 2)
    whole = WeightShard([long], mode)
    parts = WeightShard(
        [unit("first", CHUNK_VALUES, 0), unit("rest", 300, CHUNK_VALUES // 2)], mode
    )
    weights, gradients = (values(long.num_trained, seed) for seed in (0, 1))
    cuts = {"first": slice(0, CHUNK_VALUES), "rest": slice(CHUNK_VALUES, None)}
    whole.load("layer 0", weights)
    for name, cut in cuts.items():
        parts.load(name, weights[cut])
    for step in range(2):
        for order in range(2):
            whole.add("layer 0", step, order, gradients, expected=2)
            for name, cut in cuts.items():
                parts.add(name, step, order, gradients[cut], expected=2)
        norms = parts.squared_norm()
        assert whole.squared_norm()["layer 0"] == pytest.approx(sum(norms.values()))
        for each, names in ((whole, ["layer 0"]), (parts, [*cuts])):
            for name in names:
                each.step(name, learning_rate=1e-3, scale=0.7)

    assert torch.equal(
        whole.published("layer 0"), torch.cat([parts.published(name) for name in cuts])
    )


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_bfloat16_weights_hide_a_float32_master_of_equal_bits(state: str) -> None:
    single = shard(OptimizerSettings.model_validate({"state": state}))
    half = shard(OptimizerSettings.model_validate({"state": state, "weight_dtype": "bfloat16"}))
    expected, published = run(single, range(20)), run(half, range(20))

    residual = half.state("layer 0")["residual"]
    master = (published.view(torch.int16).int() << 16) + residual

    assert published.dtype == torch.bfloat16
    assert torch.equal(master, expected.view(torch.int32))


@every_mode
def test_weights_are_published_as_they_were_loaded(mode: OptimizerSettings) -> None:
    weights = values(790, seed=0)
    made = WeightShard([unit()], mode)
    for loaded in (weights, weights.bfloat16(), torch.nn.Parameter(weights)):
        made.load("layer 0", loaded)
        published = made.published("layer 0")
        assert str(published.dtype) == f"torch.{mode.weight_dtype}"
        torch.testing.assert_close(published.float(), loaded.detach().float(), rtol=2**-8, atol=0)
        if loaded.dtype == torch.bfloat16 or mode.weight_dtype == "float32":
            assert torch.equal(published.float(), loaded.detach().float())
        assert published.data_ptr() != loaded.data_ptr()


def test_loading_again_forgets_every_step() -> None:
    for mode in MODES:
        used, fresh = shard(mode), shard(mode)
        run(used, range(3))
        used.load("layer 0", values(790, seed=100) * 0.1)
        assert used.version("layer 0") == 0
        assert torch.equal(run(used, range(3)), run(fresh, range(3)))


# --- versions ---------------------------------------------------------------------------------


@every_mode
def test_a_published_version_is_never_written_again(mode: OptimizerSettings) -> None:
    made = shard(mode)
    kept = []
    for step in range(3):
        kept.append((made.published("layer 0"), made.published("layer 0").clone()))
        run(made, range(step, step + 1))
        shared = made.published("layer 0").clone()
        made.adopt("layer 0", shared)
        assert made.published("layer 0") is shared

    assert all(torch.equal(published, copy) for published, copy in kept)
    assert len({published.data_ptr() for published, _ in kept}) == 3


@every_mode
def test_one_buffer_serves_every_step_once_a_copy_of_it_is_adopted(
    mode: OptimizerSettings,
) -> None:
    made, fresh = shard(mode), shard(mode)
    buffer = torch.empty_like(made.published("layer 0"))
    for step in range(3):
        made.add("layer 0", step, 0, values(790, seed=step), expected=1)
        assert made.step("layer 0", learning_rate=0.1, scale=0.5, out=buffer) is buffer
        made.adopt("layer 0", buffer.clone())
        fresh.add("layer 0", step, 0, values(790, seed=step), expected=1)
        fresh.step("layer 0", learning_rate=0.1, scale=0.5)

    assert torch.equal(made.published("layer 0"), fresh.published("layer 0"))


def test_tensors_of_another_type_or_length_are_refused() -> None:
    made = shard(OptimizerSettings(weight_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"float32; with optimizer.weight_dtype bfloat16"):
        made.adopt("layer 0", torch.zeros(790))
    with pytest.raises(ValueError, match=r"790 trained values .* shape \(10, 79\)"):
        made.load("layer 0", torch.zeros(10, 79))
    with pytest.raises(ValueError, match=r"weights of layer 0 are torch.float16"):
        made.load("layer 0", torch.zeros(790, dtype=torch.float16))
    with pytest.raises(ValueError, match="layer 0 has no weights yet"):
        WeightShard([unit()], SIMPLE).published("layer 0")


# --- resume -----------------------------------------------------------------------------------


@every_mode
def test_a_resumed_run_goes_on_to_the_bit(mode: OptimizerSettings) -> None:
    first = shard(mode)
    run(first, range(4))
    saved = load(save({"published": first.published("layer 0"), **first.state("layer 0")}))
    expected = run(first, range(4, 8))

    second = shard(mode)
    second.add("layer 0", 0, 0, values(790, seed=9), expected=7)
    second.restore("layer 0", saved.pop("published"), saved)

    assert second.version("layer 0") == 4
    assert torch.equal(run(second, range(4, 8)), expected)
    states = first.state("layer 0"), second.state("layer 0")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_restoring_does_not_keep_the_given_state() -> None:
    first, second = shard(), shard()
    run(first, range(2))
    second.restore("layer 0", first.published("layer 0"), first.state("layer 0"))
    before = {name: tensor.clone() for name, tensor in first.state("layer 0").items()}

    run(second, range(2, 4))

    assert all(torch.equal(first.state("layer 0")[name], before[name]) for name in before)


def test_state_saved_under_other_settings_is_refused() -> None:
    first = shard(OptimizerSettings(state="8bit"))
    with pytest.raises(ValueError, match=r"resume with the optimizer\.state .* saved with"):
        shard().restore("layer 0", first.published("layer 0"), first.state("layer 0"))
