"""Fit the states that ship with the project, one `ironclip fit` command each. Resumable: finished ones are skipped.

    python scripts/fit_zoo.py --vlm tiny [--out src/ironclip/zoo] [--only tecoa,fare] [--steps 400]
    IRONCLIP_DATA=... python scripts/fit_zoo.py --vlm lite --out zoo

A state lands in OUT/VLM/eps1/NAME.safetensors (or eps4), NAME.json beside it: recipe, data, seed, hash, licence. The
run's folder (checkpoints, metrics) is removed when the state is written.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-c", "from ironclip.cli import main; main()", "fit"]
PHOTOGRAPHS = ("caltech101", "flowers102", "dtd", "eurosat", "sun15", "food101_3")
DATA = {"tiny": "shapes:train", "lite": ",".join(f"folder:{s}/train" for s in PHOTOGRAPHS)}
SEVEN = ("tecoa", "fare", "pmg_aft", "tima", "tga_zsr", "laat", "mmcoa")


@dataclass(frozen=True)
class Recipe:
    """One state: its folder, the defense as a spec, and what differs from the recipe's own loop."""

    folder: str
    spec: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Registry name of the defense."""
        return self.spec.partition("(")[0]


RECIPES = (
    *(Recipe("eps1", name) for name in SEVEN),
    *(Recipe("eps4", f"{name}(eps=4/255, alpha=2/255)") for name in ("tecoa", "fare")),
    *(Recipe("eps1", name) for name in ("apt", "advpt")),
)


def main() -> int:
    """Exit status: the number of states that could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", choices=sorted(DATA), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("src/ironclip/zoo"))
    parser.add_argument("--only", default="", help="registry names, comma separated")
    parser.add_argument("--steps", type=int, help="updates of the fine-tuning methods; default: the recipe's")
    parser.add_argument("--lr", type=float, help="highest learning rate of the fine-tuning methods")
    args = parser.parse_args()
    wanted = set(filter(None, args.only.split(",")))
    failed = 0
    for recipe in RECIPES:
        out = args.out / args.vlm / recipe.folder
        if (wanted and recipe.name not in wanted) or (out / f"{recipe.name}.json").exists():
            continue
        own = [("--steps", args.steps), ("--lr", args.lr)] if recipe.name in SEVEN else []
        chosen = [part for option, value in own if value is not None for part in (option, str(value))]
        fixed = ["--vlm", args.vlm, "--data", DATA[args.vlm], "--out", str(out), "--half", "--licence", "Apache-2.0"]
        print(f"== {recipe.spec} -> {out}", flush=True)
        done = subprocess.run([*COMMAND, recipe.spec, *fixed, *chosen, *recipe.options], check=False).returncode == 0
        failed += not done
        if done:
            shutil.rmtree(out / f"{recipe.name}.run", ignore_errors=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
