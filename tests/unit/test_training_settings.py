"""The `training` section of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.training_settings import DataSettings, TrainingSettings


def refusal(**values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        TrainingSettings.model_validate(values)
    return str(caught.value)


def test_the_defaults_are_a_whole_run_but_for_its_data() -> None:
    settings = TrainingSettings()

    assert (settings.data, settings.output, settings.lora) == (None, None, None)
    assert settings.sequences_per_step == 32
    assert not settings.optimizer.asynchronous


def test_a_section_becomes_values() -> None:
    settings = TrainingSettings.model_validate(
        {
            "data": {"train": ["a.jsonl", "b"], "held_out_fraction": 0.1},
            "steps": 7,
            "micro_batches": 3,
            "sequences_per_micro_batch": 2,
            "rounds_per_step": 5,
            "lora": {"rank": 4},
            "optimizer": {"warmup_steps": 7, "clip_norm": None},
        }
    )

    assert settings.sequences_per_step == 30
    assert settings.data == DataSettings(train=(Path("a.jsonl"), Path("b")), held_out_fraction=0.1)
    assert settings.lora is not None
    assert settings.lora.rank == 4
    assert settings.optimizer.clip_norm is None


def test_a_warm_up_that_does_not_end_is_refused_with_both_numbers() -> None:
    message = refusal(steps=10, optimizer={"warmup_steps": 11})

    assert r"optimizer.warmup_steps (11) must be at most steps (10)" in message


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"data": {}}, "data.train"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": {"train": ["a"], "held_out_fraction": 1}}, "data.held_out_fraction"),
        ({"data": {"train": ["a"], "format": "parquet"}}, "data.format"),
        ({"data": {"train": ["a"], "formt": "text"}}, "data.formt"),
        ({"sequence_tokens": 1}, "sequence_tokens"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"router_loss_coefficient": float("nan")}, "router_loss_coefficient"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
        ({"optimizer": {"beta2": 1}}, "optimizer.beta2"),
        ({"optimizer": {"state": "4bit"}}, "optimizer.state"),
    ],
)
def test_a_value_that_cannot_be_is_named(values: dict[str, Any], where: str) -> None:
    assert where in refusal(**values).splitlines()
