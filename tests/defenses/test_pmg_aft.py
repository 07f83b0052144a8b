"""PMG-AFT by hand, against the fp64 transcription, against TeCoA, and what a step may cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from reference import pmg_aft_literal
from toys import CLASSES, toy_problem

from ironclip.core.loop import Loop
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._train import BASE, MEAN, STD, finetuned, prompted, renormalised
from ironclip.defenses.pmg_aft import IMAGENET, PMGAFT, divergence
from ironclip.defenses.tecoa import TeCoA
from ironclip.training.feed import Batch, Feed

LOOP = Loop(steps=3, batch_size=8, lr=1e-2, optimizer="sgd", warmup=1, hold_out=0)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


def batch_of(problem: Any, places: list[int]) -> Batch:
    return Feed(problem[0], problem[1], LOOP, 0).batch(places, 0)


@pytest.mark.parametrize(("scale", "want"), [(1.0, 0.0199336), (100.0, 20.0)])
def test_divergence_by_hand(scale: float, want: float) -> None:
    """Student cosines (0.6, 0.8), teacher (0.8, 0.6)."""
    z, taught = scale * torch.tensor([[0.6, 0.8]]), scale * torch.tensor([[0.8, 0.6]])
    assert float(divergence(taught, z)) == pytest.approx(want, rel=1e-5)
    assert float(divergence(z, z)) == pytest.approx(0.0, abs=1e-7)
    if scale == 1.0:
        assert float(F.cross_entropy(z, torch.tensor([0]))) == pytest.approx(0.798139, abs=1e-6)
    u, u0 = torch.tensor([[0.6, 0.8]]).double(), torch.tensor([[0.8, 0.6]]).double()
    literal = pmg_aft_literal.loss(u, u0, u, torch.eye(2).double(), torch.tensor([0]), scale=scale, a=1.0, b=1.0)
    assert float(literal) == pytest.approx(want + float(F.cross_entropy(scale * u, torch.tensor([0]))), rel=1e-5)


def test_the_direction_matters_and_no_divergence_is_negative() -> None:
    z, taught = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.9, 0.1]])
    forth, back = divergence(taught, z), divergence(taught, z, "student_target")
    assert abs(float(forth - back)) > 1e-4
    torch.testing.assert_close(back, divergence(z, taught))
    random = torch.randn(2, 200, 7, generator=torch.Generator().manual_seed(0)) * 5
    assert float(divergence(random[0], random[1]).min()) >= 0
    hidden = random.clone()
    hidden[:, :, 3:] = -1e4  # classes that cannot win
    want = divergence(random[0, :, :3], random[1, :, :3])
    torch.testing.assert_close(divergence(hidden[0], hidden[1]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("code", [False, True])
def test_fine_tuning_equals_the_literal_transcription(code: bool, problem: Any) -> None:
    clf, data = replace(problem[0], scale=4.0), problem[1]
    changes: dict[str, Any] = {"preset": "reference", "template": "", "recipe": "default"} if code else {}
    method = PMGAFT(eps="4/255", steps=3, **changes)
    loop = replace(LOOP, lr=3e-3)
    got = finetuned(clf, method.fit(clf, data, loop=loop, seed=2)).vlm.image.state_dict()
    feed, batches = Feed(clf, data, loop, 2), []
    for step in range(loop.steps):
        (batch,) = feed.parts(step)
        start = 4 / 255 * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)
        batches.append((batch.x, batch.y, start))
    own = [clf.vlm.get_buffer(name) for name in ("mean", "std")]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET) if code else own
    want = pmg_aft_literal.train(
        clf.vlm.image, batches, clf.weights, 4.0, mean, std,
        eps=4 / 255, alpha=1 / 255, steps=3, lr=3e-3, warmup=1, momentum=0.9, a=1.0, b=1.0, code=code,
    )  # fmt: skip
    before = clf.vlm.image.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=2e-6)
    assert min(float((want[k] - before[k]).abs().max()) for k in want if k != "origin") > 3e-4


def test_without_divergences_it_is_tecoa_to_the_bit(problem: Any) -> None:
    clf, data = problem
    plain = TeCoA().fit(clf, data, loop=LOOP, seed=3)
    ours = PMGAFT(kl_teacher=0, kl_clean=0).fit(clf, data, loop=LOOP, seed=3)
    assert all(torch.equal(plain[k], ours[k]) for k in plain if k.startswith("image."))
    assert torch.equal(plain[BASE], ours[BASE])


def test_at_the_start_both_divergences_and_their_gradients_vanish(problem: Any) -> None:
    clf, _ = problem
    batch = batch_of(problem, [0, 1, 2])
    vlm = clf.vlm.with_state({k: v for k, v in clf.vlm.state_dict().items() if k.startswith("image.")})
    vlm.image.requires_grad_(True)
    both, _ = PMGAFT().plan(clf, LOOP).loss(vlm, batch, batch.x)
    plain, _ = TeCoA().plan(clf, LOOP).loss(vlm, batch, batch.x)
    assert float(both.detach()) == pytest.approx(float(plain.detach()), abs=1e-5)
    grads = [torch.autograd.grad(value, list(vlm.image.parameters())) for value in (both, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cost_of_a_step_is_the_minimum(problem: Any) -> None:
    """Attack 2 (F + B), student on both images 2 F and 2 weight backwards, teacher 1 F: 4 + 6 + 1 = 11 F."""
    clf, data = problem
    images = LOOP.steps * LOOP.batch_size
    for fields, forwards, backwards in (
        ({}, 5, 4),
        ({"detach_clean": True}, 5, 3),
        ({"kl_clean": 0}, 4, 3),
        ({"kl_teacher": 0}, 4, 4),
        ({"teacher_view": "clean"}, 5, 4),
    ):
        with clf.vlm.counting() as count:
            PMGAFT(**fields).fit(clf, data, loop=LOOP)
        assert (count.forwards, count.backwards) == (forwards * images, backwards * images), fields
        assert count.texts == 0
    many = replace(LOOP, steps=20)
    with clf.vlm.counting() as count:
        PMGAFT(teacher_view="clean").fit(clf, data, loop=many)
    assert count.forwards == 4 * 20 * 8 + len(data), "the clean teacher is remembered"


def test_the_clean_branch_may_be_a_constant(problem: Any) -> None:
    clf, _ = problem
    batch = batch_of(problem, [0, 1, 2, 3])
    vlm = clf.vlm.with_state({k: v for k, v in clf.vlm.state_dict().items() if k.startswith("image.")})
    vlm.image.requires_grad_(True)
    x_adv = (batch.x + 0.05 * batch.rng.normal_like(batch.x)).clamp(0, 1)
    values = [PMGAFT(detach_clean=d).plan(clf, LOOP).loss(vlm, batch, x_adv)[0] for d in (False, True)]
    torch.testing.assert_close(values[0], values[1])
    grads = [torch.autograd.grad(v, vlm.get_parameter("image.tower.out.weight"))[0] for v in values]
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2)


def test_the_published_sum_depends_on_the_batch_and_the_mean_does_not(problem: Any) -> None:
    """Twice the batch: the mean stays; of the sum, the divergences' part doubles. Parts of a batch add up to it."""
    clf, data = problem
    x_adv = {}
    for places in ([0, 1], [0, 1, 0, 1]):
        batch = batch_of(problem, places)
        batch = replace(batch, x=batch.x, cached={})
        for reduction in ("mean", "sum"):
            loop = replace(LOOP, batch_size=len(places))
            plan = PMGAFT(reduction=reduction, detach_clean=True).plan(clf, loop)
            x_adv[reduction, len(places)] = plan.loss(clf.vlm, batch, batch.x.flip(3))
    mean, doubled = x_adv["mean", 2], x_adv["mean", 4]
    torch.testing.assert_close(mean[0], doubled[0])
    ce = mean[1]["ce"]
    torch.testing.assert_close(x_adv["sum", 4][0] - ce, 2 * (x_adv["sum", 2][0] - ce), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_adv["sum", 2][0] - ce, 2 * (mean[0] - ce), rtol=1e-4, atol=1e-5)
    method = PMGAFT(reduction="sum")
    one, four = (method.fit(clf, data, loop=replace(LOOP, lr=1e-4, accumulate=n)) for n in (1, 4))
    for name in one:
        if name.startswith("image."):
            torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-5)


