"""What a client may ask for, what is refused by name, and that the wire loses nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.requests import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOPS,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)

TOKEN_IDS = st.integers(0, 2**31 - 1)
FINITE = st.floats(-1e6, 0.0)
LOGPROBS = st.builds(
    TokenLogprob,
    TOKEN_IDS,
    st.none() | FINITE,
    st.lists(st.tuples(TOKEN_IDS, FINITE), max_size=3).map(tuple),
)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(0, 2**31 - 1))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.floats(0, 100)),
        top_k=draw(st.integers(0, 2**31 - 1)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0.01, 100)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        seed=draw(st.integers(0, MAX_SEED)),
        stop=draw(st.lists(st.text(min_size=1), max_size=MAX_STOPS).map(tuple)),
        stop_token_ids=draw(st.lists(TOKEN_IDS, max_size=3).map(tuple)),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, MAX_LOGPROBS)),
        prompt_logprobs=draw(st.none() | st.integers(0, MAX_LOGPROBS)),
    )


REQUESTS = st.builds(
    Request,
    id=st.text(),
    prompt=st.lists(TOKEN_IDS, min_size=1, max_size=9).map(tuple),
    sampling=samplings(),
    n=st.integers(1, MAX_CHOICES),
    deadline_s=st.none() | st.floats(0, 1e6, exclude_min=True),
)
OUTPUTS = st.builds(
    RequestOutput,
    id=st.text(),
    index=st.integers(0, MAX_CHOICES - 1),
    tokens=st.lists(TOKEN_IDS, max_size=4).map(tuple),
    text=st.text(),
    logprobs=st.lists(LOGPROBS, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(LOGPROBS, max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | st.text() | TOKEN_IDS,
    error=st.text(),
    cached_tokens=st.integers(0, 2**31 - 1),
)


@given(REQUESTS)
def test_a_request_survives_the_wire(request_: Request) -> None:
    assert Request.from_wire(msgpack.unpackb(msgpack.packb(request_.to_wire()))) == request_


@given(OUTPUTS)
def test_an_output_survives_the_wire(output: RequestOutput) -> None:
    assert RequestOutput.from_wire(msgpack.unpackb(msgpack.packb(output.to_wire()))) == output


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_tokens", [-1, 2**31, 1.5, True, "8", None]),
        ("min_tokens", [-1, 129, 2.0]),
        ("temperature", [-0.1, 100.1, math.nan, math.inf, "hot", True, None]),
        ("top_k", [-1, 2**31, 0.5]),
        ("top_p", [0, 0.0, -0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, 0.001, 101, math.inf]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("seed", [-1, MAX_SEED + 1, 0.5]),
        ("stop", [("a",) * (MAX_STOPS + 1), ("a", "")]),
        ("logprobs", [-1, MAX_LOGPROBS + 1, True]),
        ("prompt_logprobs", [-1, MAX_LOGPROBS + 1]),
    ],
)
def test_a_bad_sampling_value_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError) as refusal:
            SamplingParams(**{param: value})
        assert refusal.value.param == param
        assert refusal.value.message == str(refusal.value)


def test_a_refusal_gives_the_value_and_the_bounds() -> None:
    with pytest.raises(RequestError, match=r"^temperature \(101\) must be between 0 and 100$"):
        SamplingParams(temperature=101)
    with pytest.raises(RequestError, match=r"^min_tokens \(9\) must be between 0 and 8$"):
        SamplingParams(max_tokens=8, min_tokens=9)
    with pytest.raises(RequestError, match=r"^top_k \(2.5\) must be a whole number$"):
        SamplingParams(top_k=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ()}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"n": True}, "n"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
    ],
)
def test_a_bad_request_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        Request(**({"id": "r", "prompt": (1,)} | fields))
    assert refusal.value.param == param


def test_a_refusal_survives_being_sent_between_processes() -> None:
    twin = copy.copy(RequestError("too long", "prompt"))  # copies as pickle does

    assert (twin.message, twin.param, str(twin)) == ("too long", "prompt", "too long")


def test_zero_temperature_is_greedy_and_only_penalties_need_the_history() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams(top_k=5, top_p=0.5, min_p=0.1).needs_history
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        how: dict[str, Any] = {penalty: 0.5}
        assert SamplingParams(**how).needs_history
