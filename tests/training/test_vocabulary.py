"""The vocabulary: CLIP's layout, merges by hand, any text in and out."""

from __future__ import annotations

from collections import Counter

import pytest

from ironclip.training.vocabulary import learn_merges, train_vocabulary

TEXTS = ["a red circle", "a red cross", "a black circle"]


def test_merges_by_hand() -> None:
    """aab twice, ab three times: (a, b</w>) occurs five times, then (a, ab</w>) twice."""
    assert learn_merges(Counter({"aab": 2, "ab": 3}), 9) == [("a", "b</w>"), ("a", "ab</w>")]
    assert learn_merges(Counter({"aaaa": 1}), 9) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]


def test_ties_are_settled_by_the_alphabet() -> None:
    assert learn_merges(Counter({"zy": 1, "ba": 1}), 2) == [("b", "a</w>"), ("z", "y</w>")]
    one, two = Counter({"red": 2, "ring": 2, "rust": 2}), Counter({"rust": 2, "red": 2, "ring": 2})
    assert learn_merges(one, 20) == learn_merges(two, 20)


def test_layout_is_that_of_clip() -> None:
    t = train_vocabulary(TEXTS, 50, 16)
    vocab = t.get_vocab()
    assert (t.bos_token_id, t.eos_token_id) == (len(t) - 2, len(t) - 1)
    assert sorted(vocab.values()) == list(range(len(t)))
    assert sum(w.endswith("</w>") for w, i in vocab.items() if i < 512) == 256
    assert t("a RED  circle")["input_ids"] == [
        t.bos_token_id,
        *(vocab[w] for w in ("a</w>", "red</w>", "circle</w>")),
        t.eos_token_id,
    ]


@pytest.mark.parametrize(
    "text", ["a zebra's 12 stripes!", "naïve café", "\U0001f600 ring \U0001f1e8\U0001f1ed", "中文"]
)
def test_any_text_is_written_without_loss(text: str) -> None:
    t = train_vocabulary(TEXTS, 50, 64)
    ids = t(text)["input_ids"]
    assert ids.count(t.eos_token_id) == 1
    assert t.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="merges must be 0 or more and context 3 or more, got -1 and 16"):
        train_vocabulary(TEXTS, -1, 16)
