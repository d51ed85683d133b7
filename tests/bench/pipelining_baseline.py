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
    """Of a step; fewer than there are in the file for a quick look."""
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
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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


def best_cut(task: Task) -> int:
    """Return the cut of the shortest step; the first step of each warms up."""
    return min(measure(task), key=lambda result: min(result.seconds[1:])).cut


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


def _run(task: Task, rank: int, cut: int, tokens: Any, targets: Any) -> dict[str, Any]:
    """Train with one cut; the losses are those of the last stage."""
    import torch
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    from actors.engine.schedule import learning_rate
    from actors.engine.training_config import OptimizerSettings

    settings = OptimizerSettings(**task.optimizer)
    module = _stage_module(task, rank, cut)
    optimizer = torch.optim.AdamW(
        _groups(module, settings.weight_decay),
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    scale = 0.0

    def loss_of(logits: Any, target: Any) -> Any:
        rows = logits.float().flatten(0, 1)
        return scale * torch.nn.functional.cross_entropy(rows, target.flatten(), reduction="sum")

    stage = PipelineStage(module, rank, NUM_STAGES, torch.device("cpu"))
    schedule = Schedule1F1B(stage, task.micro_batches, loss_fn=loss_of, scale_grads=False)
    seconds, losses = [], []
    for step in range(task.steps):
        step_tokens = tokens[step, : task.micro_batches].flatten(0, 1)
        step_targets = targets[step, : task.micro_batches].flatten(0, 1)
        torch.distributed.barrier()
        began_s = time.perf_counter()
        scale = 1.0 / int((step_targets >= 0).sum())
        parts: list[Any] = []
        if rank == 0:
            schedule.step(step_tokens)
        else:
            schedule.step(target=step_targets, losses=parts, return_outputs=False)
        _clip(module, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, task.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began_s)
        losses.append(float(sum(part.detach() for part in parts)))
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
    arrays = {
        name: np.stack([[getattr(b, f"{name}_BT") for b in step] for step in steps])
        for name in ("tokens", "targets")
    }
    np.savez(path, **arrays)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
