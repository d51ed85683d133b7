"""What there is to place: the cost figures of one model, and the load it is planned for.

Figures per token and per layer; how they become seconds and bytes is in `placement.costs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Objective = Literal["throughput", "latency", "energy"]
"""What a serving plan minimises: the period of a step, its latency, or its joules."""
DeviceOrder = Literal["given", "free"]
"""Whether stages keep the order of the devices, or take the order that is best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One decoder layer, the embedding, or the head."""

    flops_per_token: float
    """Multiplications and additions of one row, without attention scores; for a layer with
    experts those of the `experts_per_token` chosen ones."""
    weight_bytes: int
    """All weights, routed experts included."""
    kv_bytes_per_token: int = 0
    attention_flops_per_context_token: float = 0.0
    """Scores and their product with the values, for one row and one token of its context."""
    routed_bytes: int = 0
    """The part of `weight_bytes` that belongs to routed experts."""
    num_experts: int = 0
    experts_per_token: int = 0
    activation_bytes_per_token: int = 0
    """What one row leaves behind for the backward pass, attention scores not counted."""
    score_bytes_per_token_pair: int = 0
    """Attention scores and probabilities of one row and one context token, kept for the backward
    pass where the attention materialises them; 0: it does not (flash, SDPA)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} ({value}) must be 0 or more and finite")
        if self.routed_bytes > self.weight_bytes:
            raise ValueError(
                f"routed_bytes ({self.routed_bytes}) is a part of weight_bytes "
                f"({self.weight_bytes}) and cannot exceed it"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must be at most num_experts "
                f"({self.num_experts})"
            )
        if self.routed_bytes and not self.experts_per_token:
            raise ValueError(
                f"routed_bytes is {self.routed_bytes} but experts_per_token is 0; "
                f"set num_experts and experts_per_token, or routed_bytes=0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """The cost figures of one checkpoint in one number format.

    `embedding` runs on the stage that owns layer 0 and `head` on the stage that owns the last
    layer. An embedding computes nothing and reads one row per token, yet all of its
    `weight_bytes` occupy memory. The head runs on sampled rows only.
    """

    name: str
    embedding: LayerCost
    layers: tuple[LayerCost, ...]
    head: LayerCost
    hidden_bytes_per_token: int
    head_is_embedding: bool = False
    """The head's matrix is the embedding's (tied): a stage that owns both holds it once."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"{self.name}: 0 layers; a profile needs at least 1")
        for index, layer in enumerate(self.layers):
            if not layer.weight_bytes:
                raise ValueError(f"{self.name}: layer {index} has 0 weight_bytes; give its weights")
        if self.hidden_bytes_per_token <= 0:
            raise ValueError(
                f"{self.name}: hidden_bytes_per_token ({self.hidden_bytes_per_token}) "
                f"must be above 0"
            )
        if self.embedding.flops_per_token:
            raise ValueError(
                f"{self.name}: embedding.flops_per_token ({self.embedding.flops_per_token:g}) "
                f"must be 0: an embedding only reads rows"
            )
        for part, cost in (("embedding", self.embedding), ("head", self.head)):
            if cost.kv_bytes_per_token:
                raise ValueError(
                    f"{self.name}: {part}.kv_bytes_per_token ({cost.kv_bytes_per_token}) "
                    f"must be 0: only decoder layers keep KV"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWorkload:
    """The load a serving plan is made for."""

    lanes: int
    """Batches in flight at once."""
    sequences_per_lane: int
    """Sequences that decode together in one step of one lane."""
    context_tokens_per_sequence: int
    kv_tokens: int
    """KV tokens to reserve on every stage, summed over the lanes."""
    step_tokens: int
    """Most rows of one step (prompt chunks included); sizes the activations."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} ({value}) must be at least 1")
        if self.step_tokens < self.sequences_per_lane:
            raise ValueError(
                f"step_tokens ({self.step_tokens}) must be at least sequences_per_lane "
                f"({self.sequences_per_lane}): every decode of a step is a row"
            )

    @property
    def context_tokens(self) -> int:
        """Context of one step: summed over the sequences of one lane."""
        return self.sequences_per_lane * self.context_tokens_per_sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWorkload:
    """The load a training plan is made for."""

    micro_batches: int
    """Of one round: what visits every slot before the next round begins."""
    sequences_per_micro_batch: int
    sequence_tokens: int
    trained_fraction: float = 1.0
    """Share of the weights that has gradients: 1 for full fine-tuning, little for adapters."""
    moment_bytes_per_parameter: float = 8.0
    """Optimizer state on the host beside the master weights: 8 for AdamW in float32."""
    master_bytes_per_parameter: float = 4.0
    """Master weights on the host when they are kept in another format; 0: the weights serve."""

    def __post_init__(self) -> None:
        for name in ("micro_batches", "sequences_per_micro_batch", "sequence_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0.0 <= self.trained_fraction <= 1.0:
            raise ValueError(f"trained_fraction ({self.trained_fraction}) must be from 0 to 1")
        for name in ("moment_bytes_per_parameter", "master_bytes_per_parameter"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({value}) must be 0 or more and finite")

    @property
    def tokens(self) -> int:
        """Rows of one micro-batch."""
        return self.sequences_per_micro_batch * self.sequence_tokens

    @property
    def context_tokens(self) -> int:
        """KV tokens that the rows of one micro-batch attend to, in sum (causal attention)."""
        return (
            self.sequences_per_micro_batch * self.sequence_tokens * (self.sequence_tokens + 1) // 2
        )
