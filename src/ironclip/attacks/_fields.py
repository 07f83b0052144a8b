"""The fields that attacks share, checked in one place with one wording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ironclip.core.ball import NORMS, STARTS
from ironclip.core.check import as_fraction, check_choice, check_eps

WORDS = {"start": STARTS, "policy": ("max_loss", "first_success"), "returned": ("best", "last")}


def check_fields(
    attack: Any,
    norms: Iterable[str] = NORMS,
    losses: Iterable[str] | None = None,
    words: Mapping[str, tuple[str, ...]] | None = None,
    **least: int,
) -> None:
    """Refuse what no attack can run with, and turn budgets and steps into rationals.

    Looks at whatever of ``norm``, ``loss``, ``start``, ``policy``, ``returned``, ``eps``, ``alpha`` and ``rel_alpha``
    the attack has; ``words``: what else they may say; ``least``: smallest values of its counts. Raises ValueError.
    """
    names = {f.name for f in fields(attack)}
    if "norm" in names:
        check_choice(attack.norm, norms, "norm")
    if losses is not None:
        check_choice(attack.loss, losses, "loss")
    for name, valid in {**WORDS, **(words or {})}.items():
        if name in names:
            check_choice(getattr(attack, name), valid, name)
    if getattr(attack, "eps", None) is not None:
        object.__setattr__(attack, "eps", check_eps(attack.eps, getattr(attack, "norm", "linf")))
    for name in {"alpha", "rel_alpha"} & names:
        if getattr(attack, name) is not None:
            value = as_fraction(getattr(attack, name), name)
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}; write 1/255")
            object.__setattr__(attack, name, value)
    for name, low in least.items():
        if getattr(attack, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(attack, name)}")
