"""What a Hugging Face checkpoint holds and which of its tensors a slice of layers owns.

Owns the index: configuration, tensor names, shapes, shards. Reads headers only (no torch), so
planning needs neither a GPU nor memory; `actors.engine.slice` reads the tensors themselves.
Refuses what cannot be served before anything is loaded: a missing or truncated shard, a
quantised checkpoint, an architecture outside the verified list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from actors.engine.outline import Shape, implied_shapes, model_profile
from placement.workload import ModelProfile

VERIFIED_MODEL_TYPES = (
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Architectures whose tokens the tests compare with transformers' own."""

# Their rotary frequencies depend on the longest sequence of a batch, so a packed batch would
# change the tokens of its members.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_EXPERT_PART: Mapping[str, tuple[str, Literal["gate", "up", "all"]]] = {
    "gate_proj": ("gate_up_proj", "gate"),
    "w1": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "w3": ("gate_up_proj", "up"),
    "down_proj": ("down_proj", "all"),
    "w2": ("down_proj", "all"),
}
# Old conversions store what the architecture computes; transformers passes over it too.
_COMPUTED = ".rotary_emb.inv_freq"
EMBEDDING = "model.embed_tokens.weight"
_DEFAULT_POSITIONS = 2048
FINAL_NORM = "model.norm."
HEAD = "lm_head.weight"


class CheckpointError(RuntimeError):
    """The checkpoint cannot be read or served; the message names the file and the knob."""


class UnsupportedArchitectureError(CheckpointError):
    """The architecture does not plug into both transformers interfaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One stored tensor and the module parameter (or the part of it) that it fills.

    Per-expert layouts store a fused parameter in pieces: `expert` is the piece's row and `part`
    the half of the gate-up matrix.
    """

    stored_name: str
    file: Path
    shape: tuple[int, ...]
    num_bytes: int
    parameter: str
    expert: int | None = None
    part: Literal["gate", "up", "all"] = "all"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        match = _LAYER.match(self.parameter)
        return int(match.group(1)) if match else None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its configuration and the index of its tensors."""

    path: Path
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @classmethod
    def open(cls, model: str, *, allow_unverified: bool = False) -> Checkpoint:
        """Open a local directory, or a hub id (fetched into the Hugging Face cache).

        Raises:
            CheckpointError: Not found, unreadable, incomplete, or not servable.
        """
        path = locate(model)
        config = _read_config(path)
        check_servable(config, allow_unverified=allow_unverified)
        _check_sizes(path, config)
        tensors = tuple(
            tensor for file, names in _shards(path) for tensor in _read_header(file, names)
        )
        checkpoint = cls(path=path, config=config, tensors=tensors)
        checkpoint._check_complete()
        return checkpoint

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.model_type])[0])

    @property
    def max_model_tokens(self) -> int:
        return int(self.config.get("max_position_embeddings", _DEFAULT_POSITIONS))

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def has_own_head(self) -> bool:
        return any(tensor.parameter == HEAD for tensor in self.tensors)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids, from generation_config.json first (as `generate` does)."""
        generation = self.path / "generation_config.json"
        values = _read_json(generation) if generation.exists() else {}
        eos = values.get("eos_token_id", self.config.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token) is int for token in ids):
            raise CheckpointError(f"{self.path}: eos_token_id ({eos!r}) must be token ids")
        return tuple(ids)

    def owned(self, first_layer: int, end_layer: int) -> list[TensorInfo]:
        """Return the tensors that a stage with layers [first_layer, end_layer) reads.

        The first stage also owns the embedding; the last one the final norm and the head (with
        tied weights, a second copy of the embedding).
        """
        is_last = end_layer == self.num_layers
        head = HEAD if self.has_own_head else EMBEDDING

        def owns(tensor: TensorInfo) -> bool:
            if (layer := tensor.layer) is not None:
                return first_layer <= layer < end_layer
            if tensor.parameter == EMBEDDING and first_layer == 0:
                return True
            return is_last and (tensor.parameter.startswith(FINAL_NORM) or tensor.parameter == head)

        return [tensor for tensor in self.tensors if owns(tensor)]

    def profile(self, *, dtype_bytes: int) -> ModelProfile:
        """Return what each layer costs when held in a type of `dtype_bytes` bytes."""
        shapes = [Shape(tensor.parameter, tensor.shape) for tensor in self.tensors]
        return _profile(self.path, self.config, shapes, dtype_bytes)

    def _check_complete(self) -> None:
        present = {tensor.layer for tensor in self.tensors}
        missing = [i for i in range(self.num_layers) if i not in present]
        if missing:
            raise CheckpointError(
                f"{self.path}: no tensors for layers {missing} of {self.num_layers}; "
                "fetch the checkpoint again, a shard is missing"
            )
        beyond = sorted(i for i in present if i is not None and i >= self.num_layers)
        if beyond:
            raise CheckpointError(
                f"{self.path}: tensors for layers {beyond}, but config.json says "
                f"num_hidden_layers {self.num_layers}; it is another checkpoint's"
            )
        names = {tensor.parameter for tensor in self.tensors}
        for name in (EMBEDDING, FINAL_NORM + "weight"):
            if name not in names:
                raise CheckpointError(f"{self.path}: no tensor {name!r}; a shard is missing")
        if not self.has_own_head and not self.config.get("tie_word_embeddings", False):
            raise CheckpointError(
                f"{self.path}: no tensor {HEAD!r}, and config.json does not tie it to the embedding"
            )


