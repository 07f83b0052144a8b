"""What a finished cell says of itself: enough to print its row without the model, and to run it again."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from ironclip.core.spec import to_text
from ironclip.evaluation.cost import cost_key

if TYPE_CHECKING:
    from ironclip.core.types import Attack
    from ironclip.evaluation.block import Block, Entry


def footer(
    block: Block,
    entry: Entry,
    key: dict[str, Any],
    members: list[dict[str, Any]],
    attack: Attack | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The cell's key, the names people read, members, versions and machine."""
    info = entry.defense.info
    return {
        "key": key,
        "vlm": block.vlm.name,
        "data": block.data.name,
        "defense": info.name,
        "defense_spec": to_text(entry.defense),
        "title": info.title,
        "paradigm": info.paradigm,
        "threat": key["threat"],
        "attack": to_text(attack) if attack is not None else "",
        "members": members,
        "budget": block.budget.text(),
        "draws": block.budget.draws if info.randomized else 1,
        "k": block.clf.k,
        "prompts": block.data.prompt_set,
        "recipe": block.data.recipe,
        "seed": block.seed,
        "precision": block.precision,
        "batch_size": block.batch_size,
        "state": entry.state_hash,
        "notes": block.vlm.facts.get("notes", []),
        "versions": {"ironclip": version("ironclip"), "torch": torch.__version__, "python": platform.python_version()},
        "device": str(block.device),
        "cost_key": cost_key(block, entry),
        **facts,
    }
