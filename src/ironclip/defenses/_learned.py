"""What defenses share that learn the context of the class prompts: fields, state, the classifier that comes of it.

The state is the context vectors alone, kilobytes, with the fingerprint of the model and the spec beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from ironclip.core.check import check_choice
from ironclip.core.context import POSITIONS, Context
from ironclip.core.loop import Loop
from ironclip.core.spec import full_text
from ironclip.core.types import Info, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._train import BASE, RECIPE, as_bytes, check_base, checked_state, finetuned, fingerprint

NAME = "context"
VECTORS, CLASSES, TOWER = f"extra.{NAME}", "prompt.classes", "tower.sha256"


class LearnedPrompt:
    """``fitted`` and ``apply`` for a method whose state is context vectors.

    The class brings ``info``, ``LOOPS`` and these fields. ``tokens``: number of vectors M. ``position``: of the name's
    context, end (before the name, the default), middle or front (after it). ``context``: unified, one set for all
    classes, which works on other classes too, or class_specific. ``init``: a phrase of M tokens to start from, else
    normal noise of ``init_std``. ``tower``: file of a fitted image tower (a state of TeCoA, FARE, ...) that is loaded
    first, and again when applied. ``labels``: true, or pseudo (ours): see ``_pseudo.py``. ``confidence``: least softmax
    value of a pseudo-label. ``recipe``: the loop that is used where none is given.
    """

    info: ClassVar[Info]
    LOOPS: ClassVar[Mapping[str, Loop]]
    tokens: int
    position: str
    context: str
    init: str
    init_std: float
    tower: str
    labels: str
    confidence: float
    recipe: str

    def _check_fields(self) -> None:
        """The fields that every such method has. Raises ValueError."""
        check_choice(self.position, POSITIONS, "position")
        check_choice(self.context, ("unified", "class_specific"), "context")
        check_choice(self.labels, ("true", "pseudo"), "labels")
        check_choice(self.recipe, self.LOOPS, "recipe")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}; write tokens=16")
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}; write 0.02")
        if not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0, 1), got {self.confidence}; write 0.5")

    def loop(self) -> Loop:
        """The recipe's loop."""
        return self.LOOPS[self.recipe]

    def prompts(self, clf: ZeroShot) -> Context:
        """The prompts of the classes, tokenised. Raises ValueError for prompts that do not fit the model."""
        return Context.of(clf.vlm, clf.class_names, self.tokens, self.position, self.context == "class_specific")

    def towered(self, clf: ZeroShot) -> ZeroShot:
        """The classifier with the image tower of the file ``tower``. Raises ValueError where there is none."""
        if not self.tower:
            return clf
        return finetuned(clf, self._tower())

    def _tower(self) -> State:
        path = Path(self.tower).expanduser()
        if not path.is_file():
            raise ValueError(
                f"no image tower at tower={self.tower!r}; fit one with ironclip fit 'TeCoA(eps=...)' --out FOLDER and "
                "write tower='FOLDER/tecoa.safetensors'"
            )
        state = load_file(path)
        if not any(k.startswith("image.") for k in state):
            raise ValueError(f"{self.tower} holds no image tower; name a state of TeCoA, FARE or the like")
        return state

    def _trained_as(self) -> str:
        """The spec without the place of a file: its content counts."""
        return full_text(replace(self, tower=""))  # type: ignore[type-var]

    def _finished(self, clf: ZeroShot, learned: State) -> State:
        """What is stored: the vectors, whose they are, and how they were learned."""
        names = list(clf.class_names) if self.context == "class_specific" else []
        marks = {CLASSES: as_bytes(json.dumps(names)), BASE: fingerprint(clf.vlm), RECIPE: as_bytes(self._trained_as())}
        return {**learned, **marks, **self._tower_mark()}

    def _tower_mark(self) -> State:
        if not self.tower:
            return {}
        digest = sha256()
        for key, value in sorted(self._tower().items()):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {TOWER: torch.tensor(list(digest.digest()), dtype=torch.uint8)}

    def fitted(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The classifier with the learned prompts' class weights, encoded now: what a graybox attacker holds.

        Raises ValueError without a state, and for one of another model, tower or spec; with prompts of each class, for
        classes that it has no prompts of.
        """
        state = checked_state(state, self.info.name, self._trained_as())
        check_base(clf.vlm, state)
        mine, theirs = self._tower_mark().get(TOWER), state.get(TOWER)
        if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, theirs.cpu())):  # type: ignore[union-attr]
            had = "on the model's own image tower" if theirs is None else "on another image tower"
            raise ValueError(f"the prompts were learned {had} than tower={self.tower!r}; name the one they belong to")
        vectors = state[VECTORS].float().to(clf.vlm.device)
        if self.context == "class_specific":
            vectors = _rows(vectors, bytes(state[CLASSES].tolist()).decode(), clf)
        with torch.inference_mode(False), torch.no_grad():  # the weights outlive the caller's mode
            return self.towered(clf).with_weights(self.prompts(clf).features(vectors))

    def apply(self, clf: ZeroShot, state: State | None = None) -> ZeroShot:
        """The same: new class weights are the whole defense."""
        return self.fitted(clf, state)


def _rows(vectors: Tensor, listed: str, clf: ZeroShot) -> Tensor:
    """The vectors of the classifier's classes, by name."""
    names = json.loads(listed)
    lost = [n for n in clf.class_names if n not in names]
    if lost or len(names) != len(vectors):
        told = ", ".join(map(repr, lost[:3]))
        raise ValueError(
            f"the state has class-specific prompts of {len(names)} classes and none for {told}; fit it on "
            "these classes, or use context=unified"
        )
    return vectors[[names.index(n) for n in clf.class_names]]


def trainable(vlm: VLM) -> dict[str, torch.nn.Parameter]:
    """The parameters of a user's own model that take gradients: none may reach them here."""
    return {k: p for k, p in vlm.named_parameters() if p.requires_grad}
