"""Paced training: the pool of unequal devices beside round robin and a bound 1F1B pipeline.

All three run on the same harness, with the same micro-batches and true numerics; what a device
takes is what it is declared to take. Idle time is a share of aggregate speed, as the simulator
counts it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
import torch
from figures import Figure, at_least
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.checkpoint import Checkpoint
from cluster.config import MotleyConfig
from cluster.training import machines
from cluster.training.events import StepDone, TrainingEvent, TrainingPlanned
from cluster.training.run import run
from placement.dispatch import QUEUE_SLOTS, Assignment, SlotDispatcher
from placement.pooling.schedules import operation_lists
from placement.train import TrainPlan

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
NUM_LAYERS = 12
TOKENS = 32
MICRO_BATCHES = 9
EQUAL = (1.0,) * 8
FOUR_TIERS = (1.0, 1.0, 0.43, 0.43, 0.27, 0.27, 0.16, 0.16)


@dataclass(frozen=True)
class Effort:
    """How long a paced run is."""

    layer_forward_s: float
    """Of one micro-batch on a device of speed 1."""
    steps: int
    rounds_per_step: int


FULL = Effort(0.06, 4, 3)
SMALL_STEPS = replace(FULL, rounds_per_step=2)
"""Two thirds of the micro-batches a step: what a pipeline that flushes every step does worse."""
QUICK = Effort(0.007, 3, 2)


@dataclass(frozen=True)
class Measured:
    """One paced run without its first and last steps, which fill and drain the pool."""

    plan: TrainPlan
    tokens_per_s: float
    idle_fraction: float


class RoundRobin(SlotDispatcher):
    """Slot i, counted over all rounds, goes to device i mod D, whatever it is doing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._next = 0
        self._running: dict[tuple[int, int], str] = {}

    def choose(
        self, pending: Iterable[tuple[int, int]], *, now_s: float, available: Collection[str]
    ) -> Assignment | None:
        first = next(iter(pending), None)
        devices = sorted(available)
        device_id = devices[self._next % len(devices)]
        if first is None or list(self._running.values()).count(device_id) >= QUEUE_SLOTS:
            return None
        return Assignment(*first, device_id)

    def dispatched(
        self, round_index: int, slot_index: int, device_id: str, *, now_s: float
    ) -> None:
        super().dispatched(round_index, slot_index, device_id, now_s=now_s)
        self._next += 1
        self._running[round_index, slot_index] = device_id

    def finished(
        self, round_index: int, slot_index: int, *, now_s: float, micro_batch_s: float
    ) -> None:
        super().finished(round_index, slot_index, now_s=now_s, micro_batch_s=micro_batch_s)
        del self._running[round_index, slot_index]


class Bound(SlotDispatcher):
    """Stage s on a device of its own, in the order of 1F1B.

    A round is one micro-batch; its slots are the stages forward, the last one fused, and backward.
    """

    stage_devices: Sequence[str]
    lists: Sequence[Sequence[tuple[int, int]]]
    """Per stage, (micro-batch, slot) in order, of one optimizer step."""
    micro_batches: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._position = [0] * len(self.lists)
        self._queued = [0] * len(self.lists)

    def choose(
        self, pending: Iterable[tuple[int, int]], *, now_s: float, available: Collection[str]
    ) -> Assignment | None:
        waiting = set(islice(pending, 4096))
        for stage, device_id in enumerate(self.stage_devices):
            step, at = divmod(self._position[stage], len(self.lists[stage]))
            micro_batch, slot = self.lists[stage][at]
            visit = step * self.micro_batches + micro_batch, slot
            if visit in waiting and self._queued[stage] < QUEUE_SLOTS:
                return Assignment(*visit, device_id)
        return None

    def dispatched(
        self, round_index: int, slot_index: int, device_id: str, *, now_s: float
    ) -> None:
        super().dispatched(round_index, slot_index, device_id, now_s=now_s)
        stage = list(self.stage_devices).index(device_id)
        self._position[stage] += 1
        self._queued[stage] += 1

    def finished(
        self, round_index: int, slot_index: int, *, now_s: float, micro_batch_s: float
    ) -> None:
        super().finished(round_index, slot_index, now_s=now_s, micro_batch_s=micro_batch_s)
        self._queued[min(slot_index, 2 * (len(self.lists) - 1) - slot_index)] -= 1


