"""How often rounding parts two runs of one sampled request, and what a draw costs.

Run: python tests/bench/sampling.py [--quick]

One request runs alone and beside three others through the shipped checkpoint, so its logits differ
by rounding alone. From both sets of logits follows, exactly, how likely a token is to differ: for
the tree of sums that draws tokens, and for one cumulative distribution over the vocabulary, the
baseline. Then both draw from logits of a large vocabulary, timed in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from figures import Figure, at_most, median, report
from torch.nn import functional
from transformers import AutoModelForCausalLM

from actors.engine.batch import Draw
from actors.engine.sampling import FAN_OUT, _descend, uniforms

CHECKPOINT = Path(__file__).resolve().parents[2] / "deploy" / "checkpoints" / "tiny-qwen3"
TEMPERATURE = 0.8
PROMPT_TOKENS = 32
LARGE_VOCABULARY = 151_936
NUM_BESIDE = 3
RARELY = 0.05
"""Of the baseline: the tree is to part twenty times fewer tokens."""


def probabilities(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token laws of one request at every step, [steps, vocabulary]: alone, and in company."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    draws = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (1 + NUM_BESIDE, PROMPT_TOKENS), generator=draws)
    laws = []
    tokens: list[int] = []
    for num_rows in (1, 1 + NUM_BESIDE):
        inputs, cache, steps = prompts[:num_rows], None, []
        for step in range(num_tokens):
            with torch.no_grad():
                outputs = model(inputs, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append((outputs.logits[0, -1] / TEMPERATURE).softmax(dim=-1))
            if num_rows == 1:
                tokens.append(int(torch.multinomial(steps[-1], 1, generator=draws)))
            inputs = torch.randint(vocabulary, (num_rows, 1), generator=draws)
            inputs[0] = tokens[step]
        laws.append(torch.stack(steps).double())
    return laws[0], laws[1]


def parted(one_DV: torch.Tensor, other_DV: torch.Tensor, fan_out: int) -> float:
    """How likely draws by a tree of this fan-out are to differ: at each node, what the intervals
    of a branch do not share, weighed by the node's probability."""
    total = 0.0
    while one_DV.shape[1] > 1:
        padding = (0, -one_DV.shape[1] % fan_out)
        pair = [
            functional.pad(law, padding).view(len(law), -1, fan_out) for law in (one_DV, other_DV)
        ]
        one_DV, other_DV = (level.sum(dim=-1) for level in pair)
        a, b = (level / level.sum(dim=-1, keepdim=True).clamp(min=1e-300) for level in pair)
        ends, starts = (a.cumsum(-1), b.cumsum(-1)), (a.cumsum(-1) - a, b.cumsum(-1) - b)
        shared = (torch.minimum(*ends) - torch.maximum(*starts)).clamp(min=0).sum(dim=-1)
        total += float(((1 - shared) * one_DV).sum(dim=-1).mean())
    return total


def flat_draw(probs_DV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """The baseline: one cumulative distribution over the vocabulary."""
    cumulative = probs_DV.cumsum(dim=-1, dtype=torch.float64)
    numbers = [[uniforms(draw.seed, draw.position, 1)[0]] for draw in draws]
    targets = torch.tensor(numbers) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def timed(rounds: int) -> tuple[float, float]:
    """Median seconds of 8 draws from a large vocabulary: the tree's, the baseline's."""
    logits = torch.randn(8, LARGE_VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3.0
    probs = logits.softmax(dim=-1)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        draws = [Draw(seed=row, position=number, temperature=1.0) for row in range(8)]
        for kept, function in zip(times, (_descend, flat_draw), strict=True):
            start_s = time.perf_counter()
            function(probs, draws)
            kept.append(time.perf_counter() - start_s)
    return median(times[0]), median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    one, other = probabilities(200 if quick else 1000)
    tree, flat = parted(one, other, FAN_OUT), parted(one, other, one.shape[1])
    tree_s, flat_s = timed(20 if quick else 200)
    figures: list[Figure] = [
        at_most("tokens that rounding parts (tree / one distribution)", tree, flat, RARELY),
        at_most("seconds of 8 draws of 151,936 (tree / one distribution)", tree_s, flat_s, 1.5),
    ]  # fmt: skip
    report(figures)


if __name__ == "__main__":
    main()
