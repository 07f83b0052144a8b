"""TGA-ZSR by hand, against the fp64 transcription with maps formed pixel by pixel, and what a step may cost."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from reference import tga_zsr_literal
from toys import CLASSES, toy_problem

import ironclip
from ironclip.core.loop import Loop
from ironclip.core.parts import Parts
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._train import BASE, RECIPE, finetuned
from ironclip.defenses.tecoa import TeCoA
from ironclip.defenses.tga_zsr import TGAZSR
from ironclip.models.hf import wrap_clip
from ironclip.training.feed import Batch, Feed
from ironclip.training.finetune import Session
from ironclip.training.student import Student

LOOP = Loop(steps=3, batch_size=8, lr=1e-2, optimizer="sgd", warmup=1, hold_out=0)
LONG = replace(LOOP, steps=6)
"""Long enough that images of the set below come twice: their maps are remembered."""


@pytest.fixture(scope="module", params=["conv", "attention"])
def problem(request: pytest.FixtureRequest) -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40, tower=request.param)
    return clf, image_set(x, y, list(CLASSES))


def first_batch(clf: ZeroShot, data: ImageSet, method: TGAZSR, n: int = 6) -> tuple[Any, Batch]:
    plan = method.plan(clf, LOOP)
    batch = Feed(clf, data, LOOP, 0).batch(list(range(n)), 0)
    return plan, replace(batch, cached=plan.recall(batch))


def gradients(vlm: VLM, value: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(value, list(vlm.image.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.fixture
def student(problem: Any) -> VLM:
    """A copy of the model with weights that differ from it."""
    clf, _ = problem
    state = {k: 1.1 * v for k, v in clf.vlm.state_dict().items() if k.startswith("image.") and "origin" not in k}
    vlm = clf.vlm.with_state(state)
    vlm.image.requires_grad_(True)
    return vlm


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"normalise": "token", "refinement": 0.3, "constraint": 0.2},
        {"normalise": "none", "extremes": "pixels", "distance": "l1", "refinement": 2.0, "constraint": 1.0},
        {"distance": "cos", "refinement": 2.0, "constraint": 0.0},
    ],
)
def test_fine_tuning_equals_the_literal_transcription(problem: Any, fields: dict[str, Any]) -> None:
    """Without sign steps, where rounding tells the two apart: the attack is TeCoA's, see below."""
    clf, data = problem
    method = TGAZSR(eps="4/255", steps=0, size=6, **fields)
    got = finetuned(clf, method.fit(clf, data, loop=LOOP, seed=2)).vlm.image.state_dict()
    feed, eps, batches = Feed(clf, data, LOOP, 2), 4 / 255, []
    for step in range(LOOP.steps):
        (batch,) = feed.parts(step)
        batches.append((batch.x, batch.y, eps * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)))
    mean, std = clf.vlm.get_buffer("mean"), clf.vlm.get_buffer("std")
    want = tga_zsr_literal.train(
        clf.vlm.image, batches, clf.weights, clf.scale, mean, std,
        eps=eps, alpha=1 / 255, steps=0, lr=1e-2, warmup=1, momentum=0.9, size=6, kind=method.distance,
        refinement=method.refinement, constraint=method.constraint, normalise=method.normalise,
        extremes=method.extremes,
    )  # fmt: skip
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=5e-6)
    plain = TeCoA(eps="4/255", steps=0).fit(clf, data, loop=LOOP, seed=2)
    keys = [k for k in plain if k.startswith("image.")]
    assert max(float((plain[k] - got[k.removeprefix("image.")]).abs().max()) for k in keys) > 1e-3


def test_without_penalties_it_is_tecoa_to_the_bit(problem: Any) -> None:
    clf, data = problem
    own = TGAZSR(refinement=0, constraint=0).fit(clf, data, loop=LONG, seed=1)
    other = TeCoA().fit(clf, data, loop=LONG, seed=1)
    for key in {*own, *other} - {RECIPE}:
        assert torch.equal(own[key], other[key]), key


@pytest.mark.parametrize(
    ("fields", "forwards"),
    [
        ({}, 4),
        ({"steps": 5}, 7),
        ({"constraint": 0}, 3),
        ({"refinement": 0}, 4),
        ({"refinement": 0, "constraint": 0}, 3),
    ],
)
def test_cost_of_a_step_is_the_minimum(problem: Any, fields: dict[str, Any], forwards: int) -> None:
    """Two attack steps 2 (F + B), then x_adv and x forward and backward to the weights: 4 F + 3 F + 3 F."""
    clf, data = problem
    images = LONG.steps * LONG.batch_size
    with clf.vlm.counting() as count:
        TGAZSR(**fields).fit(clf, data, loop=LONG)
    guided = "refinement" not in fields or "constraint" not in fields
    assert count.forwards == forwards * images + (len(data) if guided else 0), "maps of the clean model once an image"
    assert count.backwards == forwards * images
    assert count.texts == 0
    with clf.vlm.counting() as count:
        TGAZSR(**fields).fit(clf, data, loop=LOOP)
    assert count.forwards == (forwards + guided) * LOOP.steps * LOOP.batch_size, "seen once: made in passing"


