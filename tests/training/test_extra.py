"""Tensors of a method's own in the loop: trained beside a tower, at their own rate, kept through a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import image_set
from toys import CLASSES, toy_problem

from ironclip.core.loop import Loop
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.training.finetune import Plan, Session, finetune

LOOP = Loop(steps=6, batch_size=8, lr=3e-3, hold_out=0, checkpoint_every=2)


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    clf, x, y = toy_problem(40)
    return clf, image_set(x, y, list(CLASSES))


def plan_of(clf: ZeroShot, **changes: Any) -> Plan:
    """Cross-entropy against class weights that move by an own table, made once a step for attack and loss."""

    def prepare(student: Any, _batch: Any) -> dict[str, torch.Tensor]:
        return {"text": clf.weights + student.get_parameter("extra.shift")}

    def attack(_student: Any, batch: Any) -> torch.Tensor:
        assert batch.cached["text"].requires_grad, "made before the weights were frozen"
        return batch.x

    def loss(student: Any, batch: Any, x_adv: torch.Tensor) -> Any:
        z = clf.scale * student.encode_image(x_adv) @ batch.cached["text"].T
        return F.cross_entropy(z, batch.y), {}

    made = Plan(clf, attack, loss, extra={"shift": torch.zeros_like(clf.weights)}, prepare=prepare)
    return replace(made, **changes)


class KilledError(Exception):
    """Ends a run between two steps."""


def kill(step: int, _steps: int, _metrics: dict[str, Any]) -> None:
    if step == 3:
        raise KilledError


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_own_tensors_are_trained_stored_and_resumed_to_the_bit(optimizer: str, problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    loop = replace(LOOP, optimizer=optimizer, weight_decay=0.01)
    plan = plan_of(clf, rates={"extra.": 10.0})
    whole = finetune(plan, data, loop=loop, seed=3)
    assert float(whole["extra.shift"].abs().max()) > 0
    assert float(plan.extra["shift"].abs().max()) == 0, "the plan's start values stay"
    with pytest.raises(KilledError):
        finetune(plan, data, loop=loop, seed=3, session=Session(tmp_path, progress=kill))
    again = finetune(plan, data, loop=loop, seed=3, session=Session(tmp_path))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_own_rates(problem: Any) -> None:
    """One step of SGD: the table moves ten times as far at ten times the rate, the tower as before."""
    clf, data = problem
    loop = replace(LOOP, steps=1, optimizer="sgd", momentum=0.0)
    one, ten = (finetune(plan_of(clf, rates={"extra.": r}), data, loop=loop) for r in (1.0, 10.0))
    torch.testing.assert_close(ten["extra.shift"], 10 * one["extra.shift"])
    assert torch.equal(one["image.tower.out.weight"], ten["image.tower.out.weight"])


def test_adam_couples_its_decay_and_adamw_does_not(problem: Any) -> None:
    """First step: Adam moves by lr times the sign of gradient + wd w, AdamW by that of the gradient, and lr wd w."""
    clf, data = problem
    key = "image.tower.out.weight"
    w = clf.vlm.state_dict()[key]
    loop = replace(LOOP, steps=1, weight_decay=1e3, adam_eps=1e-12)
    adam = finetune(plan_of(clf), data, loop=replace(loop, optimizer="adam"))[key]
    torch.testing.assert_close(adam, w - LOOP.lr * w.sign(), rtol=1e-3, atol=1e-5)
    adamw = finetune(plan_of(clf), data, loop=loop)[key]
    torch.testing.assert_close(
        (adamw - w * (1 - LOOP.lr * 1e3)).abs(), torch.full_like(w, LOOP.lr), rtol=1e-2, atol=1e-4
    )


def test_running_means_hold_for_own_tensors_too(problem: Any) -> None:
    clf, data = problem
    loop = replace(LOOP, steps=1)
    last, mean = finetune(plan_of(clf), data, loop=loop), finetune(plan_of(clf), data, loop=replace(loop, ema=0.5))
    torch.testing.assert_close(mean["extra.shift"], last["extra.shift"] / 2)
