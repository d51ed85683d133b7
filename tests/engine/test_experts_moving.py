"""Tokens stay transformers' own while experts move all the time, of every architecture, over one,
two and four devices of unequal speed and room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_cases import NUM_NEW, prompts, tokens_of
from expert_loads import hot
from identity import check_identical, generate
from tiny_models import MOE

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.expert_host import ExpertHost
from actors.engine.expert_slots import ExpertSlots
from actors.engine.local_experts import LocalDispatcher
from actors.expert_routes import MapRoutes, held_by
from placement.experts import ExpertDevice, plan_experts
from placement.moving.moves import Move, Release
from placement.sharding.decision import RebalanceSettings
from placement.sharding.division import RowDivision
from placement.sharding.expert_map import ExpertMap
from placement.sharding.rebalance_values import (
    CopyDone,
    ExpertCommand,
    HaltExperts,
    LoadsMeasured,
    MapInForce,
    RebalanceRequested,
    StepsDone,
    UseMap,
)
from placement.sharding.rebalancer import ExpertRebalancer

pytestmark = pytest.mark.engine

FRACTIONS = {1: (1.0,), 2: (0.75, 0.5), 4: (0.5, 0.375, 0.25, 0.25)}
"""Slots a layer of each device, as a share of the experts: on several, some have replicas."""
EXPERT_BYTES, STEP_BYTES, STAGING_SLOTS = 100, 150, 2
EVERY_CALLS = 2
NUM_ROUNDS = 40
"""Of five prompts each: 200 requests."""


class Moving:
    """A dispatcher over devices of this process, whose experts move every few calls."""

    is_frozen = False

    def __init__(self, checkpoint: Checkpoint, num_devices: int) -> None:
        first = ExpertSlots(checkpoint, 1)
        self._layers, num_experts = first.layers, first.num_experts
        devices = [
            ExpertDevice(
                id=f"d{i}", node="n", rows_per_s=1.0 + i, slots_per_layer=round(part * num_experts)
            )
            for i, part in enumerate(FRACTIONS[num_devices])
        ]
        shape = len(self._layers), num_experts
        plan = plan_experts(np.ones(shape), devices, expert_bytes=EXPERT_BYTES)
        made = ExpertMap.from_plan(plan, devices, checkpoint="c")
        settings = RebalanceSettings(
            expert_bytes=EXPERT_BYTES,
            copy_bytes_per_s=1e9,
            step_budget_bytes=STEP_BYTES,
            staging_slots=STAGING_SLOTS,
            cool_down_steps=0,
        )
        self._of = ExpertRebalancer(made, settings)
        self._hosts = {}
        for device in devices:
            num_slots = device.slots_per_layer * len(self._layers) + STAGING_SLOTS
            self._hosts[device.id] = ExpertHost(ExpertSlots(checkpoint, num_slots))
        self._shape = shape
        self._calls = self.num_maps = self.num_copies = 0
        self._dispatcher = LocalDispatcher(self._hosts, self._bring_into_force(made))

    def run(self, layer: int, counts_E: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls % EVERY_CALLS == 0:
            self._go_on()
        return self._dispatcher.run(layer, counts_E, rows_SH)

    def backward(self, *call: Any) -> torch.Tensor:
        return self._dispatcher.backward(*call)

    def _go_on(self) -> None:
        """One step of whatever is going on; where nothing is, the load turns to other experts."""
        if not self._of.is_moving:
            self._tell(RebalanceRequested())
            self._tell(LoadsMeasured(summary=hot(*self._shape, first=self._calls)))
        self._tell(StepsDone())

    def _tell(self, event: Any) -> None:
        commands: list[ExpertCommand] = self._of.handle(event)
        for command in commands:
            match command:
                case Move(piece=piece):
                    share = (command.first_byte + command.num_bytes) / EXPERT_BYTES
                    layer = self._layers[piece.layer]
                    self._hosts[command.target].fetch(layer, piece.expert, share=share)
                    self.num_copies += command.is_last
                    self._tell(CopyDone(move=command))
                case Release(device_id=device_id, piece=piece):
                    self._hosts[device_id].release(self._layers[piece.layer], piece.expert)
                case UseMap(map=made):
                    self._dispatcher.routes = self._bring_into_force(made)
                    self._tell(MapInForce(version=made.version))
                case HaltExperts(reason=reason):
                    raise AssertionError(reason)

    def _bring_into_force(self, made: ExpertMap) -> MapRoutes:
        for device_id, host in self._hosts.items():
            host.prepare(made.version, held_by(made, self._layers, device_id))
            host.retire(made.version)
        self.num_maps += 1
        workers = {
            device_id: wire.Address(name=device_id, machine="", ipc="", tcp="")
            for device_id in made.device_ids
        }
        return MapRoutes(RowDivision(made, "n", {}), self._layers, workers)


@pytest.mark.parametrize("num_devices", FRACTIONS)
@pytest.mark.parametrize("model_type", MOE)
def test_tokens_stay_while_experts_move(
    model_type: str,
    num_devices: int,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
) -> None:
    path = checkpoint_dir(model_type)
    checkpoint = Checkpoint.open(str(path))
    moving = Moving(checkpoint, num_devices)
    wanted = [generate(reference(path), prompt, NUM_NEW) for prompt in prompts()]

    for _ in range(NUM_ROUNDS if num_devices > 1 else 1):
        check_identical(wanted, tokens_of(checkpoint, moving))

    if num_devices > 1:
        assert moving.num_copies > 100
        assert moving.num_maps > 50
