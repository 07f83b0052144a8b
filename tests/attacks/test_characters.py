"""Character edits: against every string in reach on a toy alphabet, and on the text tower that ships."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import ironclip
from ironclip.attacks.characters import Charmer, levenshtein, put
from ironclip.attacks.text import TextAttack, feature_divergence
from ironclip.core import spec

LONG = "a red circle on a blue ground " * 340


def toy(texts: Sequence[str]) -> Tensor:
    """A feature of its own for every string, with no structure to lean on."""
    rows = []
    for t in texts:
        g = torch.Generator().manual_seed(zlib.crc32(t.encode()))
        rows.append(torch.randn(6, generator=g, dtype=torch.float64))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def slow(a: str, b: str) -> int:
    """The recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize(
    ("a", "b"), [("", ""), ("", "ab"), ("abc", "abc"), ("kitten", "sitin"), ("aab", "ab"), ("ab", "ba")]
)
def test_levenshtein_by_definition(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == slow(a, b)


def test_slots_insert_replace_and_delete() -> None:
    assert [put("ab", s, "x") for s in range(5)] == ["xab", "xb", "axb", "ax", "abx"]
    assert [put("ab", s, "") for s in (1, 3)] == ["b", "a"]


@pytest.mark.parametrize("text", ["", "a", "ab", "aba", "bbb"])
def test_with_all_places_it_finds_the_best_string_in_reach(text: str) -> None:
    every = ["".join(p) for n in range(len(text) + 2) for p in itertools.product("ab", repeat=n)]
    near = [t for t in every if slow(text, t) == 1]
    want = float(feature_divergence(toy([text])[0], toy(near)).max())
    got = Charmer(places=99, alphabet="ab")(toy, [text])
    assert got.loss.tolist() == pytest.approx([want])
    assert got.texts[0] in near
    assert got.changed.tolist() == [1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_budget_holds_and_more_of_it_is_not_weaker(k: int) -> None:
    texts = ["red circle", "naïve café", "日本の猫", "🙂🙃", "x"]
    got = Charmer(k=k, places=3)(toy, texts)
    assert got.changed.tolist() == [
        slow(a, b) if len(a) < 5 else levenshtein(a, b) for a, b in zip(texts, got.texts, strict=True)
    ]
    assert all(1 <= c <= k for c in got.changed.tolist())
    assert (got.loss >= Charmer(k=k - 1, places=3)(toy, texts).loss).all()


def test_no_budget_is_the_identity() -> None:
    got = Charmer(k=0)(toy, ["a cat", ""])
    assert got.texts == ["a cat", ""]
    assert got.changed.tolist() == [0, 0]


def test_answers_depend_on_the_text_alone() -> None:
    texts = ["a cat", "a dog", "a cat", "two birds"]
    whole = Charmer(k=2)(toy, texts)
    assert whole.texts == [Charmer(k=2)(toy, [t]).texts[0] for t in texts]
    assert whole.texts[0] == whole.texts[2]
    assert Charmer()(toy, []).texts == []


def test_forbidden_texts_never_come_out() -> None:
    first = Charmer()(toy, ["cat"]).texts[0]
    assert Charmer()(toy, ["cat"], forbidden=[first]).texts[0] not in (first, "cat")


def test_the_semantic_constraint_holds() -> None:
    text = "a cat"
    got = Charmer(k=2, places=99, min_cosine=0.5)(toy, [text])
    assert got.changed.item() >= 1
    assert float(toy([text])[0] @ toy(got.texts)[0]) >= 0.5
    assert Charmer(min_cosine=1.0)(toy, [text]).texts == [text]


def test_a_long_text_costs_no_more_than_its_reach() -> None:
    seen: list[int] = []

    def counted(texts: Sequence[str]) -> Tensor:
        seen.append(len(texts))
        return toy(texts)

    got = Charmer(reach=50, places=2)(counted, [LONG])
    assert len(LONG) > 10_000
    assert seen[1] == 101
    assert sum(seen) <= 1 + 101 + 2 * 28
    assert got.changed.tolist() == [1]
    assert got.texts[0][60:].endswith(LONG[70:])


def test_on_the_tower_that_ships_it_beats_a_random_edit() -> None:
    encode = ironclip.load("tiny").encode_text
    texts = ["a red circle", "a blue star on a green ground"]
    got = Charmer()(encode, texts)
    assert got.changed.tolist() == [1, 1]
    for t, loss in zip(texts, got.loss.tolist(), strict=True):
        g = torch.Generator().manual_seed(0)
        random = [put(t, int(torch.randint(2 * len(t) + 1, (1,), generator=g)), "q") for _ in range(20)]
        assert loss > float(feature_divergence(encode([t])[0], encode(random)).mean())


def test_it_is_a_text_attack_with_a_spec() -> None:
    assert isinstance(Charmer(), TextAttack)
    assert spec.parse("Charmer(k=2)", {"Charmer": Charmer}, "text attack") == Charmer(k=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k must be 0 or more"),
        ({"places": 0}, "places and reach"),
        ({"min_cosine": 2.0}, "min_cosine must be"),
    ],
)
def test_bad_fields(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Charmer(**options)  # type: ignore[arg-type]


def test_one_string_is_no_list() -> None:
    with pytest.raises(ValueError, match=r"write \[text\]"):
        Charmer()(toy, "a cat")


def test_away_from_a_picture_it_finds_the_least_similar_string() -> None:
    away = toy(["one picture", "another"])
    got = Charmer(places=99, alphabet="ab")(toy, ["ab", "ab"], away=away)
    near = [t for n in range(4) for t in map("".join, itertools.product("ab", repeat=n)) if slow("ab", t) <= 1]
    for text, row, loss in zip(got.texts, away, got.loss.tolist(), strict=True):
        assert loss == pytest.approx(1 - float((toy(near) @ row).min()))
        assert float(toy([text])[0] @ row) == pytest.approx(1 - loss)
    with pytest.raises(ValueError, match=r"away must be \(1, d\) features, one a text, got \(2, 6\)"):
        Charmer()(toy, ["ab"], away=away)
