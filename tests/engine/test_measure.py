"""Timings of tiny checkpoints and links: what they cover, and how they fit the costs.

No clock is judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import wire
from actors.engine.attention import ATTENTION_NAME
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.layer_meter import LayerKind, LayerMeter, LayerShape, layer_kinds
from actors.engine.measure import (
    Effort,
    MeasureError,
    device_name,
    main_shapes,
    measure_device,
    median_s,
)
from actors.link_timer import LIGHT, PONG, ProbeError, answer, time_link
from placement.costs import layer_step_s
from placement.measured import LayerSample
from placement.profiles import DeviceProfile, LayerTable
from placement.training_costs import layer_activation_bytes, layer_training_s

pytestmark = pytest.mark.engine

CPU = torch.device("cpu")
ONCE = Effort(budget_s=0.0, least_repeats=1, most_repeats=1)
SHAPE = LayerShape(most_sequences=4, context_tokens=24)
TOKENS = (1, 4, 8, 32)


def open_meter(
    path: Path, kind: LayerKind, *, shape: LayerShape = SHAPE, most_tokens: int = 32
) -> LayerMeter:
    return LayerMeter(
        Checkpoint.open(str(path)),
        kind,
        config=EngineConfig(kv_block_tokens=4),
        device="cpu",
        shape=shape,
        most_tokens=most_tokens,
        effort=ONCE,
    )


@pytest.fixture(scope="module")
def qwen3(checkpoint_dir: Callable[..., Path]) -> Path:
    return checkpoint_dir("qwen3")


def check_samples(samples: list[LayerSample], context_tokens: int) -> None:
    for tokens, sample in zip(TOKENS, samples, strict=True):
        assert sample.tokens == tokens
        assert sample.forward_s > 0
        if tokens <= SHAPE.most_sequences:
            assert sample.context_tokens == tokens * context_tokens
            assert sample.pairs is sample.backward_s is sample.activation_bytes is None
        else:
            assert sample.recompute_s is not None
            assert sample.backward_s is not None
            assert min(sample.recompute_s, sample.backward_s) > 0
    kept = [sample.activation_bytes for sample in samples[2:]]
    assert kept[0] is not None
    assert kept[1] is not None
    # Four times the rows: four times as much, sixteen where attention keeps its scores.
    assert kept[0] < kept[1] <= 16 * kept[0]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "gpt_oss"])
def test_every_kind_of_layer_is_sampled_while_decoding_and_while_training(
    checkpoint_dir: Callable[..., Path], model_type: str
) -> None:
    path = checkpoint_dir(model_type)
    for kind in layer_kinds(Checkpoint.open(str(path))):
        meter = open_meter(path, kind)
        samples = [meter.sample(tokens) for tokens in TOKENS]

        check_samples(samples, 24 if kind.part == "layer" else 0)
        for stage_layer in meter.stage.layers:
            # The slice is left as it serves: paged attention, no gradients.
            assert stage_layer.self_attn.config._attn_implementation == ATTENTION_NAME
        assert not any(p.requires_grad or p.grad is not None for p in parameters(meter))


def parameters(meter: LayerMeter) -> list[Any]:
    modules = [*meter.stage.layers, meter.stage.norm, meter.stage.head]
    return [p for module in modules if module is not None for p in module.parameters()]


def test_what_a_layer_keeps_is_at_least_what_the_formula_counts(qwen3: Path) -> None:
    meter = open_meter(qwen3, layer_kinds(Checkpoint.open(str(qwen3)))[0])
    hidden_bytes = 4 * meter.hidden_size

    sample = meter.sample(16)

    assert sample.activation_bytes is not None
    # Input, its norm, attention's output and the MLP's input, each a hidden row wide.
    assert sample.activation_bytes >= 4 * 16 * hidden_bytes


def test_a_sample_is_what_the_costs_predict_at_its_point(qwen3: Path) -> None:
    checkpoint = Checkpoint.open(str(qwen3))
    model = checkpoint.profile(dtype_bytes=4)
    figures = measure_device(CPU, ["float32"], ONCE, shapes=main_shapes(checkpoint), rows=(1, 4))
    tables = []
    for kind in layer_kinds(checkpoint):
        meter = open_meter(qwen3, kind)
        samples = tuple(meter.sample(tokens) for tokens in TOKENS)
        tables.append(LayerTable(part=kind.part, layers=kind.layers, samples=samples))
    device = DeviceProfile(
        id="cpu",
        node="local",
        kind="cpu",
        source="measured",
        dtype="float32",
        flops_per_s=max(rate.flops_per_s for rate in figures.matmul_rates["float32"]),
        memory_bytes_per_s=figures.memory_bytes_per_s,
        memory_bytes=2**30,
        matmul_rates=figures.matmul_rates,
        layers=tuple(tables),
    ).to_device(model)

    for table in tables:
        [cost] = table.costs(model)
        decoded, trained = table.samples[1], table.samples[3]
        context = decoded.context_tokens
        assert layer_step_s(device, cost, 4, context) == pytest.approx(decoded.forward_s)
        if table.part == "layer":
            assert trained.pairs is not None
            seconds = layer_training_s(device, cost, 32, trained.pairs)
            expected = (trained.forward_s, trained.recompute_s, trained.backward_s)
            assert seconds == pytest.approx(expected)
            kept = layer_activation_bytes(device, cost, 32, trained.pairs)
            assert kept == trained.activation_bytes


def test_layers_are_grouped_by_what_they_cost(checkpoint_dir: Callable[..., Path]) -> None:
    # Layer 1 of 6 has a dense MLP among experts.
    kinds = layer_kinds(Checkpoint.open(str(checkpoint_dir("qwen3_moe"))))

    assert kinds == [
        LayerKind("layer", (0, 2, 3, 4, 5)),
        LayerKind("layer", (1,)),
        LayerKind("head"),
    ]


def test_equal_neighbours_are_timed_in_turn(
    checkpoint_dir: Callable[..., Path], qwen3: Path
) -> None:
    moe = checkpoint_dir("qwen3_moe")

    def loaded(path: Path, kind: LayerKind) -> tuple[int, int]:
        stage = open_meter(path, kind).stage
        return stage.first_layer, stage.end_layer

    assert loaded(qwen3, LayerKind("layer", (0, 1, 2, 3, 4, 5))) == (0, 6)
    assert loaded(moe, LayerKind("layer", (0, 2, 3, 4, 5))) == (0, 1)
    assert loaded(moe, LayerKind("head")) == (5, 6)


def test_kv_of_many_sequences_wraps_round_within_its_bound(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engine.layer_meter.KV_BYTES", 1)
    meter = open_meter(qwen3, LayerKind("layer", (0,)), most_tokens=4)

    sample = meter.sample(4)

    # Room for one sequence of 24 tokens, whatever is asked for.
    assert meter.stage.kv[0].num_bytes == 6 * 6 * 4 * 2 * 2 * 16 * 4
    assert sample.context_tokens == 4 * 24


def test_a_prompt_longer_than_the_checkpoint_allows_is_refused(qwen3: Path) -> None:
    meter = open_meter(qwen3, LayerKind("head"))
    longest = Checkpoint.open(str(qwen3)).max_model_tokens

    with pytest.raises(MeasureError, match=rf"has 1 to {longest}; change --tokens"):
        meter.sample(longest + 1)
    with pytest.raises(MeasureError, match="0 tokens cannot be measured"):
        meter.sample(0)


def test_a_device_has_rates_for_every_row_count_and_format(qwen3: Path) -> None:
    shapes = main_shapes(Checkpoint.open(str(qwen3)))

    figures = measure_device(CPU, ["float32", "bfloat16"], ONCE, shapes=shapes[:2], rows=(1, 16))

    assert len(set(shapes)) == len(shapes) >= 3
    assert list(figures.matmul_rates) == ["float32", "bfloat16"]
    for rates in figures.matmul_rates.values():
        assert [rate.rows for rate in rates] == [1, 16]
        assert all(math.isfinite(rate.flops_per_s) and rate.flops_per_s > 0 for rate in rates)
    assert figures.memory_bytes_per_s > 0
    assert figures.host_bytes_per_s is None
    assert device_name(CPU)


def test_the_first_run_warms_up_and_the_median_is_of_the_others() -> None:
    runs: list[int] = []

    median_s(lambda: runs.append(1), CPU, Effort(budget_s=0.0, least_repeats=3, most_repeats=9))
    assert len(runs) == 1 + 3
    median_s(lambda: runs.append(1), CPU, Effort(budget_s=60.0, least_repeats=1, most_repeats=2))
    assert len(runs) == 4 + 1 + 2


def test_a_lack_of_memory_names_the_step_and_the_knob(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = open_meter(qwen3, LayerKind("head"))

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 8 GiB")

    monkeypatch.setattr(meter.stage, "logits", fail)
    with pytest.raises(MeasureError, match=r"a step of 4 tokens does not fit .*8 GiB.*--tokens"):
        meter.sample(4)


@contextmanager
def two_ends() -> Iterator[tuple[wire.Inbox, wire.Outbox, wire.Inbox, wire.Outbox]]:
    keys = wire.WireKeys.make()
    near, far = wire.Inbox("near", keys), wire.Inbox("far", keys)
    try:
        yield near, wire.Outbox(far.address, keys), far, wire.Outbox(near.address, keys)
    finally:
        near.close()
        far.close()


def test_a_link_is_timed_against_an_end_that_answers() -> None:
    with two_ends() as (near, to_far, far, to_near), ThreadPoolExecutor() as pool:
        answering = pool.submit(answer, far, to_near, 30.0)
        times = time_link(near, to_far, 30.0)

        # The goodbye ends it, long before its deadline.
        assert answering.result(5.0) > 50
    assert times.rtt_s > 0
    assert times.bandwidth_bytes_per_s > 0


def test_a_light_probe_of_a_slow_link_is_a_few_short_messages() -> None:
    with two_ends() as (near, to_far, far, to_near), ThreadPoolExecutor() as pool:
        answering = pool.submit(answer_slowly, far, to_near)
        times = time_link(near, to_far, 30.0, LIGHT)

        assert answering.result(5.0) == LIGHT.warm_ups + LIGHT.pings + 2 + LIGHT.transfers
    assert to_far.bytes_sent < 6 * LIGHT.least_transfer_bytes
    assert 0 < times.bandwidth_bytes_per_s < LIGHT.least_transfer_bytes / LIGHT.long_s


def answer_slowly(inbox: wire.Inbox, outbox: wire.Outbox) -> int:
    """Answer like an end behind a slow link, after as many late answers to somebody else."""
    answered = 0
    while (parts := inbox.receive(30.0)) is not None and len(parts) > 1:
        outbox.send([PONG, answered.to_bytes(8, "big")])
        if len(parts[2]):
            time.sleep(7 * LIGHT.long_s)
        outbox.send([PONG, bytes(parts[1])])
        answered += 1
    outbox.close()
    return answered


def test_an_end_that_does_not_answer_is_told_at_the_deadline() -> None:
    with two_ends() as (near, to_far, far, to_near):
        with pytest.raises(ProbeError, match=r"message 1 of 0 bytes had no answer .* the link"):
            time_link(near, to_far, 0.2)
        assert answer(far, to_near, 0.2) == 1
