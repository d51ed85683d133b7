"""Rounds through slots give what plain autograd of transformers' own model gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from expert_routes import open_hosts, spread
from pooled_training import (
    PooledRound,
    RoundResult,
    by_parameter,
    host_weights,
    loss_scales,
    plain_gradients,
    random_batches,
    relative_errors,
)
from tiny_models import ARCHITECTURES, MOE, make_model, num_experts
from transformers import AutoModelForCausalLM

from actors.engine.checkpoint import Checkpoint
from actors.engine.local_experts import LocalDispatcher
from actors.engine.trainable import TrainableModel
from actors.engine.training_config import LoraSettings
from actors.engine.training_values import LossScales, MicroBatch
from placement.training import RecomputeGrain, Slot, slots_from_counts

pytestmark = pytest.mark.engine

Dirs = Callable[..., Path]
Counts = tuple[tuple[int, ...], int, tuple[int, ...]]
ROUTER_COEFFICIENT = 0.5
CUTS: tuple[tuple[Counts, RecomputeGrain], ...] = (
    (((2, 2), 2, (1, 3)), "stage"),
    (((1, 4), 1, (2, 3)), "layer"),
    (((6,), 0, (6,)), "layer"),
    (((2, 3), 1, (3, 2)), "keep"),
    (((), 6, ()), "stage"),
)
LORA = LoraSettings(rank=4, alpha=10.0, target_modules=("q_proj", "v_proj", "o_proj"))


def load(path: Path) -> Any:
    """transformers' own model, trained mode, untouched by anything here."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.train()


def pool(
    path: Path, num_devices: int = 2, lora: LoraSettings | None = None, **options: Any
) -> list[TrainableModel]:
    checkpoint = Checkpoint.open(str(path))
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "loss_chunk_tokens": 7}
    return [TrainableModel(checkpoint, lora=lora, **settings | options) for _ in range(num_devices)]


def slots_and_grains(
    counts: Counts, grain: RecomputeGrain
) -> tuple[tuple[Slot, ...], list[RecomputeGrain]]:
    """Backward slots get the grain; keep becomes stage where no forward slot has equal layers."""
    slots = slots_from_counts(*counts)
    kept = {(slot.first_layer, slot.end_layer) for slot in slots if slot.kind == "forward"}
    grains: list[RecomputeGrain] = []
    for slot in slots:
        can_keep = (slot.first_layer, slot.end_layer) in kept
        grains.append("none" if slot.kind != "backward" else grain)
        if grains[-1] == "keep" and not can_keep:
            grains[-1] = "stage"
    return slots, grains


def run_round(
    models: Sequence[TrainableModel],
    weights: Any,
    batches: Sequence[MicroBatch],
    counts: Counts,
    grain: RecomputeGrain,
    *,
    scales: LossScales | None = None,
    **options: Any,
) -> RoundResult:
    slots, grains = slots_and_grains(counts, grain)
    scales = scales or loss_scales(batches)
    return PooledRound(models, weights, slots, grains, scales=scales, **options).run(batches)


def random_counts(random: np.random.Generator, num_layers: int) -> Counts:
    def parts(total: int) -> tuple[int, ...]:
        if not total:
            return ()
        inner = random.permutation(np.arange(1, total))[: int(random.integers(0, total))]
        return tuple(int(n) for n in np.diff([0, *sorted(inner), total]))

    fused = int(random.integers(0, num_layers + 1))
    return parts(num_layers - fused), fused, parts(num_layers - fused)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "packed"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_are_those_of_plain_autograd(
    model_type: str, whole: bool, checkpoint_dir: Dirs
) -> None:
    path = checkpoint_dir(model_type)
    batches = random_batches(3, whole=whole)
    coefficient = ROUTER_COEFFICIENT if model_type in MOE else 0.0
    loss, expected = plain_gradients(load(path), batches, coefficient)
    models, weights = pool(path), host_weights(Checkpoint.open(str(path)))
    random = np.random.default_rng(len(model_type))
    grains: tuple[RecomputeGrain, ...] = ("stage", "layer", "keep")
    cuts = [*CUTS, *((random_counts(random, 6), grain) for grain in grains)]

    for counts, grain in cuts:
        done = run_round(
            models, weights, batches, counts, grain, scales=loss_scales(batches, coefficient)
        )

        errors = relative_errors(by_parameter(models[0].units, done.gradients), expected)
        assert max(errors.values()) < 1e-5, (counts, grain, errors)
        router = sum(loads.loss() for loads in done.loads if loads) / len(batches)
        assert done.loss_sum / done.num_targets + coefficient * router == pytest.approx(
            loss, rel=1e-5
        )


