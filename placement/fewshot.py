"""How fast a device that few samples were taken of will be, judged by devices that are known.

Few-shot latency adaptation, the idea of HELP (Lee et al., "HELP: Hardware-Adaptive Efficient
Latency Prediction for NAS via Meta-Learning", 2021), without the neural network: over the known
devices, the logarithm of a probe's seconds is the probe's mean, plus the device's overall speed,
plus a few shared shapes (an SVD of the rest). The unseen device's speed and its share of each
shape are solved for from its samples by ridge least squares, and give the other probes.

Logarithms make errors relative and keep every prediction above 0. The speed is not penalised: a
device slower than all that is known must not be pulled towards them. The shapes are, each by
noise over signal, as far as the known devices show them.

How many shapes, and how wrong the model is, are found by leaving each known device out. The error
is nested: for each device left out, probes and shapes are chosen on the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

LEAST_KNOWN_DEVICES = 3
"""With two, leaving one out would leave nothing to compare the other with."""
NOISE = 0.05
"""Assumed spread of a measured logarithm: repeated timings of one probe differ by about 5 %."""

Probe = TypeVar("Probe", bound=Hashable)
Floats = NDArray[np.float64]


class FewShotError(ValueError):
    """Too little is known to estimate from; the message says how much would do."""


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Log seconds of the known devices: `mean_P` + speed + coefficients @ `basis_RP`."""

    mean_P: Floats
    basis_RP: Floats
    spread_R: Floats
    """Standard deviation of each coefficient over the known devices."""

    def limited(self, rank: int) -> _Shapes:
        return _Shapes(self.mean_P, self.basis_RP[:rank], self.spread_R[:rank])


@dataclass(frozen=True, slots=True)
class FewShotModel(Generic[Probe]):
    """A latency model of the known devices, ready for a device that samples were taken of."""

    probes: tuple[Probe, ...]
    chosen: tuple[Probe, ...]
    """What to measure on the unseen device."""
    known_devices: int
    rank: int
    """Shapes in use beside the overall speed."""
    median_error: float
    """Relative error of the probes that were not sampled, over the known devices left out."""
    p90_error: float
    _shapes: _Shapes

    def predict(self, samples: Mapping[Probe, float]) -> dict[Probe, float]:
        """Return the seconds of every probe: the sampled ones as they are, the rest estimated.

        Raises:
            ValueError: A sample is of an unknown probe, or not above 0 and finite.
            FewShotError: There is no sample.
        """
        if not samples:
            raise FewShotError("0 samples of the device; measure at least 1 probe")
        index = {probe: i for i, probe in enumerate(self.probes)}
        for probe, seconds in samples.items():
            if probe not in index:
                raise ValueError(f"probe {probe} is none of the model's {len(index)}")
            _check_seconds("the sampled device", probe, seconds)
        at = [index[probe] for probe in samples]
        logs = np.log([samples[probe] for probe in samples])
        predicted_P = np.exp(_solve(self._shapes, at, logs))
        seconds_of = dict(zip(self.probes, map(float, predicted_P), strict=True))
        return seconds_of | dict(samples)


def fit_latency_model(
    known: Mapping[str, Mapping[Probe, float]], *, num_samples: int
) -> FewShotModel[Probe]:
    """Fit the seconds of the known devices and choose which `num_samples` probes to measure.

    Probes that every known device has are used, in the first device's order. Deterministic: the
    devices' order does not matter, ties go to fewer shapes and to earlier probes. n devices and p
    probes take O(n^3 p + n^2 num_samples p) steps.

    Raises:
        FewShotError: Fewer than `LEAST_KNOWN_DEVICES` devices, no common probe, or no sample.
        ValueError: Seconds that are not above 0 and finite.
    """
    names = sorted(known)
    probes = _shared_probes(known, num_samples)
    logs_NP = np.log(np.array([[known[name][probe] for probe in probes] for name in names]))
    rank = _best_rank(logs_NP, num_samples)
    shapes = _fit(logs_NP)
    errors = np.concatenate([_left_out_errors(logs_NP, i, num_samples) for i in range(len(names))])
    return FewShotModel(
        probes=probes,
        chosen=tuple(probes[i] for i in _choose(shapes, num_samples)),
        known_devices=len(names),
        rank=rank,
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
        _shapes=shapes.limited(rank),
    )


def _shared_probes(
    known: Mapping[str, Mapping[Probe, float]], num_samples: int
) -> tuple[Probe, ...]:
    """Return the probes that every device has; refuse too few and seconds that cannot be."""
    if num_samples < 1:
        raise FewShotError(f"num_samples ({num_samples}) must be at least 1; raise --samples")
    if len(known) < LEAST_KNOWN_DEVICES:
        raise FewShotError(
            f"{len(known)} devices are known and {LEAST_KNOWN_DEVICES} are needed; profile others "
            f"whole first, without --samples"
        )
    first, *others = sorted(known)
    probes = tuple(p for p in known[first] if all(p in known[name] for name in others))
    if len(probes) <= num_samples:
        raise FewShotError(
            f"the known devices share {len(probes)} probes, so {num_samples} samples leave nothing "
            f"to estimate; lower --samples, or profile all of them at the same --tokens"
        )
    for name in (first, *others):
        for probe in probes:
            _check_seconds(name, probe, known[name][probe])
    return probes


