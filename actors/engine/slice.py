"""Layers [first, end) of any supported Hugging Face decoder, and one step of them.

The architecture is built whole on the `meta` device (which costs no memory), all but the slice is
dropped, and only the slice's own tensors are read. transformers' layer modules do the work; this
file calls them in order over packed rows, with `motley_paged` attention and `motley_experts`.
Knows neither Ray nor sockets: it runs in a plain process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from actors.engine import sampling
from actors.engine.attention import ATTENTION_NAME, KVCache, PagedRows
from actors.engine.batch import StepBatch, StepBounds, StepResult
from actors.engine.checkpoint import EMBEDDING, HEAD, Checkpoint, TensorInfo
from actors.engine.config import EngineConfig
from actors.engine.experts import ExpertDispatcher, lend_experts
from actors.engine.lora import SliceAdapters
from actors.engine.requests import TokenLogprob
from actors.engine.skeleton import Progress, build_skeleton, by_columns, fill_parameters

_EMBED = "model.embed_tokens"
_NORM = "model.norm"
_HEAD = "lm_head"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch type of a settings word; auto is float32 on a CPU, bfloat16 on CUDA."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class StageSlice:
    """A contiguous slice of a checkpoint's layers with one KV cache a lane.

    `num_kv_blocks` is each lane's. `bytes_read` counts the tensor bytes taken
    from disk: the slice's own and no others. A slice made by `recut` shares layers and their KV
    with the one it came from; what neither of two needs goes with the last that has it.

    With `experts` its routed experts are elsewhere: they are neither allocated nor read, and the
    dispatcher runs their rows. Routers stay.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        first_layer: int,
        end_layer: int,
        *,
        config: EngineConfig,
        num_kv_blocks: int,
        num_lanes: int = 1,
        device: str = "cpu",
        on_progress: Progress | None = None,
        held: StageSlice | None = None,
        experts: ExpertDispatcher | None = None,
    ) -> None:
        if not 0 <= first_layer < end_layer <= checkpoint.num_layers:
            raise ValueError(
                f"layers [{first_layer}, {end_layer}) are not within the checkpoint's "
                f"[0, {checkpoint.num_layers})"
            )
        self.first_layer = first_layer
        self.end_layer = end_layer
        self.is_first = first_layer == 0
        self.is_last = end_layer == checkpoint.num_layers
        self._config = config
        self.device = torch.device(device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._checkpoint = checkpoint
        self._experts = experts
        model = build_skeleton(checkpoint, self.dtype, attention=ATTENTION_NAME)
        # Buffers (inverse frequencies) are computed, not stored, so they are built for real.
        self.rotary = type(model.model.rotary_emb)(config=model.config).to(self.device)
        names = [f"model.layers.{i}" for i in range(first_layer, end_layer)]
        names += [_EMBED] * self.is_first + [_NORM, _HEAD] * self.is_last
        shared = {} if held is None else held._modules
        self._modules: dict[str, Any] = {
            name: shared[name] if name in shared else model.get_submodule(name) for name in names
        }
        if experts is not None:
            lend_experts(model.model.layers, range(first_layer, end_layer), experts)
        self.bytes_read = self._load(
            {name: module for name, module in self._modules.items() if name not in shared},
            on_progress or (lambda _: None),
        )
        self.layers = [self._modules[name] for name in names[: end_layer - first_layer]]
        self.embedding = self._modules.get(_EMBED)
        self.norm = self._modules.get(_NORM)
        self.head = self._modules.get(_HEAD)
        self._bounds: StepBounds = (
            StepBounds(checkpoint.vocab_size, num_kv_blocks, config.kv_block_tokens)
            if held is None
            else held._bounds
        )
        if held is not None:
            # Last: where memory is short nothing keeps the new layers.
            self.kv: list[KVCache] = [
                cache.recut(range(first_layer, end_layer)) for cache in held.kv
            ]
            self.adapters: SliceAdapters = held.adapters
            self.adapters.cover(held._decoder_layers() | self._decoder_layers())
            return
        self.adapters = SliceAdapters(self._decoder_layers())
        attention = self.layers[0].self_attn
        self.kv = [
            KVCache(
                range(first_layer, end_layer),
                num_blocks=num_kv_blocks,
                block_tokens=config.kv_block_tokens,
                num_kv_heads=attention.k_proj.out_features // attention.head_dim,
                head_dim=attention.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            for _ in range(num_lanes)
        ]

    def recut(
        self, first_layer: int, end_layer: int, *, on_progress: Progress | None = None
    ) -> StageSlice:
        """Return the slice [first_layer, end_layer), which reads only what this one lacks.

        Both may run, and steps of this one beside the call, until `settle`.
        """
        return StageSlice(
            self._checkpoint,
            first_layer,
            end_layer,
            config=self._config,
            num_kv_blocks=0,
            device=str(self.device),
            on_progress=on_progress,
            held=self,
            experts=self._experts,
        )

    def settle(self, old: Iterable[StageSlice], later: Sequence[StageSlice] = ()) -> None:
        """Free what `old` slices have that neither this one nor later ones cut from it have; the
        old ones run no more."""
        kept = (self, *later)
        self.adapters.cover({n: m for slice_ in kept for n, m in slice_._decoder_layers().items()})
        names = {name for slice_ in kept for name in slice_._modules}
        for slice_ in old:
            slice_.kv = []
            for name in slice_._modules.keys() - names:
                for parameter in slice_._modules[name].parameters():
                    # Modules may hang in cycles, and a collector that was frozen sees none.
                    parameter.data = parameter.data.new_empty(0)

    @property
    def weight_bytes(self) -> int:
        return sum(
            parameter.numel() * parameter.element_size()
            for module in self._modules.values()
            for parameter in module.parameters()
        )

    @torch.inference_mode()
    def forward(
        self, batch: StepBatch, hidden_TH: torch.Tensor | None = None
    ) -> torch.Tensor | StepResult:
        """Run one step: hidden rows (T, H) for the next stage, or the last stage's result.

        The first stage takes token ids from the batch, the others `hidden_TH`.
        """
        hidden_TH = self.run_layers(batch, hidden_TH)
        return self._finish(batch, hidden_TH) if self.is_last else hidden_TH

    @torch.inference_mode()
    def run_layers(self, batch: StepBatch, hidden_TH: torch.Tensor | None) -> torch.Tensor:
        """Write the step's KV and return the rows behind the slice's last layer, (T, H).

        Runs with the adapter version that the step names.
        """
        batch.check_within(self._bounds)
        self.adapters.use(batch.adapter_version)
        cache = self.kv[batch.lane]
        cache.copy_blocks(batch.copies)
        paged = PagedRows.build(batch.rows, cache, self.device)
        hidden = self._enter(batch, hidden_TH)
        position_ids = paged.positions_T[None]
        position_embeddings = self.rotary(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                paged=paged,
            )
        return hidden[0]

    @torch.inference_mode()
    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Final norm and head over rows (T, H): (T, V). Last stage only."""
        assert self.norm is not None
        assert self.head is not None
        logits: torch.Tensor = self.head(self.norm(hidden_TH))
        return logits

    def _enter(self, batch: StepBatch, hidden_TH: torch.Tensor | None) -> torch.Tensor:
        if self.embedding is not None:
            tokens = torch.tensor(batch.tokens, device=self.device)
            hidden: torch.Tensor = self.embedding(tokens)[None]
            return hidden
        if hidden_TH is None or hidden_TH.shape[0] != batch.num_tokens:
            rows = None if hidden_TH is None else hidden_TH.shape[0]
            raise ValueError(f"step {batch.step}: {rows} hidden rows for {batch.num_tokens} tokens")
        return hidden_TH.to(self.device, self.dtype)[None]

    def _finish(self, batch: StepBatch, hidden_TH: torch.Tensor) -> StepResult:
        """Score prompts, then draw one token a drawing sequence."""
        starts = [0]
        for rows in batch.rows:
            starts.append(starts[-1] + rows.length)
        scored = [
            self._score(hidden_TH[starts[i] : starts[i] + len(targets)], targets, k)
            for (i, k), targets in zip(batch.prompt_logprobs, batch.targets, strict=True)
        ]
        if not batch.drawn:
            return StepResult([], [], scored)
        logits = self.logits(hidden_TH[[starts[i + 1] - 1 for i in batch.drawn]])
        tokens = sampling.sample(logits, batch.draws)
        entries: list[TokenLogprob | None] = []
        if any(draw.logprobs >= 0 for draw in batch.draws):
            entries = sampling.logprobs(logits, tokens, [draw.logprobs for draw in batch.draws])
        return StepResult(tokens, entries, scored)

    def _score(self, hidden_TH: torch.Tensor, targets: list[int], k: int) -> list[TokenLogprob]:
        entries = sampling.logprobs(self.logits(hidden_TH), targets, [k] * len(targets))
        return [entry for entry in entries if entry is not None]

    def _decoder_layers(self) -> dict[str, Any]:
        names = [f"model.layers.{i}" for i in range(self.first_layer, self.end_layer)]
        return {name: self._modules[name] for name in names}

    def _load(self, modules: Mapping[str, torch.nn.Module], on_progress: Progress) -> int:
        """Materialise modules from their own tensors; returns the bytes read."""
        for module in modules.values():
            module.to_empty(device=self.device)
            module.requires_grad_(False)
            if self.device.type == "cpu":
                _store_by_columns(module)
        pending = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        owned = [
            info
            for info in self._checkpoint.owned(self.first_layer, self.end_layer)
            if self._targets(info, modules) and not self._is_elsewhere(info)
        ]
        return fill_parameters(
            self._checkpoint,
            owned,
            pending,
            targets=lambda info: self._targets(info, modules),
            on_progress=on_progress,
        )

    def _is_elsewhere(self, info: TensorInfo) -> bool:
        return self._experts is not None and ".experts." in info.parameter

    def _targets(self, info: TensorInfo, modules: Mapping[str, torch.nn.Module]) -> list[str]:
        """Parameters of these modules that a stored tensor fills; a tied embedding is the head
        too."""
        names = [info.parameter]
        if info.parameter == EMBEDDING and not self._checkpoint.has_own_head:
            names = [EMBEDDING] * self.is_first + [HEAD] * self.is_last
        return [name for name in names if _module_of(name) in modules]


def _module_of(parameter: str) -> str:
    """Return which of a slice's modules a parameter belongs to."""
    parts = parameter.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else parameter.rpartition(".")[0]


def _store_by_columns(root: torch.nn.Module) -> None:
    """Lay matrices out as few rows are multiplied fastest; shapes and values stay the same."""
    for module in root.modules():
        is_matrix = isinstance(module, torch.nn.Linear)
        is_experts = getattr(module, "is_transposed", None) is False
        for parameter in module.parameters(recurse=False):
            if (is_matrix or is_experts) and parameter.ndim >= 2:
                parameter.data = by_columns(parameter)
