"""A worker's server without sockets and without time: what it sends, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.expert_calls import ExpertCall, ExpertRows, Portion
from actors.engine.expert_host import ExpertHost
from actors.engine.expert_slots import ExpertSlots
from actors.engine.pace import DeviceClock
from actors.expert_messages import (
    Answer,
    answer_message,
    call_message,
    refusal_message,
    take_answer,
)
from actors.expert_server import ExpertServer

pytestmark = pytest.mark.engine

LAYER = 2


@dataclass
class Box:
    """An outbox that keeps what it was given."""

    name: str
    sent: list[list[memoryview]] = field(default_factory=list)

    @property
    def address(self) -> wire.Address:
        return wire.Address(name=self.name, machine="m", ipc=self.name, tcp=self.name)

    def send(self, parts: Sequence[Any]) -> None:
        self.sent.append([memoryview(part) for part in parts])

    def answers(self) -> list[Answer]:
        return [take_answer(parts) for parts in self.sent]


class Node:
    """Device `a` with siblings `b` and `c`, and two stages; a row takes a second."""

    def __init__(self, path: Path, *, is_paced: bool = True) -> None:
        self.now_s = 100.0
        self.host = ExpertHost(ExpertSlots(Checkpoint.open(str(path)), 8))
        self.host.prepare(1, {LAYER: range(8)})
        self.stages = [Box("stage 0"), Box("stage 1")]
        self.sibling, self.other = Box("b"), Box("c")
        clock = DeviceClock(lambda: self.now_s, self._never, is_paced)
        self.server = ExpertServer(
            "a", self.host, clock, lambda _, experts: sum(rows for _, rows in experts), "a"
        )
        self.connect(self.stages)

    def connect(self, stages: Sequence[Box]) -> None:
        siblings: dict[str, Any] = {"b": self.sibling, "c": self.other}
        self.server.connect(stages, siblings)  # type: ignore[arg-type]

    def _never(self, seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    def call(self, stage: int, number: int, **rows: int) -> torch.Tensor:
        """A stage asks devices for so many rows of expert 3; returns them."""
        call = ExpertCall(
            number, LAYER, 1, self.host.fingerprint, self.stages[stage].name, 10.0,
            tuple(Portion(device, (ExpertRows(3, count),)) for device, count in rows.items()),
        )  # fmt: skip
        tensor = torch.randn(call.num_rows, 48)
        self.hear(call_message(wire.EXPERTS, call, [tensor]))
        return tensor

    def hear(self, parts: Sequence[Any]) -> None:
        self.server.handle([memoryview(part) for part in parts])

    def passed_on(self) -> list[ExpertCall]:
        return [ExpertCall.decode(parts[1]) for parts in self.sibling.sent]

    def run(self, rows: torch.Tensor) -> torch.Tensor:
        return self.host.run(1, LAYER, [(3, len(rows))], rows)


@pytest.fixture
def open_node(checkpoint_dir: Callable[..., Path]) -> Callable[..., Node]:
    return lambda **how: Node(checkpoint_dir("olmoe"), **how)


def test_a_paced_device_answers_when_its_time_has_passed(open_node: Callable[..., Node]) -> None:
    node = open_node()
    rows = node.call(0, 1, a=4)

    assert node.stages[0].sent == []
    assert node.server.wait_s(60.0) == 4.0
    node.now_s += 3.9
    node.server.tick()
    assert node.stages[0].sent == []
    node.now_s += 0.1
    node.server.tick()

    [answer] = node.stages[0].answers()
    assert answer.number == 1
    assert answer.rows_SH is not None
    assert torch.equal(answer.rows_SH, node.run(rows))
    assert node.server.wait_s(60.0) == 60.0


def test_rows_are_passed_on_while_a_paced_device_is_busy(open_node: Callable[..., Node]) -> None:
    node = open_node()
    node.call(0, 1, a=4)

    node.call(1, 1, a=2, b=3)

    [passed] = node.passed_on()
    assert passed.portions == (Portion("b", (ExpertRows(3, 3),)),)
    assert passed.reply_to == "a"
    # The second call's own rows wait for the device: 4 s, then 2.
    node.hear(answer_message(passed.number, torch.zeros(3, 48)))
    node.now_s += 4.0
    node.server.tick()
    assert [len(stage.sent) for stage in node.stages] == [1, 0]
    node.now_s += 2.0
    node.server.tick()
    [answer] = node.stages[1].answers()
    assert answer.rows_SH is not None
    assert torch.equal(answer.rows_SH[2:], torch.zeros(3, 48))


def test_a_real_device_answers_at_once(open_node: Callable[..., Node]) -> None:
    node = open_node(is_paced=False)

    node.call(0, 5, a=2)

    assert [answer.number for answer in node.stages[0].answers()] == [5]


def test_a_call_is_answered_once_whatever_the_order(open_node: Callable[..., Node]) -> None:
    node = open_node(is_paced=False)
    for stage in (0, 1):
        node.call(stage, 7, a=1, b=2)
    first, second = node.passed_on()

    node.hear(answer_message(second.number, torch.ones(2, 48)))
    assert [len(stage.sent) for stage in node.stages] == [0, 1]
    node.hear(answer_message(first.number, torch.ones(2, 48)))
    node.hear(answer_message(first.number, torch.ones(2, 48)))

    assert [len(stage.sent) for stage in node.stages] == [1, 1]


def test_what_a_sibling_refuses_or_answers_wrongly_is_refused(
    open_node: Callable[..., Node],
) -> None:
    node = open_node(is_paced=False)
    for number in (1, 2, 3):
        node.call(0, number, a=1, b=2)
    numbers = [call.number for call in node.passed_on()]

    node.hear(refusal_message(numbers[0], "version 1 is not here", is_of_map=True))
    node.hear(answer_message(numbers[1], torch.ones(3, 48)))
    node.hear(answer_message(numbers[2], torch.ones(2, 48).bfloat16()))

    other = "b answered with rows of another shape or type"
    assert [(answer.number, answer.refusal) for answer in node.stages[0].answers()] == [
        (1, "version 1 is not here"), (2, other), (3, other),
    ]  # fmt: skip


def test_a_silent_sibling_is_named_after_the_callers_time(open_node: Callable[..., Node]) -> None:
    node = open_node(is_paced=False)
    node.call(0, 7, a=1, b=2, c=1)
    node.now_s += 9.9
    node.server.tick()
    assert node.stages[0].sent == []

    node.now_s += 0.1
    node.server.tick()

    [answer] = node.stages[0].answers()
    assert (answer.number, answer.rows_SH) == (7, None)
    assert answer.refusal == "b, c did not answer a of its node in time"
    node.hear(answer_message(node.passed_on()[0].number, torch.ones(2, 48)))
    assert len(node.stages[0].sent) == 1


def test_a_siblings_answer_that_is_due_is_not_lost_when_a_stage_is_replaced(
    open_node: Callable[..., Node],
) -> None:
    node = open_node()
    call = ExpertCall(
        3, LAYER, 1, node.host.fingerprint, "b", 10.0, (Portion("a", (ExpertRows(1, 2),)),)
    )
    node.hear(call_message(wire.EXPERTS, call, [torch.ones(2, 48)]))
    node.connect(node.stages[1:])

    node.now_s += 2.0
    node.server.tick()

    assert [answer.number for answer in node.sibling.answers()] == [3]


@pytest.mark.parametrize(
    ("change", "is_of_map"),
    [({"version": 9}, True), ({"fingerprint": "0" * 16}, False), ({"layer": 77}, True)],
)
def test_a_refusal_says_whether_another_map_may_help(
    change: dict[str, Any], is_of_map: bool, open_node: Callable[..., Node]
) -> None:
    node = open_node(is_paced=False)
    values: dict[str, Any] = {"version": 1, "fingerprint": node.host.fingerprint, "layer": LAYER}
    values |= change
    call = ExpertCall(
        3, values["layer"], values["version"], values["fingerprint"], "stage 0", 10.0,
        (Portion("a", (ExpertRows(1, 2),)),),
    )  # fmt: skip

    node.hear(call_message(wire.EXPERTS, call, [torch.ones(2, 48)]))

    [answer] = node.stages[0].answers()
    assert answer.refusal
    assert answer.is_of_map == is_of_map


def test_a_stage_that_was_replaced_is_not_answered(open_node: Callable[..., Node]) -> None:
    node = open_node()
    node.call(0, 7, a=1, b=2)
    node.call(0, 8, a=1)
    node.connect(node.stages[1:])

    node.hear(answer_message(node.passed_on()[0].number, torch.ones(2, 48)))
    node.now_s += 60.0
    node.server.tick()
    node.call(0, 9, a=1)

    assert node.stages[0].sent == []
