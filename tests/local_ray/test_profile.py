"""`motley profile` on a live Ray node: probes, links, the cache, and what `up` takes from it."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.engine.checkpoint import Checkpoint
from actors.hosting import Host
from actors.link_timer import ProbeError
from cluster.cli import app
from cluster.commands.profile import remarks
from cluster.config import ConfigError, MotleyConfig
from cluster.inventory import find_hosts, find_topology
from cluster.probes import Probes
from cluster.profile import load_cached, measured_devices, measured_topology
from cluster.profile_cache import ProfileCache, fingerprint
from cluster.profiling import (
    Measuring,
    ProfileEvent,
    ProfileOptions,
    Told,
    measure_profile,
)
from placement.costs import layer_step_s
from placement.profiles import DeviceProfile, Estimate, Profile

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "deploy" / "checkpoints" / "tiny-qwen3")
HERE = socket.gethostname()
QUICK = ProfileOptions(tokens=(1, 64), quick=True, timeout_s=60.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the module: measuring is what takes time."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("MOTLEY_HOME", str(path))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield path


def config(*devices: dict[str, Any], **changes: Any) -> MotleyConfig:
    """Two shares of this machine's processor, on two names of this node."""
    specs = devices or ({"id": "near", "kind": "cpu"}, {"id": "far", "kind": "cpu", "node": HERE})
    return MotleyConfig.model_validate({"model": MODEL, "devices": specs} | changes)


def measure(
    settings: MotleyConfig, options: ProfileOptions = QUICK
) -> tuple[Profile, list[ProfileEvent]]:
    events: list[ProfileEvent] = []
    checkpoint = Checkpoint.open(settings.model)
    return measure_profile(settings, checkpoint, options, events.append), events


@pytest.fixture(scope="module")
def measured(ray_session: None, home: Path) -> Profile:
    """The first measurement, of an empty cache."""
    found, events = measure(config())
    steps = [event for event in events if isinstance(event, Measuring)]
    # One device: rates, two kinds of layer at two token counts; four directions.
    assert [step.what for step in steps[:3]] == [
        "near: rates",
        "near: layer 0 at 1 tokens",
        "near: layer 0 at 64 tokens",
    ]
    assert [step.done for step in steps] == list(range(9))
    assert {step.total for step in steps} == {9}
    return found


def test_devices_and_links_are_measured_both_ways(measured: Profile) -> None:
    assert [(d.id, d.node, d.source) for d in measured.devices] == [
        ("near", "local", "measured"),
        ("far", HERE, "measured"),
    ]
    near, far = measured.devices
    assert near.layers == far.layers
    assert [table.name for table in near.layers] == ["layer 0", "head"]
    assert near.layers[0].layers == tuple(range(8))
    assert near.layers[0].samples[1].backward_s is not None
    assert near.host == HERE
    assert near.name

    ends = [(link.source_node, link.target_node) for link in measured.links]
    assert ends == [("local", "local"), ("local", HERE), (HERE, "local"), (HERE, HERE)]
    for link in measured.links:
        assert 0 < link.rtt_s < 1
        assert math.isfinite(link.bandwidth_bytes_per_s)


def test_the_second_time_nothing_is_measured(measured: Profile) -> None:
    again, events = measure(config())

    assert again == measured
    [told] = events
    assert isinstance(told, Told)
    assert "nothing to measure" in told.text


def test_only_missing_token_counts_are_measured(measured: Profile) -> None:
    more, events = measure(config(), replace(QUICK, tokens=(1, 8, 64)))

    steps = [event.what for event in events if isinstance(event, Measuring)]
    assert [step for step in steps if step.startswith("near")] == [
        "near: layer 0 at 8 tokens",
        "near: head at 8 tokens",
    ]
    before, after = measured.devices[0].layers[0].samples, more.devices[0].layers[0].samples
    assert [sample.tokens for sample in after] == [1, 8, 64]
    assert (after[0], after[2]) == before


def test_plans_read_the_profile_without_ray(measured: Profile) -> None:
    checkpoint = Checkpoint.open(MODEL)
    model = checkpoint.profile(dtype_bytes=4)
    cached = load_cached(config(), fingerprint(checkpoint.config))

    assert cached is not None
    device = measured_devices(cached, config(), model)[0]
    sample = cached.devices[0].layers[0].samples[0]
    predicted_s = layer_step_s(device, model.layers[0], sample.tokens, sample.context_tokens)
    assert predicted_s == pytest.approx(sample.forward_s)
    topology = measured_topology(cached, config(), model)
    assert topology.link("local", HERE).latency_s == cached.links[1].latency_s


