"""TeCoA by hand, against the fp64 transcription, and what a step may cost."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from reference import tecoa_literal
from toys import CLASSES, toy_clf, toy_problem, toy_vlm

import ironclip
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data import joined
from ironclip.data.imageset import ImageSet
from ironclip.defenses._train import BASE, RECIPE, Inner, cross_entropy, finetuned, logits, prompted
from ironclip.defenses.tecoa import TeCoA
from ironclip.training.feed import Feed

LOOP = Loop(steps=3, batch_size=8, lr=1e-2, optimizer="sgd", warmup=1, hold_out=0)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


def flat(text: torch.Tensor, scale: float) -> ZeroShot:
    """A classifier over features that are handed in; its tower is of no matter."""
    clf = toy_clf(dim=text.shape[1], classes=CLASSES[: text.shape[0]])
    return replace(clf.with_weights(text), scale=scale)


@pytest.mark.parametrize(("scale", "want"), [(2.0, 0.913015), (100.0, 20.0)])
def test_loss_by_hand(scale: float, want: float) -> None:
    """u = (0.6, 0.8), T the identity, label 0; lengths do not matter, of image and text alike."""
    for length in (1.0, 7.0):
        clf = flat(length * torch.eye(2), scale)
        z = logits(clf, F.normalize(length * torch.tensor([[0.6, 0.8]]), dim=1))
        value = F.cross_entropy(z, torch.tensor([0]))
        assert float(value) == pytest.approx(want, abs=2e-5)
        literal = tecoa_literal.loss(torch.tensor([[0.6, 0.8]]).double(), length * torch.eye(2).double(), [0], scale)
        assert float(literal) == pytest.approx(want, abs=2e-6)


def test_fine_tuning_equals_the_literal_transcription(problem: Any) -> None:
    """At a mild temperature: where softmax is sure, float32 knows the sign of few gradients and so does nobody."""
    clf, data = replace(problem[0], scale=4.0), problem[1]
    method = TeCoA(eps="4/255", alpha="1/255", steps=3)
    got = finetuned(clf, method.fit(clf, data, loop=LOOP, seed=2)).vlm.image.state_dict()
    feed, eps = Feed(clf, data, LOOP, 2), 4 / 255
    batches = []
    for step in range(LOOP.steps):
        (batch,) = feed.parts(step)
        start = eps * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)
        batches.append((batch.x, batch.y, start))
    mean, std = clf.vlm.get_buffer("mean"), clf.vlm.get_buffer("std")
    want = tecoa_literal.train(
        clf.vlm.image, batches, clf.weights, clf.scale, mean, std,
        eps=eps, alpha=1 / 255, steps=3, lr=1e-2, warmup=1, momentum=0.9,
    )  # fmt: skip
    before = clf.vlm.image.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-6)
    moved = [float((want[k] - before[k]).abs().max()) for k in want if k != "origin"]
    assert min(moved) > 1e-3, "the steps are large enough to see"


def test_cost_of_a_step_is_the_minimum(problem: Any) -> None:
    """Two attack steps: 2 (F + B) for the attack, F and a backward to the weights: 7 F; the text tower only before."""
    clf, data = problem
    for steps in (0, 2, 5):
        with clf.vlm.counting() as count:
            TeCoA(steps=steps).fit(clf, data, loop=LOOP)
        images = LOOP.steps * LOOP.batch_size
        assert count.forwards == (steps + 1) * images
        assert count.backwards == (steps + 1) * images
        assert count.texts == 0
    with clf.vlm.counting() as count:
        TeCoA(template="This is a photo of a {}").fit(clf, data, loop=LOOP)
    assert count.texts == clf.k


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_stays_in_the_ball_and_the_box(norm: str) -> None:
    clf = toy_clf()
    x, rng = torch.rand(6, 3, 8, 8).round(decimals=1), SampleRNG.rows(6)
    y = torch.arange(6) % clf.k
    eps = Fraction(8, 255) if norm == "linf" else Fraction(1)
    inner = Inner(eps, eps / 4, 5, norm)
    leaf = x.clone().requires_grad_(True)
    adv = inner(cross_entropy(clf, clf.vlm, y), leaf, rng)
    again = inner(cross_entropy(clf, clf.vlm, y), x, rng)
    assert torch.equal(adv, again)
    assert not adv.requires_grad
    assert leaf.grad is None
    assert adv.dtype == x.dtype
    assert float(adv.min()) >= 0
    assert float(adv.max()) <= 1
    size = (adv - x).abs().amax() if norm == "linf" else (adv - x).flatten(1).norm(dim=1).max()
    assert float(size) <= float(eps) + 1e-6
    start = Inner(eps, eps / 4, 0, norm)(cross_entropy(clf, clf.vlm, y), x, rng)
    with torch.no_grad():
        first, last = (F.cross_entropy(clf(v), y) for v in (start, adv))
    assert last > first


def test_a_linear_tower_is_driven_into_the_corner() -> None:
    x, w = torch.full((1, 3, 8, 8), 0.5), torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    adv = Inner(Fraction(2, 255), Fraction(2, 255), 2)(lambda v: (v * w).flatten(1).sum(dim=1), x, SampleRNG.rows(1))
    torch.testing.assert_close(adv - x, 2 / 255 * w.sign()[None], rtol=0, atol=1e-7)


def test_without_a_budget_it_is_plain_fine_tuning(problem: Any) -> None:
    clf, data = problem
    x, y = data.read(range(4)), torch.tensor(data.labels[:4])
    for method in (TeCoA(eps=0), TeCoA(steps=0, start="zero")):
        assert torch.equal(method.inner(cross_entropy(clf, clf.vlm, y), x, SampleRNG.rows(4)), x)
    plan = TeCoA(eps=0).plan(clf, LOOP)
    batch = Feed(clf, data, LOOP, 0).batch([0, 1, 2, 3], 0)
    loss, _ = plan.loss(clf.vlm, batch, plan.attack(clf.vlm, batch))
    want = F.cross_entropy(clf.scale * clf.vlm.encode_image(x) @ clf.weights.T, y)
    assert torch.equal(loss, want)


def test_robustness_is_gained_and_everything_else_stays(problem: Any) -> None:
    clf, data = problem
    method = TeCoA(eps="4/255", alpha="2/255", steps=5)
    state = method.fit(clf, data, loop=replace(LOOP, steps=60, lr=3e-3, optimizer="adamw"))
    fitted = method.apply(clf, state)
    assert all(k in (BASE, RECIPE) or k.startswith("image.") for k in state)
    assert fitted.vlm.text is clf.vlm.text
    assert torch.equal(fitted.weights, clf.weights)
    assert fitted.scale == clf.scale
    attack = ironclip.build("PGD(eps=4/255, steps=20)")
    x, y = data.read(range(40)), torch.tensor(data.labels)
    held = {}
    for name, model in (("before", clf), ("after", fitted)):
        held[name] = 1 - attack(model, x, y, rng=SampleRNG.of(5, data.ids)).success.float().mean()
    assert held["after"] > held["before"] + 0.3, held


def test_mixing_weights(problem: Any) -> None:
    clf, data = problem
    state = TeCoA().fit(clf, data, loop=LOOP)
    x = data.read(range(5))
    with torch.no_grad():
        assert torch.equal(TeCoA(mix_alpha=0).apply(clf, state)(x), clf(x))
        full = TeCoA().apply(clf, state)
        half = TeCoA(mix_alpha=0.5).apply(clf, state)
    key = "image.tower.out.weight"
    parts = [c.vlm.state_dict()[key] for c in (clf, full, half)]
    torch.testing.assert_close(parts[2], (parts[0] + parts[1]) / 2)


def test_states_of_other_backbones_are_refused(problem: Any) -> None:
    clf, data = problem
    state = TeCoA().fit(clf, data, loop=LOOP)
    other, _, _ = toy_problem(5, seed=1)
    with pytest.raises(ValueError, match=r"fitted on a backbone with weights \w+\.\.\., toy-conv-problem has"):
        TeCoA().apply(other, state)
    unmarked = {k: v for k, v in state.items() if k != BASE}
    with pytest.raises(ValueError, match="fitted on another backbone"):
        TeCoA().apply(ZeroShot.build(toy_vlm(tower="attention"), CLASSES), unmarked)
    with pytest.raises(ValueError, match=r"fitted by TeCoA\(eps=1/255, .*\), not by TeCoA\(eps=4/255"):
        TeCoA(eps="4/255").apply(clf, state)
    with pytest.raises(ValueError, match="tecoa must be fitted first; run ironclip fit 'tecoa'"):
        TeCoA().apply(clf)


def test_templates_and_presets(problem: Any) -> None:
    clf, _ = problem
    method = TeCoA(preset="reference")
    assert (method.eps, method.alpha, method.steps) == (Fraction(1, 255), Fraction(1, 255), 2)
    assert method.loop().optimizer == "sgd"
    assert (method.loop().lr, method.loop().warmup, method.loop().batch_size) == (1e-5, 1000, 256)
    variant = TeCoA(preset="robustvlm").loop()
    assert (variant.optimizer, variant.lr, variant.weight_decay, variant.warmup) == ("adamw", 1e-5, 1e-4, 1400)
    made = prompted(clf, "This is a photo of a {}")
    torch.testing.assert_close(made.weights, clf.vlm.encode_text([f"This is a photo of a {c}" for c in CLASSES]))
    assert prompted(clf, "") is clf


def test_label_spaces(problem: Any) -> None:
    """Per set, an image competes with its own set's classes only; jointly with all of them."""
    clf, data = problem
    other = image_set(data.read(range(6)), torch.tensor([0, 1] * 3), ["cat", "fox"], name="more")
    both = joined([data, other])
    with pytest.warns(UserWarning, match="merged"):
        wide = ZeroShot.build(clf.vlm, both.class_names)
    batch = Feed(wide, both, LOOP, 0).batch([0, 41], 0)
    losses = {}
    for space in ("joined", "per_set"):
        plan = TeCoA(label_space=space).plan(wide, LOOP)
        losses[space], _ = plan.loss(wide.vlm, batch, batch.x)
    z = wide(batch.x)
    names = list(wide.class_names)
    small = [[names.index(c) for c in group] for group in (CLASSES, ("cat", "fox"))]
    by_hand = [z[i, rows].logsumexp(0) - z[i, batch.y[i]] for i, rows in enumerate(small)]
    torch.testing.assert_close(losses["per_set"], torch.stack(by_hand).mean())
    torch.testing.assert_close(losses["joined"], F.cross_entropy(z, batch.y))
    assert losses["per_set"] < losses["joined"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 4}, r"eps must be in \(0, 1\], got 4; write 4/255"),
        ({"eps": "-1/255"}, "eps must not be negative"),
        ({"eps": "1/100000000"}, "eps=1/100000000 is finer than float32 pixels"),
        ({"alpha": 0}, "alpha must be positive, got 0; write 1/255"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"norm": "l3"}, "unknown norm 'l3'"),
        ({"recipe": "ours"}, "unknown recipe 'ours'"),
        ({"mix_alpha": 1.5}, r"mix_alpha must lie in \[0, 1\], got 1.5"),
        ({"template": "a photo"}, "template needs exactly one {}, got 'a photo'"),
        ({"label_space": "own"}, "unknown label_space 'own'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeCoA(**fields)


def test_bad_training_input_is_refused(problem: Any) -> None:
    clf, data = problem
    with pytest.raises(ValueError, match=r"data must be an open data set such as ironclip\.load_data"):
        TeCoA().fit(clf, data.read(range(4)), loop=LOOP)
    with pytest.raises(ValueError, match="shows a single class"):
        TeCoA().fit(clf, data.take([0, 5, 10]), loop=LOOP)

    class Unlabelled:
        name, ids, manifest_hash, class_names = data.name, data.ids, data.manifest_hash, data.class_names
        batches, __len__ = data.batches, lambda self: len(data)

    with pytest.raises(ValueError, match="toys has no labels, and this method learns from labels"):
        TeCoA().fit(clf, Unlabelled(), loop=LOOP)
    broken = data.read(range(4)).new_full((1,), math.nan)
    with pytest.raises(RuntimeError, match="gradient is not finite at its step 1"):
        TeCoA().inner(lambda v: (v * broken).flatten(1).sum(dim=1), data.read(range(4)), SampleRNG.rows(4))
