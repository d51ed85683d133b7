"""The driver's loop: rounds of optimizer steps over the pool, evaluation, checkpoints, losses.

Weights of version v have v optimizer steps in them. A synchronous step k (from 0) runs on version
k; its first slots begin as soon as their units are published, while others are still being
stepped. An asynchronous one runs on version k - 1: its gradients are one step old. Checkpoints
drain the pool, so that a resumed run and an unbroken one go through the same versions; a stop by
signal drains it at a step of its own, which an asynchronous run resumes one step less stale.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import ray
import torch

from actors.engine.schedule import clip_scale, learning_rate
from actors.engine.training_values import LossScales, MicroBatch
from actors.hosting import Host
from cluster.training.checkpoints import CheckpointSaveError
from cluster.training.errors import HostsLostError, TrainingError
from cluster.training.events import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    HostsLost,
    StepDone,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
)
from cluster.training.executor import SlotExecutor
from cluster.training.job import TrainingJob
from cluster.training.machines import Machines
from cluster.training.nonfinite import where_not_finite
from cluster.training.rounds import Round
from placement.topology import Topology

_MOST_HOST_LOSSES = 5
"""Between two checkpoints; what kills weight hosts so often will go on doing so."""


@dataclass
class _Progress:
    """What the run has done, for reports and checkpoints."""

    tokens: int
    losses: list[float]
    began_s: float
    last_step_s: float
    busy_s: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """A step whose rounds are under way."""

    step: int
    rounds: tuple[Round, ...]
    done: tuple[asyncio.Future[None], ...]


class TrainingLoop:
    """Runs a job over the machines it is given."""

    def __init__(
        self,
        job: TrainingJob,
        topology: Topology,
        hosts: Mapping[str, Host],
        on_event: Callable[[TrainingEvent], None],
        *,
        stopping: asyncio.Event,
        trace: bool,
    ) -> None:
        self._job = job
        self._settings = job.settings
        self._tell = on_event
        self._stopping = stopping
        self._machines = Machines(job, topology, hosts, on_event, trace=trace)
        self._num_rounds = 0
        self._step = job.first_step
        """Optimizer steps done."""
        self._progress = _Progress(0, [], 0.0, 0.0)
        self._num_host_losses = 0
        """Since the last checkpoint."""

    async def train(self, began_s: float) -> None:
        """Train to the last step, or until asked to stop; a checkpoint is the last thing done.

        Raises:
            TrainingError: The run cannot go on.
        """
        state = self._job.state
        self._progress = _Progress(
            state.tokens_seen if state else 0, list(state.losses if state else ()), began_s, began_s
        )
        try:
            await self._machines.start()
            await self._load()
        except HostsLostError as error:
            await self._recover(error)
        self._tell(
            TrainingStarted(
                first_step=self._step + 1,
                num_steps=self._settings.steps,
                host_bytes=await self._machines.weights.host_bytes(),
                num_documents=self._job.batches.num_documents,
                num_sequences=self._job.batches.num_sequences,
                num_left_out=self._job.num_left_out,
                num_cut=self._job.batches.num_cut,
                resumed_from=self._job.resumed_from,
            )
        )
        self._progress.last_step_s = time.monotonic()
        tokens_before = self._progress.tokens
        while self._step < self._settings.steps and not self._stopping.is_set():
            await self._until_checkpoint()
        path = self._job.folder.latest()
        seconds = time.monotonic() - began_s
        self._tell(
            TrainingFinished(
                step=self._step,
                path=path,
                seconds=seconds,
                tokens=self._progress.tokens - tokens_before,
            )
        )

    def close(self) -> None:
        """Stop all actors."""
        self._machines.close()

    async def _load(self) -> None:
        """Bring the weights of the newest checkpoint, or the model's own, into host memory."""
        folder = self._job.folder.latest()
        self._step = 0
        self._progress.tokens, self._progress.losses = 0, []
        if folder is not None:
            state = self._job.folder.load_state(folder)
            self._step = state.step
            self._progress.tokens = state.tokens_seen
            self._progress.losses = list(state.losses)
        await self._machines.load(folder, self._step)

    async def _until_checkpoint(self) -> None:
        every = self._settings.checkpoint_every_steps
        end = min(self._settings.steps, (self._step // every + 1) * every)
        try:
            await self._run_steps(self._step, end)
            await self._save()
            self._num_host_losses = 0
        except HostsLostError as error:
            await self._recover(error)

    async def _recover(self, error: HostsLostError) -> None:
        """Start weight hosts again and load the newest checkpoint, though more of them die."""
        while True:
            self._num_host_losses += 1
            if self._num_host_losses > _MOST_HOST_LOSSES:
                raise TrainingError(
                    f"{error}; it has happened {self._num_host_losses} times without a checkpoint "
                    f"in between. Find what ends weight hosts (too little memory, most likely), "
                    f"then run with --resume"
                ) from error
            try:
                await self._machines.restart_hosts()
                await self._load()
            except HostsLostError as again:
                error = again
            else:
                break
        self._tell(HostsLost(reason=str(error), from_step=self._step))

    async def _run_steps(self, first: int, end: int) -> None:
        """Run steps [first, end), or fewer when asked to stop; the pool is drained at the end."""
        finishing: asyncio.Task[None] | None = None
        executor = self._machines.executor
        try:
            for step in range(first, end):
                if self._stopping.is_set():
                    break
                is_stale = self._settings.optimizer.asynchronous and step > first
                batches = self._job.batches.step(
                    step, self._settings.micro_batches * self._settings.rounds_per_step
                )
                under_way = self._submit(step, step - is_stale, batches)
                if finishing is not None:
                    await finishing
                finishing = asyncio.create_task(self._finish(under_way))
                finishing.add_done_callback(partial(_pass_on_error, executor))
            if finishing is not None:
                await finishing
        except BaseException as error:
            executor.fail(error)
            if finishing is not None:
                finishing.cancel()
                await asyncio.gather(finishing, return_exceptions=True)
            raise

    def _submit(self, step: int, version: int, batches: list[MicroBatch]) -> _Step:
        """Hand a step's rounds to the pool, all at once: slow devices begin on later rounds."""
        settings = self._settings
        targets = max(1, sum(batch.num_targets for batch in batches))
        coefficient = self._job.router_loss_coefficient
        scales = LossScales(1.0 / targets, coefficient / len(batches))
        rounds, done = [], []
        for number in range(settings.rounds_per_step):
            start = number * settings.micro_batches
            round_ = self._round(
                step,
                number,
                version,
                tuple(batches[start : start + settings.micro_batches]),
                start,
                scales,
            )
            rounds.append(round_)
            done.append(self._machines.executor.submit(round_))
        return _Step(step, tuple(rounds), tuple(done))

    def _round(
        self,
        step: int,
        number: int,
        version: int,
        batches: tuple[MicroBatch, ...],
        first_micro_batch: int,
        scales: LossScales,
        *,
        is_trained: bool = True,
    ) -> Round:
        self._num_rounds += 1
        planned = self._machines.plan
        return Round(
            index=self._num_rounds - 1,
            step=step,
            number=number,
            slots=planned.plan.slots,
            batches=batches,
            batches_reference=ray.put(batches),
            first_micro_batch=first_micro_batch,
            scales=scales,
            version=version,
            declared_s=planned.declared_s,
            is_trained=is_trained,
        )

    async def _finish(self, under_way: _Step) -> None:
        """Wait for a step's gradients, then step the optimizer and say what came of it."""
        await asyncio.gather(*under_way.done)
        step, settings = under_way.step, self._settings
        loss, router_loss = _losses(under_way)
        if not math.isfinite(loss):
            raise await self._not_finite(under_way, f"the loss is {loss}")
        norms = await self._machines.weights.norms()
        if norms.non_finite:
            units = ", ".join(norms.non_finite)
            raise await self._not_finite(under_way, f"the gradients of {units} are not finite")
        rate = learning_rate(settings.optimizer, step, settings.steps)
        await self._machines.weights.step(
            step + 1,
            learning_rate=rate,
            scale=clip_scale(norms.norm, settings.optimizer.clip_norm),
            on_change=self._machines.executor.pump,
        )
        self._machines.weights.table.drop_below(step + 1 - settings.optimizer.asynchronous)
        self._step = step + 1
        tokens = sum(batch.num_tokens for round_ in under_way.rounds for batch in round_.batches)
        self._report(loss, router_loss, norms.norm, rate, tokens)
        every = settings.evaluate_every_steps
        if every and self._step % every == 0:
            await self._evaluate(step)

    def _report(
        self, loss: float, router_loss: float | None, norm: float, rate: float, tokens: int
    ) -> None:
        progress, now_s = self._progress, time.monotonic()
        seconds = now_s - progress.last_step_s
        progress.last_step_s = now_s
        progress.tokens += tokens
        progress.losses.append(loss)
        progress.step_seconds = [*progress.step_seconds[-19:], seconds]
        mean_s = sum(progress.step_seconds) / len(progress.step_seconds)
        self._tell(
            StepDone(
                step=self._step,
                num_steps=self._settings.steps,
                loss=loss,
                router_loss=router_loss,
                gradient_norm=norm,
                learning_rate=rate,
                tokens=tokens,
                seconds=seconds,
                idle_fractions=self._machines.idle_fractions(now_s),
                eta_s=mean_s * (self._settings.steps - self._step),
            )
        )
        self._machines.tell_trace()

    async def _evaluate(self, step: int) -> None:
        """Measure the loss on held-out sequences with the newest weights."""
        held_out = self._job.held_out
        if held_out is None:
            return
        began_s = time.monotonic()
        batches = held_out.all(self._settings.evaluate_sequences)
        size = self._settings.micro_batches
        rounds, done = [], []
        for start in range(0, len(batches), size):
            part = tuple(batches[start : start + size])
            number = self._settings.rounds_per_step + start
            scales = LossScales(1.0)
            round_ = self._round(step, number, step + 1, part, start, scales, is_trained=False)
            rounds.append(round_)
            done.append(self._machines.executor.submit(round_))
        await asyncio.gather(*done)
        targets = sum(batch.num_targets for batch in batches)
        loss = sum(sum(round_.losses.values()) for round_ in rounds) / max(1, targets)
        seconds = time.monotonic() - began_s
        self._tell(Evaluated(step=step + 1, loss=loss, tokens=targets, seconds=seconds))

    async def _save(self) -> None:
        began_s = time.monotonic()
        try:
            path = await self._machines.save(
                self._step, self._progress.tokens, tuple(self._progress.losses)
            )
        except CheckpointSaveError as error:
            self._tell(CheckpointFailed(step=self._step, reason=str(error)))
            if self._step == self._settings.steps or self._stopping.is_set():
                raise TrainingError(str(error)) from error
            return
        seconds = time.monotonic() - began_s
        self._progress.last_step_s += seconds
        self._tell(CheckpointSaved(step=self._step, path=path, seconds=seconds))

    async def _not_finite(self, under_way: _Step, fact: str) -> TrainingError:
        """Find the layer, and say what is left of the run."""
        # The run ends here: what else is under way would only keep the devices busy.
        await self._machines.executor.drain()
        place = await where_not_finite(
            self._machines.weights,
            tuple(self._machines.executor.devices.values()),
            under_way.rounds,
            getattr(torch, self._machines.dtype),
        )
        newest = self._job.folder.latest()
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return TrainingError(
            f"step {under_way.step + 1}: {fact}; {place}. {kept}. Lower "
            f"training.optimizer.learning_rate ({self._settings.optimizer.learning_rate:g}), "
            f"lengthen its warmup_steps ({self._settings.optimizer.warmup_steps}), or look at the "
            f"data of that step"
        )


def _pass_on_error(executor: SlotExecutor, finishing: asyncio.Task[None]) -> None:
    """Let what waits for the weights of a step hear that they will not come."""
    if not finishing.cancelled() and (error := finishing.exception()) is not None:
        executor.fail(error)


def _losses(under_way: _Step) -> tuple[float, float | None]:
    """Return the step's mean cross-entropy and, where there are routers, its mean router loss."""
    total, targets = 0.0, 0
    router: list[float] = []
    for round_ in under_way.rounds:
        for m, batch in enumerate(round_.batches):
            total += round_.losses[m]
            targets += batch.num_targets
            loads = round_.final_loads[m]
            if loads is not None:
                router.append(loads.loss())
    return total / max(1, targets), sum(router) / len(router) if router else None
