"""A stage reads its own tensors and no others, and a bad checkpoint is refused before it loads."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, MOE, make_model

from actors.engine.checkpoint import (
    EMBEDDING,
    HEAD,
    VERIFIED_MODEL_TYPES,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    UnsupportedArchitectureError,
    check_servable,
    locate,
    module_parameter,
)
from actors.engine.config import EngineConfig
from actors.engine.slice import StageSlice

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 10,
    "max_position_embeddings": 32,
}


def layer_tensors(index: int) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12), "input_layernorm": (8,), "post_attention_layernorm": (8,),
    }  # fmt: skip
    return {
        f"model.layers.{index}.{name}.weight": torch.full(shape, 0.01 * (index + 1))
        for name, shape in shapes.items()
    }


def all_tensors() -> dict[str, torch.Tensor]:
    ends = {EMBEDDING: (10, 8), "model.norm.weight": (8,), HEAD: (10, 8)}
    tensors = {name: torch.ones(shape) for name, shape in ends.items()}
    return tensors | layer_tensors(0) | layer_tensors(1)


def write(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, config: Any = None, **changes: Any
) -> Path:
    """Write a checkpoint of two layers in one file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or CONFIG | changes), encoding="utf-8")
    save_file(all_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


def load(path: Path, first: int = 0, end: int | None = None) -> StageSlice:
    checkpoint = Checkpoint.open(str(path))
    end = checkpoint.num_layers if end is None else end
    return StageSlice(checkpoint, first, end, config=EngineConfig(), num_kv_blocks=2)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(str(path))


def header_bytes(path: Path) -> int:
    """Of all shards: the header's length and the header."""
    lengths = [file.read_bytes()[:8] for file in path.glob("*.safetensors")]
    return sum(8 + struct.unpack("<Q", length)[0] for length in lengths)


def json_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.json"))


def bytes_read_by(action: Callable[[], object]) -> int:
    """What this process reads from files while it acts, as the kernel counts it."""
    before = _rchar()
    action()
    return _rchar() - before


def _rchar() -> int:
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split("rchar: ")[1].split()[0])


