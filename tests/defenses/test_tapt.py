"""TAPT against hand cases, its literal transcription and its own slow mode; states that must be refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import byte_tokenizer, randomised, small_hf
from reference import tapt_literal
from torch import Tensor
from toys import generator, toy_clf
from transformers import CLIPConfig, CLIPModel

import ironclip
from ironclip.core.augment import Crops, crop_views, draw_crops
from ironclip.core.rng import SampleRNG
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._deep import Moments, block_inputs, distance, entropy_of_mean, visual_prompts, with_prompts
from ironclip.defenses._prompts import full_texts
from ironclip.defenses._tapt_state import Reference, assembled, statistics, untrained
from ironclip.defenses.tapt import TAPT
from ironclip.models.hf import wrap_clip

NAMES = ["ant", "large bee", "cat", "ox"]
SMALL: dict[str, Any] = {"views": 12, "share": 0.34, "template": "a b {}.", "lr": 5e-3}
VARIANTS = ("v", "vli", "vlj")


@pytest.fixture(scope="module")
def clf() -> ZeroShot:
    return ZeroShot.build(small_hf(), NAMES, ["a b {}."])


def deep_clf(layers: int = 10) -> ZeroShot:
    """A tower with more blocks than the published code aligns."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 258, "max_position_embeddings": 24, "eos_token_id": 257}
    vision = {**size, "num_hidden_layers": layers, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    vlm = wrap_clip(randomised(CLIPModel(config), 0), byte_tokenizer(), "deep").freeze()
    return ZeroShot.build(vlm, NAMES, ["a {}."])


def state_of(clf: ZeroShot, seed: int = 0, **fields: Any) -> State:
    """As after a fit: some prompts, and moments that tie with nothing."""
    tapt = TAPT(**{**SMALL, **fields})
    n, width, grid = len(clf.vlm.vision_blocks), clf.vlm.parts.vision_width, clf.vlm.parts.patch_grid
    shape = (n, 1 + grid[0] * grid[1] + tapt.tokens, width)
    out: State = {}
    for i, name in enumerate(("adv", "clean")):
        out |= {f"{name}.{k}": 5 * v for k, v in untrained(tapt, clf, name, seed).items()}
        out[f"{name}.mean"] = torch.randn(shape, generator=generator(seed + i))
        out[f"{name}.var"] = torch.rand(shape, generator=generator(9 + seed + i))
    return out


def photos(b: int, size: int = 32) -> Tensor:
    return F.interpolate(torch.rand(b, 3, 4, 4, generator=generator(9)), (size, size), mode="bicubic").clamp(0, 1)


# by hand


def test_the_entropy_is_that_of_the_mean() -> None:
    logits = torch.tensor([[[100.0, 0.0], [0.0, 100.0]], [[100.0, 0.0], [100.0, 0.0]]])
    assert entropy_of_mean(logits).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


def test_one_token_one_channel_two_views() -> None:
    h, mean, var = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5)
    assert float(distance([h], mean, var, "code")) == pytest.approx(100 / 9 * 0.75)
    assert float(distance([h], mean, var, "paper")) == pytest.approx(2.5)


