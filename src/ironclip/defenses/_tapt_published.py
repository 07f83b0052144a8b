"""TAPT as its authors' code runs it: one image at a time, all views in one graph, texts anew in every pass.

The same predictions as the fast path, kept to show what that saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ironclip.core.augment import crop_views, draw_crops
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._deep import block_inputs, distance, entropy_of_mean, visual_prompts
from ironclip.defenses._prompts import WEIGHT_DECAY, entropies, full_texts
from ironclip.defenses._tapt_state import Prompts, Reference, assembled

if TYPE_CHECKING:
    from ironclip.defenses.tapt import TAPT


def published(defense: TAPT, clf: ZeroShot, ref: Reference, x: Tensor, rng: SampleRNG) -> Tensor:
    """Logits (b, k): image by image, with the views that the fast path draws from the same streams."""
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        for i in range(len(x)):
            image = x[i : i + 1].detach().clone()
            crops = draw_crops(rng[[i]], defense.views, (x.shape[-2], x.shape[-1]), plain=True)
            made = [crop_views(image, crops.views(slice(j, j + 1)))[0] for j in range(defense.views)]
            rows.append(_one(defense, clf, ref, torch.cat(made)))
    return torch.stack(rows)


def _one(defense: TAPT, clf: ZeroShot, ref: Reference, views: Tensor) -> Tensor:
    prompts: Prompts = {k: v.clone().requires_grad_(True) for k, v in ref.reset.items()}
    optimiser = torch.optim.AdamW(list(prompts.values()), lr=defense.lr, weight_decay=WEIGHT_DECAY)

    def logits(pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        visual, text = assembled(prompts)
        with visual_prompts(clf.vlm, visual), block_inputs(clf.vlm, ref.blocks) as seen:
            features = clf.vlm.encode_image(pixels)
        if text is None or ref.soft is None:
            texts = clf.vlm.encode_text([defense.template.format(n) for n in clf.class_names])
        else:
            texts = full_texts(ref.soft, text)
        return clf.scale * features @ texts.T, list(seen)

    chosen: Tensor | None = None
    for _ in range(defense.steps):
        z, seen = logits(views)
        if chosen is None:
            chosen = entropies(z.detach()).argsort(stable=True)[: defense.selected]
        loss = entropy_of_mean(z[chosen][None]).sum()
        kept = seen[0].shape[1] - (0 if defense.align_prompts else defense.tokens)
        tokens = [h[chosen][None, :, :kept] for h in seen]
        for weight, (mean, var) in zip((defense.alpha, 1 - defense.alpha), ref.moments, strict=True):
            if weight > 0:
                loss = loss + weight * distance(tokens, mean[:, :kept], var[:, :kept], defense.alignment).sum()
        for p, g in zip(prompts.values(), torch.autograd.grad(loss, list(prompts.values())), strict=True):
            p.grad = g
        optimiser.step()
    with torch.no_grad():
        return logits(views[:1])[0][0]
