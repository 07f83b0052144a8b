"""Several image sets as one, for training: the label space is the list of all their classes, set by set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ironclip.data.imageset import ImageSet, Reader

GENERIC = "a photo of a {}."


@dataclass(frozen=True)
class _Readers:
    readers: tuple[Reader, ...]
    size: int

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """A row is ``place * number of sets + set``."""
        out = torch.empty(len(rows), 3, self.size, self.size)
        for s, read in enumerate(self.readers):
            at = [i for i, row in enumerate(rows) if row % len(self.readers) == s]
            if at:
                out[at] = read([rows[i] // len(self.readers) for i in at])
        return out


@dataclass(frozen=True, eq=False)
class JoinedSet(ImageSet):
    """``spaces[label]``: which of the joined sets a label comes from."""

    spaces: tuple[int, ...] = ()


def joined(sets: Sequence[ImageSet]) -> ImageSet:
    """One set with the images of all; a single set stays as it is.

    Classes are listed set by set, so equal names occur twice and ``ZeroShot.build`` makes them one. Templates are
    those of the sets where all agree, else "a photo of a {}.", which is said in a warning. Raises ValueError for no
    sets, a set that is named twice, or sets of different sizes.
    """
    if not sets:
        raise ValueError("no data set to join; name at least one")
    if len(sets) == 1:
        return sets[0]
    if len({s.size for s in sets}) > 1:
        raise ValueError(
            f"sets of different sizes cannot be joined: {', '.join(f'{s.name} {s.size} px' for s in sets)}"
        )
    seen = [s.name for s in sets]
    twice = sorted({n for n in seen if seen.count(n) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice; name each data set once")
    templates = sets[0].templates
    if any(s.templates != templates for s in sets):
        templates = [GENERIC]
        warnings.warn(f"the joined sets have different templates: all classes use {GENERIC!r}", stacklevel=2)
    first = [sum(len(s.class_names) for s in sets[:i]) for i in range(len(sets))]
    same = len({s.prompt_set for s in sets}) == 1
    return JoinedSet(
        name="+".join(seen),
        class_names=[n for s in sets for n in s.class_names],
        templates=list(templates),
        prompt_set=sets[0].prompt_set if same else "joined",
        recipe="+".join(dict.fromkeys(s.recipe for s in sets)),
        size=sets[0].size,
        labels=[start + y for start, s in zip(first, sets, strict=True) for y in s.labels],
        ids=[f"{s.name}/{i}" for s in sets for i in s.ids],
        read=_Readers(tuple(s.read for s in sets), sets[0].size),
        rows=[row * len(sets) + k for k, s in enumerate(sets) for row in s.rows],
        skipped=sum(s.skipped for s in sets),
        spaces=tuple(k for k, s in enumerate(sets) for _ in s.class_names),
    )
