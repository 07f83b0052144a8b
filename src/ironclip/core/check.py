"""Refuse bad input before any work begins: what was expected, what came, what to type."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from fractions import Fraction

import torch
from torch import Tensor

SLACK = 1e-6


def unknown(kind: str, got: str, valid: Iterable[str]) -> str:
    """Message for a name that does not exist: nearest match first, then all valid choices."""
    names = sorted(valid)
    near = get_close_matches(got.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    match = next((n for n in names if near and n.lower() == near[0]), None)
    hint = f"; did you mean {match!r}?" if match else ";"
    return f"unknown {kind} {got!r}{hint} valid: {', '.join(names)}"


def check_images(x: Tensor, size: int | None = None) -> None:
    """Accept only float pixels (b, 3, h, w) in [0, 1], finite, of the model's input size.

    Raises ValueError that names the fix: normalised images, 0-255 images, NaN, wrong shape, dtype or size.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"images must be a torch tensor (b, 3, h, w), got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images must have shape (b, 3, h, w), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"images must be float pixels in [0, 1], got {x.dtype}; write x.float() / 255")
    if size is not None and x.shape[-2:] != (size, size):
        raise ValueError(
            f"images must be {size} x {size} for this model, got {x.shape[-2]} x {x.shape[-1]}; resize first"
        )
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x.detach())
    lo, hi = float(low), float(high)
    if math.isnan(lo) or math.isnan(hi) or math.isinf(lo) or math.isinf(hi):
        raise ValueError("images contain NaN or infinite pixels; expected finite values in [0, 1]")
    if lo < -SLACK or hi > 1 + SLACK:
        why = (
            "divide by 255" if lo >= 0 and hi > 2 else "pass pixels before mean/std normalisation: the model normalises"
        )
        raise ValueError(f"images must lie in [0, 1], got values from {lo:.3g} to {hi:.3g}; {why}")


def check_labels(y: Tensor, b: int, k: int | None = None, what: str = "labels") -> None:
    """Accept only integer labels (b,) in 0..k-1; ``k=None`` leaves the range open. Raises ValueError otherwise."""
    if not isinstance(y, Tensor) or y.ndim != 1 or y.shape[0] != b:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{what} must have shape ({b},), got {got}")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"{what} must be integers, got {y.dtype}; write y.long()")
    if b and (int(y.min()) < 0 or (k is not None and int(y.max()) >= k)):
        top = f"0..{k - 1} for {k} classes" if k is not None else "0..k-1"
        raise ValueError(f"{what} must lie in {top}, got {int(y.min())}..{int(y.max())}")


def check_logits(z: Tensor, b: int, k: int | None = None) -> None:
    """Accept only finite logits (b, k). Raises ValueError otherwise."""
    if z.ndim != 2 or z.shape[0] != b or (k is not None and z.shape[1] != k):
        want = f"({b}, {k if k is not None else 'k'})"
        raise ValueError(f"the classifier must return logits of shape {want}, got {tuple(z.shape)}")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("the classifier returned NaN or infinite logits")


def as_fraction(value: Fraction | float | int | str, name: str = "eps") -> Fraction:
    """A budget as an exact rational: 4/255 typed as text, Fraction, or the float nearest to it.

    A float is read as the simplest fraction with a denominator up to 10,000 that rounds to it, else digit by digit.
    Raises ValueError for anything that is not a finite number.
    """
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number such as 4/255, got {value!r}")
    if isinstance(value, Fraction):
        return value
    if isinstance(value, int):
        return Fraction(value)
    try:
        if isinstance(value, str):
            return Fraction(value.replace(" ", ""))
        if isinstance(value, float) and math.isfinite(value):
            near = Fraction(value).limit_denominator(10_000)
            return near if float(near) == value else Fraction(repr(value))
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(f"{name} must be a finite number such as 4/255, got {value!r}")


def check_eps(value: Fraction | float | int | str, norm: str = "linf", name: str = "eps") -> Fraction:
    """The budget as a rational, refused if it cannot be one: linf in [0, 1], l1 and l2 not negative.

    Raises ValueError; a linf budget above 1 is taken for the 0-255 scale and answered with the fraction to write.
    """
    eps = as_fraction(value, name)
    if eps < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    if norm == "linf" and eps > 1:
        shown = int(eps) if eps.denominator == 1 else float(eps)
        raise ValueError(f"{name} must be in (0, 1], got {shown}; write {shown}/255")
    return eps


def check_choice(value: str, valid: Iterable[str], name: str) -> None:
    """Raise ValueError unless ``value`` is one of the valid words."""
    words = list(valid)
    if value not in words:
        raise ValueError(unknown(name, str(value), words))
