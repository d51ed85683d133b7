"""A request between the gateway and its lane: where its outputs go, and how far each choice is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from actors.engine.requests import Request, RequestOutput


@dataclass(slots=True)
class InFlight:
    """One request that a lane works on. Use on the event loop."""

    request: Request
    lane: int
    lane_id: str
    """What the lane calls the request. Ids are a client's own and may be used again at once; the
    last words of an aborted request must not reach its namesake."""
    end_s: float | None
    """When its deadline passes."""
    outputs: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)
    """What has come and was not passed on."""
    num_untold: int = field(init=False)
    """Choices of whose end the client has not been told."""
    _tokens: list[list[int] | None] = field(init=False)
    """Of each choice what has come, passed on or not; None: all of it."""
    _is_scored: bool = False

    def __post_init__(self) -> None:
        self.num_untold = self.request.n
        self._tokens = [[] for _ in range(self.request.n)]

    @property
    def open_choices(self) -> int:
        """Choices on which a lane has still to work."""
        return sum(tokens is not None for tokens in self._tokens)

    def arrived(self, output: RequestOutput) -> None:
        """Take an output in; whether its client reads it soon or late makes no difference."""
        tokens = self._tokens[output.index] if output.index < len(self._tokens) else None
        if tokens is None:
            return
        self._is_scored |= output.prompt_logprobs is not None
        tokens.extend(output.tokens)
        if output.finish_reason is not None:
            self._tokens[output.index] = None
        self.outputs.put_nowait(output)

    async def next_output(self) -> RequestOutput:
        """Return what comes next, to be passed on."""
        output = await self.outputs.get()
        if output.finish_reason is not None:
            self.num_untold -= 1
        return output

    def rest(self, now_s: float) -> Request:
        """Return what is left to do, for another lane."""
        sampling = self.request.sampling
        if self._is_scored:
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(
            self.request,
            id=self.lane_id,
            sampling=sampling,
            deadline_s=None if self.end_s is None else max(1e-3, self.end_s - now_s),
            progress=tuple(None if tokens is None else tuple(tokens) for tokens in self._tokens),
        )
