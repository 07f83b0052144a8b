"""Adaptive attacks as data: for each kind of defense the members whose per-sample worst case is R*.

A defense names its kind in ``info.kind`` and gets that kind's members; ``extra_members`` on the class adds its own.
Members that do not apply (no such surrogate, no penalty, another norm, a budget too small) drop out by themselves. See
``docs/adding.md`` and Tramer et al. 2020 (arXiv 2002.08347), Croce et al. 2022 (arXiv 2202.13711).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ironclip.core.check import check_choice

SPECS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pgd": ("PGD(eps={eps}, norm={norm}, steps={steps}, loss={loss}{again}, policy=first_success)", ()),
    "apgd": ("APGD(eps={eps}, norm={norm}, steps={steps}, loss={loss}{again}, policy=first_success)", ("linf", "l2")),
    "apgd_t": ("APGDT(eps={eps}, norm={norm}, steps={steps}, policy=first_success)", ("linf", "l2")),
    "feature": ("FeaturePGD(eps={eps}, norm={norm}, steps={steps}, loss={loss})", ()),
    "mi-di": ("Transfer(eps={eps}, norm={norm}, steps={steps}, loss={loss}, di=0.5)", ()),
    "random": ("RandomPoints(eps={eps}, norm={norm}, points={points})", ()),
    "square": ("Square(eps={eps}, norm={norm}, queries={queries}, policy=first_success)", ("linf", "l2")),
    "rays": ("RayS(eps={eps}, queries={queries})", ("linf",)),
}
"""What a member's ``attack`` stands for, and the norms that it knows (none named: every one)."""


@dataclass(frozen=True)
class Budget:
    """How much an adaptive run may spend.

    ``steps`` per white-box member and ``restarts`` of it; ``eot``: most draws per gradient for random defenses;
    ``draws``: fresh draws for the verdict; ``points``: random points; ``queries``: calls of the whole defense per
    image that a score or decision attack may make; ``probe``: images for the checks that need runs of their own;
    ``skip``: members that are left out.
    """

    name: str
    steps: int
    eot: int
    draws: int
    probe: int
    points: int = 4
    queries: int = 8
    restarts: int = 1
    skip: tuple[str, ...] = ()

    def text(self) -> str:
        """The budget as printed beside every figure."""
        mean = f"EOT {'up to ' if self.eot > 1 else ''}{self.eot}"
        again = f" x {self.restarts} restarts" if self.restarts > 1 else ""
        without = f", without {', '.join(self.skip)}" if self.skip else ""
        spent = f"{self.steps} steps{again}, {mean}, {self.draws} fresh draws, {self.queries} queries"
        return f"{self.name}: {spent}{without}"


BUDGETS: dict[str, Budget] = {
    "smoke": Budget("smoke", steps=3, eot=1, draws=2, probe=0),
    "quick": Budget(
        "quick", steps=7, eot=1, draws=2, probe=0, queries=16, skip=("evade-0.1", "evade-10", "base-margin")
    ),
    "short": Budget("short", steps=10, eot=1, draws=4, probe=4, points=5, queries=20, skip=("evade-0.1", "evade-10")),
    "standard": Budget("standard", steps=20, eot=5, draws=10, probe=8, points=50, queries=200, restarts=2),
    "full": Budget("full", steps=100, eot=50, draws=10, probe=16, points=1000, queries=5000, restarts=5),
}
ORDER = tuple(BUDGETS)


def budget(name: str | Budget) -> Budget:
    """A budget by name. Raises ValueError naming the valid ones."""
    if isinstance(name, Budget):
        return name
    check_choice(name, BUDGETS, "budget")
    return BUDGETS[name]