def _check_seconds(device: str, probe: object, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(
            f"{device}: {probe} takes {seconds} s, which must be above 0 and finite; measure it "
            f"again with `motley profile --refresh`"
        )


def _fit(logs_NP: Floats) -> _Shapes:
    """Split logs into probe means, device speeds and orthonormal shapes, largest first."""
    mean_P = logs_NP.mean(axis=0)
    rest_NP = logs_NP - mean_P
    rest_NP = rest_NP - rest_NP.mean(axis=1, keepdims=True)
    _, sizes, basis_RP = np.linalg.svd(rest_NP, full_matrices=False)
    # Centring takes one dimension off; what is left of it is rounding.
    rank = max(0, min(len(logs_NP) - 1, int(np.sum(sizes > 1e-12))))
    # The sign of a singular vector is arbitrary; fix it so that equal inputs give equal models.
    signs = np.sign(basis_RP[np.arange(len(sizes)), np.abs(basis_RP).argmax(axis=1)])
    basis_RP = basis_RP * signs[:, None]
    return _Shapes(mean_P, basis_RP[:rank], sizes[:rank] / math.sqrt(max(1, len(logs_NP) - 1)))


def _design(shapes: _Shapes) -> Floats:
    """One row a probe: 1 for the speed, then the shapes scaled to unit prior variance."""
    scaled_PR = (shapes.basis_RP * shapes.spread_R[:, None]).T
    return np.hstack([np.ones((len(shapes.mean_P), 1)), scaled_PR])


def _solve(shapes: _Shapes, at: Sequence[int], logs: Floats) -> Floats:
    """Return the log seconds of every probe, given those at `at`."""
    design_PC = _design(shapes)
    rows_KC = design_PC[list(at)]
    penalty = np.full(rows_KC.shape[1], NOISE**2)
    penalty[0] = 0.0
    normal = rows_KC.T @ rows_KC + np.diag(penalty)
    coefficients = np.linalg.solve(normal, rows_KC.T @ (logs - shapes.mean_P[list(at)]))
    return np.asarray(shapes.mean_P + design_PC @ coefficients)


def _choose(shapes: _Shapes, num_samples: int) -> list[int]:
    """Pick probes one by one, each the one that tells most (greedy D-optimal design).

    The determinant of the information matrix grows by 1 + x' A^-1 x with a probe x, so the largest
    leverage is taken.
    """
    design_PC = _design(shapes)
    # A wide prior on the speed: nothing is known of it before the first sample.
    inverse = np.diag([1e4, *np.ones(design_PC.shape[1] - 1)])
    chosen: list[int] = []
    for _ in range(num_samples):
        leverage = np.einsum("pc,cd,pd->p", design_PC, inverse, design_PC)
        leverage[chosen] = -1.0
        # Rounding must not decide between probes that tell the same.
        best = int(np.flatnonzero(leverage >= leverage.max() * (1 - 1e-9))[0])
        chosen.append(best)
        row = inverse @ design_PC[best]
        inverse = inverse - np.outer(row, row) / (NOISE**2 + design_PC[best] @ row)
    return sorted(chosen)


def _best_rank(logs_NP: Floats, num_samples: int) -> int:
    """Return the number of shapes that predicts devices left out best; 0 with too few devices."""
    if len(logs_NP) < LEAST_KNOWN_DEVICES:
        return 0
    mean_error = []
    for rank in range(min(len(logs_NP) - 1, num_samples)):
        errors = [
            np.abs(_predict_left_out(logs_NP, i, num_samples, rank)).mean()
            for i in range(len(logs_NP))
        ]
        mean_error.append(float(np.mean(errors)))
    return int(np.argmin(np.round(mean_error, 12)))


def _predict_left_out(logs_NP: Floats, left_out: int, num_samples: int, rank: int) -> Floats:
    """Return the log errors of the probes that were not sampled on the device left out."""
    shapes = _fit(np.delete(logs_NP, left_out, axis=0))
    at = _choose(shapes, num_samples)
    predicted_P = _solve(shapes.limited(rank), at, logs_NP[left_out, at])
    return np.asarray(np.delete(predicted_P - logs_NP[left_out], at))


def _left_out_errors(logs_NP: Floats, left_out: int, num_samples: int) -> Floats:
    """Return relative errors on one device, with everything chosen on the others alone."""
    rank = _best_rank(np.delete(logs_NP, left_out, axis=0), num_samples)
    return np.abs(np.expm1(_predict_left_out(logs_NP, left_out, num_samples, rank)))
