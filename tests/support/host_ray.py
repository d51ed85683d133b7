"""Ray and Motley on separate hosts: a node on each, a deployment from one, its clients from here.

cluster = HostRay(lan)          # lan: see `hosts.network`; the first host is the head
cluster.start()
with cluster.serving(settings) as served, served.client() as client:
    client.complete("import os", max_tokens=8)
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Unpack

import httpx
from hosts import Host, HostError, HostProcess, Network, wait_until

from cluster.client import MotleyClient, MotleyError
from cluster.client_values import GenerateOptions, Prompt

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
GCS_PORT = 6379
_GRACE_S = 0.1
_LOSS_SETTINGS = {
    # A node is lost after about 6 s without an answer, not after a minute.
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
_SMALL = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats")


class HostRay:
    """A Ray cluster with a node on each host."""

    def __init__(self, hosts: Network) -> None:
        self.hosts = hosts
        self.head = next(iter(hosts.values()))
        self.address = f"{self.head.address}:{GCS_PORT}"
        self.is_broken = False
        """Whether a node may be lost; `repair` mends it."""
        token = secrets.token_hex(32)
        for host in hosts.values():
            share_token(host, token)
            host.environment |= _LOSS_SETTINGS

    def start(self) -> None:
        """Start the head, then all other nodes."""
        self._ray_start(self.head, "--head", f"--port={GCS_PORT}", "--include-dashboard=false")
        self.start_nodes()

    def start_nodes(self) -> None:
        """Start the nodes of all hosts but the head's at once."""
        others = [host for host in self.hosts.values() if host is not self.head]
        with ThreadPoolExecutor(len(others)) as pool:
            list(pool.map(self.start_node, others))

    def start_node(self, host: Host) -> None:
        """Start a node (again) on a host other than the head's."""
        self._ray_start(host, f"--address={self.address}")

    def repair(self) -> None:
        """After whatever a test did: heal links, end pauses, and replace all nodes but the head.

        Returns when Ray holds exactly the new ones for alive: for some seconds it believes in the
        old ones too, at the same addresses.
        """
        self.restore_links()
        others = [host for host in self.hosts.values() if host is not self.head]
        for host in others:
            host.signal(signal.SIGKILL)
        wait_until(lambda: self.alive() == [self.head.address], START_TIMEOUT_S, what=self.alive)
        self.start_nodes()
        self.is_broken = False

    def restore_links(self) -> None:
        """Join all hosts by fast links."""
        for host in self.hosts.values():
            host.heal()
            host.shape(None)

    def alive(self) -> list[str]:
        """Return the address of every node that Ray holds for alive."""
        code = (
            f"import ray; ray.init('{self.address}', log_to_driver=False, logging_level=40); "
            "print('alive:', *(n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']))"
        )
        shown = self.head.run("python", "-c", code).stdout
        [line] = re.findall(r"^alive: (.*)$", shown, re.M)
        return sorted(line.split())

    @contextmanager
    def serving(
        self, settings: Mapping[str, Any], host: Host | None = None
    ) -> Iterator[HostDeployment]:
        """`motley up` on a host (the head, when none is named) until the block ends."""
        place = host or self.head
        config = self.write_config(settings, place)
        up = place.start("python", "-m", "cluster", "up", "--json", "--config", config)
        try:
            ready = wait_for_event(up, "ready")
            with (
                reached(place, ready["http_url"]) as http,
                reached(place, ready["grpc_target"]) as grpc,
            ):
                yield HostDeployment(place, up, f"http://{http}", grpc, ready["token"])
        finally:
            if up.poll() is None:
                up.signal(signal.SIGTERM)
            try:
                up.wait(STOP_TIMEOUT_S)
            finally:
                up.end()

    def write_config(self, settings: Mapping[str, Any], host: Host, name: str = "motley") -> str:
        """Write settings that join this cluster; returns the file's name on the host."""
        tree: dict[str, Any] = {
            "ray": {"address": self.address, "start_timeout_s": START_TIMEOUT_S},
            "gateway": {"http_port": 0, "grpc_port": 0},
            **settings,
        }
        (host.folder / f"{name}.yaml").write_text(json.dumps(tree), encoding="utf-8")
        return f"/tmp/{name}.yaml"

    def _ray_start(self, host: Host, *arguments: str) -> None:
        own = f"--node-ip-address={host.address}"
        host.run("ray", "start", own, *_SMALL, *arguments, timeout_s=START_TIMEOUT_S)