def test_moments_in_uneven_batches_equal_numpy() -> None:
    rows = torch.randn(11, 2, 3, generator=generator(0)) * 5 + 100
    moments = Moments()
    for part in rows.split([1, 7, 3]):
        moments.add(part)
    mean, var = moments.result()
    np.testing.assert_allclose(mean.numpy(), rows.double().numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(var.numpy(), rows.double().numpy().var(0, ddof=1), rtol=1e-6)
    one = Moments()
    one.add(rows[:1])
    with pytest.raises(ValueError, match="statistics need at least 2 images, got 1; pass more data to fit"):
        one.result()


def test_block_inputs_are_what_the_blocks_see(clf: ZeroShot) -> None:
    """Prompts of the first layer pass the normalisation; those of the second replace the last tokens."""
    prompts = torch.randn(2, 3, 48, generator=generator(0))
    with visual_prompts(clf.vlm, prompts), block_inputs(clf.vlm, 3) as seen:
        clf.vlm.encode_image(photos(2))
    assert [tuple(h.shape) for h in seen] == [(2, 17 + 3, 48)] * 3
    norm = clf.vlm.image.vision_model.pre_layrnorm
    torch.testing.assert_close(seen[0][1, -3:], norm(prompts[0]))
    torch.testing.assert_close(seen[1][0, -3:], prompts[1])
    assert not torch.allclose(seen[2][0, -3:], prompts[1])


# against the literal transcription


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alignment", ["code", "paper"])
def test_one_step_equals_the_literal_transcription(clf: ZeroShot, variant: str, alignment: str) -> None:
    tapt = TAPT(**SMALL, variant=variant, alignment=alignment, alpha=0.3, align_prompts=alignment == "code")
    state, x = state_of(clf, variant=variant), photos(2)
    double = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    crops = draw_crops(SampleRNG.rows(2), 12, (32, 32), plain=True)
    ref = Reference.read(tapt, double, state)
    ref = replace(ref, reset={k: v.double() for k, v in ref.reset.items()})
    got = tapt.tune(double, ref, x.double(), crops)
    got32 = tapt.tune(clf, Reference.read(tapt, clf, state), x, crops)
    kept = 17 + (2 if tapt.align_prompts else 0)
    moments = [(state[f"{s}.mean"].double(), state[f"{s}.var"].double()) for s in ("adv", "clean")]
    for i in range(2):
        views = crop_views(x[i : i + 1].double(), Crops(crops.boxes[i : i + 1], crops.flips[i : i + 1]))[0]

        def read(prompts: dict[str, Tensor], views: Tensor = views) -> tuple[Tensor, list[Tensor]]:
            visual, text = assembled(prompts)
            texts = ref.texts(None) if text is None else full_texts(ref.soft, text)
            with visual_prompts(double.vlm, visual), block_inputs(double.vlm, 3) as seen:
                features = double.vlm.encode_image(views)
            return double.scale * features @ texts.T, list(seen)

        chosen = tapt_literal.selected(read(ref.reset)[0].detach(), tapt.share)
        assert chosen == tapt.select(double, ref, x.double(), crops)[i].tolist()
        moved, grads, _ = tapt_literal.one_step(
            lambda p, c=chosen, v=views: read(p, v[c]), ref.reset, moments, 0.3, tapt.lr, alignment, 3, kept
        )
        for k, want in moved.items():
            clear = grads[k].abs() > 1e-6
            torch.testing.assert_close(got[k][i][clear], want[clear], rtol=1e-9, atol=1e-9)
            sure = grads[k].abs() > 1e-3 * grads[k].abs().mean()
            torch.testing.assert_close(got32[k][i][sure].double(), want[sure], rtol=1e-4, atol=1e-5)


# what the fast mode saves


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fields", [{}, {"steps": 2}, {"preset": "reference", "alignment": "paper"}])
def test_fast_mode_equals_the_published_procedure(clf: ZeroShot, variant: str, fields: dict) -> None:
    fields = {**SMALL, "variant": variant, **fields}
    state, x, rng = state_of(clf, variant=variant), photos(3), SampleRNG.rows(3)
    with torch.no_grad():
        fast = TAPT(**fields).apply(clf, state)(x, rng)
        slow = TAPT(**fields, mode="reference").apply(clf, state)(x, rng)
    assert torch.equal(fast.argmax(1), slow.argmax(1))
    torch.testing.assert_close(fast, slow, rtol=0, atol=0.01 * float(slow.abs().max()))


def test_a_graph_over_the_selected_views_gives_the_gradient_of_one_over_all(clf: ZeroShot) -> None:
    tapt, x = TAPT(**SMALL), photos(1)
    ref = Reference.read(tapt, clf, state_of(clf))
    crops = draw_crops(SampleRNG.rows(1), 12, (32, 32), plain=True)
    index = tapt.select(clf, ref, x, crops)
    one = {k: v[None] for k, v in ref.reset.items()}
    few = tapt.gradient(clf, ref, crop_views(x, crops.pick(index)), one, shared=True, keep=False)["visual"][0]
    leaf = ref.reset["visual"].clone().requires_grad_(True)
    with visual_prompts(clf.vlm, leaf), block_inputs(clf.vlm, 3) as seen:
        features = clf.vlm.encode_image(crop_views(x, crops)[0])
    loss = entropy_of_mean(clf.scale * (features @ ref.texts(None).T)[index[0]][None])
    tokens = [h[index[0]][None, :, :17] for h in seen]
    for weight, (mean, var) in zip((0.5, 0.5), ref.moments, strict=True):
        loss = loss + weight * distance(tokens, mean[:, :17], var[:, :17], "code")
    (want,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(few, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_passes(clf: ZeroShot) -> None:
    state, x, rng = state_of(clf), photos(2), SampleRNG.rows(2)
    for mode, forwards, backwards in (("fast", 64 + 6 + 1, 6), ("reference", 65, 64)):
        defended = TAPT(template="a b {}.", mode=mode).apply(clf, state)
        with clf.vlm.counting() as count, torch.no_grad():
            defended(x, rng)
        assert (count.forwards, count.backwards) == (2 * forwards, 2 * backwards), mode


def test_few_images_at_a_time_change_nothing(clf: ZeroShot, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rng = photos(3), SampleRNG.rows(3)
    defended = TAPT(**SMALL).apply(clf, state_of(clf))
    with torch.no_grad():
        want = defended(x, rng)
        monkeypatch.setattr("ironclip.defenses.tapt.ROWS", 1)
        monkeypatch.setattr("ironclip.defenses._prompts.ROWS", 5)
        torch.testing.assert_close(defended(x, rng), want, rtol=0, atol=5e-3)


# episodes


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_do_not_meet(clf: ZeroShot, variant: str) -> None:
    x, rng = photos(3), SampleRNG.of(5, list("abc"))
    defended = TAPT(**SMALL, variant=variant).apply(clf, state_of(clf, variant=variant))
    with torch.no_grad():
        together = defended(x, rng)
        alone = torch.cat([defended(x[i : i + 1], rng[[i]]) for i in (2, 0, 1)])[[1, 2, 0]]
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_image_starts_from_the_fitted_prompts(clf: ZeroShot, variant: str) -> None:
    state = state_of(clf, variant=variant)
    ours = Reference.read(TAPT(**SMALL, variant=variant), clf, state).reset
    assert all(torch.equal(v, state[f"adv.{k}"]) for k, v in ours.items())
    published = Reference.read(TAPT(**SMALL, variant=variant, reset_to="random"), clf, state).reset
    if variant == "vlj":
        assert all(torch.equal(published[k], v) for k, v in ours.items()), "the published code is right here"
        return
    assert not torch.equal(published["visual"], ours["visual"])
    if variant == "vli":
        assert torch.equal(published["text"][0], ours["text"][0])
        assert not torch.equal(published["text"][1], ours["text"][1])


def test_no_steps_are_the_fitted_prompts(clf: ZeroShot) -> None:
    for variant in VARIANTS:
        tapt, state = TAPT(**SMALL, variant=variant, steps=0), state_of(clf, variant=variant)
        x, rng = photos(2), SampleRNG.rows(2)
        gray = tapt.fitted(clf, state)
        torch.testing.assert_close(tapt.apply(clf, state)(x, rng), gray(x), rtol=0, atol=1e-4)
        assert gray.vlm.weights_hash != clf.vlm.weights_hash
        assert len(gray.vlm.vision_blocks) == 3
        assert float((gray(x) - clf(x)).abs().max()) > 1e-3
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in clf.vlm.modules())


def test_built_in_prompts_survive_a_change_of_precision(clf: ZeroShot) -> None:
    prompted = with_prompts(clf.vlm, torch.randn(2, 2, 48, generator=generator(0)))
    lowered = prompted.at_precision("bf16").encode_image(photos(2))
    assert float((lowered * prompted.encode_image(photos(2))).sum(1).min()) > 0.99


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives(clf: ZeroShot, variant: str) -> None:
    tapt, state, rng = TAPT(**SMALL, variant=variant), state_of(clf, variant=variant), SampleRNG.rows(2)
    leaf = photos(2).requires_grad_(True)
    views = [tapt.apply(clf, state), tapt.surrogate(clf, state)]
    out = [v(leaf, rng) for v in views]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-2)
    grads = [torch.autograd.grad(o[:, 0].sum(), leaf)[0] for o in out]
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) > 1e-3


# weights of the two references, layers


def test_a_reference_of_weight_zero_is_not_read(clf: ZeroShot) -> None:
    x, rng = photos(2), SampleRNG.rows(2)
    for alpha, unread in ((1.0, "clean"), (0.0, "adv")):
        state = state_of(clf)
        want = TAPT(**SMALL, alpha=alpha).apply(clf, state)(x, rng)
        state[f"{unread}.mean"] = torch.full_like(state[f"{unread}.mean"], torch.nan)
        assert torch.equal(TAPT(**SMALL, alpha=alpha).apply(clf, state)(x, rng), want)
        with pytest.raises(ValueError, match=rf"statistics {unread}.mean are not finite at block 0; fit again"):
            TAPT(**SMALL).apply(clf, state)


def test_the_code_aligns_eight_blocks_and_the_paper_all() -> None:
    clf, fields = deep_clf(), {**SMALL, "template": "a {}."}
    state, x, rng = state_of(clf, template="a {}.", tokens=1), photos(2, 16), SampleRNG.rows(2)
    want = TAPT(**fields, tokens=1).apply(clf, state)(x, rng)
    state["adv.mean"][8] = torch.nan
    assert torch.equal(TAPT(**fields, tokens=1).apply(clf, state)(x, rng), want)
    with pytest.raises(ValueError, match=r"statistics adv\.mean are not finite at block 8"):
        TAPT(**fields, tokens=1, alignment="paper").apply(clf, state)


# bad states, models and fields


def test_states_of_another_kind_are_refused(clf: ZeroShot) -> None:
    state = state_of(clf)
    with pytest.raises(ValueError, match="tapt must be fitted first; run ironclip fit 'tapt'"):
        TAPT(**SMALL).apply(clf)
    with pytest.raises(ValueError, match=r"prompts 'text' must be \(2, 2, 32\) for TAPT\(variant=vli.* got nothing"):
        TAPT(**SMALL, variant="vli").apply(clf, state)
    with pytest.raises(ValueError, match=r"prompts 'visual' must be \(3, 1, 48\) .* got \(3, 2, 48\)"):
        TAPT(**SMALL, tokens=1).apply(clf, state)
    short = {**state, "adv.var": state["adv.var"][:, :10]}
    with pytest.raises(ValueError, match=r"adv.var must be .* = \(3, 19, 48\) for small, got \(3, 10, 48\)"):
        TAPT(**SMALL).apply(clf, short)
    missing = {k: v for k, v in state.items() if k != "clean.mean"}
    with pytest.raises(ValueError, match=r"clean.mean must be .* got \(0,\)"):
        TAPT(**SMALL).apply(clf, missing)


def test_a_model_without_a_transformer_image_tower_is_refused_by_name() -> None:
    clf = toy_clf()
    message = "toy-conv has no transformer image tower; deep visual prompts need one: tiny, hf:openai/clip-vit-base"
    with pytest.raises(ValueError, match=message):
        TAPT().apply(clf, {})
    with pytest.raises(ValueError, match=message):
        TAPT().fitted(clf, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1; write 0.5"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"views": 10, "alignment": "paper"}, "at least 2 of the views, whose variance over the views needs two"),
        ({"share": 0.01}, "select at least 1 of the views, got share=0.01 of views=64"),
        ({"variant": "lvi"}, "unknown variant 'lvi'; did you mean 'vli'"),
        ({"tokens": 0}, "tokens and depth must be at least 1, got 0 and 9"),
        ({"steps": -1}, "steps must not be negative and lr positive, got -1"),
        ({"reset_to": "zero"}, "unknown reset_to 'zero'"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TAPT(**fields)


def test_bad_images_and_names(clf: ZeroShot) -> None:
    with pytest.raises(ValueError, match="divide by 255"):
        TAPT(**SMALL).apply(clf, state_of(clf))(photos(1) * 255, SampleRNG.rows(1))
    with pytest.raises(ValueError, match="unknown surrogate of TAPT 'bpda'"):
        TAPT(**SMALL).surrogate(clf, state_of(clf), "bpda")
    with pytest.raises(ValueError, match="begins with 3 tokens, got tokens=5"):
        Reference.read(TAPT(variant="vli", tokens=5, template="a b {}."), clf, {})


def test_reference_preset() -> None:
    made = ironclip.build("TAPT(preset=reference)")
    assert (made.reset_to, made.align_prompts, made.alignment) == ("random", True, "code")
    shared = {"views": 64, "share": 0.1, "steps": 1, "lr": 5e-4, "alpha": 0.5, "tokens": 2, "depth": 9, "variant": "v"}
    assert all(getattr(made, k) == v for k, v in shared.items())


# fitting


@pytest.mark.parametrize("variant", VARIANTS)
def test_fit_learns_both_sets_and_measures_under_each(variant: str) -> None:
    from fits import FEW, labelled

    vlm = ironclip.load("tiny")
    clf = ZeroShot.build(vlm, ["red circle", "blue square", "green triangle", "yellow star"])
    data, tapt = labelled(clf), TAPT(variant=variant)
    before = vlm.weights_hash
    state = tapt.fit(clf, data, loop=FEW, seed=1)
    if variant == "v":
        again = tapt.fit(clf, data, loop=FEW, seed=1)
        assert all(torch.equal(state[k], again[k]) for k in state)
    vlm._hash = None
    assert vlm.weights_hash == before
    assert all(p.grad is None for p in vlm.parameters())
    key = "visual" if variant != "vlj" else "text"
    start = untrained(tapt, clf, "start", 1)
    assert not torch.equal(state[f"adv.{key}"], start[key])
    assert not torch.equal(state[f"adv.{key}"], state[f"clean.{key}"])
    visual, _ = assembled({k: state[f"adv.{k}"] for k in start})
    mean, var, n = statistics(vlm, visual, data, 5, 1)
    torch.testing.assert_close(mean, state["adv.mean"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var, state["adv.var"], rtol=1e-3, atol=1e-4)
    told = bytes(state["record"].tolist()).decode()
    assert f'"variant": "{variant}"' in told
    assert f'"images": {n}' in told
    assert bool(torch.isfinite(tapt.apply(clf, state)(next(iter(data.batches(2)))[0], SampleRNG.rows(2))).all())
