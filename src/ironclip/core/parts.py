"""Small things around a dual encoder: where its modules lie, how its passes are counted, functions as towers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Parts:
    """Where methods find modules by role: paths below the VLM, so that they stay right in copies.

    ``token_embedding``: ids (n, l) to (n, l, w). ``vision_blocks``: a list of batch-first transformer blocks, "" for a
    convolutional tower. ``vision_width``: width of their tokens. ``patch_grid``: (rows, columns) of ``patch_tokens``.
    """

    token_embedding: str = ""
    vision_blocks: str = ""
    vision_width: int = 0
    patch_grid: tuple[int, int] = (0, 0)


@dataclass
class TowerCount:
    """Images through the image tower (F), images differentiated to pixels (B), texts through the text tower."""

    forwards: int = 0
    backwards: int = 0
    texts: int = 0


class Function(nn.Module):
    """A plain function in a module's clothes."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def warn_truncated(texts: Sequence[str], limit: int) -> None:
    """Say which texts are longer than the context and lose their end."""
    if texts:
        shown = ", ".join(repr(t[:60]) for t in list(texts)[:3])
        warnings.warn(f"{len(texts)} texts are longer than {limit} tokens and were cut: {shown}", stacklevel=3)
