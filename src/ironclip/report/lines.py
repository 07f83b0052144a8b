"""A table line, its scores and the block of lines that may be compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Order = Literal["R*", "given"]
THREATS = ("static", "graybox", "blackbox")


@dataclass(frozen=True)
class Score:
    """An accuracy in percent with its interval; ``value`` is None where there is none to print.

    ``unreliable``: there was a number, but a fatal flag says that it means nothing.
    """

    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    unreliable: bool = False

    @property
    def number(self) -> str:
        """``61.5``, ``unreliable`` or ``-``."""
        if self.unreliable:
            return "unreliable"
        return "-" if self.value is None else f"{self.value:.1f}"

    @property
    def interval(self) -> str:
        """``57.2-65.6``, empty without one."""
        if self.unreliable or self.value is None or self.lo is None or self.hi is None:
            return ""
        return f"{self.lo:.1f}-{self.hi:.1f}"

    @property
    def rank(self) -> float:
        """For sorting: the value, below all values where there is none."""
        return -1.0 if self.unreliable or self.value is None else self.value


@dataclass(frozen=True)
class Line:
    """One defense in one block. ``best`` / ``tie``: it leads R*, or cannot be told from the line that does."""

    defense: str
    spec: str
    title: str
    paradigm: str
    clean: Score
    threats: dict[str, Score]
    adaptive: Score
    harmonic: Score
    ms: float | None = None
    forwards: float | None = None
    backwards: float | None = None
    flags: tuple[str, ...] = ()
    fallen: tuple[tuple[str, float, int], ...] = ()
    best: bool = False
    tie: bool = False

    @property
    def cost(self) -> str:
        """Image-tower passes per image, ``3F 2B``."""
        if self.forwards is None:
            return "-"
        passes = ((self.forwards, "F"), (self.backwards or 0.0, "B"))
        return " ".join((f"{n:.0f}" if n >= 100 or n == round(n) else f"{n:.1f}") + k for n, k in passes if n)


@dataclass(frozen=True)
class Block:
    """The lines that may be compared with each other: one model, one set (or the mean of several), one budget."""

    vlm: str
    data: str
    eps: str
    norm: str
    extra: str
    lines: list[Line] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    sets: tuple[str, ...] = ()

    @property
    def budget(self) -> str:
        """``4/255``, with the norm where it is not l_inf."""
        return self.eps if self.norm == "linf" else f"{self.eps} ({self.norm})"

    @property
    def title(self) -> str:
        """Heading of the block's table."""
        return ", ".join(p for p in (self.vlm, self.data, f"eps {self.budget}", self.extra) if p)


def ranked(lines: list[Line], pairs: Sequence[Mapping[str, Any]], order: Order) -> list[Line]:
    """Sorted by R* (or as given), the leader and those that cannot be told from it marked; ``pairs``: its R* pairs."""
    if order == "R*":
        lines = sorted(lines, key=lambda s: (-s.adaptive.rank, -s.harmonic.rank, -s.clean.rank))
    leader = max(lines, key=lambda s: s.adaptive.rank)
    if leader.adaptive.rank < 0:
        return lines
    ids = {leader.defense, leader.title, leader.spec}
    tied = {str(p[o]) for p in pairs for s, o in ("ab", "ba") if p.get("verdict") == "tie" and str(p[s]) in ids}
    return [
        replace(s, best=s is leader, tie=s is not leader and not tied.isdisjoint({s.defense, s.title, s.spec}))
        for s in lines
    ]
