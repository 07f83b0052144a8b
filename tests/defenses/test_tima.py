"""TIMA by hand, against the fp64 transcription, where gradients may go and what a step may cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clips import byte_tokenizer, images, small_clip
from fits import image_set, labelled
from reference import tima_literal
from safetensors.torch import load_file, save_file
from toys import CLASSES, generator, toy_problem

import ironclip
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._text_geometry import (
    consistency_loss,
    divergence,
    energy,
    margin_rows,
    with_margin,
)
from ironclip.defenses._tima import Terms, moved
from ironclip.defenses._train import finetuned
from ironclip.defenses.tecoa import TeCoA
from ironclip.defenses.tima import TIMA
from ironclip.models.hf import wrap_clip
from ironclip.training.feed import Batch, Feed
from ironclip.training.select import student_of, with_extra

LOOP = Loop(steps=3, batch_size=8, lr=1e-2, optimizer="sgd", hold_out=0)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


@pytest.fixture(scope="module")
def clip() -> ZeroShot:
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    return ZeroShot.build(vlm, ["cat", "dog", "owl"], ["a {}"])


def circle(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


SIMPLEX = F.normalize(torch.eye(4) - 0.25, dim=1)


@pytest.mark.parametrize(
    ("text", "stabilised", "raw"),
    [
        (torch.eye(2), 1 / 3, 1 / 2),
        (circle(0, 120, 240), 1 / 4, 1 / 3),
        (SIMPLEX, 3 / 11, 3 / 8),
    ],
    ids=["orthogonal", "triangle", "simplex"],
)
def test_energy_by_hand(text: torch.Tensor, stabilised: float, raw: float) -> None:
    for kind, want in (("stabilised", stabilised), ("raw", raw)):
        assert float(energy(text, 2.0, kind)) == pytest.approx(want, rel=1e-5)
        literal = tima_literal.energy(text.double(), 2.0, kind == "raw")
        assert float(literal) == pytest.approx(want, rel=1e-6)


def test_energy_of_equal_rows() -> None:
    twice = torch.tensor([[0.6, 0.8], [0.6, 0.8]], requires_grad=True)
    for power in (1.0, 2.0, 3.0):
        value = energy(twice, power)
        assert float(value.detach()) == pytest.approx(1.0, abs=1e-5)
        (grad,) = torch.autograd.grad(value, twice)
        assert bool(torch.isfinite(grad).all())
    with pytest.raises(ValueError, match="energy=raw is infinite: two class texts coincide; write energy=stabilised"):
        energy(twice, 2.0, "raw")
    with pytest.raises(ValueError, match="at least 2 class texts, got 1"):
        energy(torch.eye(2)[:1])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("kind", ["stabilised", "raw"])
def test_energy_from_the_gram_matrix_equals_pairs(power: float, kind: str) -> None:
    """Also in blocks of rows, with the same gradient; turning the space or renaming the classes changes nothing."""
    text = F.normalize(torch.randn(11, 6, generator=generator(0)), dim=1).requires_grad_(True)
    want = tima_literal.energy(text.double(), power, kind == "raw")
    (slope,) = torch.autograd.grad(want, text)
    for block in (3, 100):
        got = energy(text, power, kind, block=block)
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=0, check_dtype=False)
        (grad,) = torch.autograd.grad(got, text)
        torch.testing.assert_close(grad, slope, rtol=1e-3, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(1))).Q
    for other in (text @ turn, text[torch.randperm(11, generator=generator(2))]):
        torch.testing.assert_close(energy(other, power, kind), got, rtol=1e-4, atol=0)


def test_energy_falls_downhill_and_rests_at_the_simplex() -> None:
    close = circle(0, 60).requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(close), close)
    after = F.normalize(close.detach() - 0.1 * grad, dim=1)
    assert float(after[0] @ after[1]) < 0.5
    rest = SIMPLEX.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(rest), rest)
    tangential = grad - (grad * rest).sum(dim=1, keepdim=True) * rest
    assert float(tangential.detach().abs().max()) < 1e-6


def test_margin_loss_by_hand() -> None:
    cosines, y = torch.tensor([[0.6, 0.8]]), torch.tensor([0])
    cases = [(1.0, 0.0, 0.798139), (1.0, 0.2, 0.913015), (100.0, 0.2, 40.0)]
    for scale, m, want in cases:
        z = with_margin(cosines, torch.tensor([[0.0, m]]), scale, "cosine")
        assert float(F.cross_entropy(z, y)) == pytest.approx(want, abs=2e-5)
    torch.testing.assert_close(
        with_margin(cosines, torch.tensor([[0.0, 20.0]]), 100.0, "logit"),
        with_margin(cosines, torch.tensor([[0.0, 0.2]]), 100.0, "cosine"),
    )
    turned = with_margin(torch.tensor([[0.6, 0.5]]), torch.tensor([[0.0, math.radians(30)]]), 2.0, "angle")
    torch.testing.assert_close(turned, torch.tensor([[1.2, 2 * math.cos(math.radians(30))]]))
    over = with_margin(torch.tensor([[0.6, 0.9]]), torch.tensor([[0.0, 3.0]]), 1.0, "angle")
    assert float(over[0, 1]) == 1.0, "no further than the text itself"


@pytest.mark.parametrize("where", ["cosine", "logit", "angle"])
def test_margin_loss_grows_with_the_margin(where: str) -> None:
    text = F.normalize(torch.randn(6, 4, generator=generator(3)), dim=1)
    u, y = F.normalize(torch.randn(8, 4, generator=generator(4)), dim=1), torch.arange(8) % 6
    losses = [
        F.cross_entropy(with_margin(u @ text.T, margin_rows("distance", text, y, m), 20.0, where), y, reduction="none")
        for m in (0.0, 0.1, 0.3, 0.9)
    ]
    assert all(bool((b >= a - 1e-5).all()) for a, b in itertools.pairwise(losses))


def test_margin_matrices() -> None:
    text, y = F.normalize(torch.randn(7, 5, generator=generator(5)), dim=1).requires_grad_(True), torch.arange(7)
    tables = {kind: margin_rows(kind, text, y, 0.3, 0.1, text) for kind in ("distance", "similarity", "constant")}
    for table in tables.values():
        assert not table.requires_grad
        torch.testing.assert_close(table, table.T)
        assert float(table.diagonal().abs().max()) == 0
        assert float(table.min()) >= 0
        assert float(table.max()) <= 0.3 + 1e-6
    pairs = torch.triu_indices(7, 7, 1).unbind()
    ranks = [tables[kind][pairs].argsort().argsort() for kind in ("distance", "similarity")]
    assert torch.equal(ranks[0], 20 - ranks[1]), "near pairs get the small margin, or the large one"
    assert float(tables["distance"].max()) == pytest.approx(0.3)
    literal = torch.tensor(tima_literal.margins(text.double(), 0.3))
    torch.testing.assert_close(tables["distance"], literal, rtol=1e-4, atol=1e-6)
    offset = margin_rows("asam", text.flip(0), y, 0.3, 0.1, text)
    off = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(offset[off], tables["similarity"][off] + 0.1)


def test_distillation_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert float(divergence(p, q)) == pytest.approx(forward, abs=1e-6)
    assert float(divergence(p, q, reverse=True)) == pytest.approx(backward, abs=1e-6)


def test_order_of_the_texts() -> None:
    """Nothing to pay where all cosines are mapped by a rising line; two where the order is turned round."""
    text = circle(0, 30, 100)
    assert float(consistency_loss(text, text)) == pytest.approx(0.0, abs=1e-6)
    gram = (text @ text.T)[tuple(torch.triu_indices(3, 3, 1))]
    other = gram.mean() - (gram - gram.mean()) / 2
    g = torch.eye(3)
    g[0, 1] = g[1, 0] = other[0]
    g[0, 2] = g[2, 0] = other[1]
    g[1, 2] = g[2, 1] = other[2]
    values, vectors = torch.linalg.eigh(g)
    assert float(values.min()) > 0
    turned = vectors * values.sqrt()
    assert float(consistency_loss(turned, F.pad(text, (0, 1)))) == pytest.approx(2.0, abs=1e-4)
    with pytest.raises(ValueError, match="needs at least 3 classes, got 2; write w_s=0"):
        consistency_loss(circle(0, 90), circle(0, 90))


def test_training_equals_the_literal_transcription(problem: Any) -> None:
    """At a mild temperature: where float32 rounds the probability of the label to 1 it loses the attack's direction."""
    clf, data = replace(problem[0], scale=4.0), problem[1]
    method = TIMA(eps="4/255", alpha="1/255", steps=3, text_lr=0.5, m=0.2)
    state = method.fit(clf, data, loop=LOOP, seed=2)
    feed, batches = Feed(clf, data, LOOP, 2), []
    for step in range(LOOP.steps):
        (batch,) = feed.parts(step)
        start = 4 / 255 * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)
        batches.append((batch.x, batch.y.tolist(), start))
    tower, a = tima_literal.train(
        clf.vlm.image, batches, clf.weights, clf.scale, clf.vlm.get_buffer("mean"), clf.vlm.get_buffer("std"),
        eps=4 / 255, alpha=1 / 255, steps=3, lr=LOOP.lr, text_lr=0.5, momentum=0.9, m=0.2,
    )  # fmt: skip
    got, before = finetuned(clf, state).vlm.image.state_dict(), clf.vlm.image.state_dict()
    for name, value in tower.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(state["extra.map"].double(), a, rtol=1e-3, atol=1e-6)
    assert min(float((tower[k] - before[k]).abs().max()) for k in tower if k != "origin") > 1e-3
    assert float(a.abs().max()) > 1e-3, "the steps are large enough to see"