def bound_1f1b(devices: Sequence[str], micro_batches: int) -> type[SlotDispatcher]:
    """Return a dispatcher that binds stage s to `devices[s]`."""
    last = len(devices) - 1
    orders = operation_lists(
        "1f1b", num_devices=last + 1, num_stages=last + 1, micro_batches=micro_batches
    )
    lists = [
        [
            (op.micro_batch, 2 * last - stage if op.is_backward else stage)
            for op in orders[stage]
            # The last stage is one slot: forward, loss and backward in one visit.
            if stage < last or op.is_backward
        ]
        for stage in range(last + 1)
    ]
    members = {"stage_devices": devices, "lists": lists, "micro_batches": micro_batches}
    return type("Bound1F1B", (Bound,), members)


def make_checkpoint(folder: Path) -> Path:
    """A random model of many small layers, with the shipped tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=2048,
        hidden_size=48,
        intermediate_size=640,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def make_config(
    folder: Path,
    speeds: Sequence[float],
    effort: Effort,
    *,
    memory: float = 1.0,
    **training: Any,
) -> MotleyConfig:
    """Paced devices of these speeds; a layer forward takes `effort.layer_forward_s` at speed 1."""
    model = (
        make_checkpoint(folder / "model") if not (folder / "model").exists() else folder / "model"
    )
    profile = Checkpoint.open(str(model)).profile(dtype_bytes=4)
    layer = profile.layers[0]
    flops = layer.flops_per_token * TOKENS
    flops += layer.attention_flops_per_context_token * TOKENS * (TOKENS + 1) / 2
    text = folder / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    # Room for about a quarter of the layers beside the next slot's weights: no device holds all.
    memory_bytes = 10 * layer.weight_bytes + 4 * profile.head.weight_bytes + 2 * 2**20
    return MotleyConfig.model_validate(
        {
            "model": str(model),
            "devices": [
                {
                    "id": f"gpu{index}",
                    "kind": "paced",
                    "flops_per_s": flops / effort.layer_forward_s * speed,
                    "memory_bytes_per_s": 1e13,
                    "memory_bytes": int(memory * memory_bytes),
                }
                for index, speed in enumerate(speeds)
            ],
            "training": {
                "data": {"train": [str(text)], "held_out_fraction": 0.0},
                "output": tempfile.mkdtemp(dir=folder),
                "steps": effort.steps,
                "sequence_tokens": TOKENS,
                "micro_batches": MICRO_BATCHES,
                "rounds_per_step": effort.rounds_per_step,
                "checkpoint_every_steps": effort.steps,
                "optimizer": {"asynchronous": True},
            }
            | training,
        }
    )


def measure(config: MotleyConfig, speeds: Sequence[float]) -> Measured:
    """Train, and return throughput and idle time of the steps between the first and the last."""
    plans: list[TrainPlan] = []
    steps: list[StepDone] = []

    def on_event(event: TrainingEvent) -> None:
        if isinstance(event, TrainingPlanned):
            plans.append(event.plan)
        elif isinstance(event, StepDone):
            steps.append(event)

    run(config, on_event)
    steady = steps[1:-1]
    for step in steps:
        print(
            f"step {step.step}: {step.seconds:.2f} s, {step.tokens_per_s:.0f} tokens/s, idle "
            + ", ".join(f"{d} {100 * idle:.0f} %" for d, idle in step.idle_fractions.items()),
            flush=True,
        )
    seconds = sum(step.seconds for step in steady)
    idle = {
        device_id: sum(step.idle_fractions[device_id] * step.seconds for step in steady) / seconds
        for device_id in steady[0].idle_fractions
    }
    weighted = sum(speed * idle[f"gpu{index}"] for index, speed in enumerate(speeds))
    print(
        f"planned {plans[0].seconds_per_round:.2f} s a round, {100 * plans[0].idle_fraction:.1f} % "
        f"idle; {len(plans[0].slots)} slots",
        flush=True,
    )
    return Measured(plans[0], sum(step.tokens for step in steady) / seconds, weighted / sum(speeds))


@contextmanager
def dispatching(dispatcher: type[SlotDispatcher]) -> Iterator[None]:
    with patch.object(machines, "SlotDispatcher", dispatcher):
        yield


def best_static_cut(
    speeds: Sequence[float], layer_s: float, forward_share: float, head_s: float
) -> tuple[list[int], list[int]]:
    """Return (devices in stage order, layers of each) with the least slowest stage.

    Layers are equal, so only counts matter, and who has the head: every device is tried, and for
    each the counts follow from a search for the least period. The last stage recomputes nothing.
    """
    best: tuple[float, list[int], list[int]] | None = None
    for last in range(len(speeds)):
        order = [device for device in range(len(speeds)) if device != last] + [last]
        costs = [layer_s / speeds[device] for device in order]
        costs[-1] *= 1 - forward_share
        head = head_s / speeds[last]
        bounds = sorted(
            {n * c + (head if i == len(order) - 1 else 0.0)
             for i, c in enumerate(costs) for n in range(NUM_LAYERS + 1)}
        )  # fmt: skip
        for period in bounds:
            counts = [int((period + 1e-12) / c) for c in costs[:-1]]
            counts.append(int((period - head + 1e-12) / costs[-1]) if period >= head else -1)
            if counts[-1] >= 0 and sum(counts) >= NUM_LAYERS:
                if best is None or period < best[0]:
                    best = period, order, _trimmed(counts)
                break
    assert best is not None
    return best[1], best[2]


def _trimmed(counts: list[int]) -> list[int]:
    """Take surplus layers off the fullest stages."""
    counts = list(counts)
    while sum(counts) > NUM_LAYERS:
        counts[counts.index(max(counts))] -= 1
    return counts


def tiers_label(speeds: Sequence[float]) -> str:
    """Name the mix of speeds."""
    return f"{len(speeds)} devices of four speeds"


@contextmanager
def ray_session() -> Iterator[None]:
    """One Ray for all runs; a node takes seconds to start."""
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=400 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def measure_bound(folder: Path, speeds: Sequence[float], effort: Effort) -> Measured:
    """The best static pipeline: one stage a device, 1F1B, recompute, a flush at every step."""
    forward_s = effort.layer_forward_s
    profile = Checkpoint.open(str(folder / "model")).profile(dtype_bytes=4)
    layer, head = profile.layers[0], profile.head
    # As the cost model prices it: recompute as long as forward, backward twice as long.
    head_s = 3 * forward_s * head.flops_per_token / layer.flops_per_token
    order, counts = best_static_cut(speeds, 4 * forward_s, 0.25, head_s)
    used = [(device, n) for device, n in zip(order[:-1], counts[:-1], strict=True) if n]
    devices = [f"gpu{device}" for device, _ in used] + [f"gpu{order[-1]}"]
    layers = [n for _, n in used]
    micro_batches = MICRO_BATCHES * effort.rounds_per_step
    config = make_config(
        folder,
        speeds,
        effort,
        memory=4.0,  # its stages stay where they are, however large
        micro_batches=1,
        rounds_per_step=micro_batches,
        cut={"forward": layers, "fused": counts[-1], "backward": layers[::-1], "grain": "stage"},
        optimizer={"asynchronous": False},
    )
    with dispatching(bound_1f1b(devices, micro_batches)):
        return measure(config, speeds)


def paced_figures(*, quick: bool) -> list[Figure]:
    """Run everything paced; minutes."""
    effort = QUICK if quick else FULL
    step = 2 if quick else 1
    equal, tiers = EQUAL[::step], FOUR_TIERS[::step]
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        alike = measure(make_config(folder, equal, effort), equal)
        pool = measure(make_config(folder, tiers, effort), tiers)
        figures = [
            idle_figure(f"{len(equal)} equal devices", alike),
            idle_figure(tiers_label(tiers), pool),
        ]
        with dispatching(RoundRobin):
            # It takes about three times as long, so fewer rounds must do.
            short = replace(effort, steps=3, rounds_per_step=effort.rounds_per_step - 1)
            turns = measure(make_config(folder, tiers, short), tiers)
        figures.append(faster(tiers, pool, turns, "strict round robin", 2.5))
        for size in (effort,) if quick else (effort, SMALL_STEPS):
            if size != effort:
                pool = measure(make_config(folder, tiers, size), tiers)
            bound = measure_bound(folder, tiers, size)
            what = (
                f"the best static 1F1B pipeline with recompute, "
                f"{MICRO_BATCHES * size.rounds_per_step} micro-batches a step"
            )
            figures.append(faster(tiers, pool, bound, what, 1.3))
    return figures


def idle_figure(label: str, run: Measured) -> Figure:
    value, simulated = 100 * run.idle_fraction, 100 * run.plan.idle_fraction
    return Figure(
        figure=f"training idle %, {label}, beside simulated",
        value=value,
        baseline=simulated,
        ratio=value / max(simulated, 0.01),
        target="within 5 points",
        met=abs(value - simulated) <= 5.0,
        kind="paced",
    )


def faster(
    speeds: Sequence[float], pool: Measured, other: Measured, what: str, least: float
) -> Figure:
    name = f"training tokens/s, {tiers_label(speeds)}, beside {what}"
    return at_least(name, pool.tokens_per_s, other.tokens_per_s, least, kind="paced")
