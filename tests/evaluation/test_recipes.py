"""Adaptive compositions as data: what each kind runs, how many draws a gradient gets, where examples come from."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attack_toys import Conv, Noisy, images, labels_of
from toyset import toy_block

import ironclip
from ironclip.core.grad import loss_and_grad
from ironclip.core.losses import ce
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import method
from ironclip.core.types import Info
from ironclip.core.views import Defended, eot
from ironclip.evaluation.plans import fewest_draws, gradient_cosine
from ironclip.evaluation.recipes import BLACKBOX, BUDGETS, GENERIC, ORDER, RECIPES, Member, members_for
from ironclip.evaluation.threat import attack_view, composition
from ironclip.registry import DEFENSES, build_attack, build_defense

EPS = Fraction(4, 255)
R8 = SampleRNG.rows(8)


def names(kind: str, budget: str, norm: str = "linf", surrogates: tuple[str, ...] = (), penalty: bool = False) -> list:
    return [m.name for m in members_for(kind, surrogates, penalty) if m.runs(BUDGETS[budget], norm)]


@pytest.mark.parametrize("kind", [*RECIPES, "unheard of"])
def test_every_kind_meets_white_box_black_box_and_transfer(kind: str) -> None:
    listed = members_for(kind, ("bpda", "smooth"), True)
    assert len({m.name for m in listed}) == len(listed)
    colours = [m.white and m.view != "static" for m in listed]
    assert colours == sorted(colours, reverse=True), "white-box members first"
    short, standard = names(kind, "short", surrogates=("bpda",)), names(kind, "standard", surrogates=("bpda",))
    assert {"random", "square", "transfer"} <= set(short)
    assert any(n.endswith("apgd-dlr") for n in short)
    assert {"rays", "random", "square"} <= set(standard)
    for what in ("apgd-ce", "apgd-dlr", "feature"):
        assert any(n.endswith(what) for n in standard), what


@pytest.mark.parametrize("kind", [*RECIPES, "unheard of"])
def test_small_budgets_stay_cheap(kind: str) -> None:
    dear = {"apgd", "apgd_t", "square", "rays"}
    listed = [m for m in members_for(kind, ("bpda",), True) if m.runs(BUDGETS["quick"], "linf")]
    assert not dear & {m.attack for m in listed}
    sizes = [len(names(kind, b, surrogates=("bpda",), penalty=True)) for b in ("quick", "short", "standard", "full")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("budget", ORDER)
def test_every_member_is_an_attack_in_every_norm_that_it_claims(budget: str, norm: str) -> None:
    for listed in (*RECIPES.values(), GENERIC, BLACKBOX):
        for m in listed:
            if m.view != "static" and m.runs(BUDGETS[budget], norm):
                made = build_attack(m.spec(EPS, norm, BUDGETS[budget]))
                assert (made.eps, made.norm) == (EPS, norm)


def test_norms_that_an_attack_does_not_know_leave_it_out() -> None:
    assert "rays" not in names("none", "full", "l2")
    assert not {"rays", "square", "apgd-ce", "apgd-dlr", "apgd-t"} & set(names("none", "full", "l1"))
    assert {"through-ce", "through-margin", "feature", "random"} <= set(names("none", "full", "l1"))


def test_averaged_draws_share_the_queries() -> None:
    square = next(m for m in BLACKBOX if m.name == "square")
    standard = BUDGETS["standard"]
    assert build_attack(square.spec(EPS, "linf", standard)).queries == standard.queries
    assert build_attack(square.spec(EPS, "linf", standard, draws=5)).queries == standard.queries // 5
    assert build_attack(square.spec(EPS, "linf", BUDGETS["smoke"], draws=50)).queries == 1


def test_a_penalty_is_swept_for_any_kind() -> None:
    assert [n for n in names("detector", "standard", penalty=True) if n.startswith("evade")] == [
        "evade-0.01", "evade-0.1", "evade-1", "evade-10",
    ]  # fmt: skip
    assert not [n for n in names("detector", "standard") if n.startswith("evade")]
    through = [m for m in members_for("detector", (), True) if m.beta]
    assert {m.view for m in through} == {"through"}
    assert [m.beta for m in through] == [0.01, 0.1, 1.0, 10.0]
    assert {m.view for m in members_for("detector", ("soft", "bpda"), True) if m.beta} == {"surrogate:soft"}


def test_a_defense_adds_members_of_its_own() -> None:
    mine = Member("mine", "through", attack="PGD(eps={eps}, norm={norm}, steps={steps}, momentum=0.9)")
    listed = members_for("views", (), False, (mine,))
    assert mine in listed
    assert build_attack(mine.spec(EPS, "l2", BUDGETS["short"])).momentum == 0.9


@pytest.mark.parametrize("name", DEFENSES)
def test_every_shipped_defense_has_a_composition_of_its_kind(name: str) -> None:
    info = build_defense(name).info
    assert info.kind in RECIPES
    assert sum(m.white for m in composition(build_defense(name), BUDGETS["quick"])) >= 2


def test_budgets_say_what_they_spend() -> None:
    assert BUDGETS["short"].text() == ("short: 10 steps, EOT 1, 4 fresh draws, 20 queries, without evade-0.1, evade-10")
    assert BUDGETS["standard"].text() == ("standard: 20 steps x 2 restarts, EOT up to 5, 10 fresh draws, 200 queries")


# how many draws


def test_one_draw_is_enough_where_nothing_is_random() -> None:
    clf, x = Conv(), images(8)
    assert gradient_cosine(clf, x, labels_of(clf, x), R8, 1) == pytest.approx(1.0)
    assert fewest_draws(clf, x, labels_of(clf, x), R8, 50) == (1, pytest.approx(1.0))


@pytest.mark.parametrize(("sigma", "least"), [(0.02, 1), (3.0, 5)])
def test_noisier_classifiers_need_more_draws(sigma: float, least: int) -> None:
    clf, x = Noisy(Conv(), sigma), images(8)
    draws, cosine = fewest_draws(clf, x, labels_of(clf, x), R8, 50)
    assert draws >= least if least > 1 else draws == 1
    assert cosine == gradient_cosine(clf, x, labels_of(clf, x), R8, draws)
    if draws > 1:
        assert gradient_cosine(clf, x, labels_of(clf, x), R8, 1) < 0.5
    assert fewest_draws(clf, x, labels_of(clf, x), R8, 1)[0] == 1


def test_the_error_of_an_averaged_gradient_falls_with_the_root_of_the_draws() -> None:
    clf, x = Noisy(Conv(), 0.3), images(8)
    y = labels_of(clf, x)

    def grad(draws: int, i: int) -> torch.Tensor:
        return loss_and_grad(eot(clf, draws), x, lambda z: ce(z, y), R8.fold("try", i)).grad

    truth = grad(900, 99)
    errors = [float(sum((grad(n, i) - truth).norm() for i in range(4)) / 4) for n in (4, 64)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)


@method
class Blurred:
    """Noise of its own, kind without a recipe."""

    info: ClassVar[Info] = Info("blurred", "blurred", "training-free", "unheard of", "test", randomized=True)

    sigma: float = 0.4

    def apply(self, clf: Any, state: Any = None) -> Defended:
        def encode(x: torch.Tensor, rng: Any = None) -> torch.Tensor:
            return clf.vlm.encode_image(x + self.sigma * rng.fold("blurred").normal_like(x))

        return Defended(clf, encode, randomized=True)


def run(defense: Any, budget: Any, store: Path | None = None, **options: Any) -> dict[str, Any]:
    vlm, data = toy_block(8)
    options = {"costs": False, "threat": "adaptive", "attacks": "PGD(eps=8/255, steps=5)", **options}
    return ironclip.evaluate(vlm, data, [defense], budget=budget, store=store, **options)


def test_the_chosen_draws_are_stored_and_used(tmp_path: Path) -> None:
    small = replace(BUDGETS["short"], eot=5, steps=2, queries=10, probe=1)
    (row,) = run(Blurred(), small, tmp_path / "s")["rows"]
    through = next(m for m in row["members"] if m["name"] == "through-ce")
    square = next(m for m in row["members"] if m["name"] == "square")
    assert through["draws"] == 5
    assert 0 < through["cosine"] < 1
    assert "queries=2" in square["attack"]
    again = run(Blurred(), small, tmp_path / "s")
    assert again["rows"][0]["digest"] == row["digest"]
    (other,) = run(Blurred(sigma=0.001), small, tmp_path / "s")["rows"]
    assert next(m for m in other["members"] if m["name"] == "through-ce")["draws"] == 1


def test_relatives_are_attacked_and_shown_to_the_defense() -> None:
    vlm, _ = toy_block(8)
    (row,) = run("none", "smoke", relatives=[vlm], attacks="PGD(eps=2/255, steps=5)")["rows"]
    relative = next(m for m in row["members"] if m["name"] == "relatives")
    assert "Transfer(" in relative["attack"]
    assert relative["ran"] > 0
    assert "relatives" not in [m["name"] for m in run("none", "smoke")["rows"][0]["members"]]


def test_other_prompts_give_another_classifier_of_the_same_classes() -> None:
    vlm, data = toy_block(8)
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    view = attack_view(build_defense("none"), clf, None, Member("prompts", "prompts"))
    assert view.k == clf.k
    assert not torch.equal(view.weights, clf.weights)
    assert attack_view(build_defense("none"), clf, None, Member("origin", "origin")) is clf
    with pytest.raises(ValueError, match="member 'odd' has no view of its own: 'sideways'"):
        attack_view(build_defense("none"), clf, None, Member("odd", "sideways"))
