"""R-TPT and TAPT against the published one-image-at-a-time procedures, on the same views of the same images.

    python benchmarks/prompts.py [--vlm tiny] [--data shapes] [--images 16] [--repeats 3] [--json]

Bar: at least 5 times faster per image, with the same predictions. Both modes take turns in one process and the median
of the ratios counts, so that a busy machine hurts both alike. TAPT runs on prompts that were trained for a few steps:
how good they are changes no time. Its published procedure spends a forward and a backward on each of 64 views and one
forward more, and no exact one can do with fewer than 64 forwards: passes are printed beside the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import ironclip
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.defenses.rtpt import RTPT
from ironclip.defenses.tapt import TAPT

FEW = Loop(steps=5, batch_size=16, lr=0.01, optimizer="sgd", hold_out=0)


def contest(defense: Any, state: Any, clf: ironclip.ZeroShot, x: Any, rng: SampleRNG, repeats: int) -> dict[str, Any]:
    """Seconds an image of both modes, in turns, their passes, and whether they agree."""
    slow = ironclip.build(f"{type(defense).__name__}(mode=reference, {_fields(defense)})")
    runs = {"fast": defense.apply(clf, state), "reference": slow.apply(clf, state)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    out: dict[str, Any] = {}
    passes = {}
    with torch.no_grad():
        for i in range(repeats + 1):
            for name, run in runs.items():
                images, ids = (x, rng) if i else (x[:2], rng[:2])
                with clf.vlm.counting() as count:
                    start = time.perf_counter()
                    out[name] = run(images, ids)
                    spent = (time.perf_counter() - start) / len(images)
                if i:
                    times[name].append(spent)
                    passes[name] = [n / len(images) for n in (count.forwards, count.backwards, count.texts)]
    gap = float((out["fast"] - out["reference"]).abs().max())
    return {
        "defense": repr(defense),
        "images": len(x),
        "fast_ms": 1000 * statistics.median(times["fast"]),
        "reference_ms": 1000 * statistics.median(times["reference"]),
        "ratio": statistics.median(b / a for a, b in zip(times["fast"], times["reference"], strict=True)),
        "passes": passes,
        "same_predictions": bool(torch.equal(out["fast"].argmax(1), out["reference"].argmax(1))),
        "largest_logit_gap": gap,
    }


def _fields(defense: Any) -> str:
    return repr(defense).partition("(")[2].rstrip(")")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="tiny")
    parser.add_argument("--data", default="")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    vlm = ironclip.load(args.vlm)
    name = args.data or ("photos" if args.vlm.startswith("lite") else "shapes")
    data = ironclip.load_data(name, vlm.image_size)
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    x, _, ids = next(data.batches(args.images))
    rng = SampleRNG.of(0, ids)
    entries: list[tuple[Any, Any]] = [(RTPT(), None), (RTPT(augment="crops"), None)]
    if vlm.parts.vision_blocks:
        train = ironclip.load_data("shapes:train", vlm.image_size).subset(64) if name == "shapes" else data
        entries += [(t, t.fit(clf, train, loop=FEW)) for t in (TAPT(), TAPT(variant="vli"), TAPT(variant="vlj"))]
    rows = [contest(d, s, clf, x, rng, args.repeats) for d, s in entries]
    if args.json:
        print(json.dumps({"vlm": args.vlm, "threads": torch.get_num_threads(), "rows": rows}))
        return
    for r in rows:
        print(
            f"{r['defense']:28s} fast {r['fast_ms']:7.1f} ms, reference {r['reference_ms']:7.1f} ms an image: "
            f"{r['ratio']:.2f} times (bar 5); same predictions: {r['same_predictions']}, "
            f"logits within {r['largest_logit_gap']:.1e}"
        )
        for mode, (f, b, t) in r["passes"].items():
            print(f"    {mode:9s} {f:6.1f} forwards, {b:5.1f} backwards, {t:6.1f} texts an image")


if __name__ == "__main__":
    main()
