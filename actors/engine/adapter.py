"""A PEFT LoRA adapter as a value: read from its folder, checked, and sent as one block of bytes.

The bytes are a safetensors file whose metadata holds adapter_config.json, so nothing but numbers
and JSON crosses the network. No torch: the command line reads and checks an adapter without it.
What fits which base model is `actors.engine.lora`'s to say.

Of a module (out, in) the matrices are lora_A (rank, in) and lora_B (out, rank).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR = re.compile(r"^base_model\.model\.(.+)\.(lora_A|lora_B)\.weight$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NUMPY_DTYPES: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BFLOAT16_EXPONENT = 0x7F80
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_MOST_SENT_HEADER_BYTES = 16 * 2**20
"""Of an adapter that was sent: its tensors' names and places, which as values take far more."""
_LENGTH_BYTES = 8
_MOST_ALPHA = 1e30
_CONFIG_KEY = "adapter_config"
_NAME_KEY = "adapter_name"
_MOST_NAME_CHARACTERS = 128

_HONOURED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""Options that say where the matrices go and how they are scaled."""
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
)  # fmt: skip
"""Options that a trained plain adapter may carry and that do not change what it computes."""
# Others change the base weights at the start, so the matrices alone are not the adapter.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


class AdapterError(RuntimeError):
    """The adapter cannot be read or served; the message names the part and what would do."""


class Matrix(NamedTuple):
    """One stored matrix: bytes [start, end) of the adapter's data."""

    dtype: str
    """As safetensors writes it: F64, F32, F16 or BF16."""
    shape: tuple[int, int]
    start: int
    end: int


class Pair(NamedTuple):
    """The two matrices of one module."""

    a: Matrix
    b: Matrix

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A LoRA adapter whose parts agree with one another."""

    name: str
    config: Mapping[str, Any]
    """adapter_config.json."""
    pairs: Mapping[str, Pair]
    """By the base model's own module names, as model.layers.3.self_attn.q_proj."""
    data: memoryview

    @classmethod
    def read(cls, folder: Path | str) -> Adapter:
        """Read a folder and check all of it, values included.

        Raises:
            AdapterError: Not found, damaged, not finite, or of a kind that is not supported.
        """
        folder = Path(folder).resolve()
        config = read_config(folder)
        _check_name(folder.name)
        file = folder / WEIGHTS_FILE
        try:
            data = file.read_bytes()
        except OSError as error:
            raise AdapterError(
                f"{file}: cannot be read ({error.strerror}); save the adapter with safetensors"
            ) from None
        header = _Header.parse(data, str(file))
        pairs = _pairs(header, str(file))
        check_config(config, str(folder / CONFIG_FILE))
        _check_ranks(pairs, config, str(file))
        adapter = cls(
            name=folder.name, config=config, pairs=pairs, data=memoryview(data)[header.end :]
        )
        adapter.check_values()
        return adapter

    @classmethod
    def decode(cls, message: bytes | memoryview) -> Adapter:
        """Take an adapter from its bytes form; its values are not looked at.

        Raises:
            AdapterError: Damaged, or of a kind that is not supported.
        """
        source = "the adapter"
        header = _Header.parse(message, source, most_bytes=_MOST_SENT_HEADER_BYTES)
        try:
            config = json.loads(header.metadata[_CONFIG_KEY])
            name = header.metadata[_NAME_KEY]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise AdapterError(
                f"{source}: its metadata has no {_NAME_KEY} and {_CONFIG_KEY}; send it with "
                "`motley publish`"
            ) from None
        _check_name(name)
        check_config(config, CONFIG_FILE)
        pairs = _pairs(header, source)
        _check_ranks(pairs, config, source)
        data = memoryview(message)[header.end :]
        return cls(name=name, config=config, pairs=pairs, data=data)

    def encode(self) -> bytes:
        """Return the bytes form: a safetensors file with the configuration in its metadata."""
        tensors = {
            f"base_model.model.{module}.lora_{side}.weight": {
                "dtype": matrix.dtype,
                "shape": matrix.shape,
                "data_offsets": (matrix.start, matrix.end),
            }
            for module, pair in self.pairs.items()
            for side, matrix in (("A", pair.a), ("B", pair.b))
        }
        metadata = {"format": "pt", _NAME_KEY: self.name, _CONFIG_KEY: json.dumps(self.config)}
        header = json.dumps({"__metadata__": metadata} | tensors).encode()
        header += b" " * (-len(header) % _LENGTH_BYTES)
        return b"".join((len(header).to_bytes(_LENGTH_BYTES, "little"), header, self.data))

    def modules(self, first_layer: int, end_layer: int) -> list[str]:
        """Return the names of the adapted modules in layers [first_layer, end_layer)."""
        return [name for name in self.pairs if first_layer <= _layer(name) < end_layer]

    def bytes_of(self, matrix: Matrix) -> memoryview:
        return self.data[matrix.start : matrix.end]

    def check_values(self) -> None:
        """Raise AdapterError when a value is not finite."""
        for module, pair in self.pairs.items():
            for side, matrix in (("A", pair.a), ("B", pair.b)):
                if not _is_finite(matrix.dtype, self.bytes_of(matrix)):
                    raise AdapterError(
                        f"lora_{side} of {module} holds values that are not finite; the training "
                        "has diverged, publish an earlier step"
                    )


