"""What an attacker sees: an ordinary classifier, so that attacks never know which defense they face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ironclip.core.types import Classifier, Defense, Info, State
from ironclip.core.views import base_of, eot, penalised, straight_through
from ironclip.core.zeroshot import ZeroShot
from ironclip.evaluation.recipes import BLACKBOX, Budget, Member, members_for


def composition(defense: Defense, budget: Budget, threat: str = "adaptive") -> list[Member]:
    """The members of a defense's attack: by its kind, its surrogates and its own additions, less what is skipped."""
    if threat == "blackbox":
        return list(BLACKBOX)
    members = members_for(
        defense.info.kind,
        tuple(getattr(defense, "surrogates", ())),
        hasattr(defense, "penalty"),
        tuple(getattr(defense, "extra_members", ())),
    )
    return [m for m in members if m.name not in budget.skip]


def fitted(info: Info, defense: Any, clf: ZeroShot, state: State | None) -> ZeroShot:
    """The undefended classifier with the defense's trained parts: what a graybox attacker holds.

    A defense that trains weights or prompts offers ``fitted(clf, state) -> ZeroShot``; others leave the model as it is.
    """
    make: Callable[[ZeroShot, State | None], ZeroShot] | None = getattr(defense, "fitted", None)
    return make(clf, state) if make is not None else clf


def attack_view(
    defense: Defense, clf: ZeroShot, state: State | None, member: Member, budget: Budget
) -> tuple[Classifier, bool]:
    """The classifier that ``member`` differentiates, and whether it draws random numbers."""
    defended = defense.apply(clf, state)
    match member.view.partition(":"):
        case ("through", _, _):
            view = defended
        case ("bpda", _, _):
            view = straight_through(defended, fitted(defense.info, defense, clf, state))
        case ("base", _, _):
            view = fitted(defense.info, defense, clf, state)
        case ("surrogate", _, name):
            view = defense.surrogate(clf, state, name)  # type: ignore[attr-defined]
        case _:
            raise ValueError(f"member {member.name!r} has no view of its own: {member.view!r}")
    random = bool(base_of(view, "randomized"))
    if member.beta:
        view = penalised(view, defense.penalty(clf, state), member.beta)  # type: ignore[attr-defined]
    if random and member.eot and budget.eot > 1:
        view = eot(view, budget.eot)
    return view, random
