"""Adapters in a slice: PEFT's own LoRA layers around the slice's linear layers, unmerged.

Every version of an adapter has layers of its own around the same base layers, and a version is
used by putting its layers into the slice's modules. So version 0 is the slice as it was loaded,
bit for bit and as fast, and switching costs an assignment a module.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from actors.engine.adapter import Adapter, AdapterError, Matrix
from actors.engine.attention import ATTENTION_NAME
from actors.engine.checkpoint import Checkpoint
from actors.engine.skeleton import build_skeleton

_NONE = -1
_NAME = "motley"
"""What PEFT calls the one adapter of each layer."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a linear layer hangs in the slice."""

    parent: torch.nn.Module
    attribute: str
    base: torch.nn.Linear

    def put(self, layer: torch.nn.Module) -> None:
        setattr(self.parent, self.attribute, layer)


class SliceAdapters:
    """The adapters of one slice by version; version 0 is none.

    `load` may run beside a step (on another thread), `use` only between steps.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module]) -> None:
        """`layers` are the slice's decoder layers by their names, as model.layers.3."""
        self._slots = _slots(layers)
        self._layers = sorted(_number(prefix) for prefix in layers)
        self._adapters: dict[int, Adapter] = {}
        self._versions: dict[int, dict[str, torch.nn.Module]] = {0: {}}
        self._used = 0
        self._loading = threading.Lock()
        self._placing = threading.Lock()
        """Never held for long: a step may wait for it."""

    def cover(self, layers: Mapping[str, torch.nn.Module]) -> None:
        """Adapt these layers from now on; versions that are loaded are made for new ones too.

        Layers that are left out go on as they are, with the version in use.

        Raises:
            AdapterError: As `load`.
        """
        with self._loading:
            new = {prefix: layer for prefix, layer in layers.items() if not self._has(prefix)}
            slots = {n: s for n, s in self._slots.items() if _prefix(n) in layers} | _slots(new)
            versions: dict[int, dict[str, torch.nn.Module]] = {0: {}}
            for version, adapter in self._adapters.items():
                names = _adapted(adapter, [_number(prefix) for prefix in new])
                made = self._wrap(adapter, names, slots)
                old = {n: m for n, m in self._versions[version].items() if n in slots}
                versions[version] = old | made
            with self._placing:
                self._slots, self._versions = slots, versions
                self._layers = sorted(_number(prefix) for prefix in layers)
                # The new layers hang there unadapted: the next step puts its version into all.
                self._used = _NONE

    def _has(self, prefix: str) -> bool:
        return _number(prefix) in self._layers

    @property
    def versions(self) -> tuple[int, ...]:
        """The loaded versions, 0 among them."""
        return tuple(sorted(self._versions))

    def modules(self, version: int) -> tuple[str, ...]:
        """The names of the slice's modules that a loaded version adapts."""
        return tuple(self._versions[version])

    def load(self, version: int, adapter: Adapter, *, keep: int) -> None:
        """Make a version ready for use; of those before it only `keep` stays.

        Takes the slice's own matrices and no others.

        Raises:
            AdapterError: The slice has no such linear layer, or one of another shape.
        """
        with self._loading:
            made = self._wrap(adapter, _adapted(adapter, self._layers), self._slots)
            kept = {old: self._versions[old] for old in {0, keep}}
            self._versions = kept | {version: made}
            held = {old: self._adapters[old] for old in {keep} & self._adapters.keys()}
            self._adapters = held | {version: adapter}

    def use(self, version: int) -> None:
        """Run the next steps with a loaded version.

        Raises:
            ValueError: It is not loaded.
        """
        if version == self._used:
            return
        with self._placing:
            made = self._versions.get(version)
            if made is None:
                raise ValueError(
                    f"adapter version {version} is not loaded; there are {list(self.versions)}"
                )
            for name, slot in self._slots.items():
                slot.put(made.get(name, slot.base))
            self._used = version

    @staticmethod
    def _wrap(
        adapter: Adapter, names: Collection[str], slots: Mapping[str, _Slot]
    ) -> dict[str, torch.nn.Module]:
        """Return PEFT's layers around the slice's own; the slice itself is left as it is."""
        if not names:
            return {}
        bases = {}
        for name in names:
            if name not in slots:
                raise AdapterError(f"adapter {adapter.name}: the model has no linear layer {name}")
            bases[name] = slots[name].base
        tree = _tree(bases)
        inject_adapter_in_model(_config(adapter, bases), tree, _NAME, low_cpu_mem_usage=True)
        made = _lora_layers(tree)
        for name, layer in made.items():
            _check_shapes(adapter, name, layer, f"adapter {adapter.name}")
            a, b = adapter.pairs[name]
            device = bases[name].weight.device
            layer.lora_A[_NAME].weight = _parameter(a, adapter, device)
            layer.lora_B[_NAME].weight = _parameter(b, adapter, device)
            layer.eval()
        return made


