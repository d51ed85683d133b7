from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.sharding import traces
from placement.sharding.recording import TraceRecording
from placement.sharding.synthetic import TraceRecipe, make_trace
from placement.sharding.traces import ExpertTrace, TraceRecorder, gini

PUBLISHED_GINI = {
    8: (0.08, 0.15, 0.23, 0.31, 0.39, 0.46),
    64: (0.10, 0.22, 0.34, 0.47, 0.59, 0.70),
    128: (0.11, 0.23, 0.36, 0.50, 0.64, 0.75),
    256: (0.11, 0.23, 0.38, 0.53, 0.68, 0.80),
}
"""Of Zipf laws with exponents 0.2, 0.4 ... 1.2, by number of experts; two are rounded up."""


def small(**changes: Any) -> ExpertTrace:
    fields: dict[str, Any] = {"num_steps": 40, "tokens": 256, "num_experts": 16, "top_k": 2}
    return make_trace(TraceRecipe(**fields | changes), seed=1)


def share(rows_SE: np.ndarray) -> np.ndarray:
    total: np.ndarray = rows_SE.sum(axis=0) / rows_SE.sum()
    return total


@pytest.mark.parametrize("num_experts", list(PUBLISHED_GINI))
def test_the_gini_of_zipf_laws_is_the_published_one(num_experts: int) -> None:
    for zipf, published in zip(
        (0.2, 0.4, 0.6, 0.8, 1.0, 1.2), PUBLISHED_GINI[num_experts], strict=True
    ):
        assert gini(np.arange(1, num_experts + 1, dtype=np.float64) ** -zipf) == pytest.approx(
            published, abs=0.006
        )


def test_one_expert_a_token_is_drawn_by_the_law_and_more_are_flatter() -> None:
    one, eight = (
        gini(make_trace(
            TraceRecipe(num_steps=20, tokens=2048, num_layers=1, zipf=0.8, top_k=k), seed=4
        ).rows_SLE.sum(axis=(0, 1)).astype(float))
        for k in (1, 8)
    )  # fmt: skip
    assert one == pytest.approx(0.50, abs=0.02)
    assert 0.3 < eight < one


def test_every_token_chooses_k_different_experts() -> None:
    for phase in ("prefill", "decode"):
        trace = small(phase=phase, domain_sigma=0.7, noise_sigma=0.3)
        assert (trace.rows_SLE.sum(axis=2) == 256 * 2).all()
        assert (trace.rows_SLE <= 256).all()


def test_a_seed_gives_one_trace_and_layers_differ() -> None:
    one, again = small(), small()
    assert (one.rows_SLE == again.rows_SLE).all()
    first, second = share(one.rows_SLE[:, 0]), share(one.rows_SLE[:, 1])
    assert np.abs(first - second).sum() > 0.2


def test_regimes_change_the_load_as_they_say() -> None:
    def moved(regime: str, layer: int = 0) -> tuple[float, float, float]:
        rows = small(regime=regime, num_steps=60).rows_SLE[:, layer]
        parts = [share(rows[first : first + 10]) for first in (0, 20, 30, 50)]
        pairs = ((0, 1), (1, 2), (0, 3))
        steady, half, ends = (0.5 * float(np.abs(parts[a] - parts[b]).sum()) for a, b in pairs)
        return steady, half, ends

    assert max(moved("stationary")) < 0.04
    steady, half, ends = moved("swap")
    assert steady < 0.04 < 0.1 < min(half, ends)
    steady, half, ends = moved("drift")
    assert max(steady, half) < ends
    assert small(regime="device-loss").losses == ((20, 0),)


def test_decoding_keeps_experts_from_token_to_token() -> None:
    def kept(stickiness: float) -> float:
        trace = small(phase="decode", tokens=1, num_steps=400, stickiness=stickiness, num_layers=1)
        rows = trace.rows_SLE[:, 0] > 0
        return float((rows[1:] & rows[:-1]).sum() / rows[1:].sum())

    assert kept(0.0) < 0.3 < 0.4 < kept(0.4)


