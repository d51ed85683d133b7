"""What a step folder holds: trained weights as Hugging Face reads them, and optimizer state.

Full fine-tuning keeps the stored names, shapes and layout of the base checkpoint, so whatever reads
the base reads the result. Adapters get PEFT's names. Everything goes through one unit at a time;
only a shard (of a model) or the adapter is ever held beside it. Knows no folder but the one it is
given: that a save is atomic is its caller's business.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actors.engine.checkpoint import Checkpoint, CheckpointError, TensorInfo
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import ADAPTER_NAME, initial_weights, peft_config, split_flat
from actors.engine.training_values import Unit

TRAINING_FOLDER = "training"
"""Inside a step folder: what resuming needs and serving does not."""
MAX_SHARD_BYTES = 2_000_000_000

_ADAPTER_FILE = "adapter_model.safetensors"
_CONFIG_FILES = ("config.json", "generation_config.json")
# Tokenizers, chat templates and what else describes a model; weights and their indices are not
# among them, nor is an adapter that lies beside the base weights.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_NEVER_COPIED = (".index.json", "adapter_config.json")

Weights = Iterable[tuple[str, torch.Tensor]]
"""Name and flat trained tensor of every unit that has one, in the order of the units."""


def write_model(
    folder: Path,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    weights: Weights,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a complete checkpoint in the layout of the base `checkpoint` into `folder`.

    Holds one shard and one unit at a time. Shards are split between tensors, so one that is larger
    than `max_shard_bytes` has a shard of its own.

    Raises:
        CheckpointError: The units do not hold what the base checkpoint stores.
        OSError, SafetensorError: The files cannot be written.
    """
    stored = _stored_by_unit(checkpoint, units)
    shards = _shards(chain.from_iterable(stored.values()), dtype, max_shard_bytes)
    tensors = _stored_tensors(stored, units, weights, dtype)
    for name, infos in shards.items():
        _save(folder / name, dict(islice(tensors, len(infos))))
    if len(shards) > 1:
        _write_index(folder, shards, dtype)
    _copy_model_files(checkpoint.path, folder)
    _write_json(folder / "config.json", _with_dtype(checkpoint.config, dtype))


def read_model_unit(checkpoint: Checkpoint, unit: Unit, *, dtype: torch.dtype) -> torch.Tensor:
    """Return a unit's flat trained tensor from a step folder of full fine-tuning.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    trained, _ = initial_weights(checkpoint, unit, None, dtype=dtype, seed=0)
    return trained


def write_adapter(
    folder: Path,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    weights: Weights,
    *,
    lora: LoraSettings,
    base_model: str,
) -> None:
    """Write the adapters, in the type they come in, as PEFT saves them, with the tokenizer beside.

    `base_model` is what PEFT loads them onto: an absolute folder or a hub id.

    Raises:
        OSError, SafetensorError: The files cannot be written.
    """
    tensors = {
        _peft_name(name): tensor
        for unit, flat in _in_order(units, weights)
        for name, tensor in _named(unit, flat)
    }
    _save(folder / _ADAPTER_FILE, tensors)
    config = peft_config(
        lora, task_type="CAUSAL_LM", base_model_name_or_path=base_model, inference_mode=True
    )
    config.save_pretrained(str(folder))
    # With a config.json the folder would pass for a whole model.
    _copy_model_files(checkpoint.path, folder, except_names=_CONFIG_FILES)


def read_adapter_unit(folder: Path, unit: Unit, *, dtype: torch.dtype) -> torch.Tensor:
    """Return a unit's flat trained tensor from an adapter folder.

    Raises:
        CheckpointError: The file is missing or damaged, or of another rank or other modules.
    """
    file = folder / _ADAPTER_FILE
    flat = torch.empty(unit.num_trained, dtype=dtype)
    stored = _read(file, [_peft_name(parameter.name) for parameter in unit.trained])
    for (name, tensor), (_, target) in zip(stored.items(), _named(unit, flat), strict=True):
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, the settings give "
                f"{tuple(target.shape)}; was it trained with another lora.rank?"
            )
        target.copy_(tensor)
    return flat


def write_optimizer_state(folder: Path, unit_name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Write one unit's optimizer state into a step folder.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    file = optimizer_file(folder, unit_name)
    file.parent.mkdir(exist_ok=True)
    _save(file, {name: tensor.contiguous() for name, tensor in state.items()})


def read_optimizer_state(folder: Path, unit_name: str) -> dict[str, torch.Tensor]:
    """Return one unit's optimizer state of a step folder.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return _read(optimizer_file(folder, unit_name))


def optimizer_file(folder: Path, unit_name: str) -> Path:
    """Return where a step folder keeps a unit's optimizer state."""
    return folder / TRAINING_FOLDER / f"optimizer-{unit_name.replace(' ', '-')}.safetensors"


