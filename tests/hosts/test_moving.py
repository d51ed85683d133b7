"""Layers move between hosts under load."""

from __future__ import annotations

import json

import pytest
from host_cases import GREEDY, SLOW_BYTES_PER_S, TEXTS, in_one_process, staged
from host_ray import Asked, HostRay
from identity import check_identical

pytestmark = pytest.mark.timeout(500)


def test_a_host_behind_a_slow_link_is_drained_while_it_serves(cluster: HostRay) -> None:
    lan = cluster.hosts
    lan["h2"].shape(SLOW_BYTES_PER_S)
    expected = in_one_process(TEXTS, GREEDY["max_tokens"])
    with cluster.serving(staged(lan, 3, 3, 2)) as served:
        asked = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in asked:
            request.wait_for_tokens(8)
        drained = cluster.head.motley("drain", lan["h2"].address, "--json")
        assert json.loads(drained.stdout)["drained"] is True
        for request in asked:
            request.wait()

        assert [request.error for request in asked] == [None] * len(asked)
        check_identical(expected, [request.tokens for request in asked])
        status = served.status()
        assert lan["h2"].address not in [stage["node"] for stage in status["stages"]]
        assert status["controller"]["num_pauses"] == 1

        cluster.head.motley("drain", "--cancel", lan["h2"].address, "--json")
        would = cluster.head.motley("rebalance", "--dry-run", "--json")
        assert json.loads(would.stdout)["would"]["verdict"]