@pytest.mark.parametrize("model_type", MOE)
def test_adapters_learn_alike_where_frozen_experts_are_elsewhere(
    model_type: str, checkpoint_dir: Dirs
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    batches = random_batches(2)
    scales = loss_scales(batches, ROUTER_COEFFICIENT)
    counts, grain = CUTS[0]
    wanted = run_round(
        pool(checkpoint.path, lora=LORA), host_weights(checkpoint, LORA), batches, counts, grain,
        scales=scales,
    )  # fmt: skip
    devices = ["a", "b", "c"]
    routes = spread(devices, num_experts(model_type))
    hosts = open_hosts(checkpoint, devices, routes)
    models = pool(
        checkpoint.path, lora=LORA, experts=LocalDispatcher(hosts, routes, is_frozen=True)
    )
    weights = host_weights(checkpoint, LORA, experts_elsewhere=True)
    assert [unit.num_frozen for unit in models[0].units] == [
        frozen.numel() for _, frozen in weights.values()
    ]

    done = run_round(models, weights, batches, counts, grain, scales=scales)

    assert done.loss_sum == wanted.loss_sum
    assert done.gradients.keys() == wanted.gradients.keys()
    for unit, gradient in wanted.gradients.items():
        assert torch.equal(done.gradients[unit], gradient), unit
    assert all(host.take_gradients() == {} for host in hosts.values())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mistral"])
def test_every_cut_and_grain_gives_the_same_bits(model_type: str, checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir(model_type)
    batches = random_batches(2)
    models, weights = pool(path, 3), host_weights(Checkpoint.open(str(path)))
    scales = loss_scales(batches, ROUTER_COEFFICIENT)

    results = [
        run_round(models, weights, batches, counts, grain, scales=scales).gradients
        for counts, grain in CUTS
    ]

    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], gradient) for name, gradient in results[0].items())


def test_an_expert_that_no_row_chose_has_a_gradient_of_zero(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("qwen3_moe")
    [batch] = random_batches(1, num_sequences=1, num_rows=2, whole=True)
    models, weights = pool(path), host_weights(Checkpoint.open(str(path)))

    done = run_round(models, weights, [batch], ((5,), 1, (5,)), "stage")

    gradients = by_parameter(models[0].units, done.gradients)
    per_expert = gradients["model.layers.0.mlp.experts.down_proj"].flatten(1).norm(dim=1)
    assert 2 <= int((per_expert > 0).sum()) <= 4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", LORA.target_modules),
        ("qwen3", (*LORA.target_modules, "lm_head")),
        ("qwen2", ("down_proj", "lm_head")),
        ("mixtral", LORA.target_modules),
    ],
)
def test_adapter_gradients_are_those_of_peft(
    model_type: str, targets: tuple[str, ...], checkpoint_dir: Dirs
) -> None:
    path = checkpoint_dir(model_type)
    lora = LORA.model_copy(update={"target_modules": targets})
    models = pool(path, lora=lora)
    weights = host_weights(Checkpoint.open(str(path)), lora)
    for trained, _ in weights.values():
        trained.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    config = peft.LoraConfig(r=lora.rank, lora_alpha=10, target_modules=list(targets))
    reference = peft.inject_adapter_in_model(config, load(path))
    values = by_parameter(models[0].units, {name: pair[0] for name, pair in weights.items()})
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    batches = random_batches(2)
    coefficient = ROUTER_COEFFICIENT if model_type in MOE else 0.0
    _, expected = plain_gradients(reference, batches, coefficient)

    for counts, grain in CUTS:
        done = run_round(
            models, weights, batches, counts, grain, scales=loss_scales(batches, coefficient)
        )

        errors = relative_errors(by_parameter(models[0].units, done.gradients), expected)
        assert max(errors.values()) < 1e-5, (counts, grain, errors)


