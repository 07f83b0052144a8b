"""Learned context in class prompts: M vectors beside the class name, shared by all classes or one set per class.

CoOp (Zhou et al. 2022, arXiv 2109.01134). A prompt is ``[start] V_1 .. V_M name . [end]``; the name may stand in front
of the vectors or in their middle. Two savings, both exact: sequences end with the longest prompt, and where the context
is shared and stands before the name, a causal tower reads it once for several names (``core/prompts.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice
from ironclip.core.prompts import ROWS, SoftPrompts, _common, _pack
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM

POSITIONS = ("end", "middle", "front")
CARRIER = "x"
"""A word that holds the place of the context while names are tokenised: they must be read as following a word."""


@dataclass(frozen=True, eq=False)
class Context:
    """The prompts of ``names`` with ``m`` context vectors of ``width`` each, to be called on those vectors.

    ``ids``: (k, l) tokens up to the longest prompt. ``place``: (k, l) the context vector that stands there, or -1.
    ``specific``: vectors are (k, m, width), one set per class, else (m, width). ``shared``: the fast path, if any.
    """

    vlm: VLM
    names: tuple[str, ...]
    m: int
    position: str
    specific: bool
    ids: Tensor
    place: Tensor
    shared: SoftPrompts | None

    @classmethod
    def of(cls, vlm: VLM, names: Sequence[str], m: int = 16, position: str = "end", specific: bool = False) -> Context:
        """Tokenise the names once.

        Raises ValueError for no names, equal names, fewer than one vector, an unknown position, a prompt longer than
        the model's context (the class is named), and a model without token embeddings or a known end of its texts.
        """
        check_choice(position, POSITIONS, "position")
        names = tuple(names)
        if m < 1:
            raise ValueError(f"tokens must be at least 1, got {m}; write tokens=16")
        if not names:
            raise ValueError("no class names; pass at least two")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"classes with equal names have one prompt: {', '.join(twice)}; merge them")
        _ = vlm.token_embedding
        if vlm.tokenize is None or vlm.eot is None:
            raise ValueError(
                f"{vlm.name} does not say where a text ends, so a context cannot be put in; use tiny, lite, "
                "hf:openai/clip-vit-base-patch32 or another CLIP"
            )
        start, pieces = _pieces(vlm, names)
        rows = [_layout(head, name, tail, m, position) for head, name, tail in pieces]
        long = [(n, len(r)) for n, r in zip(names, rows, strict=True) if len(r) > _limit(vlm)]
        if long:
            raise ValueError(
                f"{m} context tokens and the name {long[0][0][:60]!r} make {long[0][1]} tokens, {vlm.name} takes "
                f"{_limit(vlm)}; write tokens={max(m - (max(n for _, n in long) - _limit(vlm)), 1)}"
            )
        filler, pad = (int(vlm.tokenize([CARRIER, f"{CARRIER} {CARRIER}"])[0, i]) for i in (start, -1))
        size = max(len(r) for r in rows)
        table = torch.full((len(rows), size, 2), -1)
        for i, row in enumerate(rows):
            table[i, : len(row)] = torch.tensor([(filler if t < 0 else t, -1 - t if t < 0 else -1) for t in row])
            table[i, len(row) :, 0] = pad
        ids, place = (part.contiguous().to(vlm.device) for part in table.unbind(-1))
        packs = _pack(vlm, ids, start + m) if position == "end" and not specific else None
        shared = None if packs is None else SoftPrompts(vlm, ids, start, m, packs)
        return cls(vlm, names, m, position, specific, ids, place, shared)

    @property
    def width(self) -> int:
        """Numbers in a token embedding."""
        return int(self.vlm.embed_tokens(self.ids[:1, :1]).shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors: (m, width), or (k, m, width) where every class has its own."""
        return (len(self.names), self.m, self.width) if self.specific else (self.m, self.width)

    def initial(self, seed: int = 0, std: float = 0.02, phrase: str = "") -> Tensor:
        """Normal noise of the seed, or the token embeddings of ``phrase``, the same for all classes.

        Raises ValueError for a phrase that has not ``m`` tokens here.
        """
        if phrase:
            row = self.vlm.tokenize([phrase])  # type: ignore[misc]
            tokens = row[:, _start(self.vlm) : int(self.vlm.eot(row)[0])]  # type: ignore[misc]
            if tokens.shape[1] != self.m:
                n = tokens.shape[1]
                raise ValueError(f"init={phrase!r} has {n} tokens on {self.vlm.name}, got {self.m}; write tokens={n}")
            with torch.no_grad():
                return self.vlm.embed_tokens(tokens)[0].expand(self.shape).clone()
        keys = list(self.names) if self.specific else ["all classes"]
        noise = std * SampleRNG.of(seed, keys).fold("context").normal(self.m, self.width)
        return (noise if self.specific else noise[0]).to(self.vlm.device)

    def check(self, vectors: Tensor) -> None:
        """Refuse vectors of another shape: they were learned for another model or other settings. Raises ValueError."""
        if tuple(vectors.shape) != self.shape:
            raise ValueError(
                f"context vectors must be {self.shape} for {self.vlm.name} and {len(self.names)} classes, got "
                f"{tuple(vectors.shape)}; they were learned for another model, other classes or another tokens="
            )

    def features(self, vectors: Tensor) -> Tensor:
        """(k, d) unit features of all classes, differentiable in the vectors."""
        self.check(vectors)
        if self.shared is not None:
            return self.shared.features(vectors.unsqueeze(0))
        parts = [slice(i, i + ROWS) for i in range(0, len(self.names), ROWS)]
        return F.normalize(torch.cat([self._encode(vectors, part) for part in parts]), dim=-1)

    def _encode(self, vectors: Tensor, part: slice) -> Tensor:
        ids, place = self.ids[part], self.place[part]
        with torch.no_grad():
            words = self.vlm.embed_tokens(ids)
        own = vectors[part] if self.specific else vectors.expand(len(ids), -1, -1)
        put = own.gather(1, place.clamp(min=0).unsqueeze(-1).expand(-1, -1, own.shape[-1]))
        return self.vlm.encode_tokens(ids, torch.where(place.unsqueeze(-1) < 0, words, put.to(words)), normalize=False)


