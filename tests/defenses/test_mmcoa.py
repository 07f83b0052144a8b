"""MMCoA by hand, against the fp64 transcription, which towers learn and what a step may cost."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clips import byte_tokenizer, small_clip
from fits import image_set, labelled
from reference import mmcoa_literal
from toys import CLASSES, generator, toy_images, toy_problem

import ironclip
from ironclip.attacks.text import WordSwap
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._mmcoa import contrastive, remembering
from ironclip.defenses.mmcoa import MMCoA
from ironclip.models.hf import wrap_clip
from ironclip.training.feed import Batch, Feed
from ironclip.training.select import frozen, student_of, with_extra

LOOP = Loop(steps=2, batch_size=6, lr=1e-3, hold_out=0)
NAMES = ["red cat", "owl", "big dog", "oak"]


@pytest.fixture(scope="module")
def clip() -> ZeroShot:
    """Three vision and two text blocks, a sentence of 4 or 5 words a class."""
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    return replace(ZeroShot.build(vlm, NAMES, ["a photo of {}."]), scale=5.0)


@pytest.fixture(scope="module")
def data(clip: ZeroShot) -> ImageSet:
    return labelled(clip, 12)


def ready(method: MMCoA, clf: ZeroShot, data: ImageSet) -> tuple[Any, Any, dict[str, Any], Batch]:
    """Plan, student, its parameters by name, and a batch that is prepared."""
    plan = method.plan(clf, LOOP)
    student, chosen = student_of(clf.vlm, plan.towers, LOOP, 0)
    chosen |= with_extra(student, plan.extra)
    batch = Feed(clf, data, LOOP, 0).batch([0, 1, 2, 5, 8], 0)
    return plan, student, chosen, replace(batch, cached=plan.prepare(student, batch))


def test_losses_by_hand() -> None:
    aligned = torch.eye(2)
    assert float(F.cross_entropy(math.log(3) * aligned, torch.arange(2))) == pytest.approx(math.log(4 / 3))
    assert float(contrastive(aligned, aligned, math.log(3))) == pytest.approx(0.575364, abs=1e-6)
    literal = mmcoa_literal.contrast(aligned.double(), aligned.double(), math.log(3))
    assert float(literal) == pytest.approx(2 * 0.287682, abs=1e-6)
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    images = F.normalize(torch.randn(2, 2, generator=generator(0)), dim=1)
    assert float(F.cross_entropy(9 * images @ same.T, torch.arange(2))) == pytest.approx(math.log(2))
    u, t = (F.normalize(torch.randn(6, 4, generator=generator(s)), dim=1) for s in (1, 2))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(contrastive(u[order], t[order], 7.0), contrastive(u, t, 7.0))
    torch.testing.assert_close(contrastive(u, t, 7.0), contrastive(t, u, 7.0))
    with pytest.raises(ValueError, match=r"images and texts must come in pairs, got \(6, 4\) and \(5, 4\)"):
        contrastive(u, t[:5], 7.0)


@pytest.mark.parametrize("leak", [False, True])
def test_gradients_equal_the_literal_transcription(leak: bool, clip: ZeroShot, data: ImageSet) -> None:
    """Both towers and the temperature. Leaked gradients are those of the attack's steps, added with weight 1."""
    method = MMCoA(eps="4/255", alpha="1/255", steps=3, lam_i=0.7, lam_t=0.3, leak_attack_grads=leak)
    plan, student, chosen, batch = ready(method, clip, data)
    with frozen(chosen):
        x_adv = plan.attack(student, batch).detach()
    assert all(p.grad is None for p in student.parameters())
    loss, told = plan.loss(student, batch, x_adv)
    loss.backward()
    start = 4 / 255 * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)
    sentences, tokenize, swap = [f"a photo of {n}." for n in NAMES], clip.vlm.tokenize, WordSwap()
    assert tokenize is not None

    def attack_text(encode: Any, sentence: str) -> str:
        words = sentence.split(" ")
        open_ = [w.rstrip(".") not in ("a", "of") for w in words]
        found = [c if o else [] for c, o in zip(swap.candidates()(words), open_, strict=True)]
        return mmcoa_literal.word_attack(encode, sentence, found, sentences)

    want, grads = mmcoa_literal.step(
        clip.vlm.image,
        lambda tower, t: tower(tokenize([t]))[0],
        clip.vlm.text,  # type: ignore[arg-type]
        batch.x, batch.y.tolist(), start, sentences, attack_text,
        clip.vlm.get_buffer("mean"), clip.vlm.get_buffer("std"), clip.scale,
        eps=4 / 255, alpha=1 / 255, steps=3, lam_i=0.7, lam_t=0.3, leak=leak,
    )  # fmt: skip
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-4, atol=1e-4)
    assert float(told["swapped"]) == 1
    assert {n.removeprefix("extra.") for n, p in chosen.items() if p.grad is not None} == set(grads)
    for name, p in chosen.items():
        if p.grad is not None:
            wanted = grads[name.removeprefix("extra.")]
            size = float(wanted.abs().max())
            assert float((p.grad.double() - wanted).abs().max()) <= 3e-3 * size + 1e-6, name
    assert {n.split(".")[0] for n in grads} == {"image", "text", "log_scale"}
    assert all(float(g.abs().max()) > 0 for n, g in grads.items() if "k_proj.bias" not in n)


