"""FARE by hand, against the fp64 transcription, and what a step may cost."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from fits import image_set
from reference import fare_literal
from toys import CLASSES, toy_problem, toy_vlm

import ironclip
from ironclip.attacks.feature import FeaturePGD
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._train import Inner, finetuned
from ironclip.defenses.fare import FARE, distance
from ironclip.training.feed import Feed

LOOP = Loop(steps=3, batch_size=8, lr=1e-3, weight_decay=0.01, warmup=2, hold_out=0)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


def test_loss_by_hand() -> None:
    """(1, 2, 2) against (1, 0, 1): 0 + 4 + 1 = 5, not divided by three; a second pair at distance 0 halves the mean."""
    z, goal = torch.tensor([[1.0, 2, 2], [1, 1, 1]]), torch.tensor([[1.0, 0, 1], [1, 1, 1]])
    assert distance(z, goal).tolist() == [5.0, 0.0]
    assert distance(z, goal).mean() == 2.5
    assert distance(z, goal, "l1").tolist() == [3.0, 0.0]
    assert torch.equal(distance(3 * z, 3 * goal), 9 * distance(z, goal))
    assert fare_literal.distance(z, goal).tolist() == [5.0, 0.0]


def test_attack_by_hand() -> None:
    """phi(x) = x at 0.5, two pixels started at +0.2 eps and -0.1 eps: alpha = eps drives them to +eps and -eps."""
    eps, x = 8 / 255, torch.full((1, 2), 0.5)
    start = torch.tensor([[0.2 * eps, -0.1 * eps]])
    tower = torch.nn.Identity()
    delta = fare_literal.attack(
        tower, x, x, torch.zeros(1), torch.ones(1), start, eps=eps, alpha=eps, steps=1, momentum=0.9, boxed=True
    )
    torch.testing.assert_close(delta, torch.tensor([[eps, -eps]]))
    image = torch.full((1, 3, 2, 2), 0.5)
    inner = Inner(Fraction(8, 255), Fraction(8, 255), 1)
    begin = Inner(Fraction(8, 255), Fraction(8, 255), 0)(lambda v: v.flatten(1).sum(1), image, SampleRNG.rows(1))
    adv = inner(lambda v: distance(v.flatten(1), image.flatten(1)), image, SampleRNG.rows(1))
    torch.testing.assert_close(adv - image, eps * (begin - image).sign())
    assert float(distance(adv.flatten(1), image.flatten(1))) == pytest.approx(12 * eps**2, rel=1e-5)


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_fine_tuning_equals_the_literal_transcription(preset: str, problem: Any) -> None:
    """Images with pixels at 0 and 1, so that it matters whether the start may leave the box."""
    clf, _ = problem
    x = (torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2).clamp(0, 1)
    data = image_set(x, torch.arange(24) % 5, list(CLASSES))
    method = FARE(preset=preset, eps="4/255", steps=3)
    loop = replace(LOOP, steps=4, first_step_full=method.loop().first_step_full)
    got = finetuned(clf, method.fit(clf, data, loop=loop, seed=2)).vlm.image.state_dict()
    feed, batches = Feed(clf, data, loop, 2, labels=False), []
    for step in range(loop.steps):
        (batch,) = feed.parts(step)
        batches.append((batch.x, 4 / 255 * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)))
    mean, std = clf.vlm.get_buffer("mean"), clf.vlm.get_buffer("std")
    published = preset == "reference"
    want = fare_literal.train(
        clf.vlm.image, batches, mean, std, eps=4 / 255, alpha=1 / 255, steps=3, momentum=0.9 if published else 0.0,
        boxed=not published, lr=1e-3, decay=0.01, warmup=2, late=published,
    )  # fmt: skip
    before = clf.vlm.image.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=2e-6)
    assert min(float((want[k] - before[k]).abs().max()) for k in want if k != "origin") > 1e-3


def test_published_momentum_does_nothing_without_zero_gradients() -> None:
    vlm, x = toy_vlm(), torch.rand(4, 3, 8, 8) * 0.8 + 0.1
    clf = ZeroShot.build(vlm, CLASSES)
    goal = vlm.encode_image(x, normalize=False)

    def objective(v: torch.Tensor) -> torch.Tensor:
        return distance(vlm.encode_image(v, normalize=False), goal)

    plain, heavy = (Inner(Fraction(2, 255), Fraction(1, 255), 10, momentum=m) for m in (0.0, 0.9))
    rng = SampleRNG.rows(4)
    adv = plain(objective, x, rng.fold("feature_pgd"))
    assert torch.equal(adv, heavy(objective, x, rng.fold("feature_pgd")))
    evaluated = FeaturePGD(preset="fare-train")(clf, x, torch.zeros(4, dtype=torch.long), rng=rng).x_adv
    assert torch.equal(adv, evaluated)
    flat = x.clone().requires_grad_(True)  # half of the pixels have no gradient: momentum goes on, plain steps stop
    goes = (Inner(Fraction(8, 255), Fraction(1, 255), 3, momentum=m, start="zero") for m in (0.0, 0.9))
    calls = [0]

    def once(v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return (v * (1.0 if calls[0] == 1 else 0.0)).flatten(1).sum(dim=1)

    moved = []
    for inner in goes:
        calls[0] = 0
        moved.append(float((inner(once, flat, rng) - x).max()))
    assert moved == pytest.approx([1 / 255, 3 / 255], rel=1e-4)


def test_the_random_start_is_what_makes_it_move(problem: Any) -> None:
    clf, data = problem
    x = data.read(range(4))
    goal = clf.vlm.encode_image(x, normalize=False)

    def objective(v: torch.Tensor) -> torch.Tensor:
        return distance(clf.vlm.encode_image(v, normalize=False), goal)

    still = Inner(Fraction(4, 255), Fraction(1, 255), 5, start="zero")(objective, x, SampleRNG.rows(4))
    assert torch.equal(still, x)
    moved = FARE().inner(objective, x, SampleRNG.rows(4))
    assert float(objective(moved).min()) > 0
    first = replace(FARE(steps=0).inner)(objective, x, SampleRNG.rows(4))
    assert bool((objective(moved) >= objective(first)).all())
    with pytest.raises(ValueError, match="start=zero has exactly zero gradient while student and teacher agree"):
        FARE(start="zero")


def test_without_a_budget_nothing_changes(problem: Any) -> None:
    clf, data = problem
    state = FARE(eps=0).fit(clf, data, loop=replace(LOOP, weight_decay=0.0))
    assert not any(k.startswith("image.") for k in state)


def test_cost_of_a_step_is_the_minimum(problem: Any) -> None:
    """Ten attack steps: 10 (F + B) and one F with a backward to the weights; the teacher once per image in all."""
    clf, data = problem
    loop, images = replace(LOOP, steps=20), 20 * 8
    for fields, forwards, backwards in (
        ({}, 11 * images + len(data), 11 * images),
        ({"clean_weight": 0.5}, 12 * images + len(data), 12 * images),
        ({"trades": True}, 12 * images, 11 * images),
    ):
        with clf.vlm.counting() as count:
            FARE(**fields).fit(clf, data, loop=loop)
        assert (count.forwards, count.backwards, count.texts) == (forwards, backwards, 0)


def test_labels_and_text_are_never_read(problem: Any) -> None:
    clf, data = problem

    class Bare:
        name, ids, manifest_hash, class_names = data.name, data.ids, data.manifest_hash, []
        __len__ = lambda self: len(data)  # noqa: E731

        def batches(self, size: int, indices: Any = None) -> Any:
            for x, y, ids in data.batches(size, indices):
                yield x, y * 0 - 7, ids

    blind = replace(clf, weights=torch.zeros(1, clf.vlm.dim), class_names=("image",), label_map=())
    with_labels, without = FARE().fit(clf, data, loop=LOOP), FARE().fit(blind, Bare(), loop=LOOP)
    assert all(torch.equal(with_labels[k], without[k]) for k in with_labels)
    one = FARE().fit(clf, data.take([0, 5, 10]), loop=replace(LOOP, batch_size=1))
    assert any(k.startswith("image.") for k in one), "a single class and single images will do"


def test_the_teacher_stays_and_options_do_what_they_say(problem: Any) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    batch = Feed(clf, data, LOOP, 0).batch([0, 1, 2], 0)
    z0, z1 = (clf.vlm.encode_image(v, normalize=False) for v in (batch.x, batch.x.flip(3)))
    values = {}
    for name, method in (
        ("l2", FARE()),
        ("mixed", FARE(clean_weight=0.25)),
        ("unit", FARE(normalize=True)),
        ("l1", FARE(loss="l1")),
    ):
        plan = method.plan(clf, LOOP)
        assert plan.remember is not None
        known = replace(batch, cached=plan.remember(batch.x))
        values[name] = plan.loss(clf.vlm, known, batch.x.flip(3))[0]
    whole = distance(z1, z0).mean()
    torch.testing.assert_close(values["l2"], whole)
    torch.testing.assert_close(values["mixed"], 0.75 * whole)
    torch.testing.assert_close(values["l1"], (z1 - z0).abs().sum(1).mean())
    cosine = torch.nn.functional.cosine_similarity(z1, z0)
    torch.testing.assert_close(values["unit"], (2 - 2 * cosine).mean())
    FARE(trades=True).fit(clf, data, loop=LOOP)
    assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())


def test_cosines_move_less_than_the_bound(problem: Any) -> None:
    """|cos(z, t) - cos(z0, t)| <= min(2 / |z0|, 2 / |z|) |z - z0| for every t (theorem A.1)."""
    clf, data = problem
    fitted = FARE(eps="4/255").apply(clf, FARE(eps="4/255").fit(clf, data, loop=LOOP))
    x, t = data.read(range(20)), torch.randn(50, clf.vlm.dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z0, z = (m.encode_image(x, normalize=False) for m in (clf.vlm, fitted.vlm))
    t = torch.nn.functional.normalize(t, dim=1)
    shift = [torch.nn.functional.normalize(v, dim=1) @ t.T for v in (z0, z)]
    bound = (2 / torch.maximum(z0.norm(dim=1), z.norm(dim=1))) * (z - z0).norm(dim=1)
    assert bool(((shift[0] - shift[1]).abs() <= bound[:, None] + 1e-6).all())


def test_robustness_is_gained_under_prompts_it_never_saw(problem: Any) -> None:
    clf, data = problem
    method = FARE(eps="4/255", alpha="2/255", steps=5)
    loop = Loop(steps=150, batch_size=16, lr=3e-3, hold_out=0)
    fitted = method.apply(clf, method.fit(clf, data, loop=loop))
    attack = ironclip.build("PGD(eps=4/255, steps=20)")
    x, y = data.read(range(40)), torch.tensor(data.labels)
    held = {
        name: 1 - attack(model, x, y, rng=SampleRNG.of(5, data.ids)).success.float().mean()
        for name, model in (("before", clf), ("after", fitted))
    }
    assert held["after"] > held["before"] + 0.1, held


def test_presets_and_bad_fields() -> None:
    method = FARE(preset="reference")
    assert (method.eps, method.alpha, method.steps, method.momentum) == (Fraction(4, 255), Fraction(1, 255), 10, 0.9)
    loop = method.loop()
    assert (loop.lr, loop.weight_decay, loop.batch_size, loop.warmup, loop.steps) == (1e-5, 1e-4, 128, 1400, 20_000)
    assert (loop.rate(0), loop.rate(1)) == (1e-5, pytest.approx(2e-5 / 1400))
    for fields, message in (
        ({"clean_weight": 1.5}, r"clean_weight must lie in \[0, 1\], got 1.5; 0 is the published loss"),
        ({"loss": "l3"}, "unknown loss 'l3'"),
        ({"eps": -1}, "eps must not be negative"),
        ({"steps": -1}, "steps must be 0 or more"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"momentum": 1}, r"momentum must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FARE(**fields)
