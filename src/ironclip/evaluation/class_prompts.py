"""Attacked class prompts: what zero-shot classification keeps when someone edits the words it classifies by.

Images are clean. Two attackers: ``all`` edits the prompts of every class, ``own`` only those of the class that an image
shows, the other classes keep theirs. Every prompt moves away from what it was, within the budget of a text attack; the
text of another class never comes out, but an edit may bring a prompt nearest to another class: those are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.text import TextAttack
from ironclip.core import spec
from ironclip.core.types import prediction
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.types import Dataset
from ironclip.evaluation.block import Progress, Silent
from ironclip.evaluation.stats import wilson


@dataclass(frozen=True)
class Line:
    """Accuracy in percent with its 95 % Wilson interval; ``attacker``: nobody, own or all."""

    attacker: str
    accuracy: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Edit:
    """A prompt before and after, how much of it changed (words or characters, by the attack), and the class that its
    feature is nearest to afterwards where that is another one, else an empty text."""

    label: str
    before: str
    after: str
    changed: int
    crossed: str


@dataclass(frozen=True)
class Outcome:
    """Lines over the same n images, the clean one first, and every edited prompt."""

    vlm: str
    data: str
    text_attack: str
    n: int
    lines: tuple[Line, ...]
    edits: tuple[Edit, ...]

    @property
    def crossed(self) -> int:
        """How many prompts an edit brought nearest to another class."""
        return sum(bool(e.crossed) for e in self.edits)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "crossed": self.crossed}


@torch.no_grad()
def attack_prompts(
    vlm: VLM,
    data: Dataset,
    attack: TextAttack,
    batch_size: int = 16,
    progress: Progress | None = None,
    *,
    through: Sequence[VLM] = (),
) -> Outcome:
    """Attack the class prompts of a data set on a model. Raises ValueError as ``ZeroShot.build`` does.

    ``through``: the models on which texts are attacked, ``vlm`` itself by default. A text defense is measured with the
    defended model as ``vlm``: statically with ``through`` the undefended one alone; an attacker who knows it may attack
    either, and an image counts as right only where it survives both.
    """
    clf = ZeroShot.build(vlm, data.class_names, data.templates)
    prompts = [[t.replace("{}", name) for t in clf.templates] for name in clf.class_names]
    attacked = [_edited(m, attack, prompts) for m in through or (vlm,)]
    heads = [torch.stack([F.normalize(vlm.encode_text(t).mean(dim=0), dim=0) for t, _ in moved]) for moved in attacked]
    shown = progress or Silent()
    shown.start(f"images of {data.name}", len(data.ids))
    right: dict[str, list[Tensor]] = {"nobody": [], "own": [], "all": []}
    for x, labels, ids in data.batches(batch_size):
        y = clf.labels(labels).to(vlm.device)
        e = vlm.encode_image(x.to(vlm.device))
        clean = clf.scale * e @ clf.weights.T
        every = [clf.scale * e @ weights.T for weights in heads]
        own = [clean.scatter(1, y[:, None], after.gather(1, y[:, None])) for after in every]
        for name, worlds in (("nobody", [clean]), ("own", own), ("all", every)):
            right[name].append(torch.stack([prediction(z) == y for z in worlds]).all(dim=0).cpu())
        shown.advance(len(ids))
    shown.done()
    flat = {name: torch.cat(parts) for name, parts in right.items()}
    return Outcome(
        vlm=vlm.name,
        data=data.name,
        text_attack=spec.full_text(attack),
        n=len(flat["nobody"]),
        lines=tuple(_line(name, values) for name, values in flat.items()),
        edits=tuple(e for moved in attacked for e in _edits(vlm, clf, prompts, moved)),
    )


def _edited(vlm: VLM, attack: TextAttack, prompts: Sequence[Sequence[str]]) -> list[tuple[list[str], list[int]]]:
    """Per class the edited prompts and how much changed; texts of any class are forbidden."""
    flat = [t for own in prompts for t in own]
    result = attack(vlm.encode_text, flat, forbidden=flat)
    texts, changed = iter(result.texts), iter(result.changed.tolist())
    return [([next(texts) for _ in own], [next(changed) for _ in own]) for own in prompts]


def _edits(
    vlm: VLM, clf: ZeroShot, prompts: Sequence[Sequence[str]], moved: Sequence[tuple[list[str], list[int]]]
) -> list[Edit]:
    out = []
    for i, (own, (texts, changed)) in enumerate(zip(prompts, moved, strict=True)):
        nearest = (vlm.encode_text(texts) @ clf.weights.T).argmax(dim=1).tolist()
        for before, after, c, k in zip(own, texts, changed, nearest, strict=True):
            out.append(Edit(clf.class_names[i], before, after, int(c), clf.class_names[k] if k != i else ""))
    return out


def _line(name: str, right: Tensor) -> Line:
    n, hits = len(right), int(right.sum())
    lo, hi = wilson(hits, n)
    return Line(name, 100 * hits / n, 100 * lo, 100 * hi)
