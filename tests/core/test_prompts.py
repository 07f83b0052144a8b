"""Soft text prompts: the words they start from, exact savings, gradients, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from clips import MODELS, small_hf
from torch import Tensor
from toys import generator, toy_vlm

from ironclip.core.hooks import replaced_output
from ironclip.core.prompts import SoftPrompts, replaced_tokens

NAMES = ("cat", "large dog", "ox", "yellow-green bee", "a", "emu", "cats")


@pytest.fixture(scope="module", params=MODELS)
def soft(request: pytest.FixtureRequest) -> SoftPrompts:
    return SoftPrompts.of(MODELS[request.param](), NAMES, "a b {}.")


def moved(soft: SoftPrompts, b: int | None = None, depth: int = 1) -> Tensor:
    """Prompts away from their start, as many sets as asked."""
    shape = (depth, *soft.initial.shape[1:])
    noise = torch.randn(*(shape if b is None else (b, *shape)), generator=generator(2))
    return soft.initial.expand(shape) + 0.1 * noise


def plainly(soft: SoftPrompts, prompts: Tensor) -> Tensor:
    """One text after the other, padded to the full context, nothing shared."""
    vlm, rows = soft.vlm, []
    width = int(vlm.facts["max_tokens"])
    for name in NAMES:
        ids = vlm.tokenize([f"a b {name}."])
        pad = ids[:, -1:] if vlm.name != "library" else torch.zeros_like(ids[:, -1:])
        ids = torch.cat([ids, pad.expand(-1, width)], dim=1)[:, :width]
        embeds = vlm.embed_tokens(ids).clone()
        embeds[:, 1 : 1 + soft.m] = prompts[0]
        with replaced_output(vlm.token_embedding, embeds), replaced_tokens(vlm.text.blocks, prompts[None], 1):
            rows.append(vlm.text(ids)[0])
    return F.normalize(torch.stack(rows), dim=-1)


def test_starts_at_the_words_themselves(soft: SoftPrompts) -> None:
    assert (soft.start, soft.m, soft.k) == (1, soft.initial.shape[1], len(NAMES))
    want = soft.vlm.encode_text([f"a b {n}." for n in NAMES])
    torch.testing.assert_close(soft.features(soft.initial), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_shared_beginnings_equal_the_full_tower(soft: SoftPrompts, depth: int) -> None:
    assert soft.packs is not None
    assert soft.packs.ids.shape[0] < soft.k, "several names must share a row"
    prompts = moved(soft, depth=depth)
    with torch.no_grad():
        torch.testing.assert_close(soft.features(prompts), plainly(soft, prompts), rtol=0, atol=1e-5)
        if depth == 2:
            assert float((soft.features(prompts) - soft.features(prompts[:1])).abs().max()) > 1e-3


def test_one_set_per_image_and_few_rows_at_a_time(soft: SoftPrompts, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = moved(soft, b=3, depth=2)
    with torch.no_grad():
        together = soft.features(prompts)
        assert together.shape == (3, soft.k, soft.vlm.dim)
        for i in range(3):
            torch.testing.assert_close(together[i], soft.features(prompts[i]), rtol=0, atol=1e-5)
        monkeypatch.setattr("ironclip.core.prompts.ROWS", 2)
        torch.testing.assert_close(soft.features(prompts), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 256])
def test_pullback_equals_autograd_per_image(soft: SoftPrompts, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ironclip.core.prompts.ROWS", rows)
    shared = moved(soft, depth=2)
    cotangents = torch.randn(3, soft.k, soft.vlm.dim, generator=generator(1))
    with torch.no_grad():
        got = soft.pullback(shared, cotangents)
    leaf = shared.expand(3, -1, -1, -1).clone().requires_grad_(True)
    (want,) = torch.autograd.grad((soft.features(leaf) * cotangents).sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert all(p.grad is None for p in soft.vlm.parameters())


def test_pullback_is_linear_and_differentiable_in_the_cotangents(soft: SoftPrompts) -> None:
    cotangents = torch.randn(2, soft.k, soft.vlm.dim, generator=generator(1)).requires_grad_(True)
    direction = torch.randn(2, 1, *soft.initial.shape[1:], generator=generator(3))
    grads = soft.pullback(soft.initial, cotangents, keep=True)
    (got,) = torch.autograd.grad((grads * direction).sum(), cotangents)
    h = 1e-3
    with torch.no_grad():
        up, down = (soft.features(soft.initial + s * h * direction[0]) for s in (1, -1))
    torch.testing.assert_close(got[0], (up - down) / (2 * h), rtol=0.1, atol=0.02 * float(got[0].abs().max()))


def test_texts_are_counted(soft: SoftPrompts) -> None:
    with soft.vlm.counting() as count, torch.no_grad():
        soft.features(moved(soft, b=2))
    assert soft.k * 2 <= count.texts <= (soft.k + 7) * 2


def test_nothing_stays_behind(soft: SoftPrompts) -> None:
    before = soft.vlm.encode_text(["a b cat."])
    soft.features(moved(soft, depth=2))
    assert torch.equal(soft.vlm.encode_text(["a b cat."]), before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in soft.vlm.modules())


def test_a_tower_without_a_causal_mask_is_run_as_it_is() -> None:
    vlm = small_hf()
    vlm.causal = False
    soft = SoftPrompts.of(vlm, NAMES, "a b {}.")
    assert soft.packs is None
    torch.testing.assert_close(soft.features(soft.initial), vlm.encode_text([f"a b {n}." for n in NAMES]))
    cotangents = torch.randn(2, soft.k, vlm.dim, generator=generator(1))
    got = soft.pullback(soft.initial, cotangents)
    want = SoftPrompts.of(small_hf(), NAMES, "a b {}.").pullback(soft.initial, cotangents)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"template must have words before one \{\}, got '\{\}.'; write 'a photo of a"):
        SoftPrompts.of(small_hf(), NAMES, "{}.")
    with pytest.raises(ValueError, match="no class names; pass at least two"):
        SoftPrompts.of(small_hf(), ())
    with pytest.raises(ValueError, match="toy-conv has no token embedding; soft prompts need an hf:"):
        SoftPrompts.of(toy_vlm(), NAMES)
    soft = SoftPrompts.of(small_hf(), NAMES, "a b {}.")
    with pytest.raises(ValueError, match="text prompts for 3 blocks, but small shows 2"):
        soft.features(moved(soft, depth=3))
