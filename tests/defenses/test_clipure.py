"""CLIPure-Cos: the scalar recursion against the gradient loop it replaces, and the quirks of the published code."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import clipure_literal
from torch import Tensor
from toys import generator, toy_clf, toy_images, words

import ironclip
from ironclip.core.views import base_of
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses.clipure import CLIPure, loop, null_direction, null_prompts, rotate

PER_ROW = CLIPure(mode="per_sample")
BATCH = CLIPure(preset="reference")


def at_angles(*degrees: float) -> tuple[Tensor, Tensor]:
    """Unit rows in the plane at these angles from t = (1, 0), float64."""
    a = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([a.cos(), a.sin()], dim=1), torch.tensor([1.0, 0.0], dtype=torch.float64)


def signed(z: Tensor) -> Tensor:
    return torch.rad2deg(torch.atan2(z[:, 1], z[:, 0]))


def unit_rows(b: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    z = F.normalize(torch.randn(b, d, generator=g, dtype=torch.float64), dim=1)
    return z, F.normalize(torch.randn(d, generator=g, dtype=torch.float64), dim=0)


def purified(defense: CLIPure, z: Tensor, t: Tensor) -> Tensor:
    return rotate(z, t, defense._turn)


# by hand


@pytest.mark.parametrize(("steps", "degrees"), [(1, -10.0908), (2, 78.0), (9, -10.0908), (10, 78.0)])
@pytest.mark.parametrize("mode", ["per_sample", "reference"])
def test_the_angle_swings_with_period_two(steps: int, degrees: float, mode: str) -> None:
    z, t = at_angles(78.0)
    got = float(signed(purified(CLIPure(mode=mode, steps=steps), z, t)))
    exact = 78.0 - (math.degrees(math.atan(30)) if steps % 2 else 0.0)
    assert got == pytest.approx(exact, abs=1e-9)
    assert got == pytest.approx(degrees, abs=1e-4)


@pytest.mark.parametrize("angle", [70.0, 78.0, 85.0])
def test_published_constants_are_the_identity_for_one_image(angle: float) -> None:
    z, t = at_angles(angle)
    torch.testing.assert_close(purified(BATCH, z, t), z)


def test_a_batch_of_64_flips_the_images_own_part() -> None:
    _, t = unit_rows(1, 32, 5)
    normal = torch.randn(64, 32, generator=generator(3), dtype=torch.float64)
    normal = F.normalize(normal - (normal @ t)[:, None] * t, dim=1)
    z = math.cos(math.radians(78)) * t + math.sin(math.radians(78)) * normal
    out = purified(BATCH, z, t)
    step = math.degrees(math.atan(30 / 8))
    assert step == pytest.approx(75.07, abs=5e-3)
    end = math.radians(78 - 2 * step)
    torch.testing.assert_close((out * normal).sum(1), torch.full((64,), math.sin(end), dtype=torch.float64))
    assert float((out * normal).sum(1).max()) < -0.9


def test_row_step_of_a_batch_of_equals() -> None:
    for b, degrees in ((2, 87.30), (8, 84.61), (64, 75.07)):
        z, t = at_angles(*[89.0] * b)
        turned = 89.0 - signed(purified(CLIPure(mode="reference", steps=1), z, t))
        assert turned.tolist() == pytest.approx([degrees] * b, abs=5e-3)


# against the literal transcription


@pytest.mark.parametrize("eta", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10])
def test_closed_form_equals_the_gradient_loop(eta: float, steps: int) -> None:
    z, t = unit_rows(6, 16, steps)
    z = torch.cat([z, -0.999 * t[None] + 0.045 * z[:1]])
    z = F.normalize(z, dim=1)
    assert float((z @ t).arccos().max()) > math.atan(30.0)
    want = clipure_literal.purify(z, 0.3 * t, eta=eta, steps=steps, per_row=True)
    got = purified(CLIPure(mode="per_sample", eta=eta, steps=steps), z, t)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("b", [1, 2, 8, 64])
@pytest.mark.parametrize("eta", [1.0, 30.0])
def test_batch_recursion_equals_the_published_loop(b: int, eta: float) -> None:
    z, t = unit_rows(b, 16, b)
    for steps in (1, 4, 10):
        want = clipure_literal.purify(z, 2.0 * t, eta=eta, steps=steps, per_row=False)
        got = purified(CLIPure(mode="reference", eta=eta, steps=steps), z, t)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
        torch.testing.assert_close(loop(z, t, eta, steps, constant=True), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_geodesic_is_spherical_interpolation(share: float) -> None:
    z, t = unit_rows(7, 16, 2)
    torch.testing.assert_close(
        purified(CLIPure(share=share), z, t), clipure_literal.geodesic(z, t, share), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("spec", "per_row"), [("CLIPure(preset=reference)", False), ("CLIPure(mode=per_sample)", True)]
)
def test_logits_equal_the_transcription_in_fp32(spec: str, per_row: bool) -> None:
    clf, x = toy_clf(), toy_images(4)
    defense = ironclip.build(spec)
    prompts = null_prompts(clf, defense.null)
    null = clipure_literal.null_embedding(clf.vlm.encode_text(prompts, normalize=False))
    z = clf.vlm.encode_image(x, normalize=False).double()
    z = z / torch.sqrt((z**2).sum(1, keepdim=True))
    out = clipure_literal.purify(z, null, eta=30.0, steps=10, per_row=per_row)
    want = clipure_literal.logits(out, clf.weights, clf.scale)
    got = defense.apply(clf)(x)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_score_formula_with_two_dot_products() -> None:
    """l = s (cos phi' b + sin phi' (z T - c b) / sin phi): what the head gives without forming z' twice."""
    clf, x = toy_clf(), toy_images(5)
    t, z = null_direction(clf, "own"), clf.features(x)
    c, b = (z @ t)[:, None], (clf.weights @ t)[None]
    phi = c.arccos()
    turned = 0.7 * phi
    want = clf.scale * (turned.cos() * b + turned.sin() * (z @ clf.weights.T - c * b) / phi.sin())
    torch.testing.assert_close(CLIPure().apply(clf)(x), want, rtol=0, atol=1e-4)


