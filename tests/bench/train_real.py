"""Fine-tuning with a heavy head on two cores: Motley's pool beside a static pipeline, unpaced.

Run: python tests/bench/train_real.py [--quick]

Two CPU devices of one thread against 1F1B of torch.distributed.pipelining in two processes of one
core each, with the best of all cuts, with and without activation checkpointing. Same random model,
micro-batches, AdamW and clipping; the losses of the first steps must agree. Measurements alternate.

The head has 2.8 times the multiplications of all layers together (mT5-small: 128 million parameters
beside 44 million), so no cut between layers halves the work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

from figures import Figure, at_least, median, report
from pipelining_baseline import CutResult, Task, fastest_steps, measure, save_batches

from cluster.config import MotleyConfig
from cluster.training.events import StepDone, TrainingEvent, TrainingPlanned
from cluster.training.job import open_job
from cluster.training.run import run

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
TEXTS = ("README.md", "CONTRIBUTING.md", "deploy/checkpoints/README.md")
NUM_LAYERS = 6
SEQUENCE_TOKENS = 256
MICRO_BATCHES = 8
ROUNDS_PER_STEP = 2
WARM_UP_STEPS = 2
LEAST = 1.2
MEMORY_BYTES = 512 * 2**20
"""Of a device. With the whole model in one slot the plan wants 254 MB, as moments stay on the host;
1F1B's first stage has 181 MB of weights, gradients and moments."""
ENVIRONMENT = {
    # glibc maps and unmaps a tensor as large as the logits each time; huge pages make that cheap.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Ray's workers would yield to everything else on the machine, which the baseline does not.
    "RAY_worker_niceness": "0",
}
"""Of both sides."""
QUICK_CUT = NUM_LAYERS
"""What the full search found, for a quick look."""
LOSS_TOLERANCE = 1e-3
"""Relative: sums of float32 in another order."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where the model and its text lie, and how long a measurement is."""

    folder: Path
    steps: int

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def batches(self) -> Path:
        return self.folder / "batches.npz"

    @property
    def tokens_per_step(self) -> int:
        return ROUNDS_PER_STEP * MICRO_BATCHES * SEQUENCE_TOKENS

    def tokens_per_s(self, seconds: list[float]) -> float:
        """Over the steps after the first few."""
        measured = seconds[WARM_UP_STEPS:]
        return self.tokens_per_step * len(measured) / sum(measured)


