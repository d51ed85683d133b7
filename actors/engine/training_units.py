"""What a checkpoint's weights are split into for training: the embedding, each layer, the head.

Owns the names and order of parameters in a unit's flat tensors, adapters included, and the values
they start from. Nothing here holds more than one unit's weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

from actors.engine.checkpoint import FINAL_NORM, HEAD, Checkpoint, CheckpointError
from actors.engine.experts import ExpertDispatcher, lend_experts
from actors.engine.packed_attention import PACKED_ATTENTION_NAME
from actors.engine.skeleton import build_skeleton, fill_parameters
from actors.engine.training_config import LoraSettings
from actors.engine.training_values import (
    EMBEDDING_UNIT,
    HEAD_UNIT,
    ParameterInfo,
    Unit,
    layer_unit,
)

ADAPTER_NAME = "default"
"""Of PEFT's adapter in parameter names."""
LORA_LIMITS = (
    "adapters fit linear layers alone: not the embedding, not routers, and not the experts, whose "
    "matrices are one tensor for each layer"
)
_EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def training_skeleton(
    checkpoint: Checkpoint,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    *,
    experts: ExpertDispatcher | None = None,
) -> Any:
    """Build the architecture on `meta`, with PEFT's adapters where `lora` asks for them.

    Routed experts are part of it unless there are `experts` to run their rows.

    Raises:
        CheckpointError: A target module is not there, or is nothing that an adapter fits.
    """
    model = build_skeleton(checkpoint, dtype, attention=PACKED_ATTENTION_NAME)
    if lora is not None:
        _check_targets(model, lora.target_modules)
    if experts is not None:
        lend_experts(model.model.layers, range(checkpoint.num_layers), experts)
    if lora is None:
        return model
    return inject_adapter_in_model(
        peft_config(lora), model, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True
    )


def peft_config(lora: LoraSettings, **options: Any) -> LoraConfig:
    """Return PEFT's own settings, with more of its `options`."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        **options,
    )


def lora_targets(model: Any) -> tuple[str, ...]:
    """Return the last parts of names of modules that adapters fit, of a model without any."""
    fits: dict[str, bool] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        fits[last] = fits.get(last, True) and isinstance(module, torch.nn.Linear)
    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    # PEFT takes these for the experts, also where a dense layer of the model has them.
    refused = _EXPERT_MATRICES if has_experts else ()
    return tuple(name for name, is_linear in fits.items() if is_linear and name not in refused)


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    there = lora_targets(model)
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        is_there = any(name == target or name.endswith(f".{target}") for name in names)
        if not is_there or target.rpartition(".")[2] not in there:
            raise CheckpointError(
                f"lora.target_modules: {target!r} fits no module of {type(model).__name__}; there "
                f"are {', '.join(there)}; {LORA_LIMITS}"
            )


def training_units(
    checkpoint: Checkpoint, lora: LoraSettings | None, *, experts_elsewhere: bool = False
) -> tuple[Unit, ...]:
    """Return the embedding, every layer and the head, in this order; reads no weights.

    Without `lora` all parameters are trained, with it the adapters alone. A head that is tied to
    the embedding is part of the embedding's unit; routed experts that are elsewhere are of none.

    Raises:
        CheckpointError: A target module is not there, or is nothing that an adapter fits.
    """
    units = model_units(checkpoint, training_skeleton(checkpoint, lora, torch.float32), lora)
    if not experts_elsewhere:
        return units
    return tuple(
        replace(unit, frozen=tuple(p for p in unit.frozen if not _is_expert(p.name)))
        for unit in units
    )


def model_units(checkpoint: Checkpoint, model: Any, lora: LoraSettings | None) -> tuple[Unit, ...]:
    """Return the units of a `training_skeleton`."""
    names = [EMBEDDING_UNIT, *map(layer_unit, range(checkpoint.num_layers)), HEAD_UNIT]
    found: dict[str, list[ParameterInfo]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        if checkpoint.has_own_head or stored_name(name) != HEAD:
            found[_unit_of(name)].append(ParameterInfo(name, tuple(parameter.shape)))
    units = []
    for name, parameters in found.items():
        # Matrices first; `sorted` leaves the order within both kinds as it is.
        ordered = sorted(parameters, key=lambda parameter: not _is_decayed(parameter))
        trained = tuple(p for p in ordered if lora is None or _is_adapter(p.name))
        frozen = tuple(p for p in ordered if p not in trained)
        num_decayed = sum(p.numel for p in trained if _is_decayed(p))
        units.append(Unit(name=name, trained=trained, frozen=frozen, num_decayed=num_decayed))
    return tuple(units)


def _unit_of(parameter: str) -> str:
    if parameter.startswith("model.layers."):
        return layer_unit(int(parameter.split(".")[2]))
    is_head = parameter.startswith((FINAL_NORM, "lm_head."))
    return HEAD_UNIT if is_head else EMBEDDING_UNIT


def _is_decayed(parameter: ParameterInfo) -> bool:
    """Whether it is a matrix; biases of experts have two dimensions and are none."""
    return len(parameter.shape) >= 2 and not parameter.name.endswith("bias")


def _is_expert(parameter: str) -> bool:
    return ".experts." in parameter


def _is_adapter(parameter: str) -> bool:
    return ".lora_" in parameter


def stored_name(parameter: str) -> str:
    """Return a parameter's name without adapters."""
    return parameter.replace(".base_layer.", ".")


def initial_weights(
    checkpoint: Checkpoint,
    unit: Unit,
    lora: LoraSettings | None,
    *,
    dtype: torch.dtype,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a unit's flat (trained, frozen) tensors on the CPU; reads only its own weights.

    Adapters begin as PEFT's do: A uniform within 1 / sqrt(its inputs), drawn from `seed` and the
    parameter's name, and B zero.

    Raises:
        CheckpointError: The checkpoint lacks a parameter of the unit, or holds another shape.
    """
    trained = torch.zeros(unit.num_trained, dtype=dtype)
    frozen = torch.empty(unit.num_frozen, dtype=dtype)
    stored: dict[str, torch.Tensor] = {}
    for infos, flat in ((unit.trained, trained), (unit.frozen, frozen)):
        for info, view in zip(infos, split_flat(flat, infos), strict=True):
            if not (lora and _is_adapter(info.name)):
                stored[stored_name(info.name)] = view
            elif ".lora_A." in info.name:
                view.copy_(_initial_adapter(info, seed))
    has_experts = any(map(_is_expert, stored))
    owned = [
        tensor
        for tensor in checkpoint.tensors
        if _unit_of(tensor.parameter) == unit.name
        and (has_experts or not _is_expert(tensor.parameter))
    ]
    fill_parameters(checkpoint, owned, stored)
    return trained, frozen


def _initial_adapter(info: ParameterInfo, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(counter_seed(seed, zlib.crc32(info.name.encode())))
    values = torch.empty(info.shape)
    return torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


def counter_seed(*counters: int) -> int:
    """Return a generator's seed that is a pure function of whole numbers from 0."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)


def split_flat(flat: torch.Tensor, infos: Sequence[ParameterInfo]) -> list[torch.Tensor]:
    """Return views of a flat tensor, one for each parameter."""
    parts = torch.split(flat, [info.numel for info in infos]) if infos else ()
    return [part.view(info.shape) for part, info in zip(parts, infos, strict=True)]
