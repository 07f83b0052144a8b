"""The losses of TIMA, and its class texts during training and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.types import State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._text_geometry import consistency_loss, divergence, energy, margin_rows, with_margin
from ironclip.defenses._train import Inner
from ironclip.training.feed import Batch

NAMES = "tima.names"
Told = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Terms:
    """The parts of the objective; ``how`` holds TIMA's fields, ``clf`` is the original model."""

    how: Any
    clf: ZeroShot

    @property
    def scale(self) -> float:
        """Temperature of the distillation."""
        return self.clf.scale if self.how.kd_scale is None else float(self.how.kd_scale)

    @property
    def needs_clean(self) -> bool:
        """Are original features of the clean images read?"""
        through_images = self.how.w_i and self.how.distill in ("kl", "reverse_kl")
        return bool(through_images or (self.how.w_t and self.how.teacher == "clean"))

    def texts(self, student: VLM) -> Tensor:
        """(k, d) class texts of the student's present weights, with their graph."""
        if self.how.text == "tower":
            prompts = [t.format(n) for n in self.clf.class_names for t in self.clf.templates]
            features = student.encode_text(prompts).view(self.clf.k, len(self.clf.templates), -1)
            return F.normalize(features.mean(dim=1), dim=-1)
        own = student.get_parameter(f"extra.{self.how.text}")
        return moved(self.clf.weights, own, self.how.text, self.how.rows)

    def of_text(self, text: Tensor, batch: Batch) -> tuple[Tensor | None, Told]:
        """What moves the texts: a mean over the images, or None where every weight is 0."""
        how, told = self.how, Told()
        if how.w_e:
            told["energy"] = energy(text, how.power, how.energy)
        if how.w_i:
            told["iakd"] = self._text_kd(text, batch)
        if how.w_s:
            told["order"] = consistency_loss(text, self.clf.weights)
        weights = {"energy": how.w_e, "iakd": how.w_i, "order": how.w_s}
        parts = [weights[name] * value for name, value in told.items()]
        return (torch.stack(parts).sum() if parts else None), told

    def _text_kd(self, text: Tensor, batch: Batch) -> Tensor:
        first = self.clf.weights
        if self.how.distill in ("kl", "reverse_kl"):
            clean = batch.cached["clean"]
            return self._kl(clean @ first.T, clean @ text.T, batch).mean()
        return self._apart(first, text).mean()

    def of_image(self, features: Tensor, x_adv: Tensor, text: Tensor, batch: Batch) -> tuple[Tensor, Told]:
        """What moves the image tower, from its features (b, d) of the attacked images."""
        z = self._with_margin(features, text if self.how.margin_to_text else text.detach(), batch)
        value = F.cross_entropy(z, batch.y)
        plain = self._masked(features.detach() @ text.detach().T, batch)
        told = {"tam": value, "robust_acc": (plain.argmax(dim=1) == batch.y).float().mean()}
        if self.how.w_t:
            if self.how.teacher == "clean":
                teacher = batch.cached["clean"]
            else:
                with torch.no_grad():
                    teacher = self.clf.vlm.encode_image(x_adv)
            told["takd"] = self._image_kd(teacher, features, text.detach(), batch).mean()
            value = value + self.how.w_t * told["takd"]
        return value, told

    def attacked(self, features: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """(b,) what the inner attack raises."""
        if self.how.attack_loss == "ce":
            z = self._masked(self.clf.scale * (features @ text.T), batch)
            return F.cross_entropy(z, batch.y, reduction="none")
        value = F.cross_entropy(self._with_margin(features, text, batch), batch.y, reduction="none")
        if self.how.attack_loss == "full" and self.how.w_t:
            value = value + self.how.w_t * self._image_kd(batch.cached["clean"], features, text, batch)
        return value

    def _with_margin(self, features: Tensor, text: Tensor, batch: Batch) -> Tensor:
        how, margin = self.how, None
        if how.m or how.m0:
            margin = margin_rows(how.margin, text.detach(), batch.y, how.m, how.m0 or 0.0, self.clf.weights)
        return self._masked(with_margin(features @ text.T, margin, self.clf.scale, how.margin_in), batch)

    def _image_kd(self, teacher: Tensor, features: Tensor, text: Tensor, batch: Batch) -> Tensor:
        if self.how.distill in ("kl", "reverse_kl"):
            return self._kl(teacher @ text.T, features @ text.T, batch)
        return self._apart(teacher, features)

    def _kl(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        z = [self._masked(self.scale * cosines, batch) for cosines in (teacher, student)]
        return divergence(z[0], z[1], self.how.distill == "reverse_kl")

    def _apart(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.how.distill == "l2":
            return (student - teacher).square().sum(dim=1)
        return 1 - F.cosine_similarity(student, teacher, dim=1)

    def _masked(self, z: Tensor, batch: Batch) -> Tensor:
        return z.masked_fill(~batch.own, -1e4) if self.how.label_space == "per_set" else z


def moved(origin: Tensor, own: Tensor, text: str, rows: str) -> Tensor:
    """Class texts from the original ones (k, d) and a map A (d, d) or a table (k, d); exactly the original at A = 0."""
    out = origin + origin @ own.T if text == "map" else own
    if rows == "free":
        return out
    return out * (origin.norm(dim=1, keepdim=True) / out.norm(dim=1, keepdim=True).clamp(min=1e-12))


def start_of(text: str, weights: Tensor) -> State:
    """The trained tensors of the text side before the first step."""
    d = weights.shape[1]
    return {"map": {"map": weights.new_zeros(d, d)}, "table": {"table": weights.clone()}, "tower": {}}[text]


def tuned_weights(text: str, rows: str, made: ZeroShot, clf: ZeroShot, state: State, share: float) -> Tensor:
    """Class texts to use with a fitted state: ``share`` of the way from the original ones.

    ``made``: the classifier with the fitted towers. Raises ValueError for a state without its texts, and for classes
    that a table has not seen.
    """
    if text == "tower":
        return made.weights
    own = state.get(f"extra.{text}")
    if own is None:
        raise ValueError(f"the state holds no extra.{text}: its texts are lost; write deploy=original to go without")
    own = own.to(clf.weights)
    if text == "map":
        return moved(clf.weights, share * own, text, rows)
    seen = {name: i for i, name in enumerate(text_of(state[NAMES]).split("\n"))}
    unseen = [n for n in clf.class_names if n not in seen]
    if unseen:
        raise ValueError(
            f"text=table has no row for {', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}: it knows only the "
            "classes it was fitted on; fit with text=map, or write deploy=original"
        )
    return moved(clf.weights, torch.lerp(clf.weights, own[[seen[n] for n in clf.class_names]], share), text, rows)


def bytes_of(lines: Sequence[str]) -> Tensor:
    """Text as a tensor of bytes, for a state."""
    return torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)


def text_of(stored: Tensor) -> str:
    """The text of ``bytes_of``."""
    return bytes(stored.tolist()).decode()


def cosine_margins(clf: ZeroShot, inner: Inner, batch: Batch) -> Tensor:
    """(b,) true cosine minus the best wrong one, on images attacked through the undefended model."""
    x = inner(lambda v: F.cross_entropy(clf(v), batch.y, reduction="none"), batch.x, batch.rng)
    with torch.no_grad():
        z = clf(x) / clf.scale
    rest = z.scatter(1, batch.y[:, None], float("-inf"))
    return z.gather(1, batch.y[:, None])[:, 0] - rest.amax(dim=1)