# shape of the map


@pytest.mark.parametrize("defense", [CLIPure(), PER_ROW, BATCH])
def test_unit_length_and_the_plane_of_z_and_t(defense: CLIPure) -> None:
    z, t = unit_rows(9, 16, 4)
    out = purified(defense, z, t)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(9, dtype=torch.float64))
    for row, image in zip(out, z, strict=True):
        basis = torch.stack([image, t], dim=1)
        rest = row - basis @ torch.linalg.lstsq(basis, row[:, None]).solution.flatten()
        assert float(rest.norm()) < 1e-9


def test_share_zero_is_the_identity_and_share_one_the_null_prompt() -> None:
    clf, x = toy_clf(), toy_images(5)
    torch.testing.assert_close(CLIPure(share=0.0).apply(clf)(x), clf(x))
    gone = CLIPure(share=1.0).apply(clf).features(x)
    torch.testing.assert_close(gone, null_direction(clf, "own").expand(5, -1))


@pytest.mark.parametrize("defense", [CLIPure(), PER_ROW, BATCH])
def test_parallel_and_antiparallel_rows_stay_and_have_gradients(defense: CLIPure) -> None:
    rows, t = unit_rows(1, 8, 0)
    z = torch.cat([t[None], -t[None], rows]).requires_grad_(True)
    out = purified(defense, z, t)
    torch.testing.assert_close(out[:2], z[:2])
    (grad,) = torch.autograd.grad(out[:, 0].sum(), z)
    assert bool(torch.isfinite(out).all() & torch.isfinite(grad).all())
    alone = t[None].clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(purified(defense, alone, t)[:, 0].sum(), alone)
    assert bool(torch.isfinite(grad).all())


def test_neighbours_matter_in_reference_mode_only() -> None:
    clf, x = toy_clf(), toy_images(2)
    other = torch.cat([x[:1], toy_images(1, seed=9)])
    for defense, depends in ((CLIPure(), False), (PER_ROW, False), (BATCH, True)):
        defended = defense.apply(clf)
        change = float((defended(x)[0] - defended(other)[0]).abs().max())
        assert (change > 1e-3) == depends, defense
        assert bool(base_of(defended, "batchwise")) == depends
        assert not base_of(defended, "randomized")


# gradients: the exact one, the published one


@pytest.mark.parametrize("defense", [CLIPure(), PER_ROW, CLIPure(mode="reference", eta=2.0, steps=3)])
def test_derivative_matches_finite_differences(defense: CLIPure) -> None:
    z, t = unit_rows(3, 6, 7)
    w = torch.randn(6, 4, generator=generator(8), dtype=torch.float64)

    def value(rows: Tensor) -> Tensor:
        return (purified(defense, F.normalize(rows, dim=1), t) @ w).logsumexp(1)

    assert torch.autograd.gradcheck(value, (z.clone().requires_grad_(True),), eps=1e-6, atol=1e-6)


def pixel_gradient(view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    out = view(leaf)
    (grad,) = torch.autograd.grad((out[:, 0] - out[:, 1]).sum(), leaf)
    return grad


def same_way(a: Tensor, b: Tensor) -> Tensor:
    """(b,) cosine of the rows, however small they are."""
    return torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1), eps=1e-100)


