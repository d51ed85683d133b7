"""Drawing tokens from logits: counter-based, so a draw depends on (seed, position) alone.

Uniform numbers of (seed, position) come from Philox, and the token is read off by descending a tree
of sums over the vocabulary: at each node one number chooses among `FAN_OUT` branches by the inverse
of their cumulative distribution. So the same request gives the same tokens whatever its batch,
lane, stage cut or preemptions; only float rounding could part two runs, and it does so rarely: a
number meets few edges on its way down, where one cumulative distribution over the vocabulary has
thousands, each of which rounding shifts (tests/bench/sampling.py measures both).

Shapes: D draws (rows of logits), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from actors.engine.batch import Draw
from actors.engine.requests import TokenLogprob

FAN_OUT = 16
"""Branches of a node of the tree of sums."""


def uniforms(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) that depend on `seed` and `position` alone (Philox 4x64).

    Philox counts its blocks of four in the lowest word, so the position is in the second.
    """
    bits = np.random.Philox(key=seed, counter=position << 64)
    return np.random.Generator(bits).random(count)


def sample(logits_DV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw one token a row. Order: penalties, bans, temperature, top-k, top-p, min-p, draw.

    Raises:
        ValueError: A row's best logit is NaN or infinite, so no token can be told from it.
    """
    if all(_is_plain(draw) for draw in draws):
        return _best(logits_DV)
    logits_DV = logits_DV.float()
    tokens = [0] * len(draws)
    shaped = logits_DV.clone()
    for i, draw in enumerate(draws):
        if draw.history:
            _penalise(shaped[i], draw)
        # A checkpoint may name end tokens that its head does not have.
        if banned := [token for token in draw.banned if token < shaped.shape[1]]:
            shaped[i, banned] = -torch.inf
    greedy = [i for i, draw in enumerate(draws) if draw.is_greedy]
    random = [i for i, draw in enumerate(draws) if not draw.is_greedy]
    if greedy:
        for i, token in zip(greedy, _best(shaped[greedy]), strict=True):
            tokens[i] = token
    if random:
        chosen = _draw_rows(shaped[random], [draws[i] for i in random])
        for i, token in zip(random, chosen, strict=True):
            tokens[i] = token
    return tokens


def logprobs(
    logits_DV: torch.Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprob | None]:
    """Log-probabilities of `tokens` and the best alternatives (num_top < 0: none wanted).

    Taken from the unmodified distribution, before penalties, temperature and truncation.
    """
    wanted = [i for i, k in enumerate(num_top) if k >= 0]
    result: list[TokenLogprob | None] = [None] * len(tokens)
    if not wanted:
        return result
    logprobs_DV = logits_DV[wanted].float().log_softmax(dim=-1)
    chosen = logprobs_DV.gather(1, torch.tensor([[tokens[i]] for i in wanted]).to(logits_DV.device))
    most = max(num_top[i] for i in wanted)
    top = logprobs_DV.topk(min(most, logprobs_DV.shape[-1]), dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    for row, i in enumerate(wanted):
        k = num_top[i]
        pairs = tuple(zip(ids[row][:k], values[row][:k], strict=True))
        result[i] = TokenLogprob(tokens[i], float(chosen[row, 0]), pairs)
    return result


def _is_plain(draw: Draw) -> bool:
    return draw.is_greedy and not draw.history and not draw.banned


def _best(logits_DV: torch.Tensor) -> list[int]:
    """The id of each row's largest logit, the lowest of equals."""
    best_D1 = logits_DV.argmax(dim=-1, keepdim=True)
    _check_finite(logits_DV.gather(1, best_D1))
    return best_D1[:, 0].tolist()


def _check_finite(best_D1: torch.Tensor) -> None:
    """Refuse rows by their largest logit: a NaN anywhere in a row is its maximum."""
    bad = int((~best_D1.isfinite()).sum())
    if bad:
        raise ValueError(
            f"the logits of {bad} of {len(best_D1)} rows are NaN or infinite; the model overflows "
            "its number type, so set engine.dtype to bfloat16 or float32"
        )


def _penalise(logits_V: torch.Tensor, draw: Draw) -> None:
    """Apply penalties in place: repetition over all tokens, the others over the output."""
    history = torch.tensor(draw.history, device=logits_V.device)
    if draw.repetition_penalty != 1.0:
        seen = torch.unique(history)
        values = logits_V[seen]
        penalty = draw.repetition_penalty
        logits_V[seen] = torch.where(values < 0, values * penalty, values / penalty)
    output = history[draw.num_prompt :]
    if len(output) and (draw.presence_penalty or draw.frequency_penalty):
        ids, counts = torch.unique(output, return_counts=True)
        logits_V[ids] -= draw.presence_penalty + draw.frequency_penalty * counts.to(logits_V.dtype)


def _draw_rows(logits_DV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    device = logits_DV.device
    # A temperature below the smallest float32 would divide 0 by 0.
    least = torch.finfo(torch.float32).tiny
    temperature = torch.tensor([max(draw.temperature, least) for draw in draws], device=device)
    best_D1 = logits_DV.max(dim=-1, keepdim=True).values
    _check_finite(best_D1)
    # Shifting by the maximum first keeps a tiny temperature finite.
    shifted = logits_DV - best_D1
    probs_DV = (shifted / temperature[:, None]).softmax(dim=-1)
    truncated = [i for i, d in enumerate(draws) if d.top_k or d.top_p < 1.0 or d.min_p > 0.0]
    if truncated:
        probs_DV[truncated] = _truncate(probs_DV[truncated], [draws[i] for i in truncated])
    return _descend(probs_DV, draws).tolist()


def _descend(probs_DV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw one column a row: from the root of a tree of sums down to a leaf."""
    num_draws = len(draws)
    levels = []
    sums_DN = probs_DV
    while sums_DN.shape[1] > 1:
        padded = functional.pad(sums_DN, (0, -sums_DN.shape[1] % FAN_OUT))
        levels.append(padded.view(num_draws, -1, FAN_OUT))
        # float64, so that the sums of a large vocabulary stay distinct.
        sums_DN = levels[-1].sum(dim=-1, dtype=torch.float64)
    numbers = np.stack([uniforms(draw.seed, draw.position, len(levels)) for draw in draws])
    numbers_DL = torch.from_numpy(numbers).to(probs_DV.device)
    rows_D = torch.arange(num_draws, device=probs_DV.device)
    chosen_D = torch.zeros_like(rows_D)
    for depth, level_DNF in enumerate(reversed(levels)):
        cumulative_DF = level_DNF[rows_D, chosen_D].cumsum(dim=-1, dtype=torch.float64)
        # Below the total, however it is rounded, so what is found has mass.
        targets_D1 = numbers_DL[:, depth : depth + 1] * cumulative_DF[:, -1:]
        branch_D1 = torch.searchsorted(cumulative_DF, targets_D1, right=True)
        chosen_D = chosen_D * FAN_OUT + branch_D1[:, 0]
    return chosen_D


def _truncate(probs_DV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Zero what top-k, then top-p, then min-p leave out (each on the rest of the one before).

    As in transformers' warpers: top-p keeps the smallest set whose mass reaches p, the token that
    crosses it included; min-p keeps what has at least min_p times the best token's probability.
    """
    device = probs_DV.device
    vocabulary = probs_DV.shape[-1]
    sorted_DV, ids_DV = probs_DV.sort(dim=-1, descending=True, stable=True)
    k = torch.tensor([[d.top_k or vocabulary] for d in draws], device=device)
    keep = torch.arange(vocabulary, device=device)[None] < k
    kept_DV = sorted_DV * keep
    kept_DV = kept_DV / kept_DV.sum(dim=-1, keepdim=True)
    p = torch.tensor([[d.top_p] for d in draws], device=device)
    before = kept_DV.cumsum(dim=-1) - kept_DV
    keep &= (before < p) | (p >= 1.0)
    least = torch.tensor([[d.min_p] for d in draws], device=device)
    keep &= kept_DV >= least * kept_DV[:, :1]
    return torch.zeros_like(probs_DV).scatter(1, ids_DV, sorted_DV * keep)
