"""Broken defenses must be seen through: the flags catch them and the adaptive composition breaks them."""

from __future__ import annotations

from typing import Any

import pytest
from planted import DetachedGradient, EightBit, RandomNoise, SignUnroll
from toyset import toy_block

import ironclip
from ironclip.defenses.none import NoDefense

ATTACKS = "PGD(eps=12/255, steps=10)"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    vlm, data = toy_block(24)
    shields = [NoDefense(), DetachedGradient(), EightBit(levels=32), RandomNoise(sigma=0.05), SignUnroll()]
    return ironclip.evaluate(vlm, data, shields, ATTACKS, "static,adaptive", budget="standard", costs=False)


def worst(results: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [w for w in results["worst"] if w["defense"] == name]
    return row


def member(row: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [m for m in row["members"] if m["name"] == name]
    return found


@pytest.mark.parametrize("name", ["detached_gradient", "eight_bit", "random_noise", "sign_unroll"])
def test_no_planted_defense_is_better_than_none(results: dict[str, Any], name: str) -> None:
    undefended, planted = worst(results, "none"), worst(results, name)
    assert undefended["clean"] > 90
    assert undefended["robust"] < 25
    assert planted["clean"] > 60
    assert planted["robust"] <= undefended["robust"] + 9


def test_a_detached_gradient_is_broken_by_bpda(results: dict[str, Any]) -> None:
    row = worst(results, "detached_gradient")
    assert member(row, "through-ce")["broke"] == 0
    assert member(row, "bpda")["broke"] > 12


def test_rounding_is_broken_by_its_surrogate_or_bpda(results: dict[str, Any]) -> None:
    row = worst(results, "eight_bit")
    assert member(row, "through-ce")["broke"] <= 6  # what two random starts can do without a gradient
    assert sum(m["broke"] for m in row["members"] if "bpda" in m["view"] or "identity" in m["view"]) > 10


def test_a_sign_unroll_is_broken_by_bpda(results: dict[str, Any]) -> None:
    assert member(worst(results, "sign_unroll"), "bpda-ce")["broke"] > 10


def test_noise_is_broken_by_averaged_gradients(results: dict[str, Any]) -> None:
    row = worst(results, "random_noise")
    assert sum(m["broke"] for m in row["members"] if m["white"]) > 10
    (adaptive,) = [r for r in results["rows"] if r["defense"] == "random_noise" and r["threat"] == "adaptive"]
    assert "stochastic" in adaptive["flags"]


def test_the_zero_gradient_flag_makes_a_row_unreliable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation import recipes

    through = tuple(m for m in recipes.RECIPES["none"] if m.view == "through" and m.white)
    monkeypatch.setitem(recipes.RECIPES, "transform", through)
    vlm, data = toy_block(12)
    results = ironclip.evaluate(vlm, data, [DetachedGradient()], ATTACKS, "adaptive", budget="smoke", costs=False)
    (row,) = results["rows"]
    assert "zero-grad" in row["flags"]
    assert row["unreliable"]
    assert row["robust"] > 90


def test_transfer_that_beats_the_white_box_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation import recipes

    kept = tuple(m for m in recipes.RECIPES["averaging"] if m.name in ("through-ce", "transfer"))
    monkeypatch.setitem(recipes.RECIPES, "transform", kept)
    vlm, data = toy_block(12)
    results = ironclip.evaluate(vlm, data, [DetachedGradient()], ATTACKS, "adaptive", budget="smoke", costs=False)
    assert "bb-beats-wb" in results["rows"][0]["flags"]
    assert results["worst"][0]["unreliable"]
