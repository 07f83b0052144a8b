"""Image-text retrieval: recall both ways, on clean and on attacked images and captions.

Recall is a fraction in [0, 1]. Each image has one caption or more. From image to text a query is a hit at k where any
of its own captions lies among the k best. From text to image there is one right image. A tie counts against the query:
a model that gives everything one embedding must find nothing, and by lowest index it would find what happens to come
first. Captions of two images that read the same tie, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironclip.attacks.feature import FeaturePGD
from ironclip.attacks.pair import PairAttack
from ironclip.attacks.text import TextAttack, WordSwap
from ironclip.core import spec
from ironclip.core.check import check_images
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Attack, Defense, State
from ironclip.core.views import Defended, base_of
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.captions import CaptionSet
from ironclip.defenses.speller import Speller
from ironclip.evaluation import stats
from ironclip.evaluation.block import Progress, Silent
from ironclip.registry import build_attack, build_defense, build_pair_attack, build_text_attack

KS = (1, 5, 10)
TIE = 1e-10  # well above the rounding of sums in float64, well below what float32 features tell apart
_TEXTS = 256


@dataclass(frozen=True, eq=False)
class Recall:
    """Ranks count from 0: how many wrong answers score as high as the best right one or higher.

    ``image_ranks``: (n,) int64, image to text; ``text_ranks``: (m,) int64, text to image. Both are per query, so two
    runs over the same queries can be compared in pairs.
    """

    ks: tuple[int, ...]
    image_ranks: Tensor
    text_ranks: Tensor

    @property
    def image_to_text(self) -> dict[int, float]:
        """k to the fraction of images with an own caption among the k best."""
        return {k: hits(self.image_ranks, k).double().mean().item() for k in self.ks}

    @property
    def text_to_image(self) -> dict[int, float]:
        """k to the fraction of captions whose image is among the k best."""
        return {k: hits(self.text_ranks, k).double().mean().item() for k in self.ks}


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a retrieval table.

    ``setting``: clean, image, text or joint, by what was attacked; pair, by an attack on both together; worst, the
    worst rank of every query over all attacked lines.
    """

    setting: str
    recall: Recall


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Rows over the same queries, the clean one first, and what made them, as specs with every field."""

    vlm: str
    data: str
    defense: str
    attack: str | None
    text_attack: str | None
    pair: str | None
    seed: int
    images: int
    texts: int
    rows: tuple[Row, ...]

    def row(self, setting: str) -> Recall:
        """Recall in ``clean``, ``image``, ``text`` or ``joint``. Raises ValueError for a setting that was not run."""
        for row in self.rows:
            if row.setting == setting:
                return row.recall
        raise ValueError(f"no row {setting!r}; this table has {', '.join(r.setting for r in self.rows)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: recall and success rates in percent, and the rank of every query."""
        clean = self.rows[0].recall
        fields = ("vlm", "data", "defense", "attack", "text_attack", "pair", "seed", "images", "texts")
        return {**{f: getattr(self, f) for f in fields}, "rows": [_plain(row, clean) for row in self.rows]}


