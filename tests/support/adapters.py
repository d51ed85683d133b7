"""Random LoRA adapters as PEFT saves them, strong enough to change what a model writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(
    base: Path,
    folder: Path,
    *,
    targets: Sequence[str] = ATTENTION,
    rank: int = 4,
    seed: int = 0,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """Save an adapter of random matrices for a checkpoint; returns its folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **options
    )
    with _peft_may_warn():
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(strength * noise * parameter.shape[-1] ** -0.5)
    adapted.to(dtype).save_pretrained(str(folder))
    return folder


def load_adapted(base: Path, folder: Path) -> Any:
    """transformers' model with the adapter unmerged, as PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    with _peft_may_warn():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / WEIGHTS))


def changed(
    source: Path,
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """Copy an adapter with other tensors or other options; returns the copy's folder."""
    folder.mkdir(parents=True)
    known = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(known | config), encoding="utf-8")
    values = tensors_of(source) if tensors is None else dict(tensors)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@contextmanager
def _peft_may_warn() -> Iterator[None]:
    """PEFT asks for an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
