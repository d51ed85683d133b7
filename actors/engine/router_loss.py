"""The load-balancing loss of mixtures of experts, split over the layers of a pool.

transformers' `load_balancing_loss_func` (Switch Transformers, arXiv 2101.03961, equations 4 to 6)
is experts x sum over experts of f_e P_e, where f_e is the share of choices and P_e the mean
probability of expert e over the rows of all layers together. Its gradient goes through P_e alone,
so once the counts of all layers are known, every layer's gradient is its own affair.

Shapes: S rows of a micro-batch, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from actors.engine.training_values import RouterLoads


class RouterLogits:
    """Catches what the routers of a model say, as transformers records it."""

    def __init__(self, model: Any) -> None:
        self.top_k = int(getattr(model.config, "num_experts_per_tok", 0) or 0)
        self.has_routers = False
        self._caught: list[torch.Tensor] = []
        recorder = (model._can_record_outputs or {}).get("router_logits")
        if recorder is None:
            return
        index = recorder.index
        for module in model.modules():
            if isinstance(module, recorder.target_class):
                self.has_routers = True
                module.register_forward_hook(
                    lambda _module, _inputs, output: self._caught.append(output[index])
                )

    @contextmanager
    def caught(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list to which every layer that runs in the block adds its logits, (S, E)."""
        self._caught = []
        try:
            yield self._caught
        finally:
            self._caught = []


def router_loads(
    logits_SE: Sequence[torch.Tensor], real_S: torch.Tensor, top_k: int
) -> RouterLoads | None:
    """Return the loads of some layers over the rows marked in `real_S`; None of no layers."""
    if not logits_SE:
        return None
    num_experts = logits_SE[0].shape[-1]
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=real_S.device)
    sums_E = torch.zeros(num_experts, dtype=torch.float64, device=real_S.device)
    marks = real_S.to(torch.int64).repeat_interleave(top_k)
    for logits in logits_SE:
        probabilities_SE = logits.detach().float().softmax(-1)
        chosen_SK = probabilities_SE.topk(top_k, dim=-1).indices
        counts_E.scatter_add_(0, chosen_SK.flatten(), marks)
        sums_E += (probabilities_SE * real_S[:, None]).sum(0, dtype=torch.float64)
    return RouterLoads(
        counts_E=counts_E.cpu().numpy().astype(np.float64),
        probabilities_E=sums_E.cpu().numpy(),
        rows=int(real_S.sum()) * len(logits_SE),
    )


def router_weights(loads: RouterLoads, scale: float, device: torch.device) -> torch.Tensor:
    """Return the derivative of scale x loss by each expert's summed probability, (E)."""
    weights_E = scale * len(loads.counts_E) * loads.counts_E / max(1, loads.rows) ** 2
    return torch.from_numpy(weights_E).to(device, torch.float32)


def router_gradient(
    logits_SE: torch.Tensor, real_S: torch.Tensor, weights_E: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of sum over real rows of softmax(logits) . weights, (S, E)."""
    probabilities_SE = logits_SE.detach().float().softmax(-1)
    mean_S1 = (probabilities_SE @ weights_E)[:, None]
    gradient_SE = probabilities_SE * (weights_E - mean_S1) * real_S[:, None]
    return gradient_SE.to(logits_SE.dtype)
