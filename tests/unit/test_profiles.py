"""Profiles as values and as files: round trips, what is refused, and what plans make of them."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, MotleyConfig
from cluster.profile import (
    known_topology,
    load_cached,
    measured_devices,
    measured_topology,
)
from cluster.profile_cache import (
    DeviceKey,
    ProfileCache,
    fingerprint,
    own_versions,
    read_profile,
    write_profile,
)
from placement.costs import layer_step_s
from placement.estimated import complete_tables, fit_layer_model, probe_seconds
from placement.measured import LayerSample, MatmulRate
from placement.profiles import (
    DeviceProfile,
    Estimate,
    LayerTable,
    LinkProfile,
    Profile,
    device_from_json,
    plain_json,
)
from placement.topology import Topology
from placement.training_costs import layer_activation_bytes, layer_training_s
from placement.workload import LayerCost, ModelProfile

ROOT = Path(__file__).resolve().parents[2]
HERE = socket.gethostname()
FINGERPRINT = "0123456789abcdef"
LAYER = LayerCost(flops_per_token=2e6, weight_bytes=4_000_000, kv_bytes_per_token=512)
WIDE = LayerCost(flops_per_token=4e6, weight_bytes=8_000_000, kv_bytes_per_token=512)
HEAD = LayerCost(flops_per_token=8e6, weight_bytes=16_000_000)
MODEL = ModelProfile(
    name="m",
    embedding=LayerCost(flops_per_token=0, weight_bytes=16_000_000),
    layers=(LAYER, WIDE, LAYER),
    head=HEAD,
    hidden_bytes_per_token=2048,
)
DECODE = LayerSample(tokens=8, context_tokens=4096, forward_s=0.004)
PROMPT = LayerSample(
    tokens=128,
    context_tokens=128,
    pairs=8256,
    forward_s=0.03,
    recompute_s=0.033,
    backward_s=0.07,
    activation_bytes=1_000_000,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def device(id: str = "cpu0", **changes: Any) -> DeviceProfile:  # noqa: A002 - the field's name
    figures: dict[str, Any] = {
        "id": id,
        "node": "local",
        "kind": "cpu",
        "source": "measured",
        "host": HERE,
        "node_names": (HERE, "10.0.0.1"),
        "name": "Processor",
        "dtype": "float32",
        "threads": 1,
        "versions": own_versions(),
        "flops_per_s": 1e11,
        "memory_bytes_per_s": 1e10,
        "memory_bytes": 2**33,
        "matmul_rates": {
            "float32": (
                MatmulRate(rows=1, flops_per_s=2e10),
                MatmulRate(rows=256, flops_per_s=1e11),
            ),
            "bfloat16": (MatmulRate(rows=1, flops_per_s=1e9),),
        },
        "layers": (
            LayerTable(part="layer", layers=(0, 2), samples=(DECODE, PROMPT)),
            LayerTable(part="head", samples=(replace(DECODE, context_tokens=0),)),
        ),
    }
    return DeviceProfile(**figures | changes)


def link(source: str = "local", target: str = "local", **changes: Any) -> LinkProfile:
    figures: dict[str, Any] = {
        "source_node": source,
        "target_node": target,
        "source": "measured",
        "rtt_s": 1e-4,
        "bandwidth_bytes_per_s": 2e9,
        "source_names": (HERE,),
        "target_names": (HERE,),
    }
    return LinkProfile(**figures | changes)


def profile(*devices: DeviceProfile, links: tuple[LinkProfile, ...] = ()) -> Profile:
    return Profile(
        checkpoint="m", fingerprint=FINGERPRINT, devices=devices or (device(),), links=links
    )


def config(**changes: Any) -> MotleyConfig:
    tree = {"model": str(ROOT / "deploy" / "checkpoints" / "tiny-qwen3")}
    return MotleyConfig.model_validate(tree | changes)


# --- values -----------------------------------------------------------------------------------


def test_a_profile_survives_json() -> None:
    estimate = Estimate(samples=2, known_devices=4, rank=1, median_error=0.1, p90_error=0.3)
    whole = profile(
        device(),
        device("gpu", kind="cuda", source="estimated", estimate=estimate, host_bytes_per_s=1e10),
        links=(link(),),
    )

    text = json.dumps(whole.to_json(), allow_nan=False)

    assert Profile.from_json(json.loads(text), "f") == whole


def test_a_measured_point_is_predicted_exactly() -> None:
    planned = device().to_device(MODEL)

    assert layer_step_s(planned, LAYER, 8, 4096) == pytest.approx(0.004, rel=1e-12)
    assert layer_step_s(planned, HEAD, 8, 0) == pytest.approx(0.004, rel=1e-12)
    training = layer_training_s(planned, LAYER, 128, 8256)
    assert training == pytest.approx((0.03, 0.033, 0.07), rel=1e-12)
    assert layer_activation_bytes(planned, LAYER, 128, 8256) == 1_000_000
    assert planned.matmul_rates == device().matmul_rates["float32"]


def test_layers_are_known_by_index_in_whatever_format_they_are_planned() -> None:
    half = replace(LAYER, weight_bytes=2_000_000, activation_bytes_per_token=7)
    planned = device().to_device(replace(MODEL, layers=(half, WIDE, half)))

    assert [measured.layer for measured in planned.measured_layers] == [half, HEAD]
    # A layer that was not measured, and indices beyond the model, are the roofline's.
    short = device().to_device(replace(MODEL, layers=(WIDE,)))
    assert [measured.layer for measured in short.measured_layers] == [WIDE, HEAD]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(flops_per_s=math.nan),
            r"devices\[0\]: flops_per_s: nan must be finite",
        ),
        (lambda d: d.update(memory_bytes=-5), r"memory_bytes \(-5\) must be above 0"),
        (lambda d: d.update(memory_bytes="much"), "memory_bytes: 'much' is not a number"),
        (lambda d: d.update(memory_bytes=1.5), "memory_bytes: 1.5 is not a whole number"),
        (lambda d: d.update(memory_bytes=None), "memory_bytes: is null, but must be given"),
        (lambda d: d.update(id=3), "id: 3 is not text"),
        (lambda d: d.update(kind="tpu"), r"kind \('tpu'\) must be one of cpu, cuda, paced"),
        (lambda d: d.update(source="rumour"), "source .* must be one of measured"),
        (lambda d: d.update(speed=1), "unknown key 'speed'; known keys: id, node"),
        (lambda d: d.pop("flops_per_s"), "'flops_per_s'; a key is missing"),
        (lambda d: d.update(layers={}), "layers is dict, not a list"),
        (lambda d: d.update(versions=[]), "versions is list, not keys"),
        (lambda d: d.update(source="estimated"), "an estimate does not go with|does not go"),
        (lambda d: d["layers"].append(d["layers"][0]), "name one table twice"),
        (lambda d: d["layers"][0].update(layers=[]), r"layers \(\[\]\) are not those of a layer"),
        (lambda d: d["layers"][0].update(samples=[]), "has 0 samples"),
        (
            lambda d: d["layers"][0]["samples"][1].update(backward_s=math.nan),
            r"layers\[0\]: samples\[1\]: backward_s: nan must be finite",
        ),
        (
            lambda d: d["layers"][0]["samples"][0].update(forward_s=-1.0),
            r"samples\[0\]: .*forward_s \(-1.0\) must be above 0",
        ),
        (lambda d: d["layers"][0]["samples"].reverse(), "must ascend; 8 follows 128"),
        (
            lambda d: d["matmul_rates"]["float32"][0].update(rows=0),
            r"matmul_rates.float32\[0\]: .*rows must be at least 1",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_file_field_and_knob(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    tree = profile().to_json()
    change(tree["devices"][0])

    with pytest.raises(ValueError, match=message) as refused:
        Profile.from_json(tree, "some/profile.json")
    assert str(refused.value).startswith("some/profile.json: devices[0]")
    assert str(refused.value).endswith("measure again with `motley profile --refresh`")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "the profile is list, not keys"),
        ({}, r"format \(None\) must be 1"),
        ({"format": 1, "devices": [], "checkpoint": "m", "fingerprint": "f"}, "there are 0"),
        ({"format": 1, "devices": []}, "'checkpoint' and 'fingerprint'; a key is missing"),
        ({"format": 1, "deivces": []}, "devices is NoneType, not a list"),
    ],
)
def test_a_tree_that_is_no_profile_is_refused(tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile.from_json(tree, "p.json")


def test_two_devices_of_one_id_and_a_link_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="two of cpu0, cpu0 have one id"):
        profile(device(), device())
    with pytest.raises(ValueError, match=r"rtt_s \(nan\) must be 0 or more"):
        link(rtt_s=math.nan)
    with pytest.raises(ValueError, match=r"bandwidth_bytes_per_s \(0\) must be above 0"):
        link(bandwidth_bytes_per_s=0)
    with pytest.raises(ValueError, match=r"median_error \(nan\) must be 0 or more"):
        Estimate(samples=1, known_devices=3, rank=0, median_error=math.nan, p90_error=1.0)


# --- files ------------------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(home: Path) -> None:
    path = home / "profiles" / "p.json"

    write_profile(path, profile())
    write_profile(path, profile(device("other")))

    assert read_profile(path, FINGERPRINT).devices[0].id == "other"
    assert [entry.name for entry in path.parent.iterdir()] == ["p.json"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_of_another_checkpoint_is_refused(home: Path) -> None:
    write_profile(home / "p.json", profile())

    with pytest.raises(ConfigError, match=rf"is a profile of m \({FINGERPRINT}\), not of this"):
        read_profile(home / "p.json", "another")


def test_a_truncated_missing_or_unwritable_file_is_told_by_name(home: Path) -> None:
    path = home / "p.json"
    write_profile(path, profile())
    path.write_text(path.read_text()[:-40], encoding="utf-8")

    with pytest.raises(ConfigError, match=r"p\.json: is damaged, no JSON .*--refresh"):
        read_profile(path, FINGERPRINT)
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        read_profile(home / "none.json", FINGERPRINT)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(path / "below-a-file.json", profile())


def test_nan_in_a_file_is_refused(home: Path) -> None:
    path = home / "p.json"
    write_profile(path, profile())
    path.write_text(path.read_text().replace("100000000000.0", "NaN", 1), encoding="utf-8")

    with pytest.raises(ConfigError, match=r"p\.json: devices\[0\]: flops_per_s: nan"):
        read_profile(path, FINGERPRINT)


def test_a_fingerprint_is_of_the_configuration_and_not_of_its_history() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2}

    assert fingerprint(shape) == fingerprint(shape | {"transformers_version": "9"})
    assert fingerprint(shape) != fingerprint(shape | {"hidden_size": 65})


# --- the cache --------------------------------------------------------------------------------


def test_what_is_stored_is_found_by_the_device_alone() -> None:
    cache = ProfileCache(FINGERPRINT)
    cache.store(device())

    assert cache.find(DeviceKey.of(device("another id", node="10.0.0.1"))) == device()
    for change in ({"name": "Other"}, {"dtype": "bfloat16"}, {"threads": 2}, {"index": 1}):
        assert cache.find(DeviceKey.of(device(**change))) is None
    assert ProfileCache("another").devices() == []


def test_measurements_of_other_versions_are_not_used() -> None:
    cache = ProfileCache(FINGERPRINT)
    cache.store(device(versions=own_versions() | {"torch": "0.1"}))

    assert cache.devices() == []
    assert load_cached(config(), FINGERPRINT) is None


def test_a_configuration_is_found_in_the_cache_under_its_own_names() -> None:
    cache = ProfileCache(FINGERPRINT)
    cache.store(device("measured as"))
    cache.store_link(link("a", "b"))
    two = [{"id": "one", "kind": "cpu"}, {"id": "two", "kind": "cpu", "node": "10.0.0.1"}]

    found = load_cached(config(devices=two), FINGERPRINT)

    assert found is not None
    assert [(d.id, d.node) for d in found.devices] == [("one", "local"), ("two", "10.0.0.1")]
    assert [(x.source_node, x.target_node) for x in found.links] == [("local", "local")]


def test_shares_of_a_processor_share_its_memory() -> None:
    ProfileCache(FINGERPRINT).store(device())
    two = [{"id": "one", "kind": "cpu"}, {"id": "two", "kind": "cpu"}]

    found = load_cached(config(devices=two), FINGERPRINT)

    assert found is not None
    assert [d.memory_bytes for d in found.devices] == [2**32, 2**32]


def test_cards_of_a_node_are_taken_in_their_order() -> None:
    cache = ProfileCache(FINGERPRINT)
    for index in (3, 1):
        cache.store(
            device(kind="cuda", index=index, name=f"card {index}", dtype="bfloat16", threads=0)
        )
    specs = [{"id": f"g{i}", "kind": "cuda"} for i in range(2)]

    found = load_cached(config(devices=specs), FINGERPRINT)

    assert found is not None
    assert [d.name for d in found.devices] == ["card 1", "card 3"]
    assert load_cached(config(devices=[*specs, {"id": "g2", "kind": "cuda"}]), FINGERPRINT) is None


def test_without_configured_devices_this_machines_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_cached(config(), FINGERPRINT) is None
    ProfileCache(FINGERPRINT).store(device())
    found = load_cached(config(), FINGERPRINT)

    assert found is not None
    assert [d.id for d in found.devices] == ["local-cpu"]
    # A cluster's nodes are known to Ray alone.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert load_cached(config(), FINGERPRINT) is None


def test_a_damaged_cache_is_an_error_that_names_the_file(home: Path) -> None:
    ProfileCache(FINGERPRINT).store(device())
    [path] = (home / "home" / "profiles" / FINGERPRINT).iterdir()
    path.write_text('{"id": ', encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"{path.name}: is damaged"):
        load_cached(config(), FINGERPRINT)


def test_a_cached_link_that_cannot_be_is_an_error_that_names_the_file(home: Path) -> None:
    ProfileCache(FINGERPRINT).store_link(link())
    [path] = (home / "home" / "profiles" / "links").iterdir()
    path.write_text(path.read_text().replace("0.0001", "NaN"), encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"{path.name}: rtt_s: nan must be finite; measure"):
        ProfileCache(FINGERPRINT).links()


def test_the_latest_measurement_of_a_link_counts(home: Path) -> None:
    cache = ProfileCache(FINGERPRINT)
    cache.store_link(link(source_names=("old", HERE)))
    [old] = (home / "home" / "profiles" / "links").iterdir()
    os.utime(old, (1, 1))
    cache.store_link(link(rtt_s=5e-5))

    assert [found.rtt_s for found in cache.links()] == [5e-5, 1e-4]


def test_reading_profiles_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cluster.profile\n"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")


# --- to plan with -----------------------------------------------------------------------------


def test_declared_figures_win_and_void_what_they_contradict() -> None:
    def planned(**declared: object) -> Any:
        spec = {"id": "cpu0", "kind": "cpu"} | declared
        return measured_devices(profile(), config(devices=[spec]), MODEL)[0]

    memory = planned(memory_bytes="1 GiB")
    assert memory.memory_bytes == 2**30
    assert len(memory.matmul_rates) == 2
    assert len(memory.measured_layers) == 2

    bandwidth = planned(memory_bytes_per_s=5e9)
    assert len(bandwidth.matmul_rates) == 2
    assert bandwidth.measured_layers == ()

    rate = planned(flops_per_s=5e9)
    assert (rate.flops_per_s, rate.matmul_rates, rate.measured_layers) == (5e9, (), ())

    whole = planned(flops_per_s=1e9, memory_bytes_per_s=1e9, memory_bytes=1, active_power_w=3)
    assert (whole.memory_bytes, whole.active_power_w, whole.matmul_rates) == (1, 3, ())


def test_a_device_that_is_not_in_the_profile_is_refused() -> None:
    for spec in ({"id": "x", "kind": "cpu"}, {"id": "cpu0", "kind": "cuda"}):
        with pytest.raises(ConfigError, match=r"is not in the profile of cpu0 \(cpu on local\)"):
            measured_devices(profile(), config(devices=[spec]), MODEL)
    with pytest.raises(ConfigError, match=r"in float32 and engine\.dtype asks for bfloat16"):
        measured_devices(profile(), config(engine={"dtype": "bfloat16"}), MODEL)


def test_measured_links_join_the_topology_unless_declared() -> None:
    devices = (device(), device("b", node="far"))
    measured = profile(
        *devices,
        links=(link(), link("local", "far"), link("far", "local"), link("far", "elsewhere")),
    )
    specs = [{"id": "cpu0", "kind": "cpu"}, {"id": "b", "kind": "cpu", "node": "far"}]
    declared = {"source_node": "far", "target_node": "local", "bandwidth_bytes_per_s": 1e6}

    plain = measured_topology(measured, config(devices=specs), MODEL)
    told = measured_topology(measured, config(devices=specs, links=[declared]), MODEL)

    assert plain.link("local", "far").bandwidth_bytes_per_s == 2e9
    assert plain.link("local", "far").latency_s == 5e-5
    assert len(plain.links) == 3
    # One declared direction stands for both.
    assert told.link("local", "far").bandwidth_bytes_per_s == 1e6
    assert told.link("local", "local").bandwidth_bytes_per_s == 2e9


def test_measured_links_join_declared_devices_too(home: Path) -> None:
    figures = {"flops_per_s": 1e9, "memory_bytes_per_s": 1e9, "memory_bytes": 2**30}
    specs = [
        {"id": id_, "kind": "paced", "node": node} | figures
        for id_, node in (("a", "local"), ("b", "far"), ("c", "other"))
    ]
    declared = {"source_node": "far", "target_node": "other", "bandwidth_bytes_per_s": 1e6}
    cache = ProfileCache(FINGERPRINT)
    cache.store_link(link(bandwidth_bytes_per_s=3e9))
    for target in ("far", "other"):
        cache.store_link(link(target_names=(target,)))
    cache.store_link(link(source_names=("far",), target_names=("other",)))

    found = known_topology(config(devices=specs, links=[declared]))

    assert found.link("local", "far").bandwidth_bytes_per_s == 2e9
    assert found.link("far", "other").bandwidth_bytes_per_s == 1e6
    assert found.link("local", "local") == Topology(devices=found.devices).link("local", "local")


# --- estimated --------------------------------------------------------------------------------


def scaled(factor: float) -> DeviceProfile:
    def slower(sample: LayerSample) -> LayerSample:
        seconds = {
            name: getattr(sample, name) * factor
            for name in ("forward_s", "recompute_s", "backward_s")
            if getattr(sample, name) is not None
        }
        return replace(sample, **seconds)

    tables = tuple(
        replace(table, samples=tuple(slower(sample) for sample in table.samples))
        for table in device().layers
    )
    return device(name=f"{factor} times", layers=tables)


def test_tables_are_completed_from_one_sample() -> None:
    known = {str(factor): scaled(factor) for factor in (1.0, 2.0, 3.0, 5.0)}
    truth = scaled(40.0)
    model = fit_layer_model(known, num_samples=1)
    [chosen] = model.chosen
    sampled = [
        replace(table, samples=tuple(s for s in table.samples if s.tokens == chosen.tokens))
        for table in truth.layers
        if table.name == chosen.table
    ]

    tables, estimate = complete_tables(model, list(known.values()), sampled)

    assert estimate.known_devices == 4
    assert estimate.median_error == pytest.approx(0.0, abs=1e-9)
    assert [table.name for table in tables] == ["layer 0", "head"]
    assert probe_seconds(tables) == pytest.approx(probe_seconds(truth.layers))
    assert tables[0].samples[1].activation_bytes == 1_000_000
    marked = device(source="estimated", estimate=estimate, layers=tables)
    assert device_from_json(json.loads(json.dumps(plain_json(marked)))) == marked
