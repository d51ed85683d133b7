"""The host's share of the weights: it adds up gradients and steps AdamW, unit by unit.

Bytes a trained parameter: the published weight (4 in float32, 2 in bfloat16; twice when
asynchronous, as devices still read the version before), with bfloat16 a residual of 2 (see
`masters`), the moments (8, or 2 and 1/32 in 8 bits), and the gradient sum (4 or 2). A published
tensor is never written again, so it may lie in read-only shared memory and be read at any time.

The n-th step of a unit takes the gradients of step n, counted from 0; its version after that is
n + 1. Calls must not overlap. All results are functions of the calls' arguments alone.

Shapes: N trained values of the unit; C values of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from actors.engine.chunks import Chunk, Scratch, chunks_of
from actors.engine.gradient_sum import GradientSum
from actors.engine.masters import join_master, split_master
from actors.engine.moments import (
    EightBitMoments,
    EightBitScratch,
    Float32Moments,
    Moments,
    restore_tensors,
)
from actors.engine.training_config import OptimizerSettings
from actors.engine.training_values import Unit

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class WrongStep(ValueError):
    """A gradient is not of the step that its unit takes next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBytes:
    """Bytes of the tensors that a shard holds."""

    weights: int
    """Of one published version."""
    versions: int
    """Published versions that are alive at once, at most: devices may still read the last."""
    residuals: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights * self.versions + self.residuals + self.gradients + self.moments


class _UnitState:
    """What is held of one unit."""

    def __init__(
        self, unit: Unit, settings: OptimizerSettings, eight_bit: EightBitScratch | None
    ) -> None:
        self.unit = unit
        self.chunks = tuple(chunks_of(unit.num_trained, unit.num_decayed))
        self.num_steps = 0
        self.published_N: torch.Tensor | None = None
        self.residual_N: torch.Tensor | None = None
        if settings.weight_dtype == "bfloat16":
            self.residual_N = torch.zeros(unit.num_trained, dtype=torch.int16)
        dtype = _DTYPES[settings.gradient_dtype]
        self.gradients = GradientSum(unit.num_trained, dtype, self.chunks)
        self.moments: Moments
        if eight_bit is None:
            self.moments = Float32Moments(unit.num_trained)
        else:
            num_blocks = self.chunks[-1].blocks.stop if self.chunks else 0
            self.moments = EightBitMoments(num_blocks, eight_bit)

    def published(self) -> torch.Tensor:
        if self.published_N is None:
            raise ValueError(f"{self.unit.name} has no weights yet: load or restore it first")
        return self.published_N

    def tensors(self) -> dict[str, torch.Tensor]:
        residual = {} if self.residual_N is None else {"residual": self.residual_N}
        return residual | self.moments.state()

    def check_complete(self) -> None:
        if not self.gradients.is_complete:
            raise ValueError(
                f"step {self.num_steps} of {self.unit.name} is not complete: "
                f"{self.gradients.missing}"
            )


