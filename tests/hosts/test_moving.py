"""Layers move between hosts under load."""

from __future__ import annotations

import pytest
from host_cases import GREEDY, SLOW_BYTES_PER_S, TEXTS, staged
from host_ray import Asked, HostRay

pytestmark = pytest.mark.timeout(400)


@pytest.mark.skip(reason="needs the controller")
def test_layers_leave_a_host_whose_link_slows_while_it_serves(cluster: HostRay) -> None:
    """Tighten as: the plan in force comes to use the slow link less (its epoch grows), no request
    has an error, and all tokens are `in_one_process`'s."""
    lan = cluster.hosts
    with cluster.serving(staged(lan, 3, 3, 2)) as served:
        asked = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in asked:
            request.wait_for_tokens(8)
        lan["h2"].shape(SLOW_BYTES_PER_S)
        for request in asked:
            request.wait()
        assert served.status()["epoch"] > 0
