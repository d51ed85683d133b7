"""How much shared memory a run needs for weights, gradients and activations on their way."""

from __future__ import annotations

from pathlib import Path

from cluster.config import ConfigError, MotleyConfig
from cluster.training.job import TrainingJob

_SPARE_BYTES = 128 * 2**20
_MOST_OF_MEMORY = 0.6
_MOST_ROUNDS = 4


def needed_bytes(job: TrainingJob) -> int:
    """Return the object store that a run asks for, counted generously.

    Two versions of the weights; the gradients of all units once (those of a round are taken up
    before the next ones come); activations in front of every layer, and their gradients, for the
    rounds that are in flight at once: few, however many a step has.
    """
    settings = job.settings
    width = 2 if settings.optimizer.weight_dtype == "bfloat16" else 4
    trained = sum(unit.num_trained for unit in job.units)
    frozen = sum(unit.num_frozen for unit in job.units)
    rows = settings.micro_batches * settings.sequences_per_micro_batch * settings.sequence_tokens
    boundary_bytes = rows * int(job.checkpoint.config["hidden_size"]) * 4
    rounds = min(_MOST_ROUNDS, settings.rounds_per_step * (1 + settings.optimizer.asynchronous))
    activation_bytes = rounds * 2 * (job.checkpoint.num_layers + 1) * boundary_bytes
    return 2 * width * trained + width * frozen + 4 * trained + activation_bytes + _SPARE_BYTES


def with_object_store(job: TrainingJob) -> MotleyConfig:
    """Return the settings with an object store that is large enough for a Ray started here.

    Raises:
        ConfigError: This machine has not the memory.
    """
    config, needed = job.config, needed_bytes(job)
    if config.ray.object_store_bytes is not None:
        return config
    most = int(_memory_bytes() * _MOST_OF_MEMORY)
    if needed > most:
        raise ConfigError(
            f"training needs about {needed} bytes of shared memory for weights, gradients and "
            f"activations; {_MOST_OF_MEMORY:.0%} of this machine's memory is {most}. Lower "
            f"training.micro_batches or training.sequence_tokens, use "
            f"training.optimizer.weight_dtype: bfloat16 or training.lora, or set "
            f"ray.object_store_bytes to try with less (Ray then spills to disk)"
        )
    ray_settings = config.ray.model_copy(update={"object_store_bytes": needed})
    return config.model_copy(update={"ray": ray_settings})


def _memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo does not tell the memory; set ray.object_store_bytes")