def test_without_its_terms_it_is_tecoa_to_the_bit(problem: Any) -> None:
    clf, data = problem
    for loop in (LOOP, replace(LOOP, optimizer="adamw", lr=1e-3, clip_norm=1.0, weight_decay=0.1)):
        bare = TIMA(m=0, w_t=0, w_e=0, w_i=0).fit(clf, data, loop=loop, seed=3)
        tecoa = TeCoA().fit(clf, data, loop=loop, seed=3)
        assert all(torch.equal(bare[k], tecoa[k]) for k in tecoa if k.startswith("image."))
        assert float(bare["extra.map"].abs().max()) == 0
        x = data.read(range(6))
        with torch.no_grad():
            assert torch.equal(TIMA(m=0, w_t=0, w_e=0, w_i=0).apply(clf, bare)(x), TeCoA().apply(clf, tecoa)(x))


def one_step(method: TIMA, clf: ZeroShot, data: ImageSet, seed: int = 0) -> tuple[Any, Any, Batch]:
    """The plan, a student with all its parameters and a batch that is ready for attack and loss."""
    plan = method.plan(clf, LOOP)
    student, chosen = student_of(plan.clf.vlm, plan.towers, LOOP, seed)
    chosen |= with_extra(student, plan.extra)
    batch = Feed(plan.clf, data, LOOP, seed).batch([0, 1, 2, 3, 4], 0)
    cached = dict(plan.remember(batch.x)) if plan.remember else {}
    assert plan.prepare is not None
    return plan, student, replace(batch, cached={**cached, **plan.prepare(student, batch)})


