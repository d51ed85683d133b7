"""From settings to a serving deployment, and back to nothing.

`run` opens the checkpoint, joins or starts Ray, finds devices, plans, opens the gateway (which
answers "loading" at once), deploys the fleet and serves until told to stop. What it started, it
stops, in the opposite order, also when a step fails.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors import wire
from actors.engine.adapter import Adapter
from actors.engine.batching import LaneLimits
from actors.engine.checkpoint import Checkpoint, CheckpointError
from actors.engine.lora import check_fits
from actors.fleet import Fleet, FleetSpec
from actors.hosting import FleetError
from cluster.backend import ModelInfo, PublishFailed
from cluster.config import ConfigError, MotleyConfig
from cluster.dispatch import Dispatcher
from cluster.events import LaunchEvent, Planned, Ready, StageProgress, Stopped
from cluster.expert_shards import crew_spec, rebalance_settings
from cluster.gateway.auth import new_token, read_token
from cluster.gateway.server import GatewayHandle, open_audit, serve
from cluster.gateway.tokenizer import Tokenizer, load_tokenizer
from cluster.inventory import find_hosts, find_topology
from cluster.journal import Journal, journal_file
from cluster.planning import best_single_device_plan, dtype_bytes, plan_serving, verdict
from cluster.profile import LOCAL
from cluster.ray_session import STOP_SIGNALS, joins_cluster, prints_logged, ray_session
from cluster.resuming import Resuming
from cluster.supervision import Supervisor
from placement.stages import StagesPlan
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parent.parent
_PROGRESS_EVERY_S = 0.2
_CLOSE_GRACE_S = 2.0

OnEvent = Callable[[LaunchEvent], None]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is running, for whoever launched it in this process."""

    plan: StagesPlan
    profile: ModelProfile
    devices: tuple[Device, ...]
    limits: LaneLimits
    dispatcher: Dispatcher
    fleet: Fleet
    supervisor: Supervisor
    tokenizer: Tokenizer
    gateway: GatewayHandle
    http_url: str
    grpc_target: str
    token: str = field(repr=False)


def run(config: MotleyConfig, on_event: OnEvent) -> None:
    """Serve until SIGINT or SIGTERM; returns when everything is gone.

    Raises:
        ConfigError, CheckpointError, AdapterError, InfeasiblePlanError, FleetError,
            PublishFailed: It could not start.
    """
    with prints_logged():
        asyncio.run(_run(config, on_event))


async def _run(config: MotleyConfig, on_event: OnEvent) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    await _until_stopped(config, on_event, stopping)
    on_event(Stopped("signal"))


async def _until_stopped(config: MotleyConfig, on_event: OnEvent, stopping: asyncio.Event) -> None:
    try:
        async with deployment(config, on_event, stopping):
            await stopping.wait()
    except Interrupted:
        _log.info("stopped before the stages had loaded")


class Interrupted(Exception):
    """It was told to stop before it served."""


