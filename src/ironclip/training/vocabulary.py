"""A byte-pair vocabulary in CLIP's layout, trained on captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_vocabulary(texts: Iterable[str], merges: int, context: int) -> Any:
    """A ``transformers.CLIPTokenizer`` whose merges were learned on ``texts``.

    Ids in CLIP's order (Radford et al. 2021, arXiv 2103.00020): 256 byte symbols, the same 256 as the last of a word,
    the merges, start, end; so the end token has the highest id. Text is lower-cased. Any text can be written, since
    every byte has a symbol. ``merges``: at most so many; ``context``: longest sequence, both marks included. Raises
    ValueError where a size is too small.
    """
    if merges < 0 or context < 3:
        raise ValueError(f"merges must be 0 or more and context 3 or more, got {merges} and {context}")
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    like = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for text, n in Counter(texts).items():
        for word, _ in like.pre_tokenizer.pre_tokenize_str(like.normalizer.normalize_str(text)):
            words[word] += n
    pairs: Any = learn_merges(words, merges)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*symbols, *(s + LAST for s in symbols), *(a + b for a, b in pairs), START, END]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(names)}, merges=pairs, model_max_length=context)


def learn_merges(words: Counter[str], merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): join the most frequent pair, again and again.

    Equal counts are settled by the alphabet, so that the same words give the same merges: the library's learner
    settles them by the order of a hash table, and every figure of a trained model would hang on that.
    """
    spelled = {w: [*w[:-1], w[-1] + LAST] for w in words}
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        spelled = {w: _joined(parts, best) for w, parts in spelled.items()}
    return learned


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
