"""CLIPure-Cos: the image embedding is moved towards the embedding of a prompt without a class.

Zhang, Bi, Chen, Guo, Cheng 2025 (arXiv 2502.18176). Every step is a rotation in the plane of the embedding and the null
prompt, so the published loop of ten gradient steps is a recursion over one angle per image: no autograd, no loop over
features. The published code keeps the step direction out of the attacker's graph: the gradient shrinks to about 1e-15,
which is zero in half precision, and points where the undefended model's does even if the purifier turns the image's
own part round. Here the derivative is that of the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.grad import forwarded
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

Purify = Callable[[Tensor], Tensor]
"""Unit features (b, d) to purified unit features."""


@method
class CLIPure:
    """Rotation of every embedding towards the null prompt.

    ``mode``: ``geodesic`` moves by the share ``share`` of the angle; ``per_sample`` takes ``steps`` steps of size
    ``eta``, each normalised per image: rotations by atan(eta) that overshoot and come back; ``reference`` normalises
    over the whole batch like the published code, so that an image's result depends on its neighbours. ``null``: ``own``
    is the classifier's templates with an empty name, ``imagenet80`` the mean of the 80 ImageNet templates.

    Default differs from ``preset="reference"``: with eta = 30 the published even number of steps ends where it began
    for every image within 88.09 degrees of the null prompt (at batch size 1), and flips the sign of the image's own
    part beyond; a share of the angle does what the method says it does, for any batch. The share 0.3 is a choice, not a
    published figure; with 1 every image gets the class nearest to the null prompt. Embeddings parallel or antiparallel
    to the null prompt have no plane to turn in and stay as they are. Costs 1 forward.

    Raises ValueError for bad fields, bad images, an image feature or a null prompt of length zero.
    """

    info: ClassVar[Info] = Info(
        name="clipure",
        title="CLIPure-Cos",
        paradigm="training-free",
        kind="purification",
        paper="Zhang et al. 2025, arXiv 2502.18176",
        code="https://github.com/TMLResearchGroup-CAS/CLIPure",
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {"mode": "reference", "steps": 10, "eta": 30.0, "null": "imagenet80"}
    }

    mode: str = "geodesic"
    share: float = 0.3
    steps: int = 10
    eta: float = 30.0
    null: str = "own"

    def __post_init__(self) -> None:
        check_choice(self.mode, ("geodesic", "per_sample", "reference"), "mode")
        check_choice(self.null, ("own", "imagenet80"), "null")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}; write 0.3")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; write 10")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be positive and finite, got {self.eta}; write 30")

    @property
    def surrogates(self) -> tuple[str, ...]:
        """``identity``; and ``graph`` in reference mode (elsewhere it is the defense itself)."""
        return ("identity", "graph") if self.mode == "reference" else ("identity",)

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The purifying classifier; deterministic, and batchwise in reference mode only."""
        t = null_direction(clf, self.null)
        return self._defended(clf, partial(rotate, t=t, turn=self._turn))

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "identity") -> Defended:
        """Other derivatives. ``identity``: as if the purified embedding were the embedding (BPDA). In reference mode
        also ``graph``: the published loop with the step direction in the graph, and, to show what published attacks
        have seen and not for attacking, ``published``: the same loop with that direction a constant.
        """
        t = null_direction(clf, self.null)
        hidden = ("published",) if self.mode == "reference" else ()
        check_choice(name, (*self.surrogates, *hidden), "surrogate of CLIPure")
        if name == "identity":
            return self._defended(clf, lambda z: forwarded(rotate(z, t, self._turn), z))
        return self._defended(clf, lambda z: loop(z, t, self.eta, self.steps, constant=name == "published"))

    def _turn(self, angle: Tensor) -> Tensor:
        """Angles (b,) to the null prompt, in radians, to signed angles after purification."""
        if self.mode == "geodesic":
            return (1 - self.share) * angle
        for _ in range(self.steps):
            if self.mode == "per_sample":
                angle = angle - angle.sign() * math.atan(self.eta)
            else:
                part = angle.sin().abs()
                whole = part.square().sum().clamp(min=1e-24).sqrt()
                angle = angle - angle.sign() * torch.atan2(self.eta * part, whole)
        return angle

    def _defended(self, clf: ZeroShot, purify: Purify) -> Defended:
        return Defended(clf, partial(_encode, clf.vlm, purify), batchwise=self.mode == "reference")


def rotate(z: Tensor, t: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Unit features (b, d) turned in their plane with the unit vector ``t`` (d,) from their angle to ``turn(angle)``.

    Exact derivative: d turn / d angle is +1 for the recursions, so nothing vanishes. Rows (anti)parallel to ``t`` come
    back as they are.
    """
    c = z @ t
    across = z - c[:, None] * t
    s = across.norm(dim=1)
    still = s < 1e-6
    angle = turn(torch.atan2(s, c))
    normal = across / torch.where(still, torch.ones_like(s), s)[:, None]
    turned = angle.cos()[:, None] * t + angle.sin()[:, None] * normal
    return torch.where(still[:, None], z, turned)


def loop(z: Tensor, t: Tensor, eta: float, steps: int, constant: bool) -> Tensor:
    """The published iteration: u <- normalised u + eta * G / ||G||, G the gradient of the whole batch's cosines."""
    u = z
    for _ in range(steps):
        pull = t - (u @ t)[:, None] * u
        move = pull / pull.norm().clamp(min=1e-12)
        u = F.normalize(u + eta * (move.detach() if constant else move), dim=-1)
    return u


def null_prompts(clf: ZeroShot, null: str) -> list[str]:
    """The prompts without a class: the classifier's ``own`` templates, or the ``imagenet80`` that CLIP was evaluated
    with (Radford et al. 2021, arXiv 2103.00020)."""
    if null == "own":
        return [t.format("") for t in clf.templates]
    from ironclip.data.prompts import prompt_set

    return [t.format("") for t in prompt_set("openai", "imagenet")[0]]


def null_direction(clf: ZeroShot, null: str) -> Tensor:
    """(d,) unit mean of the null prompts' unit features. Raises ValueError if it has no direction."""
    with torch.no_grad():
        mean = clf.vlm.encode_text(null_prompts(clf, null)).mean(dim=0)
    if float(mean.norm()) < 1e-6:
        raise ValueError(f"the null prompt null={null} of {clf.vlm.name} has length zero; use another null or template")
    return F.normalize(mean, dim=0)


def _encode(vlm: VLM, purify: Purify, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
    check_images(x, vlm.image_size)
    z: Tensor = vlm.encode_image(x)
    if bool((z.detach().norm(dim=1) < 0.5).any()):
        raise ValueError(f"{vlm.name} gives an image a feature of length zero, which has no angle to the null prompt")
    return purify(z)
