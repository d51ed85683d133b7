"""Experts over real sockets: identity, maps that change, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from expert_cases import (
    COUNTS,
    LAYER,
    LONG_S,
    NUM_NEW,
    SHORT,
    OpenFleet,
    prompts,
    rows,
    tokens_of,
    wanted_rows,
)
from expert_fleet import DEVICES, NODES, ExpertFleet, expert_spec
from expert_routes import GuestRoutes, open_hosts, spread
from identity import check_identical, generate
from mutations import damaged_bytes, damaged_value, each_damaged
from tiny_models import MOE, num_experts

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.expert_calls import ExpertCall, ExpertError, ExpertRows, Portion
from actors.expert import ExpertWorker
from actors.expert_links import ExpertLinks, Patience
from actors.expert_messages import call_message, take_answer

pytestmark = pytest.mark.engine


# --- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("model_type", MOE)
def test_tokens_are_transformers_own_through_two_nodes_of_two_workers(
    model_type: str,
    replicas: int,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
    open_fleet: OpenFleet,
) -> None:
    path = checkpoint_dir(model_type)
    links = open_fleet(model_type, replicas).links()

    got = tokens_of(Checkpoint.open(str(path)), links)

    check_identical([generate(reference(path), prompt, NUM_NEW) for prompt in prompts()], got)


def test_one_message_goes_to_each_node_and_layer(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = fleet.links()

    got = links.run(LAYER, COUNTS, rows())

    assert torch.equal(got, wanted_rows(fleet))
    assert links.messages_sent == len(NODES)
    links.run(LAYER, [0, 4] + [0] * 6, rows()[:4])
    assert links.messages_sent == len(NODES) + 1
    # The rows, and little more.
    assert links.bytes_sent < (sum(COUNTS) + 4) * 48 * 4 + 3 * 400


def test_many_rows_go_straight_to_their_devices(
    open_fleet: OpenFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet()
    links = fleet.links()
    monkeypatch.setattr("actors.expert_links.DIRECT_BYTES", 5 * 48 * 4)

    got = links.run(LAYER, COUNTS, rows())

    assert torch.equal(got, wanted_rows(fleet))
    # Two experts each: 3 + 4, 2, 5 + 6 and 1 + 1 rows, of which 5 at most go together.
    assert links.messages_sent == 2 + 1 + 2 + 1


def with_guests(fleet: ExpertFleet) -> GuestRoutes:
    """Experts 0 and 2 as guests, one on each node."""
    routes = fleet.routes
    guests = {
        expert: next(device for device in devices if device not in routes.holders[expert])
        for expert, devices in zip((0, 2), NODES.values(), strict=True)
    }
    return GuestRoutes(routes.version, routes.holders, routes.nodes, guests)


@pytest.mark.parametrize("direct_bytes", [2**20, 5 * 48 * 4])
def test_guests_are_taken_in_for_the_rows_that_bring_them(
    direct_bytes: int, open_fleet: OpenFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet(spare=2, num_guests=2)
    links = fleet.links()
    wanted = wanted_rows(fleet)
    monkeypatch.setattr("actors.expert_links.DIRECT_BYTES", direct_bytes)

    links.use(with_guests(fleet))

    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)
    assert sum(worker._host.num_taken_in for worker in fleet.workers.values()) == 2
    assert links.num_repeated == 0


def test_where_guests_are_refused_rows_go_where_their_experts_are(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(spare=2)
    links = fleet.links()
    wanted = wanted_rows(fleet)

    links.use(with_guests(fleet))

    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)
    assert links.num_repeated == 1


def test_experts_of_this_process_need_no_message(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(spare=12)
    held = fleet.prepare(spread(["me", *DEVICES], 8, version=1))
    links = fleet.links(own=open_hosts(Checkpoint.open(str(fleet.path)), ["me"], held))
    links.use(held)

    got = links.run(LAYER, COUNTS, rows())
    only_own = links.run(LAYER, [3] + [0] * 7, rows()[:3])

    assert links.messages_sent == len(NODES)
    assert torch.equal(only_own, got[:3])
    assert torch.equal(got, wanted_rows(fleet))


def test_two_stages_are_answered_apart(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = [fleet.links(), fleet.links()]
    outs: dict[int, torch.Tensor] = {}

    def ask(i: int) -> None:
        for _ in range(20):
            outs[i] = links[i].run(LAYER, COUNTS, rows(i))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for i in range(2):
        assert torch.equal(outs[i], links[0].run(LAYER, COUNTS, rows(i)))


# --- the map changes --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_tokens_stay_while_the_map_changes_all_the_time(
    model_type: str,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
    open_fleet: OpenFleet,
) -> None:
    path = checkpoint_dir(model_type)
    fleet = open_fleet(model_type, spare=200)
    links = fleet.links()
    done = threading.Event()
    used: list[int] = []

    def rebalance() -> None:
        for version in count(1):
            if done.is_set():
                return
            new = spread(DEVICES, num_experts(model_type), version=version, shift=version)
            links.use(fleet.prepare(new))
            used.append(version)
            # At once: a call that is on its way with an older one is refused, and sent again.
            fleet.swap(version)

    mover = threading.Thread(target=rebalance)
    mover.start()
    try:
        got = tokens_of(Checkpoint.open(str(path)), links)
    finally:
        done.set()
        mover.join()

    check_identical([generate(reference(path), prompt, NUM_NEW) for prompt in prompts()], got)
    assert len(used) > 3


def test_a_call_on_its_way_ends_with_the_map_it_began_with(
    open_fleet: OpenFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet(spare=48)
    links = fleet.links()
    new = fleet.prepare(spread(DEVICES, 8, version=1, shift=1))
    receive = links._receive

    def change_meanwhile(*args: Any) -> None:
        links.use(new)
        receive(*args)

    monkeypatch.setattr(links, "_receive", change_meanwhile)
    old = links.run(LAYER, COUNTS, rows())

    assert torch.equal(old, wanted_rows(fleet))
    assert links.num_repeated == 0
    monkeypatch.undo()
    fleet.swap(1)
    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted_rows(fleet, new))


def test_a_step_keeps_to_its_map_unless_it_fails(open_fleet: OpenFleet) -> None:
    fleet = open_fleet(spare=48)
    links = fleet.links()
    new = fleet.prepare(spread(DEVICES, 8, version=1, shift=1))

    with links.step():
        links.use(new)
        assert not links.settle(0.0)
        assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted_rows(fleet))
        assert links.num_repeated == 0
        # Retired though still in use: as when a step outlasts the wait for it.
        fleet.swap(1)
        assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted_rows(fleet, new))
        assert links.num_repeated == 1
        assert links.settle(0.0)

    old, newest = fleet.routes, fleet.prepare(spread(DEVICES, 8, version=2, shift=2))
    fleet.prepare(old)
    links.use(old)
    with links.step():
        links.use(newest)
    fleet.swap(2)
    assert links.settle(0.0)
    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted_rows(fleet, newest))
    with links.step():
        links.use(new, at_once=True)
        assert links.settle(0.0)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 9},
            r"the experts on [nf]0: expert map version 9 is not here, there are \[0\]",
        ),
        (
            {"holders": [["n0"]] * 8},
            r"the experts on n0: experts \[2, 3, 5, 6, 7\] of layer 2 are not here in map version",
        ),
        (
            {"holders": [["n1"]] * 8},
            r"the experts on n1: experts \[0, 2, 3, 4, 6, 7\] of layer 2 are not here",
        ),
        ({"holders": [["x9"]] * 8}, r"map version 0 names \['x9'\], which are on none of its"),
        ({"holders": [[]] * 8}, "expert 0 has 3 rows and devices were given 0"),
    ],
)
def test_maps_that_the_workers_do_not_have_are_refused_and_serving_goes_on(
    change: dict[str, Any], message: str, open_fleet: OpenFleet
) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=replace(SHORT, answer_s=LONG_S))
    wanted = links.run(LAYER, COUNTS, rows())

    links.use(replace(fleet.routes, **change))
    with pytest.raises(ExpertError, match=message):
        links.run(LAYER, COUNTS, rows())

    links.use(fleet.routes)
    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)


def test_another_checkpoints_rows_and_rows_of_another_width_are_refused(
    open_fleet: OpenFleet,
) -> None:
    fleet = open_fleet()
    # No other map would help, so none is waited for.
    patience = Patience(answer_s=LONG_S, reroute_s=3600.0)
    links = fleet.links(patience=patience)
    stranger = fleet.links(patience=patience, fingerprint="0" * 16)

    with pytest.raises(ExpertError, match=rf"of checkpoint 0{{16}}, these of {fleet.fingerprint}"):
        stranger.run(LAYER, COUNTS, rows())
    with pytest.raises(ExpertError, match=r"rows of shape \(.*, 40\) .* its experts take .*48\)"):
        links.run(LAYER, COUNTS, rows()[:, :40])
    impatient = fleet.links(patience=replace(SHORT, answer_s=LONG_S))
    with pytest.raises(ExpertError, match="of layer 78 are not here"):
        impatient.run(78, COUNTS, rows())


def test_a_worker_with_another_checkpoint_does_not_start(
    checkpoint_dir: Callable[..., Path], open_fleet: OpenFleet
) -> None:
    fleet = open_fleet()
    spec = expert_spec(checkpoint_dir("mixtral"), "m0", {0: [1]}, fingerprint=fleet.fingerprint)

    with pytest.raises(ExpertError, match=r"on m0 has the experts .*, the stages serve"):
        ExpertWorker(spec, fleet.keys, fleet.monitor.address)


def test_links_without_a_map_say_so(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    with (
        closing(ExpertLinks("a stage", fleet.keys, fleet.fingerprint, patience=SHORT)) as links,
        pytest.raises(ExpertError, match="no expert map is in force after"),
    ):
        links.run(LAYER, COUNTS, rows())


def test_the_first_map_is_waited_for(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    wanted = fleet.links().run(LAYER, COUNTS, rows())
    patience = Patience(answer_s=LONG_S, reroute_s=LONG_S)
    with closing(ExpertLinks("a stage", fleet.keys, fleet.fingerprint, patience=patience)) as links:
        fleet.callers.append(links.address)
        fleet.connect()
        timer = threading.Timer(0.1, lambda: links.use(fleet.routes))
        timer.start()
        with links.step():
            assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)


# --- damaged messages -------------------------------------------------------------------------


def test_damaged_messages_harm_neither_workers_nor_stages(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = fleet.links()
    wanted = links.run(LAYER, COUNTS, rows())
    call = ExpertCall(
        10**6, LAYER, 0, fleet.fingerprint, links.address.ipc, 5.0,
        (Portion("n0", (ExpertRows(0, 2), ExpertRows(4, 1))), Portion("n1", (ExpertRows(1, 3),))),
    )  # fmt: skip
    whole = [bytes(part) for part in call_message(wire.EXPERTS, call, [rows()[:6]])]
    header = msgpack.unpackb(whole[1])
    messages = [
        [wire.EXPERTS, msgpack.packb(each), *whole[2:]]
        for each in each_damaged(11, [header], 150, damaged_value)
    ]
    for at in range(4):
        damaged = each_damaged(12 + at, [whole[at]], 50, damaged_bytes)
        messages += [[*whole[:at], each, *whole[at + 1 :]] for each in damaged]
    messages += [[b""], [wire.EXPERTS], [wire.EXPERT_GRADIENTS, whole[1]], whole[:3], whole * 2]
    answers = [[wire.ROWS, each, *whole[2:]] for each in (b"", b"\xc1", msgpack.packb(-1))]

    with (
        closing(wire.Outbox(fleet.workers["n0"].ready(), fleet.keys)) as to_worker,
        closing(wire.Outbox(links.address, fleet.keys)) as to_stage,
    ):
        for message in messages:
            to_worker.send(message)
            to_stage.send(message)
        for message in answers:
            to_worker.send(message)
            to_stage.send(message)
        assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)


def take(inbox: wire.Inbox) -> Sequence[memoryview]:
    parts = inbox.receive(LONG_S)
    assert parts is not None
    return parts


def test_a_call_from_a_sibling_goes_no_further(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    n0, n1 = fleet.workers["n0"], fleet.workers["n1"]
    fleet.links()
    with closing(wire.Inbox("x", fleet.keys)) as inbox:
        n0.connect([], {"n1": n1.ready(), "me": inbox.address})
        call = ExpertCall(
            5, LAYER, 0, fleet.fingerprint, inbox.address.ipc, 5.0,
            (Portion("n1", (ExpertRows(1, 2),)),),
        )  # fmt: skip
        with closing(wire.Outbox(n0.ready(), fleet.keys)) as outbox:
            outbox.send(call_message(wire.EXPERTS, call, [rows()[:2]]))
            answer = take_answer(take(inbox))

    assert answer.number == 5
    assert answer.rows_SH is None
    assert "device n1 is not reached from here" in answer.refusal
