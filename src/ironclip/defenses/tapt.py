"""TAPT: adversarially trained prompts, moved once per image towards sure views and the usual statistics of tokens.

Wang, Chen, Zhang, Chen, Ma, CVPR 2025 (arXiv 2411.13136). No adaptive attack is reported there, and the published code
tunes from untrained random prompts in its variants V and VLI, so that part of its robustness is the failure of examples
made on the trained prompts to transfer: compare ``reset_to=random``, and read the graybox and adaptive columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ironclip.core.augment import Crops, crop_views, draw_crops
from ironclip.core.check import as_fraction, check_choice, check_eps, check_images
from ironclip.core.grad import forwarded, second_order, wants_graph
from ironclip.core.hooks import class_token_only
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._deep import block_inputs, distance, entropy_of_mean, visual_prompts, with_prompts
from ironclip.defenses._prompts import ROWS, AdamW, Tuned, along, encode_views, most_confident
from ironclip.defenses._tapt_state import Prompts, Reference, assembled, fit_prompts


@method
class TAPT:
    """One prompt step per image, then the plain image under the tuned prompts.

    ``variant``: ``v`` tunes visual tokens, ``vli`` text tokens too, ``vlj`` text tokens and linear maps from them to
    the visual ones. ``tokens`` per block, in the first ``depth`` blocks at most. ``views``: the plain image and random
    crops and flips; the share ``share`` of lowest entropy, rounded down, gives the loss: the entropy of their mean
    prediction, plus ``alpha`` times the distance of their tokens' moments from those of clean images under the
    robust prompts, plus 1 - ``alpha`` times that under the standard prompts. ``alignment``: ``code``, the weights that
    the published figures were made with, over the inputs of the first 8 blocks, or ``paper``, over all.
    ``align_prompts``: count the prompt tokens in, where a statistic of the very prompts in use ties and its sign is
    rounding. ``steps``, ``lr``: of AdamW. ``reset_to``: every image starts from the fitted prompts (``checkpoint``) or,
    as in the published code, from untrained ones (``random``; first-layer text tokens and ``vlj`` stay fitted).
    ``template``: text prompts, tuned at their first ``tokens`` tokens. ``mode=reference``: the published procedure,
    one image and all views in one graph. ``eps``, ``step``, ``pgd``, ``recipe``: of the attack and the loop in ``fit``.

    Costs ``views`` forwards, a forward and backward of the selected views, one forward. Gradients hold the tuned
    prompts constant. Raises ValueError for a model without a transformer image tower, states of another model or
    another variant, bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="tapt",
        title="TAPT",
        paradigm="test-time adaptation",
        kind="tuning",
        paper="Wang et al. 2025, arXiv 2411.13136",
        code="https://github.com/xinwong/TAPT",
        randomized=True,
        needs_state=True,
        towers=("transformer",),
    )
    surrogates: ClassVar[tuple[str, ...]] = ("unrolled",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reference": {"align_prompts": True, "reset_to": "random"}}
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "short": Loop(steps=600, batch_size=32, lr=0.035, optimizer="sgd", warmup=20),
        "reference": Loop(steps=50_000, batch_size=32, lr=0.035, optimizer="sgd"),
    }

    variant: str = "v"
    views: int = 64
    share: float = 0.1
    steps: int = 1
    lr: float = 5e-4
    alpha: float = 0.5
    alignment: str = "code"
    align_prompts: bool = False
    reset_to: str = "checkpoint"
    tokens: int = 2
    depth: int = 9
    template: str = "a photo of a {}."
    mode: str = "fast"
    eps: Fraction = Fraction(1, 255)
    step: Fraction = Fraction(1, 255)
    pgd: int = 2
    recipe: str = "short"

    def __post_init__(self) -> None:
        check_choice(self.variant, ("v", "vli", "vlj"), "variant")
        check_choice(self.alignment, ("code", "paper"), "alignment")
        check_choice(self.reset_to, ("checkpoint", "random"), "reset_to")
        check_choice(self.mode, ("fast", "reference"), "mode")
        check_choice(self.recipe, self.LOOPS, "recipe")
        object.__setattr__(self, "eps", check_eps(self.eps))
        object.__setattr__(self, "step", as_fraction(self.step, "step"))
        least = 2 if self.alignment == "paper" else 1
        if self.views < 1 or not 0 < self.share <= 1 or self.selected < least:
            why = ", whose variance over the views needs two" if least == 2 else ""
            raise ValueError(
                f"share must be in (0, 1] and select at least {least} of the views{why}, got share={self.share} of "
                f"views={self.views}; write views=64, share=0.1"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}; write 0.5")
        if self.steps < 0 or not self.lr > 0:
            raise ValueError(f"steps must not be negative and lr positive, got {self.steps} and {self.lr}")
        if self.tokens < 1 or self.depth < 1:
            raise ValueError(f"tokens and depth must be at least 1, got {self.tokens} and {self.depth}")

    @property
    def selected(self) -> int:
        """How many views are tuned on."""
        return int(self.views * self.share)

    def loop(self) -> Loop:
        """The recipe's loop."""
        return self.LOOPS[self.recipe]

    def fit(self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0, session: Any = None) -> State:
        """Robust and standard prompts trained on labelled images, then the moments of tokens under both.

        ``data``: a data set whose labels are those of ``clf``. Raises ValueError for data that cannot be used.
        """
        return fit_prompts(self, clf, data, loop or self.loop(), seed, session)

    def fitted(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The classifier under the prompts that every image starts from: what a graybox attacker holds."""
        start = self._reference(clf, state)
        visual, text = assembled(start.reset)
        return clf.with_weights(start.texts(text)).with_vlm(with_prompts(clf.vlm, visual))

    def apply(self, clf: ZeroShot, state: State | None = None) -> Tuned:
        """The tuned classifier; randomised, images independent of each other."""
        return Tuned(clf, partial(self._score, clf, self._reference(clf, state), "frozen"))

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "unrolled") -> Tuned:
        """The same values, with the derivative of the tuned prompts: their sign step taken for one along the gradient.

        It needs second derivatives of the image tower over the selected views.
        """
        check_choice(name, self.surrogates, "surrogate of TAPT")
        return Tuned(clf, partial(self._score, clf, self._reference(clf, state), name))

    def _reference(self, clf: ZeroShot, state: State | None) -> Reference:
        return Reference.read(self, clf, state)

    def _score(self, clf: ZeroShot, ref: Reference, how: str, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, clf.vlm.image_size)
        stream = rng_or_rows(rng, x, "tapt").fold("tapt")
        if self.mode == "reference" and not wants_graph(x):
            from ironclip.defenses._tapt_published import published

            return published(self, clf, ref, x, stream)
        crops = draw_crops(stream, self.views, (x.shape[-2], x.shape[-1]), plain=True)
        unrolled = how == "unrolled" and wants_graph(x)
        tuned = self.tune(clf, ref, x if unrolled else x.detach(), crops, unrolled)
        return self.answer(clf, ref, x, tuned)

    def answer(self, clf: ZeroShot, ref: Reference, x: Tensor, prompts: Prompts) -> Tensor:
        """Logits (b, k) of the plain images under prompts of their own."""
        visual, text = assembled(prompts)
        with visual_prompts(clf.vlm, visual.transpose(0, 1)), class_token_only(clf.vlm.image):
            features = clf.vlm.encode_image(x)
        return clf.scale * (ref.texts(text) @ features.unsqueeze(-1)).squeeze(-1)

    def tune(self, clf: ZeroShot, ref: Reference, x: Tensor, crops: Crops, unrolled: bool = False) -> Prompts:
        """Every image's prompts after the steps; a few images at a time."""
        prompts = {k: v.expand(len(x), *v.shape) for k, v in ref.reset.items()}
        if not self.steps or not len(x):
            return prompts
        index = self.select(clf, ref, x, crops)
        chosen = crops.pick(index)
        together = max(1, ROWS // self.selected)
        optimisers = {k: AdamW(self.lr) for k in prompts}
        for step in range(self.steps):
            parts = []
            for i in range(0, len(x), together):
                rows = slice(i, i + together)
                here = {k: v[rows] for k, v in prompts.items()}
                views = crop_views(x[rows], Crops(chosen.boxes[rows], chosen.flips[rows]))
                parts.append(self.gradient(clf, ref, views, here, shared=step == 0, keep=unrolled))
            for k, v in prompts.items():
                grad = torch.cat([p[k] for p in parts])
                made = optimisers[k].step(v.detach(), grad.detach())
                prompts[k] = forwarded(made, v + along(grad, self.lr)) if unrolled else made
        return prompts

    def select(self, clf: ZeroShot, ref: Reference, x: Tensor, crops: Crops) -> Tensor:
        """(b, s) indices of the views with the lowest entropy under the initial prompts; no graph is built."""
        visual, text = assembled(ref.reset)
        with torch.no_grad(), visual_prompts(clf.vlm, visual):
            features = encode_views(clf.vlm, x.detach(), self.views, lambda x, part: crop_views(x, crops.views(part)))
            return most_confident(clf.scale * features @ ref.texts(text).T, self.selected)

    def loss(self, clf: ZeroShot, ref: Reference, views: Tensor, visual: Tensor, texts: Tensor) -> Tensor:
        """(b,) of the selected views (b, s, 3, h, w) under ``visual`` (b, depth, m, w) and ``texts`` (b, k, d)."""
        b, s = views.shape[:2]
        spread = visual.repeat_interleave(s, dim=0).transpose(0, 1)
        with visual_prompts(clf.vlm, spread), block_inputs(clf.vlm, ref.blocks) as seen:
            features = clf.vlm.encode_image(views.flatten(0, 1)).unflatten(0, (b, s))
        total = entropy_of_mean(clf.scale * features @ texts.transpose(1, 2))
        kept = seen[0].shape[1] - (0 if self.align_prompts else self.tokens)
        tokens = [h.unflatten(0, (b, s))[:, :, :kept] for h in seen]
        for weight, (mean, var) in zip((self.alpha, 1 - self.alpha), ref.moments, strict=True):
            if weight > 0:
                total = total + weight * distance(tokens, mean[:, :kept], var[:, :kept], self.alignment)
        return total

    def gradient(
        self, clf: ZeroShot, ref: Reference, views: Tensor, prompts: Prompts, shared: bool, keep: bool
    ) -> Prompts:
        """Each image's gradient at its prompts (b, ...); ``shared`` ones use one text graph for all images."""
        with torch.inference_mode(False), torch.enable_grad(), second_order() if keep else nullcontext():
            held = keep and any(v.requires_grad for v in prompts.values())
            leaf = prompts if held else {k: v.detach().clone().requires_grad_(True) for k, v in prompts.items()}
            visual, text = assembled(leaf)
            start = assembled(ref.reset)[1]
            with torch.no_grad():
                now = ref.texts(start if shared else text)
                now = now.expand(len(views), *now.shape[-2:])
            texts = now.detach().clone().requires_grad_(text is not None)
            pixels = views if keep else views.detach().clone()
            loss = self.loss(clf, ref, pixels, visual, texts).sum()
            wanted = [*leaf.values(), *([texts] if text is not None else [])]
            grads = list(torch.autograd.grad(loss, wanted, create_graph=keep, allow_unused=True))
            if text is not None and ref.soft is not None and start is not None:
                back = grads.pop()
                if shared:
                    pulled = ref.soft.pullback(start, back, keep=keep)
                else:
                    (pulled,) = torch.autograd.grad(ref.texts(text), text, back, create_graph=keep)
                named = list(leaf).index("text")
                grads[named] = pulled if grads[named] is None else grads[named] + pulled
            return dict(zip(leaf, grads, strict=True))
