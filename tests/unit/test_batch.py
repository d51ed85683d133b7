"""A step and its result cross the wire unchanged; what is malformed is refused as ValueError."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.engine.batch import Draw, Rows, StepBatch, StepBounds, StepResult
from actors.engine.requests import TokenLogprob

IDS = st.integers(0, 2**31 - 1)
DRAWS = st.builds(
    Draw,
    seed=st.integers(0, 2**63 - 1),
    position=IDS,
    temperature=st.floats(0, 100),
    top_k=IDS,
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logprobs=st.integers(-1, 20),
    banned=st.lists(IDS, max_size=3),
    history=st.lists(IDS, max_size=5),
    num_prompt=IDS,
)


@st.composite
def batches(draw: st.DrawFn) -> StepBatch:
    rows = draw(
        st.lists(
            st.builds(Rows, IDS, st.integers(1, 5), st.lists(IDS, max_size=4)),
            max_size=4,
        )
    )
    count = sum(entry.length for entry in rows)
    drawn = [i for i in range(len(rows)) if draw(st.booleans())]
    scored = [i for i in range(len(rows)) if draw(st.booleans())]
    return StepBatch(
        lane=draw(IDS),
        step=draw(IDS),
        epoch=draw(IDS),
        tokens=draw(st.lists(IDS, min_size=count, max_size=count)),
        rows=rows,
        copies=draw(st.lists(st.tuples(IDS, IDS), max_size=3)),
        drawn=drawn,
        draws=[draw(DRAWS) for _ in drawn],
        prompt_logprobs=[(i, draw(st.integers(0, 20))) for i in scored],
        targets=[draw(st.lists(IDS, max_size=rows[i].length)) for i in scored],
        adapter_version=draw(IDS),
    )


LOGPROBS = st.builds(
    TokenLogprob,
    IDS,
    st.none() | st.floats(-1e6, 0),
    st.lists(st.tuples(IDS, st.floats(-1e6, 0)), max_size=3).map(tuple),
)
RESULTS = st.builds(
    StepResult,
    tokens=st.lists(IDS, max_size=4),
    logprobs=st.lists(st.none() | LOGPROBS, max_size=4),
    prompt_logprobs=st.lists(st.lists(LOGPROBS, max_size=3), max_size=2),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=30,
)
REAL = StepBatch(0, 1, 2, [5, 6, 7], [Rows(0, 2, [1]), Rows(4, 1, [0, 2])], drawn=[1],
                 draws=[Draw(7, 5)])  # fmt: skip


@given(batches())
def test_a_step_survives_the_wire(batch: StepBatch) -> None:
    decoded = StepBatch.decode(batch.encode())

    # msgpack has no tuples, so a draw's ids come back as lists.
    assert decoded == batch
    assert decoded.encode() == batch.encode()
    assert all(type(entry) is Rows for entry in decoded.rows)
    assert all(type(entry) is Draw for entry in decoded.draws)


@given(RESULTS)
def test_a_result_survives_the_wire(result: StepResult) -> None:
    assert StepResult.from_wire(msgpack.unpackb(msgpack.packb(result.to_wire()))) == result


def test_a_step_counts_its_rows_its_context_and_the_rows_behind_the_head() -> None:
    batch = StepBatch(
        0, 0, 0, list(range(8)),
        [Rows(10, 1, [0]), Rows(0, 4, [1]), Rows(5, 3, [2])],
        drawn=[0, 2], draws=[Draw(0, 11), Draw(0, 8)], prompt_logprobs=[(1, 0)],
        targets=[[1, 2, 3, 4]],
    )  # fmt: skip

    assert batch.num_tokens == 8
    assert batch.context_tokens == 11 + 4 + 8
    assert batch.num_head_rows == 2 + 4


def test_rows_that_do_not_add_up_are_refused_with_the_step() -> None:
    bad = StepBatch(0, 41, 0, [1, 2, 3], [Rows(0, 2, [0])])

    with pytest.raises(ValueError, match="step 41: rows do not add up to its 3 tokens"):
        StepBatch.decode(bad.encode())


@given(st.binary(max_size=60))
@example(b"")
@example(REAL.encode()[:-1])
@example(REAL.encode() + b"\0")
def test_random_bytes_are_refused_as_value_errors(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        StepBatch.decode(data)


@settings(max_examples=30)
@given(st.lists(VALUES, min_size=11, max_size=11) | VALUES)
@example([0, 0, 0, [1], [[0, "1", []]], [], [], [], [], [], 0])
@example([0, 0, 0, 5, [], [], [], [], [], [], 0])
@example([0, 0, 0, [], 5, [], [], [], [], [], 0])
def test_wrongly_typed_fields_are_refused_as_value_errors(fields: object) -> None:
    with contextlib.suppress(ValueError):
        StepBatch.decode(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [5, 6, 100]}, "step 1 holds token id 100; the model has 100"),
        ({"rows": [Rows(0, 2, [8]), Rows(4, 1, [0, 2])]}, "names block 8; the stage has 8 a lane"),
        ({"rows": [Rows(0, 2, [1]), Rows(8, 1, [0, 2])]}, "9 positions in 2 blocks of 4"),
        ({"copies": [(0, 9)]}, "names block 9"),
        ({"prompt_logprobs": [(0, 1)], "targets": [[100]]}, "holds token id 100"),
    ],
)
def test_what_a_stage_does_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    bounds = StepBounds(vocab_size=100, num_blocks=8, block_tokens=4)
    REAL.check_within(bounds)

    with pytest.raises(ValueError, match=message):
        replace(REAL, **change).check_within(bounds)


@pytest.mark.parametrize(
    "change",
    [
        {"lane": -1}, {"step": True}, {"epoch": 2**63}, {"tokens": [5, 6, -7]},
        {"rows": [Rows(0, 3, [-1])]}, {"rows": [Rows(0, 0, []), Rows(0, 3, [1])]},
        {"drawn": [2]}, {"drawn": [0, 1]}, {"draws": [Draw(7, 5, temperature=math.nan)]},
        {"draws": [Draw(-1, 5)]}, {"draws": [Draw(7, 5, logprobs=21)]},
        {"draws": [Draw(7, 5, history=(1, -1))]}, {"copies": [(0, -1)]},
        {"prompt_logprobs": [(2, 1)], "targets": [[1]]}, {"prompt_logprobs": [(0, 1)]},
        {"prompt_logprobs": [(0, 1)], "targets": [[1, 2, 3]]},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_out_of_place_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="malformed step message"):
        StepBatch.decode(replace(REAL, **change).encode())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (StepResult([]), "draws 1 tokens; the answer has 0 with 0 log-probabilities"),
        (StepResult([1, 2]), "the answer has 2"),
        (StepResult([1], [None, None]), "with 2 log-probabilities"),
        (StepResult([1], [], [[]]), r"scores \[\] tokens; the answer has \[0\]"),
    ],
)
def test_a_result_that_does_not_answer_the_step_says_so(result: StepResult, message: str) -> None:
    StepResult([1]).check_answers(REAL)

    with pytest.raises(ValueError, match=message):
        result.check_answers(REAL)