def _slots(layers: Mapping[str, torch.nn.Module]) -> dict[str, _Slot]:
    return {
        f"{prefix}.{name}": _Slot(
            layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module
        )
        for prefix, layer in layers.items()
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _adapted(adapter: Adapter, layers: Iterable[int]) -> list[str]:
    return [name for number in layers for name in adapter.modules(number, number + 1)]


def _prefix(name: str) -> str:
    """Return model.layers.3 of model.layers.3.self_attn.q_proj."""
    return ".".join(name.split(".")[:3])


def _number(prefix: str) -> int:
    return int(prefix.rpartition(".")[2])


def check_fits(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Check that PEFT would put the adapter's matrices, and no others, onto the checkpoint.

    Builds the model without its weights.

    Raises:
        AdapterError: A target that the model lacks, or a matrix too few, too many or of another
            shape.
    """
    model = build_skeleton(checkpoint, torch.float32, attention=ATTENTION_NAME)
    root = torch.nn.Module()
    root.model = model.model
    root.lm_head = model.lm_head
    where = f"adapter {adapter.name} on {checkpoint.path.name}"
    _check_targets(adapter, root, where)
    try:
        inject_adapter_in_model(_config(adapter), root, _NAME, low_cpu_mem_usage=True)
    except (ValueError, TypeError, re.error) as error:
        raise AdapterError(f"{where}: {error}") from error
    expected = _lora_layers(root)
    for name, layer in expected.items():
        if not isinstance(layer.get_base_layer(), torch.nn.Linear) or name == "lm_head":
            raise AdapterError(
                f"{where}: {name} is not supported; linear layers inside model.layers are"
            )
        if name not in adapter.pairs:
            raise AdapterError(
                f"{where}: target_modules covers {name}, but its matrices are missing"
            )
        _check_shapes(adapter, name, layer, where)
    unknown = sorted(adapter.pairs.keys() - expected.keys())
    if unknown:
        raise AdapterError(
            f"{where}: {len(unknown)} of its modules are not among the model's targets, "
            f"{unknown[0]} for one; is it another base model's?"
        )


def _check_shapes(adapter: Adapter, name: str, layer: Any, where: str) -> None:
    for side, matrix in zip("AB", adapter.pairs[name], strict=True):
        wanted = tuple(getattr(layer, f"lora_{side}")[_NAME].weight.shape)
        if matrix.shape != wanted:
            raise AdapterError(
                f"{where}: lora_{side} of {name} has shape {matrix.shape}, {wanted} fits; is it "
                "another base model's?"
            )


def _check_targets(adapter: Adapter, root: torch.nn.Module, where: str) -> None:
    """PEFT is content when one of several target modules exists; here each must."""
    targets = adapter.config["target_modules"]
    kinds: dict[str, set[type]] = {}
    for name, module in root.named_modules():
        parts = name.split(".")
        for start in range(len(parts)):
            kinds.setdefault(".".join(parts[start:]), set()).add(type(module))
    for target in () if isinstance(targets, str) else targets:
        if target not in kinds:
            raise AdapterError(f"{where}: the model has no module {target!r} (target_modules)")
        if torch.nn.Linear not in kinds[target]:
            raise AdapterError(
                f"{where}: target_modules has {target!r}, in the model a "
                f"{min(kind.__name__ for kind in kinds[target])}; only linear layers are supported"
            )


def _config(adapter: Adapter, names: Iterable[str] | None = None) -> LoraConfig:
    """Return PEFT's settings; with `names` for exactly these modules."""
    given = adapter.config
    options: dict[str, Any] = {
        "r": given["r"],
        "lora_alpha": given["lora_alpha"],
        "use_rslora": bool(given.get("use_rslora")),
        "init_lora_weights": False,
        "inference_mode": True,
    }
    placing = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    for option in ("rank_pattern", "alpha_pattern"):
        options[option] = dict(given.get(option) or {})
    if names is None:
        options |= {option: given.get(option) for option in placing}
        return LoraConfig(**options)
    names = list(names)
    for option in ("rank_pattern", "alpha_pattern"):
        # PEFT warns of patterns that match no module; here they belong to other slices.
        options[option] = {
            pattern: value
            for pattern, value in options[option].items()
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        }
    return LoraConfig(target_modules=names, **options)


def _tree(modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """Hang modules into a tree of their own under their dotted names."""
    root = torch.nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root


def _lora_layers(root: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}


def _parameter(matrix: Matrix, adapter: Adapter, device: torch.device) -> torch.nn.Parameter:
    """Return a matrix in float32, as PEFT holds it whatever the base's type."""
    # A copy: the message is read-only and is let go of.
    flat = torch.frombuffer(bytearray(adapter.bytes_of(matrix)), dtype=_DTYPES[matrix.dtype])
    weight = flat.view(matrix.shape).to(device, torch.float32)
    return torch.nn.Parameter(weight, requires_grad=False)
