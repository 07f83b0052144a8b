"""The speller: what it mends, what it leaves alone, and what an attacker who knows it still does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ironclip
from ironclip.attacks.characters import Charmer
from ironclip.core.vlm import VLM
from ironclip.defenses.speller import Speller, correct, dictionary, near
from ironclip.evaluation.class_prompts import attack_prompts
from ironclip.evaluation.run import open_data
from ironclip.registry import build_text_defense

WORDS = ("a", "of", "red", "rod", "circle", "photo", "on")
ORDER = {w: i for i, w in enumerate(WORDS)}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red circle.", "a red circle."),
        ("a photo of a red circne.", "a photo of a red circle."),
        ("a rde circle", "a red circle"),  # neighbours exchanged
        ("a redd (circl)", "a red (circle)"),
        ("a c rcle", "a circle"),  # a blank in place of a letter
        ("a cir cle", "a circle"),  # a blank inside
        ("a rod circle", "a rod circle"),  # a word of its own: nothing to see
        ("a xyzzy", "a xyzzy"),
        ("", ""),
        ("a  red", "a  red"),
        ("1934 b7", "1934 b7"),
        ("日本 \U0001f642", "日本 \U0001f642"),
    ],
)
def test_mended_by_hand(text: str, want: str) -> None:
    assert correct(text, ORDER) == want


def test_of_several_near_words_the_first_is_taken() -> None:
    assert correct("rxd", ORDER) == "red"
    assert correct("rxd", {"rod": 0, "red": 1}) == "rod"


def test_near_is_every_single_edit() -> None:
    assert {"b", "a", "ba", "xb", "ax", "xab", "axb", "abx"} <= set(near("ab"))
    assert len(near("ab")) == len(set(near("ab")))


def test_words_come_from_a_file_or_minilm(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("Red\nred\nq\n\nblue7\ncircle\n")
    assert dictionary(str(path)) == ("red", "circle")
    assert {"the", "circle", "photo"} <= set(dictionary("minilm"))
    with pytest.raises(FileNotFoundError, match="expected minilm or a text file with one word a line"):
        dictionary(str(tmp_path / "none.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("1\n")
    with pytest.raises(ValueError, match="has no words"):
        dictionary(str(empty))


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return ironclip.load("tiny")


def test_the_wrapped_model_encodes_corrected_texts_and_nothing_else_changes(tiny: VLM) -> None:
    made = Speller().wrap(tiny)
    assert made.name == "tiny-v1+speller"
    texts = ["a photo of a red circne.", "a blue star"]
    assert torch.equal(made.encode_text(texts), tiny.encode_text(["a photo of a red circle.", "a blue star"]))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.encode_image(x), tiny.encode_image(x))
    assert made.weights_hash == tiny.weights_hash
    assert tiny.encode_text(texts[:1]).ne(made.encode_text(texts[:1])).any()


def test_a_users_own_towers_can_be_wrapped() -> None:
    vlm = VLM.wrap(
        lambda x: x.flatten(1)[:, :4], lambda t: torch.tensor([[float(len(s)), 1.0, 1.0, 1.0] for s in t]), 4
    )
    made = Speller().wrap(vlm, known=["zzyzx"])
    assert torch.equal(made.encode_text(["zzyzxx"]), vlm.encode_text(["zzyzx"]))


def test_it_helps_against_who_does_not_know_it_and_less_against_who_does(tiny: VLM) -> None:
    data = open_data("shapes", tiny, limit=40)
    spelled = Speller().wrap(tiny, data.class_names)
    bare, static, adaptive = (
        {line.attacker: line.accuracy for line in attack_prompts(vlm, data, Charmer(), through=through).lines}
        for vlm, through in ((tiny, [tiny]), (spelled, [tiny]), (spelled, [spelled, tiny]))
    )
    assert static["nobody"] == bare["nobody"] == adaptive["nobody"]
    assert static["own"] > bare["own"]
    assert adaptive["own"] <= static["own"]


def test_it_has_a_spec() -> None:
    assert build_text_defense("Speller(words=minilm)") == build_text_defense("speller") == Speller()
    with pytest.raises(ValueError, match="unknown text defense 'spelling'"):
        build_text_defense("spelling")
