"""What the tests of experts over sockets ask: prompts, rows, and a fleet's own answer to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from expert_fleet import DEVICES, ExpertFleet
from expert_routes import EvenRoutes, open_hosts, spread
from tiny_models import num_experts

from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.experts import ExpertDispatcher
from actors.engine.local import LocalPipeline
from actors.engine.local_experts import LocalDispatcher
from actors.engine.requests import Request, SamplingParams
from actors.expert_links import Patience

LONG_S = 20.0
"""Far longer than any answer takes; waited out only by a failing test."""
SHORT = Patience(answer_s=0.5, reroute_s=0.0)
NUM_NEW = 10
LENGTHS = (1, 3, 8, 17, 31)
TIGHT = EngineConfig(kv_block_tokens=4, num_kv_blocks=40, max_running=16, max_step_tokens=20)
COUNTS = [3, 0, 5, 1, 4, 2, 6, 1]
LAYER = 2

OpenFleet = Callable[..., ExpertFleet]
"""`open_fleet(model_type, replicas, **options of ExpertFleet)`."""


@contextmanager
def fleets(checkpoint_dir: Callable[..., Path]) -> Iterator[OpenFleet]:
    """Yield how to open fleets, which end with the block."""
    made: list[ExpertFleet] = []

    def make(model_type: str = "olmoe", replicas: int = 1, **options: Any) -> ExpertFleet:
        routes = spread(DEVICES, num_experts(model_type), replicas=replicas)
        made.append(ExpertFleet(checkpoint_dir(model_type), routes, **options))
        return made[-1]

    try:
        yield make
    finally:
        for fleet in made:
            fleet.close()


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(torch.randint(3, 199, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


def tokens_of(checkpoint: Checkpoint, experts: ExpertDispatcher) -> list[list[int]]:
    """What a pipeline of two stages draws greedily for the prompts."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    asked = [Request(id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(prompts())]
    done = LocalPipeline(checkpoint, (3,), config=TIGHT, experts=experts).generate(asked)
    return [done[str(i), 0].tokens for i in range(len(LENGTHS))]


def rows(seed: int = 0) -> torch.Tensor:
    """The rows of `COUNTS`."""
    return torch.randn(sum(COUNTS), 48, generator=torch.Generator().manual_seed(seed))


def wanted_rows(fleet: ExpertFleet, routes: EvenRoutes | None = None) -> torch.Tensor:
    """What the same split gives within one process."""
    routes = routes or fleet.routes
    hosts = open_hosts(Checkpoint.open(str(fleet.path)), DEVICES, routes)
    return LocalDispatcher(hosts, routes).run(LAYER, COUNTS, rows())
