"""Adversarial images for other programs: PNG files that were judged as they are written, or exact floats."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ironclip.core.check import check_choice
from ironclip.core.rng import SampleRNG
from ironclip.core.space import Space
from ironclip.core.spec import full_text
from ironclip.core.zeroshot import ZeroShot
from ironclip.evaluation.block import Progress, Silent
from ironclip.evaluation.entries import load_state
from ironclip.evaluation.job import Job
from ironclip.evaluation.judge import judge
from ironclip.evaluation.run import open_data
from ironclip.evaluation.store import write_atomic
from ironclip.models import load
from ironclip.registry import build_attack, build_defense


def on_lattice(x: Tensor, x_adv: Tensor, eps: Fraction | None) -> Tensor:
    """(b, 3, h, w) nearest multiples of 1/255, inside the l_inf ball of ``eps`` where one is given.

    Where the ball around a pixel holds no such value the nearest one is taken: the clean pixel was not 8-bit either.
    """
    rounded = (x_adv * 255).round()
    if eps is not None:
        low = ((x - float(eps)) * 255 - 1e-3).ceil().clamp(0, 255)
        high = ((x + float(eps)) * 255 + 1e-3).floor().clamp(0, 255)
        inside = torch.minimum(torch.maximum(rounded, low), high)
        rounded = torch.where(low <= high, inside, rounded)
    return rounded / 255


def export_attack(
    vlm: str,
    data: str,
    attack: str,
    defense: str,
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    state: Path | None = None,
    device: str = "cpu",
    batch_size: int = 16,
    precision: str = "fp32",
    prompts: str | None = None,
    space: str = "model-input",
    form: str = "png",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack a data set through a defense, write images and ``record.json`` into ``out``, return the record.

    ``form``: ``png`` or ``float`` (one .npy of (3, h, w) float32 in [0, 1] per image). The defended prediction of the
    very pixels that are written is what the record tells. ``space``: see ``core/space.py``; images are
    written in it. Raises ValueError for bad specs before any work.
    """
    check_choice(form, ("png", "float"), "format")
    made, shield = build_attack(attack), build_defense(defense)
    if (out / "record.json").exists():
        raise ValueError(f"{out} already holds a record.json; pass a new --out folder")
    where = Space.parse(space)
    model = load(vlm, device=device).in_space(where)
    images = open_data(data, model, prompts=prompts, limit=limit, seed=seed, skip_bad=skip_bad)
    clf = ZeroShot.build(model, images.class_names, images.templates)
    fitted = load_state(Job(state=None if state is None else str(state)), shield, model.name, model.weights_hash)
    defended = shield.apply(clf, fitted)
    target = shield.apply(clf.with_vlm(model.at_precision(precision)), fitted)
    eps = getattr(made, "eps", None) if getattr(made, "norm", "linf") == "linf" else None
    shown = progress or Silent()
    shown.start(f"attack {images.name}", len(images))
    rows: list[dict[str, Any]] = []
    for x, y, ids in images.batches(batch_size):
        x, y = x.to(device), clf.labels(y.to(device))
        rng = SampleRNG.of(seed, ids)
        result = made(target, x, y, rng=rng.fold("attack"))
        before = judge(defended, x, y, rng.fold("clean"))
        exact = judge(defended, result.x_adv, y, rng.fold("adv"))
        pixels = on_lattice(x, result.x_adv, eps) if form == "png" else result.x_adv
        after = judge(defended, pixels, y, rng.fold("adv")) if form == "png" else exact
        for i, sample in enumerate(ids):
            name = f"{len(rows):05d}.{'png' if form == 'png' else 'npy'}"
            _write(out / name, pixels[i], form)
            rows.append(
                {
                    "file": name,
                    "sample_id": sample,
                    "label": int(y[i]),
                    "class": clf.class_names[int(y[i])],
                    "clean_pred": clf.class_names[int(before.pred[i])],
                    "adv_pred": clf.class_names[int(after.pred[i])],
                    "clean_correct": bool(before.correct[i] == 1),
                    "adv_correct": bool(after.correct[i] == 1),
                    "lost_by_rounding": bool(after.correct[i] > exact.correct[i]),
                    "linf": float((pixels[i] - x[i]).abs().max()),
                    "l2": float((pixels[i] - x[i]).norm()),
                    "forwards": int(result.forwards[i]),
                    "backwards": int(result.backwards[i]),
                }
            )
        shown.advance(len(ids))
    shown.done()
    record = {
        "vlm": model.name,
        "weights": model.weights_hash,
        "data": images.name,
        "attack": full_text(made),
        "defense": full_text(shield),
        "space": str(where),
        "seed": seed,
        "precision": precision,
        "form": form,
        "summary": {
            "n": len(rows),
            "clean_correct": sum(r["clean_correct"] for r in rows),
            "adv_correct": sum(r["adv_correct"] for r in rows),
            "lost_by_rounding": sum(r["lost_by_rounding"] for r in rows),
        },
        "images": rows,
    }
    write_atomic(out / "record.json", lambda p: p.write_text(json.dumps(record, indent=1)))
    return record


def _write(path: Path, pixels: Tensor, form: str) -> None:
    array = pixels.detach().cpu().numpy()
    if form == "float":
        write_atomic(path, lambda p: _save_npy(p, array))
    else:
        image = Image.fromarray((array.transpose(1, 2, 0) * 255).round().astype(np.uint8))
        write_atomic(path, lambda p: image.save(p, format="PNG"))


def _save_npy(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as f:
        np.save(f, array)
