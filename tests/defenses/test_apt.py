"""APT by hand, against the fp64 transcription, what it may touch and what a step may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clips import byte_tokenizer, small_clip
from fits import image_set
from reference import apt_literal
from safetensors.torch import save_file
from toys import generator, toy_clf, toy_images

import ironclip
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._learned import CLASSES, TOWER, VECTORS
from ironclip.defenses._train import BASE, RECIPE
from ironclip.defenses.apt import APT, climb_both, cropped
from ironclip.defenses.tecoa import TeCoA
from ironclip.models.hf import wrap_clip
from ironclip.training.feed import Feed
from ironclip.training.finetune import Session

NAMES = ("cat", "ox", "bee")
LOOP = Loop(steps=3, batch_size=6, lr=0.5, optimizer="sgd", weight_decay=5e-4, warmup=1, hold_out=0)
SMALL = {"tokens": 4, "init_std": 0.2}


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    """A random CLIP of three classes at a mild temperature, where float32 knows the sign of its gradients."""
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    vlm.scale = 5.0
    clf = ZeroShot.build(vlm, NAMES, ["a b {}"])
    coarse = torch.rand(3, 3, 4, 4, generator=generator(5)).repeat(4, 1, 1, 1)
    x = 0.8 * F.interpolate(coarse, vlm.image_size) + 0.2 * toy_images(12, size=vlm.image_size, seed=3)
    return clf, image_set(x, torch.arange(12) % 3, list(NAMES))


def texts_of(clf: ZeroShot, position: str = "end") -> Callable[[torch.Tensor], torch.Tensor]:
    vlm = clf.vlm
    rows = [vlm.tokenize([f"x {n}", f"x {n}."]).tolist() for n in clf.class_names]
    parts = [apt_literal.pieces(bare, full, 257) for bare, full in rows]
    return lambda v: apt_literal.class_features(vlm.text, parts, v, position, 24, 257)


def literal_encode(clf: ZeroShot) -> Callable[[torch.Tensor], torch.Tensor]:
    import copy

    tower = copy.deepcopy(clf.vlm.image).double()
    mean, std = (clf.vlm.get_buffer(n)[0].double() for n in ("mean", "std"))
    return lambda x: apt_literal.image_features(tower, x, mean, std)


VARIANTS: dict[str, dict[str, Any]] = {
    "on_the_fly": {},
    "constant": {"attack": "constant", "template": "b {}"},
    "perturbed": {"attack": "perturbed", "prompt_lr": 0.5},
    "class_specific": {"context": "class_specific"},
    "middle": {"position": "middle"},
    "front": {"position": "front"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tuning_equals_the_literal_transcription(name: str, problem: Any) -> None:
    clf, data = problem
    method = APT(eps="4/255", steps=2, **SMALL, **VARIANTS[name])
    got = method.fit(clf, data, loop=LOOP, seed=2)[VECTORS]
    plan, feed, eps = method.plan(clf, LOOP, 2), Feed(clf, data, LOOP, 2), 4 / 255
    start, batches = plan.extra["context"], []
    for step in range(LOOP.steps):
        (batch,) = feed.parts(step)
        noise = eps * batch.rng.fold("start").uniform_like(batch.x, -1.0, 1.0)
        batches.append((batch.x, batch.y.tolist(), noise))
    constant = clf.encode_prompts(["b {}"])[:, 0].double() if name == "constant" else None
    want = apt_literal.train(
        literal_encode(clf), texts_of(clf, method.position), start, batches, clf.scale, eps=eps, alpha=eps * 2 / 3,
        steps=2, rates=[LOOP.rate(s) for s in range(3)], momentum=0.9, decay=5e-4, constant=constant,
        prompt_lr=method.prompt_lr if name == "perturbed" else 0.0,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert float((want - start).abs().max()) > 1e-2, "the steps are large enough to see"


def test_loss_by_hand(problem: Any) -> None:
    """Two orthonormal texts, the image on the right one, s = ln 3: ln(4/3)."""
    clf, x = toy_clf(dim=2, classes=("ant", "bee")), torch.zeros(1, 3, 8, 8)
    clf = replace(clf.with_weights(torch.eye(2)), scale=1.0986122886681098)
    z = clf.head(torch.tensor([[1.0, 0.0]]))
    assert float(F.cross_entropy(z, torch.tensor([0]))) == pytest.approx(0.2876820724, abs=1e-6)
    literal = apt_literal.cross_entropy(torch.eye(2).double()[:1], torch.eye(2).double(), [0], clf.scale)
    assert float(literal) == pytest.approx(0.2876820724, abs=1e-9)
    assert x.shape[0] == 1


def test_two_thirds_of_the_budget_reach_every_corner() -> None:
    """From +eps against a constant slope: +1/3, -1/3, -1 of the budget."""
    eps, x = 6 / 255, torch.full((1, 3, 8, 8), 0.5)
    seen = []
    inner = APT(eps="6/255").inner

    class Upper(SampleRNG):
        """Draws the upper end of every range."""

        def uniform_like(self, x: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return torch.full_like(x, high)

        def fold(self, *names: Any) -> SampleRNG:
            return self

    def falling(at: torch.Tensor) -> torch.Tensor:
        seen.append(float((at - x).detach().mean()) / eps)
        return -at.flatten(1).sum(dim=1)

    end = inner(falling, x, Upper(0, (0,)))
    seen.append(float((end - x).mean()) / eps)
    assert seen == pytest.approx([1, 1 / 3, -1 / 3, -1], abs=1e-5)


def test_parameter_counts_and_what_is_stored(problem: Any) -> None:
    clf, data = problem
    width, loop = 32, replace(LOOP, steps=1, warmup=0)
    for fields, shape in (
        ({"tokens": 1}, (1, width)),
        ({"tokens": 8}, (8, width)),
        ({"tokens": 3, "context": "class_specific"}, (3, 3, width)),
    ):
        before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
        method = APT(**fields)  # type: ignore[arg-type]
        state = method.fit(clf, data, loop=loop)
        assert set(state) == {VECTORS, CLASSES, BASE, RECIPE}
        assert state[VECTORS].shape == shape
        assert sum(v.numel() * v.element_size() for v in state.values()) < 4096, "kilobytes"
        assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
        fitted = method.apply(clf, state)
        assert fitted.vlm is clf.vlm
        assert fitted.scale == clf.scale
        assert not torch.equal(fitted.weights, clf.weights)


def test_a_users_unfrozen_model_gets_no_gradient(problem: Any) -> None:
    clf, data = problem
    clf.vlm.requires_grad_(True)
    try:
        for attack in ("on_the_fly", "perturbed"):
            APT(attack=attack, **SMALL).fit(clf, data, loop=LOOP)
        assert all(p.grad is None and p.requires_grad for p in clf.vlm.parameters())
    finally:
        clf.vlm.freeze()


def test_the_words_of_the_plain_prompt_are_the_plain_prompt() -> None:
    clf = ZeroShot.build(ironclip.load("tiny"), ["red circle", "blue square"], ["a photo of a {}."])
    method = APT(tokens=4, init="a photo of a")
    prompts = method.prompts(clf)
    with torch.no_grad():
        torch.testing.assert_close(
            prompts.features(prompts.initial(phrase=method.init)), clf.weights, rtol=0, atol=1e-5
        )


def test_cost_of_a_step_is_the_minimum(problem: Any) -> None:
    """steps (F + B) + F of the image tower; the text tower once, or steps + 1 times where it is attacked, too."""
    clf, data = problem
    images = LOOP.steps * LOOP.batch_size
    for attack, passes in (("on_the_fly", 1), ("constant", 1), ("perturbed", 3)):
        method = APT(steps=2, attack=attack, alpha="1/255", **SMALL)
        each = method.prompts(clf).shared.packs.ends.numel()
        with clf.vlm.counting() as count:
            method.fit(clf, data, loop=LOOP)
        assert (count.forwards, count.backwards) == (3 * images, 2 * images)
        assert count.texts == passes * each * LOOP.steps + (clf.k if attack == "constant" else 0)


def test_attack_stays_in_ball_and_box_and_follows_its_prompt(problem: Any) -> None:
    clf, data = problem
    batch = Feed(clf, data, LOOP, 0).batch(list(range(6)), 0)
    found = {}
    for attack in ("on_the_fly", "constant", "perturbed"):
        method = APT(eps="8/255", attack=attack, prompt_lr=1.0, **SMALL)
        plan = method.plan(clf, LOOP)
        student = clf.vlm.with_state({})
        student.extra = torch.nn.ParameterDict({"context": torch.nn.Parameter(plan.extra["context"])})
        ready = replace(batch, cached=plan.prepare(student, batch))
        before = student.get_parameter(VECTORS).detach().clone()
        found[attack] = plan.attack(student, ready)
        assert torch.equal(student.get_parameter(VECTORS), before), "put back exactly"
        assert float((found[attack] - batch.x).abs().max()) <= 8 / 255 + 1e-6
        assert 0 <= float(found[attack].min()) <= float(found[attack].max()) <= 1
        loss, _ = plan.loss(student, ready, found[attack])
        plain, _ = plan.loss(student, ready, batch.x)
        assert loss > plain or attack != "on_the_fly", "other prompts' attacks need not carry over"
    assert not torch.equal(found["on_the_fly"], found["constant"])
    assert not torch.equal(found["on_the_fly"], found["perturbed"])
    still = climb_both(clf, clf.vlm, APT(**SMALL).prompts(clf), torch.zeros(4, 32), APT(eps=0).inner, 1.0, batch)
    assert torch.equal(still, batch.x)


def test_without_a_budget_it_is_coop(problem: Any) -> None:
    clf, data = problem
    plan = APT(eps=0, **SMALL).plan(clf, LOOP)
    batch = Feed(clf, data, LOOP, 0).batch(list(range(6)), 0)
    assert torch.equal(plan.attack(clf.vlm, replace(batch, cached={"texts": clf.weights})), batch.x)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"attack_precision": "bf16"}])
def test_lower_precision_attacks_too(changes: dict[str, str], problem: Any) -> None:
    clf, data = problem
    loop = replace(LOOP, **changes)
    with clf.vlm.counting() as count:
        APT(steps=2, alpha="1/255", **SMALL).fit(clf, data, loop=loop)
    assert count.backwards == 2 * LOOP.steps * LOOP.batch_size


def test_seeds_decide_and_runs_repeat(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    method = APT(augment="crops", **SMALL)
    one, again, other = (method.fit(clf, data, loop=LOOP, seed=s)[VECTORS] for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(method.plan(clf, LOOP, 0).extra["context"], method.plan(clf, LOOP, 1).extra["context"])
    assert not torch.equal(one, other)

    class KilledError(Exception):
        pass

    def kill(step: int, _steps: int, _metrics: dict[str, Any]) -> None:
        if step == 2:
            raise KilledError

    loop = replace(LOOP, checkpoint_every=1)
    with pytest.raises(KilledError):
        method.fit(clf, data, loop=loop, session=Session(tmp_path, progress=kill))
    assert torch.equal(method.fit(clf, data, loop=loop, session=Session(tmp_path))[VECTORS], one)


def test_crops_change_with_the_step_and_not_in_validation(problem: Any) -> None:
    clf, data = problem
    feed, plan = Feed(clf, data, LOOP, 0), APT(eps=0, augment="crops", **SMALL).plan(clf, LOOP)
    first, again, later, held = (feed.batch([0, 1], step) for step in (0, 0, 1, -1))
    assert torch.equal(cropped(first), cropped(again))
    assert not torch.equal(cropped(first), cropped(later))
    assert not torch.equal(plan.attack(clf.vlm, replace(first, cached={"texts": clf.weights})), first.x)
    assert torch.equal(plan.attack(clf.vlm, replace(held, cached={"texts": clf.weights})), held.x)


def test_it_learns_and_other_classes_can_be_asked(problem: Any) -> None:
    clf, data = problem
    losses: list[float] = []
    session = Session(progress=lambda _s, _n, m: losses.append(m["loss"]))
    loop = replace(LOOP, steps=25, batch_size=12, lr=3e-2, optimizer="adamw")
    clf, method = replace(clf, scale=30.0), APT(steps=1, alpha="1/255", **SMALL)
    state = method.fit(clf, data, loop=loop, session=session)
    assert losses[-1] < 0.8 * losses[0]
    elsewhere = ZeroShot.build(clf.vlm, ["fly", "ox", "cat", "hen"], ["a b {}"])
    moved = method.apply(elsewhere, state).weights
    torch.testing.assert_close(moved[[2, 1]], method.apply(clf, state).weights[:2], rtol=0, atol=1e-5)


def test_class_specific_prompts_are_joined_by_name(problem: Any) -> None:
    clf, data = problem
    method = APT(context="class_specific", **SMALL)
    state = method.fit(clf, data, loop=LOOP)
    turned = ZeroShot.build(clf.vlm, NAMES[::-1], ["a b {}"])
    torch.testing.assert_close(method.apply(turned, state).weights.flip(0), method.apply(clf, state).weights)
    with pytest.raises(ValueError, match="class-specific prompts of 3 classes and none for 'fly'; fit it on these"):
        method.apply(ZeroShot.build(clf.vlm, ["cat", "fly"], ["a b {}"]), state)


def test_pseudo_labels(problem: Any) -> None:
    """The labels of the data are not read; images of which the clean model is sure are kept under its own."""
    clf, data = problem
    with torch.no_grad():
        means = clf.vlm.encode_image(data.read(range(12))).view(4, 3, -1).mean(dim=0)
    clf = clf.with_weights(means - means.mean(dim=0))
    with torch.no_grad():
        sure = clf(data.read(range(12))).softmax(dim=1).max(dim=1)
    least = round(float(sure.values.median()), 3)
    method = APT(labels="pseudo", confidence=least, **SMALL)
    kept = (sure.values >= least).nonzero().flatten().tolist()
    assert len(set(sure.indices[kept].tolist())) >= 2
    assert len(kept) < 12
    by_hand = replace(data.take(kept), labels=sure.indices[kept].tolist())
    want = APT(**SMALL).fit(clf, by_hand, loop=LOOP)[VECTORS]
    other = replace(data, labels=[(y + 1) % 3 for y in data.labels])
    for unlabelled in (data, other):
        assert torch.equal(method.fit(clf, unlabelled, loop=LOOP)[VECTORS], want)
    with pytest.raises(ValueError, match=r"labels=pseudo keeps 0 of 12 images of toys at confidence 0.9, of 0 classes"):
        APT(labels="pseudo", confidence=0.9, **SMALL).fit(clf, data, loop=LOOP)


def test_a_robust_tower_is_loaded_first(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    tower = TeCoA().fit(clf, data, loop=replace(LOOP, lr=1e-3))
    save_file(tower, tmp_path / "tecoa.safetensors")
    method = APT(tower=str(tmp_path / "tecoa.safetensors"), **SMALL)
    state = method.fit(clf, data, loop=LOOP)
    assert TOWER in state
    fitted = method.apply(clf, state)
    x = data.read(range(4))
    with torch.no_grad():
        assert torch.equal(fitted.vlm.encode_image(x), TeCoA().apply(clf, tower).vlm.encode_image(x))
        assert not torch.equal(fitted.vlm.encode_image(x), clf.vlm.encode_image(x))
    with pytest.raises(ValueError, match="the prompts were learned on another image tower than tower=''; name the one"):
        APT(**SMALL).apply(clf, state)
    plain = APT(**SMALL).fit(clf, data, loop=LOOP)
    with pytest.raises(ValueError, match="were learned on the model's own image tower than tower="):
        method.apply(clf, plain)
    with pytest.raises(ValueError, match=r"no image tower at tower='nowhere\.safetensors'; fit one with ironclip fit"):
        APT(tower="nowhere.safetensors").fit(clf, data, loop=LOOP)
    save_file(plain, tmp_path / "apt.safetensors")
    with pytest.raises(ValueError, match="holds no image tower; name a state of TeCoA, FARE or the like"):
        APT(tower=str(tmp_path / "apt.safetensors"), **SMALL).apply(clf, plain)


def test_states_that_do_not_belong_are_refused(problem: Any) -> None:
    clf, data = problem
    state = APT(**SMALL).fit(clf, data, loop=LOOP)
    with pytest.raises(ValueError, match="apt must be fitted first; run ironclip fit 'apt'"):
        APT().apply(clf, None)
    with pytest.raises(ValueError, match=r"the state was fitted by APT\(eps=1/255, .*tokens=4"):
        APT(tokens=5).apply(clf, state)
    other = wrap_clip(small_clip(seed=1), byte_tokenizer(), "other").freeze()
    with pytest.raises(ValueError, match="the state was fitted on a backbone with weights"):
        APT(**SMALL).apply(ZeroShot.build(other, NAMES), state)
    with pytest.raises(ValueError, match=r"context vectors must be \(4, 32\) for small and 3 classes, got \(4, 31\)"):
        APT(**SMALL).apply(clf, {**state, VECTORS: state[VECTORS][:, 1:]})


def test_rates_by_epochs() -> None:
    """CoOp's schedule: lr 0.002 over 50 epochs of 4 steps; the first epoch is at 1e-5, the last not at 0."""
    loop = Loop(steps=200, warmup=4, lr=2e-3, schedule="epochs")
    by_epoch = [{loop.rate(step) for step in range(4 * e, 4 * e + 4)} for e in range(50)]
    assert all(len(rates) == 1 for rates in by_epoch), "one rate an epoch"
    rates = [r for (r,) in by_epoch]
    assert rates == pytest.approx([apt_literal.epoch_rate(e, 2e-3, 50) for e in range(50)])
    assert rates[:3] == pytest.approx([1e-5, 2e-3, 0.00199803], rel=1e-5)
    assert 0 < rates[-1] < 2e-5
    assert loop.resized(steps=400).warmup == 8, "still 50 epochs"
    assert loop.resized(steps=20).warmup == 1
    assert APT(preset="reference").loop().rate(150) == pytest.approx(0.5 * 2e-3 * (1 + 0.9921147), rel=1e-6)
    with pytest.raises(ValueError, match="schedule=epochs counts in epochs of warmup steps; write warmup=50"):
        Loop(schedule="epochs")


