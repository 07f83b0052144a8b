"""How long and how to train: one frozen record that every defense with weights to learn reads."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ironclip.core.check import check_choice

FIRST_EPOCH = 1e-5
"""Learning rate of the first epoch under ``schedule=epochs``."""
_COUNTS = ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "validate_every")


@dataclass(frozen=True)
class Loop:
    """``steps`` updates of ``batch_size`` images, taken in ``accumulate`` equal parts where memory is short.

    ``lr`` rises linearly over ``warmup`` steps, then stays (``constant``) or falls to 0 as a cosine; with ``epochs``
    the ``warmup`` steps are an epoch at 1e-5, and the cosine goes down once an epoch and never reaches 0 (as in CoOp);
    ``first_step_full`` keeps the first step at the full rate, as code does that sets the rate after each step;
    ``drops``: from each of these shares of the steps on, such as (0.6, 0.8), the rate is a tenth of what it was.
    ``optimizer``: adamw (``betas``, ``adam_eps``), adam, whose decay is an L2 term of the loss, or sgd (``momentum``);
    ``weight_decay`` applies to every trained tensor.
    ``clip_norm``: bound on the gradient's norm. ``ema``: decay of the running mean of weights that is kept instead of
    the last ones, 0 for none. ``precision``: of the training pass, ``attack_precision``: of the inner attack; weights,
    losses and optimiser are fp32 always. ``train``: ``all`` tensors of the tower, ``last-N`` layers, or ``lora-R``, a
    low-rank update of rank R beside each weight matrix, merged at the end (Hu et al. 2021, arXiv 2106.09685).
    ``hold_out``: training images, at most a fifth, that are never trained on and measured before the first step and
    every ``validate_every`` steps. ``diverged``: the run stops when the mean loss of 20 steps is this many times that
    of the first 20. ``extra``: fields of a method's own. Raises ValueError for values that cannot stand.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "cosine", "epochs"] = "cosine"
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    attack_precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    momentum: float = 0.9
    first_step_full: bool = False
    drops: tuple[float, ...] = ()
    ema: float = 0.0
    train: str = "all"
    hold_out: int = 64
    diverged: float = 10.0
    checkpoint_every: int = 100
    log_every: int = 10
    validate_every: int = 200
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            _whole(name, getattr(self, name), 1)
        for name in ("warmup", "hold_out"):
            _whole(name, getattr(self, name), 0)
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup must be shorter than steps={self.steps}, got {self.warmup}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}; write 1e-5")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}")
        if not 0 < self.adam_eps < 1:
            raise ValueError(f"adam_eps must lie in (0, 1), got {self.adam_eps}; write 1e-8")
        if not self.diverged > 1:
            raise ValueError(f"diverged must be above 1, got {self.diverged}; write 10")
        for name, value in (("ema", self.ema), ("momentum", self.momentum), *(("betas", b) for b in self.betas)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        check_choice(self.schedule, ("constant", "cosine", "epochs"), "schedule")
        if self.schedule == "epochs" and not self.warmup:
            raise ValueError("schedule=epochs counts in epochs of warmup steps; write warmup=50 for 50 steps an epoch")
        check_choice(self.optimizer, ("adamw", "adam", "sgd"), "optimizer")
        for name in ("precision", "attack_precision"):
            check_choice(getattr(self, name), ("fp32", "bf16"), name)
        if any(not 0 < share < 1 for share in self.drops):
            raise ValueError(f"drops must lie between 0 and 1, got {self.drops}; write (0.6, 0.8)")
        self.trained()

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        return self._smooth_rate(step) * 0.1 ** sum(step >= share * self.steps for share in self.drops)

    def _smooth_rate(self, step: int) -> float:
        if self.first_step_full and step == 0:
            return self.lr
        if self.schedule == "epochs":
            epoch = step // self.warmup
            falling = 0.5 * self.lr * (1 + math.cos(math.pi * (epoch - 1) * self.warmup / self.steps))
            return falling if epoch else FIRST_EPOCH
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))

    def trained(self) -> tuple[str, int]:
        """``train`` taken apart: ("all", 0), ("last", N) or ("lora", R). Raises ValueError."""
        found = re.fullmatch(r"(last|lora)-([1-9]\d*)", self.train)
        if self.train != "all" and not found:
            raise ValueError(f"train must be all, last-N or lora-R, got {self.train!r}; write last-2 or lora-8")
        return (found.group(1), int(found.group(2))) if found else ("all", 0)

    def resized(self, **changes: Any) -> Loop:
        """The same loop with some fields changed; a warm-up that was not named keeps its share of the steps."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"a loop has no field {name!r}; it has {', '.join(known)}")
        kept = {name: getattr(self, name) for name in known} | changes
        if "steps" in changes and "warmup" not in changes:
            kept["warmup"] = self.warmup * int(changes["steps"]) // self.steps
            if kept["schedule"] == "epochs":
                kept["warmup"] = max(kept["warmup"], 1)
        return Loop(**kept)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