@pytest.mark.parametrize("b", [1, 2])
def test_published_gradient_is_zero_in_half_precision_and_blind_to_the_turn(b: int) -> None:
    """With the direction a constant, ten updates shrink the gradient by (1 + eta^2)^-5 and leave its direction that of
    the undefended model, even where the purifier turns the image's own part round, as on this tower."""
    clf, x = toy_clf(seed=1), toy_images(b)
    plain = pixel_gradient(clf, x)
    for exact in (BATCH.apply(clf), BATCH.surrogate(clf, None, "graph")):
        grad = pixel_gradient(exact, x)
        assert float(grad.norm()) > 0.1 * float(plain.norm())
        assert float(same_way(grad, plain).max()) < -0.9
    published = pixel_gradient(BATCH.surrogate(clf, None, "published"), x)
    assert 0 < float(published.norm()) < 1e-10 * float(plain.norm())
    assert float(same_way(published, plain).min()) > 0.9
    assert int((100 * published).half().count_nonzero()) == 0


def test_graph_surrogate_has_the_derivative_of_the_closed_form() -> None:
    clf, x = toy_clf(seed=1), toy_images(3).requires_grad_(True)
    outs = [BATCH.apply(clf)(x), BATCH.surrogate(clf, None, "graph")(x)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-3)
    one, two = (torch.autograd.grad(o.logsumexp(1).sum(), x)[0] for o in outs)
    assert float(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)) > 0.9999


def test_identity_surrogate_keeps_the_value_and_drops_the_turn() -> None:
    clf, x = toy_clf(), toy_images(3).requires_grad_(True)
    defense = CLIPure(share=0.8)
    soft = defense.surrogate(clf, None, "identity")(x)
    assert torch.equal(soft, defense.apply(clf)(x))
    (got,) = torch.autograd.grad(soft[:, 0].sum(), x)
    (plain,) = torch.autograd.grad(clf(x)[:, 0].sum(), x)
    torch.testing.assert_close(got, plain)


# the null prompt


def test_null_prompts_hold_no_class() -> None:
    clf = toy_clf(classes=("tench", "goldfish", "toaster"))
    prompts = null_prompts(clf, "imagenet80")
    assert len(prompts) == len(set(prompts)) == 80
    assert not any(name in p for p in prompts for name in clf.class_names)
    assert "a photo of a ." in prompts
    assert null_prompts(clf, "own") == ["a photo of a ."]


def test_null_direction_ignores_the_order_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    clf = toy_clf()
    prompts = null_prompts(clf, "imagenet80")
    before = null_direction(clf, "imagenet80")
    random.Random(0).shuffle(prompts)
    monkeypatch.setattr("ironclip.defenses.clipure.null_prompts", lambda *_: prompts)
    torch.testing.assert_close(null_direction(clf, "imagenet80"), before)
    assert float(before.norm()) == pytest.approx(1.0)


# errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": 0.0}, "eta must be positive and finite, got 0.0; write 30"),
        ({"steps": -1}, "steps must not be negative, got -1; write 10"),
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5; write 0.3"),
        ({"mode": "geodesics"}, "unknown mode 'geodesics'; did you mean 'geodesic'"),
        ({"null": "imagenet"}, "unknown null 'imagenet'; did you mean 'imagenet80'"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPure(**fields)


def test_features_without_length_are_refused() -> None:
    dark = VLM.wrap(lambda x: x.flatten(1)[:, :4], words(4), 2, name="dark")
    clf = ZeroShot.build(dark, ["a", "b"])
    with pytest.raises(ValueError, match="dark gives an image a feature of length zero"):
        CLIPure().apply(clf)(torch.zeros(1, 3, 2, 2))
    named = words(4)
    mute = VLM.wrap(lambda x: x.flatten(1)[:, :4], lambda ts: named(ts) * (ts != ["a photo of a ."]), 2, name="mute")
    with pytest.raises(ValueError, match="the null prompt null=own of mute has length zero; use another null"):
        CLIPure().apply(ZeroShot.build(mute, ["a", "b"]))


def test_bad_images_and_names() -> None:
    clf = toy_clf()
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        CLIPure().apply(clf)(toy_images(2) * 255)
    with pytest.raises(ValueError, match="unknown surrogate of CLIPure 'graph'"):
        CLIPure().surrogate(clf, None, "graph")


def test_preset_and_cost() -> None:
    assert repr(BATCH) == "CLIPure(mode=reference, null=imagenet80)"
    clf, x = toy_clf(), toy_images(6)
    defended = CLIPure().apply(clf)
    with clf.vlm.counting() as count, torch.no_grad():
        defended(x)
    assert (count.forwards, count.backwards, count.texts) == (6, 0, 0)
