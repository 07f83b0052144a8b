"""Attacks against foolbox and pyautoattack: the same model, images and settings, taking turns in one process.

    python benchmarks/attacks.py [--vlm tiny] [--images 32] [--steps 20] [--targets 3] [--queries 100] [--json]

Printed per attack: median seconds of both, the median ratio (below 1: we are faster), how many images each fooled, and
what letting fooled images leave the batch saves us, in time and in image-tower passes. PGD starts at the image and must
give the same bits; APGD gets the same start; the others draw their own numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import eagerpy as ep
import foolbox
import pyautoattack
import torch
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch import Tensor

import ironclip
from ironclip.core.ball import start_delta
from ironclip.core.check import as_fraction
from ironclip.core.rng import SampleRNG
from ironclip.core.types import prediction


class Module(torch.nn.Module):
    """A classifier as the module that the peers want; its logits may be overwritten."""

    def __init__(self, clf: ironclip.ZeroShot) -> None:
        super().__init__()
        self.clf = clf

    def forward(self, x: Tensor) -> Tensor:
        return self.clf(x).clone()


@dataclass(frozen=True)
class Contest:
    """``ours`` and ``theirs`` return adversarial images; ``shrinks``: ours with fooled images leaving the batch."""

    peer: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    shrinks: Callable[[], Tensor] | None = None


def contests(clf: ironclip.ZeroShot, x: Tensor, y: Tensor, rng: SampleRNG, args: Any) -> dict[str, Contest]:
    """Who meets whom; theirs run as they ship, with the same numbers of steps, targets and queries."""
    eps, value, steps = args.eps, float(as_fraction(args.eps)), args.steps
    module, model = Module(clf).eval(), foolbox.PyTorchModel(Module(clf).eval(), bounds=(0, 1), device="cpu")

    def ours(text: str) -> Callable[[], Tensor]:
        attack = ironclip.build(text)
        return lambda: attack(clf, x, y, rng=rng).x_adv

    def foolbox_pgd() -> Tensor:
        attack = foolbox.attacks.LinfPGD(abs_stepsize=value / 4, steps=10, random_start=False)
        return attack.run(model, ep.astensor(x), ep.astensor(y), epsilon=value).raw

    def peer_apgd() -> Tensor:
        peer = APGDAttack(module, n_iter=steps, norm="Linf", eps=value, loss="ce", device="cpu")
        peer.init_hyperparam(x)
        start = x + start_delta(x, value, "linf", "surface", rng.fold("apgd", 0).fold("start"))
        return peer.attack_single_run(x, y, x_init=start)[3]

    def peer_fast() -> Tensor:
        peer = pyautoattack.AutoAttack(
            module, norm="Linf", eps=value, seed=0, version="custom", attacks=["apgd-ce", "apgd-t"]
        )
        peer.apgd.n_restarts, peer.apgd.n_iter, peer.apgd_targeted.n_iter = 1, steps, steps
        peer.apgd_targeted.n_target_classes = args.targets
        return peer.run_standard_evaluation(x, y, batch_size=len(x))[0]

    def peer_square() -> Tensor:
        peer = SquareAttack(module, n_queries=args.queries, eps=value, resc_schedule=False, seed=0, device="cpu")
        return peer.perturb(x, y)

    members = f"members=('APGD(steps={steps})', 'APGDT(steps={steps}, targets={args.targets})')"
    apgd, square = f"APGD(eps={eps}, steps={steps}, reference_quirk=True", f"Square(eps={eps}, queries={args.queries}"
    pgd = f"PGD(eps={eps}, rel_alpha=1/4, steps=10, start=zero, returned=last"
    return {
        "PGD-10": Contest("foolbox", ours(f"{pgd})"), foolbox_pgd, ours(f"{pgd}, policy=first_success)")),
        "APGD-CE": Contest("pyautoattack", ours(f"{apgd})"), peer_apgd, ours(f"{apgd}, policy=first_success)")),
        "aa-fast": Contest("pyautoattack", ours(f"AutoAttack(eps={eps}, {members})"), peer_fast),
        "Square": Contest(
            "pyautoattack", ours(f"{square}, policy=first_success)"), peer_square, ours(f"{square}, policy=max_loss)")
        ),
    }


def passes(clf: ironclip.ZeroShot, run: Callable[[], Tensor]) -> int:
    """Image-tower passes, forward and backward."""
    with clf.vlm.counting() as count:
        run()
    return count.forwards + count.backwards


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="tiny")
    parser.add_argument("--data", default="")
    parser.add_argument("--eps", default="1/255")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    vlm = ironclip.load(args.vlm)
    data = ironclip.load_data(args.data or ("photos" if args.vlm.startswith("lite") else "shapes"), vlm.image_size)
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    x, labels, ids = next(data.batches(args.images))
    with torch.no_grad():
        right = prediction(clf(x)) == clf.labels(labels)
    x, y, rng = x[right], clf.labels(labels)[right], SampleRNG.of(0, ids)[right]
    settings = {k: getattr(args, k) for k in ("vlm", "eps", "steps", "targets", "queries", "repeats")}
    result: dict[str, Any] = {**settings, "images": len(x), "threads": torch.get_num_threads(), "attacks": {}}
    for name, contest in contests(clf, x, y, rng, args).items():
        runs = {"ours": contest.ours, "theirs": contest.theirs}
        runs |= {"other": contest.shrinks} if contest.shrinks else {}
        times: dict[str, list[float]] = {k: [] for k in runs}
        made: dict[str, Tensor] = {}
        for i in range(args.repeats + 1):
            for who, run in runs.items():
                start = time.perf_counter()
                made[who] = run().detach()
                if i:  # the first turn warms up
                    times[who].append(time.perf_counter() - start)
        with torch.no_grad():
            fooled = {who: prediction(clf(made[who])) != y for who in ("ours", "theirs")}
        line: dict[str, Any] = {
            "peer": contest.peer,
            "seconds": {who: statistics.median(t) for who, t in times.items() if who != "other"},
            "ratio": statistics.median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True)),
            "fooled": {who: int(f.sum()) for who, f in fooled.items()},
            "differ": int((fooled["ours"] ^ fooled["theirs"]).sum()),
            "same_bits": bool(torch.equal(made["ours"], made["theirs"])),
        }
        if contest.shrinks:
            whole, left = ("other", "ours") if name == "Square" else ("ours", "other")
            spent = {who: passes(clf, runs[who]) for who in (whole, left)}
            line["leaving_saves"] = {
                "time": 1 - statistics.median(a / b for a, b in zip(times[left], times[whole], strict=True)),
                "passes": 1 - spent[left] / spent[whole],
            }
        result["attacks"][name] = line
        if not args.json:
            saved = line.get("leaving_saves")
            tail = (
                f"; leaving saves {saved['time']:.0%} of the time, {saved['passes']:.0%} of the passes" if saved else ""
            )
            print(
                f"{name:8s} {line['seconds']['ours']:7.2f} s, {contest.peer} {line['seconds']['theirs']:7.2f} s, ratio "
                f"{line['ratio']:.2f}; fooled {line['fooled']['ours']} and {line['fooled']['theirs']} of {len(x)}, "
                f"{line['differ']} differ{', same bits' if line['same_bits'] else ''}{tail}",
                flush=True,
            )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