def test_steps_that_cannot_reach_the_surface_are_told(problem: Any) -> None:
    clf, _ = problem
    with pytest.warns(UserWarning, match="2 steps of 1/1020 cannot reach eps=1/255"):
        APT(steps=2, alpha="1/1020", **SMALL).plan(clf, LOOP)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 4}, r"eps must be in \(0, 1\], got 4; write 4/255"),
        ({"alpha": 0}, "alpha must be positive, got 0; write 1/255"),
        ({"tokens": 0}, "tokens must be at least 1, got 0; write tokens=16"),
        ({"position": "back"}, "unknown position 'back'"),
        ({"context": "shared"}, "unknown context 'shared'"),
        ({"attack": "offline"}, "unknown attack 'offline'"),
        ({"augment": "mixup"}, "unknown augment 'mixup'"),
        ({"labels": "noisy"}, "unknown labels 'noisy'"),
        ({"prompt_lr": 0}, "prompt_lr must be positive, got 0"),
        ({"init_std": -1}, "init_std must not be negative, got -1"),
        ({"confidence": 1}, r"confidence must lie in \[0, 1\), got 1"),
        ({"template": "a photo"}, "template needs exactly one {}, got 'a photo'"),
        ({"recipe": "ours"}, "unknown recipe 'ours'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APT(**fields)


def test_bad_data_is_refused(problem: Any) -> None:
    clf, data = problem
    with pytest.raises(ValueError, match="data must be an open data set"):
        APT().fit(clf, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="shows a single class; training needs images of at least 2"):
        APT(**SMALL).fit(clf, data.take([0, 3]), loop=LOOP)
    bright = image_set(255 * data.read(range(12)), torch.arange(12) % 3, list(NAMES))
    with pytest.raises(ValueError, match="divide by 255"):
        APT(**SMALL).fit(clf, bright, loop=LOOP)
    noise = toy_clf()
    x = torch.rand(10, 3, 8, 8, generator=generator(0))
    with pytest.raises(ValueError, match="toy-conv has no token embedding; soft prompts need an hf:"):
        APT().fit(noise, image_set(x, torch.arange(10) % 5, list(noise.class_names)), loop=LOOP)