def hits(ranks: Tensor, k: int) -> Tensor:
    """(q,) bool: queries whose right answer is among the k best, from ranks (q,) that count from 0."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number, 1 or more, got {k!r}")
    return ranks < k


def asr_cond(clean: Tensor, attacked: Tensor, k: int) -> float:
    """Share of the clean hits at k that the attack loses, from ranks (q,) twice; 0 without a clean hit."""
    _paired(clean, attacked)
    return stats.asr_cond(hits(clean, k).double().tolist(), hits(attacked, k).double().tolist())


def asr_diff(clean: Tensor, attacked: Tensor, k: int) -> float:
    """Clean minus attacked recall at k, a fraction, from ranks (q,) twice; negative where the attack helped."""
    _paired(clean, attacked)
    return stats.asr_diff(hits(clean, k).double().tolist(), hits(attacked, k).double().tolist())


@torch.no_grad()
def recall(
    image_features: Tensor, text_features: Tensor, owner: Tensor, ks: Sequence[int] = KS, block: int = 1024
) -> Recall:
    """Ranks both ways by the inner product of features (n, d) and (m, d).

    ``owner``: (m,) int, the image of each text; every image has one. At most ``block`` x ``block`` scores exist at
    once, so memory does not grow with n x m; the result does not depend on it. Pass unit rows for cosines. Raises
    ValueError for shapes that do not fit, images without a text, and features that are not finite.
    """
    _check(image_features, text_features, owner, ks, block)
    u, v = (f.detach().to("cpu", torch.float64) for f in (image_features, text_features))
    owner = owner.detach().to("cpu", torch.int64)
    n, m = len(u), len(v)
    own = (u[owner] * v).sum(dim=1)
    best = torch.full((n,), -math.inf, dtype=torch.float64).scatter_reduce(0, owner, own, "amax")
    slack = TIE * max(1.0, float(u.norm(dim=1).max() * v.norm(dim=1).max()))
    image_ranks, text_ranks = torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    for i in range(0, n, block):
        rows = torch.arange(i, min(i + block, n))
        for j in range(0, m, block):
            part = slice(j, min(j + block, m))
            scores = u[rows] @ v[part].T
            scores.masked_fill_(rows[:, None] == owner[None, part], -math.inf)
            image_ranks[rows] += (scores >= best[rows, None] - slack).sum(dim=1)
            text_ranks[part] += (scores >= own[None, part] - slack).sum(dim=0)
    return Recall(tuple(ks), image_ranks, text_ranks)


@torch.no_grad()
def retrieve(
    vlm: VLM,
    captions: CaptionSet,
    defense: str | Defense | None = None,
    attack: str | Attack | None = None,
    text_attack: str | TextAttack | None = None,
    seed: int = 0,
    batch_size: int = 16,
    *,
    pair: str | PairAttack | None = None,
    text_defense: Speller | None = None,
    through: bool = False,
    state: State | None = None,
    ks: Sequence[int] = KS,
    progress: Progress | None = None,
) -> Retrieval:
    """Recall on clean inputs, and with all images, all captions or both attacked, as far as attacks are given.

    ``attack``: a feature attack such as ``FeaturePGD(eps=4/255)``; ``text_attack``: such as ``WordSwap(words=1)``. Both
    are static: made on ``vlm`` without the defense, and each without a look at the other. ``pair``: an attack on both
    together, such as ``SGA(eps=2/255)``, static too; its captions are attacked by ``text_attack``, one word each by
    default. ``text_defense``: corrects texts before they are encoded; with ``through`` they are attacked through it.
    With two attacked lines or more a last one has the worst rank of every query. ``defense``: one that ends in
    an image embedding and reads no class prompts, with its fitted ``state`` if it learns; a random one is judged on one
    draw per image. Images: (b, 3, h, w) in [0, 1] of the model's size. Raises ValueError for specs that do not fit.
    """
    made = None if attack is None else _image_attack(attack)
    swap = None if text_attack is None else build_text_attack(text_attack)
    both = None if pair is None else build_pair_attack(pair)
    clf, name = _headed(vlm, 0), vlm.name if text_defense is None else f"{vlm.name}+{text_defense.name}"
    shield = build_defense("none" if defense is None else defense)
    encode, tower = _encoder(vlm, shield, state)
    if text_defense is not None:
        tower = text_defense.wrap(tower)
        vlm = text_defense.wrap(vlm) if through else vlm
    shown = progress or Silent()
    shown.start(f"retrieval {captions.name}", len(captions))
    clean, moved, paired, edited = list[Tensor](), list[Tensor](), list[Tensor](), list[str]()
    done = 0
    for pixels, ids in captions.batches(batch_size):
        x = pixels.to(vlm.device)
        check_images(x, vlm.image_size)
        rng = SampleRNG.of(seed, ids)
        clean.append(encode(x, rng.fold("clean")))
        if made is not None:
            y = torch.zeros(len(ids), dtype=torch.int64, device=x.device)
            moved.append(encode(made(clf, x, y, rng=rng.fold("attack")).x_adv, rng.fold("adv")))
        if both is not None:
            own = captions.captions[done : done + len(ids)]
            result = both(vlm, x, own, swap or WordSwap(), rng=rng.fold("pair"))
            paired.append(encode(result.x_adv, rng.fold("adv")))
            edited += [t for row in result.captions for t in row]
        done += len(ids)
        shown.advance(len(ids))
    shown.done()
    texts, owner = captions.texts, captions.owner
    images = {"clean": torch.cat(clean)}
    words = {"clean": tower.encode_text(texts)}
    rows = [Row("clean", recall(images["clean"], words["clean"], owner, ks))]
    if made is not None:
        images["moved"] = torch.cat(moved)
        rows.append(Row("image", recall(images["moved"], words["clean"], owner, ks)))
    if swap is not None:
        words["moved"] = tower.encode_text(_swapped(swap, vlm, texts, shown))
        rows.append(Row("text", recall(images["clean"], words["moved"], owner, ks)))
    if made is not None and swap is not None:
        rows.append(Row("joint", recall(images["moved"], words["moved"], owner, ks)))
    if both is not None:
        rows.append(Row("pair", recall(torch.cat(paired), tower.encode_text(edited), owner, ks)))
    if len(rows) > 2:
        rows.append(Row("worst", _worst([r.recall for r in rows[1:]])))
    return Retrieval(
        vlm=name,
        data=captions.name,
        defense=spec.full_text(shield),
        attack=None if made is None else spec.full_text(made),
        text_attack=None if swap is None else spec.full_text(swap),
        pair=None if both is None else spec.full_text(both),
        seed=seed,
        images=len(captions),
        texts=len(texts),
        rows=tuple(rows),
    )


def _worst(attacked: Sequence[Recall]) -> Recall:
    """The attacker picks for every query what hurts it most."""
    images, texts = (torch.stack([getattr(r, k) for r in attacked]).amax(dim=0) for k in ("image_ranks", "text_ranks"))
    return Recall(attacked[0].ks, images, texts)


def check_attacks(
    attack: str | Attack | None, text_attack: str | TextAttack | None, pair: str | PairAttack | None = None
) -> None:
    """Refuse attacks that ``retrieve`` would refuse, before anything is loaded. Raises ValueError."""
    if attack is not None:
        _image_attack(attack)
    if text_attack is not None:
        build_text_attack(text_attack)
    if pair is not None:
        build_pair_attack(pair)


def _image_attack(attack: str | Attack) -> FeaturePGD:
    made = build_attack(attack)
    if not isinstance(made, FeaturePGD):
        raise ValueError(
            f"retrieval has no class labels, so it needs an attack on the embedding, got {spec.to_text(made)}; "
            "write FeaturePGD(eps=4/255)"
        )
    if made.loss == "feat_tgt":
        raise ValueError("loss=feat_tgt needs target embeddings, retrieval has none; write loss=feat_l2 or feat_cos")
    return made


def _swapped(swap: TextAttack, vlm: VLM, texts: list[str], shown: Progress) -> list[str]:
    """The attacked texts, some at a time: every one brings up to a hundred variants to encode."""
    out: list[str] = []
    shown.start("captions", len(texts))
    for start in range(0, len(texts), _TEXTS):
        part = texts[start : start + _TEXTS]
        out += swap(vlm.encode_text, part).texts
        shown.advance(len(part))
    shown.done()
    return out


def _headed(vlm: VLM, shift: int) -> ZeroShot:
    """Attacks and defenses take a classifier; its two classes are directions that nothing here reads."""
    weights = torch.eye(vlm.dim, device=vlm.device)[[shift % vlm.dim, (shift + 1) % vlm.dim]]
    return ZeroShot.build(vlm, ("one", "other"), weights=weights)


def _encoder(vlm: VLM, shield: Defense, state: State | None) -> tuple[Callable[[Tensor, SampleRNG], Tensor], VLM]:
    """Pixels to defended unit features (b, d), and the model whose texts they are compared with.

    The first batch goes through two heads of different classes: features that differ between them are no features
    of the image alone.
    """
    one, other = (shield.apply(_headed(vlm, s), state) for s in (0, 2))
    name = shield.info.name
    if not isinstance(one, (ZeroShot, Defended)) or not isinstance(other, (ZeroShot, Defended)):
        raise ValueError(
            f"{name} ends in class scores, not in an image embedding, so it cannot stand in retrieval; "
            "write ttc, clipure, noise or a fine-tuned image tower"
        )
    tower: VLM = base_of(one, "vlm")
    if isinstance(one, ZeroShot) and tower is vlm and name != "none":
        raise ValueError(f"{name} changes class prompts only and leaves image features as they are; write none")
    checked = False

    def encode(x: Tensor, rng: SampleRNG) -> Tensor:
        nonlocal checked
        features = one.features(x, rng)
        if not checked and isinstance(one, Defended):
            if not torch.equal(features, other.features(x, rng)):
                raise ValueError(f"{name} reads class prompts, which retrieval does not have; write ttc or clipure")
            checked = True
        return features

    return encode, tower


def _check(u: Tensor, v: Tensor, owner: Tensor, ks: Sequence[int], block: int) -> None:
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1] or not len(u) or not len(v):
        raise ValueError(f"expected features (n, d) and (m, d) with one d, got {tuple(u.shape)} and {tuple(v.shape)}")
    if not (u.is_floating_point() and v.is_floating_point()):
        raise ValueError(f"features must be float, got {u.dtype} and {v.dtype}; write features.float()")
    if owner.shape != (len(v),) or owner.is_floating_point() or owner.dtype == torch.bool:
        raise ValueError(f"owner must be ({len(v)},) integers, one a text, got {tuple(owner.shape)} {owner.dtype}")
    if int(owner.min()) < 0 or int(owner.max()) >= len(u):
        raise ValueError(f"owner must lie in 0..{len(u) - 1}, got {int(owner.min())}..{int(owner.max())}")
    alone = (torch.bincount(owner.long(), minlength=len(u)) == 0).nonzero().flatten().tolist()
    if alone:
        raise ValueError(f"every image needs a text, {len(alone)} have none, first image {alone[0]}; leave them out")
    if not (bool(u.isfinite().all()) and bool(v.isfinite().all())):
        raise ValueError("features must be finite, got NaN or infinity; look at the model or the defense")
    if not ks:
        raise ValueError("ks is empty; write ks=(1, 5, 10)")
    for k in ks:
        hits(owner, k)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block must be a whole number, 1 or more, got {block!r}")


def _paired(clean: Tensor, attacked: Tensor) -> None:
    if clean.ndim != 1 or clean.shape != attacked.shape or not len(clean):
        raise ValueError(
            f"expected ranks (q,) of the same queries twice, got {tuple(clean.shape)} and {tuple(attacked.shape)}"
        )


def _plain(row: Row, clean: Recall) -> dict[str, Any]:
    now, out = row.recall, dict[str, Any](setting=row.setting)
    for name, before, after in (
        ("image_to_text", clean.image_ranks, now.image_ranks),
        ("text_to_image", clean.text_ranks, now.text_ranks),
    ):
        part: dict[str, Any] = {f"R@{k}": 100 * getattr(now, name)[k] for k in now.ks}
        if row.setting != "clean":
            part["asr_cond"] = {f"R@{k}": 100 * asr_cond(before, after, k) for k in now.ks}
            part["asr_diff"] = {f"R@{k}": 100 * asr_diff(before, after, k) for k in now.ks}
        out[name] = {**part, "ranks": after.tolist()}
    return out
