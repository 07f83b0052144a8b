"""Anchors: class texts moved apart on the sphere around their common centre, in closed form.

The expansion of Li et al., CVPR 2024, arXiv 2301.13096. Published code rotates the centre onto the first axis with a
chain of plane rotations, changes one polar angle and rotates back; here the angle changes in the plane of text and
centre, O(C d) instead of O(d^4), and nothing divides by zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice

ANCHORS = ("expanded", "level", "text")
NEAR = 1e-6
"""Radians from the centre within which a text has no direction of its own: what is left of it is rounding."""


@dataclass(frozen=True, eq=False)
class Frame:
    """``centre``: (d,) unit float64. ``widest``: largest angle between it and a training class, radians."""

    centre: Tensor
    widest: float


def frame_of(features: Tensor) -> Frame:
    """Centre and width of the training classes' text features (c, d), of any length.

    Raises ValueError for fewer than 2 classes, features that are zero, not finite, all alike, or without a centre.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"anchors need the texts (c, d) of at least 2 training classes, got {tuple(features.shape)}")
    v = _unit(features)
    mean = v.mean(dim=0)
    if float(mean.norm()) < NEAR:
        raise ValueError("the texts of the training classes cancel out: they have no centre to expand from")
    centre = F.normalize(mean, dim=0)
    widest = float(_polar(v, centre)[0].max())
    if widest < NEAR:
        raise ValueError("the texts of the training classes are all alike: nothing to expand")
    return Frame(centre, widest)


def anchors(features: Tensor, frame: Frame, kind: str = "expanded", share: float = 1.0) -> Tensor:
    """(c, d) unit float64 anchors of text features (c, d), of training classes or of others.

    ``expanded``: the angle to the centre grows by pi / 2 over the widest training angle, so that the farthest training
    class becomes orthogonal to the centre and others may go beyond. ``level``: every angle becomes pi / 2. ``text``:
    the texts themselves. ``share``: of the way from the text to its anchor. A text at the centre stays there. Raises
    ValueError for another kind, a share outside [0, 1] and features that do not fit.
    """
    check_choice(kind, ANCHORS, "anchors")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if features.ndim != 2 or features.shape[1] != frame.centre.shape[0]:
        got = tuple(features.shape)
        raise ValueError(f"the frame lives in {frame.centre.shape[0]} dimensions, got texts of shape {got}")
    v = _unit(features)
    if kind == "text" or share == 0:
        return v
    centre = frame.centre.to(v)
    angle, direction = _polar(v, centre)
    goal = angle * (math.pi / 2 / frame.widest) if kind == "expanded" else torch.full_like(angle, math.pi / 2)
    moved = torch.lerp(angle, goal, share)
    out = moved.cos() * centre + moved.sin() * direction
    return torch.where(angle < NEAR, centre.expand_as(out), out)


def _unit(features: Tensor) -> Tensor:
    v = features.detach().double()
    lengths = v.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()):
        raise ValueError("text features hold NaN or infinity; expected finite numbers")
    if float(lengths.min()) == 0:
        raise ValueError(f"the text feature of class {int(lengths.argmin())} has length 0 and no direction")
    return v / lengths


def _polar(v: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Angles (c, 1) between unit rows and the centre, and their unit directions (c, d) orthogonal to it."""
    along = v @ centre[:, None]
    across = v - along * centre
    return torch.atan2(across.norm(dim=1, keepdim=True), along), F.normalize(across, dim=1)