def test_each_loss_sees_its_own_attack_alone(clip: ZeroShot, data: ImageSet) -> None:
    plan, student, _, batch = ready(MMCoA(lam_i=0), clip, data)
    assert torch.equal(plan.attack(student, batch), batch.x)
    with torch.no_grad():
        a, _ = plan.loss(student, batch, batch.x)
        b, told = plan.loss(student, batch, torch.rand_like(batch.x))
    assert torch.equal(a, b)
    assert "attacked_images" not in told
    plan, student, _, batch = ready(MMCoA(lam_t=0), clip, data)
    with clip.vlm.counting() as count, torch.no_grad():
        _, told = plan.loss(student, batch, batch.x)
    assert "attacked_texts" not in told
    assert float(told["swapped"]) == 0
    assert count.texts == len(set(batch.y.tolist())), "no text is attacked"


def test_cost_of_a_step_is_the_minimum(clip: ZeroShot, data: ImageSet) -> None:
    """steps (F + B), and attacked and clean images once with their gradient. Texts: the classes once without one, the
    masks and candidates of the batch's classes, and its clean and attacked sentences with one."""
    images, c = LOOP.steps * LOOP.batch_size, len(NAMES)
    for steps in (0, 3):
        with clip.vlm.counting() as count:
            MMCoA(steps=steps).fit(clip, data, loop=LOOP)
        assert count.forwards == (steps + 2) * images
        assert count.backwards == (steps + 2) * images
    with clip.vlm.counting() as count:
        plan, student, _, batch = ready(MMCoA(), clip, data)
        plan.loss(student, batch, plan.attack(student, batch))
    assert sorted(set(batch.y.tolist())) == [0, 1, 2]
    assert count.texts == c + (3 + 2 + 3) + 3 * 10 + 2 * 3
    with clip.vlm.counting() as count:
        MMCoA(lam_t=0, steps=2).fit(clip, data, loop=LOOP)
    assert count.forwards == 3 * images
    assert count.texts <= LOOP.steps * 2 * c
    with clip.vlm.counting() as count:
        MMCoA(towers="image").fit(clip, data, loop=LOOP)
    before = count.texts
    with clip.vlm.counting() as count:
        MMCoA(towers="image").fit(clip, data, loop=replace(LOOP, steps=6))
    assert count.texts == before, "with fixed texts everything about them is made once"


def test_known_features_are_not_encoded_again(clip: ZeroShot) -> None:
    texts = ["a cat", "a dog", "an owl"]
    rows = clip.vlm.encode_text(texts)
    encode = remembering(clip.vlm, texts, rows)
    with clip.vlm.counting() as count:
        out = encode(["a dog", "x", "a cat", "x"])
    assert count.texts == 1
    torch.testing.assert_close(out, clip.vlm.encode_text(["a dog", "x", "a cat", "x"]))


