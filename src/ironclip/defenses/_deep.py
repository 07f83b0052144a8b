"""Deep visual prompts as CLIP's tuners use them, and the statistics of the tokens that enter each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ironclip.core.hooks import deep_prompts
from ironclip.core.vlm import VLM


def _normed(vlm: VLM, prompts: Tensor) -> Tensor:
    """The first layer's prompts pass the normalisation before block 0, as all tokens do; it works token by token."""
    norm: Any = getattr(vlm.image, "pre_norm", None)
    return prompts if norm is None else torch.cat([norm(prompts[:1]), prompts[1:]])


@contextmanager
def visual_prompts(vlm: VLM, prompts: Tensor) -> Iterator[None]:
    """``prompts``: (depth, m, w) for all images or (depth, n, m, w), one set for each image that is encoded inside."""
    with deep_prompts(vlm.vision_blocks, _normed(vlm, prompts)):
        yield


class Prompted(nn.Module):
    """An image tower with prompts (depth, m, w) built in; ``blocks``: path of its blocks."""

    def __init__(self, tower: nn.Module, blocks: str, prompts: Tensor) -> None:
        super().__init__()
        self.tower, self.blocks = tower, blocks
        self.register_buffer("prompts", prompts)

    def forward(self, x: Tensor) -> Tensor:
        with deep_prompts(list(self.tower.get_submodule(self.blocks).children()), self.get_buffer("prompts")):
            out: Tensor = self.tower(x)
        return out


def with_prompts(vlm: VLM, prompts: Tensor) -> VLM:
    """A view of the model whose image tower has the prompts built in."""
    blocks = vlm.parts.vision_blocks.removeprefix("image.")
    new = vlm.with_state({})
    new.image = Prompted(vlm.image, blocks, _normed(vlm, prompts.detach()).clone()).eval()
    new.parts, new._hash = replace(vlm.parts, vision_blocks=f"image.tower.{blocks}"), None
    return new


@contextmanager
def block_inputs(vlm: VLM, n: int) -> Iterator[list[Tensor]]:
    """Collects the tokens (b, M, w) that enter the first ``n`` blocks, prompts included; enter it after the prompts."""
    seen: list[Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for block in vlm.vision_blocks[:n]:
            stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield seen


@dataclass
class Moments:
    """Mean and variance of tensors that come in batches of any size, in float64, in one pass (Chan et al. 1983)."""

    n: int = 0
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """``rows``: (b, ...)."""
        rows = rows.double()
        b, own = rows.shape[0], rows.mean(dim=0)
        delta, total = own - self.mean, self.n + b
        self.square = self.square + (rows - own).square().sum(dim=0) + delta.square() * (self.n * b / total)
        self.mean = self.mean + delta * (b / total)
        self.n = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, float32. Raises ValueError for fewer than two rows."""
        if self.n < 2 or not isinstance(self.mean, Tensor) or not isinstance(self.square, Tensor):
            raise ValueError(f"statistics need at least 2 images, got {self.n}; pass more data to fit")
        return self.mean.float(), (self.square / (self.n - 1)).float()


def distance(tokens: list[Tensor], mean: Tensor, var: Tensor, rule: str) -> Tensor:
    """(b,) distance of the tokens' moments over the views from reference ones.

    ``tokens``: per block (b, s, M, w). ``mean``, ``var``: (blocks or more, M, w). ``code``: 100/9 times the sum over
    blocks of half the mean absolute differences of means and of variances with 1/s. ``paper``: the mean over blocks of
    the summed absolute differences, variances with 1/(s - 1).
    """
    total: Tensor | float = 0.0
    for h, m, v in zip(tokens, mean, var, strict=False):
        gaps = ((h.mean(dim=1) - m).abs(), (h.var(dim=1, correction=int(rule == "paper")) - v).abs())
        sums = [g.flatten(1).sum(dim=1) if rule == "paper" else g.flatten(1).mean(dim=1) / 2 for g in gaps]
        total = total + sums[0] + sums[1]
    assert isinstance(total, Tensor)
    return total / len(tokens) if rule == "paper" else total * (100 / 9)


def entropy_of_mean(logits: Tensor) -> Tensor:
    """(b,) entropy in nats of the mean softmax over the views of (b, s, k)."""
    logp = logits.log_softmax(dim=-1).logsumexp(dim=1) - torch.tensor(float(logits.shape[1])).log()
    return -(logp.exp() * logp).sum(dim=-1)
