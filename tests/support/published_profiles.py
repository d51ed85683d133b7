"""Published training profiles, the hand-made stages they were simulated with, and the results.

Source: RoundPipe (Luo, Gao, Zheng, Lu and Shu, arXiv 2604.27085, 2026) and its artifact: 8 equal
GPUs, milliseconds per micro-batch, of Qwen3-1.7B, GPT-OSS-20B and Qwen3-235B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.training import Slot, TrainingCosts, slots_from_counts

NUM_DEVICES = 8
TIERS = (1.0, 1.0, 0.43, 0.43, 0.27, 0.27, 0.16, 0.16)
"""Speeds of two RTX 4090, two 3090, two 4060 Ti and two 3060, relative to the first."""


@dataclass(frozen=True, kw_only=True)
class PublishedProfile:
    """Milliseconds of one micro-batch, and layers per stage of the published simulation."""

    name: str
    num_layers: int
    forward_ms: float
    backward_ms: float
    head_forward_ms: float
    head_backward_ms: float
    hand_off_ms: float
    stages: tuple[int, ...]
    """Of GPipe and 1F1B, one per device."""
    looped_stages: tuple[int, ...]
    """Of interleaved 1F1B and looped breadth-first."""
    forward_slots: tuple[int, ...]
    fused_layers: int
    backward_slots: tuple[int, ...]
    makespan_ms: Mapping[str, float]
    """Of 16 micro-batches per schedule, as published: to 0.1 ms."""
    bubble_percent: Mapping[str, float]
    async_bubble_percent: float
    """RoundPipe's without fill and drain."""
    steady_idle_percent: Mapping[int, float]
    """RoundPipe's, run over many rounds, per micro-batches of one round."""

    def costs(self, speeds: Sequence[float] | None = None) -> TrainingCosts:
        return TrainingCosts.uniform(
            num_devices=NUM_DEVICES if speeds is None else len(speeds),
            num_layers=self.num_layers,
            forward_s=self.forward_ms / 1e3,
            backward_s=self.backward_ms / 1e3,
            head_forward_s=self.head_forward_ms / 1e3,
            head_backward_s=self.head_backward_ms / 1e3,
            hand_off_s=self.hand_off_ms / 1e3,
            speeds=speeds,
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        return slots_from_counts(self.forward_slots, self.fused_layers, self.backward_slots)


QWEN3_1_7B = PublishedProfile(
    name="Qwen3-1.7B",
    num_layers=28,
    forward_ms=7.429,
    backward_ms=15.831,
    head_forward_ms=22.0655,
    head_backward_ms=43.707,
    hand_off_ms=1.6,
    stages=(3, 3, 4, 4, 4, 4, 4, 2),
    looped_stages=(*[1] * 18, *[2] * 5, 0),
    forward_slots=(7,) * 4,
    fused_layers=0,
    backward_slots=(*[3] * 8, *[2] * 2),
    makespan_ms={
        "gpipe": 2896.9, "1f1b": 2854.7, "interleaved": 2560.8, "looped_bfs": 2467.3,
        "roundpipe": 2286.0,
    },
    bubble_percent={
        "gpipe": 36.13, "1f1b": 35.19, "interleaved": 27.75, "looped_bfs": 25.01,
        "roundpipe": 19.07,
    },
    async_bubble_percent=4.05,
    steady_idle_percent={8: 4.50, 9: 2.85, 16: 0.69},
)  # fmt: skip

GPT_OSS_20B = PublishedProfile(
    name="GPT-OSS-20B",
    num_layers=24,
    forward_ms=21.6445625,
    backward_ms=81.780875,
    head_forward_ms=44.2925,
    head_backward_ms=86.264,
    hand_off_ms=2.25,
    stages=(3,) * 8,
    looped_stages=(1,) * 24,
    forward_slots=(4,) + (5,) * 4,
    fused_layers=0,
    backward_slots=(1,) * 24,
    makespan_ms={
        "gpipe": 10750.2, "1f1b": 10750.2, "interleaved": 9071.3, "looped_bfs": 8999.3,
        "roundpipe": 7282.8,
    },
    bubble_percent={
        "gpipe": 41.73, "1f1b": 41.73, "interleaved": 30.94, "looped_bfs": 30.39,
        "roundpipe": 13.98,
    },
    async_bubble_percent=3.30,
    steady_idle_percent={8: 4.20, 9: 2.31, 16: 1.29},
)  # fmt: skip

QWEN3_235B = PublishedProfile(
    name="Qwen3-235B",
    num_layers=94,
    forward_ms=43.016,
    backward_ms=58.376,
    head_forward_ms=42.444,
    head_backward_ms=43.294,
    hand_off_ms=3.2,
    stages=(11, *[12] * 6, 11),
    looped_stages=(0, *[1] * 94, 0),
    forward_slots=(2,) * 47,
    fused_layers=0,
    backward_slots=(1,) * 94,
    makespan_ms={
        "gpipe": 39698.3, "1f1b": 39716.5, "interleaved": 29052.9, "looped_bfs": 28575.7,
        "roundpipe": 28250.0,
    },
    bubble_percent={
        "gpipe": 31.18, "1f1b": 31.21, "interleaved": 5.96, "looped_bfs": 4.39,
        "roundpipe": 3.29,
    },
    async_bubble_percent=0.98,
    steady_idle_percent={8: 1.10, 9: 0.19, 16: 0.02},
)  # fmt: skip

PROFILES = (QWEN3_1_7B, GPT_OSS_20B, QWEN3_235B)
