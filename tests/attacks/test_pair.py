"""Attacks on images and captions together: budgets, streams, and what they reduce to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ironclip
from ironclip.attacks._ascent import Ascent, ascend
from ironclip.attacks.co_attack import CoAttack, divergence
from ironclip.attacks.pair import PairAttack, reword, scaled, text_sets
from ironclip.attacks.sga import SGA
from ironclip.attacks.text import WordSwap
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.data.captions import CaptionSet, load_captions
from ironclip.evaluation.retrieval import retrieve

WORDS = WordSwap()
ATTACKS = (SGA(eps=8 / 255, steps=3), CoAttack(eps=8 / 255, steps=3))


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return ironclip.load("tiny")


@pytest.fixture(scope="module")
def captions(vlm: VLM) -> CaptionSet:
    return load_captions("shapes", vlm.image_size, limit=6)


@pytest.fixture(scope="module")
def batch(captions: CaptionSet) -> tuple[Tensor, SampleRNG, list[list[str]]]:
    (x, ids), *_ = captions.batches(6)
    own = [c[:1] if i % 2 else c[:3] for i, c in enumerate(captions.captions)]
    return x, SampleRNG.of(0, ids), own


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_budget_shape_and_streams(attack: Any, vlm: VLM, batch: Any) -> None:
    x, rng, own = batch
    assert isinstance(attack, PairAttack)
    whole = attack(vlm, x, own, WORDS, rng=rng)
    assert whole.x_adv.shape == x.shape
    assert float((whole.x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert float(whole.x_adv.min()) >= 0
    assert float(whole.x_adv.max()) <= 1
    assert [len(c) for c in whole.captions] == [len(c) for c in own]
    for i in (0, 3):
        alone = attack(vlm, x[i : i + 1], own[i : i + 1], WORDS, rng=rng[[i]])
        assert float((alone.x_adv - whole.x_adv[i]).abs().mean()) < 1e-3
        assert alone.captions[0] == whole.captions[i]
    for before, after in zip(own, whole.captions, strict=True):
        for a, b in zip(before, after, strict=True):
            assert sum(p != q for p, q in zip(a.split(" "), b.split(" "), strict=True)) <= 1


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_passes_are_counted(attack: Any, vlm: VLM, batch: Any) -> None:
    x, rng, own = batch
    with vlm.counting() as count:
        result = attack(vlm, x, own, WORDS, rng=rng)
    assert count.forwards == int(result.forwards.sum())
    assert count.backwards == int(result.backwards.sum())


def test_one_caption_and_one_scale_make_sga_plain_pgd_on_the_cosine(vlm: VLM, batch: Any) -> None:
    x, rng, own = batch
    one = [c[:1] for c in own]
    moved = vlm.encode_text([c[0] for c in reword(vlm, one, WORDS, vlm.encode_image(x))])
    run = Ascent(4 / 255, 1 / 255, 5, "linf", "uniform", best=False)
    plain = ascend(
        lambda p, _r: vlm.encode_image(p),
        x,
        lambda e, rows: -(e * moved[rows]).sum(dim=1),
        lambda e, rows: torch.zeros(len(rows), dtype=torch.bool),
        run,
        rng.fold("sga"),
    )
    made = SGA(eps=4 / 255, alpha=1 / 255, steps=5, scales=(1.0,), returned="last")(vlm, x, one, WORDS, rng=rng)
    assert float((made.x_adv - plain.x_adv).abs().mean()) < 1e-4


def test_the_last_step_never_brings_a_caption_nearer_to_the_attacked_image(vlm: VLM, batch: Any) -> None:
    x, rng, own = batch
    made = SGA(eps=8 / 255, steps=3)(vlm, x, own, WORDS, rng=rng)
    image = vlm.encode_image(made.x_adv)
    for e, before, after in zip(image, own, made.captions, strict=True):
        assert (vlm.encode_text(after) @ e <= vlm.encode_text(before) @ e + 1e-6).all()


def test_scales_keep_the_size_and_one_is_the_image_itself() -> None:
    x, rng = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), SampleRNG.of(0, ["a", "b"])
    same, small = scaled(x, (1.0, 0.5), 0.05, rng)
    assert same is x
    assert small.shape == x.shape
    assert torch.equal(small[1:], scaled(x[1:], (1.0, 0.5), 0.05, rng[[1]])[1])
    assert not torch.equal(small, scaled(x, (1.0, 0.5), 0.0, rng)[1])


def test_sets_are_padded_with_zeros(vlm: VLM) -> None:
    sets, counts = text_sets(vlm, [["a red circle"], ["a blue star", "a star"]])
    assert counts.tolist() == [1, 2]
    assert float(sets[0, 1].abs().max()) == 0
    torch.testing.assert_close(sets[1], vlm.encode_text(["a blue star", "a star"]))


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    e = torch.e
    a, b = 1 / (1 + e), e / (1 + e)
    want = a * torch.log(torch.tensor(a / 0.5)) + b * torch.log(torch.tensor(b / 0.5))
    assert float(divergence(p, q)) == pytest.approx(float(want))
    assert float(divergence(p, p)) == 0


def test_together_is_no_weaker_than_apart_for_any_query(vlm: VLM, captions: CaptionSet) -> None:
    found = retrieve(
        vlm, captions, None, "FeaturePGD(eps=4/255, steps=3)", WORDS, pair=SGA(eps=4 / 255, steps=3), batch_size=4
    )
    assert [r.setting for r in found.rows] == ["clean", "image", "text", "joint", "pair", "worst"]
    for setting in ("image", "text", "joint", "pair"):
        assert (found.row("worst").image_ranks >= found.row(setting).image_ranks).all()
        assert (found.row("worst").text_ranks >= found.row(setting).text_ranks).all()
    assert found.row("pair").text_ranks.double().mean() > found.row("clean").text_ranks.double().mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGA(scales=()), "scales must be one number or more"),
        (lambda: SGA(noise=2.0), "noise must be in"),
        (lambda: CoAttack(start="zero"), "use start=uniform"),
        (lambda: CoAttack(weight=-1.0), "weight must be 0 or more"),
        (lambda: SGA(eps=4), "write 4/255"),
    ],
)
def test_bad_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_captions_must_fit_the_images(vlm: VLM, batch: Any) -> None:
    x, rng, own = batch
    with pytest.raises(ValueError, match="a list of captions for each of 6 images, got 2"):
        SGA()(vlm, x, own[:2], WORDS, rng=rng)
    with pytest.raises(ValueError, match="captions of image 1 must be a list of one sentence or more, got 'a cat'"):
        SGA()(vlm, x[:2], [["a"], "a cat"], WORDS, rng=rng[[0, 1]])
