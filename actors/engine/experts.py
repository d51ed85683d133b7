"""Mixture-of-experts behind transformers' ExpertsInterface.

The expert function `motley_experts` groups rows by expert, runs each expert's two matrices once on
all its rows, and combines a token's experts in the router's order, so that a token's result does
not depend on who else is in the batch. The module supplies weights and gating (plain, biased,
transposed or interleaved layouts), as transformers defines them.

Shapes: T tokens, K experts a token, S = T * K routed rows, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface

EXPERTS_NAME = "motley_experts"


def motley_experts(
    module: Any,
    hidden_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Return the routed experts' weighted sum, (T, H)."""
    num_tokens, top_k = top_k_index_TK.shape
    expert_S, order_S = top_k_index_TK.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert_S, minlength=module.num_experts).tolist()
    if torch.is_grad_enabled():
        out_SH = _differentiable(module, hidden_TH, order_S, counts)
    else:
        out_SH = _inferred(module, hidden_TH[order_S // top_k], counts)
    routed = torch.empty_like(out_SH)
    routed[order_S] = out_SH
    weighted = routed.view(num_tokens, top_k, -1) * top_k_weights_TK[..., None]
    return weighted.sum(dim=1).to(hidden_TH.dtype)


def _inferred(module: Any, rows_SH: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Run the experts that have rows, which are sorted by expert."""
    out_SH = torch.empty_like(rows_SH)
    weights_E = _weights(module)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            weights = [None if of_all is None else of_all[expert] for of_all in weights_E]
            out_SH[start:end] = _expert(module, weights, rows_SH[start:end])
            start = end
    return out_SH


def _differentiable(
    module: Any, hidden_TH: torch.Tensor, order_S: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """Do the same with operations whose gradients are cheap.

    The gradient of picking one expert is as large as all of them, that of taking them apart is
    not; the gradient of scattering distinct rows is a plain gather.
    """
    num_tokens, width = hidden_TH.shape
    top_k = order_S.numel() // num_tokens
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    rows_SH = hidden_TH.new_empty(order_S.numel(), width)
    rows_SH[place_S] = hidden_TH[:, None].expand(-1, top_k, -1).reshape(-1, width)
    apart = [
        [None] * len(counts) if of_all is None else of_all.unbind() for of_all in _weights(module)
    ]
    outs = [
        _expert(module, weights, rows)
        for *weights, rows, count in zip(*apart, torch.split(rows_SH, counts), counts, strict=True)
        if count
    ]
    return torch.cat(outs)


def _weights(module: Any) -> tuple[torch.Tensor | None, ...]:
    """The gate-up matrices, the down matrices, and the biases of both; each over experts."""
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    return module.gate_up_proj, module.down_proj, *biases


def _expert(module: Any, weights: Sequence[Any], rows: torch.Tensor) -> torch.Tensor:
    gate_up, down, gate_up_bias, down_bias = weights
    hidden = _linear(rows, gate_up, gate_up_bias, module.is_transposed)
    return _linear(module._apply_gate(hidden), down, down_bias, module.is_transposed)


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    return functional.linear(rows, weight.t() if is_transposed else weight, bias)


ExpertsInterface.register(EXPERTS_NAME, motley_experts)
