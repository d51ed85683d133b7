"""Training on CUDA. Selected with `-m gpu` on a machine that has a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled_training import (
    PooledRound,
    by_parameter,
    host_weights,
    loss_scales,
    plain_gradients,
    random_batches,
    relative_errors,
)
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.checkpoint import Checkpoint
from actors.engine.trainable import TrainableModel
from placement.training import RecomputeGrain, slots_from_counts

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

CAP_BYTES = 450 * 2**20
"""What the pool's one device may hold: less than the weights of `large`."""


@pytest.mark.parametrize("grain", ["stage", "layer", "keep"])
@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "qwen3_moe", "gpt_oss"])
def test_float32_gradients_on_cuda_are_those_of_the_cpu(
    model_type: str, grain: RecomputeGrain, checkpoint_dir: Callable[..., Path]
) -> None:
    path = checkpoint_dir(model_type)
    checkpoint = Checkpoint.open(str(path))
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    batches = random_batches(2)
    _, expected = plain_gradients(reference, batches)
    models = [TrainableModel(checkpoint, dtype=torch.float32, device="cuda")]
    slots = slots_from_counts((3, 2), 1, (2, 3))
    grains: list[RecomputeGrain] = [grain if slot.kind == "backward" else "none" for slot in slots]

    done = PooledRound(
        models, host_weights(checkpoint), slots, grains, scales=loss_scales(batches)
    ).run(batches)

    errors = relative_errors(by_parameter(models[0].units, done.gradients), expected)
    assert max(errors.values()) < 1e-4, errors


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 620 MB in bfloat16."""
    path = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def capped() -> Iterator[None]:
    """Refuse this process more than `CAP_BYTES` of the device."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total_bytes)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("capped")
def test_a_model_larger_than_memory_streams_through_beside_the_compute(
    large: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(large))
    model = TrainableModel(checkpoint, dtype=torch.bfloat16, device="cuda")
    assert sum(model.placed_bytes(unit.name) for unit in model.units) > CAP_BYTES
    weights = host_weights(checkpoint, dtype=torch.bfloat16)
    batches = random_batches(4, num_sequences=1, num_rows=512, vocab_size=1000)
    slots = slots_from_counts((2,) * 11, 2, (2,) * 11)
    grains: list[RecomputeGrain] = [
        "stage" if slot.kind == "backward" else "none" for slot in slots
    ]
    pool = PooledRound([model], weights, slots, grains, scales=loss_scales(batches))

    with torch.profiler.profile() as profile:
        done = pool.run(batches)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))

    assert torch.cuda.max_memory_reserved() <= CAP_BYTES
    assert all(torch.isfinite(gradient).all() for gradient in done.gradients.values())
    copies, beside = copies_beside_kernels(tmp_path / "trace.json")
    assert copies >= 46
    # The first slot has nothing to hide behind, and a backward slot ends by reading its gradients.
    assert beside >= copies / 4, f"{beside} of {copies} copies ran beside a kernel"


def copies_beside_kernels(trace: Path) -> tuple[int, int]:
    """Return (copies of weights to the device, those during which a kernel ran)."""
    text = trace.read_text(encoding="utf-8")
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]

    def spans(category: str) -> list[tuple[float, float, dict[str, Any]]]:
        return [
            (event["ts"], event["ts"] + event["dur"], event)
            for event in events
            if event.get("cat") == category
        ]

    kernels = [(start, end) for start, end, _ in spans("kernel")]
    copies = [
        (start, end)
        for start, end, event in spans("gpu_memcpy")
        if "HtoD" in event["name"] and event["args"]["bytes"] >= 2**20
    ]
    beside = sum(
        any(start < copy_end and end > copy_start for start, end in kernels)
        for copy_start, copy_end in copies
    )
    return len(copies), beside
