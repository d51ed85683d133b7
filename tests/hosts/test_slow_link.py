"""A link that gets slow while its deployment serves is noticed, and layers move off its host."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from host_cases import GREEDY, TEXTS, in_one_process, staged
from host_ray import Asked, HostDeployment, HostRay
from hosts import wait_until
from identity import check_identical

SLOWED_BYTES_PER_S = 1e6 / 8
"""1 Mbit/s: the planned step of 16 rows is 12 KB, and takes it 98 ms; two stages take 27, and on a
busy machine twice that."""
LANES, SEQUENCES_PER_LANE = 3, 16
IN_FLIGHT = 6
NOTICED_TIMEOUT_S = 150.0
ANSWERED_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.5

pytestmark = pytest.mark.timeout(600)


def document(served: HostDeployment) -> dict[str, Any]:
    value: dict[str, Any] = served.read("/controller")["controller"]
    return value


def rates(served: HostDeployment) -> dict[tuple[str, str], float]:
    """Return the bandwidth of every link that was measured, by its nodes."""
    return {
        (link["source_node"], link["target_node"]): link["bandwidth_bytes_per_s"]
        for link in document(served)["links"]
    }


def nodes(served: HostDeployment) -> set[str]:
    return {stage["node"] for stage in served.status()["stages"]}


def test_layers_move_off_a_host_whose_link_gets_slow(cluster: HostRay) -> None:
    lan = cluster.hosts
    near, middle, far = (host.address for host in lan.values())
    slow = {pair for node in (near, middle) for pair in ((node, far), (far, node))}
    config = staged(
        lan,
        plan={
            "lanes": LANES, "sequences_per_lane": SEQUENCES_PER_LANE, "context_tokens": 256,
        },
        controller={
            "link_probe_every_s": 1.0, "window_s": 1.0, "cool_down_s": 2.0,
            # More than a busy machine makes of a stage that has to wait for its processor.
            "min_gain_fraction": 0.5,
        },
    )  # fmt: skip
    expected = in_one_process(TEXTS, GREEDY["max_tokens"])
    with cluster.serving(config) as served, ThreadPoolExecutor(IN_FLIGHT) as clients:
        has_moved = threading.Event()

        def ask(index: int) -> list[Asked]:
            """One request after another, the last one in flight when layers have moved."""
            requests: list[Asked] = []
            while not requests or not has_moved.is_set():
                requests.append(Asked(served, TEXTS[index % len(TEXTS)], **GREEDY))
                requests[-1].wait(ANSWERED_TIMEOUT_S)
            return requests

        assert nodes(served) == {near, middle, far}
        wait_until(lambda: slow <= rates(served).keys(), NOTICED_TIMEOUT_S, every_s=LOOK_EVERY_S)
        assert min(rates(served).values()) > 4 * SLOWED_BYTES_PER_S
        asked = [clients.submit(ask, index) for index in range(IN_FLIGHT)]

        # Its probe is started again: the link is found slow all the same.
        assert lan["h0"].signal(signal.SIGKILL, b"ray::LinkProbeWorker") == 1
        lan["h2"].shape(SLOWED_BYTES_PER_S)
        try:
            wait_until(
                lambda: far not in nodes(served),
                NOTICED_TIMEOUT_S,
                lambda: document(served),
                every_s=LOOK_EVERY_S,
            )
        finally:
            has_moved.set()
        wait_until(
            lambda: max(rates(served)[way] for way in slow) < 1.2 * SLOWED_BYTES_PER_S,
            NOTICED_TIMEOUT_S,
            lambda: rates(served),
            every_s=LOOK_EVERY_S,
        )
        seen = rates(served)
        answers = [requests.result(ANSWERED_TIMEOUT_S) for requests in asked]
        lan["h2"].shape(None)
    for index, requests in enumerate(answers):
        assert [request.error for request in requests] == [None] * len(requests)
        check_identical(
            [expected[index % len(TEXTS)]] * len(requests),
            [request.tokens for request in requests],
        )
    assert min(seen[way] for way in slow) > 0.25 * SLOWED_BYTES_PER_S
    assert min(seen[near, middle], seen[middle, near]) > 4 * SLOWED_BYTES_PER_S
    assert served.up.poll() == 0, served.up.output
    assert served.up.output.count("its probe is started again") == 1
    for host in lan.values():
        wait_until(
            lambda host=host: not host.processes(b"ray::LinkProbeWorker"),  # type: ignore[misc]
            GONE_TIMEOUT_S,
        )
        assert list(host.folder.glob("motley-*")) == [], served.up.output
