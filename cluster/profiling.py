"""Measuring what `motley profile` shows: devices, the checkpoint's layers on them, and links.

What is declared is taken as declared, what is cached is not measured again, and each device and
link is kept as soon as it is measured: an interrupted run goes on where it was.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray

from actors.engine.checkpoint import Checkpoint
from actors.engine.layer_meter import LayerKind, LayerShape, layer_kinds
from actors.engine.measure import FULL, MATMUL_ROWS, QUICK, main_shapes
from actors.hosting import Host
from actors.probe import MeterSpec
from cluster.config import ConfigError, DeviceSpec, MotleyConfig
from cluster.inventory import find_hosts, find_specs
from cluster.probes import Found, Probes
from cluster.profile import (
    assemble,
    declared_profile,
    link_between,
    load_cached,
    wanted_links,
)
from cluster.profile_cache import DeviceKey, ProfileCache, fingerprint
from cluster.ray_session import connect
from placement.estimated import LayerProbe, complete_tables, fit_layer_model
from placement.fewshot import FewShotError, FewShotModel
from placement.measured import LayerSample
from placement.profiles import DeviceProfile, Estimate, LayerTable, Profile, Source

DEFAULT_TOKENS = (1, 8, 32, 128, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileOptions:
    """What to measure, and how hard."""

    tokens: tuple[int, ...] = DEFAULT_TOKENS
    """Rows of a step to time layers at; up to `engine.max_running` they decode."""
    refresh: bool = False
    """Measure again what is cached."""
    quick: bool = False
    """Fewer repeats: figures are noisier."""
    samples: int | None = None
    """Measure so many figures of a device's layers and estimate the rest; None: measure all."""
    timeout_s: float = 300.0
    """Of one measurement."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """A measurement is about to begin, after `done` of `total`."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Told:
    """Something to know beside the figures."""

    text: str


ProfileEvent = Measuring | Told
OnEvent = Callable[[ProfileEvent], None]


def measure_profile(
    config: MotleyConfig, checkpoint: Checkpoint, options: ProfileOptions, on_event: OnEvent
) -> Profile:
    """Return the profile of a configuration, measuring what is neither declared nor cached.

    Starts Ray (or joins the configured cluster) only when there is something to measure.

    Raises:
        ConfigError: The settings, a cached file or `options.tokens` cannot be used.
        ProbeError: A measurement failed or took too long.
    """
    tokens = _checked_tokens(config, checkpoint, options.tokens)
    options = replace(options, tokens=tokens)
    known = None if options.refresh else load_cached(config, fingerprint(checkpoint.config))
    if known is not None and _is_complete(known, options):
        on_event(Told("nothing to measure: all of it is declared or cached (--refresh measures)"))
        return known
    with _ray(config):
        hosts = find_hosts()
        return _Profiling(config, checkpoint, options, on_event, hosts).run()


def _checked_tokens(
    config: MotleyConfig, checkpoint: Checkpoint, tokens: Sequence[int]
) -> tuple[int, ...]:
    most = max(checkpoint.max_model_tokens, config.engine.max_running)
    wrong = [count for count in tokens if not 1 <= count <= most]
    if wrong or not tokens:
        raise ConfigError(
            f"--tokens: {', '.join(map(str, wrong)) or 'none given'}; a step of this checkpoint "
            f"has 1 to {most} rows"
        )
    return tuple(sorted(set(tokens)))


def _is_complete(profile: Profile, options: ProfileOptions) -> bool:
    joined = {(link.source_node, link.target_node) for link in profile.links}
    nodes = [device.node for device in profile.devices]
    return joined >= set(wanted_links(nodes)) and all(
        device.source == "declared" or _covers(device, options) for device in profile.devices
    )


def _covers(device: DeviceProfile, options: ProfileOptions) -> bool:
    """Whether a cached device has what is asked for; an estimate does only where one is."""
    if device.source == "estimated" and options.samples is None:
        return False
    wanted = set(options.tokens)
    return bool(device.layers) and all(
        wanted <= {sample.tokens for sample in table.samples} for table in device.layers
    )


