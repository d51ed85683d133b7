"""Identity with transformers: what it generates, and how strictly tokens are compared with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Expected:
    """What transformers generates greedily, and how far apart its two best logits were."""

    tokens: list[int]
    gaps: list[float]


def generate(model: Any, prompt: Sequence[int], num_new: int) -> Expected:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_new,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    return Expected(out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())


def check_identical(expected: Sequence[Expected], got: Sequence[list[int]]) -> None:
    total = near_ties = 0
    for want, tokens in zip(expected, got, strict=True):
        for i, (a, b) in enumerate(zip(want.tokens, tokens, strict=False)):
            total += 1
            if a != b:
                assert want.gaps[i] < NEAR_TIE, f"token {i}: {a} wanted, {b} drawn"
                near_ties += 1
                break  # what follows a legitimate parting is another text
        else:
            assert len(want.tokens) == len(tokens)
    sys.stdout.write(f"{near_ties} near ties in {total} tokens\n")
    assert near_ties * 100 < total
