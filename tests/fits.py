"""Small labelled sets for any classifier, and states fitted on them in a few steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from toys import toy_images
from toyset import Rows

from ironclip.core.loop import Loop
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet, sample_id
from ironclip.registry import build_defense

FEW = Loop(steps=2, batch_size=4, lr=1e-3, hold_out=0)
_built: dict[tuple[str, str], ZeroShot] = {}


def image_set(x: torch.Tensor, y: torch.Tensor, classes: list[str], name: str = "toys", **changes: Any) -> ImageSet:
    """Tensors (n, 3, s, s) and (n,) as a data set."""
    ids = [sample_id(f"{i:016x}", f"{name}/{i}", int(y[i])) for i in range(len(y))]
    fields: dict[str, Any] = {
        "name": name,
        "class_names": classes,
        "templates": ["a photo of a {}."],
        "prompt_set": "generic",
        "recipe": "none",
        "size": x.shape[-1],
        "labels": y.tolist(),
        "ids": ids,
        "read": Rows(x),
        "rows": list(range(len(y))),
    }
    return ImageSet(**{**fields, **changes})


def labelled(clf: ZeroShot, n: int = 12, seed: int = 7) -> ImageSet:
    """Random images with labels in turn, for the classes of the classifier."""
    x = toy_images(n, size=clf.vlm.image_size, seed=seed)
    return image_set(x, torch.arange(n) % clf.k, list(clf.class_names))


def few_steps(defense: Any, clf: ZeroShot) -> State:
    """The state after two small steps; fitted once per defense and model."""
    key = (repr(defense), clf.prototype_hash + clf.vlm.weights_hash)
    _built[key] = clf
    return _fitted(*key)


@cache
def _fitted(spec: str, model: str) -> State:
    clf = _built[spec, model]
    state: State = build_defense(spec).fit(clf, labelled(clf), loop=FEW, seed=1)
    return state