def test_at_the_start_the_constraint_is_zero_without_gradient(problem: Any) -> None:
    clf, data = problem
    state = {k: v.clone() for k, v in clf.vlm.state_dict().items() if k.startswith("image.")}
    student = clf.vlm.with_state(state)
    student.image.requires_grad_(True)
    plan, batch = first_batch(clf, data, TGAZSR(refinement=0))
    total, figures = plan.loss(student, batch, (batch.x + 0.01).clamp(0, 1))
    assert float(figures["constraint"].detach()) == 0
    want = F.cross_entropy(clf.head(student.encode_image((batch.x + 0.01).clamp(0, 1))), batch.y)
    torch.testing.assert_close(gradients(student, total), gradients(student, want), rtol=1e-4, atol=1e-6)


def test_without_a_perturbation_both_penalties_are_one(problem: Any, student: VLM) -> None:
    clf, data = problem
    plan, batch = first_batch(clf, data, TGAZSR())
    _, figures = plan.loss(student, batch, batch.x)
    assert float(figures["constraint"].detach()) > 0
    torch.testing.assert_close(figures["refinement"], figures["constraint"])


def test_each_penalty_reaches_its_own_images(problem: Any, student: VLM) -> None:
    """The loss is linear in both weights; without a weight its term and its gradient are gone."""
    clf, data = problem
    x_adv = (data.read(range(6)) + 0.02).clamp(0, 1)
    found = {}
    for refinement, constraint in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)):
        plan, batch = first_batch(clf, data, TGAZSR(refinement=refinement, constraint=constraint))
        value, figures = plan.loss(student, batch, x_adv)
        assert ("refinement" in figures, "constraint" in figures) == (refinement > 0, constraint > 0)
        want = figures["ce"] + sum(w * figures[k] for k, w in (("refinement", refinement), ("constraint", constraint))
                                   if w)  # fmt: skip
        torch.testing.assert_close(value, want)
        found[refinement, constraint] = gradients(student, value)
    none = found[0.0, 0.0]
    together = (found[2.0, 0.0] - none) + (found[0.0, 3.0] - none)
    torch.testing.assert_close(found[2.0, 3.0] - none, together, rtol=1e-3, atol=1e-5)
    assert float((found[2.0, 0.0] - none).norm()) > 1e-3 < float((found[0.0, 3.0] - none).norm())


def test_maps_of_the_frozen_model_depend_on_clean_images_only(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    method = TGAZSR(eps="8/255", alpha="8/255")
    plan, batch = first_batch(clf, data, method, n=len(data))
    run = Student(plan, data, LONG, 0)
    run.begin(None, "", True)
    assert run.feed.memory["map"].shape == (40, 4)
    torch.testing.assert_close(run.feed.memory["map"], batch.cached["map"], rtol=1e-4, atol=1e-4)
    kept = batch.cached["map"].clone()
    plan.loss(run.vlm, batch, plan.attack(run.vlm, batch))
    assert torch.equal(batch.cached["map"], kept)
    assert not batch.cached["map"].requires_grad
    state = method.fit(clf, data, loop=LONG, session=Session(tmp_path))
    assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in clf.vlm.parameters())
    assert all(k in (BASE, RECIPE) or k.startswith("image.") for k in state)
    fitted = method.apply(clf, state)
    assert fitted.vlm.text is clf.vlm.text
    assert torch.equal(fitted.weights, clf.weights)
    shown = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"ce", "refinement", "constraint", "robust_acc"} <= shown[-1].keys()


