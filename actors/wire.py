"""The token path: messages from actor to actor over ZeroMQ.

A message is a list of parts: a kind, then whatever that kind carries (msgpack, raw tensor bytes).
Each actor has one `Inbox`; whoever sends to it has an `Outbox`. On one node they meet over a unix
socket in a directory that only the owner may enter; between nodes over TCP with CURVE, and only
the holder of the deployment's key pair is let in. No pickle, ever.

Measured on two shared cores, 400 KB one way: unix socket 66 us, TCP 82, TCP with CURVE 468
(encryption), raw TCP 33; so encryption is left to where there is a wire to tap.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

_log = logging.getLogger(__name__)

STEP = b"step"
RESULT = b"result"
REQUEST = b"request"
ABORT = b"abort"
OUTPUTS = b"outputs"
REPORT = b"report"
REFUSED = b"refused"
FAIL = b"fail"
ADAPTER = b"adapter"
EXPERTS = b"experts"
EXPERT_GRADIENTS = b"expert gradients"
ROW_GRADIENTS = b"row gradients"
ROWS = b"rows"

MAX_PART_BYTES = 256 * 2**20
"""A receiver cuts off who sends a larger part, before it is allocated."""
MAX_PARTS = 1024
"""Of one message. Only who holds the deployment's keys can send any, so this catches mistakes."""
_SEND_TIMEOUT_S = 10.0
_QUEUED_MESSAGES = 10_000
_FOLDER_PREFIX = "motley-"
_SOCKET_NAME = "inbox"
_SWEEP_AFTER_S = 20.0
"""A younger folder may be about to be listened in."""

Parts = Sequence[bytes | memoryview]


class WireError(RuntimeError):
    """A message could not be sent; the receiver is gone or does not keep up."""


class WireKeys(NamedTuple):
    """The deployment's CURVE key pair: every actor has it, nobody else."""

    public: bytes
    secret: bytes

    @classmethod
    def make(cls) -> WireKeys:
        return cls(*zmq.curve_keypair())

    def __repr__(self) -> str:
        """Without the secret: specifications that hold the keys are logged and quoted in errors."""
        return f"WireKeys(public={self.public!r})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where an inbox is reached: from its own node, and from others."""

    name: str
    machine: str
    ipc: str
    tcp: str


def machine_id() -> str:
    """Identify this machine (its boot), so that two actors know whether they share it.

    Network namespaces of one machine count as different machines: they test as separate hosts.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text(encoding="ascii").strip() if boot.exists() else socket.gethostname()
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        namespace = ""
    return f"{name} {namespace}"


class _KeyHolders:
    """ZAP credentials provider: lets in exactly the deployment's public key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class Inbox:
    """Receives one actor's messages. Use from one thread."""

    def __init__(
        self,
        name: str,
        keys: WireKeys,
        *,
        host: str = "127.0.0.1",
        beside: Address | None = None,
    ) -> None:
        """`host` is the interface to listen on. On the machine of `beside`, an inbox that outlives
        this one, the unix socket lies in its folder and goes with that, even when this process is
        killed.

        Raises:
            WireError: `beside` is no more, so nothing would take this one's socket away.
        """
        self._owns_folder = beside is None or beside.machine != machine_id()
        if beside is not None and not self._owns_folder:
            self._file = _file_of(beside).with_name(secrets.token_hex(4))
            if not self._file.parent.exists():
                raise WireError(f"{name} starts too late: {beside.name} is gone")
        else:
            sweep()  # what killed processes of this machine have left
            # Created with mode 0700.
            self._file = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX)) / _SOCKET_NAME
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(
            domain="*", credentials_provider=_KeyHolders(keys.public)
        )
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.rcvhwm = _QUEUED_MESSAGES
        self._socket.maxmsgsize = MAX_PART_BYTES
        ipc = f"ipc://{self._file}"
        self._socket.bind(ipc)
        # A bind takes the options of its moment: what follows guards TCP and leaves the unix
        # socket, which the directory's mode guards, unencrypted.
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.public
        self._socket.curve_secretkey = keys.secret
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = Address(name=name, machine=machine_id(), ipc=ipc, tcp=f"tcp://{host}:{port}")

    def receive(self, timeout_s: float) -> list[memoryview] | None:
        """Return the next message's parts, or None when none came in time."""
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                # poll() promises nothing: the last part may be missing, or cut off with its
                # connection.
                left_s = end_s - time.monotonic()
                if left_s <= 0 or not self._socket.poll(math.ceil(left_s * 1000)):
                    return None
                continue
            if len(frames) <= MAX_PARTS:
                return [frame.buffer for frame in frames]
            _log.warning("%s dropped a message of %d parts", self.address.name, len(frames))

    def close(self) -> None:
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        self._file.unlink(missing_ok=True)
        if self._owns_folder:
            shutil.rmtree(self._file.parent, ignore_errors=True)


def remove_socket(address: Address) -> None:
    """Remove the unix socket of an inbox of this machine that could not do so itself."""
    if address.machine == machine_id():
        file = _file_of(address)
        file.unlink(missing_ok=True)
        if file.name == _SOCKET_NAME:
            shutil.rmtree(file.parent, ignore_errors=True)


def _file_of(address: Address) -> Path:
    return Path(address.ipc.removeprefix("ipc://"))


def sweep() -> int:
    """Remove this user's socket folders in which nobody listens: their processes were killed.
    Returns how many there were."""
    num_swept = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        inbox = folder / _SOCKET_NAME
        try:
            found = folder.stat()
            age_s = datetime.now(UTC).timestamp() - found.st_mtime
            if found.st_uid != os.getuid() or age_s < _SWEEP_AFTER_S or not inbox.is_socket():
                continue
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(inbox))
        except ConnectionRefusedError:
            shutil.rmtree(folder, ignore_errors=True)
            num_swept += 1
        except OSError:  # it went meanwhile, or is not ours to look into
            continue
    return num_swept


class Outbox:
    """Sends to one inbox. Use from one thread. Counts what it sent."""

    def __init__(self, address: Address, keys: WireKeys) -> None:
        self.address = address
        self.bytes_sent = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.PUSH)
        self._socket.linger = 0
        self._socket.sndhwm = _QUEUED_MESSAGES
        self._socket.sndtimeo = round(_SEND_TIMEOUT_S * 1000)
        if address.machine == machine_id():
            self._socket.connect(address.ipc)
        else:
            self._socket.curve_serverkey = keys.public
            self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.secret
            self._socket.connect(address.tcp)

    def send(self, parts: Parts) -> None:
        """Queue a message; buffers must not change until it has left.

        Raises:
            WireError: The receiver took nothing for 10 s while the queue was full.
        """
        try:
            self._socket.send_multipart(parts, copy=False)
        except zmq.Again as error:
            raise WireError(
                f"{self.address.name} took no message for {_SEND_TIMEOUT_S:g} s with "
                f"{_QUEUED_MESSAGES} queued; it is gone or stuck"
            ) from error
        self.bytes_sent += sum(len(part) for part in parts)

    def close(self) -> None:
        self._socket.close()
