from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 not really", "this is no expert trace"),
        (b"", "this is no expert trace"),
        (archive(rows=None), "it lacks rows and has format, losses, name, phase, top_k"),
        (archive(format=2), "this trace is of format 2; this version reads 1"),
        (archive(top_k=9), r"top_k \(9\) must be from 1 to its 4 experts"),
        (archive(top_k=1.5), "top_k of the trace is float64"),
        (archive(phase="idle"), r"phase \('idle'\) must be one of prefill, decode"),
        (archive(rows=np.ones((2, 4))), r"rows have shape \(2, 4\)"),
        (archive(rows=np.ones((2, 1, 4))), "rows are of type float64"),
        (archive(rows=-np.ones((2, 1, 4), dtype=int)), "the least is -1"),
        (archive(losses=np.array([[5, 0]])), "device 0 is lost before step 5"),
        (archive(losses=np.array([1, 0])), r"losses of the trace are int64 of shape \(2,\)"),
        (archive(name=np.array({}, dtype=object)), "allow_pickle=False"),
    ],
)
def test_what_is_no_trace_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertTrace.from_bytes(data)


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