def test_remembered_maps_of_another_model_or_other_pixels_are_refused(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    TGAZSR().fit(clf, data, loop=LONG, session=Session(tmp_path))
    assert (tmp_path / "memory.safetensors").exists()
    other, _, _ = toy_problem(40, seed=3)
    with pytest.raises(ValueError, match=r"holds a run with other settings: .*model.weights"):
        TGAZSR().fit(other, data, loop=LONG, session=Session(tmp_path))
    with pytest.raises(ValueError, match=r"holds a run with other settings: data.preprocessing: none there, crop now"):
        TGAZSR().fit(clf, replace(data, recipe="crop"), loop=LONG, session=Session(tmp_path))
    with pytest.raises(ValueError, match=r"holds a run with other settings: .*recipe"):
        TGAZSR(normalise="token").fit(clf, data, loop=LONG, session=Session(tmp_path))


def test_the_attack_raises_the_cross_entropy_alone_and_leaks_nothing(problem: Any) -> None:
    clf, data = problem
    plan, batch = first_batch(clf, data, TGAZSR(eps="4/255"))
    plain = TeCoA(eps="4/255").plan(clf, LOOP)
    adv = plan.attack(clf.vlm, batch)
    assert torch.equal(adv, plain.attack(clf.vlm, batch))
    assert not adv.requires_grad
    assert float((adv - batch.x).abs().max()) <= 4 / 255 + 1e-6
    state = {k: v.clone() for k, v in clf.vlm.state_dict().items() if k.startswith("image.")}
    own = clf.vlm.with_state(state)
    own.image.requires_grad_(True)
    plan.attack(own, batch)
    assert all(p.grad is None for p in own.image.parameters())


def test_tokens_begin_with_the_image_feature(problem: Any) -> None:
    clf, data = problem
    x = data.read(range(5))
    with torch.no_grad():
        first = F.normalize(clf.vlm.image_tokens(x)[:, 0], dim=-1)
        torch.testing.assert_close(first, clf.vlm.encode_image(x), rtol=0, atol=1e-6)


def test_patches_of_a_transformer_and_of_a_convolutional_map() -> None:
    """A small CLIP: its 16 patches; a map of the true class is 1 where a patch is that class's own text."""
    vlm = wrap_clip(clips.small_clip(), clips.byte_tokenizer(), "small").freeze()
    clf = ZeroShot.build(vlm, ["cat", "dog", "ox"])
    data = image_set(clips.images(8), torch.arange(8) % 3, ["cat", "dog", "ox"])
    method = TGAZSR(steps=1)
    state = method.fit(clf, data, loop=replace(LOOP, steps=2, batch_size=4))
    assert any(k.startswith("image.visual_projection") for k in state)
    tokens = vlm.image_tokens(clips.images(2)).detach().clone()
    tokens[:, 7] = 5 * clf.weights[1]
    maps = method.maps(tokens, clf.weights[[1, 1]])
    assert maps.shape == (2, 16)
    assert maps.argmax(dim=1).tolist() == [6, 6]


def test_towers_without_a_square_grid_are_refused(problem: Any) -> None:
    clf, _ = problem
    bare = VLM.wrap(lambda x: x.flatten(1)[:, :16], clf.vlm.text, 8, name="bare").freeze()
    with pytest.raises(ValueError, match="bare exposes no patch tokens; use an hf:, open_clip: or embedded model"):
        TGAZSR().plan(clf.with_vlm(bare), LOOP)
    TGAZSR(refinement=0, constraint=0).plan(clf.with_vlm(bare), LOOP)
    wide = clf.vlm.with_state({})
    wide.parts = Parts(patch_grid=(1, 4))
    with pytest.raises(ValueError, match="attention maps need a square grid, got 1 x 4 patches"):
        TGAZSR().plan(clf.with_vlm(wide), LOOP)


def test_presets() -> None:
    method = TGAZSR(preset="reference")
    assert (method.eps, method.alpha, method.steps) == (Fraction(1, 255), Fraction(1, 255), 2)
    assert (method.refinement, method.constraint, method.size) == (0.08, 0.05, 224)
    assert (method.normalise, method.extremes, method.distance) == ("token", "patches", "l2")
    loop = method.loop()
    assert (loop.optimizer, loop.momentum, loop.weight_decay, loop.lr) == ("sgd", 0.9, 0, 1e-4)
    assert (loop.batch_size, loop.steps, loop.warmup) == (128, 7820, 1000)
    assert TGAZSR(preset="aa-table").constraint == 0.009
    assert type(ironclip.build("TGAZSR(refinement=0.1)")) is TGAZSR


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refinement": -0.1}, "refinement must not be negative, got -0.1; write 0.05"),
        ({"constraint": -1}, "constraint must not be negative, got -1.0; write 0.05"),
        ({"distance": "l3"}, "unknown distance 'l3'"),
        ({"normalise": "batch"}, "unknown normalise 'batch'"),
        ({"extremes": "rows"}, "unknown extremes 'rows'"),
        ({"size": 0}, "size must be 1 or more, got 0; write 224"),
        ({"eps": 4}, r"eps must be in \(0, 1\], got 4; write 4/255"),
        ({"alpha": 0}, "alpha must be positive, got 0; write 1/255"),
        ({"recipe": "ours"}, "unknown recipe 'ours'"),
        ({"mix_alpha": 1.5}, r"mix_alpha must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TGAZSR(**fields)


def test_labels_are_needed(problem: Any) -> None:
    clf, data = problem

    class Unlabelled:
        name, ids, manifest_hash, class_names = data.name, data.ids, data.manifest_hash, data.class_names
        batches, __len__ = data.batches, lambda self: len(data)

    with pytest.raises(ValueError, match="toys has no labels, and this method learns from labels"):
        TGAZSR().fit(clf, Unlabelled(), loop=LOOP)