def _stored_by_unit(checkpoint: Checkpoint, units: Sequence[Unit]) -> dict[str, list[TensorInfo]]:
    """Return which stored tensors each unit fills, in the order of its parameters."""
    places = {
        parameter.name: (unit, i) for unit in units for i, parameter in enumerate(unit.trained)
    }
    stored: dict[str, list[TensorInfo]] = {unit.name: [] for unit in units}
    filled = dict.fromkeys(places, 0)
    for info in checkpoint.tensors:
        if info.parameter not in places:
            raise CheckpointError(
                f"{info.file}: tensor {info.stored_name!r} is not among what is trained, so the "
                "whole model cannot be written"
            )
        stored[places[info.parameter][0].name].append(info)
        filled[info.parameter] += info.numel
    for name, (unit, i) in places.items():
        if filled[name] < unit.trained[i].numel:
            raise CheckpointError(
                f"{checkpoint.path}: stores {filled[name]} of the {unit.trained[i].numel} values "
                f"of {name!r}; a shard is missing"
            )
    for infos in stored.values():
        infos.sort(key=lambda info: (places[info.parameter][1], info.stored_name))
    return stored


def _stored_tensors(
    stored: Mapping[str, Sequence[TensorInfo]],
    units: Sequence[Unit],
    weights: Weights,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield stored names and tensors; views of a unit that has the type already."""
    for unit, flat in _in_order(units, weights):
        parameters = dict(_named(unit, flat.to(dtype)))
        for info in stored[unit.name]:
            yield info.stored_name, _part(parameters[info.parameter], info).contiguous()


def _in_order(units: Sequence[Unit], weights: Weights) -> Iterator[tuple[Unit, torch.Tensor]]:
    trained = [unit for unit in units if unit.trained]
    for unit, (name, flat) in zip(trained, weights, strict=True):
        if name != unit.name or flat.shape != (unit.num_trained,):
            raise ValueError(
                f"unit {name!r} of shape {tuple(flat.shape)} came where {unit.name!r} of "
                f"({unit.num_trained},) is due"
            )
        yield unit, flat


def _named(unit: Unit, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trained parameters of a flat tensor, as views of it."""
    for parameter, view in zip(unit.trained, split_flat(flat, unit.trained), strict=True):
        yield parameter.name, view


def _part(parameter: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """Return what a stored tensor holds of its parameter: all, or its expert's part."""
    part = parameter
    if info.expert is not None:
        part = parameter[info.expert]
        half = part.shape[0] // 2
        part = {"gate": part[:half], "up": part[half:], "all": part}[info.part]
    if part.shape != info.shape:
        raise CheckpointError(
            f"{info.file}: {info.stored_name!r} has shape {info.shape}, what is trained for it "
            f"{tuple(part.shape)}; is config.json of another checkpoint?"
        )
    return part


def _shards(
    infos: Iterable[TensorInfo], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, list[TensorInfo]]:
    """Return file names and the tensors of each, in order."""
    shards: list[list[TensorInfo]] = []
    room_bytes = 0
    for info in infos:
        num_bytes = info.numel * dtype.itemsize
        if not shards or num_bytes > room_bytes:
            shards.append([])
            room_bytes = max_shard_bytes
        shards[-1].append(info)
        room_bytes -= num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }


def _write_index(
    folder: Path, shards: Mapping[str, Sequence[TensorInfo]], dtype: torch.dtype
) -> None:
    numel = sum(info.numel for shard in shards.values() for info in shard)
    names = {info.stored_name: file for file, shard in shards.items() for info in shard}
    index = {"metadata": {"total_size": numel * dtype.itemsize}, "weight_map": names}
    _write_json(folder / "model.safetensors.index.json", index)


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the configuration with the type that the weights now have."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}


def _copy_model_files(source: Path, folder: Path, *, except_names: Sequence[str] = ()) -> None:
    """Copy what describes the model; a hub cache's links become files."""
    for file in sorted(source.iterdir()):
        is_ours = file.suffix in _COPIED_SUFFIXES or file.name.startswith(_COPIED_NAMES)
        is_left = file.name.endswith(_NEVER_COPIED) or file.name in except_names
        if is_ours and not is_left and file.is_file():
            shutil.copyfile(file, folder / file.name)


def _peft_name(parameter: str) -> str:
    """Return the name under which PEFT saves an adapter's parameter."""
    return "base_model.model." + parameter.replace(f".{ADAPTER_NAME}.", ".")


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), file, metadata={"format": "pt"})
    # The library makes files that only their owner can read; the folder's mode has the umask in it.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _read(file: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the named tensors of a file; by default all."""
    try:
        with safe_open(file, framework="pt", backend="pread") as handle:
            wanted = handle.keys() if names is None else names
            return {name: handle.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: missing or damaged ({error}); resume from an older step folder"
        ) from error


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
