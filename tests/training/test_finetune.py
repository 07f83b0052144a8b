"""The fine-tuning loop: exact resume, what is trained, what is refused, when it stops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from toys import CLASSES, toy_problem

from ironclip.core.loop import Loop
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.data import joined
from ironclip.data.imageset import ImageSet
from ironclip.training.checkpoint import load_checkpoint
from ironclip.training.feed import Feed
from ironclip.training.finetune import Plan, Session, finetune
from ironclip.training.select import student_of
from ironclip.training.student import Student

LOOP = Loop(
    steps=10, batch_size=8, lr=3e-3, warmup=2, weight_decay=0.01, clip_norm=5.0, hold_out=6, checkpoint_every=3,
    log_every=2, validate_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


def plan_of(clf: ZeroShot, **changes: Any) -> Plan:
    """Cross-entropy on images with noise from the batch's own streams, and a pull to the clean features."""

    def attack(_student: Any, batch: Any) -> torch.Tensor:
        return (batch.x + batch.rng.uniform_like(batch.x, -0.02, 0.02)).clamp(0, 1)

    def loss(student: Any, batch: Any, x_adv: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        u = student.encode_image(x_adv)
        drift = (u - batch.cached["clean"]).square().sum(dim=1).mean() if batch.cached else u.new_zeros(())
        return F.cross_entropy(clf.head(u), batch.y) + drift, {"drift": drift}

    made = Plan(clf, attack, loss, remember=lambda x: {"clean": clf.vlm.encode_image(x)})
    return replace(made, **changes)


class KilledError(Exception):
    """Stands for the signal that ends a run between two steps."""


def kill_after(n: int) -> Any:
    def progress(step: int, _steps: int, _metrics: dict[str, Any]) -> None:
        if step == n:
            raise KilledError

    return progress


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "adamw": LOOP,
    "sgd": replace(LOOP, optimizer="sgd", lr=1e-2),
    "ema": replace(LOOP, ema=0.8),
    "lora": replace(LOOP, train="lora-2"),
    "parts": replace(LOOP, accumulate=4),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("killed", [2, 5, 9])
def test_a_killed_run_ends_with_the_same_bits(name: str, killed: int, problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    loop = VARIANTS[name]
    whole = finetune(plan_of(clf), data, loop=loop, seed=4, session=Session(tmp_path / "whole"))
    with pytest.raises(KilledError):
        finetune(plan_of(clf), data, loop=loop, seed=4, session=Session(tmp_path / "cut", progress=kill_after(killed)))
    torch.rand(3)  # whatever else happens to the global stream
    resumed = finetune(plan_of(clf), data, loop=loop, seed=4, session=Session(tmp_path / "cut"))
    assert whole
    assert same(whole, resumed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert same(whole, finetune(plan_of(clf), data, loop=loop, seed=4))


def test_a_finished_run_is_not_trained_again(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    whole = finetune(plan_of(clf), data, loop=LOOP, session=Session(tmp_path))
    again = finetune(plan_of(clf), data, loop=LOOP, session=Session(tmp_path, progress=kill_after(1)))
    assert same(whole, again)


def test_other_settings_are_refused_with_the_difference(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    finetune(plan_of(clf), data, loop=LOOP, recipe="A(eps=1/255)", session=Session(tmp_path))
    with pytest.raises(ValueError) as err:
        finetune(plan_of(clf), data, loop=replace(LOOP, lr=1e-3), seed=1, recipe="A()", session=Session(tmp_path))
    for part in ("lr: 0.003 there, 0.001 now", "seed: 0 there, 1 now", "recipe: A(eps=1/255) there", "--no-resume"):
        assert part in str(err.value)
    assert "batch_size" not in str(err.value)
    fewer = data.take(range(30))
    with pytest.raises(ValueError, match=r"data\.images: 40 there, 30 now"):
        finetune(plan_of(clf), fewer, loop=LOOP, recipe="A(eps=1/255)", session=Session(tmp_path))
    other = replace(data, recipe="resize8-bicubic-crop8")
    with pytest.raises(ValueError, match=r"data\.preprocessing: none there, resize8-bicubic-crop8 now\. Give"):
        finetune(plan_of(clf), other, loop=LOOP, recipe="A(eps=1/255)", session=Session(tmp_path))
    finetune(
        plan_of(clf), data, loop=replace(LOOP, log_every=1), recipe="A(eps=1/255)", session=Session(tmp_path)
    )  # how often to write is no setting of the weights
    finetune(plan_of(clf), data, loop=LOOP, recipe="A()", session=Session(tmp_path, resume=False))


def test_the_model_is_left_as_it_was(problem: Any) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    stream = torch.random.get_rng_state()
    for loop in (LOOP, VARIANTS["lora"]):
        state = finetune(plan_of(clf), data, loop=loop)
        assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in clf.vlm.parameters())
        assert set(state) < set(before)
    assert torch.equal(torch.random.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("all", {f"image.tower.{layer}.{kind}" for layer in ("one", "two", "out") for kind in ("weight", "bias")}),
        ("last-1", {"image.tower.out.weight", "image.tower.out.bias"}),
        ("lora-2", {f"image.tower.{layer}.weight" for layer in ("one", "two", "out")}),
    ],
)
def test_only_what_is_trained_changes(train: str, names: set[str], problem: Any) -> None:
    clf, data = problem
    state = finetune(plan_of(clf), data, loop=replace(LOOP, train=train))
    assert set(state) == names
    own = clf.vlm.state_dict()
    if train.startswith("lora"):
        for name, value in state.items():
            delta = (value - own[name]).flatten(1).double()
            assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 2


def test_low_rank_starts_at_the_model_and_merges_exactly(problem: Any) -> None:
    clf, data = problem
    student, chosen = student_of(clf.vlm, ("image",), replace(LOOP, train="lora-3"), 0)
    x = data.read(list(range(6)))
    assert torch.equal(student.encode_image(x), clf.vlm.encode_image(x))
    assert sum(p.numel() for p in chosen.values()) < sum(p.numel() for p in clf.vlm.image.parameters())
    state = finetune(plan_of(clf), data, loop=replace(LOOP, train="lora-3"))
    merged = clf.vlm.with_state(state)
    assert not torch.equal(merged.encode_image(x), clf.vlm.encode_image(x))


def test_parts_of_a_batch_add_up(problem: Any) -> None:
    clf, data = problem
    one = finetune(plan_of(clf), data, loop=replace(LOOP, optimizer="sgd"))
    four = finetune(plan_of(clf), data, loop=replace(LOOP, optimizer="sgd", accumulate=4))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)


def test_frozen_during_the_attack_and_nothing_leaks(problem: Any) -> None:
    """The update equals that of a run whose adversarial images were made beforehand by another model."""
    clf, data = problem
    seen: list[torch.Tensor] = []

    def attack(student: Any, batch: Any) -> torch.Tensor:
        assert not any(p.requires_grad for p in student.parameters())
        leaf = batch.x.clone().requires_grad_(True)
        with torch.enable_grad():
            out = clf.with_vlm(student)(leaf)
            F.cross_entropy(out, batch.y, reduction="sum").backward()
        assert leaf.grad is not None
        seen.append((batch.x + 0.02 * leaf.grad.sign()).clamp(0, 1))
        return seen[-1]

    leaky = finetune(plan_of(clf, attack=attack), data, loop=replace(LOOP, hold_out=0))
    ready = iter(list(seen))
    plain = finetune(plan_of(clf, attack=lambda *_: next(ready)), data, loop=replace(LOOP, hold_out=0))
    assert same(leaky, plain)


def test_remembered_features_are_those_computed_anew(problem: Any, tmp_path: Path) -> None:
    """Ten steps of 8 see 34 images more than once: remembered. Three do not: computed in passing. Same loss."""
    clf, data = problem
    calls: list[int] = []

    def remember(x: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(x))
        return {"clean": clf.vlm.encode_image(x)}

    plan = plan_of(clf, remember=remember)
    finetune(plan, data, loop=LOOP, session=Session(tmp_path / "a"))
    assert sum(calls) == len(data)
    calls.clear()
    finetune(plan, data, loop=LOOP, session=Session(tmp_path / "a"))
    assert not calls, "kept in the run's folder"
    by_label = replace(plan, remember_labelled=lambda x, y: {"y": y[:, None].float()})
    run = Student(by_label, data, LOOP, 0)
    run.begin(None, "", True)
    assert run.feed.memory["y"].flatten().tolist() == data.labels
    assert torch.equal(run.feed.batch([3, 7], 0).cached["y"].flatten(), torch.tensor(data.labels)[[3, 7]].float())
    calls.clear()
    short = replace(LOOP, steps=3, hold_out=0, log_every=1, validate_every=9)
    finetune(plan, data, loop=short, session=Session(tmp_path / "b"))
    assert calls == [8, 8, 8]
    longer = replace(short, steps=10, schedule="constant")
    finetune(plan, data, loop=longer, session=Session(tmp_path / "c"))
    first = [entry["loss"] for entry in lines(tmp_path / "b")[1:3]]
    assert first == pytest.approx([entry["loss"] for entry in lines(tmp_path / "c")[1:3]], rel=1e-5)


def test_diverging_training_stops_and_keeps_the_last_good_state(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    good = plan_of(clf)

    def loss(student: Any, batch: Any, x_adv: torch.Tensor) -> Any:
        value, figures = good.loss(student, batch, x_adv)
        return value * (math.nan if batch.step == 7 else 1.0), figures

    with pytest.warns(UserWarning, match=r"diverged at step 8 \(loss nan, .*\): the state of step 6 is kept; use a l"):
        kept = finetune(plan_of(clf, loss=loss), data, loop=LOOP, session=Session(tmp_path))
    point = load_checkpoint(tmp_path / "checkpoints")
    assert point is not None
    assert point.step == 6
    assert torch.equal(kept["image.tower.out.weight"], point.weights["image.tower.out.weight"])
    assert "diverged" in lines(tmp_path)[-1]
    with pytest.raises(RuntimeError, match="before the first checkpoint: there is no good state to keep"):
        finetune(plan_of(clf, loss=loss), data, loop=replace(LOOP, checkpoint_every=9))


def test_a_loss_that_grows_tenfold_is_divergence(problem: Any) -> None:
    clf, data = problem
    good = plan_of(clf)

    def loss(student: Any, batch: Any, x_adv: torch.Tensor) -> Any:
        value, figures = good.loss(student, batch, x_adv)
        return value + max(0, batch.step - 25) * 10.0, figures

    long = replace(LOOP, steps=60, hold_out=0)
    with pytest.warns(UserWarning, match=r"diverged at step \d+ \(mean loss .* after .* at first\)"):
        finetune(plan_of(clf, loss=loss), data, loop=long)


def test_a_negative_loss_that_falls_is_no_divergence(problem: Any) -> None:
    clf, data = problem

    def loss(student: Any, batch: Any, x_adv: torch.Tensor) -> Any:
        weight = next(student.image.parameters())
        return 0.0 * weight.sum() - 0.5 - 0.01 * max(batch.step, 0), {}

    assert finetune(plan_of(clf, loss=loss), data, loop=replace(LOOP, steps=60, hold_out=0))


def test_held_out_images_are_never_trained_on(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    trained: set[str] = set()
    held: set[str] = set()

    def attack(_student: Any, batch: Any) -> torch.Tensor:
        (held if batch.step < 0 else trained).update(batch.ids)
        return batch.x

    finetune(plan_of(clf, attack=attack), data, loop=LOOP, session=Session(tmp_path))
    assert len(held) == 6
    assert len(trained) == 34
    assert not held & trained
    shown = [entry for entry in lines(tmp_path) if "val_clean" in entry]
    assert [entry["step"] for entry in shown] == [0, 4, 8, 10]
    assert {"val_loss", "val_drift", "val_clean", "val_robust"} <= shown[0].keys()
    assert Feed(clf, data.take(range(8)), LOOP, 0).held.__len__() == 1, "at most a fifth"


def test_running_means_are_what_is_kept(problem: Any) -> None:
    """With decay 0.5 after two steps: a quarter of the start, a quarter of the first, half of the second."""
    clf, data = problem
    loop = replace(LOOP, steps=2, warmup=0, schedule="constant")
    one = finetune(plan_of(clf), data, loop=replace(loop, steps=1, diverged=11))
    two = finetune(plan_of(clf), data, loop=loop)
    mean = finetune(plan_of(clf), data, loop=replace(loop, ema=0.5))
    key = "image.tower.out.weight"
    want = 0.25 * clf.vlm.state_dict()[key] + 0.25 * one[key] + 0.5 * two[key]
    torch.testing.assert_close(mean[key], want, rtol=1e-4, atol=1e-6)


def test_bf16_trains_fp32_weights(problem: Any) -> None:
    clf, data = problem
    full, low = (finetune(plan_of(clf), data, loop=replace(LOOP, precision=p)) for p in ("fp32", "bf16"))
    assert all(v.dtype == torch.float32 for v in low.values())
    own = clf.vlm.state_dict()
    a, b = (torch.cat([(s[k] - own[k]).flatten() for k in full]) for s in (full, low))
    assert not torch.equal(a, b)
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.8


def test_learning_rates() -> None:
    loop = Loop(steps=100, warmup=10, lr=1.0)
    assert loop.rate(0) == pytest.approx(0.1)
    assert loop.rate(9) == loop.rate(10) == 1.0
    assert loop.rate(55) == pytest.approx(0.5)
    assert loop.rate(99) < 1e-3
    late = replace(loop, first_step_full=True)
    assert (late.rate(0), late.rate(1)) == (1.0, pytest.approx(0.2))
    assert replace(loop, schedule="constant").rate(80) == 1.0
    drops = replace(loop, schedule="constant", drops=(0.6, 0.8))
    assert [drops.rate(s) for s in (59, 60, 79, 80, 99)] == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])
    assert replace(loop, drops=(0.5,)).rate(55) == pytest.approx(0.05)
    assert loop.resized(steps=20).warmup == 2
    assert loop.resized(steps=20, warmup=3).warmup == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
        ({"steps": 5, "warmup": 5}, "warmup must be shorter than steps=5, got 5"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 must be a multiple of accumulate 4"),
        ({"train": "head"}, "train must be all, last-N or lora-R, got 'head'; write last-2 or lora-8"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None, got 0.0"),
        ({"drops": (0.6, 1.0)}, r"drops must lie between 0 and 1, got \(0.6, 1.0\); write \(0.6, 0.8\)"),
    ],
)
def test_bad_loops_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loop(**fields)


def test_bad_data_is_refused(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    one = data.take([i for i, y in enumerate(data.labels) if y == 1])
    cases: list[tuple[Any, str]] = [
        (one, "toys shows a single class; training needs images of at least 2"),
        (data.take([]), "toys is empty; training needs images"),
        (replace(data, class_names=[f"x{i}" for i in range(5)]), "5 classes that are not the 5 of toys; write ZeroSh"),
        (replace(data, read=lambda rows: data.read(rows) * 3), r"images must lie in \[0, 1\]"),
        (replace(data, read=lambda rows: data.read(rows)[..., :4]), "images must be 8 x 8 for this model, got 8 x 4"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            finetune(plan_of(clf, remember=None), bad, loop=LOOP)
    with pytest.raises(ValueError, match="last-9: the image tower has only 3 layers"):
        finetune(plan_of(clf), data, loop=replace(LOOP, train="last-9"))
    with pytest.raises(ValueError, match=r"the text tower of .* has no parameters to train"):
        finetune(plan_of(clf, towers=("text",)), data, loop=LOOP)


def test_joined_sets_share_one_label_space(problem: Any) -> None:
    clf, data = problem
    x = data.read(list(range(6)))
    other = image_set(x.flip(3), torch.tensor([0, 1, 0, 1, 0, 1]), ["cat", "fox"], name="more")
    both = joined([data, other])
    assert both.class_names == [*CLASSES, "cat", "fox"]
    assert len(both) == 46
    with pytest.warns(UserWarning, match="equal prompts are merged into one class each: cat"):
        wide = ZeroShot.build(clf.vlm, both.class_names, both.templates)
    feed = Feed(wide, both, replace(LOOP, hold_out=0), 0)
    batch = feed.batch([2, 40, 41], 0)
    assert torch.equal(batch.x[1:], x.flip(3)[:2])
    assert [wide.class_names[i] for i in batch.y] == ["cat", "cat", "fox"]
    names = [[n for n, mine in zip(wide.class_names, row, strict=True) if mine] for row in batch.own]
    assert names == [list(CLASSES), ["cat", "fox"], ["cat", "fox"]]
    assert joined([data]) is data
    with pytest.raises(ValueError, match="toys is named twice"):
        joined([data, data])
    with pytest.warns(UserWarning, match="different templates: all classes use 'a photo of a {}.'"):
        assert joined([data, replace(other, templates=["a sketch of a {}."])]).templates == ["a photo of a {}."]
