"""The same rows for batch 1, 8 and 64, for two workers, and after kill -9 and resume: on a real model, as users run it.

    python benchmarks/invariance.py [--vlm lite] [--data photos] [--limit 12] [--json]

Every run is `ironclip bench` in a process and a store of its own. Whole-number and yes/no columns must be equal unless
a margin is below 1e-3; floats are compared with a tolerance of 1e-3 (relative, and absolute near zero), but for the
columns that tell how an attack travelled (losses and counts of passes), which may differ where rounding turned a sign.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

TRAVEL = {"attack_loss", "attack_forwards", "attack_backwards", "late_gain", "zero_pixels", "l1", "l2", "linf", "dead"}
TRAVEL |= {"late", "blank", "blocked", "broken_by", "zero_grad"}
COMMAND = [sys.executable, "-c", "from ironclip.cli import main; main()", "bench", "--json"]


def command(args: argparse.Namespace, store: Path, *more: str) -> list[str]:
    """A static and a small adaptive run of three defenses."""
    fixed = ["--defenses", "none,noise,ttc", "--threat", "static,adaptive", "--budget", "smoke"]
    chosen = ["--vlm", args.vlm, "--data", args.data, "--limit", str(args.limit), "--attacks", "PGD(steps=4)"]
    return [*COMMAND, *fixed, *chosen, "--store", str(store), *more]


def cells(store: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every finished cell by name, in the order of sample ids."""
    found = {}
    for path in sorted((store / "cells").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found[path.stem] = sorted(rows, key=lambda r: str(r["sample_id"]))
    return found


def differences(a: dict[str, list[dict[str, Any]]], b: dict[str, list[dict[str, Any]]]) -> tuple[int, int, list[str]]:
    """(values compared, of these equal to the last bit, what differs by more than is allowed)."""
    compared = equal = 0
    wrong = [] if a.keys() == b.keys() else [f"cells differ: {sorted(a.keys() ^ b.keys())}"]
    for name in a.keys() & b.keys():
        for left, right in zip(a[name], b[name], strict=True):
            close = abs(left.get("margin", 1.0)) < 1e-3 or abs(left.get("clean_margin", 1.0)) < 1e-3
            for key in left.keys() - TRAVEL:
                compared += 1
                equal += left[key] == right[key]
                same = left[key] == right[key] or close
                if isinstance(left[key], float):
                    same = same or abs(left[key] - right[key]) <= 1e-3 * max(1.0, abs(left[key]))
                if not same:
                    wrong.append(f"{name[:8]} {left['sample_id']} {key}: {left[key]} and {right[key]}")
    return compared, equal, wrong


def killed(args: argparse.Namespace, store: Path) -> int:
    """Kill the run with SIGKILL whenever a few more batches are in the store; returns how often it was killed."""
    times = 0
    for wanted in (2, 6, 12):
        run = subprocess.Popen(command(args, store, "--batch-size", "4"), stdout=-3, stderr=-3)
        while run.poll() is None and len(list(store.glob("cells/**/*.parquet"))) < wanted:
            time.sleep(0.05)
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            run.wait()
            times += 1
    return times


def main() -> int:
    """Run, compare, print; the exit status is 1 where rows differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="lite")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    variants = {f"batch {b}": ["--batch-size", str(b)] for b in (1, 8, 64)}
    variants["2 workers"] = ["--batch-size", "4", "--executor", "process", "--workers", "2"]
    stores, report = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        kills = killed(args, Path(folder) / "killed")
        variants[f"{kills} kills"] = ["--batch-size", "4"]
        for name, options in variants.items():
            store = Path(folder) / ("killed" if "kills" in name else name.replace(" ", "-"))
            subprocess.run(command(args, store, *options), check=True, stdout=-3, stderr=-3)
            stores[name] = cells(store)
        first = stores["batch 1"]
        for name, found in stores.items():
            compared, equal, wrong = differences(first, found)
            report[name] = {"compared": compared, "bit_equal": equal, "different": wrong}
    if args.json:
        print(json.dumps({"vlm": args.vlm, "data": args.data, "n": args.limit, "against batch 1": report}))
    else:
        for name, r in report.items():
            print(f"{name:10} {r['compared']} values, {r['bit_equal']} bit-equal, {len(r['different'])} different")
            for line in r["different"][:5]:
                print(f"    {line}")
    return int(any(r["different"] for r in report.values()))


if __name__ == "__main__":
    raise SystemExit(main())
