"""The gradients of one unit of one optimizer step, added in a fixed order.

A sum of floats depends on the order of its terms. Gradients are numbered within their step, and one
that arrives before its turn waits, so the sum is the same to the bit whichever device was faster.

Shapes: N trained values of the unit; C values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.engine.chunks import Chunk, Scratch


class GradientSum:
    """Adds in float32; bfloat16 sums are rounded after every addition."""

    def __init__(self, num_values: int, dtype: torch.dtype, chunks: Sequence[Chunk]) -> None:
        self._sum_N = torch.empty(num_values, dtype=dtype)
        self._chunks = chunks
        self._early: dict[int, torch.Tensor] = {}
        self._num_added = 0
        self._expected: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every gradient was added; a unit that trains nothing expects none."""
        return self._num_added == self._expected or not len(self._sum_N)

    @property
    def missing(self) -> str:
        if self._expected is None:
            return "no gradient has arrived"
        arrived = self._num_added + len(self._early)
        return f"{arrived} of {self._expected} gradients have arrived"

    @property
    def num_bytes(self) -> int:
        return self._sum_N.nbytes

    def add(self, order: int, gradient_N: torch.Tensor, expected: int, scratch: Scratch) -> None:
        """Add number `order` of `expected`; one that was given before is ignored.

        Raises:
            ValueError: Its order, its length or `expected` does not fit the others.
        """
        if gradient_N.shape != self._sum_N.shape or not gradient_N.is_floating_point():
            raise ValueError(
                f"a gradient of {gradient_N.dtype} and shape {tuple(gradient_N.shape)} is not one "
                f"of {len(self._sum_N)} trained values"
            )
        if not 0 <= order < expected or self._expected not in (None, expected):
            raise ValueError(
                f"gradient {order} of {expected} does not fit: orders count from 0, and "
                f"{self._expected or expected} gradients make this step"
            )
        self._expected = expected
        if order >= self._num_added:
            self._early.setdefault(order, gradient_N)
        while (next_N := self._early.pop(self._num_added, None)) is not None:
            self._add(next_N.detach(), scratch)
            self._num_added += 1

    def _add(self, gradient_N: torch.Tensor, scratch: Scratch) -> None:
        if self._num_added == 0:
            self._sum_N.copy_(gradient_N)
        elif self._sum_N.dtype == gradient_N.dtype == torch.float32:
            self._sum_N.add_(gradient_N)
        else:
            for chunk in self._chunks:
                sum_C = scratch.master_C[: chunk.num_values].copy_(self._sum_N[chunk.values])
                term_C = scratch.gradient_C[: chunk.num_values].copy_(gradient_N[chunk.values])
                self._sum_N[chunk.values] = sum_C.add_(term_C)

    def scaled(self, chunk: Chunk, scale: float, scratch: Scratch) -> torch.Tensor:
        """Return the sum x scale in float32, to be read before the next chunk's."""
        sum_C = self._sum_N[chunk.values]
        if scale == 1 and sum_C.dtype == torch.float32:
            return sum_C
        scaled_C = scratch.gradient_C[: chunk.num_values]
        if sum_C.dtype == torch.float32:
            return torch.mul(sum_C, scale, out=scaled_C)
        return scaled_C.copy_(sum_C).mul_(scale)

    def squared_norm(self, scratch: Scratch) -> float:
        """Return the sum of squares, added in float64: not finite where a gradient is not."""
        total = 0.0
        for chunk in self._chunks:
            double_C = scratch.double_C[: chunk.num_values].copy_(self._sum_N[chunk.values])
            total += torch.dot(double_C, double_C).item()
        return total

    def clear(self) -> None:
        self._early.clear()
        self._num_added = 0
        self._expected = None
