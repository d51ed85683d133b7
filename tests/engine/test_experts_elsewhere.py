"""Experts on other devices: tokens are transformers' own wherever the experts are."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_routes import EvenRoutes, experts_by_layer, open_hosts, spread
from identity import Expected, check_identical, generate
from tiny_models import MOE, num_experts
from transformers import AutoModelForCausalLM

from actors.engine.batch import Rows, StepBatch
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.expert_calls import ExpertError
from actors.engine.experts import EXPERTS_NAME, lend_experts
from actors.engine.local import LocalPipeline
from actors.engine.local_experts import LocalDispatcher
from actors.engine.requests import Request, SamplingParams
from actors.engine.slice import StageSlice

pytestmark = pytest.mark.engine

NUM_NEW = 12
LENGTHS = (1, 2, 3, 7, 8, 16, 24, 31, 40, 60)
TIGHT = EngineConfig(kv_block_tokens=4, num_kv_blocks=40, max_running=16, max_step_tokens=20)
PLACEMENTS = {
    "1 device": (1, 1),
    "2 devices": (2, 1),
    "4 devices": (4, 1),
    "2 devices, all replicated": (2, 2),
    "4 devices, 3 replicas": (4, 3),
}
"""(devices, replicas of each expert)"""


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(5)
    return [tuple(rng.randrange(3, 199) for _ in range(length)) for length in LENGTHS]


def requests() -> list[Request]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    return [Request(id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(prompts())]


def tokens_of(pipeline: LocalPipeline) -> list[list[int]]:
    done = pipeline.generate(requests())
    return [done[str(i), 0].tokens for i in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def expected(
    checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> Callable[[str], list[Expected]]:
    made: dict[str, list[Expected]] = {}

    def make(model_type: str) -> list[Expected]:
        if model_type not in made:
            model = reference(checkpoint_dir(model_type))
            made[model_type] = [generate(model, prompt, NUM_NEW) for prompt in prompts()]
        return made[model_type]

    return make


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model_type", MOE)
def test_tokens_do_not_depend_on_where_experts_are(
    model_type: str,
    placement: str,
    checkpoint_dir: Callable[..., Path],
    expected: Callable[[str], list[Expected]],
) -> None:
    num_devices, replicas = PLACEMENTS[placement]
    devices = [f"device {i}" for i in range(num_devices)]
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    routes = spread(devices, num_experts(model_type), replicas=replicas)
    dispatcher = LocalDispatcher(open_hosts(checkpoint, devices, routes), routes)

    pipeline = LocalPipeline(checkpoint, (1, 4), config=TIGHT, experts=dispatcher)

    check_identical(expected(model_type), tokens_of(pipeline))


@pytest.mark.parametrize("model_type", MOE)
def test_every_bit_is_the_one_process_ones_where_no_experts_rows_are_split(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    devices = ["a", "b", "c"]
    routes = spread(devices, num_experts(model_type))
    dispatcher = LocalDispatcher(open_hosts(checkpoint, devices, routes), routes)
    config = EngineConfig(kv_block_tokens=4)
    outs = []
    for experts in (None, dispatcher):
        stage = StageSlice(checkpoint, 0, 6, config=config, num_kv_blocks=16, experts=experts)
        outs.append([stage.run_layers(each, None) for each in steps()])

    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def steps() -> list[StepBatch]:
    tokens = list(prompts()[-1])
    return [
        StepBatch(0, 0, 0, tokens[:37], [Rows(0, 37, list(range(10)))]),
        StepBatch(0, 1, 0, tokens[37:38], [Rows(37, 1, list(range(10)))]),
    ]


@pytest.mark.parametrize("model_type", MOE)
@pytest.mark.parametrize("fused", [False, True])
def test_a_slice_without_its_experts_neither_holds_nor_reads_them(
    model_type: str, fused: bool, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type, fused=fused)))
    config = EngineConfig()
    whole = StageSlice(checkpoint, 0, 6, config=config, num_kv_blocks=4)
    routes = spread(["a"], num_experts(model_type))
    dispatcher = LocalDispatcher({}, routes)

    lean = StageSlice(checkpoint, 0, 6, config=config, num_kv_blocks=4, experts=dispatcher)

    routed = [t for t in checkpoint.tensors if ".experts." in t.parameter]
    assert routed
    assert whole.bytes_read - lean.bytes_read == sum(tensor.num_bytes for tensor in routed)
    assert whole.weight_bytes - lean.weight_bytes == sum(4 * tensor.numel for tensor in routed)
    recut = lean.recut(2, 6)
    assert recut.bytes_read == 0
    assert lean.recut(1, 5).weight_bytes < whole.recut(1, 5).weight_bytes


def test_a_slice_that_is_cut_anew_dispatches_its_new_layers_too(
    checkpoint_dir: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("olmoe")))
    config = EngineConfig(kv_block_tokens=4)
    routes = spread(["a", "b"], 8)
    dispatcher = LocalDispatcher(open_hosts(checkpoint, ["a", "b"], routes), routes)
    whole = StageSlice(checkpoint, 0, 6, config=config, num_kv_blocks=16)
    part = StageSlice(checkpoint, 0, 2, config=config, num_kv_blocks=16, experts=dispatcher)

    wider = part.recut(0, 6)

    step = steps()[0]
    assert torch.equal(wider.run_layers(step, None), whole.run_layers(step, None))


@pytest.mark.parametrize("model_type", MOE)
def test_tokens_stay_while_experts_move_all_the_time(
    model_type: str,
    checkpoint_dir: Callable[..., Path],
    expected: Callable[[str], list[Expected]],
) -> None:
    devices = ["a", "b", "c"]
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    total = num_experts(model_type)
    routes = spread(devices, total)
    hosts = open_hosts(checkpoint, devices, routes, spare=total)
    dispatcher = LocalDispatcher(hosts, routes)
    layers = sorted({layer for layer, _ in hosts["a"].experts(0)})
    done = threading.Event()
    moves = 0

    def move_on() -> None:
        nonlocal moves
        for version in count(1):
            if done.is_set():
                return
            new = spread(devices, total, version=version, shift=version, replicas=1 + version % 2)
            for device, host in hosts.items():
                host.prepare(version, experts_by_layer(layers, new.held_by(device)))
            dispatcher.routes = new
            for host in hosts.values():
                # The version before stays: a call may have begun with it.
                host.retire(version - 1)
            moves += 1

    mover = threading.Thread(target=move_on)
    mover.start()
    try:
        pipeline = LocalPipeline(checkpoint, (3,), config=TIGHT, experts=Patient(dispatcher))
        got = tokens_of(pipeline)
    finally:
        done.set()
        mover.join()

    check_identical(expected(model_type), got)
    assert moves > 3


class Patient:
    """Asks again where maps pass by faster than a call begins and ends."""

    is_frozen = False

    def __init__(self, dispatcher: LocalDispatcher) -> None:
        self._dispatcher = dispatcher

    def run(self, *call: Any) -> torch.Tensor:
        while True:
            try:
                return self._dispatcher.run(*call)
            except ExpertError as error:
                if "map version" not in str(error):
                    raise

    def backward(self, *call: Any) -> torch.Tensor:
        return self._dispatcher.backward(*call)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("model_type", MOE)
def test_gradients_through_experts_elsewhere_are_the_one_process_ones(
    model_type: str, replicas: int, checkpoint_dir: Callable[..., Path]
) -> None:
    path = checkpoint_dir(model_type)
    devices = ["a", "b", "c"]
    checkpoint = Checkpoint.open(str(path))
    routes = spread(devices, num_experts(model_type), replicas=replicas)
    hosts = open_hosts(checkpoint, devices, routes)
    whole, lean = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2)
    )
    for model in (whole, lean):
        model.set_experts_implementation(EXPERTS_NAME)
    lend_experts(lean.model.layers, range(6), LocalDispatcher(hosts, routes))
    tokens = torch.tensor([prompts()[-1]])

    losses = [model(tokens, labels=tokens).loss for model in (whole, lean)]
    for loss in losses:
        loss.backward()

    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for name, parameter in lean.named_parameters():
        assert_close(parameter.grad, wanted.pop(name))
    summed: dict[tuple[str, int], torch.Tensor] = {}
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for host in hosts.values():
        for (layer, expert), weights in host.take_gradients().items():
            for name, gradient in zip(names, weights, strict=False):
                key = (f"model.layers.{layer}.mlp.experts.{name}", expert)
                summed[key] = summed.get(key, torch.zeros(())) + gradient
        assert host.take_gradients() == {}
    assert wanted
    for name, gradient in wanted.items():
        for expert, part in enumerate(gradient):
            assert_close(summed.get((name, expert), torch.zeros_like(part)), part)


def assert_close(got: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert got is not None
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6), (got - wanted).abs().max()


def test_gradients_of_experts_are_summed_where_nothing_before_them_is_trained(
    checkpoint_dir: Callable[..., Path],
) -> None:
    path = checkpoint_dir("mixtral")
    checkpoint = Checkpoint.open(str(path))
    routes = spread(["a"], 4)
    hosts = open_hosts(checkpoint, ["a"], routes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.set_experts_implementation(EXPERTS_NAME)
    lend_experts(model.model.layers, range(6), LocalDispatcher(hosts, routes))
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers.requires_grad_(False)
    tokens = torch.tensor([prompts()[-1]])

    model(tokens, labels=tokens).loss.backward()

    assert {layer for layer, _ in hosts["a"].take_gradients()} == set(range(6))


# --- what is refused --------------------------------------------------------------------------


def test_routes_that_leave_rows_out_are_refused(checkpoint_dir: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("olmoe")))
    routes = spread(["a"], 8)
    hosts = open_hosts(checkpoint, ["a"], routes)
    orphaned = EvenRoutes(0, [["a"]] * 7 + [[]])
    rows = torch.zeros(6, 48)

    with pytest.raises(ExpertError, match=r"layer 2, map version 0: expert 7 has 4 rows and .* 0"):
        LocalDispatcher(hosts, orphaned).run(2, [0, 2, 0, 0, 0, 0, 0, 4], rows)
    with pytest.raises(ExpertError, match="an expert was given twice to one device"):
        LocalDispatcher(hosts, EvenRoutes(0, [["a", "a"]] * 8)).run(2, [6] + [0] * 7, rows)
