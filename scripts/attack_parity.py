"""Our attacks against the independent pyautoattack on real models, image by image, and the order of their strength.

    IRONCLIP_DATA=... python scripts/attack_parity.py [--out results/attacks] [PART ...]

A part is one attack on one model; its JSON appears whole or not at all, and a part that is there is not run again, so
an interrupted run goes on where it stopped. ``same start``: both get the same numbers, all images run to the end (APGD)
or until fooled (APGD-T between targets); ``own streams``: each draws its own. Images that are wrong from the start
count in ``n`` and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

import ironclip
from ironclip.attacks.apgd import ranked
from ironclip.core.ball import start_delta
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.types import prediction
from ironclip.evaluation.store import write_atomic

SETS = {"tiny": (("shapes", 200),), "lite": (("folder:oxford_pets/dev", 16), ("folder:caltech101/dev", 16))}
BATCH = {"tiny": 100, "lite": 16}


class Module(torch.nn.Module):
    """A classifier as the module that the peer wants; its logits may be overwritten."""

    def __init__(self, clf: ironclip.ZeroShot) -> None:
        super().__init__()
        self.clf = clf

    def forward(self, x: Tensor) -> Tensor:
        return self.clf(x).clone()


@dataclass(frozen=True)
class Batch:
    """Images that the classifier gets right, with their streams."""

    clf: ironclip.ZeroShot
    x: Tensor
    y: Tensor
    rng: SampleRNG


Pair = Callable[[Batch, Fraction], tuple[Tensor, Tensor, float, float]]


@cache
def batches(name: str) -> tuple[int, tuple[Batch, ...]]:
    """How many images there are, and those that are right in batches."""
    vlm, n, out = ironclip.load(name), 0, []
    for spec, limit in SETS[name]:
        data = ironclip.load_data(spec, vlm.image_size, limit=limit)
        clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
        for x, labels, ids in data.batches(BATCH[name]):
            y, n = clf.labels(labels), n + len(ids)
            with torch.no_grad():
                right = prediction(clf(x)) == y
            out.append(Batch(clf, x[right], y[right], SampleRNG.of(0, ids)[right]))
    return n, tuple(out)


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Adversarial images and seconds."""
    start = time.perf_counter()
    made = run().detach()
    return made, time.perf_counter() - start


def apgd(loss: str, steps: int = 100) -> Pair:
    """APGD from the same start, everything to the end."""

    def pair(b: Batch, eps: Fraction) -> tuple[Tensor, Tensor, float, float]:
        attack = ironclip.build(f"APGD(eps={eps}, loss={loss}, steps={steps}, reference_quirk=True)")
        start = b.x + start_delta(b.x, float(eps), "linf", "surface", b.rng.fold("apgd", 0).fold("start"))
        peer = APGDAttack(Module(b.clf), n_iter=steps, norm="Linf", eps=float(eps), loss=loss, device="cpu")
        peer.init_hyperparam(b.x)
        ours, a = timed(lambda: attack(b.clf, b.x, b.y, rng=b.rng).x_adv)
        theirs, t = timed(lambda: peer.attack_single_run(b.x, b.y, x_init=start)[3])
        return ours, theirs, a, t

    return pair


def apgd_t(b: Batch, eps: Fraction) -> tuple[Tensor, Tensor, float, float]:
    """APGD-T from the same starts towards the same nine classes."""
    attack = ironclip.build(f"APGDT(eps={eps}, reference_quirk=True, policy=first_success)")
    ours, a = timed(lambda: attack(b.clf, b.x, b.y, rng=b.rng).x_adv)
    stream = b.rng.fold("apgd_t")
    _, classes, _ = ranked(b.clf, b.x, b.y, attack.targets, stream)

    def theirs() -> Tensor:
        peer = APGDAttack_targeted(Module(b.clf), n_iter=attack.steps, norm="Linf", eps=float(eps), device="cpu")
        peer.init_hyperparam(b.x)
        adv, left = b.x.clone(), torch.ones(len(b.y), dtype=torch.bool)
        for t in range(classes.shape[1]):
            rows = left.nonzero().flatten()
            if rows.numel() == 0:
                break
            noise = start_delta(
                b.x[rows], float(eps), "linf", "surface", stream.fold("target", t, 0)[rows].fold("start")
            )
            peer.y_target = classes[rows, t]
            _, held, _, found = peer.attack_single_run(b.x[rows], b.y[rows], x_init=b.x[rows] + noise)
            new = rows[~held.bool()]
            adv[new], left[new] = found[~held.bool()], False
        return adv

    made, t = timed(theirs)
    return ours, made, a, t


def fab_t(b: Batch, eps: Fraction) -> tuple[Tensor, Tensor, float, float]:
    """FAB-T: nothing is drawn at random."""
    peer = FABAttack_PT(Module(b.clf), norm="Linf", n_iter=100, n_restarts=1, eps=float(eps), seed=0, device="cpu")
    peer.targeted, peer.n_target_classes = True, min(9, b.clf.k - 1)
    return versus(f"FABT(eps={eps}, policy=first_success)", peer, b)


def square(b: Batch, eps: Fraction) -> tuple[Tensor, Tensor, float, float]:
    """Square with 500 queries, own streams."""
    peer = SquareAttack(Module(b.clf), n_queries=500, eps=float(eps), resc_schedule=False, seed=0, device="cpu")
    return versus(f"Square(eps={eps}, queries=500, policy=first_success)", peer, b)


