"""Specs read back as the object that wrote them; mistakes are answered with what to type."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ironclip.attacks.pgd import PGD
from ironclip.core.check import as_fraction, check_eps
from ironclip.core.spec import digest, full_text, method, parse, split, split_list, to_text
from ironclip.registry import ATTACK_PRESETS, attack_table, build, build_attack


@method
class Sample:
    """A method with a field of every kind."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"strong": {"steps": 100, "word": "last"}}

    eps: Fraction = Fraction(1, 255)
    steps: int = 10
    rate: float = 0.5
    word: str = "best"
    flag: bool = False
    maybe: int | None = None
    items: tuple = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", as_fraction(self.eps))


TABLE = {"Sample": Sample}
FRACTIONS = st.fractions(min_value=0, max_value=1, max_denominator=10_000)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=12)
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, WORDS, FRACTIONS)


@settings(max_examples=200, deadline=None)
@given(FRACTIONS, st.integers(), FLOATS, WORDS, st.booleans(), st.none() | st.integers(), st.lists(ATOMS, max_size=3))
def test_repr_reads_back_as_the_same_object(
    eps: Fraction, steps: int, rate: float, word: str, flag: bool, maybe: int | None, items: list
) -> None:
    made = Sample(eps, steps, rate, word, flag, maybe, tuple(items))
    assert parse(repr(made), TABLE) == made
    assert parse(full_text(made), TABLE) == made
    assert repr(parse(repr(made), TABLE)) == repr(made)


def test_repr_shows_only_what_differs_and_full_text_everything() -> None:
    assert repr(Sample()) == "Sample()"
    assert repr(Sample(steps=20, rate=1)) == "Sample(steps=20, rate=1.0)"
    assert full_text(Sample()) == ("Sample(eps=1/255, steps=10, rate=0.5, word=best, flag=False, maybe=None, items=())")
    assert to_text(PGD(eps="4/255", steps=5)) == "PGD(eps=4/255, steps=5)"


def test_words_that_python_reserves_are_quoted() -> None:
    for word in ("lambda", "None", "True", "a b", "1x", "ﬁ"):
        assert parse(repr(Sample(word=word)), TABLE).word == word


def test_presets_give_fields_and_given_fields_win() -> None:
    assert Sample(preset="strong") == Sample(steps=100, word="last")
    assert Sample(preset="strong", steps=3) == Sample(steps=3, word="last")
    assert Sample(1, 3, preset="strong") == Sample(eps=1, steps=3, word="last")
    assert Sample(preset="default") == Sample()
    assert repr(Sample(preset="strong")) == "Sample(steps=100, word=last)"


@pytest.mark.parametrize("name", sorted(ATTACK_PRESETS))
def test_every_attack_preset_builds_and_reads_back(name: str) -> None:
    made = build_attack(name)
    assert build_attack(repr(made)) == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PGDs", "unknown attack or defense 'PGDs'; did you mean 'PGD'?"),
        ("PGD(step=3)", "unknown field of PGD 'step'; did you mean 'steps'?"),
        ("PGD(steps=3", "cannot read 'PGD(steps=3'"),
        ("PGD(steps=3))", "write a spec such as PGD(eps=4/255, steps=10)"),
        ("PGD(**x)", "** is not allowed"),
        ("PGD(eps=2*3)", "cannot read '2 * 3' in 'PGD(eps=2*3)': write numbers, fractions such as 4/255, or words"),
        ("PGD(eps=1/0)", "cannot read '1 / 0'"),
        ("PGD(eps=-word)", "cannot read '-word'"),
        ("PGD(preset=strong)", "unknown preset of PGD 'strong'"),
        ("PGD(1/255, eps=2/255)", "PGD got eps twice; write eps=1/255 once"),
        ("PGD(1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17)", "PGD has"),
        ("PGD(steps=ten)", "steps must be an integer, got 'ten'; write steps=10"),
        ("PGD(steps=2.5)", "steps must be an integer, got 2.5"),
        ("PGD(momentum=much)", "momentum must be a number, got 'much'; write momentum=0.5"),
        ("PGD(trace=1)", "trace must be True or False, got 1"),
        ("PGD(norm=2)", "norm must be a word, got 2"),
        ("PGD(norm=l3)", "unknown norm 'l3'; did you mean 'l2'? valid: l1, l2, linf"),
        ("PGD(eps=4)", "eps must be in (0, 1], got 4; write 4/255"),
        ("PGD(eps=-1/255)", "eps must not be negative"),
        ("PGD(eps=big)", "eps must be a finite number such as 4/255, got 'big'"),
        ("PGD(alpha=0)", "alpha must be positive, got 0; write 1/255"),
        ("PGD(steps=-1)", "steps must be at least 0, got -1"),
        ("PGD(quantise=round, norm=l2)", "quantise=round keeps only a linf budget, got norm=l2; use quantise=none"),
    ],
)
def test_mistakes_are_answered_with_what_to_type(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "value", ["8/255", " 8 / 255 ", 8 / 255, Fraction(8, 255), Fraction("0.25") * Fraction(32, 255)]
)
def test_eps_is_one_rational_whatever_it_was_typed_as(value: object) -> None:
    assert as_fraction(value) == Fraction(8, 255)  # type: ignore[arg-type]


@given(st.integers(0, 255))
def test_float_of_any_255th_comes_back_exactly(n: int) -> None:
    assert as_fraction(n / 255) == Fraction(n, 255)


def test_other_numbers_as_eps() -> None:
    assert as_fraction(0.031) == Fraction(31, 1000)
    assert as_fraction(1) == 1
    assert as_fraction("0.1") == Fraction(1, 10)
    assert float(as_fraction(0.123456789)) == 0.123456789
    assert check_eps(3, "l2") == 3
    for bad in (True, float("nan"), float("inf"), "4/0", "x", None):
        with pytest.raises(ValueError, match="eps must be a"):
            as_fraction(bad)  # type: ignore[arg-type]


def test_lists_and_calls_are_split_at_the_right_commas() -> None:
    assert split_list("a, B(c=1, d=(2, 3)) ,'x,y',, e") == ["a", "B(c=1, d=(2, 3))", "'x,y'", "e"]
    assert split("f(1, x=[2, 3])") == ("f", [1], {"x": (2, 3)})


def test_case_of_names_is_ignored_and_digests_are_stable() -> None:
    assert parse("pgd", attack_table()) == parse("PGD()", attack_table())
    assert digest({"b": 1, "a": [1, 2]}) == digest({"a": [1, 2], "b": 1})
    assert len(digest("x")) == 32
