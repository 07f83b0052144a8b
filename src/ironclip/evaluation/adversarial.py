"""Adversarial examples from the store, or made now and stored: attacked once, shown to every defense."""

from __future__ import annotations

import torch
from torch import Tensor

from ironclip.core.ball import norms
from ironclip.core.types import Attack, prediction
from ironclip.core.zeroshot import ZeroShot
from ironclip.evaluation.block import Block
from ironclip.evaluation.store import AdvSet

COLUMNS = ("loss", "final_loss", "forwards", "backwards", "zero_grad", "zero_pixels", "late_gain")


def adversarial(
    block: Block, target: ZeroShot, fast: ZeroShot, attack: Attack, kept: AdvSet, x: Tensor, y: Tensor, ids: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(b, 3, h, w) examples for a batch and their columns; what is returned is what the store holds.

    ``fast`` is attacked, ``target`` (fp32) says whether it worked. Stored examples are believed after one of them was
    classified again: a changed model or a damaged file shows as another label. Raises ValueError then.
    """
    todo = kept.missing(ids)
    if todo:
        pick = [ids.index(t) for t in todo]
        rng = block.rng(todo).fold("attack")
        result = attack(fast, x[pick], y[pick], rng=rng)
        radius = norms(result.x_adv - x[pick], "linf").double()
        code = AdvSet.encode(x[pick], result.x_adv, radius)
        with torch.no_grad():
            z = target(AdvSet.decode(x[pick], code, radius), rng.fold("check"))
        wrong = prediction(z) != y[pick]
        columns = {name: getattr(result, name) for name in COLUMNS}
        columns |= {
            "success": wrong,
            "adv_pred": prediction(z),
            "adv_gap": z.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1),
            "dtype_flip": result.success != wrong,
            "radius": radius,
        }
        kept.put(todo, code, columns)
    found = kept.get(ids)
    x_adv = AdvSet.decode(x, found["delta"], found["radius"])
    if not todo:
        with torch.no_grad():
            z = target(x_adv[:1], block.rng(ids[:1]).fold("check"))
        if int(prediction(z)) != int(found["adv_pred"][0]) and float(found["adv_gap"][0]) > 1e-3:
            raise ValueError(
                f"stored adversarial examples in {kept.folder} do not give the label they were stored with; "
                "delete that folder and run again"
            )
    return x_adv, found