def standard(b: Batch, eps: Fraction) -> tuple[Tensor, Tensor, float, float]:
    """The whole published ensemble, own streams."""
    ours, a = timed(lambda: ironclip.build(f"aa-standard(eps={eps})")(b.clf, b.x, b.y, rng=b.rng).x_adv)
    peer = pyautoattack.AutoAttack(Module(b.clf), norm="Linf", eps=float(eps), seed=0)
    theirs, t = timed(lambda: peer.run_standard_evaluation(b.x, b.y, batch_size=len(b.y))[0])
    return ours, theirs, a, t


def versus(spec: str, peer: Any, b: Batch) -> tuple[Tensor, Tensor, float, float]:
    """Our attack by its spec and the peer's ``perturb``."""
    attack = ironclip.build(spec)
    ours, a = timed(lambda: attack(b.clf, b.x, b.y, rng=b.rng).x_adv)
    theirs, t = timed(lambda: peer.perturb(b.x, b.y))
    return ours, theirs, a, t


def parity(name: str, pair: Pair, eps: Fraction) -> dict[str, Any]:
    """Flags of both, how many differ, and how many of those have a margin of at least 1e-3 on both sides."""
    n, parts = batches(name)
    out: dict[str, Any] = {"n": n, "right": 0, "ours": 0, "theirs": 0, "only_ours": 0, "only_theirs": 0, "clear": 0}
    seconds = [0.0, 0.0]
    for b in parts:
        x_ours, x_theirs, a, t = pair(b, eps)
        seconds = [seconds[0] + a, seconds[1] + t]
        with torch.no_grad():
            zs = [b.clf(x) for x in (x_ours, x_theirs)]
        ours, theirs = (prediction(z) != b.y for z in zs)
        near = torch.minimum(*(margin(z, b.y).abs() for z in zs)) < 1e-3
        out["right"] += len(b.y)
        out["ours"] += int(ours.sum())
        out["theirs"] += int(theirs.sum())
        out["only_ours"] += int((ours & ~theirs).sum())
        out["only_theirs"] += int((theirs & ~ours).sum())
        out["clear"] += int(((ours != theirs) & ~near).sum())
    return out | {"seconds_ours": round(seconds[0], 1), "seconds_theirs": round(seconds[1], 1)}


ORDER = {
    "random": "RandomPoints(eps={eps}, points=16)",
    "fgsm": "FGSM(eps={eps})",
    "pgd-10": "PGD(eps={eps}, steps=10, policy=first_success)",
    "pgd-100": "PGD(eps={eps}, steps=100, policy=first_success)",
    "apgd": "APGD(eps={eps}, policy=first_success)",
    "aa-standard": "aa-standard(eps={eps})",
    "pgd-10 at 64/255": "PGD(eps=64/255, steps=10, policy=first_success)",
}


def order(name: str, eps: Fraction) -> dict[str, Any]:
    """How many images stay right under attacks from the weakest to the strongest."""
    n, parts = batches(name)
    left = {}
    for title, text in ORDER.items():
        attack = ironclip.build(text.format(eps=eps))
        left[title] = sum(int((~attack(b.clf, b.x, b.y, rng=b.rng).success).sum()) for b in parts)
        print(f"  {title}: {left[title]} of {n} stay right", flush=True)
    return {"n": n, "right": sum(len(b.y) for b in parts), "left": left}


SMALL, HALF, TWO, FOUR = Fraction(1, 255), Fraction(1, 510), Fraction(2, 255), Fraction(4, 255)
PARTS: dict[str, tuple[str, Fraction, str, Pair | None]] = {
    "tiny-apgd-ce": ("tiny", SMALL, "same start", apgd("ce")),
    "tiny-apgd-dlr": ("tiny", SMALL, "same start", apgd("dlr")),
    "tiny-square-500": ("tiny", SMALL, "own streams", square),
    "lite-apgd-ce": ("lite", HALF, "same start", apgd("ce")),
    "lite-apgd-dlr": ("lite", HALF, "same start", apgd("dlr")),
    "lite-square-500": ("lite", SMALL, "own streams", square),
    "tiny-aa-standard": ("tiny", TWO, "own streams", standard),
    "tiny-order": ("tiny", TWO, "", None),
    "tiny-square-500-at-4": ("tiny", FOUR, "own streams", square),
    "lite-apgd-t": ("lite", SMALL, "same start", apgd_t),
    "lite-fab-t": ("lite", SMALL, "no randomness", fab_t),
    "lite-order": ("lite", SMALL, "", None),
    "tiny-apgd-t": ("tiny", SMALL, "same start", apgd_t),
    "tiny-fab-t": ("tiny", SMALL, "no randomness", fab_t),
}


def main() -> int:
    """Run what is missing, print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("results/attacks"))
    args = parser.parse_args()
    for unknown in set(args.parts) - set(PARTS):
        parser.error(f"no part {unknown!r}; valid: {', '.join(PARTS)}")
    for part in args.parts or PARTS:
        path, (name, eps, start, pair) = args.out / f"{part}.json", PARTS[part]
        if not path.exists():
            print(f"{part} ...", flush=True)
            found = parity(name, pair, eps) if pair is not None else order(name, eps)
            sets = ", ".join(f"{spec} (first {n})" for spec, n in SETS[name])
            head = {"part": part, "vlm": name, "data": sets, "eps": str(eps), "start": start}
            tools = {p: version(p) for p in ("torch", "pyautoattack", "ironclip")}
            record = head | found | {"threads": torch.get_num_threads(), "versions": tools}
            write_atomic(path, lambda p, r=record: p.write_text(json.dumps(r, indent=1) + "\n"))
        print(part, json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "versions"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