def test_published_logits_are_cosines(problem: Any) -> None:
    """Cross-entropy cannot fall below ln(1 + (k - 1) / e^2), whatever the length of the text rows."""
    clf, _ = problem
    method = PMGAFT(preset="reference", template="", kl_teacher=0, kl_clean=0)
    batch = batch_of(problem, list(range(20)))
    value, _ = method.plan(clf, LOOP).loss(clf.vlm, batch, batch.x)
    assert float(value) >= math.log(1 + (clf.k - 1) * math.exp(-2))
    seven = clf.with_weights(7 * clf.weights)
    torch.testing.assert_close(method.plan(seven, LOOP).loss(clf.vlm, batch, batch.x)[0], value)


def test_imagenet_statistics_travel_with_the_state(problem: Any) -> None:
    clf, data = problem
    method = PMGAFT(preset="reference")
    state = method.fit(clf, data, loop=LOOP)
    fitted = method.apply(clf, state)
    assert fitted.vlm.get_buffer("mean").flatten().tolist() == pytest.approx(list(IMAGENET[0]))
    assert fitted.vlm.get_buffer("std").flatten().tolist() == pytest.approx(list(IMAGENET[1]))
    assert clf.vlm.get_buffer("mean").flatten().tolist() == [0.5, 0.5, 0.5]
    assert fitted.scale == clf.scale, "evaluated at the model's temperature"
    assert {MEAN, STD} <= state.keys()
    x = data.read(range(3))
    other = renormalised(clf.vlm, *(torch.tensor(v) for v in IMAGENET))
    before = (x - torch.tensor(IMAGENET[0]).view(1, 3, 1, 1)) / torch.tensor(IMAGENET[1]).view(1, 3, 1, 1)
    torch.testing.assert_close(other.encode_image(x, normalize=False), clf.vlm.image(before))
    with pytest.raises(ValueError, match=r"fitted by PMGAFT\(.*statistics=imagenet.*\), not by .*statistics=model"):
        PMGAFT().apply(clf, state)


