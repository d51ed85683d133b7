"""What units hold, in which order, and what they start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import ARCHITECTURES

from actors.engine import skeleton
from actors.engine.checkpoint import Checkpoint, CheckpointError
from actors.engine.trainable import initial_weights, training_units
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import split_flat

pytestmark = pytest.mark.engine

Dirs = Callable[..., Path]
LORA = LoraSettings(rank=4, target_modules=("q_proj", "mlp.down_proj"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_units_hold_every_parameter_once_with_the_checkpoints_values(
    model_type: str, fused: bool, checkpoint_dir: Dirs, reference: Callable[[Path], Any]
) -> None:
    path = checkpoint_dir(model_type, fused=fused)
    checkpoint = Checkpoint.open(str(path))
    expected = dict(reference(path).named_parameters())

    units = training_units(checkpoint, None)

    assert [unit.name for unit in units] == [
        "embedding", *(f"layer {layer}" for layer in range(6)), "head"
    ]  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    for unit in units:
        trained, frozen = initial_weights(checkpoint, unit, None, dtype=torch.float32, seed=0)
        assert frozen.numel() == 0
        views = split_flat(trained, unit.trained)
        found |= {info.name: view for info, view in zip(unit.trained, views, strict=True)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_matrices_come_first_and_biases_of_experts_are_none(checkpoint_dir: Dirs) -> None:
    units = training_units(Checkpoint.open(str(checkpoint_dir("gpt_oss"))), None)

    [layer] = [unit for unit in units if unit.name == "layer 2"]
    size = 0
    decayed = []
    for parameter in layer.trained:
        if size < layer.num_decayed:
            decayed.append(parameter.name.removeprefix("model.layers.2."))
        size += parameter.numel
    assert sorted(decayed) == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.router.weight",
        *(f"self_attn.{name}_proj.weight" for name in "koqv"),
    ]


def test_a_tied_head_is_part_of_the_embedding(checkpoint_dir: Dirs) -> None:
    units = training_units(Checkpoint.open(str(checkpoint_dir("qwen3"))), None)

    assert [parameter.name for parameter in units[-1].trained] == ["model.norm.weight"]
    assert units[0].num_decayed == units[0].num_trained == 199 * 48


def test_with_adapters_the_base_is_frozen(checkpoint_dir: Dirs) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("llama")))

    units = training_units(checkpoint, LORA)

    plain = training_units(checkpoint, None)
    assert [unit.num_frozen for unit in units] == [unit.num_trained for unit in plain]
    assert units[0].trained == units[-1].trained == ()
    assert [(parameter.name, parameter.shape) for parameter in units[1].trained] == [
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", (4, 48)),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", (48, 4)),
        ("model.layers.0.mlp.down_proj.lora_A.default.weight", (4, 64)),
        ("model.layers.0.mlp.down_proj.lora_B.default.weight", (48, 4)),
    ]
    assert units[1].num_decayed == units[1].num_trained


def test_adapters_start_as_pefts_do_from_seed_and_name(checkpoint_dir: Dirs) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("llama")))
    first, second = training_units(checkpoint, LORA)[1:3]

    def adapters(unit: Any, seed: int) -> list[torch.Tensor]:
        trained, _ = initial_weights(checkpoint, unit, LORA, dtype=torch.float32, seed=seed)
        return split_flat(trained, unit.trained)

    a, b, other_a, _ = adapters(first, 0)

    assert not b.any()
    for values, bound in ((a, 48**-0.5), (other_a, 64**-0.5)):
        assert bound * 0.9 < float(values.abs().max()) <= bound
    assert torch.equal(a, adapters(first, 0)[0])
    assert not torch.equal(a, adapters(first, 1)[0])
    assert not torch.equal(a, adapters(second, 0)[0])


def test_only_the_units_own_tensors_are_read(
    checkpoint_dir: Dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("mixtral")))
    unit = training_units(checkpoint, LORA.model_copy(update={"target_modules": ("q_proj",)}))[2]
    read: list[str] = []

    class Recorder:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file: Any = safe_open(*args, **options)

        def __enter__(self) -> Recorder:
            self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr(skeleton, "safe_open", Recorder)

    initial_weights(checkpoint, unit, LORA, dtype=torch.bfloat16, seed=0)

    assert sorted(read) == sorted(t.stored_name for t in checkpoint.tensors if t.layer == 1)


@pytest.mark.parametrize(
    ("model_type", "target", "there"),
    [
        ("llama", "query", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_"),
        ("llama", "embed_tokens", "q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ("qwen3_moe", "gate", "q_proj, k_proj, v_proj, o_proj, lm_head"),
        ("qwen3_moe", "down_proj", "q_proj, k_proj, v_proj, o_proj, lm_head"),
        ("mixtral", "w1", "q_proj, k_proj, v_proj, o_proj, lm_head"),
    ],
)
def test_what_an_adapter_does_not_fit_is_named(
    model_type: str, target: str, there: str, checkpoint_dir: Dirs
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    lora = LoraSettings(target_modules=("q_proj", target))

    with pytest.raises(CheckpointError, match=f"{target!r} fits no module of .*there are {there}"):
        training_units(checkpoint, lora)