@asynccontextmanager
async def deployment(
    config: MotleyConfig,
    on_event: OnEvent = lambda _: None,
    stopping: asyncio.Event | None = None,
) -> AsyncIterator[Deployment]:
    """Bring a deployment up in this process; leaving the block takes it down.

    Raises:
        Interrupted: `stopping` was set while the stages loaded.
    """
    started_s = time.monotonic()
    token = _token(config)
    audit = open_audit(config.gateway, config.served_name)
    async with AsyncExitStack() as stack:
        stack.callback(audit.close)
        # Headers only, so a bad checkpoint is refused before Ray starts.
        checkpoint = await asyncio.to_thread(_open, config)
        adapter = await asyncio.to_thread(_open_adapter, config, checkpoint)
        loading = asyncio.create_task(asyncio.to_thread(_load_tokenizer, checkpoint))
        stack.callback(loading.cancel)
        if num_swept := await asyncio.to_thread(wire.sweep):
            _log.info("swept %d socket folders of processes that were killed", num_swept)
        await stack.enter_async_context(ray_session(config))
        hosts = await asyncio.to_thread(find_hosts, may_grow=joins_cluster(config))
        topology = await asyncio.to_thread(find_topology, config, hosts)
        width = dtype_bytes(config.engine, [device.kind for device in topology.devices])
        profile = checkpoint.profile(dtype_bytes=width)
        served = plan_serving(config, profile, topology)
        plan = served.stages
        alone = best_single_device_plan(config, profile, topology)
        on_event(Planned(plan, verdict(served, alone)))
        limits = lane_limits(config, checkpoint, plan)
        info = _model_info(config, checkpoint, limits, width)
        dispatcher = Dispatcher(info, plan, limits, silence_s=config.engine.step_timeout_s)
        stack.push_async_callback(dispatcher.close)
        monitor = dispatcher.open(hosts[LOCAL].address)
        tokenizer = await loading
        # Left after the gateway, whose last requests the fleet still answers.
        fleets = await stack.enter_async_context(AsyncExitStack())
        resuming = Resuming(
            dispatcher.generate,
            Journal(journal_file(config.served_name), keep_s=config.gateway.resume_keep_s),
            grace_s=config.gateway.resume_grace_s,
        )
        stack.push_async_callback(resuming.close)
        await asyncio.to_thread(resuming.recall)
        try:
            gateway = await serve(
                dispatcher, tokenizer, config.gateway, token, audit=audit, resuming=resuming
            )
        except ValueError as error:
            raise ConfigError(f"gateway: {error}") from error
        stack.push_async_callback(gateway.close, _CLOSE_GRACE_S)
        spec = FleetSpec(
            devices={device.id: device for device in served.topology.devices},
            hosts=hosts,
            lane_node=LOCAL,
            profile=served.profile,
            model=str(checkpoint.path),
            engine=config.engine,
            limits=limits,
            num_lanes=config.plan.lanes,
            max_lanes=config.plan.most_lanes,
            tokenizer_json=tokenizer.to_json(),
            monitor=monitor,
            keys=dispatcher.keys,
            silence_s=config.controller.silence_timeout_s,
            experts=None
            if served.shards is None
            else crew_spec(
                config,
                checkpoint,
                profile,
                topology,
                served.shards,
                # A lane gives a step up first, and says which knob it is.
                longest_s=config.engine.step_timeout_s,
            ),
        )
        fleet = Fleet(spec, plan)
        fleets.push_async_callback(asyncio.to_thread, fleet.stop)
        await _deploy(fleet, config.ray.start_timeout_s, dispatcher, on_event, stopping)
        supervisor = Supervisor(
            config,
            served.profile,
            served.topology,
            plan,
            fleet,
            dispatcher,
            None if served.shards is None else rebalance_settings(config, profile, served.shards),
        )
        host = _FleetAdapters(checkpoint, fleet, config.ray.start_timeout_s, supervisor.fleet_turn)
        await dispatcher.connect(fleet.lane_addresses, host, adapter)
        fleets.push_async_callback(supervisor.stop)
        supervisor.start()
        dispatcher.steer_by(supervisor)
        await _until_serving(dispatcher)
        if num_again := resuming.restart():
            _log.info("%d requests that had been accepted go on", num_again)
        # A full collection that walks torch and transformers stops every stream for 0.3 s.
        gc.freeze()
        stack.callback(gc.unfreeze)
        on_event(Ready(gateway.http_url, gateway.grpc_target, token, time.monotonic() - started_s))
        yield Deployment(
            plan=plan,
            profile=served.profile,
            devices=topology.devices,
            limits=limits,
            dispatcher=dispatcher,
            fleet=fleet,
            supervisor=supervisor,
            tokenizer=tokenizer,
            gateway=gateway,
            http_url=gateway.http_url,
            grpc_target=gateway.grpc_target,
            token=token,
        )


