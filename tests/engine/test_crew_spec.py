"""What expert workers, and those who use them, are started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.engine.checkpoint import Checkpoint
from cluster.config import MotleyConfig
from cluster.expert_shards import crew_spec
from cluster.planning import declared_topology, training_pool

pytestmark = pytest.mark.engine

CHECKPOINT = Path(__file__).resolve().parents[2] / "deploy" / "checkpoints" / "tiny-qwen3-moe"


def test_experts_of_a_training_run_are_frozen_for_every_node() -> None:
    config = MotleyConfig.model_validate(
        {
            "model": str(CHECKPOINT),
            "devices": [
                {
                    "id": name, "node": name, "kind": "cpu", "flops_per_s": 1e10,
                    "memory_bytes_per_s": 1e10, "memory_bytes": 2**30,
                }
                for name in ("a", "b")
            ],
            "default_link": {"bandwidth_bytes_per_s": 1e8, "latency_s": 1e-4},
            "training": {
                "data": {"train": ["x.txt"]}, "output": "run", "experts": "shards",
                "lora": {"rank": 4, "target_modules": ["q_proj"]}, "sequence_tokens": 64,
            },
            "ray": {"address": "auto"},
        }
    )  # fmt: skip
    checkpoint = Checkpoint.open(str(CHECKPOINT))
    profile, topology = checkpoint.profile(dtype_bytes=4), declared_topology(config)
    pool = training_pool(config, profile, topology)
    assert pool.shards is not None

    spec = crew_spec(
        config, checkpoint, profile, topology, pool.shards, is_frozen=True, longest_s=120.0
    )

    assert {node: access.is_frozen for node, access in spec.access.items()} == {
        "a": True,
        "b": True,
    }
    for access in spec.access.values():
        # A reason is told before whoever waits for the step gives up.
        assert access.patience.reroute_s < access.patience.answer_s == 120.0
