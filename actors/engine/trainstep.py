"""One visit of layers [a, b) in a round: forward, fused (with the loss and its backward), backward.

A slot runs micro-batches one at a time and adds up what they give its units' parameters, in
float32. Where its backward pass gets activations from is its grain: from a repeated forward pass of
all its layers (stage) or of one layer at a time (layer), or from the graph that a forward slot of
the same layers kept (keep). The gradients are the same.

Shapes: B sequences of a micro-batch, T rows each, S = B * T, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch

from actors.engine.chunked_loss import chunked_cross_entropy
from actors.engine.lent_modules import LentModules, PlacedUnit, Rows
from actors.engine.router_loss import router_gradient, router_loads, router_weights
from actors.engine.slot_gradients import SlotGradients
from actors.engine.training_units import counter_seed
from actors.engine.training_values import (
    EMBEDDING_UNIT,
    TIED_INPUT,
    LossScales,
    MicroBatch,
    RouterLoads,
)
from placement.training import RecomputeGrain, SlotKind


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a forward slot yields of one micro-batch."""

    hidden_BTH: torch.Tensor
    """Behind the slot's last layer."""
    saved: dict[int, torch.Tensor]
    """Inputs of the layers in `saves`; an input that the slot was itself given is not repeated."""
    loads: RouterLoads | None
    """Of all layers so far; None where the model has no routers."""


@dataclass(frozen=True, slots=True)
class FusedResult:
    """What the fused slot yields of one micro-batch."""

    loss_sum: float
    """Cross-entropy over the target tokens, not scaled."""
    num_targets: int
    gradient_BTH: torch.Tensor | None
    """Of the slot's input; None where that is the tokens, or without training."""
    loads: RouterLoads | None
    """Of all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What a slot is asked to do; `TrainableModel.open_slot` says what the fields mean."""

    kind: SlotKind
    first_layer: int
    end_layer: int
    grain: RecomputeGrain
    saves: tuple[int, ...]
    scales: LossScales
    seeds: tuple[int, int, int]
    """(seed of the run, step, index in the step of micro-batch 0)."""
    train: bool
    keep: bool
    round_key: Hashable
    loss_chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Layers that ran with gradients on, from a leaf to the hidden behind them."""

    first_layer: int
    entered_BTH: torch.Tensor
    hidden_BTH: torch.Tensor
    router_logits_SE: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """A graph that waits for its gradient, and what it was computed with."""

    graph: Graph
    rows: Rows
    placed: Mapping[str, PlacedUnit]
    saved: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Inputs of layers that are still to be repeated."""


KeptKey = tuple[Hashable, int, int, int]
"""(round, first layer, end layer, micro-batch)."""


