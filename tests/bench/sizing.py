"""How many cores and how much memory how many readers take on this machine: the figures behind deploy/README.md.

    python tests/bench/sizing.py [--seconds 3] [--streams 1000]

One process, and readers of 20 events a second, no two events at the same moment (load.py), in steps up to `--streams`.
The server has one CPU and the load another, where there are two. Exit code 1 when a byte was changed, an answer cut,
or the load could not keep its pace.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.compare import cell, chat_proxy, faults_of, measure
from bench.load import PACE

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1)  # of --streams
KEPT = 0.95  # of the events that were to be sent, or the load was the slower one


def shown(streams: int, result: dict[str, Any]) -> str:
    names = ("cores", "cpu_us_per_event", "mib")
    return f"{streams:>8}" + "".join(f"{cell(result.get(name)):>14}" for name in names)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options.add_argument("--streams", type=int, default=1000, help="at most so many at once")
    chosen = options.parse_args()
    print(f"{'streams':>8}{'cores':>14}{'us per event':>14}{'MiB':>14}")
    faults = []
    with chat_proxy() as target:
        for streams in sorted({max(1, round(chosen.streams * share)) for share in SHARES}):
            result = measure(target, "paced", streams, chosen.seconds, 1)
            print(shown(streams, result), flush=True)
            faults += faults_of({f"{streams} streams": result})
            if result.get("events_per_second", 0) < KEPT * streams / PACE:
                faults.append(f"{streams} streams: the load could not keep its pace")
    print(f"faults: {len(faults)}", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
