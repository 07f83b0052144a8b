"""COLA: views and class descriptions compared by optimal transport inside the span of the texts.

Zhu X., Zhu B., Wang, Zhao, Zhang H. 2025 (NeurIPS, arXiv 2510.24038). No code was found. The paper's text lets
confident views weigh more, its formula exp(+entropy) the reverse: the default follows the text, and
``weights=paper_formula`` the formula. It states neither a solver, nor the text weights, nor the temperature of the
weights: here Sinkhorn, text weights and the temperature 0.5 as in AWT (arXiv 2407.04603). An attack on text-scored
logits moves features inside the very span that is kept, so the projection filters little that matters to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.augment import random_views
from ironclip.core.check import check_choice, check_images
from ironclip.core.grad import forwarded
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.subspace import leading_directions
from ironclip.core.transport import bounds, exact, product_cost, sinkhorn
from ironclip.core.types import Info, State
from ironclip.core.views import Scored
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._descriptions import (
    Texts,
    encoded,
    entropy,
    from_file,
    from_templates,
    remembered,
    signed,
    text_entropies,
)

CELLS = 8_000_000
"""Entries of the cost array that are held at a time: classes are worked through in chunks of so many."""


@method
class COLA:
    """Each image a weighted set of views, each class a weighted set of texts; the class of least transport cost wins.

    ``views``: the plain image and views - 1 random crops of 50 to 100 % of the area, flipped or not. ``texts``: texts
    per class from templates; ``descriptions``: a JSON file {class name: [texts]} instead, to which the classifier's own
    template is added; ``ragged`` allows lists of different lengths. ``rank``: directions of the texts' span that are
    kept, by default 256 or the numerical rank. Cost of view and text: 1 - cos(projected view, text).

    ``weights``: of views ``entropy`` (exp(-H / ``temperature``), H of the class posterior), ``paper_formula``
    (exp(+H / T)), or ``uniform``; ``text_weights`` likewise, H of the plain view's posterior with one text in its
    class's place; ``projected_weights`` takes the views' entropies after projection. ``solver``: ``sinkhorn``
    (``eps``, ``iterations``, ``tol``; the score leaves the entropy out) or ``exact`` linear programmes, with ``prune``
    only for classes whose lower bound is below the best upper bound (others get their upper bound: same class, other
    logits). Logits are -cost / ``tau``.

    Costs ``views`` forwards. Differentiable: the derivative of a cost is that of its plan held fixed (envelope), exact
    for ``exact`` and in the limit for ``sinkhorn``. ``preset="reference"`` is the paper as its formulas stand.
    Raises ValueError for bad fields, files, images and features that are not unit rows.
    """

    info: ClassVar[Info] = Info(
        name="cola",
        title="COLA",
        paradigm="training-free",
        kind="projection",
        paper="Zhu et al. 2025, arXiv 2510.24038",
        randomized=True,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "weights": "paper_formula",
            "text_weights": "paper_formula",
            "temperature": 1.0,
            "solver": "exact",
        }
    }

    views: int = 5
    texts: int = 50
    descriptions: str | None = None
    ragged: bool = False
    rank: int | None = None
    weights: str = "entropy"
    text_weights: str = "entropy"
    projected_weights: bool = False
    temperature: float = 0.5
    solver: str = "sinkhorn"
    eps: float = 0.1
    iterations: int = 100
    tol: float = 1e-2
    prune: bool = False
    tau: float = 0.01

    def __post_init__(self) -> None:
        for name in ("weights", "text_weights"):
            check_choice(getattr(self, name), ("entropy", "paper_formula", "uniform"), name)
        check_choice(self.solver, ("sinkhorn", "exact"), "solver")
        for name, example in (("views", 5), ("texts", 50), ("iterations", 100), ("rank", 256)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; write {example}")
        for name, usual in (("temperature", 0.5), ("eps", 0.1), ("tau", 0.01)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}; write {usual}")
        if self.tol < 0:
            raise ValueError(f"tol must not be negative, got {self.tol}; write 0.01")
        if self.prune and self.solver != "exact":
            raise ValueError("prune is safe with the exact solver only; write solver=exact or prune=False")
        if self.descriptions is not None:
            object.__setattr__(self, "descriptions", signed(self.descriptions))

    @property
    def surrogates(self) -> tuple[str, ...]:
        """``partial``; and ``unrolled`` for Sinkhorn."""
        return ("partial", "unrolled") if self.solver == "sinkhorn" else ("partial",)

    def apply(self, clf: ZeroShot, state: State | None = None) -> Scored:
        """The transporting classifier; random with two views and more, images independent of each other."""
        return self._scored(clf, "envelope")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "partial") -> Scored:
        """The same values with another derivative. ``partial``: of the mean cosine of projected views and mean texts.
        ``unrolled``: through the iterations of Sinkhorn."""
        check_choice(name, self.surrogates, "surrogate of COLA")
        return self._scored(clf, name)

    def prepare(self, clf: ZeroShot, rows: Tensor | None = None, mask: Tensor | None = None) -> Texts:
        """What depends on the texts alone. ``rows``: (k, m, d) unit features of one's own, with ``mask`` (k, m) where
        classes have fewer than m. Raises ValueError for rows that are not unit length or not finite, and a ``rank``
        above d; warns where the texts span less than ``rank``."""
        if rows is None:
            named, weights = self.descriptions, clf.weights
            listed = from_templates(clf, self.texts) if named is None else from_file(named, clf, self.ragged)
            what = (self.rank, clf.scale, weights.dtype, str(weights.device))

            def make() -> Texts:
                own, there = encoded(clf, listed)
                with torch.inference_mode(False), torch.no_grad():
                    return self.prepare(clf, own.to(weights), there)

            return remembered(clf.vlm.text, (clf.vlm.weights_hash, tuple(map(tuple, listed)), what), make)
        if mask is None:
            mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{clf.vlm.name} gives text features that are NaN or infinite")
        if float((rows[mask].norm(dim=-1) - 1).abs().max()) > 1e-3:
            raise ValueError("text features must be unit rows; divide each by its norm")
        d = rows.shape[-1]
        if self.rank is not None and self.rank > d:
            raise ValueError(f"rank must be in 1..{d} for {clf.vlm.name}, got {self.rank}; write rank={d}")
        basis = leading_directions(rows[mask], self.rank or 256)
        if self.rank is not None and basis.shape[1] < self.rank:
            warnings.warn(
                f"COLA keeps {basis.shape[1]} directions, not {self.rank}: the texts span no more", stacklevel=3
            )
        rows = torch.where(mask[..., None], rows, torch.zeros_like(rows))
        basis = basis.to(rows)
        return Texts(rows, rows @ basis, mask, F.normalize(rows.sum(dim=1), dim=-1), basis, clf.scale)

    def _scored(self, clf: ZeroShot, how: str) -> Scored:
        return Scored(clf, partial(self._logits, clf.vlm, self.prepare(clf), how), randomized=self.views > 1)

    def _logits(self, vlm: VLM, texts: Texts, how: str, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        check_images(x, vlm.image_size)
        if self.views == 1:
            seen = x[:, None]
        else:
            seen = random_views(x, self.views, rng_or_rows(rng, x, "cola").fold("cola"), scale=(0.5, 1.0), plain=True)
        features: Tensor = vlm.encode_image(seen.flatten(0, 1))
        return self.scores(features.unflatten(0, (x.shape[0], self.views)), texts, how)

    def scores(self, features: Tensor, texts: Texts, how: str = "envelope") -> Tensor:
        """(b, views, d) unit features, the plain view first, to (b, k) logits: -transport cost / ``tau``."""
        if not bool(torch.isfinite(features).all()):
            raise ValueError("image features hold NaN or infinity")
        own, rows, means = texts.coordinates(features)
        plain = own @ means.T if self.projected_weights else features @ texts.mean.T
        a = self._weights(entropy(texts.scale * plain), self.weights)
        first = features[:, 0]
        (b, n), (k, m) = features.shape[:2], texts.mask.shape
        single = texts.scale * torch.einsum("bd,kmd->bkm", first, texts.rows)
        column = self._weights(text_entropies(single, texts.mask), self.text_weights, texts.mask)
        step = max(1, CELLS // max(b * n * m, 1))
        costs = [self._transport(own, rows, a, column, slice(i, i + step), how) for i in range(0, k, step)]
        out = -torch.cat(costs, dim=1) / self.tau
        if how == "partial":
            return forwarded(out, texts.scale * F.normalize(own.sum(dim=1), dim=-1) @ means.T)
        return out

    def _weights(self, entropy: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
        sign = {"entropy": -1.0, "paper_formula": 1.0, "uniform": 0.0}[kind]
        raw = sign * entropy / self.temperature
        return F.softmax(raw if mask is None else raw.masked_fill(~mask, -torch.inf), dim=-1)

    def _transport(self, own: Tensor, rows: Tensor, a: Tensor, column: Tensor, part: slice, how: str) -> Tensor:
        """(b, classes of ``part``) transport costs."""
        cost = 1 - torch.einsum("bnc,kmc->bknm", own, rows[part])
        a, column = a[:, None].expand(cost.shape[:-1]), column[:, part]
        if 1 in cost.shape[-2:]:
            return product_cost(cost, a, column)
        if self.solver == "exact":
            return self._exact(cost, a, column)
        if how == "unrolled":
            made = sinkhorn(cost, a, column, self.eps, self.iterations, self.tol)
            return (made.plan * cost).sum(dim=(-2, -1))
        with torch.no_grad():
            made = sinkhorn(cost, a, column, self.eps, self.iterations, self.tol)
        return made.value(cost, a, column)

    def _exact(self, cost: Tensor, a: Tensor, column: Tensor) -> Tensor:
        lower, upper = bounds(cost, a, column)
        if not self.prune:
            return exact(cost, a, column).value(cost, a, column).to(cost)
        with torch.no_grad():
            solve = lower <= upper.amin(dim=1, keepdim=True)
        rows = solve.nonzero(as_tuple=True)
        found = exact(cost[rows], a[rows], column[rows]).value(cost[rows], a[rows], column[rows]).to(cost)
        return upper.index_put(rows, found)
