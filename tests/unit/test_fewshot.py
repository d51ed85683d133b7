"""Few-shot estimates: on roofline devices that are not there, and on a table of unlike cards."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from placement.fewshot import FewShotError, FewShotModel, fit_latency_model

Table = dict[str, dict[str, float]]

LAYERS = (("layer", 4e8, 4e8), ("experts", 2e8, 3e9), ("head", 1e9, 1e9))
"""(name, FLOPs of a row, bytes read)"""
PROBES = [
    (f"{name} {tokens}", flops * tokens, num_bytes)
    for name, flops, num_bytes in LAYERS
    for tokens in (1, 8, 32, 128, 512, 2048)
]


def roofline_devices(count: int, *, noise: float, seed: int) -> Table:
    """Devices of unlike speed, bandwidth and launch time, timed with relative noise."""
    rng = np.random.default_rng(seed)
    table: Table = {}
    for index in range(count):
        flops_per_s = 10 ** rng.uniform(11.5, 14.5)
        bytes_per_s = 10 ** rng.uniform(10.5, 12.5)
        launch_s = 10 ** rng.uniform(-5, -3.5)
        table[f"device {index}"] = {
            name: float(
                (launch_s + max(flops / flops_per_s, num_bytes / bytes_per_s))
                * math.exp(rng.normal(0.0, noise))
            )
            for name, flops, num_bytes in PROBES
        }
    return table


def errors_on(
    model: FewShotModel[str], device: Mapping[str, float], samples: tuple[str, ...]
) -> list[float]:
    """Relative errors of the probes that were not sampled."""
    predicted = model.predict({probe: device[probe] for probe in samples})
    return [abs(predicted[probe] / device[probe] - 1.0) for probe in device if probe not in samples]


def test_unseen_roofline_devices_are_met_within_the_stated_error() -> None:
    table = roofline_devices(30, noise=0.03, seed=1)
    known = {name: table[name] for name in list(table)[:20]}
    unseen = [table[name] for name in list(table)[20:]]

    model = fit_latency_model(known, num_samples=5)
    errors = [error for device in unseen for error in errors_on(model, device, model.chosen)]

    # Twice: ten unseen devices are a sample themselves.
    assert np.median(errors) <= 2 * model.median_error
    assert np.quantile(errors, 0.9) <= 2 * model.p90_error
    assert model.median_error < 0.15
    assert model.rank >= 1


def test_more_samples_are_stated_to_be_and_are_better() -> None:
    table = roofline_devices(24, noise=0.02, seed=2)
    known = {name: table[name] for name in list(table)[:14]}
    unseen = [table[name] for name in list(table)[14:]]

    few, many = (fit_latency_model(known, num_samples=k) for k in (1, 6))

    def median(model: FewShotModel[str]) -> float:
        return float(np.median([e for d in unseen for e in errors_on(model, d, model.chosen)]))

    assert many.median_error < few.median_error
    assert median(many) < median(few)


def test_devices_that_differ_in_speed_alone_need_one_sample() -> None:
    base = {"a": 1.0, "b": 0.1, "c": 3.0, "d": 0.7}
    known = {f"x{s}": {p: t * s for p, t in base.items()} for s in (1.0, 2.0, 5.0, 9.0)}

    model = fit_latency_model(known, num_samples=1)
    # A hundred times slower than all that is known: the speed is not pulled towards them.
    predicted = model.predict({"c": 900.0})

    assert model.rank == 0
    assert model.median_error == pytest.approx(0.0, abs=1e-9)
    assert predicted == pytest.approx({"a": 300.0, "b": 30.0, "c": 900.0, "d": 210.0})


# Milliseconds of one decoder layer of a 7B model. Made up, to the shape of public bandwidths and
# usual rates: prefill of 512 and 2048 rows, decoding of 1, 8, 32 and 128.
CARDS: Table = {
    "RTX 3060": {"p512": 11.2, "p2048": 43.1, "d1": 1.22, "d8": 1.26, "d32": 1.41, "d128": 3.3},
    "RTX 3090": {"p512": 4.1, "p2048": 15.3, "d1": 0.49, "d8": 0.51, "d32": 0.60, "d128": 1.31},
    "RTX 4090": {"p512": 1.75, "p2048": 6.4, "d1": 0.45, "d8": 0.46, "d32": 0.50, "d128": 0.72},
    "A100": {"p512": 1.35, "p2048": 4.9, "d1": 0.29, "d8": 0.30, "d32": 0.33, "d128": 0.52},
    "M2 Max": {"p512": 19.8, "p2048": 78.0, "d1": 1.15, "d8": 1.31, "d32": 2.05, "d128": 5.6},
    "Ryzen CPU": {"p512": 310.0, "p2048": 1260.0, "d1": 8.4, "d8": 9.9, "d32": 24.0, "d128": 82.0},
}


@pytest.mark.parametrize("left_out", ["RTX 3090", "RTX 4090", "M2 Max"])
def test_a_card_held_out_is_estimated_from_two_samples(left_out: str) -> None:
    known = {name: times for name, times in CARDS.items() if name != left_out}

    model = fit_latency_model(known, num_samples=2)
    errors = errors_on(model, CARDS[left_out], model.chosen)

    assert len(model.chosen) == 2
    # One sample tells the bandwidth, the other the rate.
    assert {probe[0] for probe in model.chosen} == {"p", "d"}
    assert np.median(errors) < 0.35


def test_what_was_sampled_is_returned_as_it_is_and_everything_is_above_zero() -> None:
    model = fit_latency_model(CARDS, num_samples=2)
    samples = {probe: 1e-9 * (i + 1) for i, probe in enumerate(model.chosen)}

    predicted = model.predict(samples)

    assert set(predicted) == set(model.probes)
    assert {probe: predicted[probe] for probe in samples} == samples
    assert all(seconds > 0 for seconds in predicted.values())


def test_equal_inputs_give_equal_models_whatever_their_order() -> None:
    turned = dict(reversed(CARDS.items()))
    one, other = (fit_latency_model(known, num_samples=3) for known in (CARDS, turned))

    assert one.chosen == other.chosen
    assert (one.rank, one.median_error) == (other.rank, other.median_error)
    samples = dict.fromkeys(one.chosen, 1.0)
    assert one.predict(samples) == other.predict(samples)


def test_probes_that_not_every_device_has_are_left_out() -> None:
    known = {name: dict(times) for name, times in CARDS.items()}
    del known["A100"]["d128"]

    assert "d128" not in fit_latency_model(known, num_samples=2).probes


def test_too_little_to_estimate_from_says_how_much_would_do() -> None:
    two = {name: CARDS[name] for name in ("A100", "M2 Max")}

    with pytest.raises(FewShotError, match="2 devices are known and 3 are needed; profile others"):
        fit_latency_model(two, num_samples=2)
    with pytest.raises(FewShotError, match=r"num_samples \(0\) must be at least 1"):
        fit_latency_model(CARDS, num_samples=0)
    with pytest.raises(FewShotError, match="share 6 probes, so 6 samples leave nothing"):
        fit_latency_model(CARDS, num_samples=6)
    with pytest.raises(FewShotError, match="0 samples of the device"):
        fit_latency_model(CARDS, num_samples=2).predict({})


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_seconds_that_cannot_be_are_refused_by_name(seconds: float) -> None:
    known = {name: dict(times) for name, times in CARDS.items()}
    known["A100"]["d8"] = seconds

    with pytest.raises(ValueError, match=r"A100: d8 takes .* s, which must be above 0"):
        fit_latency_model(known, num_samples=2)
    model = fit_latency_model(CARDS, num_samples=2)
    with pytest.raises(ValueError, match=r"the sampled device: d8 takes .* --refresh"):
        model.predict({"d8": seconds})
    with pytest.raises(ValueError, match="probe d9 is none of the model's 6"):
        model.predict({"d9": 1.0})
