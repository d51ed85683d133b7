"""How training computes: the settings that `actors` owns. Loads without torch or Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSettings(_Settings):
    """Low-rank adapters on chosen linear layers; everything else is frozen."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Last parts of module names, as PEFT takes them."""


class OptimizerSettings(_Settings):
    """AdamW on the host."""

    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """The peak, after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Of the peak: where the cosine ends."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Of matrices only; norms and biases are left alone."""
    clip_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients of a larger norm are scaled down to it; null: never."""
    asynchronous: bool = False
    """Step while the next step's rounds run: faster, and gradients are one step old, no older.
    Off: equal to plain AdamW."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """What devices are sent and what a checkpoint holds. With bfloat16 the rest of the float32
    master weight stays on the host (two more bytes)."""
    state: Literal["float32", "8bit"] = "float32"
    """Of AdamW's two moments: 8 bytes a parameter, or 2."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the host sums the gradients of a step."""
