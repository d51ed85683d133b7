"""Float32 master weights as the bfloat16 that devices are sent, and the rest in 16 bits.

Read as integers, the bfloat16 nearest to a float32 `bits`, halves away from zero, is its upper half
(bits + 0x8000) >> 16. What that lacks, bits - (upper << 16), is the lower half taken for a signed
int16, in [-0x8000, 0x7fff], so the sum gives every bit back. Rounding halves to even would need
+0x8000 too. Integer arithmetic alone: a cast of floats may flush subnormal numbers.

Shapes: C values of a chunk.
"""

from __future__ import annotations

import torch


def join_master(
    published_C: torch.Tensor,
    residual_C: torch.Tensor,
    master_C: torch.Tensor,
    bits_C: torch.Tensor,
) -> None:
    """Write the float32 weights into `master_C`; `bits_C` (int32) is overwritten."""
    master_bits_C = master_C.view(torch.int32)
    bits_C.copy_(published_C.view(torch.int16))
    master_bits_C.copy_(residual_C).add_(bits_C, alpha=1 << 16)


def split_master(
    master_C: torch.Tensor,
    published_C: torch.Tensor,
    residual_C: torch.Tensor,
    bits_C: torch.Tensor,
) -> None:
    """Write bfloat16 `published_C` and int16 `residual_C`; `bits_C` (int32) is overwritten."""
    master_bits_C = master_C.view(torch.int32)
    residual_C.copy_(master_bits_C)  # To an int16 goes the lower half.
    torch.add(master_bits_C, 0x8000, out=bits_C).bitwise_right_shift_(16)
    published_C.view(torch.int16).copy_(bits_C)
