"""Soft text prompts: the words before the class name as vectors, shared by all classes or one set per image.

The context of CoOp (Zhou et al. 2022, arXiv 2109.01134), and deep prompts that replace the context's tokens again
before later blocks (Khattak et al. 2023, arXiv 2210.03117). Gradients are exact; two savings are too. A causal tower
is cut off after the longest text. And what stands before the class name is the same for all classes there, so several
class names share one row: each looks back at the common beginning and at itself, at its own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.core.grad import second_order
from ironclip.core.vlm import VLM

PACK, ROWS = 48, 256
"""Tokens of class names that share a row, and rows that go through the text tower together."""


@dataclass(frozen=True, eq=False)
class Packs:
    """``ids``: (p, l) several texts a row. ``positions``: (l,), ``mask``: (l, l), ``ends``: (p, g), see ``packed``."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor


@dataclass(frozen=True, eq=False)
class SoftPrompts:
    """Prompts of ``k`` classes whose ``m`` context tokens, from position ``start`` on, are vectors.

    ``ids``: (k, l) token ids up to the longest text. Prompts are (depth, m, w) for all images or (b, depth, m, w), one
    set per image; entry 0 stands for the token embeddings, entry i replaces the tokens that enter text block i.
    """

    vlm: VLM
    ids: Tensor
    start: int
    m: int
    packs: Packs | None

    @classmethod
    def of(
        cls, vlm: VLM, names: Sequence[str], template: str = "a photo of a {}.", tokens: int | None = None
    ) -> SoftPrompts:
        """The words of ``template`` before ``{}`` become the context, or their first ``tokens`` tokens.

        Raises ValueError for a template without words before ``{}``, a model without token embeddings, and a tokenizer
        that joins the context to the names.
        """
        if template.count("{}") != 1 or not template.split("{}")[0].strip():
            raise ValueError(f"template must have words before one {{}}, got {template!r}; write 'a photo of a {{}}.'")
        if not names:
            raise ValueError("no class names; pass at least two")
        with torch.inference_mode(False):  # the ids outlive the caller's mode
            return cls._of(vlm, names, template, tokens)

    @classmethod
    def _of(cls, vlm: VLM, names: Sequence[str], template: str, tokens: int | None) -> SoftPrompts:
        if vlm.token_embedding is None or vlm.tokenize is None:
            raise ValueError(f"{vlm.name} has no tokenizer; soft prompts need one")
        ids = vlm.tokenize([template.format(n) for n in names]).to(vlm.device)
        alone = vlm.tokenize([template.split("{}")[0].strip(), "x", "y"]).to(vlm.device)
        start = _common(alone[1], alone[2])
        pre = _common(ids[0], alone[0])
        if pre <= start or bool((ids[:, :pre] != ids[0, :pre]).any()):
            raise ValueError(
                f"the tokenizer of {vlm.name} does not keep the words of {template!r} apart from the names"
            )
        m = pre - start if tokens is None else tokens
        if not 1 <= m <= pre - start:
            raise ValueError(f"{template!r} begins with {pre - start} tokens, got tokens={tokens}; write a longer one")
        if vlm.causal and vlm.eot is not None:
            ids = ids[:, : int(vlm.eot(ids).max()) + 1]
        return cls(vlm, ids, start, m, _pack(vlm, ids, pre))

    @property
    def k(self) -> int:
        """Number of classes."""
        return self.ids.shape[0]

    @property
    def initial(self) -> Tensor:
        """(1, m, w) embeddings of the template's own words."""
        with torch.no_grad():
            return self.vlm.embed_tokens(self.ids[:1, self.start : self.start + self.m])

    def features(self, prompts: Tensor) -> Tensor:
        """Unit features of every class: (k, d) for shared prompts, (b, k, d) for prompts per image."""
        return self._features(prompts, range(len(self._rows)))

    def pullback(self, prompts: Tensor, cotangents: Tensor, keep: bool = False) -> Tensor:
        """Gradient (b, depth, m, w) at shared ``prompts`` of ``sum(features * cotangents[i])`` for every image i.

        ``cotangents``: (b, k, d). All images share one graph, a part of the classes at a time. With ``keep`` the result
        is differentiable in the cotangents.
        """
        total = cotangents.new_zeros(len(cotangents), *prompts.shape)
        with torch.inference_mode(False), torch.enable_grad():
            for first in range(0, len(self._rows), ROWS):
                rows = range(first, min(first + ROWS, len(self._rows)))
                classes = slice(first * self._each, min(rows.stop * self._each, self.k))
                leaf = prompts.detach().clone().requires_grad_(True)
                with _second(keep):
                    out = self._features(leaf, rows)
                    parts = cotangents[:, classes] if keep else cotangents[:, classes].detach().clone()
                    grads = [
                        torch.autograd.grad(out, leaf, part, retain_graph=True, create_graph=keep)[0] for part in parts
                    ]
                total = total + torch.stack(grads) if grads else total
        return total

    @property
    def _rows(self) -> Tensor:
        return self.ids if self.packs is None else self.packs.ids

    @property
    def _each(self) -> int:
        return 1 if self.packs is None else self.packs.ends.shape[1]

    def _features(self, prompts: Tensor, rows: range) -> Tensor:
        """Features of the classes in some rows, a few rows at a time."""
        many = prompts if prompts.ndim == 4 else prompts.unsqueeze(0)
        b, n = many.shape[0], len(rows)
        place = torch.arange(b * n, device=self.ids.device)
        image, row = place // max(n, 1), place % max(n, 1) + rows.start
        parts = [self._encode(many[image[i : i + ROWS]], row[i : i + ROWS]) for i in range(0, b * n, ROWS)]
        out = (
            F.normalize(torch.cat(parts), dim=-1)
            if parts
            else self.vlm.get_buffer("mean").new_zeros(0, 1, self.vlm.dim)
        )
        out = out.reshape(b, n * self._each, -1)[:, : self.k - rows.start * self._each]
        return out if prompts.ndim == 4 else out[0]

    def _encode(self, prompts: Tensor, rows: Tensor) -> Tensor:
        """(r, depth, m, w) prompts of rows (r,) to features (r, g, d), not normalised."""
        ids = self._rows[rows]
        with torch.no_grad():
            embeds = self.vlm.embed_tokens(ids)
        first, last = self.start, self.start + self.m
        embeds = torch.cat([embeds[:, :first], prompts[:, 0].to(embeds), embeds[:, last:]], dim=1)
        with replaced_tokens(self._blocks(prompts.shape[1]), prompts, first):
            if self.packs is None:
                return self.vlm.encode_tokens(ids, embeds, normalize=False).unsqueeze(1)
            for count in self.vlm._counts:
                count.texts += self.packs.ends.shape[1] * len(rows)
            packed: Callable[..., Tensor] = self.vlm.text.packed  # type: ignore[attr-defined]
            return packed(embeds, self.packs.positions, self.packs.mask.to(embeds), self.packs.ends[rows])

    def _blocks(self, depth: int) -> list[nn.Module]:
        if depth == 1:
            return []
        blocks: list[nn.Module] = getattr(self.vlm.text, "blocks", [])
        if depth > len(blocks):
            raise ValueError(
                f"text prompts for {depth} blocks, but {self.vlm.name} shows {len(blocks)}; use tiny, hf:openai/"
                f"clip-vit-base-patch32 or another CLIP, and a depth of at most its text blocks"
            )
        return blocks