def test_both_towers_change_and_nothing_else(clip: ZeroShot, data: ImageSet) -> None:
    before = {k: v.clone() for k, v in clip.vlm.state_dict().items()}
    state = MMCoA().fit(clip, data, loop=LOOP)
    assert all(torch.equal(v, before[k]) for k, v in clip.vlm.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in clip.vlm.parameters())
    kinds = {k.split(".")[0] for k in state}
    assert kinds == {"image", "text", "extra", "base", "fit"}
    assert all(not torch.equal(v, before[k]) for k, v in state.items() if k in before), "only what changed is kept"
    assert float(state["extra.log_scale"]) != pytest.approx(math.log(5.0), abs=1e-6)
    made = MMCoA().apply(clip, state)
    assert made.scale == clip.scale
    torch.testing.assert_close(made.weights, made.vlm.encode_text([f"a photo of {n}." for n in NAMES]))
    assert not torch.allclose(made.weights, clip.weights, atol=1e-5)
    image = MMCoA(towers="image").fit(clip, data, loop=LOOP)
    assert {k.split(".")[0] for k in image} == {"image", "extra", "base", "fit"}
    assert torch.equal(MMCoA(towers="image").apply(clip, image).weights, clip.weights)


def test_rates_of_the_towers(clip: ZeroShot, data: ImageSet) -> None:
    """One plain step: the text tower moves by its own rate, the image tower by the loop's."""
    loop = replace(LOOP, steps=1, optimizer="sgd", momentum=0.0)
    slow, fast = (MMCoA(text_rate=r).fit(clip, data, loop=loop) for r in (0.1, 1.0))
    own = clip.vlm.state_dict()
    text, image = "text.text_projection.weight", "image.visual_projection.weight"
    torch.testing.assert_close((fast[text] - own[text]), 10 * (slow[text] - own[text]), rtol=1e-2, atol=1e-6)
    assert torch.equal(fast[image], slow[image])


def test_the_attack_on_images_stays_in_ball_and_box(clip: ZeroShot, data: ImageSet) -> None:
    for method in (MMCoA(eps="8/255", alpha="2/255", steps=4), MMCoA(norm="l2", eps=1, alpha="1/4", steps=4)):
        plan, student, chosen, batch = ready(method, clip, data)
        with frozen(chosen):
            x_adv = plan.attack(student, batch)
            loss = [F.cross_entropy(plan.logits(student, x), batch.y) for x in (batch.x, x_adv)]
        size = (x_adv - batch.x).flatten(1)
        size = size.abs().amax(1) if method.norm == "linf" else size.norm(dim=1)
        assert float(size.max()) <= float(method.eps) + 1e-6
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1
        assert loss[1] > loss[0]
    plan, student, _, batch = ready(MMCoA(eps=0), clip, data)
    assert torch.equal(plan.attack(student, batch), batch.x)


def test_other_classes_are_not_taken_for_attacked_texts() -> None:
    """`a photo of a cat` may become `a photo of a kitten`, unless that is another class."""
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    near = ["cat", "kitten", "feline", "kitty", *WordSwap().candidates()(["cat"])[0][3:]]
    clf = ZeroShot.build(vlm, near, ["{}"])
    data = labelled(clf, 24)
    figures = {}
    for keep in (True, False):
        plan, student, _, batch = ready(MMCoA(keep_label=keep), clf, data)
        batch = replace(batch, y=torch.zeros_like(batch.y))
        with torch.no_grad():
            _, told = plan.loss(student, batch, batch.x)
        figures[keep] = float(told["swapped"])
    assert figures == {True: 0.0, False: 1.0}


def test_parts_of_a_batch_and_resumed_runs(clip: ZeroShot, data: ImageSet) -> None:
    same = [MMCoA().fit(clip, data, loop=LOOP, seed=4) for _ in range(2)]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    parts = MMCoA().fit(clip, data, loop=replace(LOOP, accumulate=2), seed=4)
    assert not torch.equal(parts["extra.log_scale"], same[0]["extra.log_scale"]), "fewer images are compared"


