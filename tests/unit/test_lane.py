"""A lane on a fake clock: text, stops, deadlines, aborts, refusals, and nothing left over."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.engine.batch import StepResult
from actors.engine.batching import LaneLimits
from actors.engine.lane import LaneCore
from actors.engine.requests import Request, RequestOutput, SamplingParams, TokenLogprob

Outputs = list[RequestOutput]
Model = Callable[[Sequence[int], int], int]
"""The next token of (history, position)."""


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and an end token behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()
END = TOKENIZER.get_vocab_size() - 1


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text).ids)


def says(reply: str, prompt: str = "Hi:") -> Model:
    """A model that continues any prompt of `prompt`'s length by `reply` and the end token."""
    script = [*ids(reply), END]

    def model(history: Sequence[int], position: int) -> int:
        return script[min(position - len(ids(prompt)), len(script) - 1)]

    return model


def rambles(history: Sequence[int], position: int) -> int:
    """A model whose next token depends on all before it."""
    return zlib.crc32(repr((list(history), position)).encode()) % 256


class Driver:
    """A lane, the stages behind it and the clock in front of it."""

    def __init__(self, model: Model = rambles, **limits: Any) -> None:
        base: dict[str, Any] = {
            "num_blocks": 64, "block_tokens": 4, "max_running": 8, "max_step_tokens": 32,
            "max_model_tokens": 128, "max_waiting": 16, "eos_token_ids": (END,),
        }  # fmt: skip
        self.core = LaneCore(LaneLimits(**(base | limits)), TOKENIZER, lane=3, epoch=7)
        self.model = model
        self.now_s = 0.0
        self.outputs: Outputs = []

    def add(
        self, id_: str = "r", prompt: str = "Hi:", n: int = 1, deadline_s: float | None = None,
        **how: Any,
    ) -> Outputs:  # fmt: skip
        sampling = SamplingParams(**({"max_tokens": 32, "temperature": 0.0} | how))
        asked = Request(id=id_, prompt=ids(prompt), sampling=sampling, n=n, deadline_s=deadline_s)
        return self._keep(self.core.add(asked, self.now_s))

    def abort(self, id_: str, reason: str | None = None) -> Outputs:
        return self._keep(self.core.abort(id_, reason))

    def tick(self, seconds: float) -> Outputs:
        self.now_s += seconds
        return self._keep(self.core.expire(self.now_s))

    def send(self) -> int:
        """Send the next step; returns its number."""
        step = self.core.next_step(self.now_s)
        assert step is not None
        return step.batch.step

    def answer(self, seconds: float = 0.0) -> Outputs:
        """Let the stages answer the step in flight."""
        step = self.core.step_in_flight
        assert step is not None
        self.now_s += seconds
        tokens = [self.model(s.tokens, len(s.tokens)) for s in step.drawing]
        logprobs = [
            None if draw.logprobs < 0 else TokenLogprob(token, -1.0)
            for draw, token in zip(step.batch.draws, tokens, strict=True)
        ]
        scored = [[TokenLogprob(t, -2.0) for t in targets] for targets in step.batch.targets]
        result = StepResult.from_wire(StepResult(tokens, logprobs, scored).to_wire())
        self.core.accept_result(step.batch.step, result, now_s=self.now_s, stage_s=seconds * 0.75)
        return self._keep(self.core.render())

    def run(self, at_most: int = 1000) -> Outputs:
        """Run until idle; returns all outputs so far."""
        for _ in range(at_most):
            if self.core.next_step(self.now_s) is None:
                return self.outputs
            self.answer()
        raise AssertionError(f"not idle after {at_most} steps")

    def of(self, id_: str = "r", index: int = 0) -> Outputs:
        return [out for out in self.outputs if (out.id, out.index) == (id_, index)]

    def text(self, id_: str = "r", index: int = 0) -> str:
        return "".join(out.text for out in self.of(id_, index))

    def end(self, id_: str = "r", index: int = 0) -> RequestOutput:
        """The one and last output with a finish reason."""
        [last] = [out for out in self.of(id_, index) if out.finish_reason]
        assert last is self.of(id_, index)[-1]
        return last

    def check_nothing_is_left(self) -> None:
        counters = self.core.counters()
        assert (counters.running, counters.waiting, counters.blocks_in_use) == (0, 0, 0)
        assert self.core.step_in_flight is None
        assert not self.core._text
        assert not self.core._deadlines
        assert not self.core._scored

    def _keep(self, outputs: Outputs) -> Outputs:
        self.outputs += [RequestOutput.from_wire(out.to_wire()) for out in outputs]
        return outputs


