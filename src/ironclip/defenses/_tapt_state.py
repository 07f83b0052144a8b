"""What TAPT learns beforehand: two sets of prompts and the moments of tokens under each, as one flat state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.augment import crop_views, draw_crops
from ironclip.core.loop import Loop
from ironclip.core.prompts import SoftPrompts
from ironclip.core.rng import SampleRNG
from ironclip.core.types import State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._deep import Moments, block_inputs, visual_prompts

if TYPE_CHECKING:
    from ironclip.defenses.tapt import TAPT

Prompts = dict[str, Tensor]
"""``visual`` (depth, m, D) and ``text`` (depth, m, w), or ``text``, ``map`` (depth, D, w), ``bias`` (depth, D); with an
axis of images before, one set per image."""

SETS = ("adv", "clean")
CODE_BLOCKS = 8
"""Blocks whose inputs the published code aligns, of its prompts' nine."""
STD = 0.02


def assembled(prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    """Visual and text tokens."""
    if "map" in prompts:
        return prompts["text"] @ prompts["map"].transpose(-1, -2) + prompts["bias"].unsqueeze(-2), prompts["text"]
    return prompts["visual"], prompts.get("text")


def untrained(defense: TAPT, clf: ZeroShot, name: str, seed: int = 0) -> Prompts:
    """Prompts before any training: small random vectors, and the template's own words in the first text layer."""
    vlm, m = clf.vlm, defense.tokens
    rng = SampleRNG.of(seed, [name]).fold("tapt")
    wide, depth = vlm.parts.vision_width, min(defense.depth, len(vlm.vision_blocks))
    out: Prompts = {}
    if defense.variant != "vlj":
        out["visual"] = STD * rng.fold("visual").normal(depth, m, wide)[0]
    if defense.variant != "v":
        first = texts_of(defense, clf)
        assert first is not None
        deep = max(1, min(defense.depth, len(getattr(vlm.text, "blocks", []))))
        depth = min(depth, deep) if defense.variant == "vlj" else deep
        words = first.initial.float().cpu()
        rest = STD * rng.fold("text").normal(depth - 1, m, words.shape[-1])[0]
        out["text"] = torch.cat([words, rest])
        if defense.variant == "vlj":
            bound = words.shape[-1] ** -0.5
            out["map"] = rng.fold("map").uniform(depth, wide, words.shape[-1], low=-bound, high=bound)[0]
            out["bias"] = rng.fold("bias").uniform(depth, wide, low=-bound, high=bound)[0]
    return {k: v.to(vlm.device) for k, v in out.items()}


def texts_of(defense: TAPT, clf: ZeroShot) -> SoftPrompts | None:
    """The soft prompts of the classes, None where the variant leaves texts alone."""
    if defense.variant == "v":
        return None
    return SoftPrompts.of(clf.vlm, clf.class_names, defense.template, defense.tokens)


@dataclass(frozen=True, eq=False)
class Reference:
    """``reset``: the prompts of every image before tuning. ``moments``: mean and variance (blocks, M, D) under the
    robust and the standard prompts; None for a set of weight 0. ``blocks``: how many are compared."""

    clf: ZeroShot
    template: str
    reset: Prompts
    soft: SoftPrompts | None
    moments: tuple[tuple[Tensor, Tensor], ...]
    blocks: int
    cache: dict[str, Tensor]

    def texts(self, text: Tensor | None) -> Tensor:
        """(k, d) or (b, k, d) unit class features; those of the plain template where texts are left alone."""
        if text is not None and self.soft is not None:
            return self.soft.features(text)
        if "fixed" not in self.cache:
            with torch.inference_mode(False), torch.no_grad():
                names = self.clf.class_names
                self.cache["fixed"] = self.clf.vlm.encode_text([self.template.format(n) for n in names])
        return self.cache["fixed"]

    @classmethod
    def read(cls, defense: TAPT, clf: ZeroShot, state: State | None) -> Reference:
        """A state for this model and variant. Raises ValueError for any other."""
        vlm = clf.vlm
        n = len(vlm.vision_blocks)
        if state is None:
            raise ValueError("tapt must be fitted first; run ironclip fit 'tapt', or pass state=TAPT().fit(clf, data)")
        with torch.inference_mode(False):
            wanted = untrained(defense, clf, "reset")
        fitted = {k: state[f"adv.{k}"].to(vlm.device).float() for k in wanted if f"adv.{k}" in state}
        told = bytes(state["record"].tolist()).decode() if "record" in state else "{}"
        for key, value in wanted.items():
            if key not in fitted or fitted[key].shape != value.shape:
                got = tuple(fitted[key].shape) if key in fitted else "nothing"
                raise ValueError(
                    f"the state's prompts {key!r} must be {tuple(value.shape)} for {defense!r} on {vlm.name}, got "
                    f"{got}; it was fitted as {told}: fit again"
                )
        grid = vlm.parts.patch_grid
        shape = (n, 1 + grid[0] * grid[1] + defense.tokens, vlm.parts.vision_width)
        blocks = min(CODE_BLOCKS, n) if defense.alignment == "code" else n
        moments = []
        for name, weight in zip(SETS, (defense.alpha, 1 - defense.alpha), strict=True):
            pair = tuple(state.get(f"{name}.{part}", torch.zeros(0)).to(vlm.device).float() for part in ("mean", "var"))
            if weight > 0:
                _check(pair, name, shape, blocks, vlm.name, told)
            moments.append((pair[0][:blocks], pair[1][:blocks]))
        reset = fitted
        if defense.reset_to == "random" and defense.variant != "vlj":
            reset = dict(wanted)
            if "text" in reset:
                reset["text"] = torch.cat([fitted["text"][:1], wanted["text"][1:]])
        return cls(clf, defense.template, reset, texts_of(defense, clf), tuple(moments), blocks, {})


def _check(pair: tuple[Tensor, ...], name: str, shape: tuple[int, ...], blocks: int, model: str, told: str) -> None:
    for part, value in zip(("mean", "var"), pair, strict=True):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"statistics {name}.{part} must be (blocks, tokens, width) = {shape} for {model}, got "
                f"{tuple(value.shape)}; they were made as {told}: fit again on this model"
            )
        bad = (~torch.isfinite(value[:blocks])).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"statistics {name}.{part} are not finite at block {bad[0]}; fit again")


