"""`motley plan` as its users run it: declared topologies, no Ray, no torch, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from actors.engine.checkpoint import read_configuration
from cluster.cli import app
from cluster.profile import fingerprint
from placement.front import StageFront
from placement.shards import ShardsPlan
from placement.stages import StagesPlan
from placement.train import TrainPlan

TOPOLOGIES = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "topologies"
GALLERY = sorted(TOPOLOGIES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    return tmp_path


def plan(config: Path | str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--config", str(config), *flags])


def plan_json(config: Path, *flags: str) -> dict[str, Any]:
    result = plan(config, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def gallery(name: str) -> Path:
    return TOPOLOGIES / f"{name}.yaml"


def topology(folder: Path, *, model: str = "qwen3-1.7b", **changes: str) -> Path:
    """Two CPU boxes that each hold the model; `changes` replaces or adds lines."""
    lines = {
        "model": str(TOPOLOGIES.parent / "models" / model),
        "devices": "[{id: a, node: a, kind: cpu, flops_per_s: 1e12, memory_bytes_per_s: 1e11,"
        " memory_bytes: 64 GiB}, {id: b, node: b, kind: cpu, flops_per_s: 1e12,"
        " memory_bytes_per_s: 1e11, memory_bytes: 64 GiB}]",
    } | changes
    path = folder / "topology.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in lines.items()), "utf-8")
    return path


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_every_topology_of_the_gallery_is_planned_within_its_memory(path: Path) -> None:
    value = plan_json(path)

    chosen = StagesPlan.from_json(value["plan"])
    assert all(stage.need_bytes <= stage.memory_cap_bytes for stage in chosen.stages)
    assert chosen.stages[0].first_layer == 0
    assert chosen.objective_lower_bound <= chosen.objective_value
    front = StageFront.from_json(value["front"])
    assert min(each.latency_s for each in front.plans) <= chosen.latency_s
    assert value["verdict"].startswith(("split", "do not split"))


def test_people_are_shown_the_cut_the_bound_the_front_and_who_is_left_out() -> None:
    shown = plan(gallery("raspberry-pis")).stdout

    assert "planned for throughput, devices in any order" in shown
    assert "gap 0.0%; no other cut is better" in shown
    assert "J a token" in shown
    assert "plans that no other beats (exact)" in shown
    assert "left out: pi1, pi2, pi3 - " in shown
    assert "lanes give" in shown


def test_a_flag_overrides_the_objective_of_the_settings() -> None:
    by_objective = {
        objective: StagesPlan.from_json(
            plan_json(gallery("raspberry-pis"), "--objective", objective)["plan"]
        )
        for objective in ("throughput", "latency", "energy")
    }

    assert min(p.latency_s for p in by_objective.values()) == by_objective["latency"].latency_s
    assert min(p.period_s for p in by_objective.values()) == by_objective["throughput"].period_s
    joules = {name: p.energy_j_per_token or 0.0 for name, p in by_objective.items()}
    assert min(joules, key=lambda name: joules[name]) == "energy"


def test_one_device_that_wins_is_told_not_to_split(home: Path) -> None:
    result = plan(topology(home, plan="{objective: latency, lanes: 1, sequences_per_lane: 1}"))

    assert "do not split: a holds qwen3-1.7b alone" in result.stdout
    assert "1 stages" in result.stdout


def test_the_front_is_drawn_and_the_schedule_traced(home: Path) -> None:
    plot, trace = home / "front.svg", home / "trace.json"

    result = plan(gallery("mixed-gpus"), "--plot", str(plot), "--trace", str(trace))

    assert result.exit_code == 0
    assert f"wrote {plot}" in result.stderr
    drawing = ElementTree.parse(plot).getroot()
    assert drawing.tag.endswith("svg")
    texts = {element.text for element in drawing.iter() if element.tag.endswith("text")}
    assert "gpt-oss-20b: plans that no other plan beats" in texts
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"rtx4090", "rtx3060"} <= tracks
    first = plot.read_bytes()
    plan(gallery("mixed-gpus"), "--plot", str(plot))
    assert plot.read_bytes() == first


def test_a_picture_of_an_unknown_kind_is_a_usage_error(home: Path) -> None:
    result = plan(gallery("mixed-gpus"), "--plot", str(home / "front.bmpx"))

    assert result.exit_code == 2
    assert "--plot" in result.stderr


def test_experts_are_spread_over_all_devices_on_request() -> None:
    value = plan_json(gallery("mixed-gpus"), "--shard-experts")

    shards = ShardsPlan.from_json(value["shards"])
    assert shards.experts.device_ids == ("rtx3060", "rtx3090", "rtx4060ti", "rtx4090")
    assert shards.experts.gap < 0.03
    assert plan_json(gallery("mixed-gpus"))["shards"] is None
    refused = plan(gallery("raspberry-pis"), "--shard-experts")
    assert refused.exit_code == 2
    assert "qwen3-1.7b has no routed experts" in refused.stderr


def test_training_is_planned_over_the_devices_as_a_pool_on_request() -> None:
    result = plan(gallery("four-4090"), "--training")

    assert "training: " in result.stdout
    assert "s a round (bound " in result.stdout
    training = TrainPlan.from_json(plan_json(gallery("four-4090"), "--training")["training"])
    assert training.gap < 0.05
    assert all(share.peak_bytes <= share.memory_bytes for share in training.devices)


def test_with_training_the_trace_is_that_of_the_slots(home: Path) -> None:
    trace = home / "trace.json"

    plan(gallery("mixed-gpus"), "--training", "--trace", str(trace))

    events = json.loads(trace.read_text())["traceEvents"]
    assert {"forward", "fused", "backward"} == {e["cat"] for e in events if e["ph"] == "X"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"plan": "{objective: energy}"}, 2, "active_power_w"),
        ({"plan": "{objective: speed}"}, 2, "plan.objective"),
        ({"plan": "{headroom_fraction: 0.05}"}, 2, "greater than or equal to 0.1"),
        ({"model": str(TOPOLOGIES.parent / "models" / "qwen3-235b-a22b")}, 3, "94 layers need"),
        ({"devices": "[{id: a, kind: cpu, flops_per_s: 0}]"}, 2, "must be above 0"),
        ({"devices": "[{id: a, kind: cpu, flops_per_s: -1 GFLOP/s}]"}, 2, "is not a speed"),
        ({"devices": "[{id: a, kind: cpu, memory_bytes: .nan}]"}, 2, "memory_bytes"),
        ({"devices": "[{id: a, kind: cpu}, {id: a, kind: cpu}]"}, 2, "2 are called a"),
        ({"default_link": "{latency_s: -1}"}, 2, "default_link.latency_s"),
        ({"links": "[{source_node: a, target_node: c, bandwidth_bytes_per_s: 1}]"}, 2, "node c"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_fact_and_the_knob(
    home: Path, changes: dict[str, str], code: int, message: str
) -> None:
    result = plan(topology(home, **changes))

    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_nodes_that_cannot_reach_each_other_share_no_model(home: Path) -> None:
    small = (
        "[{id: a, node: a, kind: cpu, flops_per_s: 1e12, memory_bytes_per_s: 1e11,"
        " memory_bytes: 6 GiB}, {id: b, node: b, kind: cpu, flops_per_s: 1e12,"
        " memory_bytes_per_s: 1e11, memory_bytes: 6 GiB}]"
    )
    joined = topology(home, devices=small, plan="{context_tokens: 64}")
    assert plan(joined).exit_code == 0

    apart = topology(home, devices=small, plan="{context_tokens: 64}", default_link="null")
    result = plan(apart)

    assert result.exit_code == 3
    assert "link" in result.stderr


def test_a_model_without_weights_is_planned_but_not_served(home: Path) -> None:
    result = CliRunner().invoke(app, ["up", "--config", str(topology(home))])

    assert result.exit_code == 1
    assert "no *.safetensors" in result.stderr


def profile_of(
    home: Path, *devices: dict[str, Any], links: list[dict[str, Any]] | None = None
) -> Path:
    model = str(TOPOLOGIES.parent / "models" / "qwen3-1.7b")
    path = home / "profile.json"
    value = {
        "format": 1,
        "checkpoint": "qwen3-1.7b",
        "fingerprint": fingerprint(read_configuration(model)),
        "devices": list(devices),
        "links": links or [],
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


CARD = {
    "id": "g", "node": "a", "kind": "cuda", "source": "measured", "dtype": "bfloat16",
    "flops_per_s": 1e13, "memory_bytes_per_s": 1e11, "memory_bytes": 24 * 2**30,
}  # fmt: skip
CPU = CARD | {"id": "c", "kind": "cpu", "dtype": "float32", "threads": 1}


def test_the_planned_devices_and_not_the_profiled_ones_decide_the_width_of_a_weight(
    home: Path,
) -> None:
    only_card = "[{id: g, node: a, kind: cuda}]"
    mixed = only_card[:-1] + (
        ", {id: c, node: a, kind: cpu, flops_per_s: 1e12, memory_bytes_per_s: 1e11,"
        " memory_bytes: 64 GiB}]"
    )

    def weights(devices: str, *profiled: dict[str, Any]) -> int:
        file = profile_of(home, *profiled)
        value = plan_json(topology(home, devices=devices), "--profile", str(file))
        return sum(stage["weight_bytes"] for stage in value["plan"]["stages"])

    assert weights(only_card, CARD) == weights(only_card, CARD, CPU)
    assert weights(mixed, CARD) == weights(mixed, CARD, CPU) > 1.9 * weights(only_card, CARD)


def test_a_damaged_profile_is_refused_by_name_and_not_by_a_traceback(home: Path) -> None:
    link = {
        "source_node": "a", "target_node": "a", "source": "measured", "rtt_s": 1e-4,
        "bandwidth_bytes_per_s": 1e9,
    }  # fmt: skip
    path = topology(home, devices="[{id: g, node: a, kind: cuda}]")
    result = plan(path, "--profile", str(profile_of(home, CARD, links=[link, link])))
    assert result.exit_code == 2
    assert "two lead from a to a" in result.stderr
    result = plan(path, "--profile", str(profile_of(home, CARD | {"flops_per_s": 10**400})))
    assert result.exit_code == 2
    assert "must be finite" in result.stderr
    deep = home / "deep.json"
    deep.write_text("[" * 200_000, encoding="utf-8")
    result = plan(path, "--profile", str(deep))
    assert result.exit_code == 2
    assert "deep.json: is damaged" in result.stderr


def test_a_pool_that_cannot_be_trained_says_that_training_is_what_fails(home: Path) -> None:
    apart = topology(home, default_link="null")

    assert plan(apart).exit_code == 0
    result = plan(apart, "--training", "--plot", str(home / "front.svg"))

    assert result.exit_code == 3
    assert "training: no link leads from a to b" in result.stderr
    assert not (home / "front.svg").exists()


def test_one_wrong_device_is_one_error(home: Path) -> None:
    result = plan(topology(home, devices="[{id: a, kind: cpu, flops_per_s: .nan}]"))

    assert result.exit_code == 2
    assert "at least 1 item" not in result.stderr
