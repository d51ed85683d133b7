"""Separate hosts on one machine: Linux namespaces joined by a switch, with links to slow and cut.

A host has a network, host name, processes, shared memory, /tmp and home of its own, and sees the
rest of the machine's files. Its first process reads from a pipe that this process holds: when the
pipe closes, also because the tests were killed, the kernel ends every process of the host and
takes its network away. Only folders can be left behind, and the next run removes them.

    with network(("h0", "h1"), links={"h1": 2.5e6}) as lan:
        lan["h0"].run("ping", "-c1", lan["h1"].address)
        lan["h1"].cut()      # nothing arrives, nobody is told
        lan["h1"].heal()
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S = 120.0
_SETUP_TIMEOUT_S = 20.0
_GONE_TIMEOUT_S = 30.0
_PREFIX = "motley-hosts-"
_SUBNET = "10.77.0"
_GATEWAY = f"{_SUBNET}.254"
_TOOLS = ("ip", "tc", "unshare", "nsenter", "timeout", "bash")
_CLONE_NEWNET = 0x40000000
_TIMED_OUT = 124
"""The code with which `timeout` leaves."""
_QUEUE = ("burst", "32kb", "latency", "400ms")

_BOOT = r"""
set -e
hostname "$1"; folder="$2"; shift 2
mount --make-rprivate /
mount --bind "$folder" "$folder"
for path; do  # what lies in /tmp and is needed: it is to be found where it was
    mkdir -p "$folder/${path#/tmp/}"
    mount --rbind "$path" "$folder/${path#/tmp/}"
