"""Hosts and the links between them break all the time: no token is lost, none changes."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from host_cases import CHECKPOINT, SLOW_BYTES_PER_S
from host_ray import HostDeployment, HostRay
from hosts import Host, wait_until
from soaking import SECONDS, Fault, Missed, Soak

STAGE, LANE = b"ray::StageWorker", b"ray::DecodeWorker"
UP = b"python\0-m\0cluster\0up"
REQUEST_TIMEOUT_S = 300.0
"""A host that is lost takes its Ray node along, which must be started again."""
LOST_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 30.0
LONGEST_CUT_S = 3.0
"""Shorter than what makes a node or an actor count as lost."""

pytestmark = pytest.mark.timeout(SECONDS + 600)


def make_settings(cluster: HostRay) -> dict[str, object]:
    devices = [
        {
            "id": f"on-{name}", "node": host.address, "kind": "paced", "flops_per_s": 8e9,
            "memory_bytes_per_s": 2e9, "memory_bytes": 2**28,
        }
        for name, host in cluster.hosts.items()
    ]  # fmt: skip
    return {
        "model": str(CHECKPOINT),
        "devices": devices,
        "plan": {"lanes": 2, "sequences_per_lane": 8, "context_tokens": 256},
        "engine": {"num_kv_blocks": 256, "step_timeout_s": 120},
        "controller": {"silence_timeout_s": 6, "recovery_timeout_s": 120},
    }


class Breaker:
    """What can go wrong between hosts, and on them."""

    def __init__(self, cluster: HostRay, served: HostDeployment) -> None:
        self._cluster = cluster
        self._served = served

    def kinds(self) -> list[Fault]:
        return [
            self.cut_link, self.cut_link, self.lose_host, self.slow_link, self.kill_stage,
            self.hang_stage, self.kill_lane, self.move_layers,
        ]  # fmt: skip

    def cut_link(self, draws: random.Random) -> None:
        """For a moment, of any host, also of the gateway's: nothing is heard, then all at once."""
        host = self._host(draws)
        host.cut()
        time.sleep(draws.uniform(0.2, LONGEST_CUT_S))
        host.heal()

    def lose_host(self, draws: random.Random) -> None:
        """A host is cut off until it counts as lost; then it is healed, and its node started
        again."""
        host = draws.choice([host for host in self._hosts() if host is not self._served.host])
        host.cut()
        try:
            wait_until(lambda: host.address not in self._cluster.alive(), LOST_TIMEOUT_S)
        finally:
            host.heal()
        host.signal(signal.SIGKILL)
        self._cluster.start_node(host)

    def slow_link(self, draws: random.Random) -> None:
        """Or be as fast again as the machine."""
        self._host(draws).shape(draws.choice([SLOW_BYTES_PER_S, None]))

    def kill_stage(self, draws: random.Random) -> None:
        self._signal(signal.SIGKILL, STAGE, draws)

    def hang_stage(self, draws: random.Random) -> None:
        """For good: it is counted as lost after a while, and killed. One that serves, for one that
        starts may take until the deadline of starting."""
        with missing():
            stages = self._served.status()["stages"]
        serving = {stage["node"] for stage in stages if stage["active"]}
        found = [host.processes(STAGE) for host in self._hosts() if host.address in serving]
        # Of two stages of a host the younger one is loading.
        send(signal.SIGSTOP, [min(pids, key=started_ticks) for pids in found if pids], draws)

    def kill_lane(self, draws: random.Random) -> None:
        self._signal(signal.SIGKILL, LANE, draws)

    def move_layers(self, _: random.Random) -> None:
        """An operator asks for the best plan."""
        with missing(), self._served.http() as client:
            client.post("/controller/rebalance").raise_for_status()

    def _hosts(self) -> list[Host]:
        return list(self._cluster.hosts.values())

    def _host(self, draws: random.Random) -> Host:
        return draws.choice(self._hosts())

    def _signal(self, number: signal.Signals, title: bytes, draws: random.Random) -> None:
        send(number, [pid for host in self._hosts() for pid in host.processes(title)], draws)


@contextmanager
def missing() -> Iterator[None]:
    """Take it for a miss when the gateway cannot be asked."""
    try:
        yield
    except httpx.HTTPError as error:
        raise Missed(type(error).__name__) from error


def started_ticks(pid: int) -> int:
    """Return when a process was started, in the kernel's clock ticks; gone: later than any."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return sys.maxsize
    return int(fields[19])


def send(number: signal.Signals, pids: Sequence[int], draws: random.Random) -> None:
    """Signal one of these processes."""
    if not pids:
        raise Missed("there is none")
    try:
        os.kill(draws.choice(pids), number)
    except ProcessLookupError as error:
        raise Missed(type(error).__name__) from error


def is_idle(served: HostDeployment) -> bool:
    lanes = served.read("/dashboard.json")["lanes"]
    return all(lane["running"] == lane["waiting"] == lane["blocks_in_use"] == 0 for lane in lanes)


async def test_no_token_is_lost_or_changed_whatever_is_cut(cluster_to_break: HostRay) -> None:
    cluster = cluster_to_break
    with cluster.serving(make_settings(cluster)) as served:
        [pid] = served.host.processes(UP)
        faults = Breaker(cluster, served).kinds()
        try:
            soak = Soak(
                served.target,
                served.token,
                faults,
                gateway_pid=pid,
                request_timeout_s=REQUEST_TIMEOUT_S,
            )
            await soak.run()
        except BaseException as error:
            error.add_note(served.up.output)
            raise
        cluster.restore_links()
        wait_until(lambda: is_idle(served), IDLE_TIMEOUT_S, served.status)
    assert served.up.poll() == 0, served.up.output
    for host in cluster.hosts.values():
        wait_until(lambda host=host: not host.processes(STAGE, LANE), GONE_TIMEOUT_S)  # type: ignore[misc]
