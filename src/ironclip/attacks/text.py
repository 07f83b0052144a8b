"""Attacks on texts: a few words of a sentence are exchanged so that its embedding moves as far as possible.

``TextAttack`` is what any such attack looks like to the rest of the library. ``WordSwap`` follows the greedy scheme of
BERT-Attack (Li et al. 2020, arXiv 2004.09984) in the form that Co-Attack (Zhang et al. 2022, arXiv 2206.09391) gave it
for embeddings: no labels, no images. Words of a sentence are what stands between single spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks._words import WordList, core, shipped_words
from ironclip.core.spec import method

Encode = Callable[[Sequence[str]], Tensor]
"""n texts to unit features (n, d)."""
Candidates = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""The words of a sentence to what may stand in for each of them, best first. A function of the sentence alone."""

MASK = "[UNK]"


@dataclass(frozen=True, eq=False)
class TextResult:
    """``texts``: attacked, in the order given. ``changed``: (n,) words that differ. ``loss``: (n,) what was raised."""

    texts: list[str]
    changed: Tensor
    loss: Tensor


@runtime_checkable
class TextAttack(Protocol):
    """A frozen dataclass with hyperparameters, like the attacks on images. Equal texts get equal answers.

    ``forbidden``: texts that must not come out, such as those of other classes. ``away``: (n, d) unit features, such as
    those of each text's image; texts then move away from them instead of from what they were, and only where they do.
    """

    name: ClassVar[str]

    def __call__(
        self, encode: Encode, texts: Sequence[str], *, forbidden: Sequence[str] = (), away: Tensor | None = None
    ) -> TextResult: ...


@method
class WordSwap:
    """Exchange at most ``words`` words of every text, the most important ones first.

    Importance of a word: divergence of the features when it is masked. ``k``: candidates for each word. ``source``:
    ``list`` for the words that ship with the package, or a masked language model by folder or hub name, such as
    ``hf:bert-base-uncased``; its candidates need a logit of ``threshold``. ``cased_stops``: "This" is no function word,
    and ``legacy_offset``: candidates of a word are those of the position before it, as in published code.
    """

    name: ClassVar[str] = "word_swap"

    words: int = 1
    k: int = 10
    source: str = "list"
    threshold: float = 0.3
    cased_stops: bool = False
    legacy_offset: bool = False

    def __post_init__(self) -> None:
        if self.words < 1 or self.k < 1:
            raise ValueError(f"words and k must be 1 or more, got {self.words} and {self.k}")
        if self.source != "list" and not self.source.removeprefix("hf:") != self.source:
            raise ValueError(f"unknown source {self.source!r} of words; write list or hf:bert-base-uncased")
        if self.source == "list" and self.legacy_offset:
            raise ValueError("legacy_offset belongs to a masked language model; write source=hf:bert-base-uncased")

    def __call__(
        self, encode: Encode, texts: Sequence[str], *, forbidden: Sequence[str] = (), away: Tensor | None = None
    ) -> TextResult:
        """Attack n texts. Equal ones are attacked once, unless each has its own ``away``."""
        found = self.candidates()
        return swap(encode, texts, found, words=self.words, forbidden=forbidden, cased=self.cased_stops, away=away)

    def candidates(self) -> Candidates:
        """Where the words come from; opened once. Raises FileNotFoundError for a model that is not there."""
        if self.source == "list":
            return WordList(self.k)
        from ironclip.attacks._masked_lm import load_masked_lm

        return load_masked_lm(self.source.removeprefix("hf:"), self.k, self.threshold, self.legacy_offset)


def feature_divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """(n,) KL(softmax e || softmax e') over the entries of features (n, d): almost half the squared distance over d."""
    p, q = clean.double().log_softmax(dim=-1), moved.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def score(clean: Tensor, moved: Tensor, away: Tensor | None) -> Tensor:
    """(n,) what a text attack raises: the divergence from ``clean`` (d,), or the cosine distance to ``away`` (d,)."""
    if away is None:
        return feature_divergence(clean, moved)
    return 1 - F.cosine_similarity(moved.double(), away.double()[None], dim=-1)


