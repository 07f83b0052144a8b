"""Bad input is refused before any work, and the message says what to do."""

from __future__ import annotations

import pytest
import torch

from ironclip.core.check import check_choice, check_images, check_labels, check_logits, unknown

GOOD = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([1, 2], "images must be a torch tensor (b, 3, h, w), got list"),
        (torch.rand(3, 4, 4), "images must have shape (b, 3, h, w), got (3, 4, 4)"),
        (torch.rand(2, 1, 4, 4), "images must have shape (b, 3, h, w), got (2, 1, 4, 4)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "got torch.uint8; write x.float() / 255"),
        (GOOD * 255, "images must lie in [0, 1], got values from"),
        (GOOD * 255, "divide by 255"),
        (GOOD * 4 - 2, "pass pixels before mean/std normalisation: the model normalises"),
        (torch.full((1, 3, 4, 4), float("nan")), "images contain NaN or infinite pixels"),
        (torch.full((1, 3, 4, 4), float("inf")), "expected finite values in [0, 1]"),
        (torch.full((1, 3, 4, 4), 1 + 2e-6), "images must lie in [0, 1]"),
    ],
)
def test_images(x: object, words: str) -> None:
    with pytest.raises(ValueError, match="images") as caught:
        check_images(x)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match="images must be 8 x 8 for this model, got 4 x 4; resize first"):
        check_images(GOOD, 8)
    check_images(GOOD, 4)


def test_images_within_the_slack_and_empty_batches_pass() -> None:
    check_images(GOOD.clamp(0, 1) - 5e-7)
    check_images(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(3, dtype=torch.long), "labels must have shape (2,), got (3,)"),
        (torch.zeros(2, 1, dtype=torch.long), "labels must have shape (2,), got (2, 1)"),
        ([0, 1], "labels must have shape (2,), got list"),
        (torch.zeros(2), "labels must be integers, got torch.float32; write y.long()"),
        (torch.zeros(2, dtype=torch.bool), "labels must be integers, got torch.bool"),
        (torch.tensor([0, 5]), "labels must lie in 0..4 for 5 classes, got 0..5"),
        (torch.tensor([-1, 0]), "labels must lie in 0..4 for 5 classes, got -1..0"),
    ],
)
def test_labels(y: object, words: str) -> None:
    with pytest.raises(ValueError, match="labels") as caught:
        check_labels(y, 2, 5)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_labels_without_a_class_count() -> None:
    check_labels(torch.tensor([0, 999]), 2)
    with pytest.raises(ValueError, match=r"target must lie in 0..k-1, got -3..0"):
        check_labels(torch.tensor([0, -3]), 2, what="target")


def test_logits() -> None:
    check_logits(torch.zeros(2, 5), 2, 5)
    with pytest.raises(ValueError, match=r"the classifier must return logits of shape \(2, k\), got \(5, 2\)"):
        check_logits(torch.zeros(5, 2), 2)
    with pytest.raises(ValueError, match=r"the classifier must return logits of shape \(2, 4\), got \(2, 5\)"):
        check_logits(torch.zeros(2, 5), 2, 4)
    with pytest.raises(ValueError, match="the classifier returned NaN or infinite logits"):
        check_logits(torch.tensor([[0.0, float("nan")]]), 1)


def test_unknown_names_the_nearest_and_all() -> None:
    assert unknown("norm", "Linv", ["linf", "l2"]) == "unknown norm 'Linv'; did you mean 'linf'? valid: l2, linf"
    assert unknown("norm", "xyz", ["linf", "l2"]) == "unknown norm 'xyz'; valid: l2, linf"
    check_choice("l2", ["l2"], "norm")
    with pytest.raises(ValueError, match="unknown norm 'l0'"):
        check_choice("l0", ["linf", "l2"], "norm")
