"""1F1B of torch.distributed.pipelining in two processes of one core each: what Motley is held to.

Layers are transformers' own, attention is torch's, AdamW is fused and gradients are clipped over
both stages. The model is cut between two layers, the embedding in front and the head behind; every
cut is tried. `measure` starts the two processes; each runs this file with a `Task` and its rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.engine.schedule import learning_rate
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import IGNORED

ROOT = Path(__file__).resolve().parents[2]
NUM_STAGES = 2
_TIMEOUT_S = 500.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the two processes do: some steps for every cut, each from the checkpoint's weights."""

    model: str
    batches: str
    """An .npz file with tokens and targets of all steps, (steps, micro-batches, B, T)."""
    cuts: tuple[int, ...]
    """Layers of the first stage."""
    steps: int
    micro_batches: int
    """Of a step."""
    with_checkpointing: bool
    optimizer: dict[str, Any]
    """`OptimizerSettings`."""
    num_steps: int
    """Of the schedule of the learning rate."""


@dataclass(frozen=True)
class CutResult:
    """Per step: seconds, and the mean cross-entropy in nats."""

    cut: int
    seconds: list[float]
    losses: list[float]


def measure(task: Task) -> list[CutResult]:
    """Run a task in two new processes.

    Raises:
        RuntimeError: One of them failed; the end of what it wrote is quoted.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(asdict(task)), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        errors = [Path(folder) / f"stderr-{rank}" for rank in range(NUM_STAGES)]
        processes = []
        for rank, error in enumerate(errors):
            with error.open("w") as stderr:
                command = [sys.executable, __file__, str(path), str(rank)]
                processes.append(subprocess.Popen(command, stderr=stderr, env=environment))
        try:
            codes = [process.wait(_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for error, code in zip(errors, codes, strict=True):
            if code:
                raise RuntimeError(f"1F1B ended with {code}: {error.read_text()[-2000:]}")
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return [CutResult(**result) for result in results]


def fastest_steps(task: Task) -> dict[int, float]:
    """Return the seconds of the shortest step of each cut; the first step of each warms up."""
    return {result.cut: min(result.seconds[1:]) for result in measure(task)}


def _main(path: Path, rank: int) -> None:
    import torch
    import torch.distributed

    task = Task(**json.loads(path.read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    store = f"file://{path.parent / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=NUM_STAGES
    )
    with np.load(task.batches) as arrays:
        tokens, targets = (torch.from_numpy(arrays[name]) for name in ("tokens", "targets"))
    results = [_run(task, rank, cut, tokens, targets) for cut in task.cuts]
    if rank == NUM_STAGES - 1:
        (path.parent / "results.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class _Pipeline:
    """This process's stage, its schedule and its optimizer."""

    def __init__(self, task: Task, rank: int, cut: int) -> None:
        import torch
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        self._task = task
        self._is_last = rank == NUM_STAGES - 1
        self._settings = OptimizerSettings(**task.optimizer)
        self._module = _stage_module(task, rank, cut)
        self._optimizer = torch.optim.AdamW(
            _groups(self._module, self._settings.weight_decay),
            betas=(self._settings.beta1, self._settings.beta2),
            eps=self._settings.epsilon,
            fused=True,
        )
        self._scale = 0.0
        stage = PipelineStage(self._module, rank, NUM_STAGES, torch.device("cpu"))
        self._schedule = Schedule1F1B(
            stage, task.micro_batches, loss_fn=self._loss, scale_grads=False
        )

    def step(self, step: int, tokens_NT: Any, targets_NT: Any) -> float:
        """Take an optimizer step over N sequences; returns the loss, 0 on the first stage."""
        self._scale = 1.0 / int((targets_NT != IGNORED).sum())
        parts: list[Any] = []
        if self._is_last:
            self._schedule.step(target=targets_NT, losses=parts, return_outputs=False)
        else:
            self._schedule.step(tokens_NT)
        _clip(self._module, self._settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, step, self._task.num_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(sum(part.detach() for part in parts))

    def _loss(self, logits_BTV: Any, targets_BT: Any) -> Any:
        import torch

        rows = logits_BTV.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            rows, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return self._scale * loss


def _run(task: Task, rank: int, cut: int, tokens: Any, targets: Any) -> dict[str, Any]:
    """Train with one cut; the losses are those of the last stage."""
    import torch

    pipeline = _Pipeline(task, rank, cut)
    seconds, losses = [], []
    for step in range(task.steps):
        part = step, slice(task.micro_batches)
        torch.distributed.barrier()
        began_s = time.perf_counter()
        losses.append(pipeline.step(step, tokens[part].flatten(0, 1), targets[part].flatten(0, 1)))
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began_s)
    return asdict(CutResult(cut, seconds, losses))


def _stage_module(task: Task, rank: int, cut: int) -> Any:
    """Return embedding and first layers, or the other layers and the head, of transformers'."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    is_first = rank == 0
    layers = model.model.layers[:cut] if is_first else model.model.layers[cut:]

    class Stage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers
            self.embedding = model.model.embed_tokens if is_first else None
            self.head = None if is_first else torch.nn.Sequential(model.model.norm, model.lm_head)
            self.rotary = model.model.rotary_emb

        def forward(self, given: Any) -> Any:
            hidden = given if self.embedding is None else self.embedding(given)
            positions = torch.arange(hidden.shape[1])[None]
            rotary = self.rotary(hidden, positions)
            for layer in self.layers:
                # The mask is None: one document a sequence, so attention is causal and no more.
                arguments = {"position_ids": positions, "position_embeddings": rotary}
                if task.with_checkpointing:
                    hidden = checkpoint(
                        layer, hidden, use_reentrant=False, preserve_rng_state=False, **arguments
                    )
                else:
                    hidden = layer(hidden, **arguments)
            return hidden if self.head is None else self.head(hidden)

    return Stage()


def _groups(module: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices alone."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _clip(module: Any, clip_norm: float | None) -> None:
    """Clip by the norm of both stages' gradients."""
    import torch

    if clip_norm is None:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    square = torch.nn.utils.get_total_norm(gradients) ** 2
    torch.distributed.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), clip_norm, square.sqrt())


def save_batches(path: Path, steps: Sequence[Sequence[Any]]) -> None:
    """Write the micro-batches of all steps.

    Raises:
        ValueError: A sequence holds more than one document, which the baseline's attention would
            not keep apart.
    """
    every = [batch for step in steps for batch in step]
    if any((batch.documents_BT > 0).any() for batch in every):
        raise ValueError("a sequence holds more than one document; train on one long text")
    np.savez(
        path,
        tokens=np.stack([[batch.tokens_BT for batch in step] for step in steps]),
        targets=np.stack([[batch.targets_BT for batch in step] for step in steps]),
    )


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
