"""The classification loss that an attack raises, with its checks and its fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from ironclip.core.check import check_images, check_labels, check_logits
from ironclip.core.losses import TARGETED, Loss, usable, with_target
from ironclip.core.types import prediction

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""``(out, rows) -> (b,)``: loss of the outputs that belong to the rows (long indices) of the batch."""


class Objective:
    """Classification loss of one attack call, ``(z, rows) -> (len(rows),)``.

    The class count is learned from the first logits: labels are checked against it then, and a loss that needs more
    classes is replaced by the margin (``notes`` says so). ``target``: (b,) classes to reach, for targeted losses only.
    Raises ValueError for bad images, labels, targets or logits.
    """

    def __init__(self, name: str, x: Tensor, y: Tensor, target: Tensor | None = None) -> None:
        check_images(x)
        check_labels(y, x.shape[0])
        if target is not None and name not in TARGETED:
            raise ValueError(f"loss {name!r} takes no target; use ce_t, margin_t or dlr_t")
        if target is None:
            with_target(name, torch.zeros(0))
        else:
            check_labels(target, x.shape[0], what="target")
            same = (target == y).nonzero().flatten().tolist()
            if same:
                raise ValueError(f"target equals the label in rows {same[:5]}; a target must be another class")
        self.name, self.y, self.target, self.k = name, y, target, 0
        self.notes: tuple[str, ...] = ()

    def __call__(self, z: Tensor, rows: Tensor) -> Tensor:
        return self._fn(self.name, z, rows)(z, self.y[rows])

    def fallback(self, z: Tensor, rows: Tensor) -> Tensor:
        """The loss where dlr has no gradient: the margin, with the same target."""
        return self._fn("margin_t" if self.name in TARGETED else "margin", z, rows)(z, self.y[rows])

    def subset(self, rows: Tensor) -> Objective:
        """The objective of some rows (long indices), counted from 0 again."""
        part = copy(self)
        part.y = self.y[rows]
        part.target = None if self.target is None else self.target[rows]
        return part

    @property
    def rescue(self) -> RowLoss | None:
        """``fallback`` for the losses that can lose their gradient, None for the others."""
        return self.fallback if self.name.startswith("dlr") else None

    def fooled(self, z: Tensor, rows: Tensor) -> Tensor:
        """Which rows are misclassified."""
        return prediction(z) != self.y[rows]

    def check(self, z: Tensor, b: int) -> None:
        """Refuse logits (b, k) that are not finite or change their width; learn k from the first ones."""
        check_logits(z.detach(), b, self.k or None)
        if not self.k:
            self.k = z.shape[1]
            check_labels(self.y, len(self.y), self.k)
            if self.target is not None:
                check_labels(self.target, len(self.y), self.k, what="target")
            self.name, self.notes = usable(self.name, self.k)
            if b and bool(((z >= 0).all(dim=1) & ((z.sum(dim=1) - 1).abs() < 1e-5)).all()):
                self.notes += ("probabilities: every row sums to 1; return logits, their gradients vanish less",)

    def _fn(self, name: str, z: Tensor, rows: Tensor) -> Loss:
        self.check(z, len(rows))
        name = self.name if name not in ("margin", "margin_t") else name
        return with_target(name, None if self.target is None else self.target[rows])
