"""The router loss in parts against transformers' own, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from actors.engine.checkpoint import Checkpoint
from actors.engine.router_loss import (
    RouterLogits,
    router_gradient,
    router_loads,
    router_weights,
)
from actors.engine.training_units import training_skeleton

pytestmark = pytest.mark.engine

NUM_EXPERTS, TOP_K = 6, 2


def test_loads_of_layers_add_up_to_the_loss_and_its_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    real_S = torch.rand(4, 10, generator=random) < 0.8
    layers = tuple(
        torch.randn(40, NUM_EXPERTS, generator=random).requires_grad_() for _ in range(3)
    )
    expected = load_balancing_loss_func(layers, NUM_EXPERTS, TOP_K, real_S)
    torch.autograd.backward(expected * 0.3)

    parts = [router_loads([layer], real_S.flatten(), TOP_K) for layer in layers]
    loads = reduce(add, [part for part in parts if part is not None])

    assert loads.loss() == pytest.approx(float(expected.detach()), rel=1e-6)
    weights_E = router_weights(loads, 0.3, torch.device("cpu"))
    for layer in layers:
        gradient = router_gradient(layer, real_S.flatten(), weights_E)
        torch.testing.assert_close(gradient, layer.grad, rtol=1e-5, atol=1e-9)


def test_layers_together_load_as_they_do_one_by_one() -> None:
    layers = [torch.randn(8, NUM_EXPERTS) for _ in range(2)]
    real_S = torch.ones(8, dtype=torch.bool)

    together = router_loads(layers, real_S, TOP_K)

    first, second = (router_loads([layer], real_S, TOP_K) for layer in layers)
    assert together is not None
    assert first is not None
    assert second is not None
    total = first + second
    assert (together.counts_E == total.counts_E).all()
    assert together.probabilities_E == pytest.approx(total.probabilities_E)
    assert together.rows == total.rows == 16


def test_no_layer_has_no_loads() -> None:
    assert router_loads([], torch.ones(8, dtype=torch.bool), TOP_K) is None


@pytest.mark.parametrize(
    ("model_type", "has_routers"), [("llama", False), ("mixtral", True), ("gpt_oss", True)]
)
def test_routers_are_found_as_transformers_records_them(
    model_type: str, has_routers: bool, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))

    logits = RouterLogits(training_skeleton(checkpoint, None, torch.float32))

    assert logits.has_routers is has_routers