done
mount --rbind "$folder" /tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind /tmp/passwd /etc/passwd
mount --bind /tmp/hosts /etc/hosts
mount --bind /tmp/resolv.conf /etc/resolv.conf
ip link set lo up
echo ready
while read -r _; do :; done
"""
"""The first process of a host: its mounts, then reaping orphans until its input closes."""


class HostError(RuntimeError):
    """A command of a host failed or took too long; its output is quoted."""


class HostProcess:
    """A command that goes on in a host; its output is in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise HostError(f"still runs after {timeout_s:g} s:\n{self.output}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself (its parent here only waits for it)."""
        parent = self._process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        for pid in children.split():
            os.kill(int(pid), number)

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait(_GONE_TIMEOUT_S)


class Namespace:
    """Namespaces that live until they are left, and what runs in them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        """The host's own /tmp, seen from here."""
        (folder / "home").mkdir(parents=True)
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        own = "motley:x:0:0:who logs in over ssh:/tmp/home:/bin/bash\n"
        (folder / "passwd").write_text(own + users, encoding="utf-8")
        (folder / "hosts").write_text("127.0.0.1 localhost\n", encoding="utf-8")
        (folder / "resolv.conf").touch()  # no server: unknown names are refused at once
        kept = [str(path) for path in _needed_in_tmp()]
        with (folder / "boot.log").open("wb") as errors:
            self._first = subprocess.Popen(
                [
                    "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                    "--kill-child", "--mount-proc", "bash", "-c", _BOOT, "host", name, str(folder),
                    *kept,
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
        assert self._first.stdout is not None
        if self._first.stdout.readline() != b"ready\n":
            self.power_off()
            raise HostError(f"{name}: {(folder / 'boot.log').read_text(encoding='utf-8')}")
        parent = self._first.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        self.pid = int(children.split()[0])

    def power_off(self) -> None:
        """End every process; the network goes with them. Safe to call twice."""
        for pipe in (self._first.stdin, self._first.stdout):
            if pipe is not None:
                pipe.close()
        self._first.wait(_GONE_TIMEOUT_S)

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *(f"--{name}" for name in namespaces), "--"]

    def network_command(self, *command: str) -> None:
        """Change the network from outside of the processes, files and names."""
        ran = _run([*self._enter("net"), *command], _SETUP_TIMEOUT_S)
        _checked(ran, f"{self.name}: {' '.join(command)}")


class Host(Namespace):
    """One machine of the network."""

    def __init__(self, name: str, number: int, folder: Path, switch: Namespace) -> None:
        super().__init__(name, folder)
        self.address = f"{_SUBNET}.{number}"
        self.environment = {
            "HOME": "/tmp/home",
            "USER": "motley",
            "LANG": "C.UTF-8",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._switch = switch
        self._port = f"to-{name}"
        self._started: list[HostProcess] = []
        switch.network_command(
            "ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns",
            str(self.pid),
        )  # fmt: skip
        self.heal()
        self.network_command("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.network_command("ip", "link", "set", "eth0", "up")
        # Ray takes the address of the interface that leads to the world for the node's own.
        self.network_command("ip", "route", "add", "default", "via", _GATEWAY)

    # -- its link ------------------------------------------------------------------------------

    def shape(self, bytes_per_s: float | None) -> None:
        """Give its link a rate, each way; None: as fast as the machine."""
        for place, device in ((self, "eth0"), (self._switch, self._port)):
            shape = [
                "root",
                "handle",
                "1:",
                "tbf",
                "rate",
                f"{round(bytes_per_s or 0)}bps",
                *_QUEUE,
            ]
            if bytes_per_s is None:
                shape = ["root", "pfifo_fast"]
            place.network_command("tc", "qdisc", "replace", "dev", device, *shape)

    def cut(self) -> None:
        """Partition it from all others: nothing arrives, and nobody is told."""
        self._switch.network_command("ip", "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        """Join it to the others (again)."""
        self._switch.network_command("ip", "link", "set", self._port, "master", "switch", "up")

    def sent_bytes(self) -> int:
        """Return what has left over its link since it was made."""
        shown = self.run("ip", "-json", "-stats", "link", "show", "dev", "eth0").stdout
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    # -- what runs in it -----------------------------------------------------------------------

    def run(
        self, *command: str | Path, timeout_s: float = RUN_TIMEOUT_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, from the root of the checkout.

        Raises:
            HostError: It failed (where that is checked) or ran past its time.
        """
        ran = _run(
            [*self._command(), "timeout", "--kill-after=5", f"{timeout_s:g}", *map(str, command)],
            timeout_s + 2 * _SETUP_TIMEOUT_S,
        )
        return _checked(ran, f"{self.name}: {' '.join(map(str, command))}") if check else ran

    def motley(
        self, *arguments: str | Path, timeout_s: float = RUN_TIMEOUT_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        command = (sys.executable, "-m", "cluster", *arguments)
        return self.run(*command, timeout_s=timeout_s, check=check)

    def start(self, *command: str | Path) -> HostProcess:
        """Start a command that goes on; it ends with the host at the latest."""
        log = self.folder / f"{Path(command[0]).name}-{len(self._started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*self._command(), *map(str, command)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._started.append(HostProcess(process, log))
        return self._started[-1]

    def power_off(self) -> None:
        super().power_off()
        for started in self._started:
            started.wait(_GONE_TIMEOUT_S)

    def processes(self, *titles: bytes) -> list[int]:
        """Return its processes, seen from here, whose command line begins with a title."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns" / "pid") == own and int(entry.name) != self.pid:
                    line = (entry / "cmdline").read_bytes()
                    if not titles or line.startswith(titles):
                        found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return found

    def command_lines(self, *titles: bytes) -> list[str]:
        """Return how those processes were started, for messages."""
        return [_command_line(pid) for pid in self.processes(*titles)]

    def signal(self, number: signal.Signals, *titles: bytes) -> int:
        """Signal its processes (SIGSTOP: the host hangs); returns how many there were."""
        found = self.processes(*titles)
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return len(found)

    def connect(self, address: tuple[str, int], timeout_s: float = 10.0) -> socket.socket:
        """Open a connection from within its network. Call it on a thread that then ends: the
        thread stays in there."""
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(descriptor, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network of {self.name}")
        finally:
            os.close(descriptor)
        return socket.create_connection(address, timeout_s)

    def _command(self) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        enter = self._enter("net", "uts", "ipc", "mount", "pid")
        return [*enter, "env", "-i", "-C", str(ROOT), *variables]


Network = Mapping[str, Host]


@contextmanager
def network(names: Sequence[str], *, links: Mapping[str, float] | None = None) -> Iterator[Network]:
    """Make hosts on one switch; `links` gives bytes per second, each way, of the slow ones."""
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        switch = Namespace("switch", folder / "switch")
        stack.callback(switch.power_off)
        for command in ("add switch type bridge forward_delay 0", "set switch up"):
            switch.network_command("ip", "link", *command.split())
        hosts: dict[str, Host] = {}
        for number, name in enumerate(names, start=1):
            host = hosts[name] = Host(name, number, folder / name, switch)
            stack.callback(host.power_off)
            if links and name in links:
                host.shape(links[name])
        known = "".join(f"{host.address} {name}\n" for name, host in hosts.items())
        for host in hosts.values():
            with (host.folder / "hosts").open("a", encoding="utf-8") as file:
                file.write(known)
        yield hosts


def why_not() -> str | None:
    """Say why this machine cannot be several hosts; None: it can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return (
            f"{', '.join(missing)} not found; on Debian or Ubuntu: apt install iproute2 util-linux"
        )
    try:
        with network(("h0",), links={"h0": 1e6}):
            return None
    except HostError as error:
        return f"this machine forbids namespaces, bridges or tbf: {error}"


def remove_leftovers() -> None:
    """Remove the folders of runs that were killed; nothing else outlives its run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def wait_until(
    holds: Callable[[], bool],
    timeout_s: float,
    what: Callable[[], object] = lambda: "",
    *,
    every_s: float = 0.1,
) -> None:
    """Look until it holds; fails at the deadline, saying what there was."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what()}"
        time.sleep(every_s)


def _command_line(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""  # it ended meanwhile
    return line.replace(b"\0", b" ").decode(errors="replace").strip()


def _needed_in_tmp() -> list[Path]:
    """The checkout and the environment, where they lie in /tmp, which a host has for itself."""
    wanted = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(path for path in wanted if path.is_relative_to("/tmp"))


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HostError(f"{' '.join(command)}: no end within {timeout_s:g} s") from None


def _checked(ran: subprocess.CompletedProcess[str], what: str) -> subprocess.CompletedProcess[str]:
    if ran.returncode != 0:
        late = ", its time was up" if ran.returncode == _TIMED_OUT else ""
        raise HostError(f"{what}: code {ran.returncode}{late}\n{ran.stdout}{ran.stderr}")
    return ran
