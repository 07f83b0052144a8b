"""Candidates from a masked language model (BERT: Devlin et al. 2019, arXiv 1810.04805), as BERT-Attack asks for them.

One pass on the sentence as it is, nothing masked. Where we differ from published code: the row that is read is that of
the word itself, not of the position before it (``offset=True`` restores that), and a closing token is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from ironclip.attacks._words import core

MAX_IDS, PIECES, PER_PIECE, COMBINATIONS = 30, 12, 4, 24


@dataclass(frozen=True, eq=False)
class MaskedLM:
    """``pieces``: a word to its ids. ``logits``: ids (n, l) to (n, l, v). ``vocabulary``: token of every id; those that
    continue a word begin with ##. ``begin``, ``end``: ids around a sentence, None for none. A sentence is asked once.

    Words of one piece: the ``k`` best tokens down to the first whose logit is below ``threshold``. Words of more: the
    first 24 of all combinations of the 4 best of each piece, by falling likelihood on their own. Raises ValueError
    where vocabulary and model do not fit.
    """

    pieces: Callable[[str], Sequence[int]]
    logits: Callable[[Tensor], Tensor]
    vocabulary: Sequence[str]
    begin: int
    end: int | None = None
    k: int = 10
    threshold: float = 0.3
    offset: bool = False
    asked: dict[tuple[str, ...], list[list[str]]] = field(default_factory=dict)

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """Candidates for every word of a sentence."""
        key = tuple(words)
        if key not in self.asked:
            self.asked[key] = self._ask(words)
        return self.asked[key]

    @torch.no_grad()
    def _ask(self, words: Sequence[str]) -> list[list[str]]:
        ids, spans = [self.begin], list[range]()
        for word in words:
            inner, before, behind = core(word)
            ids += self.pieces(before) if before else []
            own = list(self.pieces(inner)) if inner else []
            spans.append(range(len(ids), len(ids) + len(own)))
            ids += [*own, *(self.pieces(behind) if behind else [])]
        ids = ids[: MAX_IDS - (self.end is not None)] + ([] if self.end is None else [self.end])
        rows = self._rows([ids])[0]
        return [self._word(rows, span) for span in spans]

    def _rows(self, ids: list[list[int]]) -> Tensor:
        out = self.logits(torch.tensor(ids))
        if out.shape[-1] != len(self.vocabulary):
            raise ValueError(
                f"the language model scores {out.shape[-1]} tokens but its tokenizer has {len(self.vocabulary)}; "
                "they belong to different models"
            )
        return out

    def _word(self, rows: Tensor, span: range) -> list[str]:
        if not span or span[-1] >= MAX_IDS - 1:
            return []
        values, tokens = rows[[i - self.offset for i in span]].topk(min(self.k, rows.shape[1]), dim=1)
        if len(span) == 1:
            likely = int((values[0] >= self.threshold).long().cumprod(0).sum())
            return [self.vocabulary[i] for i in tokens[0, :likely].tolist()]
        choices = tokens[:PIECES, :PER_PIECE].tolist()
        combined = [list(c) for c in islice(product(*choices), COMBINATIONS)]
        scores = self._rows(combined).log_softmax(dim=-1)
        chosen = torch.tensor(combined)
        likelihood = scores.gather(2, chosen.unsqueeze(2).to(scores.device)).mean(dim=(1, 2)).tolist()
        best = sorted(range(len(combined)), key=lambda i: -likelihood[i])
        return [joined([self.vocabulary[t] for t in combined[i]]) for i in best]


def joined(tokens: Sequence[str]) -> str:
    """Tokens as text: pieces that begin with ## continue the one before."""
    return " ".join(tokens).replace(" ##", "")


@cache
def load_masked_lm(name: str, k: int = 10, threshold: float = 0.3, offset: bool = False) -> MaskedLM:
    """A masked language model of the transformers library, by folder or hub name, opened once.

    Raises FileNotFoundError where neither folder, cache nor hub has it, ValueError for one that does not fit.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if not name:
        raise ValueError("hf: needs a name or a folder; write hf:bert-base-uncased")
    try:
        words: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    except OSError as err:
        raise FileNotFoundError(
            f"hf:{name} could not be loaded, neither as a folder nor from the hub or its cache; write source=list for "
            "the words that ship with the package"
        ) from err
    if words.cls_token_id is None:
        raise ValueError(f"hf:{name} has no token that begins a sentence; use a BERT such as hf:bert-base-uncased")
    return MaskedLM(
        pieces=lambda word: words.encode(word, add_special_tokens=False),
        logits=lambda ids: model(input_ids=ids).logits,
        vocabulary=words.convert_ids_to_tokens(list(range(len(words)))),
        begin=words.cls_token_id,
        end=None if offset else words.sep_token_id,
        k=k,
        threshold=threshold,
        offset=offset,
    )