def lane_limits(config: MotleyConfig, checkpoint: Checkpoint, plan: StagesPlan) -> LaneLimits:
    """Return the numbers of each lane: as many KV blocks as fit, no more than it can use."""
    engine = config.engine
    declared = checkpoint.max_model_tokens
    max_tokens = min(engine.max_model_tokens or declared, declared)
    size = engine.kv_block_tokens
    usable = -(-max_tokens // size) * engine.max_running
    fitting = plan.kv_tokens_capacity // (config.plan.most_lanes * size)
    return LaneLimits(
        num_blocks=engine.num_kv_blocks or max(2, min(usable, fitting)),
        block_tokens=size,
        max_running=engine.max_running,
        max_step_tokens=engine.max_step_tokens,
        max_model_tokens=max_tokens,
        max_waiting=engine.max_waiting,
        prefix_cache=engine.prefix_cache,
        eos_token_ids=checkpoint.eos_token_ids,
    )


async def _deploy(
    fleet: Fleet,
    timeout_s: float,
    dispatcher: Dispatcher,
    on_event: OnEvent,
    stopping: asyncio.Event | None,
) -> None:
    """Deploy in a thread while telling how far each stage has loaded."""
    deploying = asyncio.create_task(asyncio.to_thread(fleet.deploy, timeout_s))
    told: dict[int, float] = {}
    while not deploying.done():
        await asyncio.wait((deploying,), timeout=_PROGRESS_EVERY_S)
        if stopping is not None and stopping.is_set():
            await asyncio.to_thread(fleet.stop)
            await asyncio.gather(deploying, return_exceptions=True)
            raise Interrupted
        for stage in (await dispatcher.status()).stages:
            if stage.loaded_fraction > told.get(stage.index, -1.0):
                told[stage.index] = stage.loaded_fraction
                on_event(StageProgress(stage.index, stage.device, stage.loaded_fraction))
    await deploying


async def _until_serving(dispatcher: Dispatcher) -> None:
    """Wait until every stage serves; raises `FleetError` when one is lost before that."""
    ends = [asyncio.create_task(event.wait()) for event in (dispatcher.serving, dispatcher.lost)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if dispatcher.lost.is_set():
        raise FleetError((await dispatcher.status()).reason)


def _open(config: MotleyConfig) -> Checkpoint:
    return Checkpoint.open(
        config.model, allow_unverified=config.engine.allow_unverified_architectures
    )


def _open_adapter(config: MotleyConfig, checkpoint: Checkpoint) -> Adapter | None:
    """Return the adapter to begin with, known to fit."""
    if config.adapter is None:
        return None
    adapter = Adapter.read(config.adapter)
    check_fits(adapter, checkpoint)
    return adapter


@dataclass(frozen=True, slots=True)
class _FleetAdapters:
    """The stages of a fleet as holders of adapters; see `AdapterHost`."""

    checkpoint: Checkpoint
    fleet: Fleet
    timeout_s: float
    turn: AbstractContextManager[Any]
    """Held while the fleet is used."""

    def check(self, adapter: Adapter) -> None:
        adapter.check_values()
        check_fits(adapter, self.checkpoint)

    def load(self, version: int, adapter: Adapter, *, keep: int) -> None:
        try:
            with self.turn:
                self.fleet.load_adapter(version, adapter, keep=keep, timeout_s=self.timeout_s)
        except FleetError as error:
            raise PublishFailed(f"{error}; version {keep} is still in use") from error


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    try:
        return load_tokenizer(checkpoint.path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _model_info(
    config: MotleyConfig, checkpoint: Checkpoint, limits: LaneLimits, width: int
) -> ModelInfo:
    dtype = config.engine.dtype
    return ModelInfo(
        name=config.served_name,
        architecture=checkpoint.architecture,
        vocab_size=checkpoint.vocab_size,
        num_layers=checkpoint.num_layers,
        max_model_tokens=limits.max_sequence_tokens,
        eos_token_ids=checkpoint.eos_token_ids,
        num_parameters=checkpoint.num_parameters,
        dtype=dtype if dtype != "auto" else ("bfloat16" if width == 2 else "float32"),
        created_unix_s=int((checkpoint.path / "config.json").stat().st_mtime),
    )


def _token(config: MotleyConfig) -> str:
    """Return the bearer token: the configured file's, or a new one for this run."""
    file = config.gateway.token_file
    if file is None:
        return new_token()
    try:
        return read_token(file)
    except ValueError as error:
        raise ConfigError(f"gateway.token_file: {error}") from error
