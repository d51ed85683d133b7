from __future__ import annotations

import pytest

from cluster.quantities import format_bytes, parse_bytes, parse_bytes_per_s, parse_flops_per_s


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (4096, 4096),
        ("64 MiB", 64 * 2**20),
        ("64MiB", 64 * 2**20),
        ("2 GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("1e9", 10**9),
        ("16_384 B", 16384),
    ],
)
def test_an_amount_of_memory_becomes_bytes(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("1 GB/s", 1e9), ("1 Gbit/s", 1.25e8), ("64 MiB/s", 64 * 2**20), (5e6, 5e6)],
)
def test_a_rate_becomes_bytes_per_second(text: object, bytes_per_s: float) -> None:
    assert parse_bytes_per_s(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "flops_per_s"), [("20 GFLOP/s", 2e10), ("1.5 TFLOPS", 1.5e12), (7, 7.0)]
)
def test_a_speed_becomes_flops_per_second(text: object, flops_per_s: float) -> None:
    assert parse_flops_per_s(text) == flops_per_s


@pytest.mark.parametrize("text", ["64 MB/s", "lots", "64 mb", "", "-3 GB", None, True, [1]])
def test_what_is_not_an_amount_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match='is not an amount of memory; write bytes, "64 MiB"'):
        parse_bytes(text)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "0 GB"])
def test_nothing_and_less_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        parse_bytes(value)


def test_a_rate_is_not_an_amount_and_a_speed_is_not_a_rate() -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        parse_bytes_per_s("1 GB")
    with pytest.raises(ValueError, match="is not a speed"):
        parse_flops_per_s("1 GB/s")


def test_bytes_are_shown_in_binary_units() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(3 * 2**19) == "1.5 MiB"
