"""DiffPure on a tiny random UNet: the chain against its literal transcription, its derivative, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusion_models import TINY_UNET, need_diffusers, save_pipeline, tiny_unet, unet
from reference import diffusion_literal
from torch import Tensor
from toys import toy_clf, toy_images

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.defenses.diffpure import DiffPure, Model, load_model, purified
from ironclip.evaluation.recipes import members_for


@pytest.fixture(scope="module")
def folder() -> str:
    tiny_unet()
    return TINY_UNET


def in_double(model: Model) -> Model:
    return replace(model, net=copy.deepcopy(model.net).double())


def test_visited_steps() -> None:
    assert DiffPure(t=0.1, steps=4).times(1000) == [99, 66, 33, 0]
    assert DiffPure(t=0.1, steps=1).times(1000) == [99]
    assert DiffPure(t=0.005, steps=None).times(1000) == [4, 3, 2, 1, 0]
    assert len(DiffPure(preset="reference").times(1000)) == 150
    with pytest.raises(ValueError, match=r"t=0\.005 of 1000 steps leaves 5 to go back, got steps=10; write fewer"):
        DiffPure(t=0.005).times(1000)


@pytest.mark.parametrize("clip", [1.0, None])
def test_the_chain_equals_the_transcription(folder: str, clip: float | None) -> None:
    model, stream = replace(in_double(load_model(folder, "cpu")), clip=clip), SampleRNG.of(4, ["a", "b"])
    x, times = toy_images(2, size=16).double(), [300, 150, 0]
    got = purified(model, times, x, stream)
    bars = model.kept.tolist()
    start = stream.fold("start").normal(3, 16, 16).double()
    noises = [stream.fold("back", i).normal(3, 16, 16).double() for i in range(3)]

    def noise_of(z: Tensor, t: int) -> Tensor:
        return model.net(z[None], t).sample[0]

    for row in range(2):
        with torch.no_grad():
            want = diffusion_literal.ddpm(x[row], noise_of, bars, times, start[row], [n[row] for n in noises], clip)
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-7)


def test_a_model_that_knows_the_image_gives_it_back(folder: str) -> None:
    class Knows:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    x = toy_images(2, size=16)
    oracle = replace(load_model(folder, "cpu"), net=lambda z, t: Knows(2 * x - 1), kind="sample")
    for times in ([99], [500, 100, 0]):
        torch.testing.assert_close(purified(oracle, times, x, SampleRNG.rows(2)), x)


def test_the_derivative_is_that_of_the_chain_and_memory_holds_one_step(folder: str) -> None:
    model = replace(in_double(load_model(folder, "cpu")), clip=None)
    x, stream = (0.4 + 0.2 * toy_images(1, size=16)).double(), SampleRNG.rows(1)
    weight = toy_images(1, size=16, seed=3).double()

    def value(v: Tensor) -> Tensor:
        return (purified(model, [60, 20, 0], v, stream) * weight).sum()

    leaf = x.clone().requires_grad_(True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = value(leaf)
    assert max(saved) <= 3 * 16 * 16, "no activation of the network is kept"
    (grad,) = torch.autograd.grad(out, leaf)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        slope = float((value(x + h * way) - value(x - h * way)) / (2 * h))
    assert float((grad * way).sum()) == pytest.approx(slope, rel=1e-4)


def test_identity_surrogate_has_the_models_own_gradient_at_the_purified_image(folder: str) -> None:
    clf, rng = toy_clf(), SampleRNG.rows(3)
    x, defense = toy_images(3).requires_grad_(True), DiffPure(model=folder, steps=2)
    soft = defense.surrogate(clf)(x, rng)
    torch.testing.assert_close(soft, defense.apply(clf)(x, rng), rtol=0, atol=1e-4)
    (got,) = torch.autograd.grad(soft[:, 0].sum(), x)
    at = defense.apply(clf).seen(x, rng).detach().requires_grad_(True)
    (plain,) = torch.autograd.grad(clf(at)[:, 0].sum(), at)
    torch.testing.assert_close(got, plain)


def test_adaptive_members_and_cost(folder: str) -> None:
    names = [m.name for m in members_for("purification", DiffPure.surrogates, False)]
    assert {"through-ce", "identity", "square"} <= set(names)
    assert DiffPure.info.randomized
    clf, calls = toy_clf(), []
    model = load_model(folder, "cpu")
    handle = model.net.register_forward_hook(lambda *_: calls.append(1))
    try:
        with clf.vlm.counting() as count, torch.no_grad():
            DiffPure(model=folder, steps=4).apply(clf)(toy_images(2), SampleRNG.rows(2))
    finally:
        handle.remove()
    assert (len(calls), count.forwards) == (4, 2)


def test_models_at_the_top_of_a_folder_and_of_other_predictions(tmp_path: Path) -> None:
    from_pipeline = save_pipeline(tmp_path / "v", unet(out_channels=6), prediction_type="v_prediction")
    made = load_model(str(from_pipeline), "cpu")
    assert (made.kind, made.clip, made.size) == ("v_prediction", 1.0, 16)
    out = purified(made, [10, 0], toy_images(2), SampleRNG.rows(2))
    assert out.shape == (2, 3, 8, 8)
    flat = tmp_path / "flat"
    for part in ("unet", "scheduler"):
        for file in (from_pipeline / part).iterdir():
            flat.mkdir(exist_ok=True)
            file.rename(flat / file.name)
    assert torch.equal(purified(load_model(str(flat), "cpu"), [10, 0], toy_images(2), SampleRNG.rows(2)), out)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    need_diffusers()
    grey = save_pipeline(tmp_path / "grey", unet(in_channels=1, out_channels=1))
    named = save_pipeline(tmp_path / "named", unet(num_class_embeds=10))
    for folder, message in (
        (grey, "has 1 channels in and 1 out; expected 3 and 3"),
        (named, "is a class-conditional model; name an unconditional one"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffPure(model=str(folder)).apply(toy_clf())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"could not be loaded as a UNet2DModel: .*no unet/config\.json"):
        DiffPure(model=str(tmp_path / "empty")).apply(toy_clf())


def test_bad_fields_and_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, message in (
        ("DiffPure(t=0)", r"t must lie in \(0, 1\], got 0\.0; write 0\.1"),
        ("DiffPure(steps=0)", "steps must be 1 or more, got 0; write 10, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            ironclip.build(spec)
    with pytest.raises(ValueError, match=r"needs an image model; write DiffPure\(model='google/ddpm-cifar10-32'\)"):
        DiffPure().apply(toy_clf())
    monkeypatch.setattr("ironclip.defenses._diffusers.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r'type pip install "ironclip\[diffusion\]"'):
        DiffPure(model="someone/unet").apply(toy_clf())
