"""Who is in the next step: continuous batching over paged KV, as a pure state machine.

One `Scheduler` a lane. `schedule()` fills a token budget, decodes first, then prompt chunks, then
new requests whose whole prompt fits; when blocks run out the last admitted sequence gives its
blocks back and is recomputed later (its draws depend on seed and position alone, so its tokens do
not change). `commit()` takes what the last stage drew. No clock, no I/O, no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.engine.batch import Draw, Rows, StepBatch, StepResult
from actors.engine.kv import BlockPool, BlockTable
from actors.engine.requests import FinishReason, Request, RequestError, TokenLogprob

Phase = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of a request: its tokens so far and where their KV is."""

    request: Request
    index: int
    tokens: list[int]
    order: int
    """Admission order; the largest is preempted first."""
    leader: Choice | None = None
    """Choice 0 of the same request, whose prompt blocks this choice shares."""
    num_computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    phase: Phase = "waiting"
    num_preemptions: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that must run before the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    @property
    def is_scored(self) -> bool:
        """Whether the prompt's own log-probabilities are still to be collected."""
        wanted = self.request.sampling.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt - 1


@dataclass(frozen=True, slots=True)
class Step:
    """What `schedule()` decided: the message and the sequences behind its rows."""

    batch: StepBatch
    sequences: tuple[Choice, ...]
    drawing: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did to one sequence."""

    sequence: Choice
    token: int | None
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    stop_reason: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneLimits:
    """The numbers a lane lives by."""

    num_blocks: int
    block_tokens: int
    max_running: int
    max_step_tokens: int
    max_model_tokens: int
    max_waiting: int = 256
    prefix_cache: bool = True
    eos_token_ids: tuple[int, ...] = ()

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence: what the model takes and the lane's blocks hold."""
        return min(self.max_model_tokens, self.num_blocks * self.block_tokens)


