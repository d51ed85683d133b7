"""AdamW's two moments of one unit, in float32 or in 8 bits.

8 bits: each block of 256 values shares one float32 scale, its largest magnitude (block-wise
quantisation: Dettmers, Lewis, Shleifer and Zettlemoyer 2022, 8-bit Optimizers via Block-wise
Quantization, section 2.1). Codes are spaced evenly in the logarithm, so that a value a thousand
times smaller than its block's largest is held to the same few percent; evenly spaced values would
round it to zero. Two differences from the paper's dynamic codes:

- The second moment has no zero, because m / sqrt(0) is no update (Li, Chen and Zhu 2023, Memory
  Efficient Optimizers with 4-bit States: its zero-point problem). What is too small becomes the
  smallest code.
- The second moment is rounded up or down by turns, never simply to the nearest: with beta2 0.999
  one step moves it by less than half a code, and nearest would leave it where it is for ever. A
  value that lies 3% of the way to the next code is rounded up in 3% of the steps, by the additive
  recurrence frac(u + step / golden ratio), of low discrepancy (Kuipers and Niederreiter 1974,
  Uniform Distribution of Sequences, section 2.3). It is a function of step and place alone, so a
  resumed run repeats it. On random gradients that shrink by 0 to 1% a step, the updates of steps
  750 to 1500 were 52% too long with the nearest code, 49% with the nearest of the paper's, and
  0.3% with this.

Shapes: N trained values of the unit; C values of a chunk; B blocks of V values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from actors.engine.chunks import BLOCK_VALUES, CHUNK_VALUES, Chunk

FIRST_OCTAVES = 16
"""The first moment's 127 magnitudes reach down to 2^-16 of the block's largest; then 0."""
SECOND_OCTAVES = 24
"""The second moment's 256 codes reach down to 2^-24: gradients of 1/4096 of the largest."""
FIRST_CODES_PER_OCTAVE = 126 / FIRST_OCTAVES
SECOND_CODES_PER_OCTAVE = 255 / SECOND_OCTAVES

_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
_PLACES = 0.7548776662466927  # 1 / plastic number: the same recurrence, over places.
_TINY = torch.finfo(torch.float32).tiny


