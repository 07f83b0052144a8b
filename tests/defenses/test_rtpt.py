"""R-TPT against hand cases, its literal transcription, its own slow mode, and what must not leak between images."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clips import small_hf
from reference import rtpt_literal
from torch import Tensor
from toys import generator, toy_clf, toy_images

import ironclip
from ironclip.core.prompts import SoftPrompts
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._prompts import AdamW, Texts, entropies, full_texts, most_confident
from ironclip.defenses.rtpt import RTPT

NAMES = ["ant", "large bee", "cat", "ox"]
SMALL = {"views": 12, "neighbours": 4, "share": 0.25}


@pytest.fixture(scope="module")
def clf() -> ZeroShot:
    return ZeroShot.build(small_hf(), NAMES, ["a b {}."])


def spread(b: int, v: int, d: int, seed: int = 0) -> Tensor:
    """Unit features (b, v, d) that lie around a common direction, as views of one image do."""
    g = generator(seed)
    return F.normalize(torch.randn(b, 1, d, generator=g) + 0.7 * torch.randn(b, v, d, generator=g), dim=-1)


# by hand


def test_views_are_sharpened_one_by_one_not_on_average() -> None:
    """Two sure views that disagree: nothing to gain. The entropy of their mean, which TPT lowers, is ln 2."""
    logits = torch.tensor([[[100.0, 0.0], [0.0, 100.0]]])
    assert float(entropies(logits).mean()) == pytest.approx(0, abs=1e-6)
    mean = logits.softmax(-1).mean(1)
    assert float(-(mean * mean.log()).sum()) == pytest.approx(math.log(2))
    features, texts = torch.eye(2)[None], torch.eye(2)
    assert float(RTPT().cotangent(features, texts, 100.0).abs().max()) < 1e-30


def test_entropy_gradient_closed_form() -> None:
    features, scale = spread(3, 6, 16).double(), 30.0
    texts = F.normalize(torch.randn(3, 5, 16, generator=generator(1)).double(), dim=-1).requires_grad_(True)
    loss = entropies(scale * features @ texts.transpose(1, 2)).mean(dim=1).sum()
    (want,) = torch.autograd.grad(loss, texts)
    torch.testing.assert_close(RTPT().cotangent(features, texts.detach(), scale), want, rtol=1e-5, atol=1e-12)


def test_six_of_sixty_four_and_the_lower_index_among_equals() -> None:
    assert RTPT().selected == 6
    logits = torch.zeros(1, 64, 3)
    logits[0, 40:, 0] = 5.0
    assert most_confident(logits, 6).tolist() == [[40, 41, 42, 43, 44, 45]]
    logits[0, 63, 0] = 9.0
    assert most_confident(logits, 6).tolist() == [[63, 40, 41, 42, 43, 44]]


def test_view_weights_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    weights = RTPT(views=3, neighbours=1, share=0.4).weights(features)
    assert weights[0].tolist() == pytest.approx([0.5, 0.5, math.exp(-20) / 2], rel=1e-4)
    assert float(weights[0, 2]) == pytest.approx(1.03e-9, rel=1e-2)


def test_repeated_views_count_for_each_other_and_a_view_never_for_itself() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]])
    masked = RTPT(views=3, neighbours=1, share=0.4, temperature=1.0).weights(features)
    assert masked[0].tolist() == pytest.approx(torch.tensor([1.0, 1.0, 0.6]).softmax(0).tolist())
    published = RTPT(views=3, neighbours=1, share=0.4, temperature=1.0, self_match="threshold")
    assert published.weights(features)[0].tolist() == pytest.approx([1 / 3] * 3), "1.0 and more are thrown out"
    assert bool(torch.isfinite(published.weights(torch.ones(1, 3, 1))).all())


def test_weights_sum_to_one_and_follow_their_views(clf: ZeroShot) -> None:
    rtpt, features = RTPT(**SMALL), spread(2, 12, clf.vlm.dim)
    weights = rtpt.weights(features)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    order = torch.randperm(12, generator=generator(0))
    torch.testing.assert_close(rtpt.weights(features[:, order]), weights[:, order], rtol=1e-3, atol=1e-6)
    soft = Texts(clf, "a b {}.")
    shuffled = rtpt.vote(clf, features[:, order], texts=soft)
    torch.testing.assert_close(shuffled, rtpt.vote(clf, features, texts=soft), rtol=0, atol=2e-3)
    assert torch.equal(RTPT(weighting="uniform", views=12).weights(features), torch.full((2, 12), 1 / 12))


def test_the_first_step_is_a_sign_step(clf: ZeroShot) -> None:
    rtpt, features = RTPT(**SMALL), spread(3, 12, clf.vlm.dim)
    texts = Texts(clf, "a b {}.")
    soft, start = texts.soft, texts.initial
    moved = rtpt._tune(clf, soft, features, start, False) - 0.99995 * soft.initial
    index = most_confident(clf.scale * features @ start.T, rtpt.selected)
    chosen = torch.stack([f[i] for f, i in zip(features, index, strict=True)])
    grad = soft.pullback(soft.initial, rtpt.cotangent(chosen, start, clf.scale))
    clear = grad.abs() > 1e-6
    assert int(clear.sum()) > 0.9 * clear.numel()
    torch.testing.assert_close(moved[clear], -5e-3 * grad.sign()[clear], rtol=0.01, atol=0)


def test_our_adamw_is_the_libraries() -> None:
    p, ours = torch.randn(3, 4, generator=generator(0)), AdamW(0.1)
    theirs = p.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([theirs], lr=0.1)
    for i in range(4):
        g = torch.randn(3, 4, generator=generator(i))
        p, theirs.grad = ours.step(p, g), g
        optimiser.step()
        torch.testing.assert_close(p, theirs.detach())


# against the literal transcription


@pytest.mark.parametrize(
    "fields",
    [{}, {"steps": 3, "lr": 0.02}, {"preset": "reference", "self_match": "mask"}, {"temperature": 0.1, "share": 0.5}],
)
def test_equals_the_literal_transcription(clf: ZeroShot, fields: dict) -> None:
    rtpt = RTPT(**{**SMALL, "template": "a b {}.", **fields})
    double = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    soft = SoftPrompts.of(double.vlm, NAMES, "a b {}.")
    features = spread(4, 12, clf.vlm.dim, seed=3)
    texts = Texts(double, "a b {}.")
    got64 = rtpt.vote(double, features.double(), texts=texts)
    got32 = rtpt.vote(clf, features, texts=Texts(clf, "a b {}."))
    for i in range(4):
        want = rtpt_literal.logits(
            features[i].double(), lambda p: full_texts(soft, p[None]), soft.initial[0], clf.scale, rtpt.share,
            rtpt.steps, rtpt.lr, rtpt.neighbours, rtpt.temperature,
        )  # fmt: skip
        assert float((got64[i] - want).abs().max() / want.abs().max()) < 1e-9
        assert float((got32[i] - want).abs().max() / want.abs().max()) < 2e-4, "signs near zero may turn in fp32"


def test_weights_of_given_cosines_equal_the_literal_ones_in_both_readings() -> None:
    features = spread(1, 30, 8)[0].double()
    features[4] = features[9]
    cosines = features @ features.T
    cosines.fill_diagonal_(1.0)
    cosines[2, 2] = 1 - 1e-7
    cosines[4, 9] = cosines[9, 4] = 1.0
    for self_match in ("mask", "threshold"):
        rtpt = RTPT(views=30, self_match=self_match)
        want = rtpt_literal.view_weights(cosines, 20, 0.01, threshold=self_match == "threshold")
        torch.testing.assert_close(rtpt.weights_of(cosines[None])[0], want, rtol=1e-9, atol=1e-15)


# the published procedure, and what the fast one saves


def photos(b: int, size: int) -> Tensor:
    """Smooth images, whose views differ in more than noise."""
    return F.interpolate(torch.rand(b, 3, 4, 4, generator=generator(9)), (size, size), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("fields", [{}, {"steps": 2}, {"augment": "crops", "preset": "reference"}])
def test_fast_mode_equals_the_published_procedure(clf: ZeroShot, fields: dict) -> None:
    fields = {**SMALL, "template": "a b {}.", "self_match": "mask", **fields}
    x, rng = photos(3, clf.vlm.image_size), SampleRNG.rows(3)
    with torch.no_grad():
        fast = RTPT(**fields).apply(clf)(x, rng)
        slow = RTPT(**fields, mode="reference").apply(clf)(x, rng)
    assert torch.equal(fast.argmax(1), slow.argmax(1))
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-3 * float(slow.abs().max()))


def test_passes_of_both_procedures(clf: ZeroShot) -> None:
    x, rng = photos(2, clf.vlm.image_size), SampleRNG.rows(2)
    for mode, images in (("fast", 64), ("reference", 257)):
        defended = RTPT(template="a b {}.", mode=mode).apply(clf)
        with clf.vlm.counting() as count, torch.no_grad():
            defended(x, rng)
        assert (count.forwards, count.backwards) == (2 * images, 0), mode
        if mode == "reference":
            assert count.texts == 2 * 5 * 4
    with clf.vlm.counting() as count, torch.no_grad():
        defended = RTPT(template="a b {}.").apply(clf)
        defended(x, rng)
        once = count.texts
        defended(x, rng)
    assert (once, count.texts) == (4 + 4 + 8, 4 + 2 * (4 + 8)), "start cached; one shared graph; one pass an image"


def test_few_views_at_a_time_change_nothing(clf: ZeroShot, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rng = photos(2, clf.vlm.image_size), SampleRNG.rows(2)
    defended = RTPT(**SMALL, template="a b {}.").apply(clf)
    leaf = x.clone().requires_grad_(True)
    want = defended(leaf, rng)
    (grad,) = torch.autograd.grad(want[:, 0].sum(), leaf)
    monkeypatch.setattr("ironclip.defenses._prompts.ROWS", 6)
    got = defended(leaf, rng)
    (again,) = torch.autograd.grad(got[:, 0].sum(), leaf)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    torch.testing.assert_close(again, grad, rtol=1e-2, atol=1e-3 * float(grad.abs().max()))


# episodes, randomness, gradients


def test_an_image_is_tuned_as_if_it_were_alone(clf: ZeroShot) -> None:
    x, rng = photos(3, clf.vlm.image_size), SampleRNG.of(5, list("abc"))
    defended = RTPT(**SMALL, template="a b {}.").apply(clf)
    with torch.no_grad():
        together = defended(x, rng)
        after_a = (defended(x[:1], rng[:1]), defended(x[1:2], rng[1:2]))[1]
        fresh = RTPT(**SMALL, template="a b {}.").apply(clf)(x[1:2], rng[1:2])
    assert torch.equal(after_a, fresh)
    torch.testing.assert_close(together[1:2], fresh, rtol=0, atol=1e-2)


def test_truncation_keeps_eight_bit_images_and_darkens_others(clf: ZeroShot) -> None:
    size, rng = clf.vlm.image_size, SampleRNG.rows(1)
    every = (torch.arange(3 * size * size) % 256).float().view(1, 3, size, size) / 255
    cut, plain = RTPT(quantise="truncate"), RTPT()
    first = slice(0, 1)
    assert torch.equal(cut.make_views(every, rng)(every, first), plain.make_views(every, rng)(every, first))
    up, down = (cut.make_views(every, rng)(every + s * 0.4 / 255, first)[0] for s in (1, -1))
    inner = (every[0] > 0) & (every[0] < 1)
    assert torch.equal(up[0][inner], every[0][inner])
    torch.testing.assert_close(down[0][inner], every[0][inner] - 1 / 255)


def test_derivatives_of_the_three_views_of_it(clf: ZeroShot) -> None:
    """In fp64, where the sign step is flat: the frozen derivative is that of finite differences."""
    double = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    rtpt, rng = RTPT(**SMALL, template="a b {}.", augment="crops", temperature=0.1), SampleRNG.rows(2)
    x = photos(2, clf.vlm.image_size).double() * 0.8 + 0.1
    views = {"frozen": rtpt.apply(double), **{n: rtpt.surrogate(double, None, n) for n in rtpt.surrogates}}
    leaf = x.clone().requires_grad_(True)
    out = {n: v(leaf, rng) for n, v in views.items()}
    grads = {n: torch.autograd.grad(o[:, 0].sum(), leaf)[0] for n, o in out.items()}
    for name in rtpt.surrogates:
        torch.testing.assert_close(out[name], out["frozen"])
        assert float((grads[name] - grads["frozen"]).norm() / grads["frozen"].norm()) > 1e-3, name
    along = torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    h = 1e-7
    with torch.no_grad():
        slope = sum(s * float(views["frozen"](x + s * h * along, rng)[:, 0].sum()) for s in (1, -1)) / (2 * h)
    assert slope == pytest.approx(float((grads["frozen"] * along).sum()), rel=1e-2)


def test_the_vote_alone_works_on_any_model() -> None:
    clf = toy_clf()
    x, rng = toy_images(2), SampleRNG.rows(2)
    defended = RTPT(steps=0, views=8, neighbours=3).apply(clf)
    with clf.vlm.counting() as count, torch.no_grad():
        out = defended(x, rng)
    assert count.forwards == 16
    features = torch.randn(2, 8, clf.vlm.dim, generator=generator(0))
    features = F.normalize(features, dim=-1)
    rtpt = RTPT(steps=0, views=8, neighbours=3)
    texts = clf.vlm.encode_text([f"a photo of a {n}." for n in clf.class_names])
    want = (rtpt.weights(features).unsqueeze(-1) * (clf.scale * features @ texts.T)).sum(1)
    torch.testing.assert_close(rtpt.vote(clf, features), want)
    assert out.shape == (2, clf.k)
    with pytest.raises(ValueError, match="toy-conv has no token embedding; soft prompts need"):
        RTPT().apply(clf)


# bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": 20}, "neighbours must be at least 1 and below views, got neighbours=20 of views=20; write views=64"),
        ({"views": 0, "weighting": "uniform"}, "views must be at least 1, got 0; write 64"),
        ({"share": 0.01}, "leave a view to tune on, got share=0.01 of views=64; write share=0.1"),
        ({"share": 1.5}, r"share must be in \(0, 1\]"),
        ({"steps": -1}, "steps must not be negative, got -1; 0 is the vote alone"),
        ({"lr": 0.0}, "lr and temperature must be positive"),
        ({"augment": "augmx"}, "unknown augment 'augmx'; did you mean 'augmix'"),
        ({"mode": "slow"}, "unknown mode 'slow'"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RTPT(**fields)


def test_bad_images_and_classes(clf: ZeroShot) -> None:
    rtpt = RTPT(**SMALL, template="a b {}.")
    with pytest.raises(ValueError, match="divide by 255"):
        rtpt.apply(clf)(photos(1, 32) * 255, SampleRNG.rows(1))
    with pytest.raises(ValueError, match="float pixels"):
        rtpt.apply(clf)((photos(1, 32) * 255).byte(), SampleRNG.rows(1))
    with pytest.raises(ValueError, match="no class names"):
        RTPT(**SMALL).apply(replace(clf, class_names=()))
    with pytest.raises(ValueError, match="template must have words"):
        RTPT(**SMALL, template="{}.").apply(clf)
    with pytest.raises(ValueError, match="unknown surrogate of RTPT 'bpda'"):
        rtpt.surrogate(clf, None, "bpda")
    with pytest.raises(ValueError, match="mode=reference tunes prompts"), torch.no_grad():
        RTPT(**SMALL, steps=0, mode="reference").apply(clf)(photos(1, 32), SampleRNG.rows(1))


def test_reference_preset_is_the_published_one() -> None:
    made = ironclip.build("RTPT(preset=reference)")
    assert (made.self_match, made.quantise) == ("threshold", "truncate")
    shared = {"views": 64, "share": 0.1, "steps": 1, "lr": 5e-3, "neighbours": 20, "temperature": 0.01}
    assert all(getattr(made, k) == v for k, v in shared.items())
    assert made.template == "a photo of a {}."
