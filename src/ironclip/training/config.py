"""What a pre-training run is made of, and how two runs differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ironclip.core.check import check_choice
from ironclip.training.architecture import Architecture

HARMLESS = ("checkpoint_every", "log_every", "validate_every")  # how often to write does not touch the weights


@dataclass(frozen=True)
class Pretrain:
    """Hyperparameters; the defaults made ``tiny-v1``.

    ``lr`` rises over ``warmup`` steps and falls as a cosine to 0 at ``steps``. ``clip``: bound on the gradient's norm.
    ``precision``: of the towers; weights, loss and optimiser are float32 always. ``merges``: size of the vocabulary
    beyond the bytes, learned from the captions of the first ``vocabulary_from`` images. ``whiten_from``: images that
    the start of the patch embedding is computed from, ``whiten_floor``: see ``architecture.whiten_patches``.
    ``validate_on``: images of the validation set.
    """

    steps: int = 4500
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    merges: int = 384
    vocabulary_from: int = 2000
    whiten_from: int = 512
    whiten_floor: float = 0.1
    sizes: Architecture = field(default_factory=Architecture)
    validate_on: int = 480
    checkpoint_every: int = 250
    log_every: int = 10
    validate_every: int = 250

    def __post_init__(self) -> None:
        check_choice(self.precision, ("fp32", "bf16"), "precision")
        counts = ("steps", "batch_size", "vocabulary_from", "whiten_from", "validate_on", *HARMLESS)
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.batch_size < 2:
            raise ValueError("batch_size must be 2 or more: a contrast needs another image, got 1")
        if not self.lr > 0 or not self.clip > 0 or self.weight_decay < 0 or self.warmup < 0 or self.seed < 0:
            raise ValueError(
                f"lr and clip must be positive, weight_decay, warmup and seed not negative, got lr={self.lr}, "
                f"clip={self.clip}, weight_decay={self.weight_decay}, warmup={self.warmup}, seed={self.seed}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Settings that differ, as "lr: 0.001 there, 0.002 now". Those that cannot change the weights are left out."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if k not in HARMLESS]
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{at}.{k}" if at else k)]
    return [] if old == new else [f"{at.removeprefix('config.')}: {old} there, {new} now"]