def fit_prompts(defense: TAPT, clf: ZeroShot, data: Any, loop: Loop, seed: int, session: Any) -> State:
    """Both sets of prompts in one run: cross-entropy on attacked images for one, on clean images for the other."""
    from ironclip.core.spec import full_text
    from ironclip.defenses._train import Inner, cast_source
    from ironclip.training.feed import Batch
    from ironclip.training.finetune import Plan, finetune

    source = cast_source(data)
    start = untrained(defense, clf, "start", seed)
    soft = texts_of(defense, clf)
    fixed = clf.vlm.encode_text([defense.template.format(n) for n in clf.class_names]).detach()
    inner = Inner(defense.eps, defense.step, defense.pgd)

    def now(student: VLM, name: str) -> tuple[Tensor, Tensor]:
        visual, text = assembled({k: student.get_parameter(f"extra.{name}_{k}") for k in start})
        return visual, fixed if text is None or soft is None else soft.features(text)

    def losses(student: VLM, x: Tensor, y: Tensor, visual: Tensor, texts: Tensor) -> Tensor:
        with visual_prompts(student, visual):
            z = clf.scale * student.encode_image(x) @ texts.T
        return F.cross_entropy(z, y, reduction="none")

    def attack(student: VLM, batch: Batch) -> Tensor:
        with torch.no_grad():
            visual, texts = now(student, "adv")
        return inner(lambda x: losses(student, x, batch.y, visual, texts), batch.x, batch.rng.fold("tapt"))

    def loss(student: VLM, batch: Batch, x_adv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        robust = losses(student, x_adv, batch.y, *now(student, "adv")).mean()
        plain = losses(student, batch.x, batch.y, *now(student, "clean")).mean()
        return robust + plain, {"robust": robust.detach(), "plain": plain.detach()}

    def logits(student: VLM, x: Tensor) -> Tensor:
        visual, texts = now(student, "adv")
        with visual_prompts(student, visual):
            return clf.scale * student.encode_image(x) @ texts.T

    extra = {f"{name}_{k}": v for name in SETS for k, v in start.items()}
    plan = Plan(clf, attack, loss, logits=logits, towers=(), extra=extra)
    learned = finetune(plan, source, loop=loop, seed=seed, recipe=full_text(defense), session=session)
    state: State = {}
    for name in SETS:
        own = {k: learned[f"extra.{name}_{k}"].float() for k in start}
        mean, var, n = statistics(clf.vlm, assembled(own)[0].to(clf.vlm.device), source, loop.batch_size, seed)
        state |= {f"{name}.{k}": v.contiguous() for k, v in own.items()} | {f"{name}.mean": mean, f"{name}.var": var}
    record = {
        "backbone": clf.vlm.name, "weights": clf.vlm.weights_hash, "variant": defense.variant,
        "tokens": defense.tokens, "images": n, "transform": "random resized crop and flip",
    }  # fmt: skip
    return {**state, "record": torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)}


def statistics(vlm: VLM, visual: Tensor, data: Any, batch_size: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Mean and unbiased variance (blocks, M, D) of the tokens that enter each block, over one random crop of each
    image, and how many images there were. Raises ValueError for fewer than two."""
    moments, size = Moments(), vlm.image_size
    with torch.no_grad():
        for x, _, ids in data.batches(batch_size):
            stream = SampleRNG.of(seed, ids).fold("tapt", "statistics")
            views = crop_views(x.to(vlm.device), draw_crops(stream, 1, (size, size)))[:, 0]
            with visual_prompts(vlm, visual), block_inputs(vlm, len(vlm.vision_blocks)) as seen:
                vlm.encode_image(views)
            moments.add(torch.stack(seen, dim=1))
    mean, var = moments.result()
    return mean, var, moments.n
