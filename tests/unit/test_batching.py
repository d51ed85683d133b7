"""Who is in the next step: any batch, any pool, any preemption gives every request its own tokens.

A fake stage keeps a shadow KV cache and draws from what it reads there, so a block written too
early, copied too late or shared by mistake changes tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.engine.batch import Draw, StepBatch, StepResult
from actors.engine.batching import Advance, Choice, LaneLimits, Scheduler, Step
from actors.engine.requests import FinishReason, Request, RequestError, SamplingParams, TokenLogprob

EOS = 0
VOCABULARY = 7
UNWRITTEN = -1


def next_token(history: Sequence[int], draw: Draw) -> int:
    """The model: a pure function of the tokens so far, the position and the seed."""
    seed = 0 if draw.is_greedy else draw.seed
    data = repr((list(history), draw.position, seed)).encode()
    allowed = [token for token in range(VOCABULARY) if token not in draw.banned]
    return allowed[zlib.crc32(data) % len(allowed)]


def score(history: Sequence[int], target: int, k: int) -> TokenLogprob:
    return TokenLogprob(target, -float(zlib.crc32(repr((list(history), target, k)).encode())))


class FakeStage:
    """Runs steps over a shadow KV cache: writes tokens, and draws from what it reads back."""

    def __init__(self, limits: LaneLimits) -> None:
        self.size = limits.block_tokens
        self.slots = [UNWRITTEN] * (limits.num_blocks * limits.block_tokens)

    def run(self, batch: StepBatch) -> StepResult:
        batch = StepBatch.decode(batch.encode())
        self._copy(batch.copies)
        starts = self._write(batch)
        drawn = [
            next_token(self._context(batch, i), draw)
            for i, draw in zip(batch.drawn, batch.draws, strict=True)
        ]
        scored = []
        for (i, k), targets in zip(batch.prompt_logprobs, batch.targets, strict=True):
            context, first = self._context(batch, i), batch.rows[i].start
            scored.append([score(context[: first + j + 1], t, k) for j, t in enumerate(targets)])
        for i, entry in enumerate(batch.rows):
            written = batch.tokens[starts[i] : starts[i] + entry.length]
            assert self._context(batch, i)[entry.start :] == written
        logprobs = [
            None if draw.logprobs < 0 else TokenLogprob(token, -1.0)
            for token, draw in zip(drawn, batch.draws, strict=True)
        ]
        return StepResult(drawn, logprobs, scored)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        assert len({target for _, target in copies}) == len(copies)
        size = self.size
        contents = [self.slots[source * size : (source + 1) * size] for source, _ in copies]
        for (_, target), content in zip(copies, contents, strict=True):
            self.slots[target * size : (target + 1) * size] = content

    def _write(self, batch: StepBatch) -> list[int]:
        written: set[int] = set()
        starts, row = [], 0
        for entry in batch.rows:
            assert len(entry.blocks) == -(-(entry.start + entry.length) // self.size)
            assert len(set(entry.blocks)) == len(entry.blocks)
            starts.append(row)
            for position in range(entry.start, entry.start + entry.length):
                slot = entry.blocks[position // self.size] * self.size + position % self.size
                assert slot not in written, "two rows of a step write one slot"
                written.add(slot)
                self.slots[slot] = batch.tokens[row]
                row += 1
        assert row == len(batch.tokens)
        return starts

    def _context(self, batch: StepBatch, index: int) -> list[int]:
        entry = batch.rows[index]
        return [
            self.slots[entry.blocks[p // self.size] * self.size + p % self.size]
            for p in range(entry.start + entry.length)
        ]


def limits(**changes: Any) -> LaneLimits:
    base: dict[str, Any] = {
        "num_blocks": 64, "block_tokens": 4, "max_running": 8, "max_step_tokens": 16,
        "max_model_tokens": 64, "eos_token_ids": (EOS,),
    }  # fmt: skip
    return LaneLimits(**(base | changes))


def request(id_: str = "r", prompt: Sequence[int] = (1, 2, 3), n: int = 1, **how: Any) -> Request:
    sampling = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | how))
    return Request(id=id_, prompt=tuple(prompt), sampling=sampling, n=n)


def alone(asked: Request, index: int, eos: Sequence[int] = (EOS,)) -> tuple[list[int], str]:
    """What an unbatched run without paging gives: the law in its simplest form."""
    how = asked.sampling
    tokens: list[int] = []
    while len(tokens) < how.max_tokens:
        banned = (*eos, *how.stop_token_ids) if len(tokens) < how.min_tokens else ()
        history = [*asked.prompt, *tokens]
        draw = Draw(how.seed + index, len(history), how.temperature, banned=banned)
        tokens.append(next_token(history, draw))
        if tokens[-1] in how.stop_token_ids or (tokens[-1] in eos and not how.ignore_eos):
            return tokens, "stop"
    return tokens, "length"


class Run:
    """A scheduler and its fake stage; remembers what came of every choice."""

    def __init__(self, limits: LaneLimits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.stage = FakeStage(limits)
        self.choices: list[Choice] = []
        self.ends: dict[Choice, FinishReason] = {}
        self.steps: list[Step] = []

    def add(self, asked: Request) -> None:
        self.choices += self.scheduler.add(asked)

    def step(self) -> Step | None:
        """One whole step."""
        step = self.schedule()
        if step is not None:
            self.commit(step)
        return step

    def schedule(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is not None:
            self.steps.append(step)
            self._check_step(step)
        return step

    def commit(self, step: Step) -> list[Advance]:
        advances = self.scheduler.commit(step, self.stage.run(step.batch))
        for advance in advances:
            if advance.finish_reason is not None:
                assert advance.sequence not in self.ends
                self.ends[advance.sequence] = advance.finish_reason
        return advances

    def drain(self, *, at_most: int = 10_000) -> None:
        for _ in range(at_most):
            if self.step() is None:
                break
        else:
            raise AssertionError(f"not idle after {at_most} steps")
        assert self.scheduler.is_idle

    def outputs(self, request_id: str = "r") -> list[list[int]]:
        mine = [c for c in self.choices if c.request.id == request_id]
        return [choice.tokens[choice.num_prompt :] for choice in mine]

    def check_all(self) -> None:
        """Every choice that ended by itself has exactly the tokens of an unbatched run."""
        for choice in self.choices:
            if (reason := self.ends.get(choice)) is None:
                continue
            tokens = choice.tokens[choice.num_prompt :]
            assert (tokens, reason) == alone(choice.request, choice.index)
            self._check_scores(choice)

    def _check_scores(self, choice: Choice) -> None:
        k, prompt = choice.request.sampling.prompt_logprobs, choice.request.prompt
        wanted: list[TokenLogprob] = []
        if k is not None and choice.index == 0:
            wanted = [score(prompt[:i], prompt[i], k) for i in range(1, len(prompt))]
        assert choice.prompt_logprobs == wanted

    def _check_step(self, step: Step) -> None:
        batch, limits = step.batch, self.limits
        assert 0 < batch.num_tokens <= limits.max_step_tokens
        assert len(batch.rows) == len(step.sequences) == len(set(step.sequences))
        assert self.scheduler.num_running <= limits.max_running
        assert all(sequence.phase == "running" for sequence in step.sequences)
        assert (classes := [_class(s) for s in step.sequences]) == sorted(classes)


def _class(sequence: Choice) -> int:
    """0: it decodes; 1: a chunk of a prompt; 2: admitted by this step."""
    if sequence.num_computed == sequence.cached_tokens:
        return 2
    return int(sequence.num_pending > 1)


# --- one thing at a time ----------------------------------------------------------------------


def test_one_request_gets_the_tokens_of_an_unbatched_run() -> None:
    run = Run(limits())
    run.add(request(max_tokens=20))

    run.drain()

    run.check_all()
    assert run.ends == {run.choices[0]: "length"}
    assert run.scheduler.pool.blocks_in_use == 0


def test_decodes_come_before_prompt_chunks_and_the_budget_is_kept() -> None:
    run = Run(limits(max_step_tokens=6))
    run.add(request("old", max_tokens=20))
    run.step()
    run.add(request("new", prompt=range(1, 12)))

    shapes = [[(s.request.id, r.length) for s, r in zip(step.sequences, step.batch.rows,
              strict=True)] for step in (run.step(), run.step(), run.step()) if step]  # fmt: skip

    assert shapes == [
        [("old", 1), ("new", 5)],
        [("old", 1), ("new", 5)],
        [("old", 1), ("new", 1)],
    ]


def test_an_older_prompt_waits_for_a_younger_decode() -> None:
    # Without a prefix cache choice 1 computes the prompt again when choice 0 has ended at once.
    run = Run(limits(max_step_tokens=6, prefix_cache=False))
    run.add(request("old", prompt=range(1, 10), n=2, max_tokens=1))
    run.add(request("young", prompt=[4, 4]))
    for _ in range(3):
        run.step()

    step = run.step()

    assert step is not None
    rows = zip(step.sequences, step.batch.rows, strict=True)
    assert [(s.request.id, s.index, r.length) for s, r in rows] == [("young", 0, 1), ("old", 1, 4)]


def test_a_budget_below_the_number_that_runs_serves_the_oldest_first_and_all_in_time() -> None:
    run = Run(limits(max_step_tokens=2, max_running=4))
    for i in range(4):
        run.add(request(str(i), prompt=[i + 1]))

    run.drain(at_most=40)

    run.check_all()
    assert [choice.request.id for choice in run.ends] == ["0", "1", "2", "3"]


def test_a_chunk_that_does_not_end_the_prompt_draws_nothing() -> None:
    run = Run(limits(max_step_tokens=4))
    run.add(request(prompt=range(1, 10)))

    first, second, third = run.step(), run.step(), run.step()

    assert first is not None
    assert first.batch.drawn == []
    assert second is not None
    assert second.batch.drawn == []
    assert third is not None
    assert third.batch.drawn == [0]


def test_at_most_max_running_sequences_run() -> None:
    run = Run(limits(max_running=2))
    for i in range(5):
        run.add(request(str(i)))

    step = run.step()

    assert step is not None
    assert [s.request.id for s in step.sequences] == ["0", "1"]
    assert run.scheduler.num_waiting == 3


def test_choices_share_the_blocks_of_their_prompt() -> None:
    run = Run(limits(max_step_tokens=64, prefix_cache=False))
    run.add(request(prompt=range(1, 10), n=4, temperature=1.0))

    first, second = run.step(), run.step()

    assert first is not None
    assert [s.index for s in first.sequences] == [0]
    assert second is not None
    tables = [entry.blocks for entry in second.batch.rows]
    assert [len(table) for table in tables] == [3, 3, 3, 3]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4
    assert run.scheduler.pool.blocks_in_use == 2 + 4
    run.drain()
    run.check_all()
    assert len({tuple(tokens) for tokens in run.outputs()}) == 4


def test_choices_of_a_prompt_that_fills_its_blocks_exactly() -> None:
    run = Run(limits())
    run.add(request(prompt=range(1, 9), n=3, temperature=1.0))

    run.drain()

    run.check_all()


@pytest.mark.parametrize("prompt", [[1, 2], [1, 2, 3, 4, 5, 6]])
def test_a_block_that_a_step_fills_by_a_copy_is_shared_in_that_step(prompt: list[int]) -> None:
    # Choice 0 was put back and comes again with choice 1, and its last block is known: both copy it
    # to write on, the second from the first one's copy.
    run = Run(limits(num_blocks=4 if len(prompt) == 2 else 5, max_running=3, max_step_tokens=64))
    for id_ in ("a", "b"):
        run.add(request(id_, prompt, n=2, max_tokens=6, temperature=1.0))
        run.step()
        run.step()

    run.drain()

    run.check_all()
    sources = [[source for source, _ in step.batch.copies] for step in run.steps]
    assert any(len(set(each)) < len(each) for each in sources), "no block was copied twice"


def test_a_second_request_reuses_the_prefix_of_the_first() -> None:
    run = Run(limits())
    run.add(request("a", prompt=range(1, 10)))
    run.drain()
    run.add(request("b", prompt=[*range(1, 9), 6, 6]))
    run.drain()

    run.check_all()
    assert [choice.cached_tokens for choice in run.choices] == [0, 8]
    assert run.scheduler.prefix_hit_tokens == 8


def test_another_adapter_is_for_all_and_shares_nothing_of_the_one_before() -> None:
    run = Run(limits())
    run.add(request("a", prompt=range(1, 10), max_tokens=12))
    first = run.step()
    run.scheduler.use_adapter(7)
    run.add(request("b", prompt=range(1, 10)))
    second = run.step()
    run.drain()
    run.add(request("c", prompt=range(1, 10)))
    run.drain()

    assert first is not None
    assert first.batch.adapter_version == 0
    assert second is not None
    assert [s.request.id for s in second.sequences] == ["a", "b"]
    assert {step.batch.adapter_version for step in run.steps[1:]} == {7}
    assert [choice.cached_tokens for choice in run.choices] == [0, 0, 8]
    run.check_all()


def test_a_choice_shares_its_requests_prompt_across_a_switch() -> None:
    run = Run(limits(max_running=1))
    run.add(request("a", prompt=range(1, 10), n=2))
    run.step()
    run.scheduler.use_adapter(1)
    run.drain()

    run.check_all()
    assert run.scheduler.pool.blocks_in_use == 0


def test_when_blocks_run_out_the_last_admitted_waits_and_its_tokens_do_not_change() -> None:
    run = Run(limits(num_blocks=10))
    for i in range(3):
        run.add(request(str(i), prompt=[i + 1] * 8, max_tokens=16, temperature=1.0, seed=i))

    run.drain()

    run.check_all()
    assert run.scheduler.num_preemptions > 0
    assert run.choices[0].num_preemptions == 0
    assert sorted(run.ends, key=list(run.ends).index)[0] is run.choices[0]


def test_the_preempted_come_back_before_those_who_never_ran() -> None:
    run = Run(limits(num_blocks=5))
    run.add(request("a", prompt=[1] * 7, max_tokens=12))
    run.add(request("b", prompt=[2] * 7, max_tokens=12))
    run.step()
    run.add(request("c", prompt=[3] * 7, max_tokens=12))

    run.drain()

    run.check_all()
    assert run.choices[1].num_preemptions > 0
    assert [choice.request.id for choice in run.ends] == ["a", "b", "c"]


def test_choices_that_come_back_together_do_not_share_what_is_not_computed_yet() -> None:
    run = Run(limits(num_blocks=11, max_step_tokens=64, prefix_cache=False))
    run.add(request("old", prompt=[3] * 24, max_tokens=20))
    run.add(request("pair", prompt=[1] * 5, n=2, max_tokens=12, temperature=1.0))

    run.drain()

    run.check_all()
    _, leader, follower = run.choices
    assert leader.num_preemptions > 0
    assert follower.num_preemptions > 0
    together = [step for step in run.steps if {leader, follower} <= set(step.sequences)]
    assert any(all(rows.start == 0 for rows in step.batch.rows) for step in together)


def test_a_newcomer_leaves_a_block_for_those_who_run() -> None:
    run = Run(limits(num_blocks=4))
    run.add(request("a", prompt=[1] * 7, max_tokens=5))
    run.step()
    run.add(request("b", prompt=[2] * 5, max_tokens=4))

    run.drain()

    run.check_all()
    assert run.scheduler.num_preemptions == 0


def test_a_prompt_that_is_cached_whole_in_a_pool_that_is_exactly_full() -> None:
    run = Run(limits(num_blocks=2))
    for id_ in ("a", "b"):
        run.add(request(id_, prompt=range(1, 9), max_tokens=0, prompt_logprobs=None))
        run.drain()

    assert run.scheduler.pool.num_free == 2
    assert list(run.ends.values()) == ["length", "length"]
    run.check_all()


def test_a_prompt_that_is_cached_whole_waits_while_its_copy_has_no_room() -> None:
    run = Run(limits(num_blocks=3))
    run.add(request("a", prompt=range(1, 9), max_tokens=4))
    run.step()
    run.add(request("b", prompt=range(1, 9), max_tokens=4))

    run.drain(at_most=20)

    run.check_all()
    assert len(run.ends) == 2


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_no_tokens_wanted_runs_the_prompt_and_ends_by_length(n: int, prefix_cache: bool) -> None:
    run = Run(limits(max_step_tokens=8, prefix_cache=prefix_cache))
    run.add(request(prompt=range(1, 14), max_tokens=0, n=n, prompt_logprobs=2))

    run.drain(at_most=10)

    assert run.outputs() == [[]] * n
    assert set(run.ends.values()) == {"length"}
    assert len(run.ends) == n
    run.check_all()


def test_a_scored_prompt_is_computed_though_the_cache_knows_it() -> None:
    run = Run(limits())
    run.add(request("a", prompt=range(1, 10)))
    run.drain()
    run.add(request("b", prompt=range(1, 10), prompt_logprobs=1, n=2))
    run.drain()

    run.check_all()
    assert [choice.cached_tokens for choice in run.choices] == [0, 0, 8]


def test_a_scored_prompt_of_one_token_has_nothing_to_score() -> None:
    run = Run(limits())
    run.add(request(prompt=[5], prompt_logprobs=1))

    run.drain()

    assert run.choices[0].prompt_logprobs == []
    run.check_all()


def test_a_scored_prompt_that_is_preempted_halfway_is_scored_once() -> None:
    run = Run(limits(num_blocks=18, block_tokens=1, max_step_tokens=3))
    run.add(request("a", prompt=[3, 3], max_tokens=16))
    run.step()
    run.add(request("b", prompt=range(1, 14), max_tokens=2, prompt_logprobs=0))
    scored = run.choices[1]
    most = 0
    while not scored.num_preemptions:
        assert run.step() is not None
        most = max(most, len(scored.prompt_logprobs))
    assert 0 < most < 12

    run.drain()

    run.check_all()


def test_the_end_tokens_are_banned_until_min_tokens() -> None:
    run = Run(limits())
    how: dict[str, Any] = {"min_tokens": 3, "max_tokens": 6, "stop_token_ids": (5,)}
    run.add(request(ignore_eos=False, **how))

    bans = []
    while (step := run.step()) is not None:
        bans.append(step.batch.draws[0].banned)

    assert bans[:3] == [(EOS, 5)] * 3
    assert set(bans[3:]) <= {()}
    run.check_all()


def test_a_stop_token_is_named_and_the_end_token_is_not() -> None:
    run = Run(limits())
    run.add(request("stop", stop_token_ids=tuple(range(VOCABULARY))))
    run.add(request("eos", ignore_eos=False, max_tokens=60))
    step = run.schedule()
    assert step is not None

    tokens = [4, EOS]
    advances = run.scheduler.commit(step, StepResult(tokens))

    assert [(a.token, a.finish_reason, a.stop_reason) for a in advances] == [
        (4, "stop", 4),
        (EOS, "stop", None),
    ]


def test_a_penalty_sends_the_history_and_only_a_penalty_does() -> None:
    run = Run(limits())
    run.add(request("plain", prompt=[1, 2]))
    run.add(request("penal", prompt=[3, 4], presence_penalty=0.5))
    run.step()

    step = run.step()

    assert step is not None
    plain, penal = step.batch.draws
    assert plain.history == ()
    assert penal.history == (3, 4, run.outputs("penal")[0][0])
    assert penal.num_prompt == 2


def test_choice_i_draws_with_seed_plus_i_and_wraps_at_the_largest() -> None:
    run = Run(limits(max_step_tokens=64))
    run.add(request(n=2, temperature=1.0, seed=2**63 - 1))
    run.step()

    step = run.step()

    assert step is not None
    assert [draw.seed for draw in step.batch.draws] == [2**63 - 1, 0]


# --- refusals, ends and ids -------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(limits(num_blocks=4, block_tokens=4, max_model_tokens=100))

    with pytest.raises(
        RequestError, match=r"10 prompt tokens \+ max_tokens 7 = 17; .* at most 16\..*num_kv_blocks"
    ):
        scheduler.add(request(prompt=[1] * 10, max_tokens=7))

    assert scheduler.is_idle
    scheduler.add(request(prompt=[1] * 10, max_tokens=6))


def test_the_models_own_length_is_a_limit_too() -> None:
    scheduler = Scheduler(limits(max_model_tokens=12))

    with pytest.raises(RequestError, match="= 13; a sequence holds at most 12"):
        scheduler.add(request(prompt=[1] * 5, max_tokens=8))


def test_a_longest_sequence_fills_the_pool_to_the_last_slot() -> None:
    run = Run(limits(num_blocks=4))
    run.add(request(prompt=[1] * 9, max_tokens=7))

    run.drain()

    run.check_all()
    assert run.scheduler.num_preemptions == 0


def test_an_id_in_flight_is_refused_and_may_be_used_again_after_the_end() -> None:
    run = Run(limits())
    run.add(request("r"))

    with pytest.raises(RequestError, match="'r' is already in flight"):
        run.add(request("r"))

    run.drain()
    run.add(request("r", prompt=[4, 4]))
    run.drain()
    run.check_all()
    assert len(run.ends) == 2


def test_an_aborted_request_gives_back_its_blocks_at_once_and_its_late_result_is_ignored() -> None:
    run = Run(limits())
    run.add(request("a", prompt=range(1, 7), n=2))
    run.add(request("b"))
    step = run.schedule()
    assert step is not None

    ended = run.scheduler.abort("a")
    advances = run.commit(step)

    assert [c.index for c in ended] == [0, 1]
    assert [a.sequence.request.id for a in advances] == ["b"]
    assert run.scheduler.live("a") == ()
    assert run.scheduler.requests() == ["b"]
    run.drain()
    run.check_all()


def test_an_id_reused_while_its_aborted_step_is_in_flight_is_another_request() -> None:
    run = Run(limits())
    run.add(request("r", prompt=[1, 2, 3]))
    step = run.schedule()
    assert step is not None
    run.scheduler.abort("r")
    run.add(request("r", prompt=[4, 5]))

    assert run.commit(step) == []
    run.drain()

    run.check_all()
    assert list(run.ends) == [run.choices[1]]


def test_aborting_the_leader_lets_its_followers_start_by_themselves() -> None:
    run = Run(limits(max_step_tokens=4))
    run.add(request(prompt=range(1, 10), n=3, temperature=1.0))
    run.step()

    run.scheduler.finish(run.choices[0])
    run.drain()

    run.check_all()
    assert set(run.ends) == set(run.choices[1:])


def test_finishing_or_aborting_twice_changes_nothing() -> None:
    run = Run(limits())
    run.add(request())
    run.scheduler.finish(run.choices[0])

    run.scheduler.finish(run.choices[0])

    assert run.scheduler.abort("r") == []
    assert run.scheduler.abort("never heard of") == []
    assert run.scheduler.is_idle


def test_nothing_to_run_is_no_step() -> None:
    assert Scheduler(limits()).schedule() is None


# --- any requests, any pool, any aborts -------------------------------------------------------


class AnyTraffic(RuleBasedStateMachine):
    """Random requests against a tiny pool, with aborts and refused steps at any moment."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_tokens=st.integers(1, 4),
        max_running=st.integers(1, 5),
        spare_budget=st.integers(0, 6),
        prefix_cache=st.booleans(),
    )
    def start(self, spare_budget: int, **numbers: Any) -> None:
        budget = numbers["max_running"] + spare_budget
        self.run_ = Run(limits(max_step_tokens=budget, max_model_tokens=24, **numbers))
        self.pending: Step | None = None
        self.num_added = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        max_tokens=st.integers(0, 9),
        min_tokens=st.integers(0, 3),
        n=st.integers(1, 3),
        seed=st.none() | st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (5,)]),
        prompt_logprobs=st.sampled_from([None, None, None, 0, 2]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
    )
    def add(
        self, prompt: list[int], n: int, max_tokens: int, min_tokens: int, seed: int | None,
        **how: Any,
    ) -> None:  # fmt: skip
        how["temperature"] = 0.0 if seed is None else 1.0
        how |= {"max_tokens": max_tokens, "min_tokens": min(min_tokens, max_tokens)}
        asked = request(str(self.num_added), prompt, n, seed=seed or 0, **how)
        longest = len(prompt) + max_tokens
        if longest > self.run_.limits.max_sequence_tokens:
            with pytest.raises(RequestError, match=f"= {longest}; a sequence holds at most"):
                self.run_.add(asked)
            return
        self.num_added += 1
        self.run_.add(asked)
        self.last = asked

    @precondition(lambda self: self.num_added > 0)
    @rule()
    def add_the_last_again(self) -> None:
        self.run_.add(replace(self.last, id=str(self.num_added)))
        self.num_added += 1

    @precondition(lambda self: self.pending is None)
    @rule(count=st.integers(1, 6))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.run_.step()

    @precondition(lambda self: self.pending is None)
    @rule()
    def schedule(self) -> None:
        self.pending = self.run_.schedule()

    @precondition(lambda self: self.pending is not None)
    @rule()
    def commit(self) -> None:
        assert self.pending is not None
        self.run_.commit(self.pending)
        self.pending = None

    @precondition(lambda self: self.pending is not None)
    @rule(is_executed=st.booleans())
    def refuse(self, is_executed: bool) -> None:
        """A stage refuses the step: it may have run on some stages, and its requests end."""
        assert self.pending is not None
        if is_executed:
            self.run_.stage.run(self.pending.batch)
        for choice in self.pending.sequences:
            self.run_.scheduler.finish(choice)
        self.pending = None

    @precondition(lambda self: self.num_added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = self.run_.scheduler.requests()
        if live:
            self.run_.scheduler.abort(data.draw(st.sampled_from(live)))

    @invariant()
    def no_block_is_lost(self) -> None:
        if hasattr(self, "run_"):
            live = [c for c in self.run_.choices if c.phase == "running"]
            self.run_.scheduler.pool.check([choice.table for choice in live])
            assert len(live) == self.run_.scheduler.num_running

    def teardown(self) -> None:
        if not hasattr(self, "run_"):
            return
        if self.pending is not None:
            self.run_.commit(self.pending)
        # Nobody starves: every step draws a token or moves the only prompt there is.
        work = sum(len(c.tokens) + c.request.sampling.max_tokens for c in self.run_.choices)
        self.run_.drain(at_most=10 + 4 * work)
        self.run_.check_all()
        assert all(choice.phase == "finished" for choice in self.run_.choices)
        assert self.run_.scheduler.pool.blocks_in_use == 0


TestAnyTraffic = AnyTraffic.TestCase
TestAnyTraffic.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
