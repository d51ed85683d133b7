"""One way between two actors on one node: Motley's wire, raw TCP, and a Ray actor call.

Run: python tests/bench/hop.py [--quick]

Every transport runs between the same two Ray actors (two processes), in turns. The wire and TCP
figures are half a round trip of equal payloads; the Ray figure is one call that carries the
payload and returns nothing. The wire's time includes encoding and decoding the tensor.

Measured twice: with each actor on a core of its own, as two busy stages are, and left to the
kernel, which puts both ends of a raw TCP ping-pong on one core and so saves it the wake-up of
another: an idle pair's best case, which no pipeline sees.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import time
from typing import Any

import numpy as np
import ray
import torch
from figures import Figure, at_least, at_most, median, report

from actors import wire
from actors.engine.frames import decode_tensor, encode_tensor

SIZES_BYTES = {"4 KB": 4_096, "400 KB": 400_000}
PAYLOAD_ROW = 1_024


class Peer:
    """One end of every transport."""

    def __init__(self, keys: wire.WireKeys, core: int | None) -> None:
        torch.set_num_threads(1)
        if core is not None:
            os.sched_setaffinity(0, {core})  # inherited by the sockets' threads, made below
        self._keys = keys
        self._inbox = wire.Inbox("peer", keys)
        self._outbox: wire.Outbox | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))

    def address(self) -> tuple[wire.Address, int]:
        return self._inbox.address, self._listener.getsockname()[1]

    def connect(self, address: wire.Address) -> None:
        self._outbox = wire.Outbox(address, self._keys)

    def echo_wire(self, rounds: int) -> None:
        for _ in range(rounds):
            self._send(self._receive())

    def ping_wire(self, size_bytes: int, rounds: int) -> list[float]:
        tensor = torch.randn(size_bytes // 4)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            self._send(tensor)
            self._receive()
            times.append((time.perf_counter() - start) / 2)
        return times

    def echo_tcp(self, size_bytes: int, rounds: int) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = bytearray(size_bytes)
            for _ in range(rounds):
                _read_exactly(connection, buffer)
                connection.sendall(buffer)

    def ping_tcp(self, port: int, size_bytes: int, rounds: int) -> list[float]:
        times = []
        buffer = bytearray(size_bytes)
        payload = os.urandom(size_bytes)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(rounds):
                start = time.perf_counter()
                connection.sendall(payload)
                _read_exactly(connection, buffer)
                times.append((time.perf_counter() - start) / 2)
        return times

    def close(self) -> None:
        self._inbox.close()

    def take(self, payload: Any) -> None:
        """What a Ray call delivers."""

    def ping_ray(self, peer: Any, size_bytes: int, rounds: int) -> list[float]:
        payload = np.random.default_rng(0).standard_normal(size_bytes // 8)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            ray.get(peer.take.remote(payload))
            times.append(time.perf_counter() - start)
        return times

    def _send(self, tensor: torch.Tensor) -> None:
        assert self._outbox is not None
        self._outbox.send([wire.STEP, *encode_tensor(tensor)])

    def _receive(self) -> torch.Tensor:
        parts = self._inbox.receive(10.0)
        assert parts is not None
        return decode_tensor(parts[1], parts[2])


def _read_exactly(connection: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        view = view[connection.recv_into(view) :]


def measure(label: str, cores: tuple[int | None, ...], rounds: int, repeats: int) -> list[Figure]:
    keys = wire.WireKeys.make()
    actor: Any = ray.remote(num_cpus=0)(Peer)
    near, far = (actor.remote(keys, core) for core in cores)
    (near_address, _), (far_address, far_port) = ray.get(
        [near.address.remote(), far.address.remote()]
    )
    ray.get([near.connect.remote(far_address), far.connect.remote(near_address)])
    figures = []
    for amount, size in SIZES_BYTES.items():
        times: dict[str, list[float]] = {"wire": [], "tcp": [], "ray": []}
        for _ in range(repeats):
            echo = far.echo_tcp.remote(size, rounds)
            times["tcp"] += ray.get(near.ping_tcp.remote(far_port, size, rounds))
            ray.get(echo)
            echo = far.echo_wire.remote(rounds)
            times["wire"] += ray.get(near.ping_wire.remote(size, rounds))
            ray.get(echo)
            times["ray"] += ray.get(near.ping_ray.remote(far, size, max(20, rounds // 5)))
        wire_s, tcp_s, ray_s = (median(times[name]) for name in ("wire", "tcp", "ray"))
        print(
            f"{amount}, {label}: wire {wire_s * 1e6:.0f} us, raw TCP {tcp_s * 1e6:.0f} us, "
            f"Ray call {ray_s * 1e6:.0f} us (medians, one way)"
        )
        name = f"hop {amount}, {label}"
        figures.append(at_most(f"{name}: us beside raw TCP", wire_s * 1e6, tcp_s * 1e6, 5))
        figures.append(at_least(f"{name}: 1/s beside a Ray call", 1 / wire_s, 1 / ray_s, 10))
    ray.get([near.close.remote(), far.close.remote()])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}},
    )  # fmt: skip
    try:
        rounds, repeats = (200, 3) if quick else (1000, 5)
        figures = measure("a core each", (0, 1), rounds, repeats)
        figures += measure("any core", (None, None), rounds, repeats)
    finally:
        ray.shutdown()
    report(figures)


if __name__ == "__main__":
    main()