def test_up_uses_what_is_cached_and_measures_the_rest_shortly(
    measured: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = find_topology(config(), find_hosts()).devices
    assert [len(device.measured_layers) for device in known] == [2, 2]
    assert known[0].flops_per_s == measured.devices[0].flops_per_s

    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    declared = {"id": "far", "kind": "cpu", "flops_per_s": 1, "memory_bytes_per_s": 1,
                "memory_bytes": 1}  # fmt: skip
    found = find_topology(config({"id": "near", "kind": "cpu"}, declared), find_hosts()).devices
    assert [rate.rows for rate in found[0].matmul_rates] == [1, 16, 256]
    assert found[0].measured_layers == ()
    assert found[0].memory_bytes > 2**28
    assert (found[1].flops_per_s, found[1].matmul_rates) == (1, ())
    assert not (tmp_path / "profiles").exists()


def test_declared_devices_and_links_are_not_measured(ray_session: None, home: Path) -> None:
    spec = {"id": "x", "kind": "paced", "flops_per_s": 1e9, "memory_bytes_per_s": 1e9,
            "memory_bytes": 2**30}  # fmt: skip
    link = {"source_node": "local", "target_node": "local", "bandwidth_bytes_per_s": 1e6}

    found, events = measure(config(spec, links=[link]))

    assert not any(isinstance(event, Measuring) for event in events)
    assert (found.devices[0].source, found.devices[0].flops_per_s) == ("declared", 1e9)
    assert (found.links[0].source, found.links[0].bandwidth_bytes_per_s) == ("declared", 1e6)


def known_devices(like: DeviceProfile, count: int) -> list[DeviceProfile]:
    """Machines that differ from this one in speed alone."""
    devices = []
    for index in range(count):
        factor = 0.5 * (index + 1)
        tables = tuple(
            replace(
                table,
                samples=tuple(
                    replace(
                        sample,
                        forward_s=sample.forward_s * factor,
                        recompute_s=sample.recompute_s and sample.recompute_s * factor,
                        backward_s=sample.backward_s and sample.backward_s * factor,
                    )
                    for sample in table.samples
                ),
            )
            for table in like.layers
        )
        devices.append(
            replace(like, host=f"other{index}", node_names=(f"other{index}",), layers=tables)
        )
    return devices


def test_few_samples_are_completed_once_enough_devices_are_known(
    measured: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    cache = ProfileCache(measured.fingerprint)
    others = known_devices(measured.devices[0], 4)
    for device in others[:2]:
        cache.store(device)
    few = replace(QUICK, samples=1)
    link = {"source_node": "local", "target_node": "local", "bandwidth_bytes_per_s": 1e9}
    alone = config({"id": "near", "kind": "cpu"}, links=[link])

    whole, events = measure(alone, few)
    assert whole.devices[0].source == "measured"
    assert any(
        isinstance(event, Told) and "2 devices are known and 3 are needed" in event.text
        for event in events
    )

    for device in others[2:]:
        cache.store(device)
    estimated, events = measure(alone, replace(few, refresh=True))
    [device] = estimated.devices
    assert device.source == "estimated"
    assert device.estimate is not None
    assert device.estimate.known_devices == 4
    # They differ in speed alone, so what is estimated is sure.
    assert device.estimate.p90_error < 1e-6
    steps = [event.what for event in events if isinstance(event, Measuring)]
    assert len([step for step in steps if " at " in step]) == 1
    assert [[s.tokens for s in table.samples] for table in device.layers] == [[1, 64], [1, 64]]

    # An estimate is good enough while estimates are asked for, and no longer.
    assert measure(alone, few)[0].devices[0].source == "estimated"
    assert measure(alone, QUICK)[0].devices[0].source == "measured"


def test_a_measurement_that_takes_too_long_is_an_error(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))

    with pytest.raises(ProbeError, match=r"device near on node local: .* no answer .*--timeout"):
        measure(config(), replace(QUICK, timeout_s=0.01))
    assert not (tmp_path / "profiles").exists()


def test_a_node_that_is_gone_is_an_error(ray_session: None) -> None:
    gone = Host(ray_node_id="ab" * 28, address="127.0.0.1")
    settings = config()
    hosts = find_hosts() | {"gone": gone}
    specs = config({"id": "lost", "kind": "cpu", "node": "gone"}).devices
    assert specs is not None

    with (
        Probes(specs, hosts, settings.engine, 20.0) as probes,
        pytest.raises(ProbeError, match=r"device lost on node gone: .*lost"),
    ):
        probes.call(specs[0], "being asked for its name", "identity")
    with pytest.raises(ConfigError, match="no live Ray node is called nowhere"):
        find_topology(config({"id": "x", "kind": "cpu", "node": "nowhere"}), find_hosts())


def test_token_counts_beyond_the_checkpoint_are_refused_before_anything_starts() -> None:
    for tokens in ((0,), (5000,), ()):
        with pytest.raises(ConfigError, match=r"--tokens: .* has 1 to 2048 rows"):
            measure(config(), replace(QUICK, tokens=tokens))


def test_the_command_writes_tables_json_and_a_file(measured: Profile, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {MODEL}\ndevices:\n  - {{id: near, kind: cpu}}\n"
        f"  - {{id: far, kind: cpu, node: '{HERE}'}}\n",
        encoding="utf-8",
    )
    arguments = ["profile", "--config", str(file), "--tokens", "1,64"]

    shown = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "p.json")])
    machine = CliRunner().invoke(app, [*arguments, "--json"])

    assert shown.exit_code == machine.exit_code == 0
    assert "layers 0-7" in shown.stdout
    assert "times the plain roofline" in shown.stdout
    written = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert json.loads(machine.stdout) == written
    assert Profile.from_json(written, "p.json").devices[0].id == "near"


def test_an_estimate_is_shown_with_its_error(measured: Profile) -> None:
    estimate = Estimate(samples=4, known_devices=5, rank=2, median_error=0.06, p90_error=0.21)
    device = replace(measured.devices[0], source="estimated", estimate=estimate)
    model = Checkpoint.open(MODEL).profile(dtype_bytes=4)

    told = [str(line) for line in remarks([device], model)]

    assert "4 figures were measured, the others estimated from 5 known devices" in told[1]
    assert "off by 6% in the median and 21% at the 90th percentile" in told[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tokens", "1,x"], 2, "'1,x' is no list of counts; write 1,8,32"),
        (["--tokens", "9999"], 2, "a step of this checkpoint has 1 to 2048 rows"),
        (["--model", "/nowhere"], 2, "no folder /nowhere"),
        (["--samples", "0"], 2, ""),
    ],
)
def test_the_command_refuses_what_cannot_be(
    home: Path, arguments: list[str], code: int, message: str
) -> None:
    result = CliRunner().invoke(app, ["profile", *arguments])

    assert result.exit_code == code
    assert message in result.stderr