# --- text -------------------------------------------------------------------------------------


def test_a_reply_is_streamed_and_its_end_token_is_no_text() -> None:
    lane = Driver(says("Hello"))
    lane.add()

    outputs = lane.run()

    assert [out.text for out in outputs] == ["H", "e", "l", "l", "o", ""]
    assert [out.tokens for out in outputs] == [(t,) for t in (*ids("Hello"), END)]
    assert (lane.end().finish_reason, lane.end().stop_reason) == ("stop", None)
    lane.check_nothing_is_left()


def test_max_tokens_ends_a_reply_by_length() -> None:
    lane = Driver(says("Hello"))
    lane.add(max_tokens=4)

    lane.run()

    assert lane.text() == "Hell"
    assert lane.end().finish_reason == "length"
    lane.check_nothing_is_left()


def test_a_character_in_parts_is_held_back_and_the_last_output_flushes_it() -> None:
    lane = Driver(says("\u20ac\U0001f680"))
    lane.add(max_tokens=5)

    outputs = lane.run()

    assert [out.text for out in outputs] == ["", "", "\u20ac", "", "\ufffd"]
    assert len(lane.end().tokens) == 1


def test_an_end_token_in_the_middle_of_a_character_flushes_what_there_is() -> None:
    script = [*ids("ab"), ids("\u20ac")[0], END]
    lane = Driver(lambda history, position: script[position - 3])
    lane.add()

    lane.run()

    assert lane.text() == "ab\ufffd"
    assert lane.end().finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "text"), [("wor", "Hello "), ("o w", "Hell"), ("d", "Hello worl"), ("Hello", "")]
)
def test_a_stop_string_ends_the_text_before_it(stop: str, text: str) -> None:
    lane = Driver(says("Hello world"))
    lane.add(stop=(stop, "never"))

    lane.run()

    assert lane.text() == text
    assert (lane.end().finish_reason, lane.end().stop_reason) == ("stop", stop)
    lane.check_nothing_is_left()


def test_a_stop_string_wins_over_the_length_that_its_last_token_reaches() -> None:
    lane = Driver(says("Hello"))
    lane.add(max_tokens=5, stop=("lo",))

    lane.run()

    assert lane.text() == "Hel"
    assert (lane.end().finish_reason, lane.end().stop_reason) == ("stop", "lo")


def test_the_beginning_of_a_stop_string_is_released_when_the_reply_ends_there() -> None:
    lane = Driver(says("abcST"))
    lane.add(stop=("STOP",))

    outputs = lane.run()

    assert [out.text for out in outputs] == ["a", "b", "c", "", "", "ST"]
    assert (lane.end().finish_reason, lane.end().stop_reason) == ("stop", None)


def test_a_stop_token_ends_the_reply_is_named_and_is_no_text() -> None:
    lane = Driver(says("Hello"))
    [o] = ids("o")
    lane.add(stop_token_ids=(o,))

    lane.run()

    assert lane.text() == "Hell"
    assert lane.end().tokens == (o,)
    assert (lane.end().finish_reason, lane.end().stop_reason) == ("stop", o)


def test_a_choice_that_stops_leaves_the_others_running() -> None:
    replies = {0: says("ab"), 1: says("abcd")}
    lane = Driver()
    lane.model = lambda history, position: replies[len(lane.of("r", 0)) > 2](history, position)
    lane.add(n=2, max_tokens=4, stop=("b",))
    lane.run()

    assert [lane.end("r", i).finish_reason for i in (0, 1)] == ["stop", "stop"]
    lane.check_nothing_is_left()


