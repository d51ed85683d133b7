"""What the tests over hosts deploy and ask, and what one process answers to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hosts import ROOT, Network
from identity import Expected, generate

from cluster.client_values import GenerateOptions
from cluster.gateway.tokenizer import load_tokenizer

CHECKPOINT = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
SLOW_BYTES_PER_S = 20e6 / 8
"""20 Mbit/s."""
TEXTS = ("def fibonacci(n):", "import os", '"""Return the', "for i in range(10):\n    print(")
GREEDY: GenerateOptions = {"max_tokens": 160, "temperature": 0.0, "ignore_eos": True}
"""Long enough for something to happen meanwhile: about 5 s on `staged`'s devices."""


def staged(hosts: Network, *layer_counts: int, **sections: Any) -> dict[str, Any]:
    """Return settings for a paced stage on each host in turn, with a forced cut."""
    devices = [
        {
            "id": f"on-{name}", "node": host.address, "kind": "paced", "flops_per_s": 8e9,
            "memory_bytes_per_s": 6e8, "memory_bytes": "96 MiB",
        }
        for name, host in hosts.items()
    ]  # fmt: skip
    return {
        "model": str(CHECKPOINT),
        "devices": devices,
        "plan": {"lanes": 2, "layer_counts": list(layer_counts), "context_tokens": 256},
    } | sections


def in_one_process(
    texts: Sequence[str], num_new: int, checkpoint: Path = CHECKPOINT
) -> list[Expected]:
    """Return what transformers generates greedily, the end-of-text token left out of the draw."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return [generate(model, tokenizer.encode(text), num_new) for text in texts]
