"""One perturbation for all images: universal adversarial perturbations.

Moosavi-Dezfooli et al. 2017 (arXiv 1610.08401); at the scale of CLIP: X-Transfer 2025 (arXiv 2505.05528). Found by
mini-batch ascent on the summed loss, not by the first paper's boundary steps.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks._fields import check_fields
from ironclip.attacks._objective import Objective
from ironclip.attacks._tally import Tally, value
from ironclip.core.ball import project_delta, start_delta, unit_step
from ironclip.core.check import check_labels
from ironclip.core.grad import Fn, draws_of, loss_and_grad
from ironclip.core.losses import UNTARGETED, feat_cos
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import AttackResult, Classifier
from ironclip.core.views import base_of


@method
class Universal:
    """Ascent on one ``delta`` (1, 3, h, w) shared by all images.

    ``eps``: budget in pixel units. ``alpha``: step, or None for eps / 10. ``epochs``: passes over the images in
    mini-batches of ``batch_size`` in an order that follows the samples, not their rows. ``loss``: a classification
    loss, or feat_cos, which pushes embeddings away from the clean ones without labels. Starts at random. Costs
    epochs (F + B) + 1 F per image, for feat_cos 1 F more.

    ``fit`` returns the perturbation for use on other images: report those it was made on and those held out apart.
    Called with ``x``: (b, 3, h, w) pixels in [0, 1], ``y``: (b,) labels, it fits on the whole batch and judges it
    there; raises ValueError for bad input or fields.
    """

    name: ClassVar[str] = "universal"
    revision: ClassVar[int] = 1
    coupled: ClassVar[bool] = True

    eps: Fraction = Fraction(12, 255)
    alpha: Fraction | None = None
    norm: str = "linf"
    loss: str = "margin"
    epochs: int = 10
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_fields(self, losses=(*UNTARGETED, "feat_cos"), epochs=1, batch_size=1)

    @torch.no_grad()
    def fit(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> Tensor:
        """The perturbation (1, 3, h, w); add it to any image and clamp to [0, 1]."""
        return self._fit(clf, x, y, rng, Tally(x, self.epochs))

    @torch.no_grad()
    def __call__(self, clf: Classifier, x: Tensor, y: Tensor, *, rng: SampleRNG) -> AttackResult:
        """Fit on the batch, judge on the batch."""
        tally = Tally(x, self.epochs)
        delta = self._fit(clf, x, y, rng, tally)
        goal = Objective("margin" if self.loss == "feat_cos" else self.loss, x, y)
        rows, x_adv = torch.arange(x.shape[0], device=x.device), (x + delta).clamp_(0.0, 1.0)
        out, last = value(clf, x_adv, lambda z: goal(z, rows), rng.fold("universal", "judge"))
        tally.spend(rows, draws_of(clf))
        tally.offer(rows, x_adv, last, goal.fooled(out, rows), self.epochs)
        return replace(tally.result(notes=goal.notes), late_gain=x.new_zeros(len(rows)))

    def _fit(self, clf: Classifier, x: Tensor, y: Tensor, rng: SampleRNG, tally: Tally) -> Tensor:
        goal = Objective("margin" if self.loss == "feat_cos" else self.loss, x, y)
        target, clean = (clf, None) if self.loss != "feat_cos" else self._encoder(clf, x, y, tally)
        alpha = float(self.alpha if self.alpha is not None else self.eps / 10)
        stream = rng.fold("universal")
        start = SampleRNG(rng.seed, (0,)).fold("universal", "start")
        delta = start_delta(x.new_zeros(1, *x.shape[1:]), float(self.eps), self.norm, "uniform", start)
        for epoch in range(self.epochs):
            order = stream.fold("order").at(epoch).uniform(1).flatten().argsort(stable=True).to(x.device)
            for rows in order.split(self.batch_size):
                at = (x[rows] + delta).clamp_(0.0, 1.0)

                def loss(z: Tensor, rows: Tensor = rows) -> Tensor:
                    return goal(z, rows) if clean is None else feat_cos(z, clean[rows])

                g = loss_and_grad(target, at, loss, stream.fold("defense").at(epoch)[rows])
                tally.spend(rows, g.draws, g.draws)
                tally.gradient(rows, g.grad)
                step = unit_step(g.grad.sum(dim=0, keepdim=True), self.norm)
                delta = project_delta(delta + alpha * step, float(self.eps), self.norm)
        return delta

    def _encoder(self, clf: Classifier, x: Tensor, y: Tensor, tally: Tally) -> tuple[Fn, Tensor]:
        vlm, k = base_of(clf, "vlm"), base_of(clf, "k")
        if vlm is None:
            raise ValueError("feat_cos needs a classifier with an image encoder, such as ZeroShot; use loss=margin")
        check_labels(y, x.shape[0], k if isinstance(k, int) else None)
        tally.spend(torch.arange(x.shape[0]), 1)
        with torch.no_grad():
            clean: Tensor = vlm.encode_image(x, normalize=False)
        return lambda pixels, _rng: vlm.encode_image(pixels, normalize=False), clean
