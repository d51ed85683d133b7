"""The hosts themselves: shaped, cut, healed, and gone with the process that made them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import ROOT, HostError, network, remove_leftovers, wait_until

RATE_BYTES_PER_S = 2.5e6
SENT_BYTES = 1_250_000
GONE_TIMEOUT_S = 20.0

pytestmark = [pytest.mark.usefixtures("separate_hosts"), pytest.mark.timeout(120)]

RECEIVE = """
import socket
with socket.create_server(("0.0.0.0", 9)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        while connection.recv(1 << 20):
            pass
"""
SEND = f"""
import socket, sys, time
with socket.create_connection((sys.argv[1], 9)) as connection:
    begun_s = time.monotonic()
    connection.sendall(bytes({SENT_BYTES}))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(time.monotonic() - begun_s)
"""


def test_hosts_have_names_processes_and_places_of_their_own() -> None:
    with network(("h0", "h1")) as lan:
        (lan["h0"].folder / "note").write_text("mine", encoding="utf-8")

        assert lan["h0"].run("cat", "/tmp/note").stdout == "mine"
        assert lan["h1"].run("test", "-e", "/tmp/note", check=False).returncode == 1
        for name, host in lan.items():
            assert host.run("hostname").stdout.strip() == name
            other = "h1" if name == "h0" else "h0"
            assert lan[other].address in host.run("getent", "hosts", other).stdout
            assert len(host.run("ls", "/proc").stdout.split("\n")) > 0
        lan["h0"].start("sleep", "100")
        wait_until(lambda: len(lan["h0"].processes(b"sleep")) == 1, GONE_TIMEOUT_S)
        assert lan["h1"].processes(b"sleep") == []


def test_a_slow_link_is_slow_both_ways_and_others_are_not() -> None:
    with network(("h0", "h1", "h2"), links={"h2": RATE_BYTES_PER_S}) as lan:

        def seconds(source: str, target: str) -> float:
            receiver = lan[target].start("python", "-c", RECEIVE)
            wait_until(lambda: "listening" in receiver.output, GONE_TIMEOUT_S)
            sent = lan[source].run("python", "-c", SEND, lan[target].address)
            receiver.wait()
            return float(sent.stdout)

        for way in (("h0", "h2"), ("h2", "h0")):
            # The shaper lets a burst of 32 KB pass at once.
            assert seconds(*way) > 0.9 * SENT_BYTES / RATE_BYTES_PER_S
        assert seconds("h0", "h1") < SENT_BYTES / RATE_BYTES_PER_S


def test_a_cut_host_is_silent_until_it_is_healed() -> None:
    with network(("h0", "h1", "h2")) as lan:

        def reaches(target: str) -> bool:
            ping = ("ping", "-c1", "-W1", lan[target].address)
            return lan["h0"].run(*ping, check=False).returncode == 0

        lan["h1"].cut()
        assert not reaches("h1")
        assert reaches("h2")
        lan["h1"].heal()
        wait_until(lambda: reaches("h1"), GONE_TIMEOUT_S)


def test_a_command_that_fails_or_takes_too_long_is_an_error_with_its_output() -> None:
    with network(("h0",)) as lan:
        with pytest.raises(HostError, match=r"(?s)h0: sh -c .*: code 3\nwhy"):
            lan["h0"].run("sh", "-c", "echo why; exit 3")
        with pytest.raises(HostError, match=r"code 124, its time was up"):
            lan["h0"].run("sleep", "100", timeout_s=0.2)
        assert lan["h0"].processes() == []


def test_a_killed_run_leaves_no_process_and_its_folders_go_with_the_next() -> None:
    code = (
        "import hosts, time\n"
        "with hosts.network(('h0',)) as lan:\n"
        "    lan['h0'].start('sleep', '4321')\n"
        "    print(lan['h0'].pid, lan['h0'].folder, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        words = re.fullmatch(r"(\d+) (\S+)\n", run.stdout.readline())
        assert words is not None
        first, folder = Path("/proc", words[1]), Path(words[2])
        assert first.exists()
        assert folder.exists()
        run.send_signal(signal.SIGKILL)

    wait_until(lambda: not first.exists(), GONE_TIMEOUT_S)
    remove_leftovers()
    assert not folder.exists()
