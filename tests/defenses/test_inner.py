"""Unrolled inner steps: the gradient of the plain unrolling, the memory of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_clf, toy_images

from ironclip.core.rng import SampleRNG
from ironclip.defenses import _inner, _walk
from ironclip.defenses._inner import checkpointed, counterattack
from ironclip.defenses._walk import sign_walk
from ironclip.defenses.ttc import TTC

U = 1 / 255


def plain(step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The same step with its whole graph kept."""
    return step(*inputs)


def counter(x: Tensor, tower: str, steps: int, norm: str) -> Tensor:
    vlm = toy_clf(tower=tower).vlm
    noise = 4 * U * SampleRNG.rows(len(x)).uniform_like(x, -1.0, 1.0)
    weights = [1.0 / (steps + 1)] * (steps + 1)
    clean = vlm.encode_image(x, normalize=False)
    size = (0.5, 0.2) if norm == "l2" else (8 * U, 2 * U)
    return counterattack(vlm, x, noise, clean, *size, norm, weights, 10.0 if norm == "linf" else None)


def walk(x: Tensor, tower: str, steps: int, norm: str) -> Tensor:
    clf = toy_clf(tower=tower)
    return sign_walk(lambda v: clf(v).logsumexp(1), x, steps, U, 4 * U, kappa=10.0)


def gradient(make: Callable[..., Tensor], *args: Any) -> Tensor:
    x = toy_images(4).requires_grad_(True)
    weight = torch.linspace(-1, 1, x.numel()).view_as(x)
    (grad,) = torch.autograd.grad((make(x, *args) * weight).sum(), x)
    return grad


@pytest.mark.parametrize("tower", ["conv", "attention"])
@pytest.mark.parametrize(("make", "norm"), [(counter, "linf"), (counter, "l2"), (walk, "linf")])
def test_the_gradient_is_that_of_the_plain_unrolling(
    make: Callable[..., Tensor], norm: str, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = gradient(make, tower, 3, norm)
    for module in (_inner, _walk):
        monkeypatch.setattr(module, "checkpointed", plain)
    whole = gradient(make, tower, 3, norm)
    assert float((whole - gradient(make, tower, 0, norm)).abs().max()) > 1e-3, "the steps bend the gradient"
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


def held(make: Callable[..., Tensor], steps: int) -> int:
    """Bytes that the forward pass keeps for backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = toy_images(4).requires_grad_(True)
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or pack(t), lambda t: t):
        make(x, "conv", steps, "linf")
    return sum(kept.values())


@pytest.mark.parametrize("make", [counter, walk])
def test_more_steps_hold_a_few_images_more(make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    image = 4 * toy_images(4).numel()
    per_step = (held(make, 12) - held(make, 4)) / 8
    assert per_step <= 8 * image
    for module in (_inner, _walk):
        monkeypatch.setattr(module, "checkpointed", plain)
    assert (held(make, 12) - held(make, 4)) / 8 > 1.5 * per_step


def test_a_step_is_run_once_more_in_backward_and_gradients_reach_every_input() -> None:
    calls = []

    def step(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return a * b + c

    a, b = (torch.tensor([v], requires_grad=True) for v in (2.0, 3.0))
    out = checkpointed(step, a, b, torch.tensor([1.0]))
    assert out.item() == 7.0
    assert calls == [False]
    grads = torch.autograd.grad(out.sum(), (a, b))
    assert [g.item() for g in grads] == [3.0, 2.0]
    assert calls == [False, True]


def test_the_smooth_surrogate_costs_one_more_pass_per_step() -> None:
    clf, x = toy_clf(), toy_images(8).requires_grad_(True)
    view = TTC(tau=1e6, steps=3).surrogate(clf, None, "smooth")
    with clf.vlm.counting() as count:
        view(x, SampleRNG.rows(8)).sum().backward()
    # look (2) and clean again (1), three steps twice (6), the answer (1)
    assert count.forwards == 8 * (2 + 1 + 6 + 1)
