"""What the CLIP backends share: pixel constants, the activation that a checkpoint needs, where a text ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ironclip.core.parts import warn_truncated

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SCALE = 100.0
_OPENAI = re.compile(r"(^|[/_:. -])openai([/_:. -]|$)", re.IGNORECASE)

Tokenize = Callable[[Sequence[str]], Tensor]


def check_quick_gelu(names: Sequence[str], activations: Sequence[str], fix: str) -> None:
    """Weights published by OpenAI need QuickGELU, x sigmoid(1.702 x): with plain GELU they lose accuracy silently.

    ``names``: where the weights come from; ``activations``: of both towers. Raises ValueError on a mismatch.
    """
    of_openai = [n for n in names if _OPENAI.search(n)]
    wrong = [a for a in activations if a != "quick_gelu"]
    if of_openai and wrong:
        raise ValueError(f"{of_openai[0]}: OpenAI weights need the activation quick_gelu, got {wrong[0]}; {fix}")


def first_index(ids: Tensor, token: int | None) -> Tensor:
    """Where each text (n, l) ends: the first ``token``, or with None the first of the largest id, CLIP's own rule."""
    return ids.argmax(dim=-1) if token is None else (ids == token).int().argmax(dim=-1)


def hub_tokenize(tokenizer: Any, context: int, *, pad: int | None, lower: bool = False) -> Tokenize:
    """A transformers tokenizer as texts -> ids (n, l), cut at ``context`` with a warning that names the texts.

    ``pad``: id that fills up to the longest text, on the right; None pads to ``context`` as the tokenizer itself does.
    """

    def tokenize(texts: Sequence[str]) -> Tensor:
        texts = [t.lower() for t in texts] if lower else list(texts)
        rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=context)["input_ids"]
        full = [t for t, row in zip(texts, rows, strict=True) if len(row) >= context]
        warn_truncated([t for t in full if len(tokenizer(t, verbose=False)["input_ids"]) > context], context)
        if pad is None:
            padded = tokenizer(texts, truncation=True, max_length=context, padding="max_length")
            return torch.tensor(padded["input_ids"], dtype=torch.long)
        longest = max((len(row) for row in rows), default=0)
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long)

    return tokenize
