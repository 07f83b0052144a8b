"""A few images of a cell for people who would rather look than read."""

from __future__ import annotations

import base64
import io
from fractions import Fraction
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ironclip.core.spec import digest, to_text
from ironclip.core.types import Attack, Classifier
from ironclip.core.views import base_of
from ironclip.evaluation.block import Block, Entry


def png(image: Tensor, side: int = 224) -> str:
    """(3, h, w) pixels in [0, 1] as a base64 PNG, enlarged to ``side`` where smaller."""
    array = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    if picture.width < side:
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def top5(clf: Classifier, names: tuple[str, ...], x: Tensor, block: Block, ids: list[str]) -> list[list[Any]]:
    """The five most probable classes of one image: [[name, probability], ...]."""
    with torch.no_grad():
        p = clf(x, block.rng(ids).fold("gallery")).softmax(dim=1)[0]
    best = p.topk(min(5, p.numel()))
    return [[names[i], round(float(v), 4)] for v, i in zip(best.values, best.indices.tolist(), strict=True)]


def keep(
    block: Block,
    entry: Entry,
    cell_digest: str,
    attack: Attack | None,
    threat: str,
    defended: Classifier,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    ids: list[str],
    eps: Fraction | None = None,
    norm: str = "linf",
) -> None:
    """Store the pictures of those images of the batch that are among the first ``block.gallery`` of the data set."""
    chosen = set(block.data.ids[: block.gallery])
    seen = base_of(defended, "seen")
    budget: Fraction = eps if eps is not None else attack.eps  # type: ignore[union-attr]
    for i, sample in enumerate(ids):
        if sample not in chosen:
            continue
        one, adv = x[i : i + 1], x_adv[i : i + 1]
        delta = (adv - one)[0]
        magnified = 0.5 + delta / (2 * max(float(delta.abs().max()), 1e-8))
        shown = None
        if callable(seen):
            with torch.no_grad():
                shown = png(seen(adv, block.rng([sample]).fold("gallery"))[0])
        item = {
            "vlm": block.vlm.name,
            "data": block.data.name,
            "defense": entry.defense.info.name,
            "title": entry.defense.info.title,
            "threat": threat,
            "attack": to_text(attack) if attack is not None else f"worst of the composition, {norm}",
            "eps": f"{budget.numerator}/{budget.denominator}",
            "sample_id": sample,
            "label": int(y[i]),
            "class_name": block.clf.class_names[int(y[i])],
            "clean_png": png(one[0]),
            "adv_png": png(adv[0]),
            "diff_png": png(magnified),
            "seen_png": shown,
            "undefended_clean": top5(block.clf, block.clf.class_names, one, block, [sample]),
            "undefended_adv": top5(block.clf, block.clf.class_names, adv, block, [sample]),
            "defended_clean": top5(defended, block.clf.class_names, one, block, [sample]),
            "defended_adv": top5(defended, block.clf.class_names, adv, block, [sample]),
        }
        block.store.put_json("gallery", f"{cell_digest}-{digest(sample)[:12]}", item)


def collect(block: Block, cell_digest: str) -> list[dict[str, Any]]:
    """The stored pictures of a cell, in the data set's order."""
    found = [
        block.store.get_json("gallery", f"{cell_digest}-{digest(s)[:12]}") for s in block.data.ids[: block.gallery]
    ]
    return [item for item in found if item]
