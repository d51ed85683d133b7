"""Three hosts with a Ray node each, made once; tests slow, cut and pause them.

Ask for `cluster` to use them, and for `cluster_to_break` to lose a node: the nodes are replaced
before the next test that needs them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_ray import HostRay
from hosts import Network, network, why_not

HOSTS = ("h0", "h1", "h2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "hosts" in item.path.parts:
            for mark in (pytest.mark.hosts, pytest.mark.ray, pytest.mark.slow):
                item.add_marker(mark)


@pytest.fixture(scope="session")
def separate_hosts() -> None:
    """Skip where this machine cannot be several hosts."""
    if (reason := why_not()) is not None:
        pytest.skip(f"no separate hosts: {reason}")


@pytest.fixture(scope="session")
def ray_on_hosts(separate_hosts: None) -> Iterator[HostRay]:
    with network(HOSTS) as lan:
        cluster = HostRay(lan)
        cluster.start()
        yield cluster


@pytest.fixture
def cluster(ray_on_hosts: HostRay) -> Iterator[HostRay]:
    """The hosts with fast links, and a live Ray node on each."""
    if ray_on_hosts.is_broken:
        ray_on_hosts.repair()
    yield ray_on_hosts
    ray_on_hosts.restore_links()


@pytest.fixture
def cluster_to_break(cluster: HostRay) -> HostRay:
    cluster.is_broken = True
    return cluster


@pytest.fixture
def lan(cluster: HostRay) -> Network:
    return cluster.hosts
