"""The same training in one process: transformers' model, plain autograd, torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pooled_training import plain_gradients
from transformers import AutoModelForCausalLM

from actors.engine.schedule import clip_scale, learning_rate
from cluster.training.job import TrainingJob


def plain_model(path: Path) -> Any:
    """Load transformers' own model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).train()


def plain_losses(
    job: TrainingJob, model: Any, num_steps: int, *, drains: Sequence[int] = ()
) -> list[float]:
    """Train `model` as the job says; returns each step's loss, router loss included.

    An asynchronous job's gradients are taken at the weights of one step before:
    w[t + 1] = w[t] - AdamW(gradient at w[t - 1]), but for the steps in `drains` (and step 0), where
    the pool was drained before.
    """
    settings = job.settings.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    before: dict[str, torch.Tensor] = {}
    losses = []
    for step in range(num_steps):
        batches = job.batches.step(step, job.settings.micro_batches * job.settings.rounds_per_step)
        newest = {name: p.detach().clone() for name, p in model.named_parameters()}
        if settings.asynchronous and step and step not in drains:
            _set(model, before)
        loss, gradients = plain_gradients(model, batches, job.router_loss_coefficient)
        _set(model, newest)
        before = newest
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        scale = clip_scale(norm, settings.clip_norm)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone() * scale
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, job.settings.steps)
        optimizer.step()
        losses.append(loss)
    return losses


def _set(model: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
