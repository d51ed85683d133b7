"""A deployment over three hosts, one of them behind 20 Mbit/s, answers as one process does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_cases import GREEDY, SLOW_BYTES_PER_S, TEXTS, in_one_process, staged
from host_ray import Asked, HostDeployment, HostRay
from identity import Expected, check_identical

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def served(ray_on_hosts: HostRay) -> Iterator[HostDeployment]:
    if ray_on_hosts.is_broken:
        ray_on_hosts.repair()
    hosts = ray_on_hosts.hosts
    hosts["h2"].shape(SLOW_BYTES_PER_S)
    with ray_on_hosts.serving(staged(hosts, 3, 3, 2)) as deployment:
        yield deployment
    ray_on_hosts.restore_links()


@pytest.fixture(scope="module")
def expected() -> list[Expected]:
    return in_one_process(TEXTS, GREEDY["max_tokens"])


def test_tokens_over_a_slow_link_are_those_of_one_process(
    served: HostDeployment, ray_on_hosts: HostRay, expected: list[Expected]
) -> None:
    hosts = ray_on_hosts.hosts
    sent = {name: host.sent_bytes() for name, host in hosts.items()}

    asked = [Asked(served, text, **GREEDY) for text in TEXTS]
    for request in asked:
        request.wait()

    assert [request.error for request in asked] == [None] * len(TEXTS)
    check_identical(expected, [request.tokens for request in asked])
    stages = served.status()["stages"]
    assert [stage["node"] for stage in stages] == [host.address for host in hosts.values()]
    for host in hosts.values():
        assert len(host.processes(b"ray::StageWorker")) == 1
    # The rows of every step have left the first two hosts.
    for name, stage in zip(("h0", "h1"), stages, strict=False):
        assert hosts[name].sent_bytes() - sent[name] > stage["link_bytes"] > 0


def test_a_short_cut_of_a_link_delays_requests_and_changes_nothing(
    served: HostDeployment, ray_on_hosts: HostRay, expected: list[Expected]
) -> None:
    head, far = ray_on_hosts.head, ray_on_hosts.hosts["h2"]
    asked = [Asked(served, text, **GREEDY) for text in TEXTS]
    for request in asked:
        request.wait_for_tokens(8)

    far.cut()
    assert head.run("ping", "-c1", "-W1", far.address, check=False).returncode != 0
    assert all(request.is_going_on for request in asked)
    far.heal()
    for request in asked:
        request.wait()

    assert [request.error for request in asked] == [None] * len(TEXTS)
    check_identical(expected, [request.tokens for request in asked])
