"""What MMCoA learns from: sentences of the classes, clean and attacked, and pairs of images and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.text import Encode
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot


def contrastive(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Sum of both directions of softmax cross-entropy between unit features (n, d), pair i being the target of row i.

    Equal texts do not share their target: m copies bound each of their rows by ln m from below. Raises ValueError for
    different numbers.
    """
    if images.shape != texts.shape:
        raise ValueError(f"images and texts must come in pairs, got {tuple(images.shape)} and {tuple(texts.shape)}")
    z = scale * images @ texts.T
    target = torch.arange(len(z), device=z.device)
    return F.cross_entropy(z, target) + F.cross_entropy(z.T, target)


def scale_of(student: VLM) -> Tensor:
    """The learned temperature."""
    return student.get_parameter("extra.log_scale").exp()


class Sentences:
    """The classes' sentences, clean and attacked. Where the text tower is not trained both are made once."""

    def __init__(self, how: Any, clf: ZeroShot) -> None:
        self.how, self.swap = how, how.swap
        self.texts = [(how.template or clf.templates[0]).format(name) for name in clf.class_names]
        self.forbidden = self.texts if how.keep_label else []
        self.fixed: tuple[Tensor, Tensor, Tensor] | None = None
        if how.towers == "image":
            with torch.no_grad():
                self.fixed = self._pairs(clf.vlm, self.texts, None)

    def all_of(self, student: VLM) -> Tensor:
        """(k, d) features of every class's clean sentence."""
        return student.encode_text(self.texts) if self.fixed is None else self.fixed[0]

    def pairs(self, student: VLM, shown: list[int], known: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Features (u, d) of some classes' clean and attacked sentences, and the share of sentences that changed.

        ``known``: (k, d) clean features of all classes without their graph, if somebody made them already.
        """
        made = self._pairs(student, [self.texts[i] for i in shown], known) if self.fixed is None else self.fixed
        clean, changed, swapped = made if self.fixed is None else tuple(part[shown] for part in made)
        return clean, changed, float(swapped.mean())

    def _pairs(self, student: VLM, texts: list[str], known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.how.lam_t:
            features = student.encode_text(texts)
            return features, features, features.new_zeros(len(texts))
        encode = remembering(student, self.texts, known)
        result = self.swap(encode, texts, forbidden=self.forbidden)
        features = student.encode_text([*texts, *result.texts])
        return features[: len(texts)], features[len(texts) :], result.changed.float()


def remembering(student: VLM, texts: Sequence[str], rows: Tensor | None) -> Encode:
    """The student's text tower for an attack: not asked again for ``texts`` where their features ``rows`` are known."""
    place = {} if rows is None else {t: i for i, t in enumerate(texts)}

    def encode(asked: Sequence[str]) -> Tensor:
        new = list(dict.fromkeys(t for t in asked if t not in place))
        table = student.encode_text(new)
        where = {**place, **{t: len(place) + i for i, t in enumerate(new)}}
        return (table if rows is None else torch.cat([rows, table]))[[where[t] for t in asked]]

    return encode
