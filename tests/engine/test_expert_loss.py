"""Expert workers that are lost, paced, or asked for gradients, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
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
from expert_fleet import DEVICES, expert_spec
from expert_processes import ExpertProcess
from expert_routes import EvenRoutes, spread
from identity import check_identical, generate
from transformers import AutoModelForCausalLM

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.expert_calls import ExpertError
from actors.engine.experts import EXPERTS_NAME, lend_experts
from actors.engine.fingerprint import expert_fingerprint
from actors.expert_links import ExpertCallError, ExpertLinks, ExpertNode, Patience

pytestmark = pytest.mark.engine


# --- losing workers ---------------------------------------------------------------------------


def test_a_sibling_that_is_silent_is_named_by_its_front(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=SHORT)
    links.run(LAYER, COUNTS, rows())

    fleet.workers["f1"].stop()

    with pytest.raises(ExpertCallError, match="f1 did not answer f0 of its node in time") as caught:
        links.run(LAYER, COUNTS, rows())
    assert caught.value.devices == ("f0", "f1")


def test_a_front_that_is_silent_is_named(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=SHORT)
    links.run(LAYER, COUNTS, rows())

    fleet.workers["n0"].stop()

    with pytest.raises(ExpertCallError, match=r"n0, n1 did not answer within 0\.5 s") as caught:
        links.run(LAYER, COUNTS, rows())
    assert caught.value.devices == ("n0", "n1")


def test_a_lost_worker_is_not_waited_for(open_fleet: OpenFleet) -> None:
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
        if workers:
            nodes.append(ExpertNode(next(iter(workers)), workers))
    return replace(routes, holders=holders, nodes=nodes)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_goes_on_with_replicas_when_a_worker_is_lost(
    device: str, open_fleet: OpenFleet
) -> None:
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


def test_a_step_waits_for_a_map_from_elsewhere(open_fleet: OpenFleet) -> None:
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


def test_generation_survives_a_killed_process_and_names_the_last_one(
    checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path = checkpoint_dir("olmoe")
    checkpoint = Checkpoint.open(str(path))
    keys = wire.WireKeys.make()
    spec = [expert_spec(path, name, dict.fromkeys(range(6), range(8))) for name in ("p0", "p1")]
    with ExitStack() as stack:
        monitor = stack.enter_context(closing(wire.Inbox("monitor", keys)))
        processes = {each.device.id: ExpertProcess(each, keys, monitor.address) for each in spec}
        for process in processes.values():
            stack.callback(process.kill)
        nodes = [ExpertNode(name, {name: each.ready()}) for name, each in processes.items()]
        routes = EvenRoutes(0, [["p0", "p1"]] * 8, nodes)
        fingerprint = expert_fingerprint(checkpoint)
        links = ExpertLinks(
            "a stage", keys, fingerprint, patience=Patience(answer_s=2.0),
            on_failure=lambda _: links.use(without(routes, "p0")),
        )  # fmt: skip
        strict = ExpertLinks("another", keys, fingerprint, patience=SHORT)
        for each in (links, strict):
            stack.enter_context(closing(each))
            each.use(routes)
        for process in processes.values():
            process.connect([links.address, strict.address], {})

        got = tokens_of(checkpoint, Interrupted(links, 40, processes["p0"].kill))
        processes["p1"].kill()
        strict.use(without(routes, "p0"))
        with pytest.raises(ExpertCallError, match=r"p1 did not answer within 0\.5 s"):
            strict.run(LAYER, COUNTS, rows())

    check_identical([generate(reference(path), prompt, NUM_NEW) for prompt in prompts()], got)
    assert links.num_repeated > 0


class Interrupted:
    """A dispatcher before whose n-th call something happens."""

    is_frozen = False

    def __init__(self, links: ExpertLinks, number: int, happen: Callable[[], None]) -> None:
        self._links = links
        self._left = number
        self._happen = happen

    def run(self, *call: Any) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._happen()
        return self._links.run(*call)

    def backward(self, *call: Any) -> torch.Tensor:
        return self._links.backward(*call)


# --- paced devices and reports ----------------------------------------------------------------


def test_a_paced_device_takes_what_its_experts_are_declared_to(open_fleet: OpenFleet) -> None:
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
    model_type: str, checkpoint_dir: Callable[..., Path], open_fleet: OpenFleet
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


def test_a_failed_backward_is_not_sent_again(open_fleet: OpenFleet) -> None:
    fleet = open_fleet()
    links = fleet.links(patience=replace(SHORT, reroute_s=LONG_S))
    fleet.workers["f1"].stop()

    with pytest.raises(ExpertCallError, match="f1 did not answer"):
        links.backward(LAYER, COUNTS, rows(), rows(1))
    assert links.num_repeated == 0


def test_a_failed_backward_through_frozen_experts_is_sent_again(open_fleet: OpenFleet) -> None:
    fleet = open_fleet("olmoe", 2)
    wanted = fleet.links().backward(LAYER, COUNTS, rows(), rows(1))
    for worker in fleet.workers.values():
        worker.take_gradients()

    def take_over(_: ExpertError) -> None:
        links.use(without(fleet.routes, "f1"))

    patience = replace(SHORT, reroute_s=LONG_S)
    links = fleet.links(patience=patience, is_frozen=True, on_failure=take_over)
    fleet.workers["f1"].stop()

    got = links.backward(LAYER, COUNTS, rows(), rows(1))

    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert links.num_repeated == 1
    assert all(worker.take_gradients() == {} for worker in fleet.workers.values())
