"""Hooks do what they say inside the block and leave nothing behind, after an exception too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from attack_toys import tensor
from clips import MODELS
from torch import Tensor, nn

from ironclip.core.hooks import captured_output, class_token_only, deep_prompts, replaced_output


class Block(nn.Module):
    """Adds the mean of all tokens to every token, so that prompts are felt."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.mean(dim=1, keepdim=True)


class Keyword(nn.Module):
    """A block that takes its tokens by keyword and returns a tuple."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + hidden_states.mean(dim=1, keepdim=True),)


BLOCKS = nn.ModuleList([Block() for _ in range(3)])
X = tensor(2, 4, 5)


def run(x: Tensor) -> Tensor:
    for block in BLOCKS:
        x = block(x)
    return x


CONTEXTS: list[Callable[[], AbstractContextManager]] = [
    lambda: replaced_output(BLOCKS[1], torch.ones(2, 4, 5)),
    lambda: captured_output(BLOCKS[1]),
    lambda: deep_prompts(list(BLOCKS), tensor(2, 3, 5, seed=1)),
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_stays_behind(context: Callable[[], AbstractContextManager]) -> None:
    before = run(X)
    with context():
        run(X)
    assert torch.equal(run(X), before)
    with pytest.raises(RuntimeError, match="stop"), context():
        raise RuntimeError("stop")
    assert torch.equal(run(X), before)
    assert all(not b._forward_hooks and not b._forward_pre_hooks for b in BLOCKS)


def test_replaced_and_captured() -> None:
    with captured_output(BLOCKS[0]) as seen, replaced_output(BLOCKS[2], X):
        assert torch.equal(run(X), X)
    assert len(seen) == 1
    assert torch.equal(seen[0], BLOCKS[0](X))


@pytest.mark.parametrize("shared", [True, False])
def test_deep_prompts_join_each_block_and_leave(shared: bool) -> None:
    prompts = tensor(2, 3, 5, seed=1) if shared else tensor(2, 2, 3, 5, seed=1)
    x = X
    for i, block in enumerate(BLOCKS[:2]):
        own = prompts[i].expand(2, -1, -1) if shared else prompts[i]
        x = block(torch.cat([x, own], dim=1))[:, :4]
    want = BLOCKS[2](x)
    with deep_prompts(list(BLOCKS), prompts):
        middle = BLOCKS[1](BLOCKS[0](X))
        out = run(X)
    assert middle.shape == (2, 4 + 3, 5)
    last_two = BLOCKS[1](
        torch.cat([BLOCKS[0](torch.cat([X, _own(prompts, 0, shared)], 1))[:, :4], _own(prompts, 1, shared)], 1)
    )
    torch.testing.assert_close(out, BLOCKS[2](last_two)[:, :4])
    assert out.shape == want.shape


def _own(prompts: Tensor, i: int, shared: bool) -> Tensor:
    return prompts[i].expand(2, -1, -1) if shared else prompts[i]


def test_deep_prompts_by_keyword_and_tuple() -> None:
    blocks = [Keyword(), Keyword()]
    prompts = tensor(2, 3, 5, seed=1)
    with deep_prompts(blocks, prompts):
        (mid,) = blocks[0](hidden_states=X)
        (out,) = blocks[1](hidden_states=mid)
    assert mid.shape == (2, 7, 5)
    assert out.shape == (2, 4, 5)


def test_gradient_reaches_the_prompts_and_depth_is_checked() -> None:
    prompts = tensor(3, 2, 5, seed=1).requires_grad_(True)
    with deep_prompts(list(BLOCKS), prompts):
        (g,) = torch.autograd.grad(run(X).sum(), prompts)
    assert bool(g.abs().flatten(1).sum(1).gt(0).all())
    with (
        pytest.raises(ValueError, match="prompts for 4 blocks, but the tower has 3; use depth <= 3"),
        deep_prompts(list(BLOCKS), tensor(4, 2, 5)),
    ):
        pass


@pytest.mark.parametrize("name", ["hf", "open_clip", "tiny"])
def test_class_token_only_gives_the_same_features(name: str) -> None:
    vlm = MODELS[name]()
    x = torch.rand(3, 3, vlm.image_size, vlm.image_size, generator=torch.Generator().manual_seed(0))
    blocks = vlm.vision_blocks
    prompts = tensor(len(blocks), 2, vlm.parts.vision_width, seed=1)
    for deep in (prompts[:0], prompts):
        leaf = x.clone().requires_grad_(True)
        with deep_prompts(blocks, deep):
            want = vlm.encode_image(leaf)
            (grad,) = torch.autograd.grad(want[:, 0].sum(), leaf)
            with class_token_only(vlm.image), captured_output(blocks[-1]) as seen:
                got = vlm.encode_image(leaf)
                (again,) = torch.autograd.grad(got[:, 0].sum(), leaf)
        assert len(seen) == 1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(again, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))
    assert "forward" not in vars(blocks[-1])
    with pytest.raises(RuntimeError, match="stop"), class_token_only(vlm.image):
        raise RuntimeError("stop")
    assert "forward" not in vars(blocks[-1])
    with class_token_only(nn.Identity()):
        pass