@pytest.mark.parametrize("text", ["map", "table"])
@pytest.mark.parametrize("rows", ["unit", "free"])
def test_at_the_start_texts_are_the_original_ones(text: str, rows: str, problem: Any) -> None:
    """T = T0 exactly; no distillation loss and no gradient from it on either side."""
    clf, data = problem
    plan, student, batch = one_step(TIMA(text=text, rows=rows), clf, data)
    assert torch.equal(batch.cached["text"], clf.weights)
    terms = Terms(TIMA(text=text, rows=rows, w_e=0), clf)
    value, told = terms.of_text(batch.cached["text"], batch)
    assert float(told["iakd"].detach()) == pytest.approx(0.0, abs=1e-6)
    (grad,) = torch.autograd.grad(value, student.get_parameter(f"extra.{text}"))
    assert float(grad.abs().max()) < 1e-5
    _, told = terms.of_image(student.encode_image(batch.x), batch.x, batch.cached["text"], batch)
    assert float(told["takd"].detach()) == pytest.approx(0.0, abs=1e-6)
    assert plan.logits is not None
    with torch.no_grad():
        torch.testing.assert_close(plan.logits(student, batch.x), clf(batch.x))


@pytest.mark.parametrize("distill", ["kl", "reverse_kl", "l2", "cosine"])
@pytest.mark.parametrize("teacher", ["clean", "adversarial"])
def test_where_gradients_may_go(distill: str, teacher: str, problem: Any) -> None:
    clf, data = problem
    method = TIMA(distill=distill, teacher=teacher)
    _, student, batch = one_step(method, clf, data)
    own, terms = student.get_parameter("extra.map"), Terms(method, clf)
    with torch.no_grad():
        own.add_(0.1 * torch.randn(own.shape, generator=generator(1)))
        student.image.tower.out.bias.add_(0.3)
    tower = list(student.image.parameters())
    text = terms.texts(student)
    assert text is not batch.cached["text"]
    _, told = terms.of_text(text, batch)
    by_tower = torch.autograd.grad(told["iakd"], [own, *tower], allow_unused=True)
    assert float(told["iakd"].detach()) > 1e-4
    assert by_tower[0] is not None
    assert float(by_tower[0].abs().max()) > 0
    assert all(g is None for g in by_tower[1:])
    text = terms.texts(student)
    _, told = terms.of_image(student.encode_image(batch.x), batch.x, text, batch)
    for name in ("takd", "tam"):
        grads = torch.autograd.grad(told[name], [own, *tower], allow_unused=True, retain_graph=True)
        assert grads[0] is None, "no gradient into the texts"
        assert all(g is not None for g in grads[1:])
    both = Terms(replace(method, margin_to_text=True), clf)
    _, told = both.of_image(student.encode_image(batch.x), batch.x, terms.texts(student), batch)
    (grad,) = torch.autograd.grad(told["tam"], own)
    assert float(grad.abs().max()) > 0
    assert all(p.grad is None and not p.requires_grad for p in clf.vlm.parameters())


