"""A small PEFT adapter folder made without torch, for tests that must not load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODULE = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, *, rank: int = 2, value: float = 1.0, **config: Any) -> Path:
    """Write an adapter of one module of 6 inputs and 4 outputs; returns its folder."""
    folder.mkdir(parents=True)
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(options | config), encoding="utf-8")
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": np.full((rank, 6), value, np.float32),
        f"base_model.model.{MODULE}.lora_B.weight": np.full((4, rank), value, np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