def test_a_trace_survives_its_file() -> None:
    trace = small(regime="device-loss")
    read = ExpertTrace.from_bytes(trace.to_bytes())
    assert (read.rows_SLE == trace.rows_SLE).all()
    assert (read.name, read.phase, read.top_k, read.losses) == (
        "device-loss", "prefill", 2, ((20, 0),)
    )  # fmt: skip
    # 40 steps of 2 layers of 16 counts, at most 2 bytes each.
    assert len(trace.to_bytes()) < 4000


def archive(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {
        "format": 1, "name": "t", "phase": "decode", "top_k": 1,
        "rows": np.ones((2, 1, 4), dtype=np.int64), "losses": np.zeros((0, 2), dtype=np.int64),
    }  # fmt: skip
    file = io.BytesIO()
    np.savez(file, **{key: v for key, v in (arrays | changes).items() if v is not None})
    return file.getvalue()


def repacked(method: int = zipfile.ZIP_DEFLATED, **members: bytes | None) -> bytes:
    """A good trace's archive with members' bytes replaced, added or (None) left out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as good, zipfile.ZipFile(file, "w", method) as bad:
        there = {name: good.read(name) for name in good.namelist()}
        for name, data in (there | {f"{key}.npy": v for key, v in members.items()}).items():
            if data is not None:
                bad.writestr(name, data)
    return file.getvalue()


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    return magic + len(header).to_bytes(2, "little") + header.encode("latin-1") + data


def described(shape: str, descr: str = "'<i8'", data: bytes = b"") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n", data)


def corrupt() -> bytes:
    data = bytearray(repacked())
    data[data.index(b"rows.npy") + len(b"rows.npy")] = 0xFF
    return bytes(data)


def stray() -> bytes:
    file = io.BytesIO(archive())
    with zipfile.ZipFile(file, "a") as bad:
        bad.writestr("read\x1bme", "hello")
    return file.getvalue()


def flagged(offset: int, value: int) -> bytes:
    """A good trace, a value of whose first member's entry in the directory is changed."""
    data = bytearray(archive())
    data[data.index(b"PK\x01\x02") + offset] = value
    return bytes(data)


def crowded() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as bad:
        for index in range(101):
            bad.writestr(f"{index}.npy", b"")
    return file.getvalue()


def with_rows(*rows: int, dtype: str = "i8") -> bytes:
    return archive(rows=np.array(rows, dtype=dtype).reshape(-1, 1, 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 not really", "15 bytes cannot be unpacked: File is not a zip file"),
        (b"", "0 bytes cannot be unpacked"),
        (corrupt(), r"\d+ bytes cannot be unpacked: Error -3 while decompressing"),
        (stray(), r"its member 'read\\x1bme' is no array: 5 bytes without .npy"),
        (flagged(8, 1), "its member 'format.npy' of 136 bytes is encrypted"),
        (flagged(10, 99), r"by method 99; stored \(0\) and deflated \(8\) are read"),
        (repacked(zipfile.ZIP_LZMA), "is compressed by method 14"),
        (crowded(), "it has 101 members; at most 100 are read"),
        (archive(rows=None), "it lacks rows and has format, losses, name, phase, top_k"),
        (archive(format=2), "it is of format 2; this version reads 1"),
        (archive(top_k=9), r"top_k \(9\) must be from 1 to its 4 experts"),
        (archive(top_k=1.5), "top_k of the trace is of type float64; it must be whole numbers"),
        (archive(top_k=[1]), r"top_k has shape \(1,\); it must be one value"),
        (archive(phase="idle"), r"phase \('idle'\) must be one of prefill, decode"),
        (archive(phase=1), "phase of the trace is of type int64; it must be text"),
        (archive(rows=np.ones((2, 4), dtype=int)), r"rows have shape \(2, 4\)"),
        (archive(rows=np.ones((0, 1, 4), dtype=int)), r"rows have shape \(0, 1, 4\)"),
        (archive(rows=np.ones((2, 1, 4))), "rows of the trace is of type float64"),
        (archive(rows=np.ones((2, 1, 4), dtype="i8,f4")), r"the header of rows is .*'f0', '<i8'"),
        (archive(name=np.array({}, dtype=object)), "name of the trace is of type object"),
        (with_rows(1, -1), "the least is -1"),
        (with_rows(2**40), "1099511627776 rows in one step; they must be fewer than 1099511627776"),
        (with_rows(1, 2**63 + 5, dtype="u8"), "an expert has 9223372036854775813 rows in one step"),
        (archive(losses=np.array([[5, 0]])), "device 0 is lost before step 5"),
        (archive(losses=np.array([1, 0])), r"losses have shape \(2,\); give \[losses, 2\]"),
        (archive(losses=np.array([[1, 0, 0]])), r"losses have shape \(1, 3\)"),
        (archive(losses=np.ones((1025, 2), dtype=int)), "16400 bytes; at most 16384 are read"),
        (
            archive(losses=[[2, 0], [1, 1]], rows=np.ones((3, 1, 4), dtype=int)),
            "its losses name step 1 after step 2; give them in order",
        ),
        (archive(name="n" * 201), r"its name \('n{40}'\) has 201 characters; give at most 200"),
        (archive(name="a\x1b[2J"), r"its name \('a\\x1b\[2J'\) has 5 characters; .* printable"),
        (archive(name="n" * 10**5), "400000 bytes; at most 16384 are read"),
        (repacked(name=described("()", "'<U1'", b"\xff" * 4)), "name of the trace is no text"),
        (repacked(name=described("()", "'<U0'")), "name of the trace is of type <U0"),
        (repacked(rows=described("(10, 1, 4)")), "320 bytes; the file has 0 of them"),
        (repacked(rows=described("(1, 1, 1)", data=b"\0" * 9)), "8 bytes; the file has 9 of them"),
        (
            repacked(rows=described("(1000000, 1000000, 10)")),
            r"rows \(shape \(1000000, 1000000, 10\), type int64\): 80000000000000 bytes; at most "
            "2147483648 are read",
        ),
        (repacked(rows=described("(300000000, 1, 1)", "'|u1'")), "2400000000 bytes; at most 2147"),
        (repacked(rows=described("(1, 1, 1)", "'<i3'")), "rows of the trace is of type <i3"),
        (repacked(rows=npy("{'descr': (((")), r"the header of rows is .*descr"),
        (repacked(rows=npy("", magic=b"\x93NUMPY\x09\x00")), r"the header of rows is .*\\t"),
        (repacked(rows=b""), "the header of rows is b'' and ''"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertTrace.from_bytes(data)


def test_rows_that_add_up_to_too_many_are_refused() -> None:
    rows = np.full((2**22, 1, 1), 2**40 - 1, dtype=np.int64)
    assert ExpertTrace(name="t", phase="decode", top_k=1, rows_SLE=rows[:-1]).num_experts == 1
    rows = np.broadcast_to(rows, (2**22, 1, 2))
    with pytest.raises(ValueError, match=r"it has 9\.223e\+18 rows in all; .* 4611686018427387904"):
        ExpertTrace(name="t", phase="decode", top_k=1, rows_SLE=rows)


def test_a_small_file_that_unpacks_to_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST_BYTES", 8 * 1000)
    assert ExpertTrace.from_bytes(with_rows(*range(1000), dtype="u2")).num_steps == 1000
    with pytest.raises(ValueError, match=r"rows .*: 8008 bytes; at most 8000 are read"):
        ExpertTrace.from_bytes(with_rows(*range(1001), dtype="u2"))


def test_arrays_of_either_order_are_read() -> None:
    rows = np.arange(24).reshape(2, 3, 4)
    for written in (rows, np.asfortranarray(rows), rows.astype(">u2")):
        assert (ExpertTrace.from_bytes(archive(rows=written)).rows_SLE == rows).all()
    name = np.array("Größe", dtype=">U9")
    assert ExpertTrace.from_bytes(archive(name=name)).name == "Größe"


SOUND = (archive(losses=[[1, 0]]), repacked())


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SOUND),
    changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 10**4),
)
def test_changed_bytes_are_read_or_refused(
    data: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(data)] = value
    if end < len(data):
        del changed[end:]
    try:
        trace = ExpertTrace.from_bytes(bytes(changed))
    except ValueError as error:
        assert re.search(r"\w", str(error))  # noqa: PT017 - a trace that is read is as good
    else:
        assert trace.rows_SLE.dtype == np.int64
        assert trace.name.isprintable()


def test_a_recorder_keeps_the_first_steps() -> None:
    recorder = TraceRecorder(1, 3, phase="decode", top_k=1, max_steps=2)
    for rows in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        assert recorder.is_full == (rows[2] == 1)
        recorder.add(np.array([rows]))
    assert recorder.trace().rows_SLE.tolist() == [[[1, 0, 0]], [[0, 1, 0]]]
    with pytest.raises(ValueError, match=r"rows_LE has shape \(3,\)"):
        recorder.add(np.array([1, 0, 0]))


def test_recipes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"regime \('calm'\) must be one of stationary, drift"):
        TraceRecipe(regime="calm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"top_k \(9\) must be from 1 to num_experts \(8\)"):
        TraceRecipe(num_experts=8, top_k=9)
    with pytest.raises(ValueError, match=r"stickiness \(2\) must be from 0 to 1"):
        TraceRecipe(stickiness=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zipf": 4.5}, r"zipf \(4.5\) must be from 0 to 4"),
        ({"zipf": float("nan")}, r"zipf \(nan\) must be from 0 to 4"),
        ({"noise_sigma": 1e308}, r"noise_sigma \(1e\+308\) must be from 0 to 4"),
        (
            {"num_steps": 10**9},
            r"num_steps x num_layers x num_experts \(1000000000 x 2 x 128\) takes 2048000000000 "
            "bytes; at most 2147483648",
        ),
        ({"tokens": 10**9}, r"tokens x num_experts \(1000000000 x 128\) takes"),
    ],
)
def test_recipes_that_give_no_figures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TraceRecipe(**changes)


