"""Mixture-of-experts behind transformers' ExpertsInterface.

The expert function `motley_experts` groups rows by expert, runs each expert's two matrices once on
all its rows, and combines a token's experts in the router's order, so that a token's result does
not depend on who else is in the batch. The module supplies weights and gating (plain, biased,
transposed or interleaved layouts), as transformers defines them.

Where a dispatcher is lent to the module, the experts are elsewhere: it gets the sorted rows and
returns them computed. They are combined here in the same order, so tokens do not depend on where
experts are. (A matrix product may differ in its last bits with its number of rows, so rows of one
expert that are split over replicas may, as they do between batches.)

Shapes: T tokens, K experts a token, S = T * K routed rows, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.integrations.moe import ExpertsInterface

EXPERTS_NAME = "motley_experts"
_LENT = "motley_dispatch"
"""Attribute of a module whose experts are elsewhere."""


class ExpertDispatcher(Protocol):
    """Runs rows through experts, wherever they are.

    Rows (S, H) are sorted by expert; `counts_E[expert]` of them belong to each, S in all.
    """

    @property
    def is_frozen(self) -> bool:
        """Whether nobody wants the gradients of the weights."""
        ...

    def run(self, layer: int, counts_E: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
        """Return the computed rows in the same order."""
        ...

    def backward(
        self,
        layer: int,
        counts_E: Sequence[int],
        rows_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
    ) -> torch.Tensor:
        """Return the gradient of rows that went through `run`, given that of what it returned.

        The gradients of the weights are added up where the weights are, unless they are frozen.
        """
        ...


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
    run: Callable[..., torch.Tensor] = getattr(module, _LENT, None) or partial(_here, module)
    if torch.is_grad_enabled():
        out_SH = run(counts, _spread(hidden_TH, order_S))
    else:
        out_SH = run(counts, hidden_TH[order_S // top_k])
    routed = torch.empty_like(out_SH)
    routed[order_S] = out_SH
    weighted = routed.view(num_tokens, top_k, -1) * top_k_weights_TK[..., None]
    return weighted.sum(dim=1).to(hidden_TH.dtype)


def lend_experts(
    layers: Sequence[torch.nn.Module], numbers: Iterable[int], dispatcher: ExpertDispatcher
) -> None:
    """Take the routed experts out of some of a model's layers: `dispatcher` runs their rows.

    Their parameters go; a layer without routed experts is left as it is.
    """
    for number in numbers:
        module = experts_module(layers[number])
        if module is not None:
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                delattr(module, name)
            setattr(module, _LENT, partial(_elsewhere, dispatcher, number))


def experts_module(layer: torch.nn.Module) -> Any:
    """Return the module of a decoder layer's routed experts; None where it has none."""
    return next((each for each in layer.modules() if hasattr(each, "is_transposed")), None)


def weight_names(module: Any) -> tuple[str, ...]:
    """Return the parameters that hold the experts' weights, in the order of `run_expert`."""
    names = ("gate_up_proj", "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names


def run_experts(
    module: Any,
    weights_of: Callable[[int], Sequence[Any]],
    experts: Iterable[tuple[int, int]],
    rows_SH: torch.Tensor,
) -> torch.Tensor:
    """Run rows that are sorted by expert: (expert, how many) one after another."""
    out_SH = torch.empty_like(rows_SH)
    start = 0
    for expert, count in experts:
        end = start + count
        out_SH[start:end] = run_expert(module, weights_of(expert), rows_SH[start:end])
        start = end
    return out_SH


def run_expert(module: Any, weights: Sequence[Any], rows: torch.Tensor) -> torch.Tensor:
    """Run rows through one expert's gate-up and down matrices and, where it has any, biases."""
    gate_up, down, *biases = weights
    gate_up_bias, down_bias = biases or (None, None)
    hidden = _linear(rows, gate_up, gate_up_bias, module.is_transposed)
    return _linear(module._apply_gate(hidden), down, down_bias, module.is_transposed)


def _here(module: Any, counts: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
    weights_E = [getattr(module, name) for name in weight_names(module)]
    experts = [(expert, count) for expert, count in enumerate(counts) if count]
    if not torch.is_grad_enabled():
        return run_experts(module, lambda e: [of_all[e] for of_all in weights_E], experts, rows_SH)
    # The gradient of picking one expert is as large as all of them, that of taking them apart is
    # not.
    apart = [of_all.unbind() for of_all in weights_E]
    parts = torch.split(rows_SH, [count for _, count in experts])
    return torch.cat(
        [
            run_expert(module, [of_all[expert] for of_all in apart], rows)
            for (expert, _), rows in zip(experts, parts, strict=True)
        ]
    )


def _spread(hidden_TH: torch.Tensor, order_S: torch.Tensor) -> torch.Tensor:
    """Return the sorted rows; the gradient of scattering distinct rows is a plain gather."""
    num_tokens, width = hidden_TH.shape
    top_k = order_S.numel() // num_tokens
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    rows_SH = hidden_TH.new_empty(order_S.numel(), width)
    rows_SH[place_S] = hidden_TH[:, None].expand(-1, top_k, -1).reshape(-1, width)
    return rows_SH


def _elsewhere(
    dispatcher: ExpertDispatcher, layer: int, counts: Sequence[int], rows_SH: torch.Tensor
) -> torch.Tensor:
    is_passed = torch.is_grad_enabled() and (rows_SH.requires_grad or not dispatcher.is_frozen)
    if not is_passed:
        return dispatcher.run(layer, counts, rows_SH)
    if not rows_SH.requires_grad:
        # Autograd would leave the call out, and with it the gradients of the weights.
        rows_SH.requires_grad_()
    out_SH: torch.Tensor = _Dispatched.apply(  # type: ignore[no-untyped-call]
        rows_SH, dispatcher, layer, counts
    )
    return out_SH


class _Dispatched(torch.autograd.Function):
    """Experts that are elsewhere, to autograd: their weights' gradients stay where they are."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_SH: torch.Tensor,
        dispatcher: ExpertDispatcher,
        layer: int,
        counts: Sequence[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_SH)
        ctx.call = dispatcher, layer, counts
        return dispatcher.run(layer, counts, rows_SH)

    @staticmethod
    def backward(ctx: Any, gradient_SH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        dispatcher, layer, counts = ctx.call
        (rows_SH,) = ctx.saved_tensors
        return dispatcher.backward(layer, counts, rows_SH, gradient_SH), None, None, None


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    return functional.linear(rows, weight.t() if is_transposed else weight, bias)


ExpertsInterface.register(EXPERTS_NAME, motley_experts)
