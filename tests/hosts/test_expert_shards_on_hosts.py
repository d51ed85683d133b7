"""Experts on three hosts: one message a host and layer, and a host's worker that is killed."""

from __future__ import annotations

import signal

import pytest
from host_cases import GREEDY, TEXTS, in_one_process, staged
from host_ray import Asked, HostRay
from hosts import ROOT, wait_until
from identity import check_identical

MOE = ROOT / "deploy" / "checkpoints" / "tiny-qwen3-moe"
WORKER = b"ray::ExpertWorker"
RECOVERED_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 30.0

pytestmark = pytest.mark.timeout(500)


def test_requests_go_on_when_a_host_loses_its_experts(cluster: HostRay) -> None:
    lan = cluster.hosts
    expected = in_one_process(TEXTS, GREEDY["max_tokens"], MOE)
    config = staged(lan, 3, 3, 0) | {"model": str(MOE)}
    config["plan"]["experts"] = "shards"
    with cluster.serving(config) as served:
        for host in lan.values():
            assert len(host.processes(WORKER)) == 1
        asked = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in asked:
            request.wait_for_tokens(8)

        assert lan["h2"].signal(signal.SIGKILL, WORKER) == 1
        for request in asked:
            request.wait()

        assert [request.error for request in asked] == [None] * len(asked)
        check_identical(expected, [request.tokens for request in asked])

        def experts() -> dict[str, object]:
            value: dict[str, object] = served.read("/controller")["controller"]["experts"]
            return value

        # The worker is started again, and its host takes experts back.
        wait_until(
            lambda: "on-h2" in experts()["copies"],  # type: ignore[operator]
            RECOVERED_TIMEOUT_S,
            experts,
        )
        again = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in again:
            request.wait()
        check_identical(expected, [request.tokens for request in again])
    assert served.up.poll() == 0, served.up.output
    for host in lan.values():
        wait_until(lambda host=host: not host.processes(WORKER), GONE_TIMEOUT_S)  # type: ignore[misc]
