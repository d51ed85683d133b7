"""A deployment for the dashboard: a real plan, and counters that rise with the time."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from actors.engine.adapter import Adapter
from actors.engine.requests import Request, RequestOutput
from cluster.backend import (
    AdapterStatus,
    DeploymentStatus,
    LaneStatus,
    ModelInfo,
    Published,
    StageStatus,
    Steering,
    Unavailable,
)
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Link, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

BUSY = (0.81, 0.58, 0.34)
"""Share of each second that a stage computes."""
BYTES_PER_S = (410_000, 388_000, 52_000)
"""Over the link out of a stage."""
STEP_S = 0.02
DEVICES = ("rtx4090", "rtx3060", "m2-laptop")
NODES = ("attic", "attic", "kitchen")
MODEL = "Qwen3-8B"
NUM_LAYERS = 36


def serving_plan(device_ids: tuple[str, ...] = DEVICES, model: str = MODEL) -> StagesPlan:
    """Cut a model over devices of unequal speed on two nodes; one more is too small for a layer."""
    speeds = (2.4, 1.1, 0.6)
    devices = [
        Device(
            id=device_id,
            node=node,
            kind="paced",
            flops_per_s=speed * 1e13,
            memory_bytes_per_s=speed * 3e11,
            memory_bytes=int(speed * 5.6e9),
        )
        for device_id, node, speed in zip(device_ids, NODES, speeds, strict=True)
    ]
    small = Device(
        id="old-phone",
        node="garage",
        kind="paced",
        flops_per_s=1e11,
        memory_bytes_per_s=1e10,
        memory_bytes=1_000_000,
    )
    link = Link(
        source_node="attic", target_node="kitchen", bandwidth_bytes_per_s=1e8, latency_s=5e-4
    )
    profile = ModelProfile(
        name=model,
        embedding=LayerCost(flops_per_token=0.0, weight_bytes=1_200_000_000),
        layers=(LayerCost(flops_per_token=4e8, weight_bytes=390_000_000, kv_bytes_per_token=4096),)
        * NUM_LAYERS,
        head=LayerCost(flops_per_token=1.2e9, weight_bytes=1_200_000_000),
        hidden_bytes_per_token=8192,
    )
    workload = ServingWorkload(
        lanes=2,
        sequences_per_lane=8,
        context_tokens_per_sequence=512,
        kv_tokens=8192,
        step_tokens=256,
    )
    return plan_stages(
        profile, Topology(devices=(*devices, small), links=(link,)), workload=workload
    )


class HomeLab:
    """Three stages and two lanes at work."""

    def __init__(
        self,
        plan: StagesPlan | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
        controller: dict[str, object] | None = None,
    ) -> None:
        self.plan = plan or serving_plan()
        self.controller = controller
        self.is_ready = True
        self._now_s = now_s
        self._start_s = now_s()

    def model_info(self) -> ModelInfo:
        return ModelInfo(
            name=self.plan.model,
            architecture="Qwen3ForCausalLM",
            vocab_size=4,
            num_layers=NUM_LAYERS,
            max_model_tokens=64,
            eos_token_ids=(3,),
            num_parameters=8_190_000_000,
            dtype="bfloat16",
            created_unix_s=1_700_000_000,
        )

    def plan_json(self) -> dict[str, object]:
        return self.plan.to_json()

    def steering(self) -> Steering:
        raise Unavailable("no controller", 1.0)

    def controller_json(self) -> dict[str, object] | None:
        return self.controller

    async def status(self) -> DeploymentStatus:
        elapsed_s = self._now_s() - self._start_s
        stages = tuple(
            StageStatus(
                index=placed.index,
                device=placed.device_id,
                node=placed.node,
                first_layer=placed.first_layer,
                end_layer=placed.end_layer,
                active=self.is_ready,
                loaded_fraction=1.0 if self.is_ready else 0.4,
                busy_s=BUSY[placed.index] * elapsed_s,
                steps=int(BUSY[placed.index] * elapsed_s / STEP_S),
                link_bytes=int(BYTES_PER_S[placed.index] * elapsed_s),
            )
            for placed in self.plan.stages
        )
        return DeploymentStatus(
            ready=self.is_ready,
            reason="" if self.is_ready else "stages are loading",
            progress=1.0 if self.is_ready else 0.4,
            epoch=self.plan.epoch,
            stages=stages,
            lanes=tuple(_lane(index) for index in range(2)),
            link_bytes=self._link_bytes(elapsed_s),
            adapter=AdapterStatus(name="support-lora", version=2),
        )

    def _link_bytes(self, elapsed_s: float) -> dict[str, int]:
        devices = [stage.device_id for stage in self.plan.stages]
        links = {f"lane-{i}->{devices[0]}": int(1_500 * elapsed_s) for i in range(2)}
        for index, (source, target) in enumerate(
            zip(devices, [*devices[1:], "lanes"], strict=True)
        ):
            links[f"{source}->{target}"] = int(BYTES_PER_S[index] * elapsed_s)
        return links

    def adapter(self) -> AdapterStatus:
        return AdapterStatus()

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(id=request.id, tokens=(1, 2), text="ab", finish_reason="length")

    async def abort(self, request_id: str) -> bool:
        return False

    async def publish(self, adapter: Adapter | None) -> Published:
        raise AssertionError("nothing publishes here")


def _lane(index: int) -> LaneStatus:
    return LaneStatus(
        index=index,
        running=8 - 3 * index,
        waiting=3 * (1 - index),
        blocks_in_use=412 - 200 * index,
        num_blocks=640,
        preemptions=2 * index,
        prefix_hit_tokens=18_432,
    )


def busy_controller(now_unix_s: float, device_ids: tuple[str, ...] = DEVICES) -> dict[str, Any]:
    """Return the state of a controller that has moved layers, taken a move back and moves again."""
    first, second, third = device_ids

    def layers(*counts: int) -> dict[str, int]:
        return dict(zip((first, second, third), counts, strict=True))

    def move(epoch: int, ago_s: float, *counts: dict[str, int], **more: object) -> dict[str, Any]:
        return {
            "at_s": now_unix_s - ago_s,
            "epoch": epoch,
            "from": counts[0],
            "to": counts[1],
            "pause_s": None,
            "measured_gain": None,
            "predicted_gain": None,
        } | more

    return {
        "phase": "trial",
        "epoch": 4,
        "reason": "the new cut is on trial",
        "draining": [],
        "factors": {second: 1.9, third: 1.0},
        "moves": [
            move(
                2, 840, layers(22, 13, 1), layers(21, 14, 1),
                reason="a link was measured again", outcome="rolled back",
                predicted_gain=0.04, measured_gain=-0.012, pause_s=0.031,
            ),
            move(
                3, 312, layers(22, 13, 1), layers(24, 11, 1),
                reason=f"{second} is 1.9 times slower", outcome="kept",
                predicted_gain=0.31, measured_gain=0.284, pause_s=0.046,
            ),
            move(
                4, 9, layers(24, 11, 1), layers(25, 10, 1),
                reason="half a step further", outcome="running", predicted_gain=0.06,
            ),
        ],
    }  # fmt: skip


def sharded_experts(now_unix_s: float, device_ids: tuple[str, ...] = DEVICES) -> dict[str, Any]:
    """Return what a controller adds whose 12 layers have 32 experts each, one of them hot."""
    layers = list(range(0, NUM_LAYERS, 3))
    loads = [[0.5 + (7 * i + 5 * j) % 11 / 10 for j in range(32)] for i in range(len(layers))]
    replicas = [[1] * 32 for _ in layers]
    loads[4][9], replicas[4][9] = 6.2, 3
    new = [{"device_id": device, "layer": layers[4], "expert": 9} for device in device_ids[1:]]
    return {
        "version": 7,
        "reason": "gain 0.12 of the straggler",
        "is_moving": True,
        "maps": 2,
        "layers": layers,
        "loads": loads,
        "replicas": replicas,
        "changes": [
            {"at_s": now_unix_s - 300, "version": 6, "reason": "weights follow", "copies": []},
            {"at_s": now_unix_s - 4, "version": 7, "reason": "expert 9 is hot", "copies": new},
        ],
        "copies": dict(zip(device_ids, (200, 120, 66), strict=True)),
        "guests": {device_ids[0]: 12, device_ids[1]: 0},
        "recoveries": [{"device_id": device_ids[2], "seconds": 0.21, "reason": "it was killed"}],
    }