def test_cost_of_a_step_is_the_minimum(problem: Any) -> None:
    """7 F at two attack steps, and F an image once for the teacher; no text passes the text tower."""
    clf, data = problem
    loop, n = replace(LOOP, steps=8), len(data)
    images_seen = loop.steps * loop.batch_size
    for steps in (0, 2):
        with clf.vlm.counting() as count:
            TIMA(steps=steps).fit(clf, data, loop=loop)
        assert count.forwards == (steps + 1) * images_seen + n
        assert count.backwards == (steps + 1) * images_seen
        assert count.texts == 0
    with clf.vlm.counting() as count:
        TIMA(order="alternating").fit(clf, data, loop=loop)
    assert count.forwards == 3 * images_seen // 2 + n, "text steps are matrix products"
    with clf.vlm.counting() as count:
        TIMA(teacher="adversarial", distill="l2").fit(clf, data, loop=loop)
    assert count.forwards == 4 * images_seen
    assert count.backwards == 3 * images_seen


def test_the_text_tower_is_passed_once_a_step(clip: ZeroShot) -> None:
    data, loop = labelled(clip), Loop(steps=2, batch_size=4, lr=1e-3, hold_out=0)
    before = {k: v.clone() for k, v in clip.vlm.state_dict().items()}
    with clip.vlm.counting() as count:
        state = TIMA(text="tower", text_lr=1e-3).fit(clip, data, loop=loop)
    assert count.texts == loop.steps * clip.k
    assert any(k.startswith("text.") for k in state)
    assert any(k.startswith("image.") for k in state)
    assert all(torch.equal(v, before[k]) for k, v in clip.vlm.state_dict().items())
    made = TIMA(text="tower", text_lr=1e-3).apply(clip, state)
    assert not torch.equal(made.weights, clip.weights)
    torch.testing.assert_close(made.weights, made.vlm.encode_text(["a cat", "a dog", "a owl"]))
    honest = TIMA(text="tower", text_lr=1e-3, deploy="original").apply(clip, state)
    assert torch.equal(honest.weights, clip.weights)
    short = TIMA(text="tower", text_lr=1e-3, mix_alpha=0).apply(clip, state)
    with torch.no_grad():
        torch.testing.assert_close(short(images(3)), clip(images(3)))


def test_only_image_tower_and_text_tensors_change(problem: Any) -> None:
    clf, data = problem
    for method in (TIMA(), TIMA(text="table")):
        state = method.fit(clf, data, loop=LOOP)
        kept = {k for k in state if not k.startswith("image.tower")}
        assert kept == {f"extra.{method.text}", "base.sha256", "fit.recipe", "tima.names"}
        made = method.apply(clf, state)
        assert made.vlm.text is clf.vlm.text
        assert made.scale == clf.scale
        assert "energy=stabilised" in bytes(state["fit.recipe"].tolist()).decode(), "the open choices are on record"


