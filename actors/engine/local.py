"""The whole pipeline in one plain process: a scheduler and its stages, no Ray and no sockets.

For tests, for a GPU machine without Ray, and for comparing with transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from actors.engine.batching import LaneLimits, Scheduler
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.experts import ExpertDispatcher
from actors.engine.requests import FinishReason, Request, TokenLogprob
from actors.engine.slice import StageSlice


@dataclass(slots=True)
class Completion:
    """What one choice of a request became."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0


class LocalPipeline:
    """Stages cut at `cuts` (for 8 layers, [5, 7] gives [0,5) [5,7) [7,8)) and one lane."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cuts: Sequence[int] = (),
        *,
        config: EngineConfig | None = None,
        device: str = "cpu",
        experts: ExpertDispatcher | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        bounds = [0, *cuts, checkpoint.num_layers]
        max_tokens = self.config.max_model_tokens or checkpoint.max_model_tokens
        num_blocks = self.config.num_kv_blocks or 256
        self.stages = [
            StageSlice(
                checkpoint,
                first,
                end,
                config=self.config,
                num_kv_blocks=num_blocks,
                device=device,
                experts=experts,
            )
            for first, end in pairwise(bounds)
        ]
        self.scheduler = Scheduler(
            LaneLimits(
                num_blocks=num_blocks,
                block_tokens=self.config.kv_block_tokens,
                max_running=self.config.max_running,
                max_step_tokens=self.config.max_step_tokens,
                max_model_tokens=max_tokens,
                prefix_cache=self.config.prefix_cache,
                eos_token_ids=checkpoint.eos_token_ids,
            )
        )

    def generate(self, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
        """Run requests to their ends; keyed by (request id, choice)."""
        done: dict[tuple[str, int], Completion] = {}
        for request in requests:
            for choice in self.scheduler.add(request):
                done[request.id, choice.index] = Completion()
        while (step := self.scheduler.schedule()) is not None:
            hidden: torch.Tensor | None = None
            for stage in self.stages[:-1]:
                hidden = stage.forward(step.batch, hidden)  # type: ignore[assignment]
            result = self.stages[-1].forward(step.batch, hidden)
            assert not isinstance(result, torch.Tensor)
            for advance in self.scheduler.commit(step, result):
                choice = advance.sequence
                completion = done[choice.request.id, choice.index]
                if advance.token is not None:
                    completion.tokens.append(advance.token)
                if advance.logprob is not None:
                    completion.logprobs.append(advance.logprob)
                if advance.finish_reason:
                    completion.finish_reason = advance.finish_reason
                    completion.prompt_logprobs = choice.prompt_logprobs
                    completion.num_preemptions = choice.num_preemptions
        return done
