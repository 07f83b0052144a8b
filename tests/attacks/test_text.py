"""The word swap: with a stub language model whose rows are known, and with the words that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import byte_tokenizer, randomised, small_clip
from toys import generator, words

from ironclip.attacks._masked_lm import MaskedLM, load_masked_lm
from ironclip.attacks._words import WordList, core, shipped_words
from ironclip.attacks.text import TextAttack, WordSwap, feature_divergence, swap
from ironclip.models.hf import wrap_clip

VOCABULARY = [
    "[CLS]",
    "[SEP]",
    "this",
    "is",
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "car",
    "##t",
    "hot",
    "wolf",
    "lynx",
    ".",
]


def pieces(word: str) -> list[int]:
    """Known words are one piece, `carton` is three, everything else is `hot` and `##t`."""
    w = word.lower()
    if w in VOCABULARY:
        return [VOCABULARY.index(w)]
    return [9, 10, 10] if w == "carton" else [11, 10]


class Stub:
    """Rows say which position was asked: at position p the best tokens are those of ``rows[p]``."""

    def __init__(self, rows: dict[int, dict[str, float]], v: int = len(VOCABULARY)) -> None:
        self.rows, self.v, self.asked = rows, v, list[list[list[int]]]()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids.tolist())
        out = torch.full((*ids.shape, self.v), -5.0)
        for p, best in self.rows.items():
            if p < ids.shape[1]:
                for token, value in best.items():
                    out[:, p, VOCABULARY.index(token)] = value
        return out


def model(rows: dict[int, dict[str, float]], **changes: Any) -> tuple[MaskedLM, Stub]:
    stub = Stub(rows)
    fields: dict[str, Any] = {"pieces": pieces, "logits": stub, "vocabulary": VOCABULARY, "begin": 0, **changes}
    return MaskedLM(**fields), stub


def far(*favourites: str) -> Any:
    """Features in which a text with the first favourite is farthest from the rest, then the second, and so on."""

    def encode(texts: Sequence[str]) -> torch.Tensor:
        angle = [max((1.5 / (i + 1) for i, f in enumerate(favourites) if f in t.split(" ")), default=0) for t in texts]
        at = torch.tensor(angle)
        return torch.stack([at.cos(), at.sin(), torch.zeros_like(at)], dim=1)

    return encode


def test_divergence_is_that_of_the_softmaxes() -> None:
    e, moved = torch.eye(4)[:2], torch.eye(4)[2:]
    p, q = e.softmax(1), moved.softmax(1)
    want = (p * (p / q).log()).sum(1).double()
    torch.testing.assert_close(feature_divergence(e, moved), want, rtol=1e-6, atol=1e-8)
    assert feature_divergence(e, e).tolist() == [0, 0]
    u = torch.nn.functional.normalize(torch.randn(200, 512, generator=generator(0)), dim=1)
    a, b = u[:100], torch.nn.functional.normalize(u[:100] + 0.5 * u[100:], dim=1)
    shift = b - a
    near = (shift.square().sum(1) - 512 * shift.mean(1) ** 2) / (2 * 512)
    torch.testing.assert_close(feature_divergence(a, b), near.double(), rtol=0.15, atol=0)


def test_the_row_that_is_read_is_that_of_the_word() -> None:
    """Position 0 is [CLS], so `cat` stands at 5 of `a photo of a cat`; published code reads row 4."""
    rows = {5: {"wolf": 2.0, "lynx": 1.0}, 4: {"dog": 3.0}, 2: {"car": 1.0}}
    sentence = ["a", "photo", "of", "a", "cat"]
    right, _ = model(rows)
    assert right(sentence) == [[], ["car"], [], ["dog"], ["wolf", "lynx"]]
    legacy, _ = model(rows, offset=True)
    assert legacy(sentence) == [[], [], ["car"], [], ["dog"]]
    dotted, stub = model(rows, end=1)
    assert dotted(["a", "photo", "of", "a", "cat."])[4] == ["wolf", "lynx"]
    assert stub.asked == [[[0, 4, 5, 6, 4, 7, 14, 1]]], "punctuation is a token of its own, the end is there"


def test_thresholds_and_counts() -> None:
    rows = {1: {"wolf": 2.0, "lynx": 0.31, "dog": 0.29, "car": 0.1}}
    for k, threshold, want in (
        (10, 0.3, ["wolf", "lynx"]),
        (10, 0.0, ["wolf", "lynx", "dog", "car"]),
        (1, 0.0, ["wolf"]),
    ):
        assert model(rows, k=k, threshold=threshold)[0](["cat"]) == [want]


def test_words_of_several_pieces() -> None:
    """All combinations of the four best of each piece, the likeliest first; the threshold does not count here."""
    lm, stub = model({1: {"hot": 4.0, "car": 3.0}, 2: {"##t": 4.0}})
    (found,) = lm(["foo"])
    assert len(found) == 16
    assert found[0] == "hott"
    assert "cart" in found
    assert len(stub.asked) == 2
    assert len(stub.asked[1]) == 16
    (found,) = model({})[0](["carton"])
    assert len(found) == 24
    lm(["foo"])
    assert len(stub.asked) == 2, "a sentence is asked once"


def test_words_too_far_behind_are_left_alone() -> None:
    lm, _ = model({p: {"wolf": 2.0} for p in range(1, 40)})
    found = lm(["cat"] * 40)
    assert [bool(row) for row in found] == [True] * 28 + [False] * 12
    assert model({})[0]([""]) == [[]]


def test_vocabularies_that_differ_are_refused() -> None:
    lm = MaskedLM(pieces, Stub({}, v=len(VOCABULARY) + 3), VOCABULARY, 0)
    with pytest.raises(
        ValueError, match="the language model scores 18 tokens but its tokenizer has 15; they belong to"
    ):
        lm(["cat"])


def test_the_word_that_moves_the_features_most_is_taken() -> None:
    rows = {5: {"dog": 3.0, "lynx": 2.0, "wolf": 1.0}}
    result = swap(far("lynx", "wolf", "dog"), ["a photo of a cat"], model(rows)[0])
    assert result.texts == ["a photo of a lynx"]
    assert result.changed.tolist() == [1]
    clean, moved = far("lynx")(["x"])[0], far("lynx")(["a lynx"])[0]
    torch.testing.assert_close(result.loss[0], feature_divergence(clean, moved))


def test_importance_decides_which_word_goes_first() -> None:
    """Masking `photo` moves the features more than masking `cat`: `photo` is exchanged, though `cat` could go on."""

    def encode(texts: Sequence[str]) -> torch.Tensor:
        turn = [0.9 if "photo" not in t else (0.3 if "cat" not in t else 0.0) for t in texts]
        turn = [t + (0.5 if "wolf" in s else 0.0) for t, s in zip(turn, texts, strict=True)]
        at = torch.tensor(turn)
        return torch.stack([at.cos(), at.sin()], dim=1)

    lm, _ = model({2: {"car": 1.0}, 5: {"wolf": 1.0}})
    assert swap(encode, ["a photo of a cat"], lm).texts == ["a car of a cat"]
    assert swap(encode, ["a photo of a cat"], lm, words=2).texts == ["a car of a wolf"]
    assert swap(encode, ["a photo of a cat"], lm, words=2).changed.tolist() == [2]


def test_never_chosen() -> None:
    """Function words, pieces, special tokens, punctuation, the word itself and forbidden texts."""
    rows = {1: {"cat": 9.0, "##t": 8.0, "[SEP]": 7.0, "this": 6.0, ".": 5.0, "wolf": 4.0, "dog": 3.0}}
    result = swap(far("cat", "##t", "[SEP]", "this", ".", "wolf", "dog"), ["Cat"], model(rows)[0], forbidden=["wolf"])
    assert result.texts == ["dog"]
    blocked = swap(far("wolf"), ["cat"], model({1: {"wolf": 4.0}})[0], forbidden=["wolf"])
    assert blocked.texts == ["cat"]


def test_what_cannot_be_attacked_stays() -> None:
    rows = {p: {"wolf": 2.0} for p in range(1, 9)}
    texts = ["", "this is a", "...", "of  a"]
    result = swap(far("wolf"), texts, model(rows)[0])
    assert result.texts == texts
    assert result.changed.tolist() == [0, 0, 0, 0]
    still = swap(far("lynx"), ["cat"], model(rows)[0])
    assert still.texts == ["cat"], "no candidate moves the features"
    assert still.loss.tolist() == [0]
    assert swap(far("wolf"), [], model(rows)[0]).texts == []
    with pytest.raises(ValueError, match=r"texts must be a list of strings; write \[text\]"):
        swap(far("wolf"), "cat", model(rows)[0])


def test_capitals_and_function_words() -> None:
    """Published code compares with the list as it is written, so that "This" may be exchanged."""
    rows = {1: {"wolf": 2.0}}
    assert swap(far("wolf"), ["This is a"], model(rows)[0]).texts == ["This is a"]
    assert swap(far("wolf"), ["This is a"], model(rows)[0], cased=True).texts == ["wolf is a"]


def test_equal_texts_are_attacked_once_and_alike() -> None:
    attack = WordSwap()
    encode, asked = words(16), list[str]()

    def counted(texts: Sequence[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.nn.functional.normalize(encode(texts), dim=1)

    texts = ["a photo of a cat.", "a photo of a tree.", "a photo of a cat.", "a"]
    together = attack(counted, texts)
    spent = len(asked)
    alone = [attack(counted, [t]).texts[0] for t in texts]
    assert together.texts == alone
    assert attack(counted, texts).texts == together.texts
    assert together.texts[0] == together.texts[2]
    assert spent == 2 * (1 + 2 + 10), "the text, a mask for each open word, ten candidates"
    for text, made in zip(texts, together.texts, strict=True):
        differ = [a != b for a, b in zip(text.split(" "), made.split(" "), strict=True)]
        assert sum(differ) == (0 if text == "a" else 1)
        assert made.endswith(".") == text.endswith(".")
    assert isinstance(attack, TextAttack)


def test_one_open_word_needs_no_masking() -> None:
    asked = list[str]()

    def encode(texts: Sequence[str]) -> torch.Tensor:
        asked.extend(texts)
        return far("wolf")(texts)

    swap(encode, ["a cat"], model({2: {"wolf": 1.0, "dog": 0.9}})[0])
    assert asked == ["a cat", "a wolf", "a dog"]


def test_shipped_words() -> None:
    shipped = shipped_words()
    assert len(shipped.groups) > 250
    assert all(w in group for w, group in shipped.groups.items())
    assert all(w == w.lower() and w.isascii() for w in (*shipped.groups, *shipped.anywhere, *shipped.stops))
    assert {"a", "of", "the", "this", "is"} <= shipped.stops
    assert not shipped.stops & set(shipped.groups), "a function word is never exchanged"
    photo, zzz = WordList(10)(["photo.", "zzz"])
    assert photo[:2] == ["picture", "image"]
    assert "photo" not in photo
    assert len(photo) == 10
    assert zzz == list(shipped.anywhere[:10])
    assert core('"cat".') == ("cat", '"', '".')
    assert core("close-up") == ("close-up", "", "")
    assert core("...") == ("", "", "...")


def test_features_of_a_causal_tower_do_not_depend_on_the_padding() -> None:
    """Sentences of an attack are encoded in one batch, cut at the longest: the same to 1e-5 as at full length."""
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    texts = ["a cat", "a longer sentence", "x"]
    assert vlm.tokenize is not None
    full = vlm.tokenize(texts)
    full = torch.cat([full, full[:, -1:].expand(-1, 24 - full.shape[1])], dim=1)
    with torch.no_grad():
        long = torch.nn.functional.normalize(vlm.text(full), dim=1)
    torch.testing.assert_close(vlm.encode_text(texts), long, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": 0}, "words and k must be 1 or more, got 0 and 10"),
        ({"source": "bert"}, "unknown source 'bert' of words; write list or hf:bert-base-uncased"),
        ({"legacy_offset": True}, "legacy_offset belongs to a masked language model; write source=hf:bert-base-unc"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordSwap(**fields)


def test_a_model_from_a_folder(tmp_path: Path) -> None:
    """A small BERT with random weights, as the library stores it."""
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "wolf", "photo", "of", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    randomised(transformers.BertForMaskedLM(config), 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    attack = WordSwap(source=f"hf:{tmp_path}", threshold=-9.0)
    lm = load_masked_lm(str(tmp_path), 10, -9.0, False)
    assert lm is load_masked_lm(str(tmp_path), 10, -9.0, False)
    assert (lm.begin, lm.end) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    found = lm(["a", "cats"])
    assert set(found[0]) <= set(vocabulary)
    assert 0 < len(found[1]) <= 16
    encode = words(16)
    made = attack(lambda texts: torch.nn.functional.normalize(encode(texts), dim=1), ["a photo of a cat"])
    assert made.changed.tolist() == [1]
    with pytest.raises(
        FileNotFoundError, match="could not be loaded, neither as a folder nor from the hub or its cach"
    ):
        WordSwap(source=f"hf:{tmp_path / 'none'}").candidates()


def test_away_from_pictures_a_swap_never_brings_a_text_nearer() -> None:
    encode = wrap_clip(small_clip(), byte_tokenizer(), "small").encode_text
    texts = ["a photo of a cat", "a photo of a cat", "..."]
    away = torch.nn.functional.normalize(torch.randn(3, encode(["x"]).shape[1], generator=generator(0)), dim=-1)
    before = 1 - (encode(texts) * away).sum(dim=1)
    got = WordSwap(words=2)(encode, texts, away=away)
    after = 1 - (encode(got.texts) * away).sum(dim=1)
    torch.testing.assert_close(after.double(), got.loss, atol=1e-5, rtol=0)
    assert (after >= before - 1e-6).all()
    assert got.texts[2] == "..."
    assert got.changed[2] == 0
