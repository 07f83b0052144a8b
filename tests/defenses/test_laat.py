"""LAAT by hand, against the fp64 transcription, on a network from nothing and on a pre-trained one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from reference import laat_literal
from toys import CLASSES, toy_clf, toy_images, toy_problem, words

import ironclip
from ironclip.core.anchors import anchors, frame_of
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._train import BASE, RECIPE, finetuned
from ironclip.defenses.laat import CENTRE, LAAT, WIDEST
from ironclip.models.conv4 import Conv4, start
from ironclip.training.feed import Feed
from ironclip.training.finetune import Session

LOOP = Loop(
    steps=3, batch_size=8, lr=1e-2, optimizer="sgd", schedule="constant", drops=(0.5,), weight_decay=0.01, hold_out=0
)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


@pytest.mark.parametrize(("classes", "align"), [(2, 0.313262), (5, 0.904833)])
def test_loss_by_hand(classes: int, align: float) -> None:
    """Orthonormal anchors, every feature at its own: ln(1 + (C - 1) / e) - 1."""
    clf = toy_clf(classes=CLASSES[:classes], dim=8)
    eye = torch.eye(8)[:classes]
    method = LAAT(eps=0, anchors="text", tau=1)
    plan = method.plan(clf.with_weights(eye), LOOP)
    batch = Feed(clf, image_set(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), list(clf.class_names)), LOOP, 0)
    batch = batch.batch([0, 1, 2, 3], 0)

    class Perfect:
        def encode_image(self, x: torch.Tensor) -> torch.Tensor:
            return eye[batch.y].repeat(len(x) // 4, 1)

    total, figures = plan.loss(Perfect(), batch, batch.x)  # type: ignore[arg-type]
    assert float(figures["align"]) == pytest.approx(align, abs=1e-6)
    assert float(figures["smooth"]) == pytest.approx(-1)
    assert float(total) == pytest.approx(align - 1, abs=1e-6)
    doubled, _ = LAAT(eps=0, anchors="text", tau=1, smooth=2).plan(clf.with_weights(eye), LOOP).loss(
        Perfect(), batch, batch.x  # type: ignore[arg-type]
    )  # fmt: skip
    assert float(doubled) == pytest.approx(align - 2, abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [{"tau": 1}, {"smooth": 0.5, "tau": 0.2}, {"anchors": "text", "tau": 1, "smooth": 0}],
    ids=["plain", "tau", "texts"],
)
def test_training_equals_the_literal_transcription(problem: Any, fields: dict[str, Any]) -> None:
    clf, data = problem
    method = LAAT(eps="4/255", alpha="1/255", steps=2, **fields)
    got = finetuned(clf, method.fit(clf, data, loop=LOOP, seed=0)).vlm.image.state_dict()
    feed, eps, batches = Feed(clf, data, LOOP, 0), 4 / 255, []
    for step in range(LOOP.steps):
        (batch,) = feed.parts(step)
        batches.append((batch.x, batch.y, eps * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)))
    made = clf.weights if method.anchors == "text" else laat_literal.expanded(clf.weights, clf.weights)
    want = laat_literal.train(
        clf.vlm.image, batches, made, method.tau, method.smooth, clf.vlm.get_buffer("mean"),
        clf.vlm.get_buffer("std"), eps=eps, alpha=1 / 255, steps=2, lr=1e-2, drop_at=2, momentum=0.9, decay=0.01,
    )  # fmt: skip
    before = clf.vlm.image.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=2e-6)
    assert min(float((want[k] - before[k]).abs().max()) for k in want if k != "origin") > 1e-4


@pytest.mark.parametrize(("steps", "smooth"), [(2, 1.0), (7, 1.0), (2, 0.0)])
def test_cost_of_a_step_is_the_minimum(problem: Any, steps: int, smooth: float) -> None:
    """Per image: steps (F + B), and one forward of clean and attacked image each, with a backward to the weights."""
    clf, data = problem
    images = LOOP.steps * LOOP.batch_size
    with clf.vlm.counting() as count:
        LAAT(steps=steps, smooth=smooth).fit(clf, data, loop=LOOP)
    assert count.forwards == count.backwards == (steps + 1 + (smooth > 0)) * images
    assert count.texts == 0


def test_the_attack_raises_the_cross_entropy_with_anchors(problem: Any) -> None:
    """Not the smoothness, not the class weights; inside ball and box; no parameter gradient."""
    clf, data = problem
    method = LAAT(eps="4/255", alpha="4/255", steps=1, start="zero", tau=1)
    plan = method.plan(clf, LOOP)
    batch = Feed(clf, data, LOOP, 0).batch(list(range(6)), 0)
    adv = plan.attack(clf.vlm, batch)
    made = laat_literal.expanded(clf.weights, clf.weights).float()
    leaf = batch.x.clone().requires_grad_(True)
    value = F.cross_entropy(clf.vlm.encode_image(leaf) @ made.T, batch.y, reduction="sum")
    (grad,) = torch.autograd.grad(value, leaf)
    want = (batch.x + 4 / 255 * grad.sign()).clamp(0, 1)
    assert float(((adv - want).abs() < 1e-6).float().mean()) > 0.99
    state = {k: v.clone() for k, v in clf.vlm.state_dict().items() if k.startswith("image.")}
    own = clf.vlm.with_state(state)
    own.image.requires_grad_(False)
    adv = LAAT(eps="4/255", alpha="1/255", steps=7).plan(clf, LOOP).attack(own, batch)
    assert all(p.grad is None and not p.requires_grad for p in own.image.parameters())
    assert float((adv - batch.x).abs().max()) <= 4 / 255 + 1e-6
    assert float(adv.min()) >= 0 <= 1 - float(adv.max())


def test_only_the_image_tower_learns_and_anchors_stay(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    weights = clf.weights.clone()
    loop = replace(LOOP, steps=6, train="last-1", hold_out=8, log_every=1)
    state = LAAT().fit(clf, data, loop=loop, session=Session(tmp_path))
    tensors = {k for k in state if k not in (BASE, RECIPE, CENTRE, WIDEST)}
    assert tensors == {"image.tower.out.weight", "image.tower.out.bias"}, "frozen layers stay frozen"
    assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
    assert torch.equal(clf.weights, weights)
    frame = frame_of(weights)
    assert torch.equal(state[CENTRE], frame.centre)
    assert float(state[WIDEST]) == frame.widest
    fitted = LAAT().apply(clf, state)
    torch.testing.assert_close(fitted.weights.double(), anchors(weights, frame), rtol=0, atol=1e-6)
    assert fitted.vlm.text is clf.vlm.text
    assert fitted.scale == clf.scale
    shown = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"val_clean", "val_robust", "val_align"} <= shown[0].keys(), "accuracy with the anchors before training"
    assert {"align", "smooth", "robust_acc"} <= shown[1].keys()
    held = Feed(clf, data, loop, 0)
    (batch,) = held.validation()
    right = ((clf.vlm.encode_image(batch.x) @ fitted.weights.T).argmax(dim=1) == batch.y).float().mean()
    assert shown[0]["val_clean"] == pytest.approx(100 * float(right), abs=0.01)


def test_other_classes_are_expanded_by_the_training_classes(problem: Any) -> None:
    clf, data = problem
    state = LAAT().fit(clf, data, loop=LOOP)
    other = ZeroShot.build(clf.vlm, ["fox", "gnu", "ant"])
    fitted = LAAT().apply(other, state)
    want = laat_literal.expanded(clf.weights, other.weights)
    torch.testing.assert_close(fitted.weights.double(), want, rtol=0, atol=1e-6)
    assert not torch.allclose(fitted.weights.double(), laat_literal.expanded(other.weights, other.weights), atol=1e-2)


def test_mixing_goes_from_the_clean_model_to_the_fitted_one(problem: Any) -> None:
    clf, data = problem
    state, x = LAAT().fit(clf, data, loop=LOOP), data.read(range(5))
    with torch.no_grad():
        torch.testing.assert_close(LAAT(mix_alpha=0).apply(clf, state)(x), clf(x), rtol=0, atol=1e-4)
    half = LAAT(mix_alpha=0.5).apply(clf, state)
    frame = frame_of(clf.weights)
    torch.testing.assert_close(half.weights.double(), anchors(clf.weights, frame, share=0.5), rtol=0, atol=1e-6)


def test_states_without_anchors_are_refused(problem: Any) -> None:
    clf, data = problem
    state = LAAT().fit(clf, data, loop=LOOP)
    with pytest.raises(ValueError, match="the state of laat holds no anchors; fit it again"):
        LAAT().apply(clf, {k: v for k, v in state.items() if k != CENTRE})
    with pytest.raises(ValueError, match="laat must be fitted first; run ironclip fit 'laat'"):
        LAAT().apply(clf)


def test_a_pretrained_tower_gains_robustness(problem: Any) -> None:
    clf, data = problem
    method = LAAT(eps="4/255", alpha="2/255", steps=5)
    loop = replace(LOOP, steps=60, lr=3e-3, optimizer="adamw", drops=(), weight_decay=0.0)
    fitted = method.apply(clf, method.fit(clf, data, loop=loop))
    attack = ironclip.build("PGD(eps=4/255, steps=20, loss=margin)")
    x, y, held = data.read(range(40)), torch.tensor(data.labels), {}
    for name, model in (("before", clf), ("after", fitted)):
        result = attack(model, x, y, rng=SampleRNG.of(5, data.ids))
        held[name] = 1 - float(result.success.float().mean())
    assert held["after"] > held["before"] + 0.3, held


def test_a_network_from_nothing_learns_the_anchors() -> None:
    """The published setting, small: an untrained network in the space of given texts."""
    network = Conv4(16, 16).eval()
    start(network)
    vlm = VLM.wrap(network, words(16), 16, (0.5,) * 3, (0.25,) * 3, scale=20.0, name="conv4").freeze()
    clf = ZeroShot.build(vlm, CLASSES[:3])
    y = torch.arange(24) % 3
    x = 0.3 + 0.3 * torch.eye(3)[y].view(24, 3, 1, 1) + 0.1 * toy_images(24, size=16)
    method = LAAT(preset="reference", steps=2)
    state = method.fit(clf, image_set(x, y, list(CLASSES[:3])), loop=method.loop().resized(steps=80, batch_size=8))
    fitted = method.apply(clf, state)
    attack = ironclip.build("PGD(eps=8/255, steps=10, loss=margin)")
    with torch.no_grad():
        before = (vlm.encode_image(x) * fitted.weights[y]).sum(dim=1).mean()
        after = (fitted.vlm.encode_image(x) * fitted.weights[y]).sum(dim=1).mean()
    assert float(before) < 0.3
    assert float(after) > 0.8
    assert not bool(attack(fitted, x, y, rng=SampleRNG.rows(24)).success.any())


def test_presets() -> None:
    method = LAAT(preset="reference")
    assert (method.eps, method.alpha, method.steps) == (Fraction(8, 255), Fraction(2, 255), 7)
    assert (method.tau, method.smooth, method.anchors) == (1, 1, "expanded")
    loop = method.loop()
    assert (loop.optimizer, loop.momentum, loop.weight_decay, loop.lr, loop.batch_size) == ("sgd", 0.9, 5e-4, 0.05, 128)
    rates = [loop.rate(round(share * loop.steps)) for share in (0.0, 0.59, 0.6, 0.8, 0.99)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.005]), "the code's second drop is never reached"
    two = LAAT(preset="intended").loop()
    assert [two.rate(round(s * two.steps)) for s in (0.59, 0.6, 0.8)] == pytest.approx([0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": 0}, "tau must be positive, got 0.0; write 0.07, or 1 as published"),
        ({"smooth": -1}, "smooth must not be negative, got -1.0; write 1"),
        ({"anchors": "wide"}, "unknown anchors 'wide'"),
        ({"eps": 8}, r"eps must be in \(0, 1\], got 8; write 8/255"),
        ({"recipe": "ours"}, "unknown recipe 'ours'"),
        ({"mix_alpha": -0.1}, r"mix_alpha must lie in \[0, 1\], got -0.1"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAAT(**fields)


def test_bad_training_input_is_refused(problem: Any) -> None:
    clf, data = problem
    same = clf.with_weights(clf.weights[:1].expand(5, -1))

    class Mislabelled:
        name, ids, manifest_hash = data.name, data.ids, data.manifest_hash
        class_names, labels, __len__ = data.class_names, data.labels, lambda self: len(data)

        def batches(self, n: int, rows: Any = None) -> Any:
            return ((x, 9 + torch.arange(len(y)) % 5, ids) for x, y, ids in made(n, rows))

    made = data.batches
    cases: list[tuple[ZeroShot, Any, str]] = [
        (clf, replace(data, read=lambda rows: data.read(rows) * 3), r"images must lie in \[0, 1\]"),
        (clf, Mislabelled(), r"labels must lie in 0\.\.4 for 5 classes, got 9\.\.13"),
        (same, data, "all alike: nothing to expand"),
        (replace(clf, weights=torch.eye(5)), data, "anchors have 5 dimensions, toy-conv-problem has 16"),
        (replace(clf, weights=clf.weights * torch.tensor([[0.0], *[[1.0]] * 4])), data, "class 0 has length 0"),
        (replace(clf, weights=clf.weights * math.nan), data, "NaN or infinity"),
    ]
    for model, source, message in cases:
        with pytest.raises(ValueError, match=message):
            LAAT().fit(model, source, loop=LOOP)