class WeightShard:
    """Weights, gradients and AdamW state of some units, in host memory."""

    def __init__(self, units: Sequence[Unit], settings: OptimizerSettings) -> None:
        self._settings = settings
        self._weight_dtype = _DTYPES[settings.weight_dtype]
        self._scratch = Scratch()
        eight_bit = EightBitScratch() if settings.state == "8bit" else None
        self._units = {unit.name: _UnitState(unit, settings, eight_bit) for unit in units}

    def load(self, unit: str, trained: torch.Tensor) -> None:
        """Start a unit at version 0 from its flat weights, float32 or bfloat16."""
        held = self._held(unit)
        self._check_values(held, trained)
        trained_N = trained.detach()
        held.num_steps = 0
        held.gradients.clear()
        for tensor in held.moments.state().values():
            tensor.zero_()
        if held.residual_N is None or trained_N.dtype == torch.bfloat16:
            held.published_N = trained_N.to(self._weight_dtype, copy=True)
            if held.residual_N is not None:
                held.residual_N.zero_()
            return
        held.published_N = torch.empty_like(trained_N, dtype=self._weight_dtype)
        for chunk in held.chunks:
            self._split(held, chunk, trained_N[chunk.values], held.published_N)

    def published(self, unit: str) -> torch.Tensor:
        """Return the flat weights that devices are sent, in `weight_dtype`."""
        return self._held(unit).published()

    def adopt(self, unit: str, published: torch.Tensor) -> None:
        """Hold `published`, of the same values, instead of the shard's own; it is only read."""
        held = self._held(unit)
        self._check_published(held, published)
        held.published_N = published

    def version(self, unit: str) -> int:
        """Return how many steps the unit has taken."""
        return self._held(unit).num_steps

    def add(
        self, unit: str, step: int, order: int, gradient: torch.Tensor, *, expected: int
    ) -> bool:
        """Add one of the `expected` gradients of a step; return whether all are there.

        They are added in the order 0, 1, ... expected - 1. One that comes early is kept as it is,
        and must not change until then; one that came before is ignored.

        Raises:
            WrongStep: It is not of the step that the unit takes next.
            ValueError: Its shape, its order or `expected` does not fit.
        """
        held = self._held(unit)
        if step != held.num_steps:
            raise WrongStep(
                f"a gradient of step {step} of {unit} has arrived, and {unit} takes the gradients "
                f"of step {held.num_steps} now"
            )
        held.gradients.add(order, gradient, expected, self._scratch)
        return held.gradients.is_complete

    def squared_norm(self) -> dict[str, float]:
        """Return the sum of squares of each unit's gradients; not finite where one of them is not.

        Raises:
            ValueError: A unit's gradients have not all arrived.
        """
        for held in self._units.values():
            held.check_complete()
        return {
            name: held.gradients.squared_norm(self._scratch) for name, held in self._units.items()
        }

    def step(
        self, unit: str, *, learning_rate: float, scale: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Step a unit with its gradients x scale, forget them, and return the new weights.

        The weights published before stay as they are, and the new ones are a fresh tensor. With
        `out` they are written there, which saves the page faults of fresh memory (several times
        the time of AdamW itself): before its next use, `adopt` a copy of it.

        Raises:
            ValueError: Gradients are missing, or the scale or the learning rate is not finite.
        """
        held = self._held(unit)
        published_N = held.published()
        held.check_complete()
        if not (math.isfinite(scale) and math.isfinite(learning_rate)):
            raise ValueError(
                f"step {held.num_steps} of {unit} has scale {scale} and learning rate "
                f"{learning_rate}, which must be finite: its gradients are not, or the loss has "
                "diverged; lower optimizer.learning_rate"
            )
        if out is None:
            out = torch.empty_like(published_N)
        else:
            self._check_published(held, out)
        for chunk in held.chunks:
            self._step_chunk(held, chunk, learning_rate, scale, out)
        held.num_steps += 1
        held.published_N = out
        held.gradients.clear()
        return out

    def _step_chunk(
        self,
        held: _UnitState,
        chunk: Chunk,
        learning_rate: float,
        scale: float,
        out_N: torch.Tensor,
    ) -> None:
        settings = self._settings
        master_C = self._master(held, chunk, out_N)
        first_C, second_C = held.moments.read(chunk)
        adamw(
            [master_C],
            [held.gradients.scaled(chunk, scale, self._scratch)],
            [first_C],
            [second_C],
            [],
            [torch.tensor(float(held.num_steps))],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay if chunk.decayed else 0.0,
        )
        held.moments.write(chunk, (first_C, second_C), held.num_steps + 1)
        self._split(held, chunk, master_C, out_N)

    def _master(self, held: _UnitState, chunk: Chunk, out_N: torch.Tensor) -> torch.Tensor:
        """Return the float32 weights of a chunk: in place where they are published as such."""
        published_C = held.published()[chunk.values]
        if held.residual_N is None:
            return out_N[chunk.values].copy_(published_C)
        master_C = self._scratch.master_C[: chunk.num_values]
        bits_C = self._scratch.bits_C[: chunk.num_values]
        join_master(published_C, held.residual_N[chunk.values], master_C, bits_C)
        return master_C

    def _split(
        self, held: _UnitState, chunk: Chunk, master_C: torch.Tensor, out_N: torch.Tensor
    ) -> None:
        if held.residual_N is not None:
            bits_C = self._scratch.bits_C[: chunk.num_values]
            split_master(master_C, out_N[chunk.values], held.residual_N[chunk.values], bits_C)

    def state(self, unit: str) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs besides the published weights.

        The tensors are the shard's own: they change with the unit's next step.
        """
        held = self._held(unit)
        return {"steps": torch.tensor(held.num_steps), **held.tensors()}

    def restore(
        self, unit: str, published: torch.Tensor, state: Mapping[str, torch.Tensor]
    ) -> None:
        """Continue from published weights, held as in `adopt`, and a copy of `state`.

        Raises:
            ValueError: They were saved under other settings.
        """
        held = self._held(unit)
        self._check_published(held, published)
        tensors = self.state(unit)
        restore_tensors(tensors, state)
        held.published_N = published
        held.num_steps = int(tensors["steps"])
        held.gradients.clear()

    def host_bytes(self) -> HostBytes:
        """Return what is held, counted from the tensors; chunk buffers (some MiB) left out."""
        units = self._units.values()
        residuals = sum(u.residual_N.nbytes for u in units if u.residual_N is not None)
        return HostBytes(
            weights=sum(u.published_N.nbytes for u in units if u.published_N is not None),
            versions=2 if self._settings.asynchronous else 1,
            residuals=residuals,
            gradients=sum(u.gradients.num_bytes for u in units),
            moments=sum(t.nbytes for u in units for t in u.moments.state().values()),
        )

    def _held(self, unit: str) -> _UnitState:
        if unit not in self._units:
            raise ValueError(f"{unit!r} is not a unit of this shard, which has {[*self._units]}")
        return self._units[unit]

    def _check_values(self, held: _UnitState, values: torch.Tensor) -> None:
        if values.shape != (held.unit.num_trained,):
            raise ValueError(
                f"{held.unit.name} has {held.unit.num_trained} trained values in one dimension, "
                f"and a tensor of shape {tuple(values.shape)} was given"
            )
        if values.dtype not in _DTYPES.values():
            raise ValueError(f"weights of {held.unit.name} are {values.dtype}, not {[*_DTYPES]}")

    def _check_published(self, held: _UnitState, published: torch.Tensor) -> None:
        self._check_values(held, published)
        if published.dtype != self._weight_dtype:
            raise ValueError(
                f"weights of {held.unit.name} are {published.dtype}; with optimizer.weight_dtype "
                f"{self._settings.weight_dtype} they must be {self._weight_dtype}"
            )