def test_the_steepest_recipe_stays_finite() -> None:
    rows = small(zipf=4, domain_sigma=4, noise_sigma=4, num_experts=256).rows_SLE
    assert (rows.sum(axis=2) == 256 * 2).all()


# --- recording --------------------------------------------------------------------------------


def steps_of(layer: int, first: int, count: int) -> dict[Any, Any]:
    """Steps of a holder of one of two layers; the n-th has n rows of expert 0, one of expert 1."""
    rows = np.zeros((count, 2, 2), dtype=np.int32)
    rows[:, layer, 0] = np.arange(first, first + count)
    rows[:, layer, 1] = 1
    return {"decode": rows, "prefill": rows[:0]}


def test_the_steps_of_all_holders_are_joined_in_their_order() -> None:
    recording = TraceRecording(2, 2, top_k=1, max_steps=5)

    recording.add({0: steps_of(0, 1, 3), 1: steps_of(1, 1, 1)})
    recording.add({0: steps_of(0, 4, 0), 1: steps_of(1, 2, 3)})
    recording.add({0: steps_of(0, 4, 3), 1: steps_of(1, 5, 1)})
    assert not recording.is_full  # nothing was prefilled

    [trace] = recording.traces()
    assert (trace.phase, trace.num_steps) == ("decode", 5)
    assert trace.rows_SLE.tolist() == [[[n, 1], [n, 1]] for n in range(1, 6)]
    assert ExpertTrace.from_bytes(trace.to_bytes()).rows_SLE.tolist() == trace.rows_SLE.tolist()


def test_what_a_holder_that_is_gone_never_told_is_dropped() -> None:
    recording = TraceRecording(2, 2, top_k=1, max_steps=9)
    recording.add({0: steps_of(0, 1, 4), 1: steps_of(1, 1, 2)})

    recording.add({0: steps_of(0, 5, 2), 2: steps_of(1, 5, 2)})

    [trace] = recording.traces()
    assert trace.rows_SLE[:, 0, 0].tolist() == trace.rows_SLE[:, 1, 0].tolist() == [1, 2, 5, 6]


def test_nothing_recorded_is_no_trace() -> None:
    assert TraceRecording(2, 2, top_k=1, max_steps=9).traces() == []
