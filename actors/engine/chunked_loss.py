"""Cross-entropy over a large vocabulary whose logits never exist all at once.

The head runs on some rows at a time, forward and backward, so that memory holds the logits of one
chunk. Rows without a target are not multiplied at all.

Shapes: B sequences, T rows each, S = B * T, R rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from actors.engine.training_values import IGNORED, Tokens


@dataclass(frozen=True, slots=True)
class ChunkedLoss:
    """The summed loss of a micro-batch's target tokens, and its gradient."""

    loss_sum: float
    """Not scaled."""
    num_targets: int
    gradient_BTH: torch.Tensor | None
    """Of the hidden, scaled; None where no gradient was asked for."""


def chunked_cross_entropy(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_BTH: torch.Tensor,
    targets_BT: Tokens,
    *,
    chunk_tokens: int,
    scale: float | None,
) -> ChunkedLoss:
    """Return the summed cross-entropy, in float32, of `logits_of(rows_RH)`, (R, V).

    With `scale` the gradients of scale x loss are added to the parameters of `logits_of`, as a
    backward pass does, and returned for the hidden; None: the loss alone.
    """
    hidden_SH = hidden_BTH.detach().flatten(0, 1)
    gradient_SH = torch.zeros_like(hidden_SH)
    targets = targets_BT.reshape(-1)
    picked = np.flatnonzero(targets != IGNORED)
    loss_sum = torch.zeros((), dtype=torch.float64, device=hidden_SH.device)
    for start in range(0, len(picked), chunk_tokens):
        chunk = picked[start : start + chunk_tokens]
        rows_R = torch.from_numpy(chunk).to(hidden_SH.device)
        targets_R = torch.from_numpy(targets[chunk]).to(hidden_SH.device)
        rows_RH = hidden_SH[rows_R].requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None):
            logits_RV = logits_of(rows_RH).float()
            loss = functional.cross_entropy(logits_RV, targets_R, reduction="sum")
        loss_sum += loss.detach()
        if scale is not None:
            torch.autograd.backward(loss, torch.full_like(loss, scale))
            assert rows_RH.grad is not None
            gradient_SH[rows_R] = rows_RH.grad
    return ChunkedLoss(
        loss_sum=float(loss_sum),
        num_targets=len(picked),
        gradient_BTH=None if scale is None else gradient_SH.view_as(hidden_BTH),
    )
