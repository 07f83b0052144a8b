"""One run as text and numbers, and what is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ironclip.core.check import check_choice, unknown
from ironclip.core.space import Space
from ironclip.core.types import THREATS
from ironclip.registry import build_attack, build_defense


@dataclass(frozen=True)
class Job:
    """One run as text and numbers, so that another process can repeat it; fields as in ``evaluate``."""

    vlm: Any = "lite"
    data: tuple[Any, ...] = ("photos",)
    defenses: tuple[Any, ...] = ("none",)
    attacks: tuple[Any, ...] = ("table2-pgd10",)
    threat: tuple[str, ...] = ("static",)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16
    precision: str = "fp32"
    budget: Any = "standard"
    prompts: str | None = None
    state: str | None = None
    device: str = "cpu"
    gallery: int = 4
    skip_bad: bool = False
    merge_duplicates: bool = True
    adaptive_limit: int | None = None
    costs: bool = True
    space: str = "model-input"
    relatives: tuple[Any, ...] = ()
    gates: tuple[Any, ...] = ()


def validate(job: Job) -> None:
    """Refuse what cannot run before anything is loaded. Raises ValueError."""
    for word in job.threat:
        if word not in THREATS:
            raise ValueError(unknown("threat", word, THREATS))
    for name, value in (("limit", job.limit), ("adaptive_limit", job.adaptive_limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if job.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {job.batch_size}")
    check_choice(job.precision, ("fp32", "bf16"), "precision")
    Space.parse(job.space)
    if not job.data or not job.defenses or not job.attacks or not job.threat:
        raise ValueError("vlm, data, defenses, attacks and threat each need at least one entry")
    for d in job.defenses:
        build_defense(d)
    for a in job.attacks:
        if not hasattr(build_attack(a), "eps"):
            raise ValueError(f"attack {a!r} has no eps; only attacks inside a ball can be tabulated")
    if job.device != "cpu":
        try:
            torch.zeros(1, device=job.device)
        except (RuntimeError, AssertionError) as err:
            raise ValueError(f"device {job.device!r} is not usable here ({err}); write --device cpu") from err
