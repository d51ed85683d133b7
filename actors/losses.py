"""Who is lost: the members of a fleet are watched, and asked now and then if they are there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from actors import wire

_PING_EVERY_S = 1.0
_NAMES = {"stage": "stage", "experts": "expert worker", "trainer": "trainer"}


@dataclass(slots=True, eq=False)
class Member:
    """A running stage or lane, the worker with a device's experts, or a device that trains."""

    kind: Literal["stage", "lane", "experts", "trainer"]
    key: str | int
    """A lane's index, the device of others."""
    actor: Any
    life: int = 0
    address: wire.Address | None = None
    asked: tuple[Any, float] | None = None
    """A ping that has not been answered: its reference, and when it was sent."""

    @property
    def name(self) -> str:
        if self.kind == "lane":
            return f"lane {self.key}"
        return f"the {_NAMES[self.kind]} on {self.key}"


@dataclass(frozen=True, slots=True)
class Loss:
    """A member that is no more, or hangs."""

    member: Member
    reason: str


class Watches:
    """Notices members that die, and those that leave a ping unanswered for `silence_s`."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._watched: dict[Any, Member] = {}
        self._noted: deque[Loss] = deque()
        """Noticed while something else was waited for, and not told yet."""
        self._pinged_s = 0.0
        self._is_stopped = False

    def add(self, member: Member) -> None:
        self._watched[member.actor.watch.remote()] = member

    def drop(self, member: Member) -> None:
        """Say nothing more about a member."""
        self._noted = deque(loss for loss in self._noted if loss.member is not member)
        self._watched = {ref: other for ref, other in self._watched.items() if other is not member}

    def stop(self) -> None:
        """Say nothing more at all; from any thread."""
        self._is_stopped = True
        self._watched.clear()

    def next_loss(self, timeout_s: float) -> Loss | None:
        """Wait up to `timeout_s` for a loss, each of which is told once."""
        if self._noted:
            return self._noted.popleft()
        if not self._watched or self._is_stopped:
            time.sleep(timeout_s)
            return None
        return self._find(timeout_s)

    def _find(self, timeout_s: float) -> Loss | None:
        """Notice a loss, once."""
        if not self._watched:
            return None
        done, _ = ray.wait(list(self._watched), timeout=timeout_s)
        for reference in done:
            member = self._watched.pop(reference, None)
            if member is None:  # stopped meanwhile
                return None
            try:
                ray.get(reference)
            except RayTaskError as error:
                return Loss(member, f"{member.name} is lost: {cause_of(error)}")
            except RayError as error:
                return Loss(member, f"{member.name} is lost: {first_line(error)}")
        return self._silent()

    def look(self, members: Collection[Member]) -> Loss | None:
        """Return a loss of one of these, or of any stage, that `next_loss` has not told yet.

        A lane that is lost holds up nobody but who waits for it.
        """
        while (loss := self._find(0.0)) is not None:
            self._noted.append(loss)
        for loss in list(self._noted):
            if loss.member.kind == "stage" or loss.member in members:
                return loss
        return None

    def has_noted(self, member: Member) -> bool:
        """Whether `next_loss` is about to tell of this member."""
        return any(loss.member is member for loss in list(self._noted))

    def is_quiet(self, member: Member) -> bool:
        """Whether its answer to a ping of more than a moment ago is missing."""
        if member.asked is None or time.monotonic() - member.asked[1] < _PING_EVERY_S:
            return False
        answered, _ = ray.wait([member.asked[0]], timeout=0)
        return not answered

    def _silent(self) -> Loss | None:
        now_s = time.monotonic()
        if now_s - self._pinged_s < _PING_EVERY_S:
            return None
        self._pinged_s = now_s
        for watch, member in list(self._watched.items()):
            if member.asked is not None:
                reference, sent_s = member.asked
                answered, _ = ray.wait([reference], timeout=0)
                if not answered and now_s - sent_s > self._silence_s:
                    self._watched.pop(watch, None)
                    reason = f"{member.name} is lost: it hung for {self._silence_s:g} s"
                    return Loss(member, reason)
                if not answered:
                    continue
            member.asked = member.actor.ping.remote(), now_s
        return None


def cause_of(error: BaseException) -> str:
    """Return what went wrong in an actor, in its own words."""
    cause = getattr(error, "cause", None)
    return str(cause) if cause is not None else _last_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _last_line(error: BaseException) -> str:
    """The original error's own sentence, without its class (Ray quotes the whole traceback)."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    name, _, sentence = lines[-1].partition(": ")
    return sentence if sentence and name.replace(".", "").isidentifier() else lines[-1]