class HostDeployment:
    """A deployment on hosts, seen from the tests."""

    def __init__(self, host: Host, up: HostProcess, url: str, target: str, token: str) -> None:
        self.host = host
        self.up = up
        self.url = url
        self.target = target
        self.token = token

    def client(self) -> MotleyClient:
        return MotleyClient(self.target, self.token)

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=CALL_TIMEOUT_S, trust_env=False
        )

    def status(self) -> dict[str, Any]:
        return self.read("/status")

    def read(self, path: str) -> dict[str, Any]:
        """Return what a route answers."""
        with self.http() as client:
            answer = client.get(path)
        answer.raise_for_status()
        value: dict[str, Any] = answer.json()
        return value


class Asked:
    """A request in flight, streamed on a thread of its own."""

    def __init__(self, served: HostDeployment, prompt: Prompt, **options: Unpack[GenerateOptions]):
        self.tokens: list[int] = []
        self.error: MotleyError | None = None
        self._thread = threading.Thread(target=self._stream, args=(served, prompt, options))
        self._thread.start()

    def _stream(self, served: HostDeployment, prompt: Prompt, options: GenerateOptions) -> None:
        try:
            with served.client() as client:
                for chunk in client.generate(prompt, **options):
                    self.tokens += chunk.token_ids
        except MotleyError as error:
            self.error = error

    def wait_for_tokens(self, count: int, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Wait until so many tokens have come (or all of them)."""
        wait_until(
            lambda: len(self.tokens) >= count or not self._thread.is_alive(), timeout_s, self.end
        )

    @property
    def is_going_on(self) -> bool:
        return self._thread.is_alive()

    def wait(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Wait for its end, good or bad; one that hangs fails the test."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no end within {timeout_s:g} s, {self.end()}"

    def end(self) -> str:
        return f"{len(self.tokens)} tokens, error {self.error!r}"


def share_token(host: Host, token: str) -> None:
    """Put Ray's token where Ray looks for it."""
    file = host.folder / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o600)
    file.write_text(token, encoding="ascii")


def wait_for_event(up: HostProcess, name: str) -> dict[str, Any]:
    """Return the named event of `motley up --json`."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        ended = up.poll() is not None
        for line in up.output.splitlines():
            if line.startswith("{") and line.endswith("}"):
                value: dict[str, Any] = json.loads(line)
                if value.get("event") == name:
                    return value
        if ended or time.monotonic() > deadline_s:
            raise HostError(f"no event {name}:\n{up.output}")
        time.sleep(_GRACE_S)


# -- ports of a host, reached from here ----------------------------------------------------------


@contextmanager
def reached(host: Host, address: str) -> Iterator[str]:
    """Lend an address of a host (a URL, or host:port) a port of this machine's loopback."""
    name, _, port = address.rpartition("/")[2].rpartition(":")
    with _Relay(host, (name, int(port))) as relay:
        thread = threading.Thread(target=relay.serve_forever, args=(_GRACE_S,))
        thread.start()
        try:
            yield f"127.0.0.1:{relay.server_address[1]}"
        finally:
            relay.shutdown()
            thread.join()


class _Relay(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: Host, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Call)
        self.host = host
        self.target = target


class _Call(socketserver.BaseRequestHandler):
    server: _Relay

    def handle(self) -> None:
        try:
            there = self.server.host.connect(self.server.target)
        except OSError:
            return  # the caller finds its connection closed, as it would there
        with there:
            there.settimeout(None)
            answers = threading.Thread(target=_pump, args=(there, self.request), daemon=True)
            answers.start()
            _pump(self.request, there)
            answers.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until the source ends; a connection that breaks on one side ends there."""
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            end.close()