def test_the_attack_leaves_no_gradient(problem: Any) -> None:
    """Precomputed adversarial images give the same update."""
    clf, data = problem
    plan, student, batch = one_step(TIMA(), clf, data)
    x_adv = plan.attack(student, batch)
    assert all(p.grad is None for p in student.parameters())
    grads = []
    for x in (x_adv, x_adv.clone()):
        loss, _ = plan.loss(student, batch, x)
        grads.append(torch.autograd.grad(loss, list(student.image.parameters()), retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert float((x_adv - batch.x).abs().max()) <= 1 / 255 + 1e-7


def test_what_the_attack_sees(problem: Any) -> None:
    clf, data = problem
    outcomes = {}
    for loss in ("ce", "margin", "full"):
        method = TIMA(attack_loss=loss, attack_text="original", eps="8/255", alpha="2/255", steps=4, m=0.3)
        plan, student, batch = one_step(method, clf, data)
        with torch.no_grad():
            student.image.tower.out.bias.add_(0.2)
        x_adv = plan.attack(student, batch)
        _, told = plan.loss(student, batch, x_adv)
        outcomes[loss] = (float(told["tam"].detach()), float((told["tam"] + told["takd"]).detach()))
    assert outcomes["margin"][0] >= outcomes["ce"][0] - 1e-3
    assert outcomes["full"][1] >= outcomes["ce"][1] - 1e-3
    assert len(set(outcomes.values())) == 3


def test_texts_of_new_classes(problem: Any) -> None:
    """A map moves any text; a table knows its own classes, in any order, and refuses others."""
    clf, data = problem
    new = ZeroShot.build(clf.vlm, ["fox", "cat"])
    state = TIMA(text_lr=0.5).fit(clf, data, loop=LOOP)
    made = TIMA(text_lr=0.5).apply(new, state)
    want = F.normalize(new.weights + new.weights @ state["extra.map"].T, dim=1)
    torch.testing.assert_close(made.weights, want)
    table = TIMA(text="table", text_lr=0.5)
    state = table.fit(clf, data, loop=LOOP)
    some = ZeroShot.build(clf.vlm, ["cat", "ant"])
    torch.testing.assert_close(table.apply(some, state).weights, table.apply(clf, state).weights[[2, 0]])
    with pytest.raises(ValueError, match="text=table has no row for fox: it knows only the classes it was fitted on"):
        table.apply(new, state)
    assert torch.equal(replace(table, deploy="original").apply(new, state).weights, new.weights)


def test_the_texts_are_part_of_the_state(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    state = TIMA(text_lr=0.5).fit(clf, data, loop=LOOP)
    save_file(state, tmp_path / "tima.safetensors")
    loaded, x = load_file(tmp_path / "tima.safetensors"), data.read(range(4))
    with torch.no_grad():
        tuned = TIMA(text_lr=0.5).apply(clf, loaded)(x)
        assert torch.equal(tuned, TIMA(text_lr=0.5).apply(clf, state)(x))
        original = TIMA(text_lr=0.5, deploy="original").apply(clf, loaded)(x)
        half = TIMA(text_lr=0.5, mix_alpha=0.5).apply(clf, loaded).weights
        none = TIMA(text_lr=0.5, mix_alpha=0).apply(clf, loaded)(x)
        assert torch.equal(none, clf(x))
    assert not torch.allclose(tuned, original, atol=1e-3)
    torch.testing.assert_close(half, moved(clf.weights, state["extra.map"] / 2, "map", "unit"))
    del loaded["extra.map"]
    with pytest.raises(ValueError, match=r"the state holds no extra.map: its texts are lost; write deploy=original"):
        TIMA(text_lr=0.5).apply(clf, loaded)


def test_texts_move_apart_and_images_follow(problem: Any) -> None:
    """Energy falls below that of the original texts; robustness at the training budget rises."""
    clf, data = problem
    method = TIMA(eps="4/255", alpha="2/255", steps=5, text_lr=3e-3)
    state = method.fit(clf, data, loop=replace(LOOP, steps=60, lr=3e-3, optimizer="adamw"))
    made = method.apply(clf, state)
    assert float(energy(made.weights)) < float(energy(clf.weights)) - 0.002
    attack = ironclip.build("PGD(eps=4/255, steps=20)")
    x, y = data.read(range(40)), torch.tensor(data.labels)
    rng = SampleRNG.of(5, data.ids)
    held = [1 - attack(model, x, y, rng=rng).success.float().mean() for model in (clf, made)]
    assert held[1] > held[0] + 0.3, held


CHOICES = [
    "TIMA(text=table, rows=free)",
    "TIMA(text=map, rows=free, energy=raw, power=1)",
    "TIMA(margin=similarity, margin_in=logit, m=2)",
    "TIMA(margin=constant, margin_in=angle, margin_to_text=True)",
    "TIMA(distill=reverse_kl, kd_scale=10, teacher=adversarial)",
    "TIMA(distill=cosine, attack_loss=full, attack_text=original)",
    "TIMA(distill=l2, attack_loss=margin, order=alternating)",
    "TIMA(w_s=1, w_e=0, w_i=0, label_space=per_set)",
    "TIMA(norm=l2, eps=1, alpha=1/2, w_t=0)",
]


@pytest.mark.parametrize("spec", CHOICES)
def test_every_choice_trains_and_applies(spec: str, problem: Any) -> None:
    clf, data = problem
    method = ironclip.build(spec)
    state = method.fit(clf, data, loop=replace(LOOP, hold_out=5))
    with torch.no_grad():
        out = method.apply(clf, state)(data.read(range(3)))
    assert bool(torch.isfinite(out).all())
    own = {"map": torch.zeros_like(state["extra.map"]) if method.text == "map" else None, "table": clf.weights}
    start = own[method.text]
    assert start is not None
    moved_by = float((state[f"extra.{method.text}"] - start).abs().max())
    assert moved_by > 0 or not (method.w_e or method.w_i or method.margin_to_text)


def test_alternating_steps(problem: Any) -> None:
    """Even steps move the image tower alone, odd steps the texts alone."""
    clf, data = problem
    method = TIMA(order="alternating")
    one, two = (method.fit(clf, data, loop=replace(LOOP, steps=n, schedule="constant")) for n in (1, 2))
    assert float(one["extra.map"].abs().max()) == 0
    assert float(two["extra.map"].abs().max()) > 0
    assert all(torch.equal(one[k], two[k]) for k in one if k.startswith("image."))


def test_the_offset_is_measured_on_held_out_images(problem: Any) -> None:
    clf, data = problem
    loop = replace(LOOP, hold_out=8)
    method = TIMA(margin="asam")
    state = method.fit(clf, data, loop=loop)
    m0 = float(state["tima.m0"])
    assert m0 == pytest.approx(method.measured_offset(clf, data, loop, 0))
    assert m0 > 0.01, "margins fall when the budget grows fourfold"
    given = TIMA(margin="asam", m0=m0).fit(clf, data, loop=loop)
    assert all(torch.equal(state[k], given[k]) for k in given if k.startswith(("image.", "extra.")))
    method.apply(clf, state)
    with pytest.raises(ValueError, match=r"measures m0 on held-out images, and none are; set hold_out, or m0=0\.02"):
        method.fit(clf, data, loop=LOOP)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"m": -0.1}, "m must not be negative, got -0.1; write 0 to leave it out"),
        ({"w_e": -1}, "w_e must not be negative, got -1.0"),
        ({"power": 0}, "power must be positive, got 0"),
        ({"text_lr": 0}, "text_lr must be positive"),
        ({"text": "head"}, "unknown text 'head'"),
        ({"margin": "angular"}, "unknown margin 'angular'"),
        ({"order": "both"}, "unknown order 'both'"),
        ({"text": "tower", "rows": "free"}, "rows=free needs text=map or text=table"),
        ({"attack_loss": "full", "teacher": "adversarial"}, "attack_loss=full needs teacher=clean"),
        ({"order": "alternating", "w_e": 0, "w_i": 0}, "order=alternating has nothing to do for the texts"),
        ({"margin": "asam", "eps_target": "1/255"}, "eps_target must be above eps=1/255 for margin=asam, got 1/255"),
        ({"eps": 4}, r"eps must be in \(0, 1\], got 4; write 4/255"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"template": "a photo"}, "template needs exactly one {}, got 'a photo'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TIMA(**fields)


def test_bad_input_is_refused(problem: Any) -> None:
    clf, data = problem
    two = ZeroShot.build(clf.vlm, ["ant", "bee"])
    with pytest.raises(ValueError, match="w_s needs at least 3 classes, got 2; write w_s=0"):
        TIMA(w_s=1).plan(two, LOOP)
    with pytest.raises(ValueError, match="classes that are not the 5 of toys"):
        TIMA().fit(two, data, loop=LOOP)
    state = TIMA().fit(clf, data, loop=LOOP)
    with pytest.raises(ValueError, match=r"the state was fitted by TIMA\(.*text=map.*, not by TIMA\(.*text=table"):
        TIMA(text="table").apply(clf, state)
    with pytest.raises(ValueError, match="tima must be fitted first"):
        TIMA().apply(clf)
