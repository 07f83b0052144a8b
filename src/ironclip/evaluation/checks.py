"""Checks of a defended classifier that need passes of their own: does it keep its word, are its classes distinct?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.spec import digest
from ironclip.core.types import prediction
from ironclip.evaluation.block import Block, Entry
from ironclip.evaluation.judge import STEADY, is_random

PASSES, LOOK = 5, 2


def checks(block: Block, entry: Entry) -> dict[str, Any]:
    """Made once for a defense on a model and class list and stored with its cells.

    ``moved``: over 5 passes on 2 images, the largest move of l_2-normalised logits, and ``labels`` whether a label
    changed; only for classifiers that claim to draw nothing, the others are judged on several draws anyway.
    ``twins``: classes whose embeddings have a cosine above 1 - 1e-6 with an earlier class.
    """
    key = digest(block.key(defense=entry.text, state=entry.state_hash, ids=block.data.ids[:LOOK]))
    found: dict[str, Any] | None = block.store.get_json("checks", key)
    if found is None:
        found = {"moved": 0.0, "labels": False, "twins": twins(block.clf.weights)}
        defended = entry.defense.apply(block.clf, entry.state)
        if not is_random(defended):
            x, _, ids = next(iter(block.data.batches(LOOK, list(range(min(LOOK, len(block.data)))))))
            rng = block.rng(ids).fold("passes")
            with torch.no_grad():
                z = torch.stack([defended(x.to(block.device), rng.at(i)).float() for i in range(PASSES)])
            units, p = F.normalize(z, dim=2), prediction(z)
            found["moved"] = float((units - units[0]).norm(dim=2).max())
            found["labels"] = bool((p != p[0]).any())
        block.store.put_json("checks", key, found)
    return found


def twins(weights: Tensor, rows: int = 1024) -> int:
    """How many of the unit rows (k, d) have a cosine above 1 - 1e-6 with an earlier one."""
    count = 0
    for first in range(0, len(weights), rows):
        part = weights[first : first + rows]
        near = (part @ weights[: first + len(part)].T).tril(first - 1) > 1 - 1e-6
        count += int(near.any(dim=1).sum())
    return count


def check_flags(found: dict[str, Any], tally: dict[str, float]) -> list[str]:
    """``stochastic`` and ``tie`` from the checks; ``dynamic`` from what the judged passes, clean or attacked, did."""
    flags = ["stochastic"] if found.get("labels") or found.get("moved", 0.0) > STEADY else []
    flags += ["tie"] if found.get("twins") else []
    return flags + (["dynamic"] if tally.get("autograd", 0) > 0 or tally.get("backwards", 0) > 0 else [])
