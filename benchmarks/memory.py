"""Peak memory of a run on 200 and on 2,000 images: flat, because examples stream to the store.

    python benchmarks/memory.py [--vlm tiny] [--json]

Each run is a process of its own, so that one peak does not hide the other.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def child(vlm: str, n: int) -> float:
    """Peak resident memory in MB of a static run on ``n`` images of shapes."""
    import ironclip

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        attack = "PGD(eps=1/255, steps=1, returned=last)"
        ironclip.evaluate(vlm, "shapes", "none", attack, "static", limit=n, store=store, batch_size=50, costs=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="tiny")
    parser.add_argument("--child", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.child:
        print(child(args.vlm, args.child))
        return
    peaks = {}
    for n in (200, 2000):
        command = [sys.executable, __file__, "--vlm", args.vlm, "--child", str(n)]
        peaks[n] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    growth = peaks[2000] / peaks[200]
    if args.json:
        print(json.dumps({"vlm": args.vlm, "peak_mb": peaks, "ratio": growth}))
        return
    print(f"peak memory: {peaks[200]:.0f} MB on 200 images, {peaks[2000]:.0f} MB on 2,000; ratio {growth:.3f}")


if __name__ == "__main__":
    main()
