"""What PGD costs beyond the passes it cannot do without, and against foolbox on the same images and start.

    python benchmarks/pgd.py [--vlm tiny] [--batch-size 16] [--steps 10] [--repeats 5] [--json]

Bar: at most 1.05 times (steps + 1) bare forwards plus steps bare backwards of the same model, batch and precision. All
contestants take turns in one process and the median of the repeats counts, so that a busy machine hurts all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import eagerpy as ep
import foolbox
import torch
from torch import Tensor

import ironclip
from ironclip.core.rng import SampleRNG


class Module(torch.nn.Module):
    """A classifier as the module that foolbox wants."""

    def __init__(self, clf: ironclip.ZeroShot) -> None:
        super().__init__()
        self.clf = clf

    def forward(self, x: Tensor) -> Tensor:
        return self.clf(x)


def bare(clf: ironclip.ZeroShot, x: Tensor, y: Tensor, steps: int) -> None:
    """The passes alone."""
    for _ in range(steps):
        leaf = x.clone().requires_grad_(True)
        z = clf(leaf)
        torch.autograd.grad((z.logsumexp(1) - z.gather(1, y[:, None]).squeeze(1)).sum(), leaf)
    with torch.no_grad():
        clf(x)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="lite")
    parser.add_argument("--data", default="")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    vlm = ironclip.load(args.vlm)
    data = ironclip.load_data(args.data or ("photos" if args.vlm.startswith("lite") else "shapes"), vlm.image_size)
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    x, labels, ids = next(data.batches(args.batch_size))
    y, rng = clf.labels(labels), SampleRNG.of(0, ids)
    ours = ironclip.build(f"PGD(eps=1/255, alpha=1/255, steps={args.steps}, start=zero, returned=last)")
    model = foolbox.PyTorchModel(Module(clf).eval(), bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=1 / 255, steps=args.steps, random_start=False)
    contest: dict[str, Callable[[], object]] = {
        "bare passes": lambda: bare(clf, x, y, args.steps),
        "ironclip PGD": lambda: ours(clf, x, y, rng=rng),
        "foolbox PGD": lambda: theirs.run(model, ep.astensor(x), ep.astensor(y), epsilon=1 / 255),
    }
    times: dict[str, list[float]] = {name: [] for name in contest}
    for i in range(args.repeats + 1):
        for name, run in contest.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    equal = bool(torch.equal(ours(clf, x, y, rng=rng).x_adv, theirs.run(model, x, y, epsilon=1 / 255)))
    result = {
        "vlm": args.vlm,
        "batch_size": len(x),
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "against_bare": statistics.median(
            a / b for a, b in zip(times["ironclip PGD"], times["bare passes"], strict=True)
        ),
        "against_foolbox": statistics.median(
            a / b for a, b in zip(times["ironclip PGD"], times["foolbox PGD"], strict=True)
        ),
        "equal_to_foolbox": equal,
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, s in seconds.items():
        print(f"{name:14s} {s:8.3f} s")
    print(f"PGD / bare passes {result['against_bare']:.3f} (bar 1.05); PGD / foolbox {result['against_foolbox']:.3f}")
    print(f"the same perturbation as foolbox, to the last bit: {equal}")


if __name__ == "__main__":
    main()
