"""A training job before it starts: checkpoint, units, data and run folder, all checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine.checkpoint import Checkpoint
from actors.engine.trainable import training_units
from actors.engine.training_values import Unit
from cluster.config import ConfigError, MotleyConfig
from cluster.training.checkpoints import RunFolder, TrainingState, fixed_settings
from cluster.training.data import read_documents
from cluster.training.packing import Batches
from cluster.training_settings import TrainingSettings


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a run needs from this machine's disk."""

    config: MotleyConfig
    checkpoint: Checkpoint
    units: tuple[Unit, ...]
    batches: Batches
    held_out: Batches | None
    num_left_out: int
    """Records with nothing to learn."""
    folder: RunFolder
    resumed_from: Path | None
    state: TrainingState | None
    fixed: dict[str, Any]
    """What must not change when the run is resumed."""

    @property
    def settings(self) -> TrainingSettings:
        return self.config.training

    @property
    def first_step(self) -> int:
        """Steps that are done already."""
        return 0 if self.state is None else self.state.step

    @property
    def is_tied(self) -> bool:
        """The head's matrix is the embedding's."""
        return not self.checkpoint.has_own_head

    @property
    def router_loss_coefficient(self) -> float:
        """0 for a model without experts."""
        declared = self.checkpoint.config.get("router_aux_loss_coef", 0.0)
        chosen = self.settings.router_loss_coefficient
        return float(declared if chosen is None else chosen)


def open_job(config: MotleyConfig, *, resume: bool) -> TrainingJob:
    """Open a job; nothing is started or written but the run's folder.

    Raises:
        ConfigError, CheckpointError, DataError, RunFolderError: Something does not do.
    """
    settings = config.training
    if settings.data is None or settings.output is None:
        missing = [name for name in ("data", "output") if getattr(settings, name) is None]
        raise ConfigError(
            f"{' and '.join(f'training.{name}' for name in missing)} must be set to train"
        )
    checkpoint = Checkpoint.open(
        config.model, allow_unverified=config.engine.allow_unverified_architectures
    )
    if settings.lora is not None and "lm_head" in settings.lora.target_modules:
        raise ConfigError(
            "training.lora.target_modules: an adapter on lm_head cannot be served; leave it out"
        )
    units = training_units(
        checkpoint, settings.lora, experts_elsewhere=settings.experts == "shards"
    )
    data = settings.data
    if settings.evaluate_every_steps is None:
        # Nothing is kept from learning that nobody looks at.
        data = data.model_copy(update={"held_out_fraction": 0.0})
    documents = read_documents(data, checkpoint.path, sequence_tokens=settings.sequence_tokens)
    if settings.evaluate_every_steps is not None and not len(documents.held_out):
        raise ConfigError(
            f"training.evaluate_every_steps is {settings.evaluate_every_steps}, but none of the "
            f"{len(documents.train)} documents is held out; name some in training.data.held_out"
        )

    def batches_of(part: Any) -> Batches:
        return Batches(
            part,
            sequence_tokens=settings.sequence_tokens,
            sequences_per_micro_batch=settings.sequences_per_micro_batch,
            seed=settings.seed,
            shuffle=settings.data is not None and settings.data.shuffle,
        )

    batches = batches_of(documents.train)
    fixed = fixed_settings(
        settings,
        model=str(checkpoint.path),
        documents=len(documents.train),
        tokens=batches.num_tokens,
        data_digest=hashlib.sha256(documents.train.tokens.tobytes()).hexdigest()[:16],
    )
    folder = RunFolder(settings.output, keep=settings.keep_checkpoints)
    resumed_from = folder.start(resume=resume)
    state = None
    if resumed_from is not None:
        state = folder.load_state(resumed_from)
        # The number format is known when the devices are.
        state.check_same(fixed | {"compute_dtype": state.settings.get("compute_dtype")})
        if state.step > settings.steps:
            raise ConfigError(
                f"training.steps ({settings.steps}) is less than the {state.step} steps of "
                f"{resumed_from}; raise it, or set training.output to a new folder"
            )
    return TrainingJob(
        config=config,
        checkpoint=checkpoint,
        units=units,
        batches=batches,
        held_out=batches_of(documents.held_out) if len(documents.held_out) else None,
        num_left_out=documents.num_left_out,
        folder=folder,
        resumed_from=resumed_from,
        state=state,
        fixed=fixed,
    )
