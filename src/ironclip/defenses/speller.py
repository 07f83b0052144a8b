"""Speller: words that no dictionary knows are put back to the nearest word that it knows, before the text is encoded.

Ours, after the word recogniser of Pruthi, Dhingra, Lipton 2019 (arXiv 1905.11268), without anything learned. It mends
single typing errors and blanks inside words. An attacker who knows it edits one word into another, which no spelling
tells from an honest text: read what is left against attacks *through* it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import ClassVar

from ironclip.attacks._words import core
from ironclip.core.spec import method
from ironclip.core.vlm import VLM

ALONE = ("a", "i")
"""Letters that are words."""


@method
class Speller:
    """``words``: ``minilm`` for the whole words of MiniLM's vocabulary, which the extra ``lite`` brings, or a text file
    with one word a line, the more frequent first: of several near words the first one is taken."""

    name: ClassVar[str] = "speller"
    revision: ClassVar[int] = 1

    words: str = "minilm"

    def wrap(self, vlm: VLM, known: Sequence[str] = ()) -> VLM:
        """The model with corrected texts, weights shared. ``known``: sentences whose words are right, such as one's own
        class names. Raises FileNotFoundError or ImportError where the words are not there."""
        listed = dictionary(self.words)
        own = {core(w)[0].lower() for text in known for w in text.split()}
        order = {w: i for i, w in enumerate(dict.fromkeys([*sorted(own - {""}), *listed]))}
        return vlm.with_texts(lambda text: correct(text, order), self.name)


def correct(text: str, order: dict[str, int]) -> str:
    """``text`` with unknown words put back; ``order``: known words to their rank. Known words stay as they are."""
    out: list[str] = []
    words, i = text.split(" "), 0
    while i < len(words):
        joined = _joined(words[i : i + 2], order)
        if joined is not None:
            out.append(joined)
            i += 2
            continue
        out.append(_mended(words[i], order))
        i += 1
    return " ".join(out)


def near(word: str) -> list[str]:
    """All strings of lower-case letters one edit away: deletions, neighbours exchanged, replacements, insertions."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    made = [a + b[1:] for a, b in cuts if b]
    made += [a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1]
    made += [a + c + b[1:] for a, b in cuts if b for c in ascii_lowercase]
    made += [a + c + b for a, b in cuts for c in ascii_lowercase]
    return list(dict.fromkeys(made))


@cache
def dictionary(words: str) -> tuple[str, ...]:
    """The words of a source, the more frequent first. Raises FileNotFoundError, or ImportError for the extra."""
    if words == "minilm":
        from ironclip.models.lite import text_vocabulary

        found = text_vocabulary()
    else:
        if not Path(words).is_file():
            raise FileNotFoundError(f"no word list {words}; expected minilm or a text file with one word a line")
        found = [w.strip().lower() for w in Path(words).read_text(encoding="utf-8").splitlines()]
    kept = tuple(w for w in dict.fromkeys(found) if w.isalpha() and (len(w) > 1 or w in ALONE))
    if not kept:
        raise ValueError(f"word list {words} has no words; expected one a line")
    return kept


def _mended(word: str, order: dict[str, int]) -> str:
    inner, before, behind = core(word)
    if len(inner) < 2 or inner.lower() in order or any(c.isdigit() for c in inner):
        return word
    return before + (_first(near(inner.lower()), order) or inner) + behind


def _joined(pair: Sequence[str], order: dict[str, int]) -> str | None:
    """Two unknown words that are one with a blank in it, or with a blank in place of a letter."""
    if len(pair) < 2:
        return None
    (a, before, x), (b, y, behind) = core(pair[0]), core(pair[1])
    a, b = a.lower(), b.lower()
    if x or y or not (a or b) or any(w in order for w in (a, b)):
        return None
    found = _first([a + b, *(a + c + b for c in ascii_lowercase)], order)
    return None if found is None else before + found + behind


def _first(words: Sequence[str], order: dict[str, int]) -> str | None:
    return min((w for w in words if w in order), key=order.__getitem__, default=None)