@dataclass(frozen=True)
class Member:
    """One attack of an adaptive composition.

    ``view``: ``through`` differentiates the defense itself, ``bpda`` runs it forward and the undefended model backward,
    ``surrogate:NAME`` a stand-in of the defense, ``base`` attacks the undefended model (or its fitted weights) and
    shows the result to the defense, ``prompts`` does so with other prompt templates, ``origin`` with the weights before
    fitting, ``relatives`` with other models, ``static`` takes the stored static examples. ``loss``: what is raised;
    ``attack``: a name in ``SPECS`` or any spec with ``{eps}``, ``{norm}`` and ``{steps}``. ``eot``: draws are averaged
    where the defense is random. ``beta``: weight of the defense's ``penalty``. ``least``: smallest budget that runs it.
    """

    name: str
    view: str
    loss: str = "ce"
    attack: str = "pgd"
    eot: bool = True
    beta: float = 0.0
    white: bool = True
    least: str = "smoke"

    def spec(self, eps: Fraction, norm: str, budget: Budget, draws: int = 1) -> str:
        """The attack's spec text; queries are shared by the ``draws`` that are averaged in each step."""
        form = SPECS[self.attack][0] if self.attack in SPECS else self.attack
        return form.format(
            eps=eps,
            norm=norm,
            steps=budget.steps,
            loss=self.loss,
            points=budget.points,
            queries=max(budget.queries // draws, 1),
            again=f", restarts={budget.restarts}" if budget.restarts > 1 else "",
        )

    def runs(self, budget: Budget, norm: str) -> bool:
        """Does the budget reach this member, and does its attack know the norm?"""
        norms = SPECS[self.attack][1] if self.attack in SPECS else ()
        rich = budget.name not in ORDER or ORDER.index(budget.name) >= ORDER.index(self.least)
        return rich and self.name not in budget.skip and (not norms or norm in norms)


def _climbs(view: str, prefix: str = "") -> tuple[Member, ...]:
    """Gradient members through one view: PGD on two losses, then APGD on the others, then features."""
    p = f"{prefix}-" if prefix else ""
    return (
        Member(f"{p or 'through-'}ce", view),
        Member(f"{p or 'through-'}margin", view, loss="margin"),
        Member(f"{p}apgd-dlr", view, loss="dlr", attack="apgd", least="short"),
        Member(f"{p}apgd-ce", view, attack="apgd", least="standard"),
        Member(f"{p}apgd-t", view, attack="apgd_t", least="full"),
        Member(f"{p}feature", view, loss="feat_l2", attack="feature", least="standard"),
    )


RANDOM = Member("random", "through", attack="random", eot=False, white=False)
SQUARE = Member("square", "through", attack="square", white=False, least="short")
RAYS = Member("rays", "through", attack="rays", white=False, least="standard")

BLACKBOX = (RANDOM, replace(SQUARE, least="smoke"), replace(RAYS, least="quick"))
"""What a query-only attacker runs through the whole defense."""

_LATE = (
    RANDOM,
    SQUARE,
    RAYS,
    Member("relatives", "relatives", loss="margin", attack="mi-di", white=False),
    Member("transfer", "static", white=False),
)
_WHITE = _climbs("through")
_BASE = (Member("base-margin", "base", loss="margin"),)
_WEIGHTS = (
    *_WHITE[:5],
    replace(_WHITE[5], least="smoke"),
    Member("prompts", "prompts", loss="margin", least="standard"),
    Member("origin", "origin", loss="margin", attack="mi-di", white=False, least="standard"),
)
_HIDDEN = (
    Member("bpda", "bpda"),
    Member("bpda-margin", "bpda", loss="margin"),
    Member("bpda-apgd-dlr", "bpda", loss="dlr", attack="apgd", least="short"),
)

RECIPES: dict[str, tuple[Member, ...]] = {
    "none": (*_WHITE, *_LATE[:-1], Member("transfer", "static", white=True)),
    "averaging": (*_WHITE, *_BASE, *_LATE),
    "counterattack": (
        *_climbs("surrogate:bpda", "bpda"),
        Member("unrolled", "surrogate:smooth"),
        *_BASE,
        *_LATE,
    ),
    "purification": (
        *_WHITE,
        Member("identity", "surrogate:identity", loss="margin"),
        Member("graph", "surrogate:graph"),
        Member("identity-apgd-dlr", "surrogate:identity", loss="dlr", attack="apgd", least="standard"),
        *_LATE,
    ),
    "transform": (*_WHITE[:2], *_HIDDEN, *_WHITE[2:], *_LATE),
    "projection": (*_WHITE, _HIDDEN[0], replace(_HIDDEN[1], least="standard"), *_LATE),
    "views": (*_WHITE, _HIDDEN[0], replace(_HIDDEN[1], least="standard"), *_LATE),
    "tuning": (
        *_WHITE[:2],
        Member("unrolled", "surrogate:unrolled"),
        Member("unrolled-margin", "surrogate:unrolled", loss="margin", least="standard"),
        *_WHITE[2:],
        _HIDDEN[0],
        *_BASE,
        *_LATE,
    ),
    "detector": (*_WHITE, *_BASE, *_LATE),
    "stateful": (*_WHITE, _HIDDEN[0], replace(_HIDDEN[1], least="standard"), *_BASE, *_LATE),
    "finetuned": (*_WEIGHTS, *_LATE),
    "prompt": (*_WEIGHTS, *_LATE),
}
"""By kind: input counterattacks, averaged views or draws, purification, pixel transforms, feature projection, prompts
tuned for each image (held constant, then unrolled), detectors and gates, defenses with a memory (judged with an empty
one, sample by sample), fine-tuned weights, learned prompts."""

GENERIC = (*_WHITE, *_HIDDEN, *_LATE)
"""For a kind that is not listed: everything that needs to know nothing."""

SWEEP = {0.01: "standard", 0.1: "smoke", 1.0: "smoke", 10.0: "smoke"}
"""Weights of a penalty and the smallest budget that tries them; 0 is every other member. One weight alone is no
adaptive attack: too large a one spends the budget on staying unnoticed."""


STORED = ("static", "graybox")
"""Views of which the store has judged examples: an attacker of this threat model may use those of every weaker one."""

GRAYBOX = Member("graybox", "graybox")
"""The static attacks on fitted weights, for every defense that has any."""


def members_for(kind: str, surrogates: tuple[str, ...], penalty: bool, extra: tuple[Member, ...] = ()) -> list[Member]:
    """The members that apply to a defense: its kind's, its own, one through every surrogate nobody named yet, and for a
    defense with a ``penalty`` the sweep over its weight, through the first surrogate or the defense itself.

    White-box members come first, transfer and black-box ones last, each on what the others left.
    """
    listed = (*RECIPES.get(kind, GENERIC), *extra)
    white = [m for m in listed if m.view != "static" and m.white]
    named = {m.view for m in white}
    taken = {m.name for m in listed}
    others = [s for s in surrogates if f"surrogate:{s}" not in named]
    white += [Member(f"surrogate-{s}" if s in taken else s, f"surrogate:{s}") for s in others]
    if penalty:
        view = f"surrogate:{surrogates[0]}" if surrogates else "through"
        white += [Member(f"evade-{b:g}", view, beta=b, least=least) for b, least in SWEEP.items()]
    late = [m for m in listed if not m.white or m.view == "static"]
    known = {f"surrogate:{s}" for s in surrogates}
    return [
        m
        for m in (*white, *late)
        if not (m.view.startswith("surrogate:") and m.view not in known) and (penalty or not m.beta)
    ]