class Scheduler:
    """The batch of one lane."""

    def __init__(self, limits: LaneLimits, *, lane: int = 0, life: int = 0, epoch: int = 0) -> None:
        self.limits = limits
        self.pool = BlockPool(
            limits.num_blocks, limits.block_tokens, prefix_cache=limits.prefix_cache
        )
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.adapter_version = 0
        self._lane = lane
        self._life = life
        self._epoch = epoch
        self._next_step = 0
        self._next_order = 0
        self._waiting: deque[Choice] = deque()
        self._running: list[Choice] = []
        self._by_request: dict[str, list[Choice]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    def use_adapter(self, version: int) -> None:
        """Run the next steps with another adapter, those of requests under way included.

        What runs keeps the KV that the old weights made, as it keeps their tokens; what is admitted
        from now on shares none of it. Who is preempted is recomputed with the new weights.
        """
        self.adapter_version = version
        self.pool.forget_contents(sequence.table for sequence in self._running)

    def use_epoch(self, epoch: int, *, recompute: bool) -> None:
        """Send the next steps to the stages of another plan.

        Of layers that have moved, the new holders have the KV of `pool.referenced()` blocks. With
        `recompute` they have none: every sequence runs again from its tokens, and draws the same.
        """
        self._epoch = epoch
        if recompute:
            for sequence in list(self._running):
                self._preempt(sequence)
        self.pool.forget_unreferenced()

    def requests(self) -> list[str]:
        return list(self._by_request)

    def live(self, request_id: str) -> Sequence[Choice]:
        """The unfinished choices of a request (empty: unknown)."""
        return tuple(self._by_request.get(request_id, ()))

    def add(self, request: Request) -> list[Choice]:
        """Queue a request's choices.

        Raises:
            RequestError: It can never fit, or its id is already in flight.
        """
        longest = len(request.prompt) + request.sampling.max_tokens
        if longest > self.limits.max_sequence_tokens:
            raise RequestError(
                f"{len(request.prompt)} prompt tokens + max_tokens {request.sampling.max_tokens} = "
                f"{longest}; a sequence holds at most {self.limits.max_sequence_tokens}. Shorten "
                "the prompt, lower max_tokens, or raise engine.num_kv_blocks",
                "max_tokens",
            )
        if request.id in self._by_request:
            raise RequestError(f"request id {request.id!r} is already in flight", "id")
        sequences: list[Choice] = []
        for index, drawn in enumerate(request.progress or ((),) * request.n):
            if drawn is None:
                continue
            leader = sequences[0] if index and not request.progress else None
            tokens = [*request.prompt, *drawn]
            sequences.append(Choice(request, index, tokens, self._next_order, leader))
            self._next_order += 1
        self._waiting.extend(sequences)
        self._by_request[request.id] = list(sequences)
        return sequences

    def abort(self, request_id: str) -> list[Choice]:
        """End every choice of a request and free its blocks; returns those that were live."""
        live = list(self._by_request.get(request_id, ()))
        for sequence in live:
            self.finish(sequence)
        return live

    def finish(self, sequence: Choice) -> None:
        """End one choice and free its blocks. Safe to call twice."""
        if sequence.phase == "finished":
            return
        if sequence.phase == "running":
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.phase = "finished"
        self.pool.free(sequence.table)
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]

    def schedule(self) -> Step | None:
        """Decide the next step; None when nothing can run."""
        copies: list[tuple[int, int]] = []
        planned: list[tuple[Choice, int]] = []
        budget = self.limits.max_step_tokens
        decodes_first = sorted(self._running, key=lambda s: (s.num_pending > 1, s.order))
        for sequence in decodes_first:
            if sequence.phase != "running" or budget == 0:
                continue
            count = min(sequence.num_pending, budget)
            if self._grow_or_preempt(sequence, count, copies, planned):
                planned.append((sequence, count))
                budget -= count
        budget = self._admit(budget, copies, planned)
        if not planned:
            return None
        return self._step(planned, copies)

    def commit(self, step: Step, result: StepResult) -> list[Advance]:
        """Apply what the last stage drew; finished sequences have freed their blocks."""
        prompts = iter(result.prompt_logprobs)
        scored = {i for i, _ in step.batch.prompt_logprobs}
        for i, (sequence, rows) in enumerate(zip(step.sequences, step.batch.rows, strict=True)):
            entries = next(prompts) if i in scored else []
            if sequence.phase != "running":
                continue
            sequence.num_computed = rows.start + rows.length
            self.pool.register(sequence.table, sequence.tokens, sequence.num_computed)
            sequence.prompt_logprobs.extend(entries)
        advances = []
        logprobs = result.logprobs or [None] * len(result.tokens)
        for sequence, token, logprob in zip(step.drawing, result.tokens, logprobs, strict=True):
            if sequence.phase == "running":
                advances.append(self._draw(sequence, token, logprob))
        advances += [
            self._end(sequence, "length")
            for sequence in step.sequences
            if sequence.phase == "running"
            and sequence.request.sampling.max_tokens == 0
            and sequence.num_pending == 0
        ]
        return advances

    def _draw(self, sequence: Choice, token: int, logprob: TokenLogprob | None) -> Advance:
        sampling = sequence.request.sampling
        sequence.tokens.append(token)
        reason: FinishReason | None = None
        stop: int | None = None
        if token in sampling.stop_token_ids:
            reason, stop = "stop", token
        elif token in self.limits.eos_token_ids and not sampling.ignore_eos:
            reason = "stop"
        elif sequence.num_output >= sampling.max_tokens:
            reason = "length"
        if reason:
            self.finish(sequence)
        return Advance(sequence, token, logprob, reason, stop)

    def _end(self, sequence: Choice, reason: FinishReason) -> Advance:
        self.finish(sequence)
        return Advance(sequence, None, None, reason)

    def _grow_or_preempt(
        self,
        sequence: Choice,
        count: int,
        copies: list[tuple[int, int]],
        planned: list[tuple[Choice, int]],
    ) -> bool:
        """Get blocks for `count` more tokens, taking them from the last admitted if need be."""
        start = sequence.num_computed
        while (growth := self.pool.grow(sequence.table, start, start + count)) is None:
            victims = [s for s in self._running if all(s is not p for p, _ in planned)]
            victim = max(victims, key=lambda s: s.order)
            self._preempt(victim)
            if victim is sequence:
                return False
        _add_copies(copies, growth.copies)
        return True

    def _preempt(self, sequence: Choice) -> None:
        self._running.remove(sequence)
        self.pool.free(sequence.table)
        sequence.num_computed = 0
        if sequence.is_scored:
            sequence.prompt_logprobs.clear()
        sequence.phase = "waiting"
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        position = sum(1 for s in self._waiting if s.order < sequence.order)
        self._waiting.insert(position, sequence)

    def _admit(
        self, budget: int, copies: list[tuple[int, int]], planned: list[tuple[Choice, int]]
    ) -> int:
        """Admit waiting sequences in order while slots, budget and blocks last."""
        for sequence in list(self._waiting):
            if budget == 0 or self.num_running >= self.limits.max_running:
                break
            if _awaits_leader(sequence):
                continue
            count = self._try_admit(sequence, budget, copies)
            if count is None:
                break
            planned.append((sequence, count))
            budget -= count
        return budget

    def _try_admit(
        self, sequence: Choice, budget: int, copies: list[tuple[int, int]]
    ) -> int | None:
        """Start the sequence when blocks for the whole of it are free; None when they are not.

        Only the blocks of its first chunk are taken; the others may be short again by then.
        One block more than it needs must stay free while others run, so that a newcomer does not
        push out who is already running at the very next step.
        """
        table, cached = self._reuse(sequence)
        needed = self.pool.blocks_for(len(sequence.tokens)) - len(table.blocks)
        growth = None
        count = min(len(sequence.tokens) - cached, budget)
        if needed + (1 if self._running else 0) <= self.pool.num_free:
            growth = self.pool.grow(table, cached, cached + count)
        if growth is None:
            self.pool.free(table)
            if self._running or not cached:
                return None
            # Alone, and copying the shared last block is one block too many: compute it all.
            table, cached, count = BlockTable(), 0, min(len(sequence.tokens), budget)
            growth = self.pool.grow(table, 0, count)
            assert growth is not None, "add() admits only what an empty pool holds"
        _add_copies(copies, growth.copies)
        sequence.table, sequence.num_computed = table, cached
        sequence.cached_tokens = cached
        self.prefix_hit_tokens += cached
        sequence.phase = "running"
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return count

    def _reuse(self, sequence: Choice) -> tuple[BlockTable, int]:
        """Return shared blocks and how many of the sequence's tokens they hold."""
        leader = sequence.leader
        if leader is not None and leader.phase == "running":
            if leader.num_computed >= sequence.num_prompt:
                return self.pool.fork(leader.table, sequence.num_prompt), sequence.num_prompt - 1
        elif sequence.is_scored:
            return BlockTable(), 0
        return self.pool.match(sequence.tokens)

    def _step(self, planned: list[tuple[Choice, int]], copies: list[tuple[int, int]]) -> Step:
        tokens: list[int] = []
        rows: list[Rows] = []
        drawn: list[int] = []
        scored: list[tuple[int, int]] = []
        targets: list[list[int]] = []
        for i, (sequence, count) in enumerate(planned):
            start = sequence.num_computed
            end = start + count
            tokens += sequence.tokens[start:end]
            rows.append(Rows(start, count, sequence.table.blocks[: self.pool.blocks_for(end)]))
            if end == len(sequence.tokens) and sequence.request.sampling.max_tokens > 0:
                drawn.append(i)
            if sequence.is_scored and start < sequence.num_prompt - 1:
                scored.append((i, sequence.request.sampling.prompt_logprobs or 0))
                targets.append(sequence.tokens[start + 1 : min(end + 1, sequence.num_prompt)])
        sequences = tuple(sequence for sequence, _ in planned)
        drawing = tuple(sequences[i] for i in drawn)
        batch = StepBatch(
            self._lane, self._next_step, self._epoch, tokens, rows, copies, drawn,
            [self._draw_spec(sequence) for sequence in drawing], scored, targets,
            self.adapter_version, self._life,
        )  # fmt: skip
        self._next_step += 1
        return Step(batch, sequences, drawing)

    def _draw_spec(self, sequence: Choice) -> Draw:
        sampling = sequence.request.sampling
        banned: Iterable[int] = ()
        if sequence.num_output < sampling.min_tokens:
            banned = (*self.limits.eos_token_ids, *sampling.stop_token_ids)
        return Draw(
            seed=(sampling.seed + sequence.index) % 2**63,
            position=len(sequence.tokens),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
            banned=tuple(banned),
            history=tuple(sequence.tokens) if sampling.needs_history else (),
            num_prompt=sequence.num_prompt,
        )


def _add_copies(copies: list[tuple[int, int]], new: Iterable[tuple[int, int]]) -> None:
    """Add copies to a step's, which are all done at once: a block that this step fills by a copy
    is copied from where that comes from, for it does not hold it yet."""
    origin = {target: source for source, target in copies}
    copies.extend((origin.get(source, source), target) for source, target in new)


def _awaits_leader(sequence: Choice) -> bool:
    """Whether choice 0 is about to compute the prompt that this choice can share."""
    leader = sequence.leader
    if leader is None or sequence.num_output:
        return False
    if leader.phase == "waiting":
        return leader.order < sequence.order
    return leader.phase == "running" and leader.num_computed < leader.num_prompt
