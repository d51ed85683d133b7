"""Rounds of training run through slots in this process, and what plain autograd says of the same.

The pool is some `TrainableModel`s that hold nothing between slots; weights and what slots hand out
lie in dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from actors.engine.checkpoint import Checkpoint
from actors.engine.trainable import TrainableModel, initial_weights, training_units
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import split_flat
from actors.engine.training_values import (
    IGNORED,
    PADDING,
    LossScales,
    MicroBatch,
    RouterLoads,
    Tokens,
    Unit,
)
from actors.engine.trainstep import SlotRun
from actors.engine.upload import Upload
from placement.training import RecomputeGrain, Slot

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Flat (trained, frozen) tensors by unit."""


def host_weights(
    checkpoint: Checkpoint,
    lora: LoraSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts_elsewhere: bool = False,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every unit's weights as training starts from them."""
    return {
        unit.name: initial_weights(checkpoint, unit, lora, dtype=dtype, seed=seed)
        for unit in training_units(checkpoint, lora, experts_elsewhere=experts_elsewhere)
    }


def by_parameter(
    units: Sequence[Unit], gradients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Cut flat gradients by unit into parameters by name."""
    return {
        info.name: view
        for unit in units
        if unit.name in gradients
        for info, view in zip(
            unit.trained, split_flat(gradients[unit.name], unit.trained), strict=True
        )
    }


def micro_batch(documents: Sequence[Sequence[Sequence[int]]], num_rows: int) -> MicroBatch:
    """Pack documents (for each sequence a list of token lists) and fill up with padding.

    A row predicts the next token of its document; the last one predicts nothing.
    """
    shape = (len(documents), num_rows)
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    numbers = np.full(shape, PADDING, dtype=np.int64)
    for sequence, packed in enumerate(documents):
        start = 0
        for number, document in enumerate(packed):
            end = start + len(document)
            tokens[sequence, start:end] = document
            targets[sequence, start : end - 1] = document[1:]
            positions[sequence, start:end] = np.arange(len(document))
            numbers[sequence, start:end] = number
            start = end
    return MicroBatch(tokens, targets, positions, numbers)


def random_batches(
    num_batches: int,
    *,
    seed: int = 0,
    num_sequences: int = 2,
    num_rows: int = 48,
    vocab_size: int = 199,
    whole: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of one document a sequence (`whole`), or of some of random length, padded."""
    random = np.random.default_rng(seed)

    def document(length: int) -> list[int]:
        return [int(token) for token in random.integers(0, vocab_size, length)]

    batches = []
    for _ in range(num_batches):
        sequences = []
        for _ in range(num_sequences):
            lengths = [num_rows]
            if not whole:
                room = num_rows - int(random.integers(0, 5))
                cuts = sorted({int(cut) for cut in random.integers(2, room - 1, 3)})
                lengths = list(np.diff([0, *cuts, room]))
            sequences.append([document(int(length)) for length in lengths])
        batches.append(micro_batch(sequences, num_rows))
    return batches


def loss_scales(batches: Sequence[MicroBatch], router_coefficient: float = 0.0) -> LossScales:
    """The factors of an optimizer step that consists of these micro-batches."""
    num_targets = sum(batch.num_targets for batch in batches)
    return LossScales(1 / num_targets, router_coefficient / len(batches))


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one round gives."""

    loss_sum: float
    num_targets: int
    gradients: dict[str, torch.Tensor]
    """Flat, by unit, summed over slots and micro-batches."""
    loads: tuple[RouterLoads | None, ...]
    """Of each micro-batch, over all layers."""


class PooledRound:
    """One round: forward slots, the fused slot, backward slots, each on the next device.

    A backward slot of grain keep runs where the forward slot of its layers ran.
    """

    def __init__(
        self,
        models: Sequence[TrainableModel],
        weights: Weights,
        slots: Sequence[Slot],
        grains: Sequence[RecomputeGrain],
        *,
        scales: LossScales,
        step: int = 0,
        first_micro_batch: int = 0,
    ) -> None:
        self._models = models
        self._weights = weights
        self._plan = list(zip(slots, grains, strict=True))
        self._scales = scales
        self._step = step
        self._first_micro_batch = first_micro_batch
        self._hidden: dict[tuple[int, int], torch.Tensor] = {}
        """(layer, micro-batch): the layer's input."""
        self._loads: dict[int, RouterLoads | None] = {}
        self._flowing: dict[int, torch.Tensor | None] = {}
        """By micro-batch: the gradient on its way back."""
        self._gradients: dict[str, torch.Tensor] = {}
        self._loss_sum = 0.0
        self._num_targets = 0

    def run(self, batches: Sequence[MicroBatch]) -> RoundResult:
        """Run the slots in order; another thread brings the weights of the next one meanwhile."""
        with ThreadPoolExecutor(1) as weights_thread:
            coming = weights_thread.submit(self._bring, 0)
            for index, (slot, grain) in enumerate(self._plan):
                model = self._models[self._device(index)]
                brought = coming.result()
                for name, pair in brought.items():
                    model.place(name, *pair)
                run = self._open(model, slot, grain)
                for name in brought:
                    model.remove(name)
                del brought, pair
                if index + 1 < len(self._plan):
                    coming = weights_thread.submit(self._bring, index + 1)
                for m, batch in enumerate(batches):
                    getattr(self, f"_{slot.kind}")(run, slot, grain, m, batch)
                for name, gradient in run.gradients().items():
                    total = self._gradients.get(name)
                    self._gradients[name] = gradient if total is None else total + gradient
        return RoundResult(
            self._loss_sum,
            self._num_targets,
            self._gradients,
            tuple(self._loads[m] for m in range(len(batches))),
        )

    def _bring(self, index: int) -> dict[str, tuple[Upload, Upload]]:
        slot, _ = self._plan[index]
        model = self._models[self._device(index)]
        names = model.unit_names(slot.kind, slot.first_layer, slot.end_layer)
        return {
            name: (model.upload(trained), model.upload(frozen))
            for name, (trained, frozen) in ((name, self._weights[name]) for name in names)
        }

    def _device(self, index: int) -> int:
        slot, grain = self._plan[index]
        if grain == "keep":
            [index] = [
                i
                for i, (other, _) in enumerate(self._plan)
                if other.kind == "forward"
                and (other.first_layer, other.end_layer) == (slot.first_layer, slot.end_layer)
            ]
        return index % len(self._models)

    def _open(self, model: TrainableModel, slot: Slot, grain: RecomputeGrain) -> SlotRun:
        saves: set[int] = set()
        is_kept = False
        for other, other_grain in self._plan:
            if other_grain in ("stage", "layer"):
                saves.add(other.first_layer)
            if other_grain == "layer":
                saves.update(range(other.first_layer, other.end_layer))
            same = (other.first_layer, other.end_layer) == (slot.first_layer, slot.end_layer)
            is_kept |= same and other_grain == "keep"
        return model.open_slot(
            slot.kind,
            slot.first_layer,
            slot.end_layer,
            grain=grain,
            saves=tuple(sorted(saves)),
            scales=self._scales,
            step=self._step,
            first_micro_batch=self._first_micro_batch,
            round_key="round",
            keep=is_kept and slot.kind == "forward",
        )

    def _forward(
        self, run: SlotRun, slot: Slot, _grain: RecomputeGrain, m: int, batch: MicroBatch
    ) -> None:
        hidden = self._hidden.get((slot.first_layer, m))
        result = run.forward(m, batch, hidden, self._loads.get(m))
        for layer, saved in result.saved.items():
            self._hidden[layer, m] = saved
        self._hidden[slot.end_layer, m] = result.hidden_BTH
        self._loads[m] = result.loads

    def _fused(
        self, run: SlotRun, slot: Slot, _grain: RecomputeGrain, m: int, batch: MicroBatch
    ) -> None:
        hidden = self._hidden.get((slot.first_layer, m))
        result = run.fused(m, batch, hidden, self._loads.get(m))
        self._loss_sum += result.loss_sum
        self._num_targets += result.num_targets
        self._flowing[m], self._loads[m] = result.gradient_BTH, result.loads

    def _backward(
        self, run: SlotRun, slot: Slot, grain: RecomputeGrain, m: int, batch: MicroBatch
    ) -> None:
        layers = range(
            slot.first_layer, slot.end_layer if grain == "layer" else slot.first_layer + 1
        )
        saved = {layer: self._hidden[layer, m] for layer in layers if layer and grain != "keep"}
        run.recompute(m, batch, saved)
        gradient = self._flowing[m]
        assert gradient is not None
        self._flowing[m] = run.backward(m, gradient, self._loads[m])


def documents_of(batch: MicroBatch) -> list[tuple[Tokens, Tokens]]:
    """(tokens, targets) of every document of a micro-batch, in order."""
    found = []
    for tokens, targets, numbers in zip(
        batch.tokens_BT, batch.targets_BT, batch.documents_BT, strict=True
    ):
        for number in dict.fromkeys(int(n) for n in numbers if n != PADDING):
            rows = numbers == number
            found.append((tokens[rows], targets[rows]))
    return found


def plain_gradients(
    model: Any, batches: Sequence[MicroBatch], router_coefficient: float = 0.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return (loss, gradients by parameter) of a step, every document run by itself.

    `model` is transformers' own; the loss is what `LossScales` describes.
    """
    scales = loss_scales(batches, router_coefficient)
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        logits_of_documents = []
        for tokens, targets in documents_of(batch):
            extra = {"output_router_logits": True} if scales.router else {}
            output = model(
                torch.from_numpy(tokens)[None],
                position_ids=torch.arange(len(tokens))[None],
                **extra,
            )
            total = total + scales.cross_entropy * torch.nn.functional.cross_entropy(
                output.logits[0], torch.from_numpy(targets), ignore_index=IGNORED, reduction="sum"
            )
            if scales.router:
                logits_of_documents.append(output.router_logits)
        if scales.router:
            layers = tuple(torch.cat(layer) for layer in zip(*logits_of_documents, strict=True))
            top_k = model.config.num_experts_per_tok
            loss = load_balancing_loss_func(layers, layers[0].shape[-1], top_k)
            total = total + scales.router * loss
    torch.autograd.backward(total)
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(total.detach()), gradients


def relative_errors(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return |actual - expected| / |expected| of each parameter (Frobenius norms)."""
    assert actual.keys() == expected.keys()
    return {
        name: float((actual[name] - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in expected.items()
    }
