"""Trained weights are written as Hugging Face and PEFT read them, and come back as they were."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, MOE
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.checkpoint import VERIFIED_MODEL_TYPES, Checkpoint, CheckpointError
from actors.engine.config import EngineConfig
from actors.engine.export import (
    optimizer_file,
    read_adapter_unit,
    read_model_unit,
    read_optimizer_state,
    write_adapter,
    write_model,
    write_optimizer_state,
)
from actors.engine.slice import StageSlice
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import training_units
from actors.engine.training_values import Unit
from cluster.training.checkpoints import RunFolder, TrainingState

pytestmark = pytest.mark.engine

LAYOUTS = [
    pytest.param(name, fused, id=f"{name}-fused" if fused else name)
    for name in VERIFIED_MODEL_TYPES
    for fused in ((False, True) if name in MOE else (False,))
]
LORA = LoraSettings(rank=3, alpha=4.5, target_modules=("q_proj", "v_proj", "o_proj"))
SHARD_BYTES = 60_000
TOKENS_BT = torch.arange(20).view(2, 10) * 7 % 199


def values(name: str, shape: Sequence[int]) -> torch.Tensor:
    """What a parameter of that name was trained to, in these tests."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator) * 0.1


def flat_of(unit: Unit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    parts = [values(parameter.name, parameter.shape).flatten() for parameter in unit.trained]
    return torch.cat(parts).to(dtype)


def trained(
    units: Sequence[Unit], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((unit.name, flat_of(unit, dtype)) for unit in units if unit.trained)


def export(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    checkpoint = Checkpoint.open(str(base))
    units = training_units(checkpoint, None)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, checkpoint, units, trained(units, dtype), dtype=dtype, **options)
    return folder


def export_adapter(base: Path, folder: Path, lora: LoraSettings = LORA) -> tuple[Unit, ...]:
    checkpoint = Checkpoint.open(str(base))
    units = training_units(checkpoint, lora)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, checkpoint, units, trained(units), lora=lora, base_model=str(base))
    return units


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_weights(folder: Path, base: Path, dtype: torch.dtype = torch.float32) -> None:
    """Assert that transformers finds every parameter of the base, trained, and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    expected = dict(load(base).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, values(name, expected[name].shape).to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "fused"), LAYOUTS)
def test_a_step_folder_is_a_checkpoint_in_the_layout_of_its_base(
    checkpoint_dir: Callable[..., Path],
    tmp_path: Path,
    model_type: str,
    fused: bool,
    dtype: torch.dtype,
) -> None:
    base = checkpoint_dir(model_type, fused=fused)
    folder = export(base, tmp_path / "step", dtype, max_shard_bytes=SHARD_BYTES)

    check_weights(folder, base, dtype)
    before, after = Checkpoint.open(str(base)), Checkpoint.open(str(folder))
    assert {(t.stored_name, t.shape) for t in after.tensors} == {
        (t.stored_name, t.shape) for t in before.tensors
    }
    assert after.has_own_head == before.has_own_head
    for unit in training_units(after, None):
        again = read_model_unit(after, unit, dtype=dtype)
        assert torch.equal(again, flat_of(unit, dtype)), unit.name


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_a_run_s_latest_checkpoint_is_served(
    checkpoint_dir: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    base = checkpoint_dir(model_type)
    run = RunFolder(tmp_path, keep=1)
    run.start(resume=False)

    def write(folder: Path) -> None:
        export(base, folder, max_shard_bytes=SHARD_BYTES)
        write_optimizer_state(folder, "layer 0", {"model.weight": torch.zeros(3)})

    state = TrainingState(step=1, seed=0, settings={}, tokens_seen=0)
    folder = run.save(1, write, state)

    assert run.load_state(folder) == state
    check_weights(tmp_path / "latest", base)
    checkpoint = Checkpoint.open(str(tmp_path / "latest"))
    slice_ = StageSlice(
        checkpoint, 0, checkpoint.num_layers, config=EngineConfig(dtype="float32"), num_kv_blocks=1
    )
    found = slice_.layers[5].self_attn.q_proj.weight
    assert torch.equal(found, values("model.layers.5.self_attn.q_proj.weight", found.shape))


def test_one_file_when_it_fits_and_shards_within_their_size_when_not(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    whole = export(base, tmp_path / "whole")
    cut = export(base, tmp_path / "cut", max_shard_bytes=SHARD_BYTES)

    assert [file.name for file in whole.glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((cut / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    shards = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert max(sizes) <= SHARD_BYTES
    assert index["metadata"]["total_size"] == sum(sizes)
    joined = {name: tensor for shard in shards for name, tensor in shard.items()}
    single = load_file(whole / "model.safetensors")
    assert joined.keys() == single.keys()
    assert all(torch.equal(tensor, single[name]) for name, tensor in joined.items())


def test_units_are_asked_for_when_the_shards_before_are_written(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("llama")))
    units = training_units(checkpoint, None)
    pending_bytes = []
    given_bytes = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal given_bytes
        for unit in units:
            written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
            pending_bytes.append(given_bytes - written)
            given_bytes += 4 * unit.num_trained
            yield unit.name, flat_of(unit)

    write_model(
        tmp_path, checkpoint, units, weights(), dtype=torch.float32, max_shard_bytes=SHARD_BYTES
    )
    assert max(pending_bytes) <= SHARD_BYTES < given_bytes / 4


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_says_the_type_of_the_weights(
    checkpoint_dir: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    base = copied(checkpoint_dir("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config[key] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")

    folder = export(base, tmp_path / "step", torch.bfloat16)

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written == config | {key: "bfloat16"}
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


def copied(base: Path, target: Path) -> Path:
    """A base folder of links, as a hub cache has them."""
    target.mkdir()
    for file in base.iterdir():
        if file.name == "config.json":
            (target / file.name).write_bytes(file.read_bytes())
        else:
            (target / file.name).symlink_to(file)
    return target


BELONGS = (
    "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "LICENSE", "generation_config.json",
)  # fmt: skip
FOREIGN = (
    "README.md", "adapter_config.json", "flax_model.msgpack", "optimizer.pt", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "model.gguf",
)  # fmt: skip


def furnished(base: Path, target: Path) -> Path:
    """A base folder with everything that may lie in one."""
    copied(base, target)
    for name in (*BELONGS, *FOREIGN):
        (target / name).unlink(missing_ok=True)
        (target / name).write_text("{}", encoding="utf-8")
    (target / "training").mkdir()
    return target


def test_what_belongs_to_the_model_comes_along_and_other_weights_do_not(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = furnished(checkpoint_dir("llama"), tmp_path / "base")
    folder = export(base, tmp_path / "step")
    expected = {*BELONGS, "config.json", "model.safetensors"}
    assert {file.name for file in folder.iterdir()} == expected
    assert not any(file.is_symlink() for file in folder.iterdir())


def test_an_adapter_takes_the_tokenizer_but_does_not_pass_for_a_model(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = furnished(checkpoint_dir("llama"), tmp_path / "base")
    export_adapter(base, tmp_path / "step")
    expected = {*BELONGS, "adapter_config.json", "adapter_model.safetensors"}
    expected.remove("generation_config.json")
    assert {file.name for file in (tmp_path / "step").iterdir()} == expected
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(str(tmp_path / "step"))


def test_weights_of_another_order_or_size_are_refused(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("llama")))
    units = training_units(checkpoint, None)
    with pytest.raises(ValueError, match=r"unit 'head' .* where 'embedding' of"):
        write_model(tmp_path, checkpoint, units, trained(units[::-1]), dtype=torch.float32)
    short = ((name, flat[1:]) for name, flat in trained(units))
    with pytest.raises(ValueError, match=r"unit 'embedding' .* where 'embedding' of"):
        write_model(tmp_path, checkpoint, units, short, dtype=torch.float32)
    with pytest.raises(ValueError, match="shorter"):
        write_model(tmp_path, checkpoint, units, list(trained(units))[:-1], dtype=torch.float32)


def test_a_model_that_is_not_trained_whole_is_refused_before_anything_is_written(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("llama")))
    units = training_units(checkpoint, None)[1:]
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is not among"):
        write_model(tmp_path, checkpoint, units, trained(units), dtype=torch.float32)
    tied = Checkpoint.open(str(checkpoint_dir("qwen3")))
    untied = training_units(checkpoint, None)
    with pytest.raises(CheckpointError):
        write_model(tmp_path, tied, untied, trained(untied), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def peft_reference(base: Path, lora: LoraSettings) -> Any:
    """PEFT's own model with the adapters of these tests."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                inner = name.removeprefix("base_model.model.")
                parameter.copy_(values(inner, parameter.shape))
    return model.eval()


# PEFT asks transformers for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_adapter_is_what_peft_saves_and_computes_the_same(
    checkpoint_dir: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    base = checkpoint_dir(model_type)
    units = export_adapter(base, tmp_path / "ours")
    reference = peft_reference(base, LORA)
    reference.save_pretrained(tmp_path / "theirs")

    ours, theirs = (
        load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "ours").eval()
    onto_named_base = load(tmp_path / "ours")
    with torch.inference_mode():
        expected = reference(TOKENS_BT).logits
        assert torch.equal(loaded(TOKENS_BT).logits, expected)
        assert torch.equal(onto_named_base(TOKENS_BT).logits, expected)
        assert not torch.equal(load(base)(TOKENS_BT).logits, expected)
    for unit in units:
        again = read_adapter_unit(tmp_path / "ours", unit, dtype=torch.float32)
        assert torch.equal(again, flat_of(unit) if unit.trained else torch.empty(0))


def test_an_adapter_s_configuration_is_the_run_s(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    lora = LoraSettings(rank=2, alpha=6, dropout=0.25, target_modules=("lm_head", "up_proj"))
    export_adapter(base, tmp_path, lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {
        "r": 2, "lora_alpha": 6.0, "lora_dropout": 0.25, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base), "peft_type": "LORA", "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    assert config | expected == config
    assert sorted(config["target_modules"]) == ["lm_head", "up_proj"]


def test_an_adapter_of_another_rank_or_other_modules_or_damaged_is_refused(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = checkpoint_dir("llama")
    export_adapter(base, tmp_path)
    checkpoint = Checkpoint.open(str(base))
    layer = training_units(checkpoint, LoraSettings(rank=4, target_modules=("q_proj",)))[1]
    with pytest.raises(CheckpointError, match=r"shape \(3, 48\), the settings give \(4, 48\)"):
        read_adapter_unit(tmp_path, layer, dtype=torch.float32)
    layer = training_units(checkpoint, LoraSettings(rank=3, target_modules=("up_proj",)))[1]
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_A\.weight"):
        read_adapter_unit(tmp_path, layer, dtype=torch.float32)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: missing or damaged"):
        read_adapter_unit(tmp_path, layer, dtype=torch.float32)


def test_optimizer_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = {
        "steps": torch.tensor(7),
        "first": torch.randn(5),
        "second": torch.randn(6)[::2],
        "codes": torch.arange(9, dtype=torch.uint8),
        "residual": torch.arange(4, dtype=torch.int16),
        "rounded": torch.randn(3).to(torch.bfloat16),
    }
    write_optimizer_state(tmp_path, "layer 11", state)
    again = read_optimizer_state(tmp_path, "layer 11")
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert optimizer_file(tmp_path, "layer 11") == tmp_path / (
        "training/optimizer-layer-11.safetensors"
    )


def test_optimizer_state_that_is_gone_or_cut_short_names_its_file(tmp_path: Path) -> None:
    write_optimizer_state(tmp_path, "head", {"first": torch.zeros(10)})
    file = optimizer_file(tmp_path, "head")
    file.write_bytes(file.read_bytes()[:-4])
    for name in ("head", "embedding"):
        with pytest.raises(CheckpointError, match=rf"optimizer-{name}.*an older step folder"):
            read_optimizer_state(tmp_path, name)
