"""Adaptive attacks as data: for each kind of defense the members whose per-sample worst case is R*.

A defense names its kind in ``info.kind`` and gets that kind's members; ``extra_members`` on the class adds its own.
Members that do not apply (no randomness to average, no such surrogate) drop out by themselves. See
``docs/adding_a_defense.md`` and Tramer et al. 2020 (arXiv 2002.08347), Croce et al. 2022 (arXiv 2202.13711).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ironclip.core.check import check_choice


@dataclass(frozen=True)
class Member:
    """One attack of an adaptive composition.

    ``view``: ``through`` differentiates the defense itself, ``bpda`` runs it forward and the undefended model backward,
    ``surrogate:NAME`` a stand-in of the defense, ``base`` attacks the undefended model (or its fitted weights) and
    shows the result to the defense, ``static`` takes the stored static examples. ``loss``: what is raised; ``attack``:
    ``pgd``, ``feature``, ``random`` or any spec with ``{eps}``, ``{norm}`` and ``{steps}``. ``eot``: draws are averaged
    where the defense is random. ``beta``: weight of the defense's ``penalty``.
    """

    name: str
    view: str
    loss: str = "ce"
    attack: str = "pgd"
    eot: bool = True
    beta: float = 0.0
    white: bool = True

    def spec(self, eps: Fraction, norm: str, steps: int) -> str:
        """The attack's spec text."""
        budget = f"eps={eps.numerator}/{eps.denominator}, norm={norm}"
        match self.attack:
            case "pgd":
                return f"PGD({budget}, steps={steps}, loss={self.loss}, policy=first_success)"
            case "feature":
                return f"FeaturePGD({budget}, steps={steps}, loss={self.loss})"
            case "random":
                return f"RandomPoints({budget}, points={max(steps // 2, 4)})"
        return self.attack.format(eps=eps, norm=norm, steps=steps)


@dataclass(frozen=True)
class Budget:
    """How much an adaptive run may spend: ``steps`` per member, ``eot`` draws per gradient for random defenses,
    ``draws`` fresh draws for the verdict, ``probe`` images for the checks that need runs of their own,
    ``skip`` members that are left out."""

    name: str
    steps: int
    eot: int
    draws: int
    probe: int
    skip: tuple[str, ...] = ()

    def text(self) -> str:
        """The budget as printed beside every figure."""
        without = f", without {', '.join(self.skip)}" if self.skip else ""
        return f"{self.name}: {self.steps} steps, EOT {self.eot}, {self.draws} fresh draws{without}"


BUDGETS: dict[str, Budget] = {
    "smoke": Budget("smoke", steps=3, eot=1, draws=2, probe=0),
    "quick": Budget("quick", steps=7, eot=1, draws=2, probe=0, skip=("evade-0.1", "evade-10", "base-margin")),
    "short": Budget("short", steps=10, eot=1, draws=4, probe=4, skip=("evade-0.1", "evade-10")),
    "standard": Budget("standard", steps=20, eot=4, draws=10, probe=8),
    "full": Budget("full", steps=100, eot=20, draws=10, probe=16),
}


def budget(name: str | Budget) -> Budget:
    """A budget by name. Raises ValueError naming the valid ones."""
    if isinstance(name, Budget):
        return name
    check_choice(name, BUDGETS, "budget")
    return BUDGETS[name]


_TRANSFER = (
    Member("random", "through", attack="random", eot=False, white=False),
    Member("transfer", "static", white=False),
)
_WHITE = (Member("through-ce", "through"), Member("through-margin", "through", loss="margin"))
_BPDA = (Member("bpda", "bpda"),)
_EVADE = tuple(Member(f"evade-{b:g}", "through", beta=b) for b in (0.1, 1.0, 10.0))

BLACKBOX = (Member("random", "through", attack="random", eot=False, white=False),)
"""What a query-only attacker runs through the whole defense."""

RECIPES: dict[str, tuple[Member, ...]] = {
    "none": (*_WHITE, _TRANSFER[0], Member("transfer", "static", white=True)),
    "averaging": (*_WHITE, Member("base-margin", "base", loss="margin"), *_EVADE, *_TRANSFER),
    "counterattack": (
        Member("bpda-ce", "surrogate:bpda"),
        Member("bpda-margin", "surrogate:bpda", loss="margin"),
        Member("unrolled", "surrogate:smooth"),
        Member("base-margin", "base", loss="margin"),
        *(Member(f"evade-{b:g}", "surrogate:bpda", beta=b) for b in (0.1, 1.0, 10.0)),
        *_TRANSFER,
    ),
    "purification": (
        *_WHITE,
        Member("identity", "surrogate:identity", loss="margin"),
        Member("graph", "surrogate:graph"),
        *_TRANSFER,
    ),
    "transform": (*_WHITE, *_BPDA, Member("bpda-margin", "bpda", loss="margin"), *_TRANSFER),
    "projection": (*_WHITE, *_BPDA, *_TRANSFER),
    "views": (*_WHITE, *_BPDA, *_TRANSFER),
    "finetuned": (*_WHITE, Member("feature", "through", loss="feat_l2", attack="feature"), *_TRANSFER),
    "prompt": (*_WHITE, Member("feature", "through", loss="feat_l2", attack="feature"), *_TRANSFER),
}


def members_for(kind: str, surrogates: tuple[str, ...], penalty: bool, extra: tuple[Member, ...] = ()) -> list[Member]:
    """The members that apply to a defense: its kind's, its own, and BPDA through every surrogate nobody named yet.

    An unknown kind gets everything that is generic: through, BPDA, each surrogate, transfer.
    """
    listed = RECIPES.get(kind, (*_WHITE, *_BPDA, *_TRANSFER))
    white = [m for m in (*listed, *extra) if m.view != "static" and m.white]
    named = {m.view for m in white}
    white += [Member(s, f"surrogate:{s}") for s in surrogates if f"surrogate:{s}" not in named]
    late = [m for m in (*listed, *extra) if not m.white or m.view == "static"]
    kept = []
    for m in (*white, *late):
        if m.view.startswith("surrogate:") and m.view.split(":")[1] not in surrogates:
            continue
        if m.beta and not penalty:
            continue
        kept.append(m)
    return kept
