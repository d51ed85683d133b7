"""transformers' modules on `meta`, to which parameters are lent for as long as something runs.

Several versions of a unit may be on a device at once: what runs says which it uses.

Shapes: B sequences of a micro-batch, T rows each, S = B * T, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch.nn import functional

from actors.engine.checkpoint import EMBEDDING, HEAD, Checkpoint
from actors.engine.experts import ExpertDispatcher
from actors.engine.packed_attention import PackedDocuments
from actors.engine.router_loss import RouterLogits
from actors.engine.training_config import LoraSettings
from actors.engine.training_units import model_units, split_flat, stored_name, training_skeleton
from actors.engine.training_values import PADDING, MicroBatch, Unit
from actors.engine.upload import Upload


@dataclass(frozen=True, slots=True)
class PlacedUnit:
    """A unit's parameters on the device."""

    trained: tuple[torch.nn.Parameter, ...]
    """In the order of `Unit.trained`."""
    frozen: tuple[torch.nn.Parameter, ...]
    uploads: tuple[Upload, ...]
    """What must have arrived before they are used."""

    @classmethod
    def of(cls, unit: Unit, trained: Upload, frozen: Upload) -> PlacedUnit:
        """View a unit's flat tensors as its parameters; nothing is copied.

        Raises:
            ValueError: A tensor does not hold the unit's number of values.
        """
        for upload, expected in ((trained, unit.num_trained), (frozen, unit.num_frozen)):
            if upload.flat.numel() != expected:
                raise ValueError(
                    f"unit {unit.name!r} was given {upload.flat.numel()} of {expected} values"
                )
        return cls(
            trained=tuple(map(torch.nn.Parameter, split_flat(trained.flat, unit.trained))),
            frozen=tuple(
                torch.nn.Parameter(view, requires_grad=False)
                for view in split_flat(frozen.flat, unit.frozen)
            ),
            uploads=(trained, frozen),
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch on the device, prepared once and used by every layer."""

    batch: MicroBatch
    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    rotary: Any
    """What the model's rotary embedding returns for the positions."""
    packed: PackedDocuments
    real_S: torch.Tensor
    """False where a row is padding."""


@dataclass(frozen=True, slots=True)
class _Owner:
    """A module's attribute that the unit's parameter `index` is lent to; `empty` is on `meta`."""

    index: int
    module: torch.nn.Module
    attribute: str
    empty: torch.nn.Parameter | None


class LentModules:
    """The embedding, layers and head of a checkpoint without weights of their own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        lora: LoraSettings | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        experts: ExpertDispatcher | None = None,
    ) -> None:
        """`experts` run the rows of routed experts, which are then elsewhere."""
        model = training_skeleton(checkpoint, lora, dtype, experts=experts)
        self.device = device
        self.dtype = dtype
        self.num_layers = checkpoint.num_layers
        self.is_tied = not checkpoint.has_own_head
        self.units = {unit.name: unit for unit in model_units(checkpoint, model, lora)}
        self.router_logits = RouterLogits(model)
        self.has_dropout = _has_dropout(model.config, lora)
        self._layers: Sequence[torch.nn.Module] = model.model.layers
        self._embedding: torch.nn.Embedding = model.model.embed_tokens
        self._head = torch.nn.Sequential(model.model.norm, model.lm_head)
        # Buffers (inverse frequencies) are computed, not stored, so they are built for real.
        self._rotary = type(model.model.rotary_emb)(config=model.config).to(device)
        self._owners = {unit.name: self._find_owners(model, unit) for unit in self.units.values()}
        model.train()

    @property
    def padding_token(self) -> int | None:
        """The token whose embedding has no gradient, as `torch.nn.Embedding` defines it."""
        return self._embedding.padding_idx

    @contextmanager
    def lent(self, placed: Mapping[str, PlacedUnit]) -> Iterator[None]:
        """Lend parameters to the modules until the block ends."""
        owners = [(owner, name) for name in placed for owner in self._owners[name]]
        for unit in placed.values():
            for upload in unit.uploads:
                upload.wait()
        for owner, name in owners:
            parameters = placed[name].trained + placed[name].frozen
            owner.module._parameters[owner.attribute] = parameters[owner.index]
        try:
            yield
        finally:
            for owner, _ in owners:
                owner.module._parameters[owner.attribute] = owner.empty

    @torch.no_grad()
    def rows(self, batch: MicroBatch) -> Rows:
        """Bring a micro-batch to the device."""
        positions_BT = self._bring(batch.positions_BT)
        # The rotary embedding asks its first argument for type and device alone.
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return Rows(
            batch=batch,
            tokens_BT=self._bring(batch.tokens_BT),
            positions_BT=positions_BT,
            rotary=self._rotary(like, positions_BT),
            packed=PackedDocuments(batch.documents_BT),
            real_S=self._bring(batch.documents_BT.reshape(-1) != PADDING),
        )

    @torch.no_grad()
    def embed(self, rows: Rows) -> torch.Tensor:
        """Return the input of layer 0, (B, T, H), without a gradient to the embedding."""
        return functional.embedding(rows.tokens_BT, self._embedding.weight)

    def run_layer(
        self, layer: int, hidden_BTH: torch.Tensor, rows: Rows, dropout_seed: int | None
    ) -> torch.Tensor:
        """Run one layer; what dropout draws depends on the seed alone. None: no dropout."""
        module = self._layers[layer]
        self._set_dropout(module, dropout_seed)
        hidden: torch.Tensor = module(
            hidden_BTH,
            attention_mask=None,
            position_ids=rows.positions_BT,
            position_embeddings=rows.rotary,
            packed=rows.packed,
        )
        return hidden

    def logits(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Final norm and head over rows (R, H): (R, V)."""
        logits: torch.Tensor = self._head(rows_RH)
        return logits

    def set_head_dropout(self, dropout_seed: int | None) -> None:
        """Do for the head what `run_layer` does for a layer."""
        self._set_dropout(self._head, dropout_seed)

    def _bring(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """Copy to the device; on CUDA without waiting for what it computes."""
        tensor = torch.tensor(values)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _set_dropout(self, module: torch.nn.Module, seed: int | None) -> None:
        if not self.has_dropout:
            return
        module.train(seed is not None)
        if seed is None:
            return
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _find_owners(self, model: Any, unit: Unit) -> list[_Owner]:
        modules = dict(model.named_modules())
        heads = [name for name, _ in model.named_parameters() if stored_name(name) == HEAD]
        owners = []
        for index, info in enumerate(unit.trained + unit.frozen):
            is_shared = self.is_tied and info.name == EMBEDDING
            for name in (info.name, *heads) if is_shared else (info.name,):
                path, _, attribute = name.rpartition(".")
                module = modules[path]
                empty = module._parameters[attribute]
                owners.append(_Owner(index, module, attribute, empty))
        return owners


def _has_dropout(config: Any, lora: LoraSettings | None) -> bool:
    """Whether training draws random numbers; a setting that no layer reads costs little."""
    rates = [
        value
        for name, value in config.to_dict().items()
        if ("drop" in name or "jitter" in name) and isinstance(value, int | float)
    ]
    return any(rates) or (lora is not None and lora.dropout > 0)
