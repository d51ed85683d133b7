"""Experts on three hosts: a host's worker that is killed, and a host that hangs and is back."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from host_cases import GREEDY, TEXTS, in_one_process, staged
from host_ray import Asked, HostDeployment, HostRay
from hosts import ROOT, wait_until
from identity import check_identical

MOE = ROOT / "deploy" / "checkpoints" / "tiny-qwen3-moe"
WORKER = b"ray::ExpertWorker"
RECOVERED_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 30.0
SILENCE_S = 4.0
REPLAYED_TIMEOUT_S = 150.0

pytestmark = pytest.mark.timeout(500)


def experts(served: HostDeployment) -> dict[str, Any]:
    value: dict[str, Any] = served.read("/controller")["controller"]["experts"]
    return value


def wait_until_held_on(device_id: str, served: HostDeployment) -> None:
    wait_until(
        lambda: experts(served)["copies"].get(device_id, 0) > 0,
        RECOVERED_TIMEOUT_S,
        lambda: experts(served),
    )


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

        # The worker is started again, and its host takes experts back.
        wait_until_held_on("on-h2", served)
        again = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in again:
            request.wait()
        check_identical(expected, [request.tokens for request in again])

        # Drained it holds none, while its stage has moved as well; the others serve.
        address = lan["h2"].address
        cluster.head.motley("drain", address, "--json")
        assert address not in experts(served)["nodes"].values()
        last = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in last:
            request.wait()
        check_identical(expected, [request.tokens for request in last])
        cluster.head.motley("drain", "--cancel", address, "--json")
        wait_until_held_on("on-h2", served)
    assert served.up.poll() == 0, served.up.output
    for host in lan.values():
        wait_until(lambda host=host: not host.processes(WORKER), GONE_TIMEOUT_S)  # type: ignore[misc]


def test_a_host_that_hangs_holds_experts_again_when_it_is_back(cluster_to_break: HostRay) -> None:
    lan = cluster_to_break.hosts
    expected = in_one_process(TEXTS, GREEDY["max_tokens"], MOE)
    config = staged(lan, 3, 3, 0, controller={"silence_timeout_s": SILENCE_S}) | {"model": str(MOE)}
    config["plan"]["experts"] = "shards"
    with cluster_to_break.serving(config) as served:
        asked = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in asked:
            request.wait_for_tokens(8)

        lan["h2"].signal(signal.SIGSTOP)
        for request in asked:
            request.wait(REPLAYED_TIMEOUT_S)

        assert [request.error for request in asked] == [None] * len(asked)
        check_identical(expected, [request.tokens for request in asked])
        # Few rows go to the nearest replicas, so nobody may have waited for it.
        wait_until(
            lambda: "on-h2" not in experts(served)["copies"],
            RECOVERED_TIMEOUT_S,
            lambda: experts(served),
        )

        lan["h2"].signal(signal.SIGCONT)
        wait_until_held_on("on-h2", served)
        again = [Asked(served, text, **GREEDY) for text in TEXTS]
        for request in again:
            request.wait()
        check_identical(expected, [request.tokens for request in again])
    assert served.up.poll() == 0, served.up.output
