"""Time of one mixture-of-experts layer: experts on remote shards, and in this process.

Run: python tests/bench/experts.py [--quick]

Four expert workers are processes of their own, on two nodes that are reached by TCP with CURVE as
from another machine; all of it runs on this one. Timed in turns, each the router and the experts of
one layer:

- shards: one message a node, whose front fans out (`actors.expert_links`);
- naive: the same workers, one message an expert that has rows;
- local: the experts in this process (`motley_experts`);
- grouped_mm: transformers' own, in this process.

Prefill rows fill the experts; decode rows are few, the experts small, and messages are what takes
time. Workers share this machine's cores with each other and with the stage, so no figure shows
what several machines compute at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402 - the path above
from expert_fleet import NODES, expert_spec, far  # noqa: E402
from expert_processes import ExpertProcess  # noqa: E402
from expert_routes import EvenRoutes, spread  # noqa: E402
from figures import Figure, at_most, median, report  # noqa: E402
from tiny_models import make_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from actors import wire  # noqa: E402
from actors.engine.checkpoint import Checkpoint  # noqa: E402
from actors.engine.config import EngineConfig  # noqa: E402
from actors.engine.expert_calls import Share, cut  # noqa: E402
from actors.engine.fingerprint import expert_fingerprint  # noqa: E402
from actors.engine.slice import StageSlice  # noqa: E402
from actors.expert_links import ExpertLinks, ExpertNode, _awaited  # noqa: E402

HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 64, 64, 8
DECODE_ROWS = (1, 8, 32)
PREFILL_ROWS = 4096
DEVICES = [device for devices in NODES.values() for device in devices]

Layer = Callable[[torch.Tensor], torch.Tensor]


class NaiveLinks(ExpertLinks):
    """One message an expert that has rows, straight to the worker that holds it."""

    def _call(
        self, routes: Any, kind: bytes, layer: int, divided: Sequence[Share], tensors: Any
    ) -> torch.Tensor:
        nodes = {
            device: ExpertNode(device, {device: node.workers[device]})
            for node in routes.nodes
            for device in node.workers
        }
        every = _Every(list(nodes.values()), routes.version)
        awaited = {}
        for alone in (each for share in divided for each in cut(share, 1)):
            device = alone.portion.device
            worker = nodes[device].workers[device]
            number = self._send(worker, every, kind, layer, [alone], tensors)
            awaited[number] = _awaited(nodes[device], device, [alone])
        out_SH = torch.empty_like(tensors[0])
        self._receive(awaited, out_SH, time.monotonic() + 60.0)
        return out_SH


class _Every(EvenRoutes):
    """A map of which all workers are their own node."""

    def __init__(self, nodes: Sequence[ExpertNode], version: int) -> None:
        super().__init__(version, [], nodes)


@contextmanager
def workers(path: Path, routes: EvenRoutes) -> Iterator[list[ExpertLinks]]:
    """Start the shards; yields a stage's links to them, as we do it and naively."""
    keys = wire.WireKeys.make()
    with ExitStack() as stack:
        monitor = wire.Inbox("monitor", keys)
        stack.callback(monitor.close)
        processes = {}
        for device in DEVICES:
            spec = expert_spec(path, device, {0: routes.held_by(device)})
            processes[device] = ExpertProcess(spec, keys, monitor.address)
            stack.callback(processes[device].kill)
        fingerprint = expert_fingerprint(Checkpoint.open(str(path)))
        links = [kind("stage", keys, fingerprint) for kind in (ExpertLinks, NaiveLinks)]
        nodes = []
        for devices in NODES.values():
            seen = {device: processes[device].ready() for device in devices}
            nodes.append(ExpertNode(devices[0], {d: far(seen[d]) for d in devices}))
            for device in devices:
                siblings = {d: seen[d] for d in devices if d != device}
                processes[device].connect([far(each.address) for each in links], siblings)
        whole = EvenRoutes(routes.version, routes.holders, nodes)
        for each in links:
            stack.callback(each.close)
            each.use(whole)
        yield links


def layer_of(path: Path, experts: ExpertLinks | None) -> Layer:
    stage = StageSlice(
        Checkpoint.open(str(path)), 0, 1, config=EngineConfig(), num_kv_blocks=2, experts=experts
    )
    layer: Layer = stage.layers[0].mlp
    return layer


def transformers_layer(path: Path) -> Layer:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    layer: Layer = model.model.layers[0].mlp
    return layer


@torch.inference_mode()
def seconds(layers: dict[str, Layer], rows: int, repeats: int) -> dict[str, float]:
    """Return each layer's median seconds for a step of so many rows, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    hidden = torch.randn(repeats + 3, 1, rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    for i, step in enumerate(hidden):
        for name, layer in layers.items():
            start_s = time.perf_counter()
            layer(step)
            if i >= 3:
                times[name].append(time.perf_counter() - start_s)
    return {name: median(each) for name, each in times.items()}


@torch.inference_mode()
def check_equal(layers: dict[str, Layer]) -> None:
    hidden = torch.randn(1, 32, HIDDEN)
    wanted = layers["grouped_mm"](hidden)
    for name, layer in layers.items():
        difference = (layer(hidden) - wanted).abs().max().item()
        if difference > 1e-4:
            raise SystemExit(f"{name} differs from grouped_mm by {difference:g}")


def figures(layers: dict[str, Layer], naive: ExpertLinks, *, quick: bool) -> list[Figure]:
    found = []
    for rows in (*DECODE_ROWS, PREFILL_ROWS):
        is_decode = rows != PREFILL_ROWS
        repeats = (300 if quick else 1000) if is_decode else (8 if quick else 30)
        before = naive.messages_sent
        took_s = seconds(layers, rows, repeats)
        messages = (naive.messages_sent - before) / (repeats + 3)
        print(
            f"{'decode' if is_decode else 'prefill'} {rows} rows: "
            + ", ".join(f"{name} {each * 1e3:.2f} ms" for name, each in took_s.items())
            + f" (medians; naive sends {messages:.1f} messages, shards {len(NODES)})",
            flush=True,
        )
        name = f"experts {rows} rows, ms of a layer on 4 shards of 2 nodes"
        ms = {key: value * 1e3 for key, value in took_s.items()}
        most = 0.5 if is_decode else 1.0
        found.append(at_most(f"{name} beside naive", ms["shards"], ms["naive"], most))
        for baseline in ("local", "grouped_mm"):
            beside = at_most(f"{name} beside {baseline}", ms["shards"], ms[baseline], math.inf)
            found.append(replace(beside, target="reported"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: under 3 minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model(
            "qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
            num_experts_per_tok=TOP_K, num_hidden_layers=1, mlp_only_layers=[],
        ).save_pretrained(path, save_original_format=False)  # fmt: skip
        with workers(path, spread(DEVICES, EXPERTS)) as (ours, naive):
            layers = {
                "shards": layer_of(path, ours),
                "naive": layer_of(path, naive),
                "local": layer_of(path, None),
                "grouped_mm": transformers_layer(path),
            }
            check_equal(layers)
            found = figures(layers, naive, quick=options.quick)
    report(found)


if __name__ == "__main__":
    main()
