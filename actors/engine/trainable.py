"""A checkpoint's model in units (embedding, layers, head) that come to a device and go again.

A unit's parameters arrive as flat tensors, of which a slot uses views while it computes. A slot
keeps what it was opened with: another version of a unit may be placed while it runs.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from actors.engine.checkpoint import Checkpoint
from actors.engine.experts import ExpertDispatcher
from actors.engine.lent_modules import LentModules, PlacedUnit
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import LORA_LIMITS, initial_weights, training_units
from actors.engine.training_values import (
    EMBEDDING_UNIT,
    HEAD_UNIT,
    LossScales,
    Unit,
    layer_unit,
)
from actors.engine.trainstep import Kept, KeptKey, SlotRun, Visit
from actors.engine.upload import Upload, Uploader
from placement.training import RecomputeGrain, SlotKind

__all__ = ["LORA_LIMITS", "TrainableModel", "initial_weights", "training_units"]


class TrainableModel:
    """One device's share of a training pool: any layers, whenever their units are placed.

    `upload`, `place` and `remove` may be called from another thread than the one that runs slots,
    which computes on the device's default stream.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        lora: LoraSettings | None = None,
        loss_chunk_tokens: int = 1024,
        seed: int = 0,
        experts: ExpertDispatcher | None = None,
    ) -> None:
        """`experts` run the rows of routed experts, which are then of no unit."""
        self.device = torch.device(device)
        self.dtype = dtype
        self._modules = LentModules(
            checkpoint, lora, dtype=dtype, device=self.device, experts=experts
        )
        self._loss_chunk_tokens = loss_chunk_tokens
        self._seed = seed
        self._placed: dict[str, PlacedUnit] = {}
        self._uploader = Uploader(self.device, dtype)
        self._kept: dict[KeptKey, Kept] = {}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The embedding, every layer and the head, in this order."""
        return tuple(self._modules.units.values())

    def unit_names(self, kind: SlotKind, first_layer: int, end_layer: int) -> tuple[str, ...]:
        """Return the units that a slot needs, in the order in which it first uses them."""
        layers = tuple(layer_unit(layer) for layer in range(first_layer, end_layer))
        embedding = (EMBEDDING_UNIT,) * (first_layer == 0)
        if kind != "fused":
            return embedding + layers
        tied = (EMBEDDING_UNIT,) * (self._modules.is_tied and first_layer > 0)
        return embedding + layers + tied + (HEAD_UNIT,)

    def upload(self, flat: torch.Tensor) -> Upload:
        """Start to bring a flat tensor to the device; give what is returned to `place`."""
        return self._uploader.upload(flat)

    def place(
        self,
        unit: str,
        trained: torch.Tensor | Upload | None,
        frozen: torch.Tensor | Upload | None,
    ) -> None:
        """Take a unit's flat tensors for the slots that are opened from here on.

        They are never written. One that is on the device in the model's type is viewed, not copied;
        others are brought there, on CUDA beside the compute. None: a tensor without values.

        Raises:
            ValueError: A tensor does not hold the unit's number of values.
        """
        uploads = [
            given if isinstance(given, Upload) else self.upload(_flat(given))
            for given in (trained, frozen)
        ]
        self._placed[unit] = PlacedUnit.of(self._modules.units[unit], uploads[0], uploads[1])

    def remove(self, unit: str) -> None:
        """Let go of a unit if it is placed; slots that are open keep theirs."""
        self._placed.pop(unit, None)

    def placed_bytes(self, unit: str) -> int:
        """Return the bytes that a unit's parameters take on the device, placed or not."""
        names = self._modules.units[unit]
        return (names.num_trained + names.num_frozen) * self.dtype.itemsize

    def open_slot(
        self,
        kind: SlotKind,
        first_layer: int,
        end_layer: int,
        *,
        grain: RecomputeGrain = "none",
        saves: tuple[int, ...] = (),
        scales: LossScales,
        step: int,
        first_micro_batch: int,
        round_key: Hashable = None,
        train: bool = True,
        keep: bool = False,
    ) -> SlotRun:
        """Return a slot over layers [first_layer, end_layer), with the units placed by now.

        `saves` are layers whose inputs a forward slot hands out, `first_micro_batch` is the index
        in the step of the round's micro-batch 0. With `keep` a forward slot keeps its activations,
        and the backward slot of grain keep over the same layers and `round_key` uses them up; it
        needs no placed units. Without `train` there is neither dropout nor gradient.

        Raises:
            ValueError: A unit is not placed, or the slot is impossible.
        """
        names = () if grain == "keep" else self.unit_names(kind, first_layer, end_layer)
        missing = [name for name in names if name not in self._placed]
        if missing:
            raise ValueError(
                f"{kind} slot [{first_layer}, {end_layer}) needs {', '.join(missing)}, which "
                "are not placed"
            )
        return SlotRun(
            self._modules,
            Visit(
                kind=kind,
                first_layer=first_layer,
                end_layer=end_layer,
                grain=grain,
                saves=saves,
                scales=scales,
                seeds=(self._seed, step, first_micro_batch),
                train=train,
                keep=keep,
                round_key=round_key,
                loss_chunk_tokens=self._loss_chunk_tokens,
            ),
            placed={name: self._placed[name] for name in names},
            kept=self._kept,
        )

    def drop_kept(self, round_key: Hashable) -> None:
        """Forget what forward slots kept for a round, if anything."""
        for key in [key for key in self._kept if key[0] == round_key]:
            del self._kept[key]


def _flat(given: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0) if given is None else given
