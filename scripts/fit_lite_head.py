"""Rebuild src/ironclip/models/lite_head.safetensors, the head of `lite`, in closed form.

    IRONCLIP_DATA=.../data python scripts/fit_lite_head.py [--out FILE] [--cv]

W minimises sum_i w_i |(f_i - mu) W - r_i|^2 + lam |W|^2 over the `train` photographs: r = t - c / 2 with t the centred
unit embedding of the photograph's class name and c the class mixture of `lite:conse`; the 200 ImageNet photographs are
used without their labels, r = c / 2, to hold the head where the mixture already stands. An image of a set of n weighs
n^-1/2, an anchor image ANCHOR times that; mu is the weighted mean feature. `--cv` prints the table that LAM and ANCHOR
were chosen from: five folds inside `train`, top-1 of each set on the held-out fold, for the anchor the agreement with
`lite:conse` among 1000 names; the choice is the highest mean of the eight columns. No `dev` part is ever opened.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ironclip.data import load_data
from ironclip.data.prompts import class_list
from ironclip.models import lite
from ironclip.models.efficientnet import classifier, load_efficientnet
from ironclip.models.weights import sha256_of

SETS = ("caltech101", "flowers102", "eurosat", "stanford_cars", "dtd", "sun15", "food101_3")
ANCHOR_SET = "imagenet1k_sample"
TEMPLATE = "a photo of a {}."
LAM, ANCHOR, SEED, FOLDS = 3.0, 1.0, 0, 5


@dataclass(frozen=True)
class Part:
    """Features f (n, 1280), mixtures c (n, d), labels y (n,), unit class embeddings t (k, d), manifest hash."""

    f: Tensor
    c: Tensor
    y: Tensor
    t: Tensor
    manifest: str
    anchor: bool


def fit(parts: list[tuple[Part, Tensor]], lam: float, anchor: float) -> tuple[Tensor, Tensor]:
    """(W, mu) from the chosen rows of every part, in float64."""
    f = torch.cat([p.f[rows] for p, rows in parts]).double()
    r = torch.cat([(p.c if p.anchor else p.t[p.y] * 2 - p.c)[rows] for p, rows in parts]).double() * 0.5
    w = torch.cat([torch.full((len(rows),), len(rows) ** -0.5 * (anchor if p.anchor else 1)) for p, rows in parts])
    w = w.double().unsqueeze(1)
    mu = (w * f).sum(dim=0) / w.sum()
    x = f - mu
    gram = x.T @ (w * x) + lam * torch.eye(f.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, x.T @ (w * r)).float(), mu.float()


def correct(p: Part, rows: Tensor, w: Tensor, mu: Tensor) -> Tensor:
    """Per image: right class, or for the anchor the same class as the mixture alone."""
    e = lite.MIX * p.c[rows] + (p.f[rows] - mu) @ w
    truth = (p.c[rows] @ p.t.T).argmax(1) if p.anchor else p.y[rows]
    return ((e @ p.t.T).argmax(1) == truth).float()


def folds(y: Tensor) -> Tensor:
    """Fold of every image, each class spread evenly."""
    generator = torch.Generator().manual_seed(SEED)
    fold = torch.zeros_like(y)
    for label in y.unique():
        rows = (y == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        fold[rows] = (torch.arange(len(rows)) + int(label)) % FOLDS
    return fold


def cross_validate(parts: dict[str, Part]) -> None:
    """Print the table over lam and anchor weights."""
    fold = {name: folds(p.y) for name, p in parts.items()}
    print("   lam anchor " + " ".join(f"{name[:8]:>8}" for name in parts) + "     mean")
    for lam in (0.3, 1.0, 2.0, 3.0, 5.0, 10.0):
        for anchor in (1.0, 4.0, 16.0):
            hits: dict[str, list[Tensor]] = {name: [] for name in parts}
            for k in range(FOLDS):
                w, mu = fit([(p, (fold[n] != k).nonzero()[:, 0]) for n, p in parts.items()], lam, anchor)
                for n, p in parts.items():
                    hits[n].append(correct(p, (fold[n] == k).nonzero()[:, 0], w, mu))
            row = [100 * float(torch.cat(h).mean()) for h in hits.values()]
            cells = " ".join(f"{v:8.1f}" for v in row)
            print(f"{lam:6g} {anchor:6g} {cells} {sum(row) / len(row):8.2f}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=lite.HEAD_FILE)
    parser.add_argument("--cv", action="store_true", help="print the cross-validation table and write nothing")
    args = parser.parse_args()

    raw = lite.image_weights()
    bert, tokenize = lite.load_sentence_encoder()
    text = lite.LiteText(bert, torch.zeros(384))

    def embed(names: list[str]) -> Tensor:
        return torch.cat([text.sentence(tokenize([TEMPLATE.format(n)])) for n in names])

    table = embed(class_list("imagenet")["names"]["fixed"])
    centre = table.mean(dim=0)
    backbone = load_efficientnet(raw)
    image = lite.LiteImage(backbone, lite.LiteHead(classifier(raw), table, centre, None, None))
    parts: dict[str, Part] = {}
    for name in (*SETS, ANCHOR_SET):
        data = load_data(f"folder:{name}/train", size=224)
        found = []
        for x, y, _ in data.batches(32):
            inputs = (x - lite.MEAN[0]) / lite.STD[0]
            found.append((image.pooled(inputs.contiguous(memory_format=torch.channels_last)), y))
        f, y = (torch.cat(column) for column in zip(*found, strict=True))
        t = F.normalize(embed(data.class_names) - centre, dim=-1)
        parts[name] = Part(f, image.head.conse(f), y, t, data.manifest_hash, name == ANCHOR_SET)
        print(f"{name}: {len(y)} train photographs, {len(t)} names", flush=True)
    if args.cv:
        cross_validate(parts)
        return
    w, mu = fit([(p, torch.arange(len(p.y))) for p in parts.values()], LAM, ANCHOR)
    tensors = {"w": w.half().contiguous(), "mu": mu, "table": table, "centre": centre}
    about = {
        "script": "scripts/fit_lite_head.py",
        "seed": SEED,
        "lambda": LAM,
        "anchor": ANCHOR,
        "template": TEMPLATE,
        "train": {name: p.manifest for name, p in parts.items()},
        "image_sha256": lite.IMAGE_SHA256,
        "text_sha256": lite.TEXT_SHA256,
    }
    if args.out.is_file():
        for name, old in load_file(args.out).items():
            print(f"{name}: largest difference from the present file {float((old - tensors[name]).abs().max()):.2e}")
    part = args.out.with_name(args.out.name + ".tmp")
    save_file(tensors, part, metadata={"about": json.dumps(about, sort_keys=True)})  # one key: the order is fixed
    os.replace(part, args.out)
    print(f"{args.out}: HEAD_SHA256 = {sha256_of(args.out)!r}")


if __name__ == "__main__":
    main()
