"""R-TPT as its authors' code runs it: one image at a time, every pass repeated, texts at their full length.

The same predictions as the fast path, kept to show what that saves. For an image it spends 1 + 4 x 64 passes of the
image tower and 5 of the text tower over all classes, although the views' features never change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ironclip.core.prompts import SoftPrompts
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._prompts import WEIGHT_DECAY, entropies, full_texts

if TYPE_CHECKING:
    from ironclip.defenses.rtpt import RTPT


def published(defense: RTPT, clf: ZeroShot, soft: SoftPrompts | None, x: Tensor, rng: SampleRNG) -> Tensor:
    """Logits (b, k): image by image, view by view, with the views that the fast path draws from the same streams."""
    if soft is None:
        raise ValueError("mode=reference tunes prompts; write steps=1, or mode=fast for the vote alone")
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        for i in range(len(x)):
            image = x[i : i + 1].detach().clone()
            some = defense.make_views(image, rng[[i]])
            made = [some(image, slice(j, j + 1))[0] for j in range(defense.views)]
            rows.append(_one(defense, clf, soft, image[0], torch.cat(made)))
    return torch.stack(rows)


def _one(defense: RTPT, clf: ZeroShot, soft: SoftPrompts, image: Tensor, views: Tensor) -> Tensor:
    p = soft.initial.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([p], lr=defense.lr, weight_decay=WEIGHT_DECAY)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = clf.vlm.encode_image(pixels)
        return features, clf.scale * features @ full_texts(soft, p).T

    with torch.no_grad():
        run(image[None])  # the undefended answer, which the published procedure reports beside its own
        run(views)  # the answers of the views before tuning, likewise
    chosen: Tensor | None = None
    for _ in range(defense.steps):
        z = run(views)[1]
        if chosen is None:
            chosen = entropies(z).argsort(stable=True)[: defense.selected]
        (p.grad,) = torch.autograd.grad(entropies(z[chosen]).mean(), p)
        optimiser.step()
    with torch.no_grad():
        weights = defense.weights(run(views)[0][None])[0]
        return weights @ run(views)[1]
