"""R-TPT: prompt tuning on single confident views, then a vote of all views weighted by how many others lie near.

Sheng, Liang, Wang, He, CVPR 2025 (arXiv 2504.11195). The published figures are for an attacker who sees plain CLIP;
with gradients through the views accuracy falls to a few percent (arXiv 2606.23132). Most of the static gain is the vote
itself: compare ``RTPT(steps=0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.core.augment import crop_views, draw_crops
from ironclip.core.augmix import draw_mixes, mix_views
from ironclip.core.check import check_choice, check_images
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.prompts import SoftPrompts
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._prompts import AdamW, Texts, Tuned, along, encode_views, entropies, most_confident, picked


@method
class RTPT:
    """One prompt step per image on the entropies of its most confident views, then the reliability-weighted vote.

    ``views``: the plain image and ``views`` - 1 random crops and flips, with ``augment=augmix`` mixed by AugMix, as
    published for all but ImageNet's sets (``crops``). ``share``: of views that are tuned on, rounded down. ``steps``,
    ``lr``: of AdamW on the context; 0 steps is the vote alone, which works on any model. ``neighbours``: a view's
    reliability is the mean cosine with that many nearest views, turned into weights by a softmax at ``temperature``;
    ``weighting=uniform`` takes the plain mean. ``template``: the words before ``{}`` are tuned.
    ``self_match``: how a view's cosine with itself is left out, ``mask`` (the diagonal) or ``threshold`` (cosines of 1
    and more, decided by rounding). ``quantise=truncate``: pixels are cut to 8 bits first, as by a stored image.
    ``mode``: ``reference`` answers by the published procedure, one image at a time and with every pass repeated: the
    same predictions, for timing. ``preset="reference"`` takes the published threshold and truncation.

    Called on x: (b, 3, h, w) pixels in [0, 1]. ``views`` forwards of the image tower and no backward; one backward and
    one forward of the text tower over all classes. Crops are cut from x, at the model's input size; the published code
    cuts clean ones from the full photograph, keeps 8-bit images between operations, and lets the attacker see the
    prompt of the previous image: none of that belongs to a defense. Gradients hold the tuned prompt constant, which is
    exact where the optimiser's first step is a sign. Raises ValueError for bad fields and images, and where steps > 0
    for a model without token embeddings.
    """

    info: ClassVar[Info] = Info(
        name="rtpt",
        title="R-TPT",
        paradigm="test-time adaptation",
        kind="tuning",
        paper="Sheng et al. 2025, arXiv 2504.11195",
        code="https://github.com/TomSheng21/R-TPT",
        randomized=True,
    )
    surrogates: ClassVar[tuple[str, ...]] = ("initial", "unrolled")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"self_match": "threshold", "quantise": "truncate"}
    }

    views: int = 64
    share: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    neighbours: int = 20
    temperature: float = 0.01
    augment: str = "augmix"
    weighting: str = "reliability"
    template: str = "a photo of a {}."
    self_match: str = "mask"
    quantise: str = "none"
    mode: str = "fast"

    def __post_init__(self) -> None:
        check_choice(self.augment, ("augmix", "crops"), "augment")
        check_choice(self.weighting, ("reliability", "uniform"), "weighting")
        check_choice(self.self_match, ("mask", "threshold"), "self_match")
        check_choice(self.quantise, ("none", "truncate"), "quantise")
        check_choice(self.mode, ("fast", "reference"), "mode")
        if self.views < 1:
            raise ValueError(f"views must be at least 1, got {self.views}; write 64")
        if self.weighting == "reliability" and not 1 <= self.neighbours < self.views:
            raise ValueError(
                f"neighbours must be at least 1 and below views, got neighbours={self.neighbours} of "
                f"views={self.views}; write views=64, neighbours=20 or weighting=uniform"
            )
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; 0 is the vote alone")
        if not 0 < self.share <= 1 or (self.steps and self.selected < 1):
            raise ValueError(
                f"share must be in (0, 1] and leave a view to tune on, got share={self.share} of "
                f"views={self.views}; write share=0.1"
            )
        if not self.lr > 0 or not self.temperature > 0:
            raise ValueError(f"lr and temperature must be positive, got {self.lr} and {self.temperature}")

    @property
    def selected(self) -> int:
        """How many views are tuned on."""
        return int(self.views * self.share)

    def apply(self, clf: ZeroShot, state: State | None = None) -> Tuned:
        """The tuned vote; randomised, images independent of each other."""
        return self._tuned(clf, "frozen")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "unrolled") -> Tuned:
        """The same values with another derivative. ``initial``: that of the vote with the prompt before tuning.
        ``unrolled``: that of the tuned prompt, too, its sign step taken for one of the same length along the gradient.
        """
        check_choice(name, self.surrogates, "surrogate of RTPT")
        return self._tuned(clf, name)

    def weights(self, features: Tensor) -> Tensor:
        """(b, v, d) unit features to the vote's weights (b, v), which sum to 1."""
        return self.weights_of(features @ features.transpose(1, 2))

    def weights_of(self, cosines: Tensor) -> Tensor:
        """The same from the cosines (b, v, v) of the views."""
        v = cosines.shape[1]
        if self.weighting == "uniform":
            return torch.full_like(cosines[:, 0], 1 / v)
        if self.self_match == "mask":
            out = torch.eye(v, dtype=torch.bool, device=cosines.device)
        else:
            out = cosines.detach() >= 1.0
        near = cosines.masked_fill(out, float("-inf")).topk(self.neighbours, dim=2).values
        left = near.detach() > float("-inf")  # with the threshold, repeated views may leave fewer than neighbours
        scores = torch.where(left, near, 0.0).sum(dim=2) / left.sum(dim=2).clamp(min=1)
        return (scores / self.temperature).softmax(dim=1)

    def cotangent(self, features: Tensor, texts: Tensor, scale: float) -> Tensor:
        """Derivative (b, k, d) of the mean entropy of the views' softmax with respect to the class features.

        ``features``: (b, s, d) of the selected views. ``texts``: (k, d) or (b, k, d). With logits l, softmax q and
        entropy H it is scale / s times the sum over views of -q (log q + H) f^T.
        """
        logp = (scale * features @ texts.transpose(-1, -2)).log_softmax(dim=-1)
        q = logp.exp()
        g = -q * (logp - (q * logp).sum(dim=-1, keepdim=True))
        return scale / features.shape[1] * g.transpose(1, 2) @ features

    def vote(self, clf: ZeroShot, features: Tensor, how: str = "frozen", texts: Texts | None = None) -> Tensor:
        """Logits (b, k) from the unit features (b, v, d) of an image's views."""
        table = texts or Texts(clf, self.template, self.steps > 0)
        soft, start = table.soft, table.initial
        mean = (self.weights(features).unsqueeze(-1) * features).sum(dim=1)
        if soft is None:
            return clf.scale * mean @ start.T
        unrolled = how == "unrolled" and features.requires_grad
        prompts = self._tune(clf, soft, features if unrolled else features.detach(), start, unrolled)
        if unrolled:
            tuned = soft.features(prompts)
        else:
            with torch.no_grad():
                tuned = soft.features(prompts)
        logits = clf.scale * (tuned @ mean.unsqueeze(-1)).squeeze(-1)
        return forwarded(logits, clf.scale * mean @ start.T) if how == "initial" else logits

    def _tune(self, clf: ZeroShot, soft: SoftPrompts, features: Tensor, texts: Tensor, unrolled: bool) -> Tensor:
        """(b, 1, m, w) prompts after the steps; the selection of the first step stays."""
        index = most_confident(clf.scale * features @ texts.T, self.selected)
        chosen = picked(features, index)
        prompts = soft.initial.expand(len(features), -1, -1, -1)
        optimiser = AdamW(self.lr)
        for step in range(self.steps):
            if step == 0:
                grad = soft.pullback(soft.initial, self.cotangent(chosen, texts, clf.scale), keep=unrolled)
            else:
                grad = self._gradient(clf, soft, chosen, prompts)
            made = optimiser.step(prompts.detach(), grad.detach())
            prompts = forwarded(made, prompts + along(grad, self.lr)) if unrolled else made
        return prompts

    def _gradient(self, clf: ZeroShot, soft: SoftPrompts, chosen: Tensor, prompts: Tensor) -> Tensor:
        """(b, 1, m, w) gradient at prompts that differ between images; a constant for attackers."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = prompts.detach().clone().requires_grad_(True)
            logits = clf.scale * chosen.detach().clone() @ soft.features(leaf).transpose(1, 2)
            return torch.autograd.grad(entropies(logits).mean(dim=1).sum(), leaf)[0]

    def make_views(self, x: Tensor, rng: SampleRNG) -> Callable[[Tensor, slice], Tensor]:
        """``(x, part) -> (b, p, 3, h, w)``: some of this draw's views."""
        size = (x.shape[-2], x.shape[-1])
        crops = draw_crops(rng, self.views, size, plain=True)
        mixes = draw_mixes(rng, self.views - 1) if self.augment == "augmix" else None

        def some(x: Tensor, part: slice) -> Tensor:
            if self.quantise == "truncate":
                x = forwarded((x * 255).floor() / 255, x)
            made = crop_views(x, crops.views(part))
            plain = int(part.start == 0)
            if mixes is None or made.shape[1] == plain:
                return made
            mixed = mix_views(made[:, plain:], mixes.views(slice(part.start + plain - 1, part.stop - 1)))
            return torch.cat([made[:, :plain], mixed], dim=1)

        return some

    def _tuned(self, clf: ZeroShot, how: str) -> Tuned:
        return Tuned(clf, partial(self._score, clf, Texts(clf, self.template, self.steps > 0), how))

    def _score(self, clf: ZeroShot, texts: Texts, how: str, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, clf.vlm.image_size)
        stream = rng_or_rows(rng, x, "rtpt").fold("rtpt")
        if self.mode == "reference" and not wants_graph(x):
            from ironclip.defenses._rtpt_published import published

            return published(self, clf, texts.soft, x, stream)
        views = self.make_views(x, stream)
        return self.vote(clf, encode_views(clf.vlm, x, self.views, views), how, texts)
