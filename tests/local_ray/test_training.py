"""Training over real device actors and weight hosts, held against plain autograd and AdamW."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from leftovers import actor_processes
from plain_training import plain_losses, plain_model
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from cluster.config import ConfigError, MotleyConfig
from cluster.training import hosts
from cluster.training.errors import TrainingError
from cluster.training.events import (
    CheckpointSaved,
    DeviceJoined,
    DeviceLost,
    Evaluated,
    HostsLost,
    StepDone,
    TrainingEvent,
)
from cluster.training.job import open_job
from cluster.training.run import run

TEXT = "\n".join(f"line {i}: the quick brown fox counts to {i * i} and rests" for i in range(400))
Events = list[TrainingEvent]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(8):
        (folder / f"{number}.txt").write_text(TEXT[number * 900 : number * 900 + 2500])
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """A random mixture of experts with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("moe")
    make_model("qwen3_moe", vocab_size=2048, num_hidden_layers=4).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoints / "tiny-qwen3" / name).read_bytes())
    return folder


@pytest.fixture
def make_config(data: Path, checkpoints: Path, tmp_path: Path) -> Callable[..., MotleyConfig]:
    def make(
        num_devices: int,
        *,
        model: Path | None = None,
        speeds: Sequence[float] = (),
        **training: Any,
    ) -> MotleyConfig:
        return MotleyConfig.model_validate(
            {
                "model": str(model or checkpoints / "tiny-qwen3"),
                "devices": [
                    {
                        "id": f"cpu{i}",
                        "kind": "cpu",
                        "flops_per_s": 1e10 * (speeds[i] if speeds else 1.0),
                        "memory_bytes_per_s": 1e10,
                        "memory_bytes": 2**30,
                    }
                    for i in range(num_devices)
                ],
                "training": {
                    "data": {"train": [str(data)], "held_out_fraction": 0.2},
                    "output": str(tmp_path / "run"),
                    "steps": 6,
                    "sequence_tokens": 48,
                    "micro_batches": 3,
                    "rounds_per_step": 2,
                    "checkpoint_every_steps": 100,
                }
                | training,
            }
        )

    return make


def train(
    config: MotleyConfig,
    *,
    resume: bool = False,
    watch: Callable[[TrainingEvent], None] = lambda _: None,
) -> Events:
    events: Events = []

    def on_event(event: TrainingEvent) -> None:
        events.append(event)
        watch(event)

    run(config, on_event, resume=resume)
    return events