def _layout(head: list[int], name: list[int], tail: list[int], m: int, position: str) -> list[int]:
    """Token ids of one prompt; context vector j stands as -1 - j."""
    before = {"end": m, "middle": m // 2, "front": 0}[position]
    marks = [-1 - j for j in range(m)]
    return [*head, *marks[:before], *name, *marks[before:], *tail]


def _pieces(vlm: VLM, names: Sequence[str]) -> tuple[int, list[tuple[list[int], list[int], list[int]]]]:
    """Where texts begin, and per name the tokens before the context, those of the name, and full stop and end."""
    assert vlm.tokenize is not None
    assert vlm.eot is not None
    start = _start(vlm)
    with warnings.catch_warnings(record=True) as told:  # texts that are cut are refused below
        warnings.simplefilter("always")
        bare, full = (vlm.tokenize([f"{CARRIER} {n}{dot}" for n in names]) for dot in ("", "."))
    pre = _common(full[0], vlm.tokenize([CARRIER])[0])
    if pre <= start or bool((full[:, :pre] != full[0, :pre]).any()):
        raise ValueError(f"the tokenizer of {vlm.name} does not keep a context apart from the names")
    ends, stops = vlm.eot(full), vlm.eot(bare)
    out = []
    for i, n in enumerate(names):
        if told and int(ends[i]) + 1 >= _limit(vlm):
            raise ValueError(f"the name {n[:60]!r} alone is longer than the {_limit(vlm)} tokens that {vlm.name} takes")
        row, short = full[i, pre : int(ends[i]) + 1], bare[i, pre : int(stops[i])]
        own = _common(row[:-1], short)
        out.append((full[i, :start].tolist(), row[:own].tolist(), row[own:].tolist()))
    return start, out


def _start(vlm: VLM) -> int:
    """How many tokens stand before the first word."""
    rows = vlm.tokenize([CARRIER, "y"])  # type: ignore[misc]
    return _common(rows[0], rows[1])


def _limit(vlm: VLM) -> int:
    return int(vlm.facts.get("max_tokens", 1 << 30))
