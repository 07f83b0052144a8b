"""Prompts to class weights: what is refused, what is merged, what labels become."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from attack_toys import images, tensor
from torch import Tensor, nn

from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot

DIM = 6


def texts(prompts: list[str]) -> Tensor:
    """Each text its own fixed direction."""
    return torch.cat([tensor(1, DIM, seed=sum(map(ord, p))) for p in prompts])


@pytest.fixture
def vlm() -> VLM:
    w = tensor(3, DIM, seed=1)
    return VLM.wrap(lambda x: x.mean((2, 3)) @ w, texts, 8, scale=10.0)


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        ([], ("a {}",), "class_names is empty; pass at least two class names"),
        (["cat"], ("a {}",), "zero-shot classification needs at least two different classes, got only 'cat'"),
        (["cat", "cat"], ("a {}",), "needs at least two different classes, got only 'cat'"),
        (["cat", " "], ("a {}",), "class name 1 is empty"),
        (["cat", "dog"], (), "templates is empty"),
        (["cat", "dog"], ("a photo",), "a template needs exactly one {}, got 'a photo'; write 'a photo of a {}.'"),
        (["cat", "dog"], ("{} and {}",), "a template needs exactly one {}"),
        ("cat", ("a {}",), 'class_names and templates must be lists of strings; write ["cat", "dog"]'),
        (["cat", "dog"], "a {}", "class_names and templates must be lists of strings"),
    ],
)
def test_what_is_refused(vlm: VLM, names: list[str], templates: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        ZeroShot.build(vlm, names, templates)
    assert words in str(caught.value)


def test_weights_are_normalised_means_of_normalised_features(vlm: VLM) -> None:
    clf = ZeroShot.build(vlm, ["cat", "dog", "eel"], ("a {}", "one {}"))
    for row, name in enumerate(("cat", "dog", "eel")):
        f = F.normalize(texts([f"a {name}", f"one {name}"]), dim=1).mean(0)
        torch.testing.assert_close(clf.weights[row], F.normalize(f, dim=0))
    x = images(2)
    z = clf(x)
    torch.testing.assert_close(z, 10 * clf.features(x) @ clf.weights.T)
    assert bool((z.abs() <= 10 + 1e-5).all())
    assert clf.k == 3
    assert clf.labels(torch.tensor([2, 0])).tolist() == [2, 0]


def test_equal_prompts_are_merged_with_a_warning(vlm: VLM) -> None:
    with pytest.warns(UserWarning, match="classes with equal prompts are merged into one class each: cat"):
        clf = ZeroShot.build(vlm, ["cat", "dog", "cat", "eel"])
    assert clf.class_names == ("cat", "dog", "eel")
    assert clf.label_map == (0, 1, 0, 2)
    assert clf.labels(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 0, 2]


def test_equal_prompts_kept_apart_for_parity_tie(vlm: VLM) -> None:
    with pytest.warns(UserWarning, match="kept apart, so their images tie: cat"):
        clf = ZeroShot.build(vlm, ["cat", "dog", "cat"], merge_duplicates=False)
    assert clf.k == 3
    assert torch.equal(clf.weights[0], clf.weights[2])
    z = clf(images(3))
    assert torch.equal(z[:, 0], z[:, 2])


def test_no_warning_without_duplicates(vlm: VLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZeroShot.build(vlm, ["cat", "dog"])


def test_hash_sees_names_weights_and_scale(vlm: VLM) -> None:
    a = ZeroShot.build(vlm, ["cat", "dog"])
    b = ZeroShot.build(vlm, ["cat", "dog"], ("a {}",))
    assert a.prototype_hash == ZeroShot.build(vlm, ["cat", "dog"]).prototype_hash
    assert a.prototype_hash != b.prototype_hash
    assert a.with_weights(2 * b.weights).weights.allclose(b.weights)


def test_wrap_refuses_training_mode_and_unequal_spaces() -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Linear(192, DIM))
    with pytest.raises(ValueError, match=r"image_fn is in training mode; call .eval\(\) on it first"):
        VLM.wrap(tower, texts, 8)
    with pytest.raises(ValueError, match="image_fn gives 5 dimensions but text_fn gives 6; they must share one space"):
        VLM.wrap(lambda x: x.flatten(1)[:, :5], texts, 8)


def test_equal_texts_are_encoded_once_in_any_order(vlm: VLM) -> None:
    with vlm.counting() as count:
        out = vlm.encode_text(["bb", "a", "bb", "ccc"], batch_size=2)
    assert count.texts == 3
    torch.testing.assert_close(out, F.normalize(texts(["bb", "a", "bb", "ccc"]), dim=1))
    with pytest.raises(ValueError, match=r"texts must be a list of strings; write \[text\]"):
        vlm.encode_text("bb")
