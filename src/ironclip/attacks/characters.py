"""An attack on texts that edits single characters: insert, replace or delete at most ``k`` of them.

Charmer (Abad Rocamora et al. 2024, arXiv 2405.04346), as LEAF (2506.03355) uses it on CLIP's text tower: places are
ranked by what a test character does there, then every character is tried at the best ones. Here the objective is that
of the word swap, the divergence of the embedding, so neither labels nor images are needed. Ours are: ``min_cosine``,
and ``reach``, since towers read no more than their context and a page of text would cost two passes a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.text import Encode, TextResult, check_texts, score
from ironclip.core.spec import method

TESTS = (" ", "z")
"""Test characters: the second one stands in where the first would change nothing."""


@method
class Charmer:
    """Edit at most ``k`` characters of every text (Levenshtein distance), one a round.

    ``places``: slots a round at which the whole ``alphabet`` is tried. ``reach``: only the first so many characters are
    edited. ``min_cosine``: edited texts must keep this cosine to the text as it was, by the attacked tower itself.
    """

    name: ClassVar[str] = "charmer"

    k: int = 1
    places: int = 10
    alphabet: str = ascii_lowercase + " "
    reach: int = 400
    min_cosine: float = -1.0

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k must be 0 or more characters, got {self.k}; write k=1")
        if self.places < 1 or self.reach < 1:
            raise ValueError(f"places and reach must be 1 or more, got {self.places} and {self.reach}")
        if not -1 <= self.min_cosine <= 1:
            raise ValueError(f"min_cosine must be in [-1, 1], got {self.min_cosine}")

    @torch.no_grad()
    def __call__(
        self, encode: Encode, texts: Sequence[str], *, forbidden: Sequence[str] = (), away: Tensor | None = None
    ) -> TextResult:
        """Attack n texts; a round encodes the candidates of all texts together.

        Equal texts are attacked once, unless each has its own ``away``.
        """
        check_texts(texts, away)
        jobs = list(dict.fromkeys(texts)) if away is None else list(texts)
        goals = [None] * len(jobs) if away is None else list(away)
        clean = list(encode(jobs)) if jobs and (self.k or away is not None) else []
        barred, now, loss = set(forbidden), list(jobs), [0.0] * len(jobs)
        if away is not None:
            loss = [float(score(c, c[None], g)) for c, g in zip(clean, goals, strict=True)]
        live = list(range(len(jobs)))
        for _ in range(self.k):
            probes = [self._probes(now[i]) for i in live]
            ranked = _split(encode, [[s for _, s in row] for row in probes])
            tried = [
                self._edits(now[i], _best(row, score(clean[i], f, goals[i]), self.places), barred | {jobs[i], now[i]})
                for i, row, f in zip(live, probes, ranked, strict=True)
            ]
            onward = []
            for i, row, features in zip(live, tried, _split(encode, tried), strict=True):
                if not row:
                    continue
                values = score(clean[i], features, goals[i])
                if self.min_cosine > -1:
                    near = F.cosine_similarity(features, clean[i][None], dim=-1) >= self.min_cosine
                    values = values.where(near, values.new_tensor(-1.0))
                if float(values.max()) > loss[i]:
                    now[i], loss[i] = row[int(values.argmax())], float(values.max())
                    onward.append(i)
            live = onward
        changed = [levenshtein(a, b) for a, b in zip(jobs, now, strict=True)]
        at = {t: i for i, t in enumerate(jobs)}
        rows = [at[t] for t in texts] if away is None else list(range(len(jobs)))
        return TextResult(
            [now[i] for i in rows],
            torch.tensor([changed[i] for i in rows], dtype=torch.int64),
            torch.tensor([loss[i] for i in rows], dtype=torch.float64),
        )

    def _probes(self, text: str) -> list[tuple[int, str]]:
        """(slot, text with a test character there). Even slots lie between characters, odd ones hold one."""
        slots = range(2 * min(len(text), self.reach) + 1)
        return [(s, put(text, s, TESTS[s % 2 and text[s // 2] == TESTS[0]])) for s in slots]

    def _edits(self, text: str, slots: Sequence[int], barred: set[str]) -> list[str]:
        made = [put(text, s, c) for s in slots for c in (*self.alphabet, *([""] if s % 2 else []))]
        return [t for t in dict.fromkeys(made) if t not in barred]


def put(text: str, slot: int, character: str) -> str:
    """Insert at an even slot, replace at an odd one; the empty character deletes there."""
    return text[: slot // 2] + character + text[(slot + 1) // 2 :]


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn ``a`` into ``b``."""
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def _best(row: Sequence[tuple[int, str]], values: Tensor, n: int) -> list[int]:
    order = values.tolist()
    return [row[i][0] for i in sorted(range(len(order)), key=lambda i: -order[i])[:n]]


def _split(encode: Encode, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """Features of each group of texts, from one call."""
    flat = [t for group in groups for t in group]
    if not flat:
        return [torch.empty(0, 1) for _ in groups]
    return list(encode(flat).split([len(group) for group in groups]))
