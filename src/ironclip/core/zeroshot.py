"""Class prompts to class weights to logits: the classifier that everything else wraps."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM

TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """Cosine with the class weights times the temperature.

    ``weights``: (k, d) unit rows. ``class_names``: one per row. ``label_map``: dataset label -> row, not the identity
    only where classes with equal prompts were merged.
    """

    vlm: VLM
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    weights: Tensor
    scale: float
    label_map: tuple[int, ...]

    @classmethod
    def build(
        cls,
        vlm: VLM,
        class_names: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        *,
        merge_duplicates: bool = True,
        weights: Tensor | None = None,
    ) -> ZeroShot:
        """Encode every prompt once: unit features per template, averaged over the templates, normalised again.

        ``templates`` hold one ``{}`` each. Classes whose prompts are all equal are merged with a warning that names
        them, unless ``merge_duplicates=False`` (parity with published tables). ``weights`` (k, d) from an earlier call
        save the encoding. Raises ValueError for an empty list, a single class, an empty name, or a template without
        ``{}``.
        """
        if isinstance(class_names, str) or isinstance(templates, str):
            raise ValueError('class_names and templates must be lists of strings; write ["cat", "dog"]')
        names, templates = [str(c) for c in class_names], tuple(templates)
        if not names:
            raise ValueError("class_names is empty; pass at least two class names")
        if any(not n.strip() for n in names):
            raise ValueError(f"class name {next(i for i, n in enumerate(names) if not n.strip())} is empty")
        for t in templates:
            if t.count("{}") != 1:
                raise ValueError(f"a template needs exactly one {{}}, got {t!r}; write 'a photo of a {{}}.'")
        if not templates:
            raise ValueError("templates is empty; pass at least one such as 'a photo of a {}.'")
        rows: dict[str, int] = {}
        label_map = []
        for i, name in enumerate(names):
            key = name if merge_duplicates else f"{i}:{name}"
            label_map.append(rows.setdefault(key, len(rows)))
        kept = [names[label_map.index(r)] for r in range(len(rows))]
        if len(kept) < 2:
            raise ValueError(f"zero-shot classification needs at least two different classes, got only {kept[0]!r}")
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            did = "merged into one class each" if merge_duplicates else "kept apart, so their images tie"
            warnings.warn(f"classes with equal prompts are {did}: {', '.join(twice)}", stacklevel=2)
        if weights is None:
            prompts = [t.format(n) for n in kept for t in templates]
            with torch.no_grad():
                features = vlm.encode_text(prompts).view(len(kept), len(templates), -1)
                weights = F.normalize(features.mean(dim=1), dim=-1)
        elif weights.shape != (len(kept), vlm.dim):
            raise ValueError(f"weights must be ({len(kept)}, {vlm.dim}), got {tuple(weights.shape)}")
        return cls(vlm, tuple(kept), templates, weights, vlm.scale, tuple(label_map))

    @property
    def k(self) -> int:
        """Number of classes that are told apart."""
        return self.weights.shape[0]

    def labels(self, y: Tensor) -> Tensor:
        """Dataset labels to rows of ``weights``."""
        return torch.tensor(self.label_map, device=y.device)[y]

    def features(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        """(b, d) unit image features."""
        return self.vlm.encode_image(x)

    def head(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Unit features (b, d) to logits (b, k)."""
        return self.scale * (features @ (self.weights if weights is None else weights).T)

    def __call__(self, x: Tensor, rng: SampleRNG | None = None) -> Tensor:
        return self.head(self.vlm.encode_image(x))

    def with_vlm(self, vlm: VLM) -> ZeroShot:
        """The same class weights in front of another image tower of the same space."""
        return replace(self, vlm=vlm)

    def with_weights(self, weights: Tensor) -> ZeroShot:
        """The same image tower in front of other class weights (k, d)."""
        return replace(self, weights=F.normalize(weights, dim=-1))

    def encode_prompts(self, templates: Sequence[str], names: Sequence[str] | None = None) -> Tensor:
        """(k, m, d) unit features of every class in every template, not averaged."""
        names = self.class_names if names is None else names
        with torch.no_grad():
            features = self.vlm.encode_text([t.format(n) for n in names for t in templates])
        return features.view(len(names), len(templates), -1)

    @property
    def prototype_hash(self) -> str:
        """SHA-256 of the class weights and the temperature: part of every attack's key."""
        digest = hashlib.sha256(repr((self.class_names, self.templates, self.scale)).encode())
        digest.update(self.weights.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
