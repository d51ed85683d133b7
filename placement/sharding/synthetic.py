"""Traces made up from what is published about routing, reproducible from a seed.

The logits of a layer are those of a Zipf law over a random order of its experts, plus offsets of
the domain that a sequence belongs to, plus noise that follows itself (AR(1)). A token's experts are
drawn without replacement (Gumbel top-k: the k smallest of exponential variates over the weights);
in decoding a token keeps each expert of the token before with some probability. Drawing without
replacement flattens: a trace's Gini is below that of its Zipf law.

Regimes: `stationary`; `drift`, in which one order turns into another over the whole trace; `swap`,
in which halfway the hottest quarter changes places with others; `device-loss`, stationary with a
device lost halfway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placement.sharding.loads import Phase
from placement.sharding.traces import MOST_BYTES, ExpertTrace

Regime = Literal["stationary", "drift", "swap", "device-loss"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
Float = NDArray[np.float32]
MOST_ZIPF = 4.0
MOST_SIGMA = 4.0
_MOST_LOGITS = 80.0
"""Below the hottest expert: exp(80) is still a number in float32, and is never drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecipe:
    """What a made-up trace looks like."""

    regime: Regime = "stationary"
    phase: Phase = "prefill"
    num_steps: int = 1000
    num_layers: int = 2
    num_experts: int = 128
    top_k: int = 8
    tokens: int = 1024
    """Of one step; in decoding each is a sequence of its own."""
    zipf: float = 0.6
    """Skew: 0.2 to 0.3 is well balanced, 0.6 to 0.8 common, 1.2 the worst reported."""
    num_domains: int = 4
    domain_sigma: float = 0.0
    """Standard deviation of a domain's offsets to the logits; 0.5 to 1 differ much."""
    switch_probability: float = 0.02
    """Of a sequence to be followed by one of another domain, per step."""
    prompt_tokens: int = 256
    """Tokens of one domain in a row, in a prefill step."""
    noise_sigma: float = 0.0
    noise_rho: float = 0.95
    """What is left of the noise from one step to the next."""
    stickiness: float = 0.35
    """Probability that a decoded token keeps an expert of the token before it."""

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"regime ({self.regime!r}) must be one of {', '.join(REGIMES)}")
        for name in ("num_layers", "num_experts", "tokens", "num_domains", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.num_steps < 2:
            raise ValueError(f"num_steps ({self.num_steps}) must be at least 2")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) must be from 1 to num_experts ({self.num_experts})"
            )
        self._check_ranges()
        self._check_size()

    def _check_ranges(self) -> None:
        for name, most in (
            ("zipf", MOST_ZIPF),
            ("domain_sigma", MOST_SIGMA),
            ("noise_sigma", MOST_SIGMA),
            ("switch_probability", 1.0),
            ("noise_rho", 1.0),
            ("stickiness", 1.0),
        ):
            # Written so that NaN is refused too.
            if not 0.0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to {most:g}")

    def _check_size(self) -> None:
        """Refuse what would not fit memory, or a file that is read again."""
        for others in (("num_steps", "num_layers"), ("tokens",), ("num_domains",)):
            names = (*others, "num_experts")
            values = [getattr(self, name) for name in names]
            if (num_bytes := 8 * math.prod(values)) > MOST_BYTES:
                raise ValueError(
                    f"{' x '.join(names)} ({' x '.join(map(str, values))}) takes {num_bytes} "
                    f"bytes; at most {MOST_BYTES} are made"
                )