class SlotRun:
    """One slot of one round on one device."""

    def __init__(
        self,
        modules: LentModules,
        visit: Visit,
        *,
        placed: Mapping[str, PlacedUnit],
        kept: dict[KeptKey, Kept],
    ) -> None:
        self._modules = modules
        self._visit = visit
        self._placed = placed
        self._kept = kept
        self._waiting: dict[int, Kept] = {}
        self._gradients = SlotGradients(modules, has_head=visit.kind == "fused")

    def forward(
        self,
        m: int,
        batch: MicroBatch,
        hidden_BTH: torch.Tensor | None,
        loads: RouterLoads | None = None,
    ) -> ForwardResult:
        """Run micro-batch `m` forward from `hidden_BTH`, or from its tokens where that is None."""
        visit = self._visit
        rows = self._modules.rows(batch)
        saved: dict[int, torch.Tensor] = {}
        with self._modules.lent(self._placed), torch.set_grad_enabled(visit.keep):
            entered = self._enter(rows, hidden_BTH)
            graph = self._run(m, rows, entered, visit.first_layer, visit.end_layer, saved)
        if visit.keep:
            self._kept[self._kept_key(m)] = Kept(graph, rows, self._placed)
        loads = self._loads(graph, rows, loads)
        return ForwardResult(graph.hidden_BTH.detach(), saved, loads)

    def fused(
        self,
        m: int,
        batch: MicroBatch,
        hidden_BTH: torch.Tensor | None,
        loads: RouterLoads | None = None,
    ) -> FusedResult:
        """Run micro-batch `m` forward, compute its loss and go back to the slot's input.

        Without training it ends with the loss.
        """
        visit, modules = self._visit, self._modules
        rows = modules.rows(batch)
        with (
            modules.lent(self._placed),
            torch.set_grad_enabled(visit.train),
            self._gradients.received_by(self._placed if visit.train else {}),
        ):
            entered = self._enter(rows, hidden_BTH)
            graph = self._run(m, rows, entered, visit.first_layer, visit.end_layer)
            loads = self._loads(graph, rows, loads)
            modules.set_head_dropout(self._dropout_seed(m, modules.num_layers))
            loss = chunked_cross_entropy(
                modules.logits,
                graph.hidden_BTH,
                batch.targets_BT,
                chunk_tokens=visit.loss_chunk_tokens,
                scale=visit.scales.cross_entropy if visit.train else None,
            )
            gradient = None
            if loss.gradient_BTH is not None:
                weights_E = self._router_weights(loads)
                gradient = self._through(graph, rows, loss.gradient_BTH, weights_E)
        return FusedResult(
            loss_sum=loss.loss_sum,
            num_targets=loss.num_targets,
            gradient_BTH=gradient if visit.first_layer else None,
            loads=loads,
        )

    def recompute(self, m: int, batch: MicroBatch, saved: Mapping[int, torch.Tensor]) -> None:
        """Repeat of micro-batch `m` what its backward pass begins with; needs no gradient yet.

        `saved` has the input of the slot's first layer, for grain layer of every layer; those of
        layer 0 are the batch's tokens. Grain keep repeats nothing.

        Raises:
            ValueError: Grain keep, but no forward slot kept this micro-batch on this device.
        """
        visit = self._visit
        if visit.grain == "keep":
            if self._kept_key(m) not in self._kept:
                raise ValueError(
                    f"layers [{visit.first_layer}, {visit.end_layer}) of micro-batch {m}, round "
                    f"{visit.round_key!r}, were not kept on this device; use grain stage"
                )
            self._waiting[m] = self._kept.pop(self._kept_key(m))
            return
        rows = self._modules.rows(batch)
        first = visit.first_layer if visit.grain == "stage" else visit.end_layer - 1
        graph = self._repeat(m, rows, saved, first, visit.end_layer)
        self._waiting[m] = Kept(graph, rows, self._placed, saved)

    def backward(
        self, m: int, gradient_BTH: torch.Tensor, loads: RouterLoads | None = None
    ) -> torch.Tensor | None:
        """Go back through micro-batch `m`, which `recompute` made ready.

        `gradient_BTH` is that of the hidden behind the slot, `loads` those of all the model's
        layers. Returns the gradient of the slot's input; None where that is the tokens.
        """
        waiting = self._waiting.pop(m)
        weights_E = self._router_weights(loads)
        gradient: torch.Tensor | None = gradient_BTH.to(self._modules.device, self._modules.dtype)
        graph = waiting.graph
        with self._gradients.received_by(waiting.placed):
            gradient = self._through(graph, waiting.rows, gradient, weights_E)
            if self._visit.grain == "layer":
                for layer in reversed(range(self._visit.first_layer, self._visit.end_layer - 1)):
                    graph = self._repeat(m, waiting.rows, waiting.saved, layer, layer + 1)
                    gradient = self._through(graph, waiting.rows, gradient, weights_E)
        return gradient if self._visit.first_layer else None

    def gradients(self, *, splits_tied: bool = False) -> dict[str, torch.Tensor]:
        """Return by unit the gradients of its trained parameters, summed over the micro-batches.

        Flat float32 tensors on the CPU, in the order of `Unit.trained`; units that have none are
        left out. With `splits_tied` a tied embedding's share as input comes as `TIED_INPUT`.
        """
        sums = self._gradients.take()
        if TIED_INPUT in sums and not splits_tied:
            sums[EMBEDDING_UNIT] += sums.pop(TIED_INPUT)
        return sums

    def _enter(self, rows: Rows, hidden_BTH: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the first layer; a leaf where something wants its gradient."""
        if hidden_BTH is not None:
            hidden = hidden_BTH.detach().to(self._modules.device, self._modules.dtype)
            return hidden.requires_grad_(torch.is_grad_enabled())
        is_trained = bool(self._modules.units[EMBEDDING_UNIT].trained)
        return self._modules.embed(rows).requires_grad_(is_trained and torch.is_grad_enabled())

    def _run(
        self,
        m: int,
        rows: Rows,
        entered_BTH: torch.Tensor,
        first_layer: int,
        end_layer: int,
        saved: dict[int, torch.Tensor] | None = None,
    ) -> Graph:
        hidden = entered_BTH
        with self._modules.router_logits.caught() as logits:
            for layer in range(first_layer, end_layer):
                if saved is not None and layer > first_layer and layer in self._visit.saves:
                    saved[layer] = hidden.detach()
                hidden = self._modules.run_layer(layer, hidden, rows, self._dropout_seed(m, layer))
        return Graph(first_layer, entered_BTH, hidden, logits)

    def _repeat(
        self, m: int, rows: Rows, saved: Mapping[int, torch.Tensor], first: int, end: int
    ) -> Graph:
        with self._modules.lent(self._placed), torch.enable_grad():
            return self._run(
                m, rows, self._enter(rows, saved[first] if first else None), first, end
            )

    def _through(
        self,
        graph: Graph,
        rows: Rows,
        gradient_BTH: torch.Tensor | None,
        weights_E: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Go back through a graph; returns the gradient of what it was entered with, if any."""
        outputs, gradients = [graph.hidden_BTH], [gradient_BTH]
        if weights_E is not None:
            outputs += graph.router_logits_SE
            gradients += [
                router_gradient(logits, rows.real_S, weights_E) for logits in graph.router_logits_SE
            ]
        wanted = [i for i, output in enumerate(outputs) if output.requires_grad]
        if wanted:
            torch.autograd.backward([outputs[i] for i in wanted], [gradients[i] for i in wanted])
        entered = graph.entered_BTH.grad
        if entered is not None and graph.first_layer == 0:
            self._gradients.add_embedding(rows, entered)
        return entered

    def _dropout_seed(self, m: int, layer: int) -> int | None:
        if not (self._visit.train and self._modules.has_dropout):
            return None
        seed, step, first_micro_batch = self._visit.seeds
        return counter_seed(seed, step, first_micro_batch + m, layer)

    def _loads(self, graph: Graph, rows: Rows, before: RouterLoads | None) -> RouterLoads | None:
        top_k = self._modules.router_logits.top_k
        own = router_loads(graph.router_logits_SE, rows.real_S, top_k)
        if own is None or before is None:
            return own or before
        return before + own

    def _router_weights(self, loads: RouterLoads | None) -> torch.Tensor | None:
        scale = self._visit.scales.router
        if not scale or not self._modules.router_logits.has_routers:
            return None
        if loads is None:
            raise ValueError("a router loss needs the loads of all layers; none were given")
        return router_weights(loads, scale, self._modules.device)

    def _kept_key(self, m: int) -> KeptKey:
        return (self._visit.round_key, self._visit.first_layer, self._visit.end_layer, m)
