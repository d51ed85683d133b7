"""Experts over real sockets: identity, changing maps, lost workers, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from expert_fleet import DEVICES, NODES, ExpertFleet, expert_spec
from expert_processes import ExpertProcess
from expert_routes import EvenRoutes, open_hosts, spread
from identity import check_identical, generate
from mutations import damaged_bytes, damaged_value, each_damaged
from tiny_models import ARCHITECTURES, MOE
from transformers import AutoModelForCausalLM

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.expert_calls import ExpertCall, ExpertError, ExpertRows, Portion
from actors.engine.experts import EXPERTS_NAME, lend_experts
from actors.engine.fingerprint import expert_fingerprint
from actors.engine.local import LocalPipeline
from actors.engine.local_experts import LocalDispatcher
from actors.engine.requests import Request, SamplingParams
from actors.expert import ExpertWorker
from actors.expert_links import ExpertCallError, ExpertLinks, ExpertNode, Patience
from actors.expert_messages import call_message, take_answer

pytestmark = pytest.mark.engine

LONG_S = 20.0
"""Far longer than any answer takes; waited out only by a failing test."""
SHORT = Patience(answer_s=0.5, reroute_s=0.0)
NUM_NEW = 10
LENGTHS = (1, 3, 8, 17, 31)
TIGHT = EngineConfig(kv_block_tokens=4, num_kv_blocks=40, max_running=16, max_step_tokens=20)
COUNTS = [3, 0, 5, 1, 4, 2, 6, 1]
LAYER = 2


def num_experts(model_type: str) -> int:
    sizes = ARCHITECTURES[model_type]
    return int(sizes.get("num_experts") or sizes["num_local_experts"])


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(torch.randint(3, 199, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


def tokens_of(checkpoint: Checkpoint, links: ExpertLinks) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    asked = [Request(id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(prompts())]
    done = LocalPipeline(checkpoint, (3,), config=TIGHT, experts=links).generate(asked)
    return [done[str(i), 0].tokens for i in range(len(LENGTHS))]


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(COUNTS), 48, generator=torch.Generator().manual_seed(seed))


Open = Callable[..., ExpertFleet]


@pytest.fixture
def open_fleet(checkpoint_dir: Callable[..., Path]) -> Iterator[Open]:
    made: list[ExpertFleet] = []

    def make(model_type: str = "olmoe", replicas: int = 1, **options: Any) -> ExpertFleet:
        routes = spread(DEVICES, num_experts(model_type), replicas=replicas)
        made.append(ExpertFleet(checkpoint_dir(model_type), routes, **options))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def wanted_rows(fleet: ExpertFleet, routes: EvenRoutes | None = None) -> torch.Tensor:
    """What the same split gives within one process."""
    routes = routes or fleet.routes
    hosts = open_hosts(Checkpoint.open(str(fleet.path)), DEVICES, routes)
    return LocalDispatcher(hosts, routes).run(LAYER, COUNTS, rows())


# --- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("model_type", MOE)
def test_tokens_are_transformers_own_through_two_nodes_of_two_workers(
    model_type: str,
    replicas: int,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
    open_fleet: Open,
) -> None:
    path = checkpoint_dir(model_type)
    links = open_fleet(model_type, replicas).links()

    got = tokens_of(Checkpoint.open(str(path)), links)

    check_identical([generate(reference(path), prompt, NUM_NEW) for prompt in prompts()], got)


def test_one_message_goes_to_each_node_and_layer(open_fleet: Open) -> None:
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
    open_fleet: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_fleet()
    links = fleet.links()
    monkeypatch.setattr("actors.expert_links.DIRECT_BYTES", 5 * 48 * 4)

    got = links.run(LAYER, COUNTS, rows())

    assert torch.equal(got, wanted_rows(fleet))
    # Two experts each: 3 + 4, 2, 5 + 6 and 1 + 1 rows, of which 5 at most go together.
    assert links.messages_sent == 2 + 1 + 2 + 1


def test_experts_of_this_process_need_no_message(open_fleet: Open) -> None:
    fleet = open_fleet(spare=12)
    held = fleet.prepare(spread(["me", *DEVICES], 8, version=1))
    links = fleet.links(own=open_hosts(Checkpoint.open(str(fleet.path)), ["me"], held))
    links.use(held)

    got = links.run(LAYER, COUNTS, rows())
    only_own = links.run(LAYER, [3] + [0] * 7, rows()[:3])

    assert links.messages_sent == len(NODES)
    assert torch.equal(only_own, got[:3])
    assert torch.equal(got, wanted_rows(fleet))


def test_two_stages_are_answered_apart(open_fleet: Open) -> None:
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
    open_fleet: Open,
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
    open_fleet: Open, monkeypatch: pytest.MonkeyPatch
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
    change: dict[str, Any], message: str, open_fleet: Open
) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=replace(SHORT, answer_s=LONG_S))
    wanted = links.run(LAYER, COUNTS, rows())

    links.use(replace(fleet.routes, **change))
    with pytest.raises(ExpertError, match=message):
        links.run(LAYER, COUNTS, rows())

    links.use(fleet.routes)
    assert torch.equal(links.run(LAYER, COUNTS, rows()), wanted)


def test_another_checkpoints_rows_and_rows_of_another_width_are_refused(open_fleet: Open) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=replace(SHORT, answer_s=LONG_S))
    stranger = fleet.links(patience=replace(SHORT, answer_s=LONG_S), fingerprint="0" * 16)

    with pytest.raises(ExpertError, match=rf"of checkpoint 0{{16}}, these of {fleet.fingerprint}"):
        stranger.run(LAYER, COUNTS, rows())
    with pytest.raises(ExpertError, match=r"rows of shape \(.*, 40\) .* its experts take .*48\)"):
        links.run(LAYER, COUNTS, rows()[:, :40])
    with pytest.raises(ExpertError, match="of layer 78 are not here"):
        links.run(78, COUNTS, rows())


def test_a_worker_with_another_checkpoint_does_not_start(
    checkpoint_dir: Callable[..., Path], open_fleet: Open
) -> None:
    fleet = open_fleet()
    spec = expert_spec(checkpoint_dir("mixtral"), "m0", {0: [1]}, fingerprint=fleet.fingerprint)

    with pytest.raises(ExpertError, match=r"on m0 has the experts .*, the stages serve"):
        ExpertWorker(spec, fleet.keys, fleet.monitor.address)


def test_links_without_a_map_say_so(open_fleet: Open) -> None:
    fleet = open_fleet()
    with (
        closing(ExpertLinks("a stage", fleet.keys, fleet.fingerprint)) as links,
        pytest.raises(ExpertError, match="no expert map is in force yet"),
    ):
        links.run(LAYER, COUNTS, rows())


# --- damaged messages -------------------------------------------------------------------------


def test_damaged_messages_harm_neither_workers_nor_stages(open_fleet: Open) -> None:
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


# --- losing workers ---------------------------------------------------------------------------


def test_a_sibling_that_is_silent_is_named_by_its_front(open_fleet: Open) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=SHORT)
    links.run(LAYER, COUNTS, rows())

    fleet.workers["f1"].stop()

    with pytest.raises(ExpertCallError, match="f1 did not answer f0 of its node in time") as caught:
        links.run(LAYER, COUNTS, rows())
    assert caught.value.devices == ("f0", "f1")


def test_a_front_that_is_silent_is_named(open_fleet: Open) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=SHORT)
    links.run(LAYER, COUNTS, rows())

    fleet.workers["n0"].stop()

    with pytest.raises(ExpertCallError, match=r"n0, n1 did not answer within 0\.5 s") as caught:
        links.run(LAYER, COUNTS, rows())
    assert caught.value.devices == ("n0", "n1")


def test_a_lost_worker_is_not_waited_for(open_fleet: Open) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=Patience(answer_s=3600.0, reroute_s=0.0))
    fleet.workers["f1"].stop()
    threading.Timer(0.1, lambda: links.lose([fleet.routes.nodes[1].workers["f1"]])).start()

    with pytest.raises(ExpertCallError, match="a device of f0, f1 was lost"):
        links.run(LAYER, COUNTS, rows())


def without(routes: EvenRoutes, device: str) -> EvenRoutes:
    """The same map without one device: its replicas elsewhere take its rows."""
    holders = [[d for d in devices if d != device] for devices in routes.holders]
    nodes = []
    for node in routes.nodes:
        workers = {d: address for d, address in node.workers.items() if d != device}
        nodes.append(ExpertNode(next(iter(workers)), workers))
    return replace(routes, holders=holders, nodes=nodes)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_goes_on_with_replicas_when_a_worker_is_lost(device: str, open_fleet: Open) -> None:
    fleet = open_fleet("olmoe", 2)
    failures: list[ExpertError] = []

    def take_over(error: ExpertError) -> None:
        failures.append(error)
        links.use(without(fleet.routes, device))

    links = fleet.links(patience=replace(SHORT, reroute_s=LONG_S), on_failure=take_over)
    fleet.workers[device].stop()

    got = links.run(LAYER, COUNTS, rows())

    assert torch.equal(got, wanted_rows(fleet, without(fleet.routes, device)))
    assert len(failures) == links.num_repeated == 1


def test_a_step_waits_for_a_map_from_elsewhere(open_fleet: Open) -> None:
    fleet = open_fleet(spare=48)
    failed = threading.Event()
    links = fleet.links(
        patience=replace(SHORT, reroute_s=LONG_S), on_failure=lambda _: failed.set()
    )
    fleet.workers["f1"].stop()
    rest = [device for device in DEVICES if device != "f1"]

    def reload() -> None:
        assert failed.wait(LONG_S)
        new = spread(rest, 8, version=1)
        links.use(without(fleet.prepare(new), "f1"))

    controller = threading.Thread(target=reload)
    controller.start()
    got = links.run(LAYER, COUNTS, rows())
    controller.join()

    assert links.num_repeated == 1
    assert torch.allclose(got, wanted_rows(fleet), atol=1e-5)


def test_a_killed_worker_process_is_noticed_within_the_deadline(
    checkpoint_dir: Callable[..., Path],
) -> None:
    path = checkpoint_dir("olmoe")
    keys = wire.WireKeys.make()
    fingerprint = expert_fingerprint(Checkpoint.open(str(path)))
    spec = expert_spec(path, "p0", {LAYER: list(range(8))})
    with (
        closing(wire.Inbox("monitor", keys)) as monitor,
        closing(ExpertLinks("a stage", keys, fingerprint, patience=SHORT)) as links,
    ):
        process = ExpertProcess(spec, keys, monitor.address)
        try:
            address = process.ready()
            process.connect([links.address], {})
            links.use(EvenRoutes(0, [["p0"]] * 8, [ExpertNode("p0", {"p0": address})]))
            before = links.run(LAYER, COUNTS, rows())
            process.kill()
            with pytest.raises(ExpertCallError, match="p0 did not answer within"):
                links.run(LAYER, COUNTS, rows())
        finally:
            process.kill()

    assert before.shape == rows().shape


# --- paced devices and reports ----------------------------------------------------------------


def test_a_paced_device_takes_what_its_experts_are_declared_to(open_fleet: Open) -> None:
    fleet = open_fleet(kind="paced")
    links = fleet.links()
    for _ in range(3):
        links.run(LAYER, COUNTS, rows())

    reports: dict[str, Any] = {}
    while len(reports) < len(DEVICES) or any(r["calls"] < 3 for r in reports.values()):
        parts = fleet.monitor.receive(LONG_S)
        assert parts is not None
        assert bytes(parts[0]) == wire.REPORT
        report = msgpack.unpackb(parts[1])
        reports[report["experts"]] = report
    for report in reports.values():
        assert report["calls"] == 3
        assert report["busy_s"] >= report["predicted_s"] > 0
        assert report["versions"] == [0]


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_gradients_come_back_over_the_wire(
    model_type: str, checkpoint_dir: Callable[..., Path], open_fleet: Open
) -> None:
    path = checkpoint_dir(model_type)
    fleet = open_fleet(model_type, 2)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2)]
    for model in models:
        model.set_experts_implementation(EXPERTS_NAME)
    whole, lean = models
    lend_experts(lean.model.layers, range(6), fleet.links())
    tokens = torch.tensor([prompts()[-1]])

    for model in models:
        model(tokens, labels=tokens).loss.backward()

    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for name, parameter in lean.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted.pop(name), rtol=1e-4, atol=1e-6)
    summed: dict[tuple[int, int], Any] = {}
    for worker in fleet.workers.values():
        for key, weights in worker.take_gradients().items():
            first = torch.from_numpy(weights[0])
            summed[key] = summed.get(key, torch.zeros(())) + first
    for (layer, expert), gradient in summed.items():
        of_all = wanted[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert torch.allclose(gradient, of_all[expert], rtol=1e-4, atol=1e-6)
    assert {layer for layer, _ in summed} == set(range(6))


def test_a_failed_backward_is_not_sent_again(open_fleet: Open) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=replace(SHORT, reroute_s=LONG_S))
    fleet.workers["f1"].stop()

    with pytest.raises(ExpertCallError, match="f1 did not answer"):
        links.backward(LAYER, COUNTS, rows(), rows(1))
    assert links.num_repeated == 0


def take(inbox: wire.Inbox) -> Sequence[memoryview]:
    parts = inbox.receive(LONG_S)
    assert parts is not None
    return parts


def test_a_call_from_a_sibling_goes_no_further(open_fleet: Open) -> None:
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
