"""Time of an expert layer whose rows surprise the placement: with guests, and without.

Run: python tests/bench/expert_guests.py [--quick]

Two expert workers, processes of their own on one node, hold half of a layer's experts each. The
rows of a long prompt go mostly to experts of the first: without guests (the baseline) it computes
them all; with them the other reads some of its experts while it computes its own, and takes their
rows (`placement.sharding.reactive`). Timed in turns, each call with other hot experts than the one
before, so that guests are read every time.

Paced: both devices take their declared time. Real: they compute, on this machine's cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402 - the path above
from expert_fleet import expert_spec  # noqa: E402
from expert_processes import ExpertProcess  # noqa: E402
from figures import Figure, at_most, median, report  # noqa: E402
from tiny_models import make_model  # noqa: E402

from actors import wire  # noqa: E402
from actors.engine.checkpoint import Checkpoint  # noqa: E402
from actors.engine.fingerprint import expert_fingerprint  # noqa: E402
from actors.expert_links import ExpertLinks, Patience  # noqa: E402
from actors.expert_routes import MapRoutes  # noqa: E402
from placement.costs import expert_read_s, expert_row_s, expert_weight_bytes  # noqa: E402
from placement.experts import ExpertDevice  # noqa: E402
from placement.sharding.division import RowDivision  # noqa: E402
from placement.sharding.expert_map import ExpertMap, weighted_layer  # noqa: E402
from placement.sharding.reactive import ReactiveTerms  # noqa: E402
from placement.topology import DeviceKind  # noqa: E402

HIDDEN, WIDTH, EXPERTS = 256, 512, 16
NODE = "n"
DEVICES = ("d0", "d1")
HALF = EXPERTS // 2
NUM_GUESTS = 4
READ_BYTES_PER_S = 500e6
"""As a deployment counts on."""
ROWS = {"paced": 2048, "real": 8192}
HOT_FRACTION = 0.8
"""Of the rows, to three experts of the first device."""


def counts_of(call: int, num_rows: int) -> list[int]:
    """Rows by expert: mostly for three of the first device's, others in every call."""
    counts = [round(num_rows * (1 - HOT_FRACTION)) // (EXPERTS - 3)] * EXPERTS
    for i in range(3):
        counts[(3 * call + i) % HALF] = round(num_rows * HOT_FRACTION) // 3
    return counts


@contextmanager
def links_to(path: Path, kind: DeviceKind) -> Iterator[dict[str, ExpertLinks]]:
    """Start two workers; yields a stage's links to them, with guests and without."""
    keys = wire.WireKeys.make()
    with ExitStack() as stack:
        monitor = wire.Inbox("monitor", keys)
        stack.callback(monitor.close)
        processes, fleet = {}, []
        for position, device in enumerate(DEVICES):
            held = range(position * HALF, (position + 1) * HALF)
            spec = expert_spec(
                path, device, {0: list(held)}, spare=NUM_GUESTS, kind=kind, num_guests=NUM_GUESTS
            )
            processes[device] = ExpertProcess(spec, keys, monitor.address)
            stack.callback(processes[device].kill)
            layer = spec.profile.layers[0]
            fleet.append(
                ExpertDevice(
                    id=device,
                    node=NODE,
                    rows_per_s=1.0 / expert_row_s(spec.device, layer),
                    slots_per_layer=HALF,
                    expert_read_s=expert_read_s(spec.device, layer),
                )
            )
        current = ExpertMap(
            version=0,
            checkpoint=expert_fingerprint(Checkpoint.open(str(path))),
            num_experts=EXPERTS,
            devices=tuple(fleet),
            layers=(
                weighted_layer(
                    [frozenset(range(HALF)), frozenset(range(HALF, EXPERTS))],
                    [1.0] * EXPERTS,
                    [device.rows_per_s for device in fleet],
                ),
            ),
        )
        terms = ReactiveTerms(
            num_buffers=NUM_GUESTS,
            least_rows=128,
            copy_s={NODE: expert_weight_bytes(layer) / READ_BYTES_PER_S},
            plan_s=1e-3,
        )
        addresses = {device: process.ready() for device, process in processes.items()}
        found = {}
        for name, guests in (("guests", terms), ("without", None)):
            links = ExpertLinks(name, keys, current.checkpoint, patience=Patience(answer_s=120.0))
            stack.callback(links.close)
            links.use(MapRoutes(RowDivision(current, NODE, {}, guests), (0,), addresses))
            found[name] = links
        for device, process in processes.items():
            siblings = {name: address for name, address in addresses.items() if name != device}
            process.connect([links.address for links in found.values()], siblings)
        yield found


@torch.inference_mode()
def seconds(found: dict[str, ExpertLinks], num_rows: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a call, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for call in range(repeats + 1):
        counts = counts_of(call, num_rows)
        rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(call))
        outs = []
        for name, links in found.items():
            start_s = time.perf_counter()
            outs.append(links.run(0, counts, rows))
            if call:
                times[name].append(time.perf_counter() - start_s)
        if not torch.equal(*outs):
            raise SystemExit("rows computed by guests differ")
    if any(links.num_repeated for links in found.values()):
        raise SystemExit("guests were refused")
    return {name: median(each) for name, each in times.items()}


def figures(path: Path, *, quick: bool) -> list[Figure]:
    made = []
    kinds: tuple[tuple[DeviceKind, str], ...] = (("paced", "paced"), ("cpu", "real"))
    for kind, name in kinds:
        with links_to(path, kind) as found:
            took_s = seconds(found, ROWS[name], 8 if quick else 30)
        print(
            f"{name}, {ROWS[name]} rows: with guests {took_s['guests'] * 1e3:.1f} ms, without "
            f"{took_s['without'] * 1e3:.1f} ms (medians)",
            flush=True,
        )
        made.append(
            at_most(
                f"experts {ROWS[name]} rows, {HOT_FRACTION:.0%} to 3 of {EXPERTS} experts, ms of a "
                "layer on 2 devices beside no guests",
                took_s["guests"] * 1e3,
                took_s["without"] * 1e3,
                1.0,
                kind="paced" if name == "paced" else "real",
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: under 3 minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(
            "qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
            num_experts_per_tok=2, num_hidden_layers=1, mlp_only_layers=[],
        ).save_pretrained(folder, save_original_format=False)  # fmt: skip
        report(figures(Path(folder), quick=options.quick))


if __name__ == "__main__":
    main()
