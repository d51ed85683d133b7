"""The doctor's questions to every node of a Ray cluster. The only part of it that needs Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor_checks import Check, compare_nodes
from cluster.ray_session import connect_error

Versions = dict[str, str | None]
_ANSWER_TIMEOUT_S = 60.0


def check_nodes(address: str, packages: Sequence[str]) -> list[Check]:
    """Ask each live node for its versions and compare them."""
    error = connect_error(address)
    return _join_and_ask(address, packages) if error is None else [_not_joined(address, error)]


def _join_and_ask(address: str, packages: Sequence[str]) -> list[Check]:
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        return [_not_joined(address, error)]
    try:
        return _ask_nodes(packages)
    finally:
        ray.shutdown()


def _not_joined(address: str, error: Exception) -> Check:
    advice = "set ray.address, RAY_AUTH_MODE=token and the cluster's token"
    return Check("ray cluster", "fail", f"{address} cannot be joined ({error}); {advice}")


def _ask_nodes(packages: Sequence[str]) -> list[Check]:
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    probe = ray.remote(_make_probe())
    answers = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": probe.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(list(packages))
        for node in nodes
    }
    checks = [Check("ray cluster", "pass", f"{len(nodes)} nodes alive")]
    versions: dict[str, Versions] = {}
    for node, answer in answers.items():
        try:
            versions[node] = ray.get(answer, timeout=_ANSWER_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            checks.append(
                Check(f"node {node}", "fail", f"did not answer: {error}; restart Ray there")
            )
    return checks + compare_nodes(versions)


def _make_probe() -> Callable[[list[str]], Versions]:
    """Return a function that needs nothing of ours on the node: nested, so pickled by value."""

    def probe(packages: list[str]) -> Versions:
        import importlib.metadata
        import platform

        versions: Versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        return versions

    return probe