def losses(events: Events) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def of_kind(events: Events, kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def unbroken(config: MotleyConfig) -> MotleyConfig:
    """The same run in another folder."""
    assert config.training.output is not None
    output = config.training.output.with_name("unbroken")
    return config.model_copy(
        update={"training": config.training.model_copy(update={"output": output})}
    )


def expected_losses(config: MotleyConfig, *, drains: Sequence[int] = ()) -> list[float]:
    """What plain autograd and AdamW give, router loss included."""
    job = open_job(unbroken(config), resume=False)
    return plain_losses(job, plain_model(Path(config.model)), config.training.steps, drains=drains)


def total_losses(events: Events, router_coefficient: float = 0.0) -> list[float]:
    return [
        event.loss + router_coefficient * (event.router_loss or 0.0)
        for event in of_kind(events, StepDone)
    ]


def close(actual: Sequence[float], expected: Sequence[float], tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )


pytestmark = pytest.mark.usefixtures("ray_session")
CUT = {"forward": [3, 3], "fused": 2, "backward": [2, 4], "grain": "stage"}


@pytest.mark.slow
def test_fifty_synchronous_steps_are_those_of_plain_adamw(
    make_config: Callable[..., MotleyConfig],
) -> None:
    config = make_config(3, steps=50, cut=CUT)
    close(total_losses(train(config)), expected_losses(config))


def test_asynchronous_steps_are_one_step_old_and_no_older(
    make_config: Callable[..., MotleyConfig],
) -> None:
    config = make_config(
        2,
        steps=12,
        checkpoint_every_steps=5,
        cut=CUT | {"grain": "layer"},
        optimizer={"asynchronous": True, "learning_rate": 1e-3},
    )
    close(total_losses(train(config)), expected_losses(config, drains=(5, 10)))


def test_experts_train_with_their_router_loss_alike_on_one_and_on_five_devices(
    make_config: Callable[..., MotleyConfig], moe: Path
) -> None:
    cut = {"forward": [1, 2], "fused": 1, "backward": [2, 1], "grain": "stage"}
    config = make_config(5, model=moe, steps=4, router_loss_coefficient=0.02, cut=cut)
    on_five = total_losses(train(config), 0.02)
    close(on_five, expected_losses(config))
    alone = config.model_copy(update={"devices": config.devices[:1] if config.devices else None})
    assert total_losses(train(unbroken(alone)), 0.02) == on_five


def test_a_killed_device_costs_its_slots_and_comes_back(
    make_config: Callable[..., MotleyConfig],
) -> None:
    config = make_config(3, steps=30, cut=CUT)

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(min(actor_processes(b"ray::DeviceWorker")), signal.SIGKILL)

    events = train(config, watch=watch)
    assert [event.step for event in of_kind(events, StepDone)] == list(range(1, 31))
    assert of_kind(events, DeviceLost)
    assert of_kind(events, DeviceJoined)
    assert not of_kind(events, HostsLost)
    assert losses(events) == losses(train(unbroken(config)))


class Stop(Exception):
    """Ends a run from a test's own watch."""


@pytest.fixture
def start_node() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start Ray nodes beside the session's own."""
    nodes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--node-name=second", "--num-cpus=2"]
        command += [f"--address={ray.get_runtime_context().gcs_address}"]
        command += [f"--object-store-memory={100 * 2**20}"]
        nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        return nodes[-1]

    yield start
    for node in nodes:
        node.terminate()
        node.wait(30)


def test_a_node_that_joins_is_used_from_the_next_round(
    make_config: Callable[..., MotleyConfig], start_node: Callable[[], Any]
) -> None:
    config = make_config(1, steps=2000).model_copy(update={"devices": None})
    own: Events = []
    """The test's own record: the run is ended from within."""

    def watch(event: TrainingEvent) -> None:
        own.append(event)
        if isinstance(event, StepDone):
            if event.step == 1:
                start_node()
            joined = {other.device_id for other in of_kind(own, DeviceJoined)}
            if any(event.idle_fractions.get(device_id, 1.0) < 1.0 for device_id in joined):
                raise Stop

    with pytest.raises(Stop):
        train(config, watch=watch)
    assert len(of_kind(own, DeviceJoined)) == 1
    with_both = losses(own)

    def stop(event: TrainingEvent) -> None:
        alone.append(event)
        if isinstance(event, StepDone) and event.step == len(with_both):
            raise Stop

    alone: Events = []
    with pytest.raises(Stop):
        train(unbroken(config), watch=stop)
    assert losses(alone) == with_both


def test_a_killed_weight_host_costs_the_steps_since_the_checkpoint(
    make_config: Callable[..., MotleyConfig],
) -> None:
    config = make_config(2, steps=9, checkpoint_every_steps=4)

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 6 and not killed:
            killed.append(event.step)
            os.kill(min(actor_processes(b"ray::WeightHostWorker")), signal.SIGKILL)

    killed: list[int] = []
    events = train(config, watch=watch)
    [lost] = of_kind(events, HostsLost)
    assert lost.from_step == 4
    whole = losses(train(unbroken(config)))
    by_step = {event.step: event.loss for event in of_kind(events, StepDone)}
    assert [by_step[step] for step in range(1, 10)] == whole


def test_a_weight_host_that_hangs_is_given_up(
    make_config: Callable[..., MotleyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than a host takes to start on a busy machine: one that does is not to count as hung.
    monkeypatch.setattr(hosts, "SILENCE_S", 12.0)
    config = make_config(2, steps=9, checkpoint_every_steps=4)

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 6 and not stopped:
            stopped.append(min(actor_processes(b"ray::WeightHostWorker")))
            os.kill(stopped[0], signal.SIGSTOP)

    stopped: list[int] = []
    try:
        events = train(config, watch=watch)
    finally:
        with suppress(ProcessLookupError):  # Ray ended it, most likely
            os.kill(stopped[0], signal.SIGKILL)
    [lost] = of_kind(events, HostsLost)
    assert lost.from_step == 4
    assert "hung for 12 s" in lost.reason
    whole = losses(train(unbroken(config)))
    by_step = {event.step: event.loss for event in of_kind(events, StepDone)}
    assert [by_step[step] for step in range(1, 10)] == whole


def test_a_node_that_is_lost_costs_the_steps_since_the_checkpoint(
    make_config: Callable[..., MotleyConfig],
    start_node: Callable[[], Any],
) -> None:
    config = make_config(1, steps=9, checkpoint_every_steps=4, cut=CUT)
    config = config.model_copy(update={"devices": None})
    whole = losses(train(unbroken(config)))
    second = start_node()
    deadline_s = time.monotonic() + 60.0
    while not any(node["Alive"] and node["NodeName"] == "second" for node in ray.nodes()):  # type: ignore[no-untyped-call]
        assert time.monotonic() < deadline_s, "the second node does not come up"
        time.sleep(0.1)

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 6 and not killed:
            killed.append(event.step)
            kill_node(second)

    killed: list[int] = []
    events = train(config, watch=watch)
    assert of_kind(events, HostsLost)
    by_step = {event.step: event.loss for event in of_kind(events, StepDone)}
    assert [by_step[step] for step in range(1, 10)] == whole


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """End all processes of a node at once, as a power cut would."""
    for pid in actor_processes(b"", root=node.pid):
        os.kill(pid, signal.SIGKILL)


def test_a_resumed_run_goes_through_the_same_losses(
    make_config: Callable[..., MotleyConfig],
) -> None:
    optimizer = {"asynchronous": True, "weight_dtype": "bfloat16", "state": "8bit"}
    config = make_config(2, steps=8, checkpoint_every_steps=4, optimizer=optimizer)
    whole = losses(train(unbroken(config)))
    half = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
    stop_at = 4

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, CheckpointSaved) and event.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train(half, watch=watch)
    events = train(config, resume=True)
    assert losses(events) == whole[stop_at:]


def test_adapters_train_and_evaluate(make_config: Callable[..., MotleyConfig]) -> None:
    config = make_config(
        2,
        steps=6,
        lora={"rank": 4, "target_modules": ["q_proj", "down_proj"]},
        optimizer={"learning_rate": 5e-3},
        evaluate_every_steps=3,
    )
    events = train(config)
    assert losses(events)[-1] < losses(events)[0]
    assert [event.step for event in of_kind(events, Evaluated)] == [3, 6]
    [saved] = of_kind(events, CheckpointSaved)
    assert (saved.path / "adapter_config.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_layer(
    make_config: Callable[..., MotleyConfig], tmp_path: Path, checkpoints: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints / "tiny-qwen3", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*layer 2"):
        train(make_config(2, model=broken, cut=CUT))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("cut", [None, CUT])
def test_activations_that_overflow_end_the_run_and_name_the_layer_where_they_do(
    make_config: Callable[..., MotleyConfig],
    tmp_path: Path,
    checkpoints: Path,
    cut: dict[str, Any] | None,
    asynchronous: bool,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoints / "tiny-qwen3", model)
    tensors = load_file(model / "model.safetensors")
    large = tensors["model.layers.5.mlp.down_proj.weight"].float() * 1e38
    assert large.isfinite().all()
    tensors["model.layers.5.mlp.down_proj.weight"] = large
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    optimizer = {"asynchronous": asynchronous}
    # The planner's own cut of this model is one fused slot over all layers.
    config = make_config(2, model=model, cut=cut, optimizer=optimizer)
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; layer 5 is the first"):
        train(config)


# --- frozen experts elsewhere -----------------------------------------------------------------

LORA = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}


def test_adapters_learn_alike_with_experts_in_shards(
    make_config: Callable[..., MotleyConfig], moe: Path
) -> None:
    speeds = (1.0, 0.5)
    whole = losses(train(make_config(2, model=moe, speeds=speeds, lora=LORA)))
    config = make_config(2, model=moe, speeds=speeds, lora=LORA, experts="shards")

    sharded = losses(train(unbroken(config)))

    assert sharded == pytest.approx(whole, rel=1e-5)
    deadline_s = time.monotonic() + 60.0
    while left := actor_processes(b"ray::ExpertWorker"):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


@pytest.mark.parametrize("title", [b"ray::ExpertWorker", b"ray::DeviceWorker"])
def test_a_run_with_experts_in_shards_survives_a_kill(
    title: bytes, make_config: Callable[..., MotleyConfig], moe: Path
) -> None:
    config = make_config(2, model=moe, lora=LORA, experts="shards", steps=9)

    def watch(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 3 and not killed:
            killed.append(max(actor_processes(title)))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    events = train(config, watch=watch)

    assert killed
    assert of_kind(events, HostsLost) == []
    whole = losses(train(unbroken(config)))
    assert losses(events) == pytest.approx(whole, rel=1e-5)


def test_experts_in_shards_are_refused_where_they_cannot_be(
    make_config: Callable[..., MotleyConfig], moe: Path
) -> None:
    with pytest.raises(ValueError, match="experts: shards keeps them frozen, and without lora"):
        make_config(1, model=moe, experts="shards")
    with pytest.raises(ConfigError, match=r"no routed experts; .*training.experts: layers"):
        train(make_config(1, lora=LORA, experts="shards"))
