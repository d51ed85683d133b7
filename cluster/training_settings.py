"""The `training` section of the settings. Loads without torch, Ray or transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engine.training_config import LoraSettings, OptimizerSettings


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(_Settings):
    """What is learnt from."""

    train: tuple[Path, ...] = Field(min_length=1)
    """Files or folders: .txt (a file is one document), .jsonl (a line is one), or a folder written
    by `datasets`' save_to_disk."""
    held_out: tuple[Path, ...] = ()
    """The same, never learnt from, even where `train` names them too; empty: the validation or test
    split beside a train split, else `held_out_fraction` of the documents of `train`."""
    held_out_fraction: float = Field(0.01, ge=0, lt=1)
    """At least one document of two or more; 0: none."""
    format: Literal["auto", "text", "jsonl", "datasets"] = "auto"
    """auto: by the name, else by how a file begins. text: also every other file of a folder."""
    text_field: str = "text"
    """Of a record that is neither prompt and completion nor messages."""
    train_on_prompts: bool = False
    """Count prompts and other people's messages in the loss too."""
    shuffle: bool = True


class CutSettings(_Settings):
    """The slots of a round, given instead of planned."""

    forward: tuple[int, ...]
    """Layers of each forward slot, from layer 0 up."""
    fused: int = Field(ge=0)
    """Layers of the fused slot, the last ones; 0: the head alone."""
    backward: tuple[int, ...]
    """Layers of each backward slot, from the fused slot down to layer 0."""
    grain: Literal["stage", "layer", "keep"] = "stage"
    """Of every backward slot: what is recomputed at once, or nothing."""


class TrainingSettings(_Settings):
    """One fine-tuning run; what `motley plan --training` predicts and `motley train` does."""

    data: DataSettings | None = None
    """Needed by `motley train` alone."""
    output: Path | None = None
    """Folder for checkpoints and logs; needed by `motley train` alone."""
    steps: int = Field(100, ge=1)
    """Optimizer steps."""
    seed: int = Field(0, ge=0)

    micro_batches: int = Field(8, ge=1)
    """Of one round; at least as many as devices keeps an equal pool busy."""
    sequences_per_micro_batch: int = Field(1, ge=1)
    sequence_tokens: int = Field(2048, ge=2)
    rounds_per_step: int = Field(4, ge=1)
    """Rounds that accumulate gradients for one optimizer step; several leave unequal devices less
    idle, since a step's gradients may be one step old and no older."""
    trained_fraction: float = Field(1.0, ge=0, le=1)
    """Share of the weights that has gradients, to plan with; `motley train` counts it itself."""

    cut: CutSettings | None = None
    """Force the slots; null: they are planned."""

    lora: LoraSettings | None = None
    """Train adapters; null: all weights."""
    experts: Literal["layers", "shards"] = "layers"
    """Of a mixture of experts. layers: experts are brought to a device with their layer. shards:
    they are frozen and stay where they are, spread over half the memory of all devices; only their
    rows travel. Needs `lora`."""
    optimizer: OptimizerSettings = OptimizerSettings()
    router_loss_coefficient: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of the load-balancing loss of mixtures of experts; null: the checkpoint's own."""
    loss_chunk_tokens: int = Field(1024, ge=1)
    """Rows whose logits exist at once."""

    evaluate_every_steps: int | None = Field(None, ge=1)
    evaluate_sequences: int = Field(64, ge=1)
    """Held-out sequences of one evaluation, at most."""
    checkpoint_every_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many stay."""

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees."""
        return self.sequences_per_micro_batch * self.micro_batches * self.rounds_per_step

    @model_validator(mode="after")
    def _frozen_experts_stay(self) -> Self:
        if self.experts == "shards" and self.lora is None:
            raise ValueError(
                "experts: shards keeps them frozen, and without lora all weights are trained; set "
                "lora, or experts: layers"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be at most steps "
                f"({self.steps})"
            )
        return self