def check_texts(texts: Sequence[str], away: Tensor | None) -> None:
    """Refuse one string in place of a list, and features that are not one a text. Raises ValueError."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings; write [text]")
    if away is not None and (away.ndim != 2 or len(away) != len(texts)):
        raise ValueError(f"away must be ({len(texts)}, d) features, one a text, got {tuple(away.shape)}")


@torch.no_grad()
def swap(
    encode: Encode,
    texts: Sequence[str],
    candidates: Candidates,
    *,
    words: int = 1,
    forbidden: Sequence[str] = (),
    cased: bool = False,
    away: Tensor | None = None,
) -> TextResult:
    """Greedy exchange on all texts at once; every round encodes one word's candidates of each text together.

    A word is exchanged where that raises the divergence from the text as it was. Words that are function words, have
    no letter or no candidate are neither masked nor tried, which changes no result.
    """
    check_texts(texts, away)
    if away is None:
        jobs = [_Job(t, candidates, cased) for t in dict.fromkeys(texts)]
        by_text = {job.text: job for job in jobs}
        made = [by_text[t] for t in texts]
    else:
        made = jobs = [_Job(t, candidates, cased, row) for t, row in zip(texts, away, strict=True)]
    barred = set(forbidden)
    for job, features in zip(jobs, _encoded(encode, [job.masked for job in jobs]), strict=True):
        job.rank(features)
    while any(job.order and job.count < words for job in jobs):
        live = [job for job in jobs if job.order and job.count < words]
        tried = [job.variants(job.order[0], barred) for job in live]
        rows = _encoded(encode, [[t for _, t in variants] for variants in tried])
        for job, variants, features in zip(live, tried, rows, strict=True):
            job.take(variants, features)
    loss = torch.tensor([job.loss for job in made], dtype=torch.float64)
    return TextResult([" ".join(job.words) for job in made], torch.tensor([job.count for job in made]), loss)


class _Job:
    """One text under attack. ``order``: places still to try."""

    def __init__(self, text: str, candidates: Candidates, cased: bool, away: Tensor | None = None) -> None:
        self.text, self.words, self.away = text, text.split(" "), away
        self.loss, self.count, self.order = 0.0, 0, list[int]()
        self.clean = torch.empty(0)
        found = candidates(self.words)
        self.choices = [_allowed(w, row, cased) for w, row in zip(self.words, found, strict=True)]
        self.open = [i for i, row in enumerate(self.choices) if row]

    @property
    def masked(self) -> list[str]:
        """The text and, where there is a choice of places, the text without each of them."""
        if not self.open and self.away is None:
            return []
        return [self.text, *(self.with_word(i, MASK) for i in self.open if len(self.open) > 1)]

    def with_word(self, place: int, word: str) -> str:
        _, before, behind = core(self.words[place])
        return " ".join([*self.words[:place], before + word + behind, *self.words[place + 1 :]])

    def rank(self, features: Tensor) -> None:
        if not len(features):
            return
        self.clean, self.order = features[0], list(self.open)
        if self.away is not None:
            self.loss = float(score(self.clean, features[:1], self.away))
        if len(self.open) > 1:
            weight = feature_divergence(self.clean, features[1:]).tolist()
            self.order = [self.open[i] for i in sorted(range(len(weight)), key=lambda i: -weight[i])]

    def variants(self, place: int, barred: set[str]) -> list[tuple[str, str]]:
        made = [(w, self.with_word(place, w)) for w in self.choices[place]]
        return [(w, t) for w, t in made if t not in barred]

    def take(self, variants: list[tuple[str, str]], features: Tensor) -> None:
        self.order.pop(0)
        if not variants:
            return
        values = score(self.clean, features, self.away)
        best = int(values.argmax())
        if float(values[best]) > self.loss:
            self.words, self.loss = variants[best][1].split(" "), float(values[best])
            self.count += 1


def _allowed(word: str, row: Sequence[str], cased: bool) -> list[str]:
    """Candidates that are single words with a letter, no pieces, no function words, not the word itself."""
    own, stops = core(word)[0], shipped_words().stops
    if (own if cased else own.lower()) in stops or not any(c.isalpha() for c in own):
        return []
    return [
        c
        for c in dict.fromkeys(row)
        if c.lower() != own.lower()
        and c not in stops
        and not c.startswith("[")
        and "##" not in c
        and " " not in c
        and any(x.isalpha() for x in c)
    ]


def _encoded(encode: Encode, groups: list[list[str]]) -> list[Tensor]:
    """Features of each group of texts, from one call."""
    flat = [t for group in groups for t in group]
    if not flat:
        return [torch.empty(0) for _ in groups]
    return list(encode(flat).split([len(group) for group in groups]))
