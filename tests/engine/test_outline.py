from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import ARCHITECTURES, make_model

from actors.engine.checkpoint import Checkpoint, CheckpointError, planning_profile

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_config_json_alone_gives_the_profile_that_the_weights_give(
    model_type: str, tmp_path: Path
) -> None:
    full, bare = tmp_path / "full" / "m", tmp_path / "bare" / "m"
    make_model(model_type).save_pretrained(full)
    bare.mkdir(parents=True)
    (bare / "config.json").write_bytes((full / "config.json").read_bytes())

    by_weights = Checkpoint.open(str(full)).profile(dtype_bytes=2)

    assert planning_profile(str(bare), dtype_bytes=2) == by_weights
    assert planning_profile(str(full), dtype_bytes=2) == by_weights


def test_a_layer_keeps_two_rows_of_hidden_query_and_key_value_and_its_experts(
    tmp_path: Path,
) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)

    profile = planning_profile(str(tmp_path), dtype_bytes=2)

    # hidden 48, query 4 x 16, keys 2 x 16; dense width 64, two of 24 wide experts.
    attention = 2 * (48 + 64 + 32)
    assert profile.layers[1].activation_bytes_per_token == 2 * (attention + 3 * 64 + 48)
    assert profile.layers[0].activation_bytes_per_token == 2 * (attention + 2 * (3 * 24 + 48))


def test_a_configuration_that_lacks_a_number_is_refused_by_its_name(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["intermediate_size"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="no intermediate_size"):
        planning_profile(str(bare), dtype_bytes=2)


def test_an_architecture_nobody_described_needs_its_weights_to_be_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))

    with pytest.raises(CheckpointError, match="architecture 'mamba' is not served"):
        planning_profile(str(tmp_path), dtype_bytes=2, allow_unverified=True)
