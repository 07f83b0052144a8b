"""The toy problem of tests/toys.py as a model and a data set that ``evaluate`` takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from toys import CLASSES, toy_problem

from ironclip.core.vlm import VLM
from ironclip.data.imageset import ImageSet, sample_id


class Rows:
    """Reads rows of a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __call__(self, rows: Sequence[int]) -> torch.Tensor:
        return self.x[list(rows)]


def toy_block(n: int = 24, contrast: float = 0.06) -> tuple[VLM, ImageSet]:
    """A model that solves its five classes cleanly and loses them within a budget of about the contrast."""
    clf, x, y = toy_problem(n, contrast=contrast)
    prompts = {f"a photo of a {name}.": clf.weights[i] for i, name in enumerate(CLASSES)}
    vlm = VLM.wrap(
        clf.vlm.image,
        lambda texts: torch.stack([prompts.get(t, clf.weights.mean(0)) for t in texts]),
        8,
        (0.5,) * 3,
        (0.25,) * 3,
        scale=20.0,
        name="toy-problem",
    ).freeze()
    ids = [sample_id(f"{i:016x}", f"toy/{i}", int(y[i])) for i in range(n)]
    data = ImageSet(
        name="toys",
        class_names=list(CLASSES),
        templates=["a photo of a {}."],
        prompt_set="generic",
        recipe="none",
        size=8,
        labels=y.tolist(),
        ids=ids,
        read=Rows(x),
        rows=list(range(n)),
    )
    return vlm, data