def is_adapter_folder(path: Path) -> bool:
    """Return whether a folder holds an adapter and no model weights of its own."""
    others = (file for file in path.glob("*.safetensors*") if file.name != WEIGHTS_FILE)
    return (path / CONFIG_FILE).is_file() and not any(others)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's adapter_config.json.

    Raises:
        AdapterError: Not there, or no JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{file}: cannot be read as JSON ({error}); name the folder of a PEFT adapter"
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: holds {type(config).__name__}, not an object")
    return config


def check_config(config: Any, source: str) -> None:
    """Refuse an adapter configuration that is not plain LoRA on linear layers.

    Raises:
        AdapterError: Names the option that is not supported.
    """
    if not isinstance(config, dict):
        raise AdapterError(f"{source}: holds {type(config).__name__}, not an object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{source}: peft_type {kind!r} is not supported; LORA is")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{source}: bias {config['bias']!r} is not supported; train with none")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALISATIONS:
        raise AdapterError(
            f"{source}: init_lora_weights {start!r} changes the base weights and is not supported; "
            "save it converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    known = (*_HONOURED, *_WITHOUT_EFFECT, "bias")
    for option, value in config.items():
        if option not in known and value:
            raise AdapterError(
                f"{source}: {option} ({value!r}) is not supported; an adapter may hold low-rank "
                "matrices of linear layers and nothing else"
            )
    _check_options(config, source)


def _check_options(config: Mapping[str, Any], source: str) -> None:
    """Check the types of the options that are honoured."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{source}: r ({rank!r}) must be a whole number above 0")
    if not isinstance(alpha, int | float) or not abs(alpha) <= _MOST_ALPHA:
        raise AdapterError(f"{source}: lora_alpha ({alpha!r}) must be a number")
    targets = config.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not targets or not (is_list or isinstance(targets, str)):
        raise AdapterError(
            f"{source}: target_modules ({targets!r}) must be a list of module names or a pattern"
        )
    for option in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(option) or {}, dict):
            raise AdapterError(f"{source}: {option} ({config[option]!r}) must be an object")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME_CHARACTERS:
        raise AdapterError(
            f"the adapter's name ({str(name)[:_MOST_NAME_CHARACTERS]!r}) must have 1 to "
            f"{_MOST_NAME_CHARACTERS} characters"
        )
    if not name.isprintable():
        raise AdapterError(f"the adapter's name ({name!r}) must have printable characters only")


class _Header(NamedTuple):
    """A safetensors header: 8 bytes of length, then JSON."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]
    end: int
    """Where the data begins."""
    num_data_bytes: int

    @classmethod
    def parse(
        cls, file: bytes | memoryview, source: str, *, most_bytes: int = _MOST_HEADER_BYTES
    ) -> _Header:
        length = int.from_bytes(file[:_LENGTH_BYTES], "little")
        end = _LENGTH_BYTES + length
        if len(file) < _LENGTH_BYTES or length > min(most_bytes, len(file)):
            raise AdapterError(
                f"{source}: {len(file)} bytes are no safetensors file; it is truncated or damaged"
            )
        try:
            tensors = json.loads(bytes(file[_LENGTH_BYTES:end]))
            metadata = tensors.pop("__metadata__", {})
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise AdapterError(
                f"{source}: the safetensors header is no JSON object; it is truncated or damaged"
            ) from None
        return cls(metadata, tensors, end, len(file) - end)


def _pairs(header: _Header, source: str) -> dict[str, Pair]:
    """Return the matrices by module; each module has both."""
    found: dict[str, dict[str, Matrix]] = {}
    for name, entry in header.tensors.items():
        match = _TENSOR.match(name)
        if match is None or _LAYER.match(match.group(1)) is None:
            raise AdapterError(
                f"{source}: tensor {name!r} is not supported; an adapter may hold lora_A and "
                "lora_B of linear layers inside model.layers"
            )
        matrix = _matrix(entry, f"{source}: {name!r}", header.num_data_bytes)
        found.setdefault(match.group(1), {})[match.group(2)] = matrix
    if not found:
        raise AdapterError(f"{source}: holds no tensors")
    num_bytes = sum(each.end - each.start for sides in found.values() for each in sides.values())
    if num_bytes > header.num_data_bytes:
        raise AdapterError(
            f"{source}: its tensors take {num_bytes} bytes of the data, which has "
            f"{header.num_data_bytes}; none may share bytes with another"
        )
    pairs = {}
    for module, sides in found.items():
        if len(sides) < 2:
            raise AdapterError(f"{source}: {module} has {min(sides)} without its counterpart")
        pairs[module] = Pair(sides["lora_A"], sides["lora_B"])
    return pairs


def _matrix(entry: Any, source: str, num_data_bytes: int) -> Matrix:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        # Before anything is multiplied: numbers, and none that the data could not hold.
        if not all(type(number) is int for number in (*shape[:3], start, end)):
            raise TypeError(f"{source} has a shape or place that is no whole number")
        num_bytes = math.prod(shape[:3]) * _DTYPE_BYTES[dtype]
        is_sound = start >= 0 and end - start == num_bytes and min(shape, default=0) > 0
    except (KeyError, TypeError, ValueError):
        raise AdapterError(
            f"{source}: a malformed entry, or not of type {', '.join(_DTYPE_BYTES)}"
        ) from None
    if end > num_data_bytes:
        raise AdapterError(
            f"{source} ends at byte {end} of the data, which has {num_data_bytes}; the file is "
            "truncated, copy it again"
        )
    if not is_sound or len(shape) != 2 or min(shape) < 1:
        raise AdapterError(
            f"{source}: shape {shape[:3]} does not describe {end - start} bytes of it"
        )
    return Matrix(dtype, shape, start, end)


def _check_ranks(pairs: Mapping[str, Pair], config: Mapping[str, Any], source: str) -> None:
    """Check that the two matrices of each module go together, and with `r` where it rules alone."""
    only = None if config.get("rank_pattern") else config["r"]
    for module, (a, b) in pairs.items():
        if a.shape[0] != b.shape[1] or only not in (None, a.shape[0]):
            raise AdapterError(
                f"{source}: {module} has lora_A of shape {a.shape} and lora_B of shape {b.shape}; "
                f"of rank {only or a.shape[0]} they are (rank, in) and (out, rank)"
            )


def _layer(module: str) -> int:
    match = _LAYER.match(module)
    assert match is not None, "checked when it was read"
    return int(match.group(1))


def _is_finite(dtype: str, data: memoryview) -> bool:
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2")
        return bool(((bits & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(np.frombuffer(data, _NUMPY_DTYPES[dtype])).all())