def make_checkpoint(folder: Path) -> None:
    """Write a random Qwen3 whose head is heavy, with the shipped tokenizer (ids below 2048)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=32768, hidden_size=256, intermediate_size=384,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder / name)


def make_case(folder: Path, steps: int) -> Case:
    """Write the model, one long text, and the micro-batches that Motley will make of it."""
    case = Case(folder=folder, steps=steps)
    make_checkpoint(case.model)
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    job = open_job(make_config(case, "batches", asynchronous=False), resume=False)
    per_step = MICRO_BATCHES * ROUNDS_PER_STEP
    save_batches(case.batches, [job.batches.step(step, per_step) for step in range(steps)])
    return case


def make_config(case: Case, name: str, *, asynchronous: bool) -> MotleyConfig:
    return MotleyConfig.model_validate(
        {
            "model": str(case.model),
            "devices": [
                {
                    "id": device_id, "kind": "cpu", "flops_per_s": 4e10,
                    "memory_bytes_per_s": 1e10, "memory_bytes": MEMORY_BYTES,
                }
                for device_id in ("cpu-a", "cpu-b")
            ],
            "training": {
                "data": {"train": [str(case.folder / "text.txt")], "held_out_fraction": 0},
                "output": str(case.folder / name),
                "steps": case.steps,
                "micro_batches": MICRO_BATCHES,
                "rounds_per_step": ROUNDS_PER_STEP,
                "sequence_tokens": SEQUENCE_TOKENS,
                "checkpoint_every_steps": case.steps,
                "optimizer": {"asynchronous": asynchronous, "learning_rate": 3e-4},
            },
        }
    )  # fmt: skip


def run_motley(case: Case, name: str, *, asynchronous: bool) -> list[StepDone]:
    """Train to the end; prints the slots that were planned."""
    events: list[TrainingEvent] = []
    run(make_config(case, name, asynchronous=asynchronous), events.append)
    for event in events:
        if isinstance(event, TrainingPlanned):
            slots = [(s.kind, s.first_layer, s.end_layer, s.grain) for s in event.plan.slots]
            print(f"{name}: slots {slots}", flush=True)
    return [event for event in events if isinstance(event, StepDone)]


def baseline_task(case: Case, **changes: Any) -> Task:
    settings = make_config(case, "", asynchronous=False).training
    task = Task(
        model=str(case.model),
        batches=str(case.batches),
        cuts=(NUM_LAYERS,),
        steps=case.steps,
        micro_batches=settings.micro_batches * settings.rounds_per_step,
        with_checkpointing=True,
        optimizer=settings.optimizer.model_dump(),
        num_steps=settings.steps,
    )
    return replace(task, **changes)


def find_cut(case: Case, *, with_checkpointing: bool) -> int:
    """Try all cuts, each on a few steps, twice."""
    cuts = tuple(range(1, NUM_LAYERS + 1))
    few = baseline_task(case, cuts=cuts, steps=3, with_checkpointing=with_checkpointing)
    seconds = [fastest_steps(few) for _ in range(2)]
    best_s = {cut: min(each[cut] for each in seconds) for cut in cuts}
    print(f"1F1B {_with(with_checkpointing)}: tokens/s of its cuts", end=" ")
    print({cut: round(case.tokens_per_step / s) for cut, s in best_s.items()}, flush=True)
    return min(best_s, key=best_s.__getitem__)


def check_losses(losses: list[float], expected: list[float], what: str) -> None:
    """Raise where two runs did not do the same work."""
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        if abs(ours - theirs) > LOSS_TOLERANCE * theirs:
            raise AssertionError(f"{what}, step {step + 1}: loss {ours}, 1F1B {theirs}")


def measure_once(case: Case, repeat: int, cuts: dict[bool, int]) -> dict[str, float]:
    """Return tokens/s of every contender, measured one after another."""
    base: dict[bool, CutResult] = {}
    for with_checkpointing, cut in cuts.items():
        task = baseline_task(case, cuts=(cut,), with_checkpointing=with_checkpointing)
        [base[with_checkpointing]] = measure(task)
    rates = {
        f"1F1B {_with(key)}": case.tokens_per_s(result.seconds) for key, result in base.items()
    }
    expected = base[True].losses
    check_losses(base[False].losses, expected, "1F1B without checkpointing")
    for mode in ("synchronous", "asynchronous"):
        steps = run_motley(case, f"{mode}-{repeat}", asynchronous=mode == "asynchronous")
        losses = [step.loss for step in steps]
        # Asynchronous gradients are one step old from the second step on.
        same = len(losses) if mode == "synchronous" else 1
        check_losses(losses[:same], expected[:same], mode)
        rates[mode] = case.tokens_per_s([step.seconds for step in steps])
        idle = steps[-1].idle_fractions
        print(f"{mode}: idle {', '.join(f'{k} {v:.0%}' for k, v in idle.items())}")
    print(", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()), "tokens/s", flush=True)
    return rates


def _with(with_checkpointing: bool) -> str:
    return "with checkpointing" if with_checkpointing else "without checkpointing"


def figures_of(runs: list[dict[str, float]]) -> list[Figure]:
    """Medians of the ratios, each of measurements that followed each other."""
    figures = []
    for mode in ("synchronous", "asynchronous"):
        for with_checkpointing in (True, False):
            key = f"1F1B {_with(with_checkpointing)}"
            ratio = median([rates[mode] / rates[key] for rates in runs])
            value = median([rates[mode] for rates in runs])
            name = f"training tokens/s, heavy head, two processes, {mode}, beside {key}"
            figure = at_least(name, value, value / ratio, LEAST)
            if not with_checkpointing:
                figure = replace(figure, target="none", met=True)
            figures.append(figure)
    return figures


def real_figures(*, quick: bool) -> list[Figure]:
    """Return the figures; prints a line a measurement."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder), steps=4 if quick else 10)
        cuts = {
            key: QUICK_CUT if quick else find_cut(case, with_checkpointing=key)
            for key in (True, False)
        }
        for key, cut in cuts.items():
            print(f"1F1B {_with(key)}: cut {cut} layers and {NUM_LAYERS - cut} with the head")
        return figures_of([measure_once(case, n, cuts) for n in range(1 if quick else 3)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    report(real_figures(quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()
