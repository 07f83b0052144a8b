"""Words that ship with the package: what may stand in for what, and which words are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class WordList:
    """Candidates from groups of words that ship with the package, then from words that fit anywhere; ``k`` in all."""

    k: int = 10

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """The group's words without the word itself."""
        shipped = shipped_words()
        found = [[*shipped.groups.get(core(w)[0].lower(), ()), *shipped.anywhere] for w in words]
        return [
            [c for c in dict.fromkeys(row) if c != core(w)[0].lower()][: self.k]
            for w, row in zip(words, found, strict=True)
        ]


@dataclass(frozen=True)
class Shipped:
    """``groups``: every listed word and its group. ``anywhere``: words that fit anywhere. ``stops``: function words of
    English, which are left alone: exchanging them does no more than break the sentence.
    """

    groups: dict[str, tuple[str, ...]]
    anywhere: tuple[str, ...]
    stops: frozenset[str]


@cache
def shipped_words() -> Shipped:
    """The file words.txt of this folder, read once."""
    groups: dict[str, tuple[str, ...]] = {}
    marked: dict[str, list[str]] = {"*": [], "!": []}
    for line in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines():
        if line[:1] in marked:
            marked[line[0]] += line[1:].split()
        elif not line.startswith("#"):
            for word in line.split():
                groups.setdefault(word, tuple(line.split()))
    return Shipped(groups, tuple(marked["*"]), frozenset(marked["!"]))


def core(word: str) -> tuple[str, str, str]:
    """A word without its punctuation, and what stood before and behind it."""
    inner = word.strip(".,;:!?\"'()[]{}")
    before, _, behind = word.partition(inner) if inner else ("", "", word)
    return inner, before, behind