def read_configuration(model: str) -> dict[str, Any]:
    """Return a checkpoint's config.json; of a hub id no more than that is fetched.

    Raises:
        CheckpointError: Not found, or unreadable.
    """
    return _read_config(locate(model, weights=False))


def has_weights(model: str) -> bool:
    """Return whether a checkpoint's weights, or their index, are in a folder here."""
    return any(Path(model).expanduser().glob("*.safetensors*"))


def planning_profile(
    model: str, *, dtype_bytes: int, allow_unverified: bool = False
) -> ModelProfile:
    """Return the profile of a checkpoint whose weights need not be here.

    A folder without weights, or a hub id, is described by its config.json alone.

    Raises:
        CheckpointError: Not found, unreadable, incomplete, or not servable.
    """
    if has_weights(model):
        checkpoint = Checkpoint.open(model, allow_unverified=allow_unverified)
        return checkpoint.profile(dtype_bytes=dtype_bytes)
    path = locate(model, weights=False)
    config = _read_config(path)
    # Without tensors to look at, only the architectures whose tensors are known can be described.
    check_servable(config)
    _check_sizes(path, config)
    try:
        shapes = implied_shapes(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _profile(path, config, shapes, dtype_bytes)


def _profile(
    path: Path, config: Mapping[str, Any], shapes: Sequence[Shape], dtype_bytes: int
) -> ModelProfile:
    try:
        return model_profile(path.name, config, shapes, dtype_bytes=dtype_bytes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def locate(model: str, *, weights: bool = True) -> Path:
    """Return the directory of a checkpoint: a local path first, else a hub id.

    Without `weights` only the configuration of a hub id is fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"model {model!r} is neither a directory nor a hub id (owner/name); set `model` to a "
            "folder that holds config.json and *.safetensors"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja"] if weights else ["config.json"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"hub id {model!r} could not be fetched: {error}") from error


def check_servable(config: Mapping[str, Any], *, allow_unverified: bool = False) -> None:
    """Refuse a configuration that Motley cannot serve faithfully.

    Raises:
        UnsupportedArchitectureError: The architecture is outside the verified list.
        CheckpointError: It is quantised, or its rotary embedding depends on the batch.
    """
    model_type = config.get("model_type")
    works = ", ".join(VERIFIED_MODEL_TYPES)
    if model_type not in VERIFIED_MODEL_TYPES and not allow_unverified:
        raise UnsupportedArchitectureError(
            f"architecture {model_type!r} is not served: it is not known to use both "
            f"transformers interfaces (attention and experts). These are: {works}. "
            "Set engine.allow_unverified_architectures to try one that does"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            f"the checkpoint is quantised ({method}); save it in bfloat16 or float32 first"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _BATCH_DEPENDENT_ROPE:
        raise UnsupportedArchitectureError(
            f"rope_type {rope_type!r} changes a token's rotation with the longest sequence of its "
            "batch, so batched tokens would differ; use default, linear, yarn or llama3"
        )


def module_parameter(stored_name: str) -> tuple[str, int | None, Literal["gate", "up", "all"]]:
    """Map a stored tensor's name to (module parameter, expert, part).

    Covers both layouts that transformers reads: fused experts under their own names, and one
    tensor an expert (Qwen-MoE and OLMoE names, Mixtral's w1, w2, w3).
    """
    name = stored_name.replace(".block_sparse_moe.", ".mlp.")
    if not name.startswith(("model.", "lm_head.")):
        name = "model." + name
    match = _EXPERT.match(name)
    if match is None:
        return name, None, "all"
    parameter, part = _EXPERT_PART[match.group(3)]
    return f"{match.group(1)}.{parameter}", int(match.group(2)), part


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(f"{path}: no config.json; is this a Hugging Face checkpoint?")
    config = _read_json(file)
    if "model_type" not in config:
        raise CheckpointError(f"{file}: no 'model_type'")
    return config


def _check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{path / 'config.json'}: {name} ({value!r}) must be a whole number above 0"
            )
    longest = config.get("max_position_embeddings", _DEFAULT_POSITIONS)
    if type(longest) is not int or longest < 1:
        raise CheckpointError(
            f"{path / 'config.json'}: max_position_embeddings ({longest!r}) must be a whole number "
            "above 0"
        )


def _shards(path: Path) -> list[tuple[Path, set[str]]]:
    """Return the checkpoint's files and what the index expects in each; all of them exist."""
    single = path / "model.safetensors"
    if single.exists():
        return [(single, set())]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{path}: no *.safetensors; convert the checkpoint to safetensors"
            )
        return [(file, set()) for file in files]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no 'weight_map'; fetch the checkpoint again")
    expected: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        expected.setdefault(str(shard), set()).add(name)
    missing = [name for name in sorted(expected) if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(expected)} shards missing: {', '.join(missing)}; "
            "fetch the checkpoint again"
        )
    return [(path / name, expected[name]) for name in sorted(expected)]


def _read_header(file: Path, expected: set[str]) -> Iterator[TensorInfo]:
    """Yield the tensors of one shard; the library checks that the file covers its header."""
    try:
        with safe_open(file, framework="np", backend="pread") as handle:
            names = set(handle.keys())
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            dtypes = {name: handle.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({_size(file)}, {error}); the shard is truncated or damaged, "
            "fetch it again"
        ) from error
    if expected - names:
        raise CheckpointError(f"{file}: the index names {sorted(expected - names)[0]!r}, not in it")
    for name in sorted(names):
        if name.endswith(_COMPUTED):
            continue
        if dtypes[name] not in _DTYPE_BYTES:
            raise CheckpointError(
                f"{file}: tensor {name!r} is of type {dtypes[name]}, not one of "
                f"{', '.join(_DTYPE_BYTES)}; save the checkpoint in bfloat16 or float32 first"
            )
        parameter, expert, part = module_parameter(name)
        yield TensorInfo(
            stored_name=name,
            file=file,
            shape=shapes[name],
            num_bytes=math.prod(shapes[name]) * _DTYPE_BYTES[dtypes[name]],
            parameter=parameter,
            expert=expert,
            part=part,
        )


def _size(file: Path) -> str:
    return f"{file.stat().st_size} bytes" if file.exists() else "a link to nothing"


_DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