class Moments(Protocol):
    """Both moments, read and written one chunk at a time."""

    def read(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 first_C and second_C, to be updated in place."""

    def write(self, chunk: Chunk, moments_C: tuple[torch.Tensor, torch.Tensor], step: int) -> None:
        """Keep what `read` returned for this chunk, updated by `step`."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are held, by name."""


class Float32Moments:
    """As torch holds them."""

    def __init__(self, num_values: int) -> None:
        self._first_N = torch.zeros(num_values)
        self._second_N = torch.zeros(num_values)

    def read(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        return self._first_N[chunk.values], self._second_N[chunk.values]

    def write(self, chunk: Chunk, moments_C: tuple[torch.Tensor, torch.Tensor], step: int) -> None:
        """The chunks that were read are the moments themselves."""

    def state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": self._first_N, "exp_avg_sq": self._second_N}


class EightBitScratch:
    """Buffers and codebooks that all units of a host share."""

    def __init__(self) -> None:
        shape = (CHUNK_VALUES // BLOCK_VALUES, BLOCK_VALUES)
        self.first_BV = torch.empty(shape)
        self.second_BV = torch.empty(shape)
        self.ratio_BV = torch.empty(shape)
        self.index_C = torch.empty(CHUNK_VALUES, dtype=torch.int32)
        places_C = torch.arange(CHUNK_VALUES, dtype=torch.float64).mul_(_PLACES).frac_()
        self.places_BV = places_C.float().view(shape)
        self.dither_BV = torch.empty(shape)
        code = torch.arange(256, dtype=torch.float64)
        magnitude = torch.exp2(((code - 128).abs() - 127) / FIRST_CODES_PER_OCTAVE)
        self.first_values = ((code - 128).sign() * magnitude).float()
        self.second_values = torch.exp2((code - 255) / SECOND_CODES_PER_OCTAVE).float()


class EightBitMoments:
    """Codes and scales; the last block of decayed and of other values is filled up with zeros."""

    def __init__(self, num_blocks: int, scratch: EightBitScratch) -> None:
        self._scratch = scratch
        # Scales of 0 make every value 0, whatever its code.
        self._first_BV = torch.zeros((num_blocks, BLOCK_VALUES), dtype=torch.uint8)
        self._second_BV = torch.zeros((num_blocks, BLOCK_VALUES), dtype=torch.uint8)
        self._first_scales_B1 = torch.zeros(num_blocks, 1)
        self._second_scales_B1 = torch.zeros(num_blocks, 1)

    def read(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        scratch, blocks = self._scratch, chunk.blocks
        first_BV = self._decode(
            self._first_BV[blocks],
            self._first_scales_B1[blocks],
            scratch.first_values,
            scratch.first_BV,
        )
        second_BV = self._decode(
            self._second_BV[blocks],
            self._second_scales_B1[blocks],
            scratch.second_values,
            scratch.second_BV,
        )
        return first_BV.view(-1)[: chunk.num_values], second_BV.view(-1)[: chunk.num_values]

    def _decode(
        self,
        codes_BV: torch.Tensor,
        scales_B1: torch.Tensor,
        values: torch.Tensor,
        into_BV: torch.Tensor,
    ) -> torch.Tensor:
        into_BV = into_BV[: len(codes_BV)]
        index_C = self._scratch.index_C[: codes_BV.numel()].copy_(codes_BV.view(-1))
        torch.index_select(values, 0, index_C, out=into_BV.view(-1))
        return into_BV.mul_(scales_B1)

    def write(self, chunk: Chunk, moments_C: tuple[torch.Tensor, torch.Tensor], step: int) -> None:
        scratch, blocks = self._scratch, chunk.blocks
        num_blocks = blocks.stop - blocks.start
        first_BV, second_BV = scratch.first_BV[:num_blocks], scratch.second_BV[:num_blocks]
        # What only fills the last block up must not set its scale. First moments stay 0 there.
        second_BV.view(-1)[chunk.num_values :] = 0

        log_BV = self._log2_ratio(first_BV, self._first_scales_B1[blocks])
        log_BV.mul_(FIRST_CODES_PER_OCTAVE).add_(127.5).floor_().clamp_(min=0)
        self._first_BV[blocks] = log_BV.copysign_(first_BV).add_(128)

        dither_BV = torch.add(
            scratch.places_BV[:num_blocks],
            step / _GOLDEN_RATIO % 1,
            out=scratch.dither_BV[:num_blocks],
        ).frac_()
        log_BV = self._log2_ratio(second_BV, self._second_scales_B1[blocks])
        log_BV.mul_(SECOND_CODES_PER_OCTAVE).add_(255).add_(dither_BV).floor_().clamp_(0, 255)
        self._second_BV[blocks] = log_BV

    def _log2_ratio(self, values_BV: torch.Tensor, scales_B1: torch.Tensor) -> torch.Tensor:
        """Set the scales; return log2 |value / scale|, at most 0, -inf for a value of 0."""
        ratio_BV = torch.abs(values_BV, out=self._scratch.ratio_BV[: len(values_BV)])
        scales_B1.copy_(ratio_BV.amax(dim=1, keepdim=True))
        return ratio_BV.div_(scales_B1.clamp_min(_TINY)).log2_()

    def state(self) -> dict[str, torch.Tensor]:
        return {
            "exp_avg_codes": self._first_BV,
            "exp_avg_scales": self._first_scales_B1,
            "exp_avg_sq_codes": self._second_BV,
            "exp_avg_sq_scales": self._second_scales_B1,
        }


def restore_tensors(held: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors over the held ones of the same names.

    Raises:
        ValueError: Names, shapes or types differ: they were saved under other settings.
    """
    told = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()}
    wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
    if told != wanted:
        raise ValueError(
            f"saved optimizer state {told} is not the state {wanted} of these settings; resume "
            "with the optimizer.state and optimizer.weight_dtype that it was saved with"
        )
    for name, tensor in held.items():
        tensor.copy_(saved[name])