@contextmanager
def replaced_tokens(blocks: Sequence[nn.Module], prompts: Tensor, start: int) -> Iterator[None]:
    """Inside, the tokens from ``start`` on that enter block i are ``prompts[:, i]``, for i from 1 on.

    ``prompts``: (n, depth, m, w). Blocks must be batch-first, (n, l, w).
    """
    end = start + prompts.shape[2]

    def before(i: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :start], prompts[:, i].to(hidden), hidden[:, end:]], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    with ExitStack() as stack:
        for i in range(1, prompts.shape[1]):
            stack.callback(blocks[i].register_forward_pre_hook(before(i), with_kwargs=True).remove)
        yield


@contextmanager
def _second(keep: bool) -> Iterator[None]:
    if not keep:
        yield
        return
    with second_order():
        yield


def _common(a: Tensor, b: Tensor) -> int:
    """Length of the common beginning of two rows of ids."""
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).long().cumprod(0).sum())


def _pack(vlm: VLM, ids: Tensor, pre: int) -> Packs | None:
    """Rows of several class names behind one beginning; None where the tower is not causal or cannot take them."""
    if not (vlm.causal and vlm.eot is not None and hasattr(vlm.text, "packed")):
        return None
    k, s = ids.shape[0], ids.shape[1] - pre
    g = max(1, min(PACK // s, k))
    filled = torch.cat([ids, ids[:1].expand(-k % g, -1)])
    rows = torch.cat([ids[:1, :pre].expand(len(filled) // g, -1), filled[:, pre:].reshape(-1, g * s)], dim=1)
    ends = vlm.eot(filled).view(-1, g) + s * torch.arange(g, device=ids.device)
    places = torch.arange(pre + s, device=ids.device)
    positions = torch.cat([places[:pre], places[pre:].repeat(g)])
    owner = torch.cat([places.new_full((pre,), -1), torch.arange(g, device=ids.device).repeat_interleave(s)])
    sees = ((owner[None] == owner[:, None]) | (owner[None] < 0)) & (positions[None] <= positions[:, None])
    mask = torch.zeros(len(positions), len(positions), device=ids.device).masked_fill(~sees, float("-inf"))
    return Packs(rows, positions, mask, ends)
