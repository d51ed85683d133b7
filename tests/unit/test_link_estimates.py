"""What the probes of links amount to, and which links are probed."""

from __future__ import annotations

import itertools

import pytest

from placement.steering.links import LinkEstimates, other_pairs, pairs_around, pairs_in_use
from placement.topology import Device, Link, LinkRate, Topology

FAST, SLOW = 100e6, 2e6
RTT_S = 1e-3


def device(node: str) -> Device:
    return Device(
        id=node, node=node, kind="paced", flops_per_s=1e12, memory_bytes_per_s=1e9,
        memory_bytes=10**9,
    )  # fmt: skip


def topology(*links: Link, nodes: str = "abc", default: float | None = FAST) -> Topology:
    rate = LinkRate(bandwidth_bytes_per_s=default, latency_s=RTT_S / 2) if default else None
    return Topology(devices=tuple(map(device, nodes)), links=links, default_link=rate)


def link(source: str, target: str, rate: float = FAST) -> Link:
    return Link(
        source_node=source, target_node=target, bandwidth_bytes_per_s=rate, latency_s=RTT_S / 2
    )


def told(
    estimates: LinkEstimates, *rates: float, pair: str = "ab", rtt_s: float = RTT_S
) -> list[float | None]:
    """Return the bandwidth that is told after each probe; None: nothing is told."""
    links = [
        estimates.observe(*pair, rtt_s=rtt_s, bandwidth_bytes_per_s=rate).link for rate in rates
    ]
    return [None if link is None else link.bandwidth_bytes_per_s for link in links]


def surprises(estimates: LinkEstimates, *rates: float) -> list[bool]:
    return [
        estimates.observe("a", "b", rtt_s=RTT_S, bandwidth_bytes_per_s=rate).is_surprise
        for rate in rates
    ]


def test_a_slower_link_is_told_when_every_probe_of_a_window_says_so() -> None:
    assert told(LinkEstimates(topology()), SLOW, SLOW, SLOW, SLOW) == [None, None, SLOW, None]


def test_traffic_that_hides_the_link_from_some_probes_tells_nothing() -> None:
    rates = [FAST, SLOW, SLOW, FAST, SLOW, SLOW, FAST]
    assert told(LinkEstimates(topology()), *rates) == [None] * len(rates)


def test_a_faster_link_is_told_at_once() -> None:
    estimates = LinkEstimates(topology(link("a", "b", SLOW)))
    assert told(estimates, FAST, SLOW, SLOW) == [FAST, None, None]


def test_a_link_that_heals_is_told_with_the_first_probe_that_shows_it() -> None:
    estimates = LinkEstimates(topology())
    assert told(estimates, SLOW, SLOW, SLOW, FAST) == [None, None, SLOW, FAST]


def test_scatter_within_the_tolerance_of_what_was_told_is_no_news() -> None:
    estimates = LinkEstimates(topology())
    rates = [0.9 * FAST, 0.82 * FAST, 0.82 * FAST, 0.82 * FAST, 1.2 * FAST]
    assert told(estimates, *rates) == [None] * len(rates)
    # From what was told last, not from one probe to the next.
    assert told(estimates, 0.7 * FAST, 0.7 * FAST, 0.7 * FAST)[-1] == 0.7 * FAST


def test_the_least_round_trip_counts_and_small_changes_of_it_do_not() -> None:
    estimates = LinkEstimates(topology())
    probe = {"bandwidth_bytes_per_s": FAST}
    for rtt_s in (0.050, 0.0019, 0.050):
        assert estimates.observe("a", "b", rtt_s=rtt_s, **probe).link is None
    assert estimates.observe("a", "b", rtt_s=0.050, **probe).link is None
    slow = estimates.observe("a", "b", rtt_s=0.040, **probe).link
    assert slow == Link(
        source_node="a", target_node="b", bandwidth_bytes_per_s=FAST, latency_s=0.020
    )


