"""What a step folder holds, out of the weight hosts' memory and back into it, a unit at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import torch

from actors.engine.arrays import Array, as_tensor, to_array
from actors.engine.checkpoint import Checkpoint
from actors.engine.export import (
    read_adapter_unit,
    read_model_unit,
    read_optimizer_state,
    write_adapter,
    write_model,
    write_optimizer_state,
)
from actors.engine.training_values import Unit
from cluster.training.checkpoints import TrainingState
from cluster.training.hosts import WeightHosts
from cluster.training.job import TrainingJob


async def load_units(job: TrainingJob, weights: WeightHosts, folder: Path, step: int) -> None:
    """Bring every trained unit to what a step folder holds."""
    dtype = _weight_dtype(job)
    saved = None
    if job.settings.lora is None:
        allow_unverified = job.config.engine.allow_unverified_architectures
        saved = Checkpoint.open(str(folder), allow_unverified=allow_unverified)

    def read(unit: Unit) -> tuple[Array, dict[str, Array]]:
        if saved is None:
            flat = read_adapter_unit(folder, unit, dtype=dtype)
        else:
            flat = read_model_unit(saved, unit, dtype=dtype)
        state = read_optimizer_state(folder, unit.name)
        return to_array(flat), {name: to_array(part) for name, part in state.items()}

    for unit in job.units:
        if unit.trained:
            flat, state = await asyncio.to_thread(read, unit)
            await weights.restore(unit.name, step, flat, state)
    weights.table.drop_below(step)


async def save_units(job: TrainingJob, weights: WeightHosts, state: TrainingState) -> Path:
    """Write a step folder.

    Raises:
        CheckpointSaveError: It cannot be written; those before it are untouched.
    """
    loop = asyncio.get_running_loop()
    dtype = _weight_dtype(job)

    def exported(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for unit in job.units:
            if unit.trained:
                exporting = asyncio.run_coroutine_threadsafe(weights.export(unit.name), loop)
                flat, optimizer_state = exporting.result()
                tensors = {name: torch.from_numpy(a.copy()) for name, a in optimizer_state.items()}
                write_optimizer_state(folder, unit.name, tensors)
                yield unit.name, as_tensor(flat, dtype)

    def write(folder: Path) -> None:
        if job.settings.lora is None:
            write_model(folder, job.checkpoint, job.units, exported(folder), dtype=dtype)
        else:
            write_adapter(
                folder,
                job.checkpoint,
                job.units,
                exported(folder),
                lora=job.settings.lora,
                base_model=str(job.checkpoint.path),
            )

    return await asyncio.to_thread(job.folder.save, state.step, write, state)


def _weight_dtype(job: TrainingJob) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, job.settings.optimizer.weight_dtype)
    return dtype
