"""Four defenses on one static attack: the attack is made once, a rerun makes none, and the runner adds little.

    python benchmarks/matrix.py [--vlm tiny] [--limit 100] [--json]

Bar: wall time at most 1.3 times the attack plus one clean and one attacked pass of each defense, measured alone in the
same process just before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.evaluation.judge import judge
from ironclip.evaluation.recipes import BUDGETS
from ironclip.evaluation.store import AdvSet
from ironclip.registry import build_attack, build_defense

DEFENSES = ("none", "noise", "ttc", "clipure")


def alone(vlm: ironclip.VLM, data: object, attack: str, batch_size: int) -> float:
    """Seconds of the passes that no matrix can do without."""
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    made = build_attack(attack)
    draws = BUDGETS["smoke"].draws
    start = time.perf_counter()
    batches = [(x, clf.labels(y), ids) for x, y, ids in data.batches(batch_size)]
    advs = [made(clf, x, y, rng=SampleRNG.of(0, ids)).x_adv for x, y, ids in batches]
    for name in DEFENSES:
        defended = build_defense(name).apply(clf, None)
        for (x, y, ids), x_adv in zip(batches, advs, strict=True):
            judge(defended, x, y, SampleRNG.of(0, ids), draws)
            judge(defended, x_adv, y, SampleRNG.of(0, ids), draws)
    return time.perf_counter() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="tiny")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--attack", default="table2-pgd10")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    vlm = ironclip.load(args.vlm)
    data = ironclip.load_data(args.data, vlm.image_size, limit=args.limit)
    attacked: list[int] = []
    put = AdvSet.put

    def counting(self: AdvSet, ids: list[str], code: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
        attacked.append(len(ids))
        put(self, ids, code, columns)

    AdvSet.put = counting  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        options = {"store": Path(folder) / "store", "budget": "smoke", "batch_size": args.batch_size, "gallery": 0}
        ironclip.evaluate(
            vlm, data, "none", args.attack, "static", **(options | {"store": Path(folder) / "warm"}), costs=False
        )
        attacked.clear()
        passes = alone(vlm, data, args.attack, args.batch_size)
        start = time.perf_counter()
        ironclip.evaluate(vlm, data, DEFENSES, args.attack, "static", **options, costs=False)
        matrix, first = time.perf_counter() - start, sum(attacked)
        start = time.perf_counter()
        ironclip.evaluate(vlm, data, DEFENSES, args.attack, "static", **options, costs=False)
        rerun, second = time.perf_counter() - start, sum(attacked) - first
    result = {
        "vlm": args.vlm,
        "images": len(data),
        "defenses": len(DEFENSES),
        "attacked": first,
        "attacked_on_rerun": second,
        "seconds_alone": passes,
        "seconds_matrix": matrix,
        "seconds_rerun": rerun,
        "ratio": matrix / passes,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{len(DEFENSES)} defenses, {len(data)} images: attacked {first} images (once), on the rerun {second}")
    print(f"matrix {matrix:.2f} s, passes alone {passes:.2f} s, ratio {matrix / passes:.3f} (bar 1.3)")
    print(f"rerun {rerun:.2f} s")


if __name__ == "__main__":
    main()