def test_the_teacher_stays(problem: Any) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    PMGAFT().fit(clf, data, loop=LOOP)
    assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
    assert all(p.grad is None for p in clf.vlm.parameters())
    assert not clf.vlm.training
    assert prompted(clf, "This is a photo of a {}").scale == clf.scale


def test_presets_and_bad_fields() -> None:
    method = PMGAFT(preset="reference")
    assert (method.logit_scale, method.reduction, method.statistics) == (1.0, "sum", "imagenet")
    loop = method.loop()
    assert (loop.optimizer, loop.lr, loop.momentum, loop.warmup, loop.batch_size) == ("sgd", 5e-5, 0.9, 1000, 256)
    for fields, message in (
        ({"kl_teacher": -1}, "kl_teacher must not be negative, got -1"),
        ({"kl_clean": math.inf}, "kl_clean must be a number, got inf"),
        ({"logit_scale": 0}, "logit_scale must be positive, got 0.0; write 100, or None"),
        ({"reduction": "max"}, "unknown reduction 'max'"),
        ({"direction": "back"}, "unknown direction 'back'"),
        ({"teacher_view": "both"}, "unknown teacher_view 'both'"),
        ({"statistics": "clip"}, "unknown statistics 'clip'"),
        ({"eps": 2}, r"eps must be in \(0, 1\], got 2; write 2/255"),
    ):
        with pytest.raises(ValueError, match=message):
            PMGAFT(**fields)