def test_a_probe_surprises_until_it_is_planned_with() -> None:
    estimates = LinkEstimates(topology())
    assert surprises(estimates, FAST, SLOW, SLOW, SLOW, SLOW) == [False, True, True, True, False]
    assert surprises(estimates, FAST, FAST) == [True, False]


def test_a_direction_that_was_never_told_is_held_against_the_other_one() -> None:
    # The controller fills a missing direction with its opposite.
    estimates = LinkEstimates(topology())
    assert told(estimates, SLOW, SLOW, SLOW) == [None, None, SLOW]
    assert told(estimates, SLOW, SLOW, SLOW, pair="ba") == [None] * 3
    assert told(estimates, FAST, pair="ba") == [FAST]


def test_a_node_to_itself_and_nodes_that_cannot_reach_each_other_are_never_told() -> None:
    estimates = LinkEstimates(topology(link("a", "b"), default=None))
    assert told(estimates, SLOW, SLOW, SLOW, pair="aa") == [None] * 3
    assert told(estimates, SLOW, SLOW, SLOW, pair="ac") == [None] * 3
    assert told(estimates, SLOW, SLOW, SLOW, pair="ab") == [None, None, SLOW]
    assert estimates.measured() == (link("a", "b", SLOW),)


def test_a_node_that_joins_again_has_the_links_that_it_joins_with() -> None:
    estimates = LinkEstimates(topology())
    told(estimates, SLOW, SLOW, SLOW, pair="ab")
    told(estimates, SLOW, SLOW, SLOW, pair="ca")

    estimates.rejoin("b", topology(nodes="abcd"))

    assert estimates.measured() == (link("c", "a", SLOW),)
    # It is planned with as declared again, and the other link as it was measured.
    assert told(estimates, SLOW, SLOW, SLOW, pair="ab") == [None, None, SLOW]
    assert told(estimates, SLOW, pair="ca") == [None]


def test_links_of_a_topology_that_grows_are_held_against_it() -> None:
    estimates = LinkEstimates(topology())
    estimates.rejoin("d", topology(link("d", "a", SLOW), nodes="abcd"))
    assert told(estimates, SLOW, SLOW, SLOW, pair="da") == [None] * 3
    assert told(estimates, FAST, pair="ad") == [FAST]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_probes": 0}, r"num_probes \(0\) must be at least 1"),
        ({"tolerance_fraction": -0.1}, r"tolerance_fraction \(-0.1\) must be 0 or more"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LinkEstimates(topology(), **options)


def test_a_step_goes_from_its_lane_through_the_stages_and_back() -> None:
    assert pairs_in_use(["a", "b", "c"], "a") == [("a", "b"), ("b", "c"), ("c", "a")]
    assert pairs_in_use(["b", "c"], "a") == [("a", "b"), ("b", "c"), ("c", "a")]
    assert pairs_in_use(["b"], "a") == [("a", "b"), ("b", "a")]
    assert pairs_in_use(["a", "a"], "a") == []


def test_rounds_come_to_every_other_link_in_turn() -> None:
    in_use = pairs_in_use(["a", "b", "c", "d"], "a")
    rounds = [other_pairs("abcd", in_use, number) for number in range(4)]

    assert {len(pairs) for pairs in rounds} == {2}
    seen = [pair for pairs in rounds for pair in pairs]
    assert len(set(seen)) == len(seen) == 8
    assert set(seen) | set(in_use) == set(itertools.permutations("abcd", 2))
    assert other_pairs("abcd", in_use, 4) == rounds[0]
    assert other_pairs("ab", [("a", "b")], 7) == [("b", "a")]


def test_around_a_link_are_its_way_back_and_what_else_its_ends_are_joined_by() -> None:
    assert pairs_around(("a", "b"), []) == [("b", "a")]
    around = pairs_around(("d", "a"), ["a", "b", "c"])
    assert sorted(around) == [
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "a"), ("b", "d"), ("c", "a"), ("c", "d"),
        ("d", "b"), ("d", "c"),
    ]  # fmt: skip
