"""Gradients of a slot's units, added up over its micro-batches in flat float32 tensors.

Shapes: B sequences of a micro-batch, T rows each, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from actors.engine.lent_modules import LentModules, PlacedUnit, Rows
from actors.engine.training_units import split_flat
from actors.engine.training_values import EMBEDDING_UNIT, TIED_INPUT


class SlotGradients:
    """The sums of the units that a slot went back through.

    Those of an embedding that is the head too are two until they are taken, with `has_head`.
    """

    def __init__(self, modules: LentModules, *, has_head: bool) -> None:
        self._modules = modules
        self._input_name = TIED_INPUT if has_head and modules.is_tied else EMBEDDING_UNIT
        self._flat: dict[str, torch.Tensor] = {}
        self._views: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def received_by(self, placed: Mapping[str, PlacedUnit]) -> Iterator[None]:
        """Let backward passes within the block add to the sums, and not to the parameters."""
        parameters = []
        hooks = []
        for name, unit in placed.items():
            if not unit.trained:
                continue
            for parameter, view in zip(unit.trained, self._sums_of(name), strict=True):
                parameters.append(parameter)
                if parameter.dtype == view.dtype:
                    # Autograd adds in place to a gradient that is there.
                    parameter.grad = view
                else:
                    register: Any = parameter.register_post_accumulate_grad_hook
                    hooks.append(register(_adder(view)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                parameter.grad = None

    def add_embedding(self, rows: Rows, gradient_BTH: torch.Tensor) -> None:
        """Add the gradient of the embedded rows, without a gradient as large as the vocabulary."""
        [sums_VH] = self._sums_of(self._input_name)
        padding = self._modules.padding_token
        tokens, gradient = rows.tokens_BT.flatten(), gradient_BTH.flatten(0, 1).float()
        if padding is not None:
            gradient = gradient * (tokens != padding)[:, None]
        # On CUDA, unlike index_add_, this sums in an order that does not change.
        sums_VH.index_put_((tokens,), gradient, accumulate=True)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the sums, flat on the CPU, and forget them."""
        sums = {name: flat.cpu() for name, flat in self._flat.items()}
        self._flat.clear()
        self._views.clear()
        return sums

    def _sums_of(self, name: str) -> list[torch.Tensor]:
        if name not in self._flat:
            unit = self._modules.units[EMBEDDING_UNIT if name == TIED_INPUT else name]
            self._flat[name] = torch.zeros(unit.num_trained, device=self._modules.device)
            self._views[name] = split_flat(self._flat[name], unit.trained)
        return self._views[name]


def _adder(sums: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        sums.add_(parameter.grad)
        parameter.grad = None

    return add
