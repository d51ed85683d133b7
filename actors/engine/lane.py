"""A lane without its sockets: requests and step results in, steps and outputs out.

Owns the scheduler, the text of each choice, deadlines and the queue bound. Time is an argument.
One step is in flight at a time; while it is, requests queue and aborts take effect at once (the
blocks of an aborted choice may still be written by that step, and are reused only afterwards,
because the next step is scheduled after its result).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from actors.engine.batch import StepResult
from actors.engine.batching import Advance, Choice, LaneLimits, Scheduler, Step
from actors.engine.detokenize import Detokenizer
from actors.engine.requests import (
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    TokenLogprob,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneCounters:
    """What a lane reports: gauges as they stand, counters since it began."""

    running: int
    waiting: int
    blocks_in_use: int
    num_blocks: int
    preemptions: int
    prefix_hit_tokens: int
    steps: int
    step_s: float
    """Seconds from sending a step to having its result, summed."""
    stage_s: float
    """The stages' own seconds within `step_s`, summed."""
    adapter_version: int
    """What the lane's steps run with."""


class LaneCore:
    """The batch, the text and the clockwork of one lane."""

    def __init__(
        self,
        limits: LaneLimits,
        tokenizer: Tokenizer,
        *,
        lane: int = 0,
        life: int = 0,
        epoch: int = 0,
    ) -> None:
        self._scheduler = Scheduler(limits, lane=lane, life=life, epoch=epoch)
        self._limits = limits
        self._tokenizer = tokenizer
        self._text: dict[Choice, Detokenizer] = {}
        self._deadlines: dict[str, float] = {}
        self._scored: set[str] = set()
        self._in_flight: Step | None = None
        self._is_held = False
        self._wanted_adapter = 0
        self._unrendered: list[Advance] = []
        self._sent_s = 0.0
        self._steps = 0
        self._step_s = 0.0
        self._stage_s = 0.0

    @property
    def step_in_flight(self) -> Step | None:
        return self._in_flight

    def add(self, request: Request, now_s: float) -> list[RequestOutput]:
        """Queue a request; a refusal comes back as its outputs."""
        queued = self._scheduler.num_running + self._scheduler.num_waiting
        # One that goes on after a lane was lost had its place in that lane's queue.
        if (
            not request.progress
            and queued + request.n > self._limits.max_running + self._limits.max_waiting
        ):
            return [_failed(request.id, 0, "overloaded")]
        try:
            choices = self._scheduler.add(request)
        except RequestError as error:
            return [_failed(request.id, 0, str(error))]
        for choice in choices:
            text = Detokenizer(self._tokenizer, request.prompt, request.sampling.stop)
            for token in choice.tokens[choice.num_prompt :]:
                text.push(token)  # its client has it already
            self._text[choice] = text
        if request.deadline_s is not None:
            self._deadlines[request.id] = now_s + request.deadline_s
        return []

    def abort(self, request_id: str, reason: str | None = None) -> list[RequestOutput]:
        """End a request; each live choice gets a last output."""
        outputs = self.render()
        ended = self._scheduler.abort(request_id)
        outputs += [self._last(choice, "abort", stop_reason=reason) for choice in ended]
        self._forget(request_id)
        return outputs

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End everything with an error (a stage is lost) and forget the step in flight."""
        self._in_flight = None
        return [out for id_ in self._scheduler.requests() for out in self._fail(id_, message)]

    def expire(self, now_s: float) -> list[RequestOutput]:
        """End the requests whose deadline has passed, with what they have."""
        late = [request_id for request_id, end_s in self._deadlines.items() if end_s <= now_s]
        return [out for request_id in late for out in self.abort(request_id, "deadline")]

    def ask_for_adapter(self, version: int) -> None:
        """Want another adapter version; `switch_adapter` takes it up."""
        self._wanted_adapter = version

    def switch_adapter(self) -> bool:
        """Take up the wanted adapter version between two steps; returns whether it changed."""
        if self._in_flight is not None or self._wanted_adapter == self._scheduler.adapter_version:
            return False
        self._scheduler.use_adapter(self._wanted_adapter)
        return True

    def hold(self, *, forget_step: bool = False) -> None:
        """Send no step until `go_on`; with `forget_step` the one in flight will have no answer."""
        self._is_held = True
        if forget_step:
            self._in_flight = None

    def blocks_at_boundary(self) -> list[int] | None:
        """Return the blocks in use while the lane is held; None until its step is back."""
        is_at_boundary = self._is_held and self._in_flight is None
        return self._scheduler.pool.referenced() if is_at_boundary else None

    def go_on(self, epoch: int, *, recompute: bool) -> None:
        """Go on with the stages of another plan; see `Scheduler.use_epoch`."""
        self._scheduler.use_epoch(epoch, recompute=recompute)
        if recompute:
            self._in_flight = None
        self.release()

    def release(self) -> None:
        """Send steps again."""
        self._is_held = False

    @property
    def is_held(self) -> bool:
        return self._is_held

    def next_step(self, now_s: float) -> Step | None:
        """Return the step to send, or None while one is in flight or nothing can run."""
        if self._in_flight is not None or self._is_held:
            return None
        self._in_flight = self._scheduler.schedule()
        self._sent_s = now_s
        return self._in_flight

    def accept_result(
        self, step_id: int, result: StepResult, *, now_s: float, stage_s: float
    ) -> None:
        """Apply the result of the step in flight; a result of any other step is ignored.

        Raises ValueError, with nothing changed, for one that does not answer the step.

        The tokens wait for `render`, so that the next step can leave before text is made: a stop
        string then costs one row too many, and the pipeline does not wait for the tokenizer.
        """
        step = self._in_flight
        if step is None or step.batch.step != step_id:
            return
        result.check_answers(step.batch)
        self._in_flight = None
        self._steps += 1
        self._step_s += now_s - self._sent_s
        self._stage_s += stage_s
        self._unrendered += self._scheduler.commit(step, result)

    def render(self) -> list[RequestOutput]:
        """Turn the accepted tokens into outputs."""
        advances, self._unrendered = self._unrendered, []
        return [self._output(advance) for advance in advances]

    def fail_step(self, step_id: int, message: str) -> list[RequestOutput]:
        """End the requests of a step that a stage refused; the others go on."""
        step = self._in_flight
        if step is None or step.batch.step != step_id:
            return []
        self._in_flight = None
        outputs = []
        for choice in step.sequences:
            if choice.phase != "finished":
                outputs += self._fail(choice.request.id, message)
        return outputs

    def overdue_s(self, now_s: float) -> float:
        """Seconds that the step in flight has been out (0: none is)."""
        return now_s - self._sent_s if self._in_flight is not None else 0.0

    def counters(self) -> LaneCounters:
        scheduler = self._scheduler
        return LaneCounters(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_in_use=scheduler.pool.blocks_in_use,
            num_blocks=scheduler.pool.num_blocks,
            preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            steps=self._steps,
            step_s=self._step_s,
            stage_s=self._stage_s,
            adapter_version=scheduler.adapter_version,
        )

    def _output(self, advance: Advance) -> RequestOutput:
        choice = advance.sequence
        text = ""
        reason, stop = advance.finish_reason, advance.stop_reason
        detokenizer = self._text[choice]
        # The token that ends a text is not part of it.
        is_end = reason == "stop"
        if advance.token is not None and not is_end:
            text = detokenizer.push(advance.token)
        if detokenizer.stop is None and reason is not None:
            text += detokenizer.finish()
        stop_string = detokenizer.stop
        if stop_string is not None:
            self._scheduler.finish(choice)
            reason = "stop"
        output = RequestOutput(
            id=choice.request.id,
            index=choice.index,
            tokens=() if advance.token is None else (advance.token,),
            text=text,
            logprobs=() if advance.logprob is None else (advance.logprob,),
            prompt_logprobs=self._prompt_logprobs(choice),
            finish_reason=reason,
            stop_reason=stop if stop_string is None else stop_string,
            cached_tokens=choice.cached_tokens if choice.num_output <= 1 else 0,
        )
        if reason is not None:
            del self._text[choice]
            self._forget_if_done(choice.request.id)
        return output

    def _prompt_logprobs(self, choice: Choice) -> tuple[TokenLogprob, ...] | None:
        """The scored prompt, once: the first token has no probability, nothing precedes it."""
        request = choice.request
        wanted = request.sampling.prompt_logprobs is not None and choice.index == 0
        if not wanted or request.id in self._scored:
            return None
        self._scored.add(request.id)
        return (TokenLogprob(request.prompt[0], None), *choice.prompt_logprobs)

    def _last(
        self,
        choice: Choice,
        reason: FinishReason,
        *,
        stop_reason: str | None = None,
        error: str = "",
    ) -> RequestOutput:
        detokenizer = self._text.pop(choice, None)
        return RequestOutput(
            id=choice.request.id,
            index=choice.index,
            text=detokenizer.finish() if detokenizer is not None else "",
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
        )

    def _fail(self, request_id: str, message: str) -> list[RequestOutput]:
        outputs = self.render()
        ended = self._scheduler.abort(request_id)
        outputs += [self._last(choice, "error", error=message) for choice in ended]
        self._forget(request_id)
        return outputs

    def _forget_if_done(self, request_id: str) -> None:
        if not self._scheduler.live(request_id):
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._deadlines.pop(request_id, None)
        self._scored.discard(request_id)


def _failed(request_id: str, index: int, error: str) -> RequestOutput:
    return RequestOutput(id=request_id, index=index, finish_reason="error", error=error)
