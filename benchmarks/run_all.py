"""All benchmarks, one after the other: ratios, never absolute times alone. ``make benchmarks`` calls this."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUNS = (
    ("precision.py",),
    ("pgd.py", "--vlm", "lite"),
    ("pgd.py", "--vlm", "tiny"),
    ("attacks.py", "--vlm", "tiny"),
    ("attacks.py", "--vlm", "lite", "--images", "8", "--steps", "10", "--queries", "50"),
    ("matrix.py",),
    ("memory.py",),
    ("prompts.py", "--images", "8"),
    ("invariance.py",),
)


def main() -> int:
    """Exit status: the number of benchmarks that could not run."""
    here = Path(__file__).parent
    failed = 0
    for name, *options in RUNS:
        print(f"== {name} {' '.join(options)}", flush=True)
        failed += subprocess.run([sys.executable, str(here / name), *options], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
