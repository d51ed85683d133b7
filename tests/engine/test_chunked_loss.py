"""The chunked loss against torch's cross-entropy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from actors.engine.chunked_loss import chunked_cross_entropy
from actors.engine.training_values import IGNORED, Tokens

pytestmark = pytest.mark.engine

SEQUENCES, ROWS, HIDDEN, VOCABULARY = 2, 13, 8, 31


class Head(torch.nn.Module):
    """A norm and a linear layer that note how many rows they were given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.RMSNorm(HIDDEN, dtype=dtype)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
        self.given: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.given.append(len(rows))
        logits: torch.Tensor = self.head(self.norm(rows))
        return logits


def problem() -> tuple[torch.Tensor, Tokens]:
    hidden_BTH = torch.randn(SEQUENCES, ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))
    random = np.random.default_rng(2)
    targets = random.integers(0, VOCABULARY, (SEQUENCES, ROWS))
    targets[random.random((SEQUENCES, ROWS)) < 0.3] = IGNORED
    return hidden_BTH, targets


def at_once(
    head: Head, hidden_BTH: torch.Tensor, targets: Tokens, scale: float
) -> tuple[float, torch.Tensor]:
    leaf = hidden_BTH.clone().requires_grad_()
    loss = functional.cross_entropy(
        head(leaf.flatten(0, 1)).float(),
        torch.from_numpy(targets).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    torch.autograd.backward(loss * scale)
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1000])
def test_loss_and_gradients_are_those_of_all_rows_at_once(chunk_tokens: int) -> None:
    hidden_BTH, targets = problem()
    chunked, plain = Head(), Head()

    done = chunked_cross_entropy(
        chunked, hidden_BTH, targets, chunk_tokens=chunk_tokens, scale=0.25
    )

    loss, gradient = at_once(plain, hidden_BTH, targets, 0.25)
    assert done.loss_sum == pytest.approx(loss, rel=1e-6)
    assert done.num_targets == (targets != IGNORED).sum()
    torch.testing.assert_close(done.gradient_BTH, gradient)
    for actual, expected in zip(chunked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_no_more_rows_than_a_chunk_and_none_without_target_reach_the_head() -> None:
    hidden_BTH, targets = problem()
    head = Head()

    chunked_cross_entropy(head, hidden_BTH, targets, chunk_tokens=5, scale=1.0)

    assert max(head.given) == 5
    assert sum(head.given) == (targets != IGNORED).sum()


def test_rows_without_a_target_have_no_gradient() -> None:
    hidden_BTH, targets = problem()

    done = chunked_cross_entropy(Head(), hidden_BTH, targets, chunk_tokens=5, scale=1.0)

    assert done.gradient_BTH is not None
    rows = torch.from_numpy(targets == IGNORED)
    assert not done.gradient_BTH[rows].any()
    assert done.gradient_BTH[~rows].any(-1).all()


def test_without_a_scale_there_is_the_loss_alone() -> None:
    hidden_BTH, targets = problem()
    head = Head()

    done = chunked_cross_entropy(head, hidden_BTH, targets, chunk_tokens=5, scale=None)

    loss, _ = at_once(Head(), hidden_BTH, targets, 1.0)
    assert done.loss_sum == pytest.approx(loss, rel=1e-6)
    assert done.gradient_BTH is None
    assert all(parameter.grad is None for parameter in head.parameters())


def test_no_target_at_all_is_no_loss() -> None:
    hidden_BTH, targets = problem()
    head = Head()

    done = chunked_cross_entropy(
        head, hidden_BTH, np.full_like(targets, IGNORED), chunk_tokens=5, scale=1.0
    )

    assert (done.loss_sum, done.num_targets) == (0.0, 0)
    assert done.gradient_BTH is not None
    assert not done.gradient_BTH.any()
    assert not head.given


def test_a_frozen_head_still_gives_the_gradient_of_the_hidden() -> None:
    hidden_BTH, targets = problem()
    head = Head().requires_grad_(False)

    done = chunked_cross_entropy(head, hidden_BTH, targets, chunk_tokens=5, scale=1.0)

    _, gradient = at_once(Head(), hidden_BTH, targets, 1.0)
    torch.testing.assert_close(done.gradient_BTH, gradient)
    assert all(parameter.grad is None for parameter in head.parameters())


def test_the_loss_of_a_bfloat16_head_is_float32() -> None:
    hidden_BTH, targets = problem()
    hidden_BTH = hidden_BTH.bfloat16()

    done = chunked_cross_entropy(
        Head(torch.bfloat16), hidden_BTH, targets, chunk_tokens=5, scale=1.0
    )

    loss, _ = at_once(Head(torch.bfloat16), hidden_BTH, targets, 1.0)
    assert done.loss_sum == pytest.approx(loss, rel=1e-6)
    assert done.gradient_BTH is not None
    assert done.gradient_BTH.dtype == torch.bfloat16