def test_layers_with_nothing_trained_pass_the_gradient_on(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    lora = LoraSettings(rank=2, target_modules=("lm_head",))
    [model] = pool(path, 1, lora=lora)
    for name, pair in host_weights(Checkpoint.open(str(path)), lora).items():
        model.place(name, *pair)
    [batch] = random_batches(1)
    real_BT1 = torch.from_numpy(batch.documents_BT >= 0)[..., None]
    random = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(2, 48, 48, generator=random)
    gradient_BTH = torch.randn(2, 48, 48, generator=random) * real_BT1
    slot = model.open_slot(
        "backward", 2, 4, grain="stage", scales=LossScales(1.0), step=0, first_micro_batch=0
    )

    slot.recompute(0, batch, {2: hidden_BTH})
    passed = slot.backward(0, gradient_BTH)

    decoder = load(path).model
    leaf = hidden_BTH.clone().requires_grad_()
    same = torch.from_numpy(batch.documents_BT[:, :, None] == batch.documents_BT[:, None])
    mask = torch.zeros(2, 1, 48, 48).masked_fill(~same.tril()[:, None], -torch.inf)
    rotary = decoder.rotary_emb(leaf, torch.from_numpy(batch.positions_BT))
    out = leaf
    for layer in decoder.layers[2:4]:
        out = layer(out, attention_mask=mask, position_embeddings=rotary)
    torch.autograd.backward(out, gradient_BTH)
    torch.testing.assert_close(passed, leaf.grad, rtol=1e-4, atol=1e-5)
    assert slot.gradients() == {}


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose configuration asks for attention dropout."""
    path = tmp_path_factory.mktemp("dropping")
    make_model("qwen3").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return path


@pytest.mark.parametrize("lora", [None, LORA.model_copy(update={"dropout": 0.3})])
def test_dropout_depends_on_its_counters_alone(dropping: Path, lora: LoraSettings | None) -> None:
    models = pool(dropping, 2, lora=lora, seed=5)
    weights = host_weights(Checkpoint.open(str(dropping)), lora)
    for trained, _ in weights.values():
        trained.add_(torch.randn(trained.shape, generator=torch.Generator().manual_seed(1)) / 9)
    batches = random_batches(3)

    def gradients(cut: tuple[Counts, RecomputeGrain], **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(int(torch.seed() % 2**31))
        done = run_round(models, weights, options.pop("batches", batches), *cut, **options)
        return by_parameter(models[0].units, done.gradients)

    first = gradients(CUTS[0], step=3)
    for cut in CUTS[1:]:
        errors = relative_errors(gradients(cut, step=3), first)
        assert max(errors.values()) < 1e-6
    assert max(relative_errors(gradients(CUTS[0], step=4), first).values()) > 1e-2
    scales = loss_scales(batches)
    parts = [
        gradients(CUTS[0], step=3, scales=scales, batches=batches[:1]),
        gradients(CUTS[1], step=3, scales=scales, batches=batches[1:], first_micro_batch=1),
    ]
    total = {name: parts[0][name] + parts[1][name] for name in first}
    assert max(relative_errors(total, first).values()) < 1e-6


def test_evaluation_has_no_dropout_and_leaves_no_gradient(dropping: Path) -> None:
    [model] = pool(dropping, 1)
    for name, pair in host_weights(Checkpoint.open(str(dropping))).items():
        model.place(name, *pair)
    [batch] = random_batches(1)
    common: Any = {"scales": LossScales(1.0), "step": 0, "first_micro_batch": 0, "train": False}
    forward = model.open_slot("forward", 0, 4, **common)
    fused = model.open_slot("fused", 4, 6, **common)

    hidden_BTH = forward.forward(0, batch, None).hidden_BTH
    done = fused.fused(0, batch, hidden_BTH)

    loss, _ = plain_gradients(load(dropping).eval(), [batch])
    assert done.loss_sum / batch.num_targets == pytest.approx(loss, rel=1e-5)
    assert done.num_targets == batch.num_targets
    assert done.gradient_BTH is None
    assert fused.gradients() == {}
    assert not hidden_BTH.requires_grad


def test_bfloat16_gradients_are_summed_in_float32(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    checkpoint = Checkpoint.open(str(path))
    batches = random_batches(4, num_sequences=1)
    models = pool(path, dtype=torch.bfloat16)
    weights = host_weights(checkpoint, dtype=torch.bfloat16)

    together = run_round(models, weights, batches, *CUTS[0], scales=LossScales(0.01)).gradients

    apart = [
        run_round(models, weights, [batch], *CUTS[0], scales=LossScales(0.01)).gradients
        for batch in batches
    ]
    _, expected = plain_gradients(load(path), batches)
    for name, gradient in together.items():
        assert gradient.dtype == torch.float32
        total = sum((part[name].double() for part in apart), torch.zeros(()).double())
        # Sums of bfloat16 values in bfloat16 would be off by 2^-9.
        assert float((gradient - total).norm() / total.norm()) < 1e-6
    name = "model.layers.3.self_attn.o_proj.weight"
    scale = 0.01 * sum(batch.num_targets for batch in batches)
    actual = by_parameter(models[0].units, together)[name] / scale
    assert float((actual - expected[name]).norm() / expected[name].norm()) < 0.1


def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    [batch] = random_batches(1)
    silent = MicroBatch(
        batch.tokens_BT,
        np.full_like(batch.targets_BT, -100),
        batch.positions_BT,
        batch.documents_BT,
    )
    models, weights = pool(path), host_weights(Checkpoint.open(str(path)))

    done = run_round(models, weights, [silent], *CUTS[0], scales=LossScales(1.0))

    assert (done.loss_sum, done.num_targets) == (0.0, 0)
    assert all(not gradient.any() for gradient in done.gradients.values())


def test_what_a_round_kept_can_be_dropped(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    [model] = pool(path, 1)
    for name, pair in host_weights(Checkpoint.open(str(path))).items():
        model.place(name, *pair)
    [batch] = random_batches(1)
    common: Any = {"scales": LossScales(1.0), "step": 0, "first_micro_batch": 0, "round_key": 7}
    model.open_slot("forward", 0, 2, keep=True, **common).forward(0, batch, None)
    backward = model.open_slot("backward", 0, 2, grain="keep", **common)

    model.drop_kept(7)

    with pytest.raises(ValueError, match=r"\[0, 2\) of micro-batch 0, round 7, were not kept"):
        backward.recompute(0, batch, {})


def test_a_slot_keeps_the_weights_it_was_opened_with(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    [model] = pool(path, 1)
    weights = host_weights(Checkpoint.open(str(path)))
    for name, pair in weights.items():
        model.place(name, *pair)
    [batch] = random_batches(1)
    common: Any = {"scales": LossScales(1.0), "step": 0, "first_micro_batch": 0}
    slot = model.open_slot("forward", 0, 2, **common)
    before = slot.forward(0, batch, None).hidden_BTH

    for name, (trained, frozen) in weights.items():
        model.place(name, trained * 2, frozen)
    after = slot.forward(0, batch, None).hidden_BTH
    other = model.open_slot("forward", 0, 2, **common).forward(0, batch, None).hidden_BTH

    assert torch.equal(before, after)
    assert not torch.equal(before, other)


def test_placing_copies_nothing_and_never_writes(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    [model] = pool(path, 1)
    weights = host_weights(Checkpoint.open(str(path)))
    before = {name: trained.clone() for name, (trained, _) in weights.items()}

    upload = model.upload(weights["layer 0"][0])
    run_round([model], weights, random_batches(1), *CUTS[0])

    assert upload.flat.data_ptr() == weights["layer 0"][0].data_ptr()
    assert all(torch.equal(before[name], trained) for name, (trained, _) in weights.items())
    assert model.placed_bytes("layer 0") == 4 * weights["layer 0"][0].numel()


def test_a_missing_unit_and_a_wrong_size_are_named(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("llama")
    [model] = pool(path, 1)
    weights = host_weights(Checkpoint.open(str(path)))
    model.place("layer 1", *weights["layer 1"])
    common: Any = {"scales": LossScales(1.0), "step": 0, "first_micro_batch": 0}

    with pytest.raises(ValueError, match=r"\[0, 2\) needs embedding, layer 0, which are not"):
        model.open_slot("forward", 0, 2, **common)
    with pytest.raises(ValueError, match="unit 'layer 0' was given 3 of"):
        model.place("layer 0", torch.zeros(3), None)


def test_a_router_loss_without_loads_is_refused(checkpoint_dir: Dirs) -> None:
    path = checkpoint_dir("mixtral")
    [model] = pool(path, 1)
    for name, pair in host_weights(Checkpoint.open(str(path))).items():
        model.place(name, *pair)
    [batch] = random_batches(1)
    slot = model.open_slot(
        "backward", 2, 4, grain="stage", scales=LossScales(1.0, 0.1), step=0, first_micro_batch=0
    )
    slot.recompute(0, batch, {2: torch.zeros(2, 48, 48)})

    with pytest.raises(ValueError, match="needs the loads of all layers"):
        slot.backward(0, torch.zeros(2, 48, 48))


def test_a_slot_needs_its_layers_and_what_lies_at_the_ends(checkpoint_dir: Dirs) -> None:
    [untied], [tied] = pool(checkpoint_dir("llama"), 1), pool(checkpoint_dir("qwen3"), 1)

    assert untied.unit_names("forward", 0, 2) == ("embedding", "layer 0", "layer 1")
    assert untied.unit_names("backward", 2, 3) == ("layer 2",)
    assert untied.unit_names("fused", 5, 6) == ("layer 5", "head")
    assert tied.unit_names("fused", 6, 6) == ("embedding", "head")
    assert tied.unit_names("fused", 0, 1) == ("embedding", "layer 0", "head")
