"""Slots that hold routed experts of any mixture-of-experts layer of a checkpoint.

The experts of all its layers have one shape, so a slot takes any expert of any layer: a device that
is to hold n of each layer and change c of them while it computes has n x layers + c slots. An
expert is read into a free slot beside running computation; only its own bytes are read.

Rows run as in `actors.engine.experts`, by the same code over matrices laid out alike, so a result
does not depend on who holds the expert.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from actors.engine.attention import ATTENTION_NAME
from actors.engine.checkpoint import Checkpoint, TensorInfo
from actors.engine.expert_calls import ExpertError
from actors.engine.experts import experts_module, run_expert, run_experts, weight_names
from actors.engine.fingerprint import expert_fingerprint
from actors.engine.skeleton import build_skeleton, by_columns, fill_expert

Weights = tuple[torch.Tensor, ...]
"""Of one expert: gate-up and down matrix, and their biases where it has any."""


@dataclass(slots=True)
class _Reading:
    """An expert that is not whole yet."""

    slot: Weights
    chunks: Iterator[torch.Tensor]
    values_left: int


class ExpertSlots:
    """A fixed number of slots on one device. `load` may run beside everything else."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Allocate the slots, and read nothing yet.

        Raises:
            ExpertError: No slot, or a model without routed experts of one shape.
        """
        if num_slots < 1:
            raise ExpertError(f"num_slots ({num_slots}) must be at least 1 to hold an expert")
        self._checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype
        model = build_skeleton(checkpoint, dtype, attention=ATTENTION_NAME)
        modules = {i: experts_module(layer) for i, layer in enumerate(model.model.layers)}
        self.layers = tuple(i for i, module in modules.items() if module is not None)
        """Those that have routed experts."""
        shapes = {
            tuple(parameter.shape for parameter in modules[i].parameters()) for i in self.layers
        }
        if len(shapes) != 1:
            raise ExpertError(
                f"{checkpoint.path} has routed experts of {len(shapes)} shapes, slots have one; "
                "serve it without expert devices"
            )
        self._module = modules[self.layers[0]]
        self._names = weight_names(self._module)
        self.num_experts = int(self._module.num_experts)
        self.hidden_size = int(checkpoint.config["hidden_size"])
        self.fingerprint = expert_fingerprint(checkpoint)
        self.bytes_read = 0
        """Tensor bytes taken from disk."""
        self._stored = _stored_by_expert(checkpoint)
        self._loading = threading.Lock()
        """Held while an expert is read."""
        self._placing = threading.Lock()
        """Never held for long."""
        self._free = [self._slot() for _ in range(num_slots)]
        self._held: dict[tuple[int, int], Weights] = {}
        self._begun: dict[tuple[int, int], _Reading] = {}
        self.num_slots = num_slots

    @property
    def slot_bytes(self) -> int:
        """What one slot takes of the device's memory."""
        with self._placing:
            begun = [reading.slot for reading in self._begun.values()]
            slot = next(iter([*self._free, *self._held.values(), *begun]))
        return sum(part.numel() * part.element_size() for part in slot)

    @property
    def held(self) -> frozenset[tuple[int, int]]:
        """The (layer, expert) that are ready."""
        with self._placing:
            return frozenset(self._held)

    @property
    def taken(self) -> frozenset[tuple[int, int]]:
        """The (layer, expert) that have a slot, whole or not."""
        with self._placing:
            return frozenset(self._held.keys() | self._begun.keys())

    def load(self, layer: int, expert: int, *, share: float = 1.0) -> None:
        """Read an expert into a free slot, from where it stopped until this share of it is there.

        It is held once it is whole; nothing happens where it is already.

        Raises:
            ExpertError: No such expert, or no free slot.
            CheckpointError: Its tensors do not fit the architecture.
        """
        self.check_exists(layer, expert)
        key = layer, expert
        with self._loading:
            if key in self.held:
                return
            reading = self._begun.get(key) or self._begin(key)
            try:
                self._go_on(reading, share)
            except BaseException:
                self._give_back(key)
                raise
            if not reading.values_left:
                with self._placing:
                    self._held[key] = self._begun.pop(key).slot

    def drop(self, layer: int, expert: int) -> None:
        """Free an expert's slot, which nobody uses any more, whether it is whole or not."""
        with self._placing:
            slot = self._held.pop((layer, expert), None)
            if slot is not None:
                self._free.append(slot)
                return
        with self._loading:
            self._give_back((layer, expert))

    def run(
        self, layer: int, experts: Sequence[tuple[int, int]], rows_SH: torch.Tensor
    ) -> torch.Tensor:
        """Run rows sorted by expert, (expert, how many) one after another: (S, H).

        As between stages, rows of another type are converted, and back.

        Raises:
            ExpertError: An expert is not held, or the rows do not fit.
        """
        weights = self._weights(layer, experts, rows_SH)
        with torch.inference_mode():
            own_SH = rows_SH.to(self.device, self.dtype)
            out_SH = run_experts(self._module, weights.__getitem__, experts, own_SH)
            return out_SH.to(rows_SH.device, rows_SH.dtype)

    def backward(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        rows_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
        *,
        of_weights: bool = True,
    ) -> tuple[torch.Tensor, dict[int, Weights]]:
        """Return the gradient of the rows, (S, H), and of each expert's weights if asked.

        `gradient_SH` is that of what `run` returned for these rows, which runs again here.

        Raises:
            ExpertError: As `run`.
        """
        weights = self._weights(layer, experts, rows_SH)
        self._weights(layer, experts, gradient_SH)
        counts = [count for _, count in experts]
        pairs = zip(torch.split(rows_SH, counts), torch.split(gradient_SH, counts), strict=True)
        into_rows, into_weights = [], {}
        for (expert, _), (rows, gradient) in zip(experts, pairs, strict=True):
            own = rows.to(self.device, self.dtype)
            leaf = own.detach().requires_grad_()
            parts = [part.detach().requires_grad_(of_weights) for part in weights[expert]]
            with torch.enable_grad():
                out = run_expert(self._module, parts, leaf)
            wanted = [leaf, *parts] if of_weights else [leaf]
            of_rows, *of_parts = torch.autograd.grad(
                out, wanted, gradient.to(self.device, self.dtype)
            )
            into_rows.append(of_rows)
            if of_weights:
                into_weights[expert] = tuple(of_parts)
        return torch.cat(into_rows).to(rows_SH.device, rows_SH.dtype), into_weights

    def check_exists(self, layer: int, expert: int) -> None:
        """Raise ExpertError for a layer or an expert that the checkpoint has not."""
        if layer not in self.layers:
            raise ExpertError(
                f"layer {layer} has no routed experts; {self._checkpoint.path.name} has some in "
                f"{list(self.layers)}"
            )
        if not 0 <= expert < self.num_experts:
            raise ExpertError(
                f"layer {layer} has no expert {expert}; {self._checkpoint.path.name} has "
                f"{self.num_experts} a layer"
            )

    def _weights(
        self, layer: int, experts: Sequence[tuple[int, int]], rows_SH: torch.Tensor
    ) -> dict[int, Weights]:
        """Check that rows can run, and return the weights that they need."""
        num_rows = sum(count for _, count in experts)
        if rows_SH.shape != (num_rows, self.hidden_size):
            raise ExpertError(
                f"rows of shape {tuple(rows_SH.shape)} for layer {layer}; its experts take "
                f"{(num_rows, self.hidden_size)}, is it another model's?"
            )
        with self._placing:
            found = {expert: self._held.get((layer, expert)) for expert, _ in experts}
        weights = {expert: slot for expert, slot in found.items() if slot is not None}
        if len(weights) < len(found):
            missing = sorted(found.keys() - weights.keys())
            raise ExpertError(
                f"experts {missing} of layer {layer} are not loaded here; load them, or send their "
                "rows to who holds them"
            )
        return weights

    def _slot(self) -> Weights:
        parts = []
        for name in self._names:
            shape = getattr(self._module, name).shape[1:]
            part = torch.empty(shape, dtype=self.dtype, device=self.device)
            is_turned = part.ndim == 2 and self.device.type == "cpu"
            parts.append(by_columns(part) if is_turned and not self._module.is_transposed else part)
        return tuple(parts)

    def _begin(self, key: tuple[int, int]) -> _Reading:
        layer, expert = key
        with self._placing:
            if not self._free:
                raise ExpertError(
                    f"expert {expert} of layer {layer} finds all {self.num_slots} slots taken; "
                    "drop one, or give the device more slots"
                )
            slot = self._free.pop()
            reading = self._begun[key] = _Reading(slot, iter(()), sum(p.numel() for p in slot))
        stored = self._stored.get((layer, None), []) + self._stored.get(key, [])
        parts = dict(zip(self._names, slot, strict=True))
        try:
            reading.chunks = fill_expert(self._checkpoint, stored, expert, self.num_experts, parts)
        except BaseException:
            self._give_back(key)
            raise
        return reading

    def _go_on(self, reading: _Reading, share: float) -> None:
        values = sum(part.numel() for part in reading.slot)
        is_whole = share >= 1.0
        # To the end also when all values are there: whether they all are is checked last.
        while is_whole or values - reading.values_left < share * values:
            chunk = next(reading.chunks, None)
            if chunk is None:
                return
            reading.values_left -= chunk.numel()
            self.bytes_read += chunk.numel() * chunk.element_size()

    def _give_back(self, key: tuple[int, int]) -> None:
        """Free the slot of an expert that is not whole."""
        with self._placing:
            reading = self._begun.pop(key, None)
            if reading is not None:
                self._free.append(reading.slot)


def _stored_by_expert(
    checkpoint: Checkpoint,
) -> dict[tuple[int | None, int | None], list[TensorInfo]]:
    """Return the expert tensors by layer and expert; no expert: those that hold all of a layer."""
    stored: dict[tuple[int | None, int | None], list[TensorInfo]] = {}
    for info in checkpoint.tensors:
        if ".experts." in info.parameter:
            stored.setdefault((info.layer, info.expert), []).append(info)
    return stored
