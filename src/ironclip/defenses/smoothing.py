"""Randomised smoothing: the majority vote under Gaussian noise, the one entry with a guarantee.

Cohen, Rosenfeld, Kolter 2019, "Certified Adversarial Robustness via Randomized Smoothing" (arXiv 1902.02918). If the
base classifier gives a class with probability at least p > 1/2 under noise of standard deviation sigma, the vote cannot
change within sigma * Phi^-1(p) in l2. A base model that was not trained under noise loses much accuracy, and at 4/255
an l_inf attack on 224 pixels reaches 6.1 in l2, far beyond any radius here: ``certify`` says what is proven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State, prediction
from ironclip.core.views import Scored
from ironclip.core.zeroshot import ZeroShot

ROWS = 64
"""Noised copies are encoded together up to this many images."""
ABSTAIN = -1


@dataclass(frozen=True, eq=False)
class Votes:
    """``labels``: (b,) class, -1 where the vote abstains; ``counts``: (b, k) votes; ``abstained``: how many did."""

    labels: Tensor
    counts: Tensor

    @property
    def abstained(self) -> int:
        """Images without an answer."""
        return int((self.labels == ABSTAIN).sum())


@dataclass(frozen=True, eq=False)
class Certificate:
    """``labels``: (b,) certified class, -1 for none; ``radius``: (b,) l2 radius in pixel units within which it cannot
    change, 0 for none; ``lower``: (b,) lower bound of its probability; ``counts``: (b, k) of the counting draws."""

    labels: Tensor
    radius: Tensor
    lower: Tensor
    counts: Tensor

    def accuracy(self, y: Tensor, radius: float = 0.0) -> float:
        """Share of images that are right and certified beyond ``radius``; an abstention is an error."""
        return float(((self.labels == y.to(self.labels)) & (self.radius > radius)).double().mean())


@method
class Smoothing:
    """Majority vote over ``draws`` noised copies, ``sigma`` in pixel units (not cut to [0, 1], as published).

    As a classifier its logits are log((votes + 1/2) / (draws + k/2)); abstentions exist in ``predict`` and ``certify``
    only, at significance ``alpha``. Votes have no derivative: a differentiated call keeps the value and takes the
    gradient of the log of the mean probability over the first ``grad_draws`` copies (Salman et al. 2019, arXiv
    1906.04584); more of them, or EOT, sharpen it. Costs ``draws`` forwards.

    Raises ValueError for bad fields and images.
    """

    info: ClassVar[Info] = Info(
        name="smoothing",
        title="Randomised smoothing",
        paradigm="training-free",
        kind="averaging",
        paper="Cohen et al. 2019, arXiv 1902.02918",
        code="https://github.com/locuslab/smoothing",
        randomized=True,
    )
    surrogates: ClassVar[tuple[str, ...]] = ("logits",)

    sigma: float = 0.1
    draws: int = 100
    alpha: float = 0.001
    grad_draws: int = 8

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}; write 0.1 (pixels in [0, 1])")
        for name, usual in (("draws", 100), ("grad_draws", 8)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; write {usual}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha}; write 0.001")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Scored:
        """The voting classifier; randomised, images independent of each other."""
        return Scored(clf, partial(self._logits, clf, _log_mean), randomized=True)

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "logits") -> Scored:
        """The same values with the derivative of the mean logits, which does not saturate."""
        check_choice(name, self.surrogates, "surrogate of Smoothing")
        return Scored(clf, partial(self._logits, clf, lambda z: z.mean(dim=0)), randomized=True)

    def votes(self, clf: ZeroShot, x: Tensor, rng: SampleRNG, draws: int) -> Tensor:
        """(b, k) how often each class wins in ``draws`` draws of noise from ``rng``."""
        counts = torch.zeros(x.shape[0], clf.k, dtype=torch.long, device=x.device)
        with torch.no_grad():
            for part in _parts(draws, x.shape[0]):
                won = prediction(clf(self._copies(x, rng, part))).view(len(part), -1)
                counts += torch.nn.functional.one_hot(won, clf.k).sum(dim=0)
        return counts

    def predict(self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None) -> Votes:
        """Most frequent class of ``draws`` draws, or an abstention where a two-sided binomial test does not tell the
        two most frequent apart. Answers differ from the smoothed classifier's with probability at most ``alpha``."""
        from scipy.stats import binomtest

        check_images(x, clf.vlm.image_size)
        counts = self.votes(clf, x, rng_or_rows(rng, x, "smoothing").fold("smoothing"), self.draws)
        top = counts.topk(2, dim=1).values.tolist()
        sure = torch.tensor([binomtest(a, a + b, 0.5).pvalue <= self.alpha for a, b in top], device=x.device)
        labels = prediction(counts)
        return Votes(torch.where(sure.bool(), labels, torch.full_like(labels, ABSTAIN)), counts)

    def certify(
        self, clf: ZeroShot, x: Tensor, rng: SampleRNG | None = None, n0: int = 100, n: int = 1000
    ) -> Certificate:
        """Class from ``n0`` draws, then its Clopper-Pearson lower bound p from ``n`` fresh ones at confidence
        1 - ``alpha``; radius sigma * Phi^-1(p) if p > 1/2, else no certificate. Raises ValueError for no draws."""
        from scipy.stats import norm

        check_images(x, clf.vlm.image_size)
        if n0 < 1 or n < 1:
            raise ValueError(f"n0 and n must be at least 1, got {n0} and {n}; write n0=100, n=1000")
        stream = rng_or_rows(rng, x, "smoothing").fold("smoothing", "certify")
        labels = prediction(self.votes(clf, x, stream.fold("select"), n0))
        counts = self.votes(clf, x, stream.fold("count"), n)
        hits = counts.gather(1, labels[:, None]).flatten().tolist()
        bounds = [clopper_pearson(h, n, self.alpha) for h in hits]
        lower = torch.tensor(bounds, dtype=torch.float64, device=x.device)
        radii = [self.sigma * float(norm.ppf(p)) if p > 0.5 else 0.0 for p in bounds]
        radius = torch.tensor(radii, dtype=torch.float64, device=x.device)
        return Certificate(torch.where(lower > 0.5, labels, torch.full_like(labels, ABSTAIN)), radius, lower, counts)

    def _copies(self, x: Tensor, rng: SampleRNG, part: range) -> Tensor:
        return torch.cat([x + self.sigma * rng.at(i).normal_like(x) for i in part])

    def _logits(
        self, clf: ZeroShot, soft: Callable[[Tensor], Tensor], x: Tensor, rng: SampleRNG | None = None
    ) -> Tensor:
        check_images(x, clf.vlm.image_size)
        stream = rng_or_rows(rng, x, "smoothing").fold("smoothing")
        counts = self.votes(clf, x, stream, self.draws).to(x.dtype)
        hard = ((counts + 0.5) / (self.draws + 0.5 * clf.k)).log()
        if not wants_graph(x):
            return hard
        number = min(self.grad_draws, self.draws)
        logits = [clf(self._copies(x, stream, p)).unflatten(0, (len(p), -1)) for p in _parts(number, x.shape[0])]
        return forwarded(hard, soft(torch.cat(logits)))


def clopper_pearson(hits: int, n: int, alpha: float) -> float:
    """Exact one-sided lower confidence bound, at level 1 - ``alpha``, of a probability seen ``hits`` times in ``n``."""
    from scipy.stats import beta

    return float(beta.ppf(alpha, hits, n - hits + 1)) if hits else 0.0


def _parts(draws: int, b: int) -> list[range]:
    together = max(1, ROWS // max(b, 1))
    return [range(i, min(i + together, draws)) for i in range(0, draws, together)]


def _log_mean(logits: Tensor) -> Tensor:
    """(draws, b, k) logits to the log of the mean probability (b, k)."""
    return torch.logsumexp(logits.log_softmax(dim=-1), dim=0)
