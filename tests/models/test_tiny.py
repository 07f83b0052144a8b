"""`tiny-v1`: the shipped files are the recorded ones, and the model is good, fragile and CLIP to the letter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ironclip
from ironclip import VLM, SampleRNG
from ironclip.core.types import prediction
from ironclip.core.zeroshot import ZeroShot
from ironclip.models.tiny import VERSIONS, folder_of, load_tiny
from ironclip.models.weights import sha256_of
from ironclip.registry import build_attack

TEXTS = ["a red circle", "a photo of a blue star at the top left of a striped picture.", "A Zebra, \U0001f993!"]


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return ironclip.load("tiny")


@pytest.fixture(scope="module")
def clf(tiny: VLM) -> ZeroShot:
    data = ironclip.load_data("shapes", 64)
    return ZeroShot.build(tiny, data.class_names, data.templates)


def accuracy(clf: ZeroShot, spec: str, n: int) -> float:
    data, right = ironclip.load_data(spec, 64).subset(n), 0
    with torch.no_grad():
        for x, y, _ in data.batches(50):
            right += int((prediction(clf(x)) == y).sum())
    return right / n


def test_clean_accuracy(clf: ZeroShot) -> None:
    """On all 48 classes, among them the four combinations that training never showed."""
    assert accuracy(clf, "shapes", 200) >= 0.9


def test_combinations_never_seen_are_recognised(clf: ZeroShot) -> None:
    """Chance is 1 in 48."""
    assert accuracy(clf, "shapes:heldout", 96) >= 0.5


def test_an_attack_of_one_level_hurts(clf: ZeroShot) -> None:
    data = ironclip.load_data("shapes", 64).subset(48)
    x, y, ids = next(iter(data.batches(48)))
    result = build_attack("table2-pgd10")(clf, x, y, rng=SampleRNG.of(0, ids))
    assert float((x - result.x_adv).abs().max()) <= 1 / 255 + 1e-6
    assert float(result.success.float().mean()) >= 0.4


def test_files_are_the_recorded_ones_and_small() -> None:
    place = folder_of("v1")
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in VERSIONS["v1"].items():
        assert sha256_of(place / name) == digest == manifest["sha256"][name]
    assert sum(p.stat().st_size for p in place.iterdir()) <= 8 * 2**20
    assert manifest["command"].startswith("ironclip pretrain --data shapes:train")
    assert manifest["data"]["manifest_hash"] == ironclip.load_data("shapes:train", 64).manifest_hash


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_other_files_are_refused(file: str, tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    shutil.copytree(folder_of("v1"), place)
    content = bytearray((place / file).read_bytes())
    content[-2] ^= 1
    (place / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: expected SHA-256 {VERSIONS['v1'][file]}, got [0-9a-f]{{64}}"):
        load_tiny("v1", folder=place)


def test_versions() -> None:
    assert ironclip.load("tiny-v1").name == ironclip.load("tiny:v1").name == ironclip.load("tiny").name == "tiny-v1"
    with pytest.raises(ValueError, match="unknown version of tiny 'v0'; valid: tiny, tiny:v1"):
        ironclip.load("tiny:v0")


def test_the_same_folder_opens_as_hf(tiny: VLM) -> None:
    """Same weights, same ids, same features."""
    other = ironclip.load(f"hf:{folder_of('v1')}")
    assert other.weights_hash == tiny.weights_hash
    assert (other.image_size, other.dim, other.scale) == (tiny.image_size, tiny.dim, tiny.scale)
    assert torch.equal(other.get_buffer("mean"), tiny.get_buffer("mean"))
    assert torch.equal(other.tokenize(TEXTS), tiny.tokenize(TEXTS))  # type: ignore[misc]
    x = next(iter(ironclip.load_data("shapes", 64).subset(4).batches(4)))[0]
    with torch.no_grad():
        assert torch.equal(other.encode_image(x), tiny.encode_image(x))
        assert torch.equal(other.encode_text(TEXTS), tiny.encode_text(TEXTS))
    assert other.parts == tiny.parts


def test_tokenizer_round_trip() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of("v1"), local_files_only=True)
    for text in [*TEXTS, "naïve café 12 o'clock", "深い学習", "\U0001f468‍\U0001f469‍\U0001f467"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
        assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    words = tokenizer("a photo of a white triangle at the bottom right.")["input_ids"]
    assert len(words) == 13  # ten words, a full stop, two marks: every word of the captions is one token


def test_truncation_at_the_end_of_text_is_exact(tiny: VLM) -> None:
    """What the tower is given stops at the longest end mark; the features are those of the full context."""
    assert tiny.causal
    assert tiny.tokenize is not None
    ids = tiny.tokenize(TEXTS)
    full = torch.nn.functional.pad(ids, (0, 32 - ids.shape[1]), value=int(ids.max()))
    lengths = []
    handle = tiny.text.register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))  # type: ignore[attr-defined]
    with torch.no_grad():
        short = tiny.encode_tokens(full, normalize=False)
        handle.remove()
        whole = tiny.text(full)
    assert lengths == [ids.shape[1]]
    assert ids.shape[1] < 32
    assert torch.allclose(short, whole, atol=1e-5)


def test_too_long_texts_are_cut_with_a_warning(tiny: VLM) -> None:
    with pytest.warns(UserWarning, match="1 texts are longer than 32 tokens"):
        ids = tiny.tokenize(["a red circle " * 20])  # type: ignore[misc]
    assert ids.shape == (1, 32)
    assert int(ids[0, -1]) == int(ids.max())


def test_what_methods_look_for_is_there(tiny: VLM) -> None:
    assert tiny.parts.patch_grid == (8, 8)
    assert len(tiny.vision_blocks) == 6
    assert tiny.embed_tokens(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 128)
    assert tiny.patch_tokens(torch.zeros(2, 3, 64, 64)).shape == (2, 64, tiny.dim)
    assert tiny.facts["activation"] == "quick_gelu"
    assert tiny.scale <= 100
    assert not any(p.requires_grad for p in tiny.parameters())
