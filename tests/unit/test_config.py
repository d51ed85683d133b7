from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.config import (
    ConfigError,
    MotleyConfig,
    default_config,
    discovering_config,
    load_config,
    with_overrides,
)

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).replace(f"{path}: ", "")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)

    assert config.served_name


def test_the_embedded_default_is_three_unequal_paced_devices() -> None:
    config = default_config()

    assert Path(config.model).name == "tiny-qwen3"
    devices = config.devices or ()
    assert [device.kind for device in devices] == ["paced"] * 3
    assert len({device.memory_bytes for device in devices}) == 3
    assert len({device.memory_bytes_per_s for device in devices}) == 3


def test_text_becomes_numbers_at_the_edge(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            "model: owner/name\n"
            "devices:\n"
            "  - {id: a, kind: paced, flops_per_s: 2 GFLOP/s, memory_bytes_per_s: 1 Gbit/s,"
            " memory_bytes: 1 MiB}\n"
            "ray: {object_store_bytes: 100 MB}\n",
        )
    )

    [device] = config.devices or ()
    assert (device.flops_per_s, device.memory_bytes_per_s, device.memory_bytes) == (
        2e9,
        1.25e8,
        2**20,
    )
    assert config.ray.object_store_bytes == 10**8


def test_an_unknown_key_is_named_with_its_path_and_what_was_meant(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: a/b\nengine: {dtpye: float32}\n")

    assert message.startswith("engine.dtpye: unknown key; did you mean dtype? known keys: ")
    assert "max_running" in message


def test_an_unknown_key_in_a_list_is_named_with_its_index(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: a/b\ndevices: [{id: x, kind: cpu, speed: 3}]\n")

    assert message.startswith("devices[0].speed: unknown key; known keys: active_power_w, ")


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "plan: {lanes: 0}\ngateway: {http_port: 70000}\n")

    assert "model: is required" in message
    assert "plan.lanes: Input should be greater than or equal to 1 (got 0)" in message
    assert "gateway.http_port" in message


def test_a_bad_quantity_is_refused_at_its_path(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: a/b\nray: {object_store_bytes: 5 apples}\n")

    assert message.startswith("ray.object_store_bytes: '5 apples' is not an amount of memory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [{id: a, kind: paced}]", "device a is paced but has no flops_per_s"),
        ("devices: [{id: a, kind: cpu}, {id: a, kind: cpu}]", "2 are called a"),
        ("devices: []", "devices: "),
        (
            "devices: [{id: a, kind: cpu}]\nlinks: [{source_node: local, target_node: moon, "
            "bandwidth_bytes_per_s: 1}]",
            "no device is on node moon; nodes: local",
        ),
        (
            "links: [{source_node: a, target_node: b, bandwidth_bytes_per_s: 1}, "
            "{source_node: a, target_node: b, bandwidth_bytes_per_s: 2}]",
            "2 lead from a to b",
        ),
        ("engine: {max_running: 4}", r"plan.sequences_per_lane (8) must be at most"),
        (
            "devices: [{id: a, kind: cpu}]\nplan: {layer_counts: [1, 2]}",
            "plan.layer_counts has 2 entries for 1 devices",
        ),
        ("name: 'a/b'", "name: "),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    assert message in refusal(tmp_path, f"model: a/b\n{text}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds list, not keys"),
        ("", "holds NoneType, not keys"),
        ("model: [", "is not YAML"),
        ("model: a/b\nplan: {lanes: 1}\nplan: {lanes: 2}\n", "key 'plan' is given twice"),
    ],
)
def test_a_file_that_is_no_tree_of_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_relative_model_is_looked_up_here_and_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "there" / "model").mkdir(parents=True)
    path = write(tmp_path / "there", "model: ./model\n")

    monkeypatch.chdir(tmp_path / "here")
    assert load_config(path).model == str(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    assert load_config(path).model == str(tmp_path / "there" / "model")


def test_a_model_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: ./missing\n")

    assert "no folder ./missing (tried " in message
    assert "hub id as owner/name" in message


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: Qwen/Qwen3-8B\n"))

    assert (config.model, config.served_name) == ("Qwen/Qwen3-8B", "Qwen3-8B")


def test_flags_are_laid_over_and_validated(tmp_path: Path) -> None:
    config = with_overrides(default_config(), name="other", http_port=0, grpc_port=9)

    assert (config.served_name, config.gateway.http_port, config.gateway.grpc_port) == (
        "other",
        0,
        9,
    )
    assert config.devices == default_config().devices
    with pytest.raises(ConfigError, match=r"command line: gateway\.http_port"):
        with_overrides(config, http_port=70000)
    moved = with_overrides(config, model=str(tmp_path))
    assert moved.model == str(tmp_path)


def test_a_model_alone_leaves_the_devices_to_be_found(tmp_path: Path) -> None:
    config = discovering_config(str(tmp_path))

    assert config.devices is None
    assert config.model == str(tmp_path)


def test_settings_survive_a_round_trip_and_do_not_change() -> None:
    config = default_config()

    again = MotleyConfig.model_validate(yaml.safe_load(config.model_dump_json()))
    assert again == config
    with pytest.raises(ValueError, match="frozen"):
        config.model = "x"  # type: ignore[misc]
