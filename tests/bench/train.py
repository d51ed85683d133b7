"""Training: idle time and throughput of a pool of devices, host memory, real speed.

Run: python tests/bench/train.py [--quick] [--only paced|real|memory]

Paced figures run true numerics on devices that take as long as they are declared to; real ones run
two processes on two cores beside torch.distributed.pipelining.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from figures import report  # noqa: E402 - the path above
from train_memory import memory_figures  # noqa: E402
from train_paced import paced_figures  # noqa: E402
from train_real import real_figures  # noqa: E402

PARTS = {"memory": memory_figures, "paced": paced_figures, "real": real_figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter runs: under 3 minutes")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    options = parser.parse_args()
    figures = []
    for name, part in PARTS.items():
        if options.only in (None, name):
            figures += part(quick=options.quick)
    report(figures)


if __name__ == "__main__":
    main()