@pytest.fixture
def sharded(checkpoint_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to be damaged."""
    path = tmp_path / "sharded"
    shutil.copytree(checkpoint_dir("llama"), path)
    return path


# --- whose tensors ----------------------------------------------------------------------------


def names(tensors: list[TensorInfo]) -> set[str]:
    return {tensor.stored_name for tensor in tensors}


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_stages_share_no_tensor_but_a_tied_embedding_and_leave_none_out(
    model_type: str, cuts: tuple[int, ...], checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    bounds = [0, *cuts, NUM_LAYERS]

    owned = [checkpoint.owned(a, b) for a, b in pairwise(bounds)]

    counts: dict[str, int] = {}
    for tensors in owned:
        for name in names(tensors):
            counts[name] = counts.get(name, 0) + 1
    twice = {name for name, count in counts.items() if count > 1}
    is_tied = not checkpoint.has_own_head
    assert twice == ({EMBEDDING} if is_tied and cuts else set())
    assert set(counts) == names(list(checkpoint.tensors))


@pytest.mark.parametrize("cut", [(0, 6), (0, 2), (2, 5), (5, 6)], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen3_moe", "gpt_oss"])
def test_a_stage_reads_headers_and_its_own_bytes(
    model_type: str, cut: tuple[int, int], checkpoint_dir: Callable[..., Path]
) -> None:
    path = checkpoint_dir(model_type)
    checkpoint = Checkpoint.open(str(path))
    load(path, 0, 1)  # what transformers reads lazily has been read by then
    own = sum(tensor.num_bytes for tensor in checkpoint.owned(*cut))
    stages: list[StageSlice] = []

    read = bytes_read_by(lambda: stages.append(load(path, *cut)))

    assert stages[0].bytes_read == own
    # Headers are read once to open the checkpoint and once to load from it; so is config.json.
    slack = 2 * header_bytes(path) + 4 * json_bytes(path) + 8192
    assert own <= read <= own + slack
    foreign = sum(tensor.num_bytes for tensor in checkpoint.tensors) - own
    assert cut == (0, 6) or slack < foreign, "the check would not notice a foreign tensor"


def test_opening_reads_headers_only(checkpoint_dir: Callable[..., Path]) -> None:
    path = checkpoint_dir("llama")
    Checkpoint.open(str(path))

    read = bytes_read_by(lambda: Checkpoint.open(str(path)))

    assert read <= header_bytes(path) + 2 * json_bytes(path) + 4096
    assert read * 4 < sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_a_tied_last_stage_reads_the_embedding_as_its_head(
    checkpoint_dir: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("qwen3")))

    assert not checkpoint.has_own_head
    assert EMBEDDING in names(checkpoint.owned(0, 1))
    assert EMBEDDING not in names(checkpoint.owned(1, 5))
    assert EMBEDDING in names(checkpoint.owned(5, 6))


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "parameter", "expert", "part"),
    [
        ("model.norm.weight", "model.norm.weight", None, "all"),
        ("norm.weight", "model.norm.weight", None, "all"),
        ("layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight", None, "all"),
        ("lm_head.weight", "lm_head.weight", None, "all"),
        (
            "model.layers.3.mlp.experts.7.up_proj.weight",
            "model.layers.3.mlp.experts.gate_up_proj", 7, "up",
        ),
        (
            "model.layers.3.mlp.experts.12.gate_proj.weight",
            "model.layers.3.mlp.experts.gate_up_proj", 12, "gate",
        ),
        (
            "layers.0.block_sparse_moe.experts.1.w2.weight",
            "model.layers.0.mlp.experts.down_proj", 1, "all",
        ),
        (
            "model.layers.0.block_sparse_moe.experts.1.w3.weight",
            "model.layers.0.mlp.experts.gate_up_proj", 1, "up",
        ),
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.mlp.gate.weight", None, "all",
        ),
    ],
)  # fmt: skip
def test_a_stored_name_says_which_parameter_it_fills(
    stored: str, parameter: str, expert: int | None, part: str
) -> None:
    assert module_parameter(stored) == (parameter, expert, part)


@pytest.mark.parametrize("model_type", MOE)
def test_both_expert_layouts_load_the_same_weights(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    stages = [
        load(checkpoint_dir(model_type, fused=is_fused), 0, NUM_LAYERS)
        for is_fused in (False, True)
    ]

    original, fused = (dict(stage.layers[2].named_parameters()) for stage in stages)
    assert original.keys() == fused.keys()
    assert any(".experts." in name for name in original)
    assert all(torch.equal(original[name], fused[name]) for name in original)


def test_loaded_weights_are_the_models_own(checkpoint_dir: Callable[..., Path]) -> None:
    model = make_model("qwen3_moe")
    stage = load(checkpoint_dir("qwen3_moe"), 2, 6)

    for offset, layer in enumerate(stage.layers):
        wanted = dict(model.model.layers[2 + offset].named_parameters())
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, wanted[name]), name
    assert stage.head is not None
    assert torch.equal(stage.head.weight, model.lm_head.weight)


def test_a_base_models_names_without_prefix_load(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): value for name, value in all_tensors().items()}
    plain = load(write(tmp_path / "plain"))

    bare = load(write(tmp_path / "bare", tensors))

    for wanted, got in zip(plain.layers, bare.layers, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(wanted.parameters(), got.parameters(), strict=True)
        )


def test_a_base_model_without_a_head_loads_when_it_is_tied(tmp_path: Path) -> None:
    tensors = {n.removeprefix("model."): v for n, v in all_tensors().items() if n != HEAD}
    tensors["embed_tokens.weight"] = torch.randn(10, 8)

    stage = load(write(tmp_path, tensors, tie_word_embeddings=True), 1, 2)

    assert stage.head is not None
    assert torch.equal(stage.head.weight, tensors["embed_tokens.weight"])


def test_stored_rotary_frequencies_are_passed_over(tmp_path: Path) -> None:
    # Llama 2 checkpoints hold them, and transformers computes them all the same.
    stray = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in (0, 1)}

    path = write(tmp_path, all_tensors() | stray)

    assert not any(
        "inv_freq" in tensor.stored_name for tensor in Checkpoint.open(str(path)).tensors
    )
    load(path)


def test_other_safetensors_beside_the_models_own_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, path / "consolidated.safetensors")

    assert len(Checkpoint.open(str(path)).tensors) == len(all_tensors())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in all_tensors().items()}

    stage = load(write(tmp_path, tensors))

    assert stage.bytes_read == sum(value.nbytes for value in tensors.values())
    assert stage.layers[0].mlp.up_proj.weight.dtype == torch.float32


# --- what is missing or damaged ---------------------------------------------------------------


def a_shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[1]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    a_shard(sharded).unlink()

    refused(sharded, r"1 of \d+ shards missing: model-00002-of-\d+\.safetensors; fetch")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named_with_its_size(sharded: Path, share: float) -> None:
    shard = a_shard(sharded)
    size = int(shard.stat().st_size * share)
    shard.write_bytes(shard.read_bytes()[:size])

    refused(sharded, rf"{shard.name}: cannot be read \({size} bytes, .*truncated or damaged")


@pytest.mark.parametrize(
    "header", [b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 5) + b"{]{]{"]
)
def test_a_corrupt_header_is_refused(sharded: Path, header: bytes) -> None:
    a_shard(sharded).write_bytes(header)

    refused(sharded, "truncated or damaged")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "weights.safetensors").symlink_to(tmp_path / "gone")

    refused(path, r"weights\.safetensors: cannot be read \(a link to nothing")


def test_a_tensor_that_the_index_names_but_no_shard_holds_is_named(sharded: Path) -> None:
    shard = a_shard(sharded)
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != gone}, shard)

    refused(sharded, f"the index names '{gone}', not in it")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index, encoding="utf-8")

    refused(sharded, r"model\.safetensors\.index\.json: ")


def test_layers_without_tensors_are_named(tmp_path: Path) -> None:
    tensors = {name: value for name, value in all_tensors().items() if ".layers.1." not in name}

    refused(write(tmp_path, tensors), r"no tensors for layers \[1\] of 2")


@pytest.mark.parametrize("name", [EMBEDDING, "model.norm.weight"])
def test_a_missing_end_is_named(name: str, tmp_path: Path) -> None:
    tensors = {key: value for key, value in all_tensors().items() if key != name}

    refused(write(tmp_path, tensors), f"no tensor '{name}'")


def test_a_missing_head_is_refused_unless_it_is_tied(tmp_path: Path) -> None:
    tensors = {name: value for name, value in all_tensors().items() if name != HEAD}

    refused(write(tmp_path / "a", tensors), "no tensor 'lm_head.weight', and config.json")
    load(write(tmp_path / "b", tensors, tie_word_embeddings=True))


def test_a_missing_parameter_is_named_when_its_stage_loads(tmp_path: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    path = write(tmp_path, {n: v for n, v in all_tensors().items() if n != gone})

    load(path, 0, 1)
    with pytest.raises(CheckpointError, match=rf"'{gone}' has 0 of 96 values"):
        load(path, 1, 2)


def test_a_folder_without_config_or_tensors_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"no config\.json; is this a Hugging Face checkpoint")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    refused(tmp_path, r"no \*\.safetensors; convert")


@pytest.mark.parametrize("text", ["{", "", "\x00", "{'model_type': 1}"])
def test_a_config_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")

    refused(tmp_path, r"config\.json: cannot be read as JSON")


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"\xff\xfe{}")
    refused(tmp_path, r"config\.json: cannot be read as JSON")
    file.write_text("[1]", encoding="utf-8")
    refused(tmp_path, r"config\.json: holds list, not an object")
    file.write_text("{}", encoding="utf-8")
    refused(tmp_path, r"config\.json: no 'model_type'")


@pytest.mark.parametrize("value", [None, "six", 0, -1, 2.0, True])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_size_that_is_no_number_is_named(name: str, value: Any, tmp_path: Path) -> None:
    refused(
        write(tmp_path, **{name: value}), rf"config\.json: {name} \(.*\) must be a whole number"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "neither a directory nor a hub id"),
        ("./no-such-folder", "neither a directory nor a hub id"),
        ("one-word", "neither a directory nor a hub id"),
        ("a/b/c", "neither a directory nor a hub id"),
        ("motley/no-such-model-here", "could not be fetched"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        locate(model)


# --- what is not served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "vocab_size": 10},
        {"model_type": "gemma2"},
        {"model_type": "phi3"},
        {"model_type": "qwen2_vl", "text_config": {"hidden_size": 8}},
        {"model_type": None},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_an_architecture_is_refused_by_name_with_the_list_of_those_served(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, config=config)

    with pytest.raises(UnsupportedArchitectureError) as refusal:
        Checkpoint.open(str(path))
    text = str(refusal.value)
    assert f"architecture {config['model_type']!r} is not served" in text
    assert all(name in text for name in VERIFIED_MODEL_TYPES)
    assert "engine.allow_unverified_architectures" in text


def test_an_unverified_architecture_opens_when_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, model_type="smollm3")

    assert Checkpoint.open(str(path), allow_unverified=True).model_type == "smollm3"


def test_every_verified_architecture_has_a_tiny_model_in_the_tests() -> None:
    assert sorted(ARCHITECTURES) == sorted(VERIFIED_MODEL_TYPES)


def test_a_quantised_checkpoint_is_refused_by_its_method() -> None:
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\); save it in bfloat16"):
        check_servable(CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize(
    "place",
    [
        lambda kind: {"rope_scaling": {"type": kind, "factor": 2.0}},
        lambda kind: {"rope_scaling": {"rope_type": kind, "factor": 2.0}},
        lambda kind: {"rope_parameters": {"rope_type": kind, "factor": 2.0}},
    ],
)
def test_a_rope_that_depends_on_the_batch_is_refused(
    kind: str, place: Callable[[str], dict[str, Any]]
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"rope_type '{kind}' changes"):
        check_servable(CONFIG | place(kind))


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_other_ropes_are_served(kind: str) -> None:
    check_servable(CONFIG | {"rope_scaling": {"rope_type": kind}})
    check_servable(CONFIG | {"rope_scaling": None})


@pytest.mark.parametrize(
    ("dtype", "word"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")]
)
def test_a_tensor_of_another_type_is_refused_by_name(
    dtype: torch.dtype, word: str, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = write(tmp_path, all_tensors() | {name: torch.zeros(12, 8).to(dtype)})

    refused(path, rf"tensor '{name}' is of type {word}, not one of F64, F32, F16, BF16; save")


# --- another checkpoint's configuration -------------------------------------------------------


def test_more_layers_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    refused(
        write(tmp_path, num_hidden_layers=1),
        r"tensors for layers \[1\], but config.json says num_hidden_layers 1",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 11}, r"lm_head.weight' has shape \(10, 8\).* expects \(11, 8\)"),
        ({"intermediate_size": 16}, r"has shape \(8, 12\).* expects \(8, 16\)"),
        ({"num_key_value_heads": 2}, r"k_proj.weight' has shape \(4, 8\).* expects \(8, 8\)"),
        ({"attention_bias": True}, r"q_proj.bias' has 0 of 8 values"),
    ],
    ids=str,
)
def test_shapes_of_another_configuration_are_refused_with_both(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **changes)

    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    stray = {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}

    with pytest.raises(CheckpointError, match=r"q_norm.weight' has no place in LlamaForCausalLM"):
        load(write(tmp_path, all_tensors() | stray))


# --- what is told of it -----------------------------------------------------------------------


def test_facts_are_those_of_the_configuration(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write(tmp_path)))

    assert checkpoint.num_layers == 2
    assert checkpoint.vocab_size == 10
    assert checkpoint.model_type == "llama"
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.max_model_tokens == 32
    assert checkpoint.num_parameters == 2 * (8 * 8 * 2 + 4 * 8 * 2 + 3 * 12 * 8 + 16) + 168


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (None, None, ()),
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, {"eos_token_id": [5, 6]}, (5, 6)),
        (7, {"eos_token_id": 0}, (0,)),
        (7, {"temperature": 0.5}, (7,)),
    ],
)
def test_end_tokens_come_from_the_generation_settings_first(
    config: Any, generation: Any, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    path = write(tmp_path, eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")

    assert Checkpoint.open(str(path)).eos_token_ids == wanted


def test_a_profile_of_a_dense_model_by_hand(tmp_path: Path) -> None:
    profile = Checkpoint.open(str(write(tmp_path / "tiny"))).profile(dtype_bytes=2)

    attention, mlp, norms = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8, 3 * 12 * 8, 8 + 8
    layer = profile.layers[0]
    assert profile.name == "tiny"
    assert profile.num_layers == 2
    assert profile.layers[1] == layer
    assert layer.weight_bytes == 2 * (attention + mlp + norms)
    assert layer.flops_per_token == 2 * (attention + mlp + norms)
    assert layer.kv_bytes_per_token == 2 * 4 * 2  # a key and a value of 4 numbers of 2 bytes
    assert layer.attention_flops_per_context_token == 2 * 2 * 8  # scores and values, 8 wide each
    assert (layer.routed_bytes, layer.num_experts, layer.experts_per_token) == (0, 0, 0)
    assert profile.hidden_bytes_per_token == 8 * 2
    assert profile.embedding.weight_bytes == 10 * 8 * 2
    assert profile.embedding.flops_per_token == 0
    assert profile.head.weight_bytes == (10 * 8 + 8) * 2
    assert profile.head.flops_per_token == 2 * 10 * 8


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_profile_of_experts_by_hand(is_fused: bool, checkpoint_dir: Callable[..., Path]) -> None:
    # qwen3_moe: hidden 48, 4 query and 2 KV heads of 16, 8 experts of 24 (2 a token); layer 1 is
    # dense and 64 wide.
    path = checkpoint_dir("qwen3_moe", fused=is_fused)

    profile = Checkpoint.open(str(path)).profile(dtype_bytes=4)

    attention = 64 * 48 + 2 * 32 * 48 + 48 * 64
    norms = 2 * 48 + 2 * 16
    expert = 3 * 24 * 48
    sparse, dense = profile.layers[0], profile.layers[1]
    assert sparse.weight_bytes == 4 * (attention + norms + 8 * 48 + 8 * expert)
    assert sparse.routed_bytes == 4 * 8 * expert
    assert sparse.flops_per_token == 2 * (attention + norms + 8 * 48 + 2 * expert)
    assert (sparse.num_experts, sparse.experts_per_token) == (8, 2)
    assert sparse.kv_bytes_per_token == 2 * 32 * 4
    assert sparse.attention_flops_per_context_token == 4 * 64
    assert dense.weight_bytes == 4 * (attention + norms + 3 * 64 * 48)
    assert (dense.routed_bytes, dense.num_experts) == (0, 0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_profile_accounts_for_every_stored_byte(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))

    profile = checkpoint.profile(dtype_bytes=4)

    parts = (profile.embedding, *profile.layers, profile.head)
    copies = 0 if checkpoint.has_own_head else checkpoint.vocab_size * 48 * 4
    stored = sum(tensor.num_bytes for tensor in checkpoint.tensors)
    assert sum(part.weight_bytes for part in parts) - copies == stored
