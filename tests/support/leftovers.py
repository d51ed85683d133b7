"""What a deployment may leave behind on this machine: actor processes and socket folders."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 60.0


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fail when the block leaves an actor of this process, or a socket folder without a listener.

    Actors that ran before it do not count; other deployments of the machine may come and go.
    """
    actors, folders = actor_processes(), socket_folders()
    yield
    deadline_s = time.monotonic() + DEADLINE_S
    while left := [
        *(f"process {pid}" for pid in actor_processes() - actors),
        *(f"folder {path}" for path in socket_folders() - folders if not _is_listened_to(path)),
    ]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


def actor_processes(*titles: bytes, root: int | None = None) -> set[int]:
    """The actors (stages and lanes, when no titles are given) that descend from a process.

    `root` is that process; None: this one.
    """
    wanted = titles or (b"ray::StageWorker", b"ray::DecodeWorker")
    ancestor = os.getpid() if root is None else root
    parents: dict[int, int] = {}
    actors = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        if title.startswith(wanted):
            actors.add(pid)
    return {pid for pid in actors if ancestor in _ancestors(pid, parents)}


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while (pid := parents.get(pid, 0)) > 0:
        yield pid


def socket_folders() -> set[Path]:
    return {path.parent for path in Path(tempfile.gettempdir()).glob("motley-*/inbox")}


def _is_listened_to(folder: Path) -> bool:
    return f"{folder}/inbox" in Path("/proc/net/unix").read_text(encoding="utf-8")
