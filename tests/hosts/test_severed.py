"""Hosts that are lost in mid-request, cut off or hung: the requests go on elsewhere, unchanged."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from host_cases import GREEDY, TEXTS, in_one_process, staged
from host_ray import Asked, HostRay
from hosts import Host, wait_until
from identity import check_identical

SILENCE_S = 4.0
REPLAYED_TIMEOUT_S = 150.0
NOTICED_TIMEOUT_S = 90.0
ACTORS = (b"ray::StageWorker", b"ray::DecodeWorker")

pytestmark = pytest.mark.timeout(500)


def hang(host: Host) -> None:
    host.signal(signal.SIGSTOP)


def wake(host: Host) -> None:
    host.signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("lose", "bring_back"), [(Host.cut, Host.heal), (hang, wake)], ids=["partition", "hang"]
)
def test_requests_of_a_lost_host_go_on_with_the_same_tokens(
    lose: Callable[[Host], None], bring_back: Callable[[Host], None], cluster_to_break: HostRay
) -> None:
    lan = cluster_to_break.hosts
    expected = in_one_process(TEXTS, GREEDY["max_tokens"])
    config = staged(lan, 3, 3, 2, controller={"silence_timeout_s": SILENCE_S})
    with cluster_to_break.serving(config) as served:
        asked = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in asked:
            request.wait_for_tokens(8)

        lose(lan["h2"])
        for request in asked:
            request.wait(REPLAYED_TIMEOUT_S)

        assert [request.error for request in asked] == [None] * len(asked)
        check_identical(expected, [request.tokens for request in asked])
        status = served.status()
        assert status["epoch"] > 0
        assert lan["h2"].address not in [stage["node"] for stage in status["stages"]]

        # What was lost and comes back is of an old plan: nobody listens to it.
        bring_back(lan["h2"])
        again = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in again:
            request.wait(REPLAYED_TIMEOUT_S)
        check_identical(expected, [request.tokens for request in again])
    assert served.up.poll() == 0, served.up.output
    for host in lan.values():
        wait_until(lambda host=host: not host.processes(*ACTORS), NOTICED_TIMEOUT_S)  # type: ignore[misc]
