"""Saved tiny checkpoints, and the transformers reference that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import OpenFleet, fleets
from tiny_models import make_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a saved random checkpoint: `checkpoint_dir(model_type, fused=...)`."""
    made: dict[tuple[str, bool], Path] = {}

    def make(model_type: str, *, fused: bool = False) -> Path:
        key = (model_type, fused)
        if key not in made:
            path = tmp_path_factory.mktemp(model_type) / ("fused" if fused else "original")
            model = make_model(model_type)
            model.save_pretrained(path, max_shard_size="100KB", save_original_format=not fused)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Iterator[Callable[[Path], Any]]:
    """Load (once) transformers' own model of a saved checkpoint."""
    models: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in models:
            models[path] = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return models[path]

    yield load
    models.clear()


@pytest.fixture
def open_fleet(checkpoint_dir: Callable[..., Path]) -> Iterator[OpenFleet]:
    """Open fleets of expert workers; they end with the test."""
    with fleets(checkpoint_dir) as make:
        yield make
