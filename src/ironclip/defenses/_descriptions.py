"""Several texts for every class: templates, or descriptions from a file of the user's."""

from __future__ import annotations

import hashlib
import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.zeroshot import ZeroShot

T = TypeVar("T")
_kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Texts:
    """``rows``: (k, m, d) unit text features, 0 where ``mask`` (k, m) is False; ``inside``: (k, m, c) their coordinates
    in ``basis`` (d, c), orthonormal columns; ``mean``: (k, d) unit means; ``scale``: of the logits in the entropies."""

    rows: Tensor
    inside: Tensor
    mask: Tensor
    mean: Tensor
    basis: Tensor
    scale: float

    def coordinates(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (b, n, d) as unit vectors (b, n, c), with texts (k, m, c) and means (k, c) whose products with them are
        cosines of projected views; in the full space, and unprojected, for views with nothing in the span."""
        own = features @ self.basis
        outside = own.detach().norm(dim=-1, keepdim=True) < 1e-6
        if not bool(outside.any()):
            return F.normalize(own, dim=-1), self.inside, self.mean @ self.basis
        number = int(outside.sum())
        warnings.warn(f"{number} views lie outside the span of the texts and are not projected", stacklevel=3)
        own = torch.where(outside, features, own @ self.basis.T)
        return F.normalize(own, dim=-1), self.rows, self.mean


def signed(path: str) -> str:
    """``path#digest``, so that a spec names the file's content and not only its place.

    The digest is 12 hex digits of the content's SHA-256. Raises ValueError if the file is missing or if ``path``
    already carries the digest of another content.
    """
    place, _, wanted = path.partition("#")
    if not Path(place).is_file():
        raise ValueError(
            f'descriptions file {place!r} does not exist; write {{"class name": ["a text", ...], ...}} into it'
        )
    found = hashlib.sha256(Path(place).read_bytes()).hexdigest()[:12]
    if wanted and wanted != found:
        raise ValueError(f"descriptions file {place!r} has changed: its digest is {found}, the spec says {wanted}")
    return f"{place}#{found}"


def from_file(path: str, clf: ZeroShot, ragged: bool) -> list[list[str]]:
    """Per class of ``clf`` the texts of a JSON file {class name: [texts]}, and the classifier's first template.

    Joined by name; classes of the file that ``clf`` does not have are not read. Raises ValueError for a changed file,
    missing classes, anything but lists of texts, and lists of different lengths without ``ragged``.
    """
    place = signed(path).partition("#")[0]
    try:
        held = json.loads(Path(place).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"descriptions file {place!r} is not JSON: {err}") from err
    shape = f'{place!r} must hold {{"class name": ["a text", ...], ...}}'
    if not isinstance(held, dict):
        raise ValueError(f"{shape}, got a {type(held).__name__}")
    missing = [n for n in clf.class_names if n not in held]
    if missing:
        raise ValueError(f"{place!r} has no descriptions of {len(missing)} classes: {', '.join(missing[:5])}")
    out = []
    for name in clf.class_names:
        texts = held[name]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{shape}, got {texts!r} for {name!r}")
        out.append([*texts, clf.templates[0].format(name)])
    if len({len(t) for t in out}) > 1 and not ragged:
        few, many = min(map(len, out)) - 1, max(map(len, out)) - 1
        raise ValueError(f"{place!r} has {few} to {many} descriptions per class; equalise them or write ragged=True")
    return out


def from_templates(clf: ZeroShot, number: int) -> list[list[str]]:
    """Per class ``number`` texts: the classifier's own templates, then those that CLIP was evaluated with on ImageNet
    (Radford et al. 2021, arXiv 2103.00020). Fewer where there are not so many."""
    from ironclip.data.prompts import prompt_set

    templates = list(dict.fromkeys([*clf.templates, *prompt_set("openai", "imagenet")[0]]))[:number]
    return [[t.format(name) for t in templates] for name in clf.class_names]


def encoded(clf: ZeroShot, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
    """(k, m, d) unit features and (k, m) which exist. Kept with the text tower."""
    longest = max(map(len, texts))
    mask = torch.tensor([[i < len(t) for i in range(longest)] for t in texts], device=clf.weights.device)
    key = (clf.vlm.weights_hash, tuple(map(tuple, texts)))

    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            flat = clf.vlm.encode_text([t for row in texts for t in row])
        out = flat.new_zeros(len(texts), longest, flat.shape[1])
        out[mask.to(flat.device)] = flat
        return out

    return remembered(clf.vlm.text, key, make), mask


def remembered(tower: Any, key: Any, make: Callable[[], T]) -> T:
    """``make()``, or what it gave for this text tower and key before; a tower keeps its last four results."""
    try:
        shelf = _kept.setdefault(tower, {})
    except TypeError:  # a callable that cannot be referred to weakly
        return make()
    if key not in shelf:
        while len(shelf) > 3:
            del shelf[next(iter(shelf))]
        shelf[key] = make()
    found: T = shelf[key]
    return found


def text_entropies(logits: Tensor, mask: Tensor) -> Tensor:
    """(b, k, m) entropies: of the softmax over classes of an image's mean logits, with class y's entry replaced by that
    of its text m. ``logits``: (b, k, m); ``mask``: (k, m). A constant number of operations per text."""
    zero = torch.zeros_like(logits)
    mean = torch.where(mask, logits, zero).sum(-1) / mask.sum(-1)
    top, best = mean.max(dim=1, keepdim=True)
    mean, single = mean - top, torch.where(mask, logits - top[..., None], zero)
    share = mean.exp()
    # the other classes' sums by taking one term off, but for the largest class, where that would cancel
    others = torch.ones_like(mean).scatter(1, best, 0.0)
    without = ((share * others).sum(1, keepdim=True), (share * mean * others).sum(1, keepdim=True))
    large = others == 0
    rest = torch.where(large, without[0], share.sum(1, keepdim=True) - share)
    weighted = torch.where(large, without[1], (share * mean).sum(1, keepdim=True) - share * mean)
    rest = rest.clamp(min=1e-37)
    total = torch.logaddexp(rest.log()[..., None], single)
    own = (single - total).exp()
    mean_rest = (weighted / rest)[..., None]
    return (total - (1 - own) * mean_rest - own * single).clamp(min=0.0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the last dimension."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
