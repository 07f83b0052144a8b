"""Learned context: words that reproduce words, positions as permutations, fast paths equal to the full tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from clips import byte_tokenizer, small_clip, small_siglip, to_open_clip
from reference import apt_literal
from torch import Tensor
from toys import generator, toy_vlm

import ironclip
from ironclip.core.context import Context
from ironclip.core.vlm import VLM
from ironclip.models.hf import wrap_clip, wrap_siglip

NAMES = ("cat", "ox", "bee-fly", "a", "emu")
PHRASE = "a b"


def hf() -> VLM:
    return wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()


def library() -> VLM:
    open_clip = pytest.importorskip("open_clip")
    from clips import open_clip_config

    from ironclip.models.open_clip import wrap_open_clip

    model = open_clip.model.CLIP(**open_clip_config("quick_gelu"))
    model.load_state_dict(to_open_clip(small_clip()), strict=False)

    def tokenize(texts: Sequence[str], context_length: int = 24) -> Tensor:
        rows = byte_tokenizer()(list(texts), padding="max_length", truncation=True, max_length=context_length)
        return torch.tensor(rows["input_ids"]) * torch.tensor(rows["attention_mask"])

    return wrap_open_clip(model, tokenize, "library").freeze()


def tiny() -> VLM:
    return ironclip.load("tiny")


def lite() -> VLM:
    try:
        return ironclip.load("lite")
    except ImportError as missing:
        pytest.skip(f"lite is not installed: {missing}")


MODELS = {"hf": hf, "open_clip": library, "tiny": tiny, "lite": lite}


@pytest.fixture(scope="module", params=MODELS)
def vlm(request: pytest.FixtureRequest) -> VLM:
    return MODELS[request.param]()


def size_of(vlm: VLM) -> int:
    """Tokens of the phrase."""
    row = vlm.tokenize([PHRASE])
    return int(vlm.eot(row)[0]) - 1


@pytest.mark.parametrize("specific", [False, True])
def test_words_reproduce_the_plain_prompt(vlm: VLM, specific: bool) -> None:
    made = Context.of(vlm, NAMES, size_of(vlm), specific=specific)
    with torch.no_grad():
        got = made.features(made.initial(phrase=PHRASE))
        want = vlm.encode_text([f"{PHRASE} {n}." for n in NAMES])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["front", "middle"])
def test_other_positions_are_permutations_of_the_tokens(vlm: VLM, position: str) -> None:
    """One token moves at a time in the ids of "a b NAME."; the tower then reads them as they stand."""
    m = size_of(vlm)
    made = Context.of(vlm, NAMES, m, position)
    ids = vlm.tokenize([f"{PHRASE} {n}." for n in NAMES])
    bare = vlm.tokenize([f"{PHRASE} {n}" for n in NAMES])
    before = m // 2 if position == "middle" else 0
    for i in range(len(NAMES)):
        own = int(vlm.eot(bare)[i]) - 1 - m
        context, name = ids[i, 1 : 1 + m].tolist(), ids[i, 1 + m : 1 + m + own].tolist()
        ids[i, 1 : 1 + m + own] = torch.tensor([*context[:before], *name, *context[before:]])
    with torch.no_grad():
        got = made.features(made.initial(phrase=PHRASE))
        torch.testing.assert_close(got, vlm.encode_tokens(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("specific", [False, True])
def test_fast_paths_equal_the_full_context_in_float64(position: str, specific: bool) -> None:
    """Features and gradients of the vectors; only unified contexts before the name share their beginning."""
    vlm = tiny()
    made = Context.of(vlm, NAMES, 4, position, specific)
    assert (made.shared is not None) == (position == "end" and not specific)
    vectors = made.initial(seed=3, std=0.05).requires_grad_(True)
    weight = torch.randn(len(NAMES), vlm.dim, generator=generator(1))
    got = made.features(vectors)
    (grad,) = torch.autograd.grad((got * weight).sum(), vectors)
    words = [vlm.tokenize([f"x {n}", f"x {n}."]) for n in NAMES]
    pieces = [apt_literal.pieces(row[0].tolist(), row[1].tolist(), 646) for row in words]
    slow = vectors.detach().double().requires_grad_(True)
    want = apt_literal.class_features(vlm.text, pieces, slow, position, 32, 646)
    (slow_grad,) = torch.autograd.grad((want * weight.double()).sum(), slow)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad.double(), slow_grad, rtol=0, atol=1e-5 * float(slow_grad.abs().max().clamp(min=1)))


def test_sharing_saves_tokens_and_counts_texts() -> None:
    vlm = tiny()
    made = Context.of(vlm, NAMES, 16)
    assert made.shared is not None
    read = made.shared.packs.ids.numel()
    assert read < made.ids.numel() < len(NAMES) * 32
    with vlm.counting() as count, torch.no_grad():
        made.features(made.initial())
    assert count.texts == made.shared.packs.ends.numel()
    alone = replace(made, shared=None)
    with torch.no_grad():
        torch.testing.assert_close(made.features(made.initial()), alone.features(made.initial()), rtol=0, atol=1e-5)


def test_start_values() -> None:
    vlm = tiny()
    unified, own = Context.of(vlm, NAMES, 4), Context.of(vlm, NAMES, 4, specific=True)
    assert unified.initial().shape == unified.shape == (4, 128)
    assert own.initial().shape == own.shape == (5, 4, 128)
    assert torch.equal(unified.initial(1), unified.initial(1))
    assert not torch.equal(unified.initial(1), unified.initial(2))
    assert float(Context.of(vlm, NAMES, 20).initial(std=0.02).std()) == pytest.approx(0.02, rel=0.05)
    some = Context.of(vlm, NAMES[1:3], 4, specific=True)
    assert torch.equal(some.initial(), own.initial()[1:3]), "a class starts the same whatever the others are"
    with torch.no_grad():
        words = vlm.embed_tokens(vlm.tokenize(["a photo of a"]))[0, 1:5]
    assert torch.equal(own.initial(phrase="a photo of a"), words.expand(5, -1, -1))


def test_the_full_context_fits_and_one_more_does_not() -> None:
    vlm = tiny()
    made = Context.of(vlm, ["red circle", "star"], 27)
    assert made.ids.shape[1] == 32
    with torch.no_grad():
        assert bool(torch.isfinite(made.features(made.initial())).all())
    told = "28 context tokens and the name 'red circle' make 33 tokens, tiny-v1 takes 32; write tokens=27"
    with pytest.raises(ValueError, match=told):
        Context.of(vlm, ["star", "red circle"], 28)
    with pytest.raises(
        ValueError, match=r"the name 'star star .* alone is longer than the 32 tokens that tiny-v1 takes"
    ):
        Context.of(vlm, ["red", "star " * 40], 1)


def test_bad_input() -> None:
    vlm = tiny()
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0; write tokens=16"):
        Context.of(vlm, NAMES, 0)
    with pytest.raises(ValueError, match="no class names; pass at least two"):
        Context.of(vlm, ())
    with pytest.raises(ValueError, match="classes with equal names have one prompt: cat; merge them"):
        Context.of(vlm, ("cat", "dog", "cat"))
    with pytest.raises(ValueError, match="unknown position 'back'"):
        Context.of(vlm, NAMES, 4, "back")
    with pytest.raises(ValueError, match="toy-conv has no token embedding"):
        Context.of(toy_vlm(), NAMES)
    with pytest.raises(
        ValueError, match="siglip does not say where a text ends, so a context cannot be put in; use ti"
    ):
        Context.of(wrap_siglip(small_siglip(), byte_tokenizer(), "siglip"), NAMES)
    made = Context.of(vlm, NAMES, 4)
    with pytest.raises(
        ValueError, match=r"context vectors must be \(4, 128\) for tiny-v1 and 5 classes, got \(4, 64\)"
    ):
        made.features(torch.zeros(4, 64))
    with pytest.raises(ValueError, match="init='a photo' has 2 tokens on tiny-v1, got 4; write tokens=2"):
        made.initial(phrase="a photo")
