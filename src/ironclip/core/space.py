"""Where the budget of an attack applies: the model's input, the data set's own pixels, or the 8-bit file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ironclip.core.grad import forwarded

_FORM = re.compile(r"(native|file):(\d+)")


@dataclass(frozen=True)
class Space:
    """``model-input``: the tensor after resize and crop. ``native``: images of ``size`` x ``size`` pixels, brought to
    the model's input inside the gradient path. ``file``: as native, and rounded to 8 bits first, as a stored file is.
    """

    kind: Literal["model-input", "native", "file"] = "model-input"
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Space:
        """From ``model-input``, ``native:32`` or ``file:256``. Raises ValueError for anything else."""
        if text == "model-input":
            return cls()
        match = _FORM.fullmatch(text)
        if match is None or not 8 <= int(match[2]) <= 4096:
            raise ValueError(
                f"space must be model-input, native:SIZE or file:SIZE with 8 to 4096 pixels a side, got {text!r}; "
                "write native:32 for CIFAR"
            )
        return cls("native" if match[1] == "native" else "file", int(match[2]))

    def __str__(self) -> str:
        return self.kind if self.kind == "model-input" else f"{self.kind}:{self.size}"

    def to_input(self, x: Tensor, size: int) -> Tensor:
        """(b, 3, s, s) pixels in [0, 1] of this space to (b, 3, size, size): antialiased bicubic, clamped to [0, 1].

        Rounding passes the gradient straight through (BPDA); resizing is differentiated.
        """
        if self.kind == "file":
            x = forwarded((x * 255).round() / 255, x)
        if self.kind != "model-input" and x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
        return x