def test_leaked_gradients_are_large_and_only_on_request(clip: ZeroShot, data: ImageSet) -> None:
    norms = {}
    for leak in (False, True):
        plan, student, chosen, batch = ready(MMCoA(steps=5, leak_attack_grads=leak), clip, data)
        with frozen(chosen):
            x_adv = plan.attack(student, batch)
        loss, _ = plan.loss(student, batch, x_adv)
        loss.backward()
        norms[leak] = torch.stack([p.grad.norm() for p in chosen.values() if p.grad is not None]).norm()
    assert norms[True] > 1.5 * norms[False]


def test_robustness_is_gained() -> None:
    """The image tower alone, on a task that it solves cleanly and loses under attack."""
    clf, x, y = toy_problem(40)
    data = image_set(x, y, list(CLASSES))
    texts = clf.weights
    names = dict(zip([f"a photo of a {c}." for c in CLASSES], texts, strict=True))
    own = clf.vlm.text
    clf.vlm.text = lambda ts: torch.stack([names[t] if t in names else own([t])[0] for t in ts])  # type: ignore
    method = MMCoA(towers="image", eps="4/255", alpha="2/255", steps=5)
    state = method.fit(clf, data, loop=replace(LOOP, steps=40, batch_size=16, lr=5e-3))
    attack, rng = ironclip.build("PGD(eps=4/255, steps=20)"), SampleRNG.of(5, data.ids)
    labels = torch.tensor(data.labels)
    held = [1 - attack(m, x, labels, rng=rng).success.float().mean() for m in (clf, method.apply(clf, state))]
    assert held[1] > held[0] + 0.2, held


def test_presets() -> None:
    method = MMCoA(preset="reference")
    loop = method.loop()
    assert (method.eps, method.alpha, method.steps) == (Fraction(1, 255), Fraction(1, 255), 10)
    assert (method.lam_i, method.lam_t, method.k, method.words) == (0.5, 0.5, 10, 1)
    assert (loop.optimizer, loop.lr, loop.betas, loop.adam_eps, loop.weight_decay) == (
        "adam", 1e-6, (0.9, 0.98), 1e-6, 0.2,
    )  # fmt: skip
    assert (loop.batch_size, loop.steps, loop.schedule) == (256, 5880, "constant")
    assert not method.leak_attack_grads


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam_i": -1}, "lam_i must not be negative, got -1.0; write 0 to leave it out"),
        ({"lam_t": -0.5}, "lam_t must not be negative"),
        ({"lam_t": 0, "lam_i": 0}, "lam_i and lam_t are both 0: there is nothing to learn"),
        ({"eps": "-1/255"}, "eps must not be negative"),
        ({"words": 0}, "words and k must be 1 or more"),
        ({"source": "bert"}, "unknown source 'bert' of words"),
        ({"towers": "text"}, "unknown towers 'text'"),
        ({"text_rate": 0}, "text_rate must be positive, got 0.0; write towers=image to keep the texts"),
        ({"template": "photo"}, "template needs exactly one {}, got 'photo'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMCoA(**fields)


def test_bad_input_is_refused(clip: ZeroShot, data: ImageSet) -> None:
    toy, x, y = toy_problem(20)
    with pytest.raises(
        ValueError, match="the text tower of toy-conv-problem has no parameters to train; write towers=im"
    ):
        MMCoA().fit(toy, image_set(x, y, list(CLASSES)), loop=LOOP)
    two = image_set(toy_images(12, 32), torch.arange(12), [f"x{i}" for i in range(12)], name="other")
    with pytest.raises(ValueError, match="4 classes that are not the 12 of other"):
        MMCoA().fit(clip, two, loop=LOOP)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\), got 9"):
        MMCoA().fit(clip, replace(data, labels=[*data.labels[:-1], 9]), loop=replace(LOOP, batch_size=12))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        MMCoA().fit(clip, replace(data, read=lambda rows: data.read(rows) * 3), loop=LOOP)
    with pytest.raises(ValueError, match="mmcoa must be fitted first"):
        MMCoA().apply(clip)
