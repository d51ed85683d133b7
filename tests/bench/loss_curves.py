"""Loss curves of real runs over a pool beside plain AdamW in one process.

Run: python tests/bench/loss_curves.py [--quick] [--plot curves.svg]

Fine-tunes the shipped checkpoint on this repository's own texts, which are unlike what it learnt:
60 steps of 8 sequences of 128 tokens, for each seed (which orders the text) synchronously,
asynchronously (gradients one step old) and plainly: transformers' model, torch's AdamW. The pool is
two unpaced CPU devices too small for the model, so that rounds go through many slots.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import Figure, report

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import matplotlib as mpl  # noqa: E402 - the path above
import ray  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure as Drawing  # noqa: E402
from plain_training import plain_losses, plain_model  # noqa: E402

from cluster.config import MotleyConfig  # noqa: E402
from cluster.ray_session import connect  # noqa: E402
from cluster.training.events import StepDone, TrainingEvent, TrainingPlanned  # noqa: E402
from cluster.training.job import open_job  # noqa: E402
from cluster.training.run import run  # noqa: E402

SHIPPED = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "deploy/checkpoints/README.md")
NUM_STEPS = 60
LAST_STEPS = 5
"""The final loss is a mean over so many."""
MOST_SYNCHRONOUS_NATS = 1e-3
MOST_ASYNCHRONOUS_NATS = 0.05
COLORS = {"plain": "black", "synchronous": "tab:blue", "asynchronous": "tab:orange"}


@dataclass(frozen=True)
class Curve:
    """The loss of every step of one run, in nats a token."""

    kind: str
    seed: int
    losses: list[float]

    @property
    def final(self) -> float:
        return sum(self.losses[-LAST_STEPS:]) / LAST_STEPS


def make_config(folder: Path, seed: int, kind: str) -> MotleyConfig:
    devices = [
        {"id": name, "kind": "cpu", "flops_per_s": speed, "memory_bytes_per_s": 1e10,
         "memory_bytes": "24 MiB"}
        for name, speed in (("fast", 4e10), ("slow", 3e10))
    ]  # fmt: skip
    return MotleyConfig.model_validate(
        {
            "model": str(SHIPPED),
            "devices": devices,
            "ray": {"object_store_bytes": "256 MiB"},
            "training": {
                "data": {"train": [str(ROOT / name) for name in TEXTS], "held_out_fraction": 0},
                "output": str(folder / f"{kind}-{seed}"),
                "seed": seed,
                "steps": NUM_STEPS,
                "micro_batches": 4,
                "rounds_per_step": 2,
                "sequence_tokens": 128,
                "checkpoint_every_steps": NUM_STEPS,
                "optimizer": {
                    "learning_rate": 5e-4,
                    "warmup_steps": 3,
                    "asynchronous": kind == "asynchronous",
                },
            },
        }
    )


def pooled(folder: Path, seed: int, kind: str) -> Curve:
    """Train over the pool; prints its slots."""
    events: list[TrainingEvent] = []
    run(make_config(folder, seed, kind), events.append)
    for event in events:
        if isinstance(event, TrainingPlanned):
            slots = [(s.kind, s.first_layer, s.end_layer, s.grain) for s in event.plan.slots]
            print(f"{kind}, seed {seed}: slots {slots}", flush=True)
    return Curve(kind, seed, [event.loss for event in events if isinstance(event, StepDone)])


def plain(folder: Path, seed: int) -> Curve:
    job = open_job(make_config(folder, seed, "plain"), resume=False)
    return Curve("plain", seed, plain_losses(job, plain_model(SHIPPED), NUM_STEPS))


def measure(seeds: Sequence[int]) -> list[Curve]:
    torch.set_num_threads(1)
    curves = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        connect(make_config(folder, 0, "plain"))
        try:
            for seed in seeds:
                curves += [pooled(folder, seed, kind) for kind in ("synchronous", "asynchronous")]
        finally:
            ray.shutdown()
        curves += [plain(folder, seed) for seed in seeds]
    return curves


def print_table(curves: Sequence[Curve]) -> None:
    ordered = sorted(curves, key=lambda curve: (curve.seed, [*COLORS].index(curve.kind)))
    print("step " + " ".join(f"{f'{c.kind[:6]} {c.seed}':>9}" for c in ordered))
    for step in (1, *range(10, NUM_STEPS + 1, 10)):
        print(f"{step:4} " + " ".join(f"{curve.losses[step - 1]:9.4f}" for curve in ordered))
    print("last " + " ".join(f"{curve.final:9.4f}" for curve in ordered))


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw all curves, those of a kind in one colour; equal curves give equal files."""
    drawing = Drawing(figsize=(7, 4), layout="constrained")
    axes = drawing.subplots()
    for kind, color in COLORS.items():
        width, style = (2.0, "--") if kind == "plain" else (1.0, "-")
        for number, curve in enumerate(c for c in curves if c.kind == kind):
            axes.plot(
                range(1, NUM_STEPS + 1),
                curve.losses,
                color=color,
                linewidth=width,
                linestyle=style,
                alpha=0.8,
                label=kind if number == 0 else None,
            )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Fine-tuning tiny-qwen3")
    axes.legend()
    with mpl.rc_context({"svg.hashsalt": "motley", "svg.fonttype": "none"}):
        drawing.savefig(path, metadata={"Date": None})


def figures_of(curves: Sequence[Curve]) -> list[Figure]:
    plain_of = {curve.seed: curve for curve in curves if curve.kind == "plain"}
    by_kind = {kind: [c for c in curves if c.kind == kind] for kind in COLORS}
    most = max(
        abs(ours - theirs)
        for curve in by_kind["synchronous"]
        for ours, theirs in zip(curve.losses, plain_of[curve.seed].losses, strict=True)
    )
    late = [curve.final - plain_of[curve.seed].final for curve in by_kind["asynchronous"]]
    behind = sum(late) / len(late)
    final = sum(curve.final for curve in plain_of.values()) / len(plain_of)
    what = f"{NUM_STEPS} steps, seeds: {len(plain_of)}"
    return [
        Figure(
            figure=f"synchronous beside plain AdamW, largest difference of a step's loss ({what})",
            value=most,
            baseline=final,
            ratio=most / final,
            target=f"<= {MOST_SYNCHRONOUS_NATS:g} nats",
            met=most <= MOST_SYNCHRONOUS_NATS,
        ),
        Figure(
            figure=f"asynchronous less plain AdamW, mean of last {LAST_STEPS} losses ({what})",
            value=behind,
            baseline=final,
            ratio=behind / final,
            target=f"<= {MOST_ASYNCHRONOUS_NATS:g} nats",
            met=behind <= MOST_ASYNCHRONOUS_NATS,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--plot", type=Path, help="write the curves to this .svg")
    arguments = parser.parse_args()
    curves = measure(range(1 if arguments.quick else 3))
    print_table(curves)
    if arguments.plot:
        plot(curves, arguments.plot)
    report(figures_of(curves))


if __name__ == "__main__":
    main()
