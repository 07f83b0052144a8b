"""What an attacker sees: an ordinary classifier, so that attacks never know which defense they face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ironclip.core.types import Classifier, Defense, Info, State
from ironclip.core.views import base_of, ensemble, penalised, straight_through
from ironclip.core.zeroshot import ZeroShot
from ironclip.evaluation.recipes import BLACKBOX, GRAYBOX, Budget, Member, members_for

OTHER_TEMPLATES = ("a picture of a {}.", "{}")
"""What the ``prompts`` member asks in place of the evaluation's own templates: weights fine-tuned against one prompt
can fall to examples made for another (arXiv 2403.01849)."""


def composition(
    defense: Defense, budget: Budget, threat: str = "adaptive", norm: str = "linf", relatives: bool = False
) -> list[Member]:
    """The members of a defense's attack: by its kind, its surrogates, its penalty and its own additions, less what the
    budget or the norm leaves out. ``relatives``: were other models named to transfer from?"""
    members: Sequence[Member] = BLACKBOX
    if threat != "blackbox":
        members = members_for(
            defense.info.kind,
            tuple(getattr(defense, "surrogates", ())),
            hasattr(defense, "penalty"),
            tuple(getattr(defense, "extra_members", ())),
        )
        if hasattr(defense, "fitted"):
            members = [*members, GRAYBOX]
    return [m for m in members if m.runs(budget, norm) and (relatives or m.view != "relatives")]


def fitted(info: Info, defense: Any, clf: ZeroShot, state: State | None) -> ZeroShot:
    """The undefended classifier with the defense's trained parts: what a graybox attacker holds.

    A defense that trains weights or prompts offers ``fitted(clf, state) -> ZeroShot``; others leave the model as it is.
    """
    make: Callable[[ZeroShot, State | None], ZeroShot] | None = getattr(defense, "fitted", None)
    return make(clf, state) if make is not None else clf


def attack_view(
    defense: Defense, clf: ZeroShot, state: State | None, member: Member, relatives: Sequence[ZeroShot] = ()
) -> Classifier:
    """The classifier that ``member`` differentiates or asks, one draw a call; raises ValueError for an unknown view."""
    match member.view.partition(":"):
        case ("through", _, _):
            view = defense.apply(clf, state)
        case ("bpda", _, _):
            view = straight_through(defense.apply(clf, state), fitted(defense.info, defense, clf, state))
        case ("base", _, _):
            view = fitted(defense.info, defense, clf, state)
        case ("origin", _, _):
            view = clf
        case ("prompts", _, _):
            base = fitted(defense.info, defense, clf, state)
            view = base.with_weights(base.encode_prompts(OTHER_TEMPLATES).mean(dim=1))
        case ("relatives", _, _):
            view = ensemble(relatives) if len(relatives) > 1 else relatives[0]
        case ("surrogate", _, name):
            view = defense.surrogate(clf, state, name)  # type: ignore[attr-defined]
        case _:
            raise ValueError(f"member {member.name!r} has no view of its own: {member.view!r}")
    if member.beta:
        view = penalised(view, defense.penalty(clf, state), member.beta)  # type: ignore[attr-defined]
    return view


def has_features(view: Classifier) -> bool:
    """Can a feature attack read embeddings from it?"""
    return base_of(view, "vlm") is not None
