"""The contrastive loss of pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, texts: Sequence[str]) -> Tensor:
    """InfoNCE in both directions. ``image``, ``text``: (b, d) unit rows; rows with equal ``texts`` share the target."""
    where = {t: i for i, t in enumerate(texts)}
    key = torch.tensor([where[t] for t in texts], device=image.device)
    same = (key[:, None] == key[None, :]).to(image.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    logits = scale * image @ text.T
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