@given(
    texts=st.lists(st.text("ab \u00e9\U0001f680", min_size=1, max_size=8), min_size=1, max_size=4),
    num_blocks=st.integers(12, 20),
    max_tokens=st.integers(0, 16),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_text_joined_is_what_the_tokens_decode_to(
    texts: list[str], num_blocks: int, max_tokens: int, data: st.DataObject
) -> None:
    lane = Driver(num_blocks=num_blocks, max_running=3, max_step_tokens=7)
    for i, prompt in enumerate(texts):
        assert lane.add(str(i), prompt[:8], n=data.draw(st.integers(1, 2)), max_tokens=max_tokens,
                        ignore_eos=True) == []  # fmt: skip
    lane.run()

    for id_, index in {(out.id, out.index) for out in lane.outputs}:
        asked = ids(texts[int(id_)][:8])
        tokens = [t for out in lane.of(id_, index) for t in out.tokens]
        assert len(tokens) == max_tokens
        before = TOKENIZER.decode(list(asked))
        assert before + lane.text(id_, index) == TOKENIZER.decode([*asked, *tokens])
        assert lane.end(id_, index).finish_reason == "length"
    lane.check_nothing_is_left()


# --- log-probabilities and the cache ----------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_come_once_and_begin_with_none(max_tokens: int) -> None:
    lane = Driver(says("Hello"), max_step_tokens=8)
    prompt = "a prompt that takes several chunks"
    lane.add(prompt=prompt, n=2, max_tokens=max_tokens, prompt_logprobs=0, logprobs=0)

    outputs = lane.run()

    [scored] = [out for out in outputs if out.prompt_logprobs is not None]
    assert scored.index == 0
    assert scored is lane.of("r", 0)[0]
    assert scored.prompt_logprobs is not None
    assert [entry.token_id for entry in scored.prompt_logprobs] == list(ids(prompt))
    assert [entry.logprob for entry in scored.prompt_logprobs] == [
        None, *[-2.0] * (len(prompt) - 1)
    ]  # fmt: skip
    assert [len(out.logprobs) for out in outputs] == [len(out.tokens) for out in outputs]
    lane.check_nothing_is_left()


def test_a_scored_prompt_of_one_token_has_one_entry() -> None:
    lane = Driver(says("Hello", "H"))
    lane.add(prompt="H", prompt_logprobs=1)

    lane.run()

    assert lane.of()[0].prompt_logprobs == (TokenLogprob(ids("H")[0], None),)


def test_cached_tokens_are_told_on_the_first_output_only() -> None:
    lane = Driver(says("Hello", "twelve bytes"))
    lane.add("a", "twelve bytes")
    lane.run()
    lane.add("b", "twelve bytes")
    lane.run()

    assert [out.cached_tokens for out in lane.of("a")] == [0] * 6
    assert [out.cached_tokens for out in lane.of("b")] == [11, 0, 0, 0, 0, 0]
    assert lane.core.counters().prefix_hit_tokens == 11


# --- deadlines and aborts ---------------------------------------------------------------------


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    lane = Driver(says("Hello"))
    lane.add(deadline_s=5.0, stop=("elephant",))
    for _ in range(2):
        lane.send()
        lane.answer(1.0)
    assert lane.text() == "H"

    assert lane.tick(2.5) == []
    [last] = lane.tick(0.5)

    assert (last.text, last.finish_reason, last.stop_reason) == ("e", "abort", "deadline")
    assert last.tokens == ()
    lane.check_nothing_is_left()


def test_a_deadline_ends_a_request_that_still_waits_and_every_choice_of_it() -> None:
    lane = Driver(max_running=1)
    lane.add("first", deadline_s=100.0)
    lane.add("late", n=3, deadline_s=1.0)
    lane.send()

    outputs = lane.tick(1.0)

    assert [(out.id, out.index, out.text) for out in outputs] == [("late", i, "") for i in range(3)]
    assert lane.tick(1.0) == []
    lane.answer()
    assert lane.core.counters().waiting == 0


def test_a_request_that_ended_in_time_has_no_deadline() -> None:
    lane = Driver(says("Hello"))
    lane.add(deadline_s=1.0)
    lane.run()
    lane.add(max_tokens=2)

    assert lane.tick(50.0) == []
    assert lane.run()[-1].finish_reason == "length"


def test_a_deadline_runs_from_arrival_not_from_the_clocks_beginning() -> None:
    lane = Driver()
    lane.tick(100.0)
    lane.add(deadline_s=5.0)

    assert lane.tick(4.5) == []
    assert len(lane.tick(0.5)) == 1


def test_an_abort_takes_effect_at_once_and_the_late_result_is_silent() -> None:
    lane = Driver(says("Hello"))
    lane.add("gone")
    lane.add("stays")
    lane.send()

    [last] = lane.abort("gone", "client left")
    assert (last.finish_reason, last.stop_reason, last.error) == ("abort", "client left", "")
    assert lane.core.counters().running == 1
    assert [out.id for out in lane.answer()] == ["stays"]

    lane.run()
    assert lane.text("stays") == "Hello"
    lane.check_nothing_is_left()


def test_an_abort_flushes_the_text_held_back() -> None:
    lane = Driver(says("xST"))
    lane.add(stop=("STOP",))
    for _ in range(3):
        lane.send()
        lane.answer()

    [last] = lane.abort("r")

    assert last.text == "ST"


def test_aborting_what_is_unknown_or_over_is_silent() -> None:
    lane = Driver(says("Hello"))
    lane.add()
    lane.run()

    assert lane.abort("r") == []
    assert lane.abort("never heard of") == []


def test_an_id_may_be_used_again_while_the_step_of_its_aborted_holder_is_in_flight() -> None:
    lane = Driver(says("Hello"))
    lane.add("r", prompt_logprobs=0)
    lane.send()
    lane.abort("r")
    assert lane.add("r", prompt_logprobs=0) == []

    assert lane.answer() == []
    lane.run()

    assert lane.of()[-1].finish_reason == "stop"
    assert [out.prompt_logprobs is not None for out in lane.of()[1:]] == [True] + [False] * 5
    lane.check_nothing_is_left()


# --- refusals and failures --------------------------------------------------------------------


def test_one_more_than_may_wait_is_refused_as_overloaded() -> None:
    lane = Driver(max_running=1, max_waiting=2)
    assert lane.add("a", n=2) == []

    [refusal] = lane.add("b", n=2)

    assert (refusal.id, refusal.finish_reason, refusal.error) == ("b", "error", "overloaded")
    assert lane.add("c") == []
    assert lane.core.counters().waiting == 3
    lane.run()
    lane.check_nothing_is_left()


def test_what_can_never_fit_is_refused_with_the_numbers_and_the_knob() -> None:
    lane = Driver(num_blocks=4)

    [refusal] = lane.add(max_tokens=14)

    assert refusal.finish_reason == "error"
    assert "3 prompt tokens + max_tokens 14 = 17; a sequence holds at most 16" in refusal.error
    assert "engine.num_kv_blocks" in refusal.error
    lane.check_nothing_is_left()


def test_a_refused_step_ends_its_requests_and_no_others() -> None:
    lane = Driver(says("Hello"), max_running=2)
    lane.add("a", stop=("elephant",))
    lane.add("gone", n=3)
    for _ in range(2):
        lane.send()
        lane.answer()
    lane.add("b")
    step = lane.send()
    lane.abort("gone")
    lane.add("gone", n=2)  # its id is used again while the step is in flight

    outputs = lane.core.fail_step(step, "stage 1 on n2: out of memory")

    [last] = outputs
    assert (last.id, last.text, last.finish_reason) == ("a", "e", "error")
    assert last.error == "stage 1 on n2: out of memory"
    lane.run()
    assert lane.text("b") == "Hello"
    assert lane.of("gone", 0)[-1].finish_reason == "stop"
    lane.check_nothing_is_left()


def test_a_refused_step_ends_every_choice_of_its_requests() -> None:
    lane = Driver(says("Hello"), max_step_tokens=8)
    lane.add("r", n=3)
    step = lane.send()  # choice 0 alone: the others wait for its prompt

    outputs = lane.core.fail_step(step, "out of memory")

    assert [(out.index, out.finish_reason) for out in outputs] == [(i, "error") for i in range(3)]
    lane.check_nothing_is_left()


def test_a_refusal_or_result_of_another_step_is_ignored() -> None:
    lane = Driver(says("Hello"))
    lane.add()
    step = lane.send()

    assert lane.core.fail_step(step + 1, "what?") == []
    lane.core.accept_result(step - 1, StepResult([]), now_s=1.0, stage_s=0.0)
    assert lane.core.render() == []
    assert lane.core.step_in_flight is not None
    lane.answer()
    assert lane.core.fail_step(step, "too late") == []
    lane.run()
    assert lane.text() == "Hello"


def test_a_lost_stage_ends_everything_and_the_lane_serves_on() -> None:
    lane = Driver(says("Hello"), max_running=1)
    lane.add("running", deadline_s=9.0)
    lane.add("waiting", n=2)
    step = lane.send()

    outputs = lane.core.fail_all("node n2 is gone")

    assert [(out.id, out.index) for out in outputs] == [
        ("running", 0), ("waiting", 0), ("waiting", 1)
    ]  # fmt: skip
    assert {(out.finish_reason, out.error) for out in outputs} == {("error", "node n2 is gone")}
    lane.check_nothing_is_left()
    lane.core.accept_result(step, StepResult([5]), now_s=1.0, stage_s=0.0)
    assert lane.core.render() == []
    lane.add("next")
    lane.run()
    assert lane.text("next") == "Hello"


# --- steps and counters -----------------------------------------------------------------------


def test_one_step_is_in_flight_at_a_time() -> None:
    lane = Driver()
    assert lane.core.next_step(0.0) is None
    lane.add("a")
    lane.send()
    lane.add("b")

    assert lane.core.next_step(1.0) is None
    lane.answer()
    step = lane.core.next_step(1.0)

    assert step is not None
    assert (step.batch.lane, step.batch.epoch, step.batch.step) == (3, 7, 1)
    assert [choice.request.id for choice in step.sequences] == ["a", "b"]


def test_an_adapter_is_taken_up_between_two_steps() -> None:
    lane = Driver()
    lane.add()
    lane.send()

    lane.core.ask_for_adapter(4)
    assert not lane.core.switch_adapter(), "a step is in flight"
    assert lane.core.counters().adapter_version == 0
    lane.answer()
    assert lane.core.switch_adapter()
    assert not lane.core.switch_adapter()
    step = lane.core.next_step(0.0)

    assert step is not None
    assert step.batch.adapter_version == lane.core.counters().adapter_version == 4


def test_a_switch_that_is_taken_back_in_time_is_none() -> None:
    lane = Driver()
    lane.add()
    lane.send()
    lane.core.ask_for_adapter(4)
    lane.core.ask_for_adapter(0)
    lane.answer()

    assert not lane.core.switch_adapter()


def test_a_step_that_is_out_is_overdue_by_the_time_since_it_was_sent() -> None:
    lane = Driver()
    assert lane.core.overdue_s(50.0) == 0.0
    lane.add()
    lane.tick(2.0)
    lane.send()
    assert lane.core.overdue_s(5.0) == 3.0
    lane.answer()
    assert lane.core.overdue_s(9.0) == 0.0


def test_counters_sum_the_steps_and_show_the_present() -> None:
    lane = Driver(says("Hello"), max_running=1)
    lane.add("a", max_tokens=3)
    lane.add("b", max_tokens=1)
    for _ in range(2):
        lane.send()
        lane.answer(2.0)

    counters = lane.core.counters()

    assert (counters.running, counters.waiting) == (1, 1)
    assert (counters.blocks_in_use, counters.num_blocks) == (1, 64)
    assert (counters.steps, counters.step_s, counters.stage_s) == (2, 4.0, 3.0)
    lane.run()
    assert lane.core.counters().steps == 4
    lane.check_nothing_is_left()


def test_preemptions_are_counted_and_change_no_text() -> None:
    tight, roomy = Driver(num_blocks=6), Driver()
    for lane in (tight, roomy):
        for i in range(3):
            lane.add(str(i), "prompt", max_tokens=16, ignore_eos=True)
        lane.run()

    assert tight.core.counters().preemptions > 0
    assert roomy.core.counters().preemptions == 0
    assert [tight.text(str(i)) for i in range(3)] == [roomy.text(str(i)) for i in range(3)]
    tight.check_nothing_is_left()


# --- plans that follow one another -------------------------------------------------------------


def test_a_lane_that_is_held_ends_its_step_and_begins_none() -> None:
    lane = Driver(num_blocks=16)
    lane.add(max_tokens=8)
    lane.send()
    lane.core.hold()
    assert lane.core.blocks_at_boundary() is None
    lane.answer()
    blocks = lane.core.blocks_at_boundary()
    assert blocks is not None
    assert len(blocks) == lane.core.counters().blocks_in_use > 0
    assert lane.core.next_step(lane.now_s) is None

    lane.core.go_on(9, recompute=False)
    step = lane.core.next_step(lane.now_s)
    assert step is not None
    assert (step.batch.epoch, step.batch.num_tokens) == (9, 1)
    lane.answer()
    lane.run()
    lane.check_nothing_is_left()


@pytest.mark.parametrize("is_lost", [False, True])
def test_sequences_that_are_computed_again_end_the_same(is_lost: bool) -> None:
    undisturbed = Driver()
    undisturbed.add("a", "one prompt", n=2)
    undisturbed.add("b", "another one:", temperature=1.0)
    undisturbed.run()

    lane = Driver()
    lane.add("a", "one prompt", n=2)
    lane.add("b", "another one:", temperature=1.0)
    for _ in range(7):
        lane.send()
        lane.answer()
    stale = lane.send()
    if not is_lost:
        lane.answer()
    lane.core.hold(forget_step=is_lost)
    assert lane.core.blocks_at_boundary() is not None
    lane.core.go_on(8, recompute=True)
    # What the lost stages may still say is of no step in flight.
    lane.core.accept_result(stale, StepResult([1, 2, 3]), now_s=lane.now_s, stage_s=0.0)
    lane.run()

    for key in (("a", 0), ("a", 1), ("b", 0)):
        assert lane.text(*key) == undisturbed.text(*key)
        assert lane.end(*key) == undisturbed.end(*key)
    assert lane.core.counters().preemptions == 3
    lane.check_nothing_is_left()


def test_what_was_not_moved_is_shared_with_nobody() -> None:
    lane = Driver()
    lane.add("done", "a prompt that is long enough to share:", max_tokens=2)
    lane.run()
    lane.core.hold()
    lane.core.go_on(8, recompute=False)
    lane.add("later", "a prompt that is long enough to share:", max_tokens=2)
    lane.run()
    assert lane.of("later")[0].cached_tokens == 0
    lane.check_nothing_is_left()


@given(cut=st.integers(0, 31), num_ended=st.integers(0, 1), stop=st.sampled_from(["", "e", "zz"]))
@settings(max_examples=60, deadline=None)
def test_another_lane_goes_on_where_a_lost_one_ended(cut: int, num_ended: int, stop: str) -> None:
    stops: dict[str, Any] = {"stop": (stop,)} if stop else {}
    whole = Driver()
    whole.add("r", "Hi there:", n=2, **stops)
    whole.run()
    told = [whole.of("r", index) for index in range(2)]
    heard = [told[0] if num_ended else told[0][:cut], told[1][:cut]]
    progress = tuple(
        None
        if outputs and outputs[-1].finish_reason
        else tuple(token for out in outputs for token in out.tokens)
        for outputs in heard
    )
    if progress == (None, None):
        return

    lane = Driver()
    sampling = SamplingParams(max_tokens=32, temperature=0.0, **stops)
    rest = Request(id="r", prompt=ids("Hi there:"), sampling=sampling, n=2, progress=progress)
    lane.core.add(Request.from_wire(rest.to_wire()), 0.0)
    lane.run()
    for index in range(2):
        text = "".join(out.text for out in (*heard[index], *lane.of("r", index)))
        tokens = [t for out in (*heard[index], *lane.of("r", index)) for t in out.tokens]
        assert text == whole.text("r", index)
        assert tokens == [t for out in told[index] for t in out.tokens]
    lane.check_nothing_is_left()
