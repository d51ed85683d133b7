"""Mixture-of-experts behind transformers' ExpertsInterface.

The expert function `motley_experts` groups rows by expert, runs each expert's two matrices once on
all its rows, and combines a token's experts in the router's order, so that a token's result does
not depend on who else is in the batch. The module supplies weights and gating (plain, biased,
transposed or interleaved layouts), as transformers defines them.

Shapes: T tokens, K experts a token, S = T * K routed rows, H hidden, I intermediate.
"""

from __future__ import annotations

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
    rows_SH = hidden_TH[order_S // top_k]
    out_SH = torch.empty_like(rows_SH)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            out_SH[start:end] = _expert(module, expert, rows_SH[start:end])
            start = end
    routed = torch.empty_like(out_SH)
    routed[order_S] = out_SH
    weighted = routed.view(num_tokens, top_k, -1) * top_k_weights_TK[..., None]
    return weighted.sum(dim=1).to(hidden_TH.dtype)


def _expert(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    gate_up_bias = module.gate_up_proj_bias[expert] if module.has_bias else None
    down_bias = module.down_proj_bias[expert] if module.has_bias else None
    hidden = _linear(rows, module.gate_up_proj[expert], gate_up_bias, module.is_transposed)
    gated = module._apply_gate(hidden)
    return _linear(gated, module.down_proj[expert], down_bias, module.is_transposed)


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    return functional.linear(rows, weight.t() if is_transposed else weight, bias)


ExpertsInterface.register(EXPERTS_NAME, motley_experts)