class _Profiling:
    """One run over the devices and links of a configuration."""

    def __init__(
        self,
        config: MotleyConfig,
        checkpoint: Checkpoint,
        options: ProfileOptions,
        on_event: OnEvent,
        hosts: Mapping[str, Host],
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._options = options
        self._on_event = on_event
        self._effort = QUICK if options.quick else FULL
        self._cache = ProfileCache(fingerprint(checkpoint.config))
        self._kinds = layer_kinds(checkpoint)
        self._specs = find_specs(config, hosts)
        unmeasured = [spec for spec in self._specs if spec.missing_figures]
        self._directions = wanted_links([spec.node for spec in self._specs])
        self._entries: dict[str, DeviceProfile] = {}
        """By the id of the first spec of each device."""
        self._done = 0
        self._probes = Probes(unmeasured, hosts, config.engine, options.timeout_s)
        firsts = {self._probes.first_of(spec).id for spec in unmeasured}
        self._steps_a_device = 1 + len(self._kinds) * len(options.tokens)
        self._total = len(firsts) * self._steps_a_device + len(self._directions)

    def run(self) -> Profile:
        with self._probes:
            entries = [self._device(spec) for spec in self._specs]
            known = [] if self._options.refresh else self._cache.links()
            for source, target in self._directions:
                self._tell(f"link {source} -> {target}")
                if link_between(self._config, known, source, target) is None:
                    self._cache.store_link(self._probes.time_link(source, target))
        return assemble(
            self._config, self._specs, entries, self._cache.links(), self._cache.fingerprint
        )

    def _device(self, spec: DeviceSpec) -> DeviceProfile:
        if not spec.missing_figures:
            return declared_profile(spec)
        first = self._probes.first_of(spec)
        if first.id not in self._entries:
            device = self._measured(first, self._probes.find(first))
            self._cache.store(device)
            self._entries[first.id] = device
        return self._entries[first.id]

    def _measured(self, spec: DeviceSpec, found: Found) -> DeviceProfile:
        """Return a device with all that is asked for; only what is not cached is measured."""
        end = self._done + self._steps_a_device
        known = None if self._options.refresh else self._cache.find(found.key)
        if known is None or not (known.source == "measured" or _covers(known, self._options)):
            self._tell(f"{spec.id}: rates")
            known = self._probes.measure(
                spec,
                found,
                effort=self._effort,
                rows=MATMUL_ROWS[spec.kind],
                shapes=main_shapes(self._checkpoint),
                also_dtypes=("float32",),
            )
        if not _covers(known, self._options):
            tables, estimate = self._tables(spec, found, known)
            source: Source = "measured" if estimate is None else "estimated"
            known = replace(known, layers=tables, source=source, estimate=estimate)
        self._done = end
        # One machine may be known by other names on another network.
        names = tuple(sorted({*known.node_names, *found.node_names}))
        return replace(known, node_names=names, memory_bytes=found.free_bytes)

    def _tables(
        self, spec: DeviceSpec, found: Found, base: DeviceProfile
    ) -> tuple[tuple[LayerTable, ...], Estimate | None]:
        """Measure every layer at every token count, or few of them and estimate the rest."""
        is_sampled = self._options.samples is not None and not base.layers
        known = self._known_devices(found.key) if is_sampled else {}
        model = self._few_shot_model(known) if is_sampled else None
        if model is None:
            wanted = self._options.tokens
            return tuple(self._table(spec, kind, wanted, base) for kind in self._kinds), None
        chosen: dict[str, set[int]] = {}
        for probe in model.chosen:
            chosen.setdefault(probe.table, set()).add(probe.tokens)
        measured = [
            self._table(spec, kind, sorted(chosen[_name(kind)]), base)
            for kind in self._kinds
            if _name(kind) in chosen
        ]
        return complete_tables(model, list(known.values()), measured)

    def _table(
        self, spec: DeviceSpec, kind: LayerKind, tokens: Sequence[int], base: DeviceProfile
    ) -> LayerTable:
        """Return a kind's samples: those that `base` has, and the missing ones measured."""
        name = _name(kind)
        table = base.table(name)
        samples = {} if table is None else {sample.tokens: sample for sample in table.samples}
        missing = [count for count in tokens if count not in samples]
        if missing:
            self._probes.call(spec, f"loading {name}", "load", self._meter(kind, max(missing)))
        for count in missing:
            self._tell(f"{spec.id}: {name} at {count} tokens")
            what = f"timing {name} at {count} tokens"
            sample: LayerSample = self._probes.call(spec, what, "sample", count)
            samples[count] = sample
        ordered = tuple(samples[count] for count in sorted(samples))
        return LayerTable(part=kind.part, layers=kind.layers, samples=ordered)

    def _meter(self, kind: LayerKind, most_tokens: int) -> MeterSpec:
        return MeterSpec(
            model=str(self._checkpoint.path),
            kind=kind,
            engine=self._config.engine,
            shape=LayerShape(self._config.engine.max_running, self._config.plan.context_tokens),
            most_tokens=most_tokens,
            effort=self._effort,
        )

    def _known_devices(self, own: DeviceKey) -> dict[str, DeviceProfile]:
        """Return other devices that were measured whole, by a name that tells them apart."""
        wanted = replace(self._options, samples=None)
        return {
            DeviceKey.of(device).file_name: device
            for device in self._cache.devices()
            if _covers(device, wanted) and DeviceKey.of(device) != own
        }

    def _few_shot_model(
        self, known: Mapping[str, DeviceProfile]
    ) -> FewShotModel[LayerProbe] | None:
        if self._options.samples is None:
            return None
        try:
            return fit_layer_model(known, num_samples=self._options.samples)
        except FewShotError as error:
            self._on_event(Told(f"measuring everything: {error}"))
            return None

    def _tell(self, what: str) -> None:
        self._on_event(Measuring(what, min(self._done, self._total), self._total))
        self._done += 1


def _name(kind: LayerKind) -> str:
    """The name of the table that a kind's samples make."""
    return f"layer {kind.layers[0]}" if kind.layers else kind.part


@contextmanager
def _ray(config: MotleyConfig) -> Iterator[None]:
    """Join the configured cluster, or start one here and stop it at the end."""
    if ray.is_initialized():
        yield
        return
    connect(config)
    # Ray's own handler of SIGTERM reports a crash; to be told to stop is none.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()