def make_trace(recipe: TraceRecipe, seed: int, *, lost_device: int = 0) -> ExpertTrace:
    """Return the trace of a recipe; the same seed gives the same trace.

    O(steps x layers x tokens x experts), about 15 ns each.
    """
    rng = np.random.default_rng(seed)
    routers = [_Router(recipe, rng) for _ in range(recipe.num_layers)]
    num_sequences = recipe.tokens
    if recipe.phase == "prefill":
        num_sequences = max(1, recipe.tokens // recipe.prompt_tokens)
    domain_Q = rng.integers(recipe.num_domains, size=num_sequences)
    sequence_N = np.arange(recipe.tokens) % num_sequences
    rows_SLE = np.empty((recipe.num_steps, recipe.num_layers, recipe.num_experts), dtype=np.int64)
    for step in range(recipe.num_steps):
        for layer, router in enumerate(routers):
            rows_SLE[step, layer] = router.step(step, domain_Q[sequence_N], rng)
        switches = rng.random(num_sequences) < recipe.switch_probability
        domain_Q[switches] = rng.integers(recipe.num_domains, size=int(switches.sum()))
    is_loss = recipe.regime == "device-loss"
    return ExpertTrace(
        name=recipe.regime,
        phase=recipe.phase,
        top_k=recipe.top_k,
        rows_SLE=rows_SLE,
        losses=((recipe.num_steps // 2, lost_device),) if is_loss else (),
    )


class _Router:
    """One layer's choices, step by step."""

    def __init__(self, recipe: TraceRecipe, rng: np.random.Generator) -> None:
        self._recipe = recipe
        law_E = -recipe.zipf * np.log(np.arange(1, recipe.num_experts + 1))
        rank_E = rng.permutation(recipe.num_experts)
        self._before_E = law_E[rank_E]
        if recipe.regime == "swap":
            self._after_E = law_E[_swapped(rank_E, rng)]
        else:
            self._after_E = law_E[rng.permutation(recipe.num_experts)]
        shape = (recipe.num_domains, recipe.num_experts)
        self._offset_GE = recipe.domain_sigma * rng.standard_normal(shape)
        self._noise_E = recipe.noise_sigma * rng.standard_normal(recipe.num_experts)
        self._chosen_NK: NDArray[np.int64] | None = None

    def step(
        self, step: int, domain_N: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return [E] rows."""
        recipe = self._recipe
        logits_GE = self._base(step) + self._offset_GE + self._noise_E
        fresh = math.sqrt(1.0 - recipe.noise_rho**2) * recipe.noise_sigma
        self._noise_E = recipe.noise_rho * self._noise_E + fresh * rng.standard_normal(
            recipe.num_experts
        )
        below_GE = np.minimum(logits_GE.max() - logits_GE, _MOST_LOGITS)
        inverse_GE = np.exp(below_GE).astype(np.float32)
        shape = (len(domain_N), recipe.num_experts)
        keys_NE: Float = rng.standard_exponential(shape, dtype=np.float32)
        keys_NE *= inverse_GE[domain_N]
        if recipe.phase == "decode" and self._chosen_NK is not None:
            self._keep(keys_NE, rng)
        chosen_NK = np.argpartition(keys_NE, recipe.top_k - 1, axis=1)[:, : recipe.top_k]
        self._chosen_NK = chosen_NK
        return np.bincount(chosen_NK.ravel(), minlength=recipe.num_experts)

    def _base(self, step: int) -> NDArray[np.float64]:
        recipe = self._recipe
        if recipe.regime == "swap":
            return self._before_E if step < recipe.num_steps // 2 else self._after_E
        if recipe.regime == "drift":
            # Along an arc, so that the skew stays: a straight line would flatten it halfway.
            turned = 0.5 * math.pi * step / (recipe.num_steps - 1)
            mean = self._before_E.mean()
            before_E, after_E = self._before_E - mean, self._after_E - mean
            arc_E: NDArray[np.float64] = math.cos(turned) * before_E + math.sin(turned) * after_E
            return arc_E
        return self._before_E

    def _keep(self, keys_NE: Float, rng: np.random.Generator) -> None:
        """Put experts of the token before first, some of them."""
        assert self._chosen_NK is not None
        kept_NK = rng.random(self._chosen_NK.shape) < self._recipe.stickiness
        token_N, at_N = np.nonzero(kept_NK)
        keys_NE[token_N, self._chosen_NK[token_N, at_N]] = -1.0


def _swapped(rank_E: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Let the hottest quarter change places with as many others."""
    order = np.argsort(rank_E)
    num_hot = max(1, len(order) // 4)
    hot, others = order[:num_hot], order[num_hot:]
    if not len(others):
        return rank_E
    partners = rng.choice(others, size=min(num_hot, len(others)), replace=False)
    swapped = rank_E.copy()
    swapped[hot[: len(partners)]], swapped[partners] = (
        rank_E[partners],
        rank_E[hot[: len(partners)]],
    )
    return swapped
