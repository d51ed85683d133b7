"""Timing a checkpoint's layers on a device, with the slices that serve them.

A layer is timed as it runs in a stage: several equal layers one after another, so that its weights
come from memory and not from a cache that the layers between would have emptied. Up to
`LayerShape.most_sequences` rows it decodes, one row a sequence over paged KV; beyond, the rows are
one sequence's prompt, which is also the shape that is trained on, so those samples carry the
recompute, the backward pass and what the layer keeps for it. Knows no Ray.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from actors.engine.attention import PagedRows
from actors.engine.batch import Rows
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.measure import Effort, MeasureError, explaining_memory, finish, median_s
from actors.engine.slice import StageSlice, resolve_dtype
from placement.measured import LayerSample
from placement.profiles import Part
from placement.workload import LayerCost

COLD_BYTES = 256 * 2**20
"""Equal layers are timed in turn until they weigh this: more than the caches of a processor."""
KV_BYTES = 512 * 2**20
"""Most KV to allocate for a measurement; sequences share blocks beyond it."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of equal cost, or the head; `layers` are their indices, none for the head."""

    part: Part
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the rows of a step are."""

    most_sequences: int
    """Up to so many rows, each is a sequence that decodes; more are one prompt."""
    context_tokens: int
    """KV tokens of each decoding sequence."""


def layer_kinds(checkpoint: Checkpoint) -> list[LayerKind]:
    """Group the layers by cost, in order of appearance; the head comes last."""
    groups: dict[LayerCost, list[int]] = {}
    for index, cost in enumerate(checkpoint.profile(dtype_bytes=1).layers):
        groups.setdefault(cost, []).append(index)
    return [*(LayerKind("layer", tuple(group)) for group in groups.values()), LayerKind("head")]


class LayerMeter:
    """One kind of layer, loaded on a device and ready to be timed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: LayerKind,
        *,
        config: EngineConfig,
        device: str,
        shape: LayerShape,
        most_tokens: int,
        effort: Effort,
    ) -> None:
        self.kind = kind
        self._effort = effort
        self._shape = shape
        self._max_tokens = checkpoint.max_model_tokens
        self._context = min(shape.context_tokens, self._max_tokens)
        self._block_tokens = config.kv_block_tokens
        costs = checkpoint.profile(
            dtype_bytes=resolve_dtype(config.dtype, torch.device(device)).itemsize
        ).layers
        first, end = _run(kind, costs)
        block_bytes = self._block_tokens * sum(c.kv_bytes_per_token for c in costs[first:end])
        self._num_blocks = self._blocks_for(most_tokens, block_bytes)
        with explaining_memory(f"loading {kind.part} {list(kind.layers)}"):
            self.stage = StageSlice(
                checkpoint,
                first,
                end,
                config=config,
                num_kv_blocks=self._num_blocks,
                device=device,
            )
        self.device = self.stage.device
        self.hidden_size = int(checkpoint.config["hidden_size"])

    def sample(self, tokens: int) -> LayerSample:
        """Time a step of `tokens` rows."""
        if tokens < 1 or (tokens > self._shape.most_sequences and tokens > self._max_tokens):
            raise MeasureError(
                f"{tokens} tokens cannot be measured: a prompt of this checkpoint has 1 to "
                f"{self._max_tokens}; change --tokens"
            )
        with explaining_memory(f"a step of {tokens} tokens"):
            hidden_TH = torch.randn(
                tokens, self.hidden_size, device=self.device, dtype=self.stage.dtype
            )
            if self.kind.part == "head":
                return self._head_sample(hidden_TH)
            if tokens <= self._shape.most_sequences:
                forward_s = self._forward_s(hidden_TH, self._decoding(tokens))
                return LayerSample(
                    tokens=tokens, context_tokens=tokens * self._context, forward_s=forward_s
                )
            return self._prompt_sample(hidden_TH)

    def _decoding(self, tokens: int) -> list[Rows]:
        """One row each of `tokens` sequences; their blocks wrap round where memory is short."""
        each = -(-self._context // self._block_tokens)
        return [
            Rows(self._context - 1, 1, [(i * each + j) % self._num_blocks for j in range(each)])
            for i in range(tokens)
        ]

    def _blocks_for(self, most_tokens: int, block_bytes: int) -> int:
        """As many blocks as the largest step asks for, within `KV_BYTES` but never too few."""
        each = -(-self._context // self._block_tokens)
        prompt = -(-min(most_tokens, self._max_tokens) // self._block_tokens)
        wanted = each * min(most_tokens, self._shape.most_sequences)
        return max(each, prompt, min(wanted, KV_BYTES // max(1, block_bytes)))

    def _forward_s(self, hidden_TH: torch.Tensor, rows: list[Rows]) -> float:
        """Seconds of one layer: of all the loaded ones in turn, over their number."""
        stage = self.stage
        with torch.inference_mode():
            paged = PagedRows.build(rows, stage.kv[0], self.device)
            arguments = self._arguments(hidden_TH, paged.positions_T[None]) | {"paged": paged}

            def run() -> None:
                hidden = hidden_TH[None]
                for layer in stage.layers:
                    hidden = layer(hidden, **arguments)

            return median_s(run, self.device, self._effort) / len(stage.layers)

    def _arguments(self, hidden_TH: torch.Tensor, positions_1T: torch.Tensor) -> dict[str, Any]:
        return {
            "attention_mask": None,
            "position_ids": positions_1T,
            "position_embeddings": self.stage.rotary(hidden_TH[None], positions_1T),
        }

    def _prompt_sample(self, hidden_TH: torch.Tensor) -> LayerSample:
        tokens = hidden_TH.shape[0]
        blocks = list(range(-(-tokens // self._block_tokens)))
        forward_s = self._forward_s(hidden_TH, [Rows(0, tokens, blocks)])
        layer = self.stage.layers[0]
        with torch.no_grad():
            positions = torch.arange(tokens, device=self.device)[None]
            arguments = self._arguments(hidden_TH, positions)
        with _trained_attention(layer, tokens, arguments) as told:
            recompute_s, backward_s, activation_bytes = self._trained(
                layer, lambda rows: layer(rows[None], **told)[0], hidden_TH
            )
        return LayerSample(
            tokens=tokens,
            context_tokens=tokens,
            pairs=tokens * (tokens + 1) // 2,
            forward_s=forward_s,
            recompute_s=recompute_s,
            backward_s=backward_s,
            activation_bytes=activation_bytes,
        )

    def _head_sample(self, hidden_TH: torch.Tensor) -> LayerSample:
        stage, tokens = self.stage, hidden_TH.shape[0]
        norm, head = stage.norm, stage.head
        assert norm is not None
        assert head is not None
        forward_s = median_s(lambda: stage.logits(hidden_TH), self.device, self._effort)
        if tokens <= self._shape.most_sequences:
            return LayerSample(tokens=tokens, context_tokens=0, forward_s=forward_s)
        modules = torch.nn.ModuleList([norm, head])
        recompute_s, backward_s, activation_bytes = self._trained(
            modules, lambda rows: head(norm(rows)), hidden_TH
        )
        return LayerSample(
            tokens=tokens,
            context_tokens=0,
            pairs=0,
            forward_s=forward_s,
            recompute_s=recompute_s,
            backward_s=backward_s,
            activation_bytes=activation_bytes,
        )

    def _trained(
        self,
        module: torch.nn.Module,
        run: Callable[[torch.Tensor], torch.Tensor],
        hidden_TH: torch.Tensor,
    ) -> tuple[float, float, int]:
        """Return (forward with gradients on, backward alone, bytes kept between them)."""
        rows = hidden_TH.clone().requires_grad_()
        module.requires_grad_(True)
        try:
            kept = _kept_bytes(module, run, rows)
            forwards: list[float] = []
            backwards: list[float] = []
            end_s = time.perf_counter() + self._effort.budget_s
            while len(forwards) < self._effort.least_repeats or time.perf_counter() < end_s:
                start_s = time.perf_counter()
                out = run(rows)
                finish(self.device)
                middle_s = time.perf_counter()
                torch.autograd.backward(out, torch.ones_like(out))
                finish(self.device)
                forwards.append(middle_s - start_s)
                backwards.append(time.perf_counter() - middle_s)
        finally:
            module.zero_grad(set_to_none=True)
            module.requires_grad_(False)
        return statistics.median(forwards), statistics.median(backwards), kept


def _run(kind: LayerKind, costs: Sequence[LayerCost]) -> tuple[int, int]:
    """Return the neighbouring layers to load: enough to empty a cache, one for the head."""
    if kind.part == "head":
        return len(costs) - 1, len(costs)
    first = kind.layers[0]
    end, loaded_bytes = first, 0
    while end < len(costs) and costs[end] == costs[first] and loaded_bytes < COLD_BYTES:
        loaded_bytes += costs[end].weight_bytes
        end += 1
    return first, end


def _kept_bytes(
    module: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> int:
    """Run once forward and back; returns the bytes of all storages that the graph keeps.

    Parameters are held anyway; a storage that several tensors view is counted once.
    """
    held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(rows)
    torch.autograd.backward(out, torch.ones_like(out))
    return sum(kept.values())


@contextmanager
def _trained_attention(
    layer: torch.nn.Module, tokens: int, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Give a layer attention that has gradients for a while; yields the arguments it then takes.

    Paged attention writes into the KV in place, which autograd would follow from step to step.
    """
    attention: Any = layer.self_attn
    config = attention.config
    paged = config._attn_implementation
    # SDPA knows no attention sinks.
    has_sinks = hasattr(attention, "sinks")
    mask = None
    if has_sinks:
        embeddings = arguments["position_embeddings"][0]
        mask = torch.full((tokens, tokens), -math.inf, device=embeddings.device)
        mask = mask.triu(1).to(embeddings.dtype)[None, None]
    config._attn_implementation = "eager" if has_sinks else "sdpa"
    try:
        yield arguments | {"attention_mask": mask}
    finally:
        config._attn_implementation = paged
