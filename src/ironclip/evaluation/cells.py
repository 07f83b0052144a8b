"""Clean and static (or graybox) cells, and how any cell fills the store batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from ironclip.core.ball import norms
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import digest, full_text
from ironclip.core.types import Attack, Classifier
from ironclip.core.views import base_of
from ironclip.evaluation import gallery
from ironclip.evaluation.adversarial import adversarial
from ironclip.evaluation.block import Block, Entry
from ironclip.evaluation.checks import checks
from ironclip.evaluation.judge import Verdict, is_random, judge
from ironclip.evaluation.recipes import Member
from ironclip.evaluation.record import footer
from ironclip.evaluation.threat import fitted


@dataclass(frozen=True)
class Cell:
    """A result by its spec: ``key`` holds all that it depends on, ``digest`` names its file."""

    key: dict[str, Any]

    @property
    def digest(self) -> str:
        """Name of the cell's file."""
        return digest(self.key)


def cell(block: Block, entry: Entry, threat: str, **more: Any) -> Cell:
    """The cell of a defense under a threat model."""
    batchwise = bool(base_of(entry.defense.apply(block.clf, entry.state), "batchwise"))
    coupled = {"batch": block.batch_size, "subset": block.data.manifest_hash} if batchwise else {}
    return Cell(
        block.key(
            threat=threat,
            defense=entry.text,
            revision=getattr(entry.defense, "revision", 0),
            state=entry.state_hash,
            draws=block.budget.draws,
            **coupled,
            **more,
        )
    )


def run_clean(block: Block, entry: Entry) -> Cell:
    """Predictions of the defended classifier on unperturbed images."""
    c = cell(block, entry, "clean")
    defended = entry.defense.apply(block.clf, entry.state)

    def rows(x: Tensor, y: Tensor, ids: list[str]) -> Filled:
        verdict, spent = counted_judge(block, defended, x, y, block.rng(ids).fold("clean"))
        made = [{"sample_id": ids[i], "label": int(y[i]), **answers(verdict, i)} for i in range(len(ids))]
        return made, spent

    fill(block, entry, c, rows, weight=1.0)
    return c


def static_cell(block: Block, entry: Entry, attack: Attack, threat: str = "static") -> Cell:
    """The static or graybox cell of an attack."""
    rev = getattr(attack, "revision", 0)
    return cell(block, entry, threat, attack=full_text(attack), rev=rev, precision=block.precision)


def run_static(block: Block, entry: Entry, attack: Attack, threat: str = "static") -> Cell:
    """The defense's answers to examples made for the undefended model, or for its fitted weights (graybox)."""
    target = block.clf if threat == "static" else fitted(entry.defense.info, entry.defense, block.clf, entry.state)
    fast = block.fast if threat == "static" else fitted(entry.defense.info, entry.defense, block.fast, entry.state)
    c = static_cell(block, entry, attack, threat)
    clean = clean_rows(block, entry)
    defended = entry.defense.apply(block.clf, entry.state)
    examples = block.store.adversarial(block.adv_fields(target, attack))

    def rows(x: Tensor, y: Tensor, ids: list[str]) -> Filled:
        x_adv, cols = adversarial(block, target, fast, attack, examples, x, y, ids)
        verdict, spent = counted_judge(block, defended, x_adv, y, block.rng(ids).fold("static"))
        if threat == "static":
            gallery.keep(block, entry, c.digest, attack, threat, defended, x, x_adv, y, ids)
        made = [
            {
                "sample_id": ids[i],
                "label": int(y[i]),
                **{f"clean_{k}": v for k, v in clean[ids[i]].items() if k in ("pred", "correct", "margin", "top")},
                **answers(verdict, i),
                "undefended_pred": int(cols["adv_pred"][i]),
                "attack_success": bool(cols["success"][i]),
                "attack_loss": float(cols["loss"][i]),
                "attack_forwards": int(cols["forwards"][i]),
                "attack_backwards": int(cols["backwards"][i]),
                "zero_grad": bool(cols["zero_grad"][i]),
                "zero_pixels": float(cols["zero_pixels"][i]),
                "late_gain": float(cols["late_gain"][i]),
                "dtype_flip": bool(cols["dtype_flip"][i]),
                **distance(x, x_adv, i),
            }
            for i in range(len(ids))
        ]
        return made, spent

    steps = getattr(attack, "steps", 1)
    work = 2.0 + 2.0 * steps * bool(examples.missing(block.data.ids))
    facts = budget_of(attack) | {"examples": [examples.folder.name]}
    fill(block, entry, c, rows, weight=work, attack=attack, facts=facts)
    return c


Filled = tuple[list[dict[str, Any]], dict[str, float]]
"""Rows of one batch and what judging it cost: ``forwards``, ``backwards`` and ``n`` judged images; ``autograd``:
above 0 if gradients were taken inside the classifier."""


def fill(
    block: Block,
    entry: Entry,
    c: Cell,
    rows: Callable[[Tensor, Tensor, list[str]], Filled],
    *,
    weight: float,
    members: list[Member] | None = None,
    attack: Attack | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Run ``rows`` on whatever the store does not hold of the block's samples, batch by batch, then close the cell."""
    missing = set(block.data.ids) - {r["sample_id"] for r in block.store.rows(c.digest)}
    if missing:
        text = f"{block.data.name} {entry.defense.info.name} {c.key['threat']}"
        block.progress.start(text, weight * len(missing) / block.shard[1])
        for x, y, ids in block.batches(missing, whole="batch" in c.key):
            made, spent = rows(x, y, ids)
            block.store.add_rows(c.digest, made, spent)
            block.progress.advance(weight * len(ids))
        block.progress.done()
    done = not set(block.data.ids) - {r["sample_id"] for r in block.store.rows(c.digest)}
    if done and (missing or not block.store.footer(c.digest)):
        listed = [{"name": m.name, "view": m.view, "white": m.white} for m in members or []]
        said = {**(facts or {}), "checks": checks(block, entry)}
        block.store.finish(c.digest, footer(block, entry, c.key, listed, attack, said))


def counted_judge(
    block: Block, clf: Classifier, x: Tensor, y: Tensor, rng: SampleRNG
) -> tuple[Verdict, dict[str, float]]:
    """The verdict and its cost in image-tower passes."""
    with block.vlm.counting() as spent:
        verdict = judge(clf, x, y, rng, block.budget.draws, block.clf.k)
    draws = block.budget.draws if is_random(clf) else 1
    costs = {"forwards": spent.forwards, "backwards": spent.backwards, "n": len(y) * draws}
    return verdict, costs | {"autograd": float(verdict.autograd)}


def budget_of(attack: Attack) -> dict[str, str]:
    """``eps`` as a fraction and ``norm`` of an attack, for tables."""
    eps: Fraction = attack.eps  # type: ignore[attr-defined]
    return {"eps": f"{eps.numerator}/{eps.denominator}", "norm": str(getattr(attack, "norm", "linf"))}


def clean_cell(block: Block, entry: Entry) -> Cell:
    """The clean cell that belongs to a defense."""
    return cell(block, entry, "clean")


def clean_rows(block: Block, entry: Entry) -> dict[str, dict[str, Any]]:
    """Clean rows by sample id, made now where they are missing."""
    return rows_by_id(block, run_clean(block, entry))


def rows_by_id(block: Block, c: Cell) -> dict[str, dict[str, Any]]:
    """Rows of a cell by sample id."""
    return {r["sample_id"]: r for r in block.store.rows(c.digest)}


def answers(v: Verdict, i: int) -> dict[str, Any]:
    """Columns of one sample's verdict."""
    return {
        "pred": int(v.pred[i]),
        "correct": float(v.correct[i]),
        "worst": bool(v.worst[i]),
        "margin": float(v.margin[i]),
        "tie": bool(v.tie[i]),
        "stochastic": bool(v.moved[i]),
        "probabilities": bool(v.probabilities[i]),
        "dtype_flip": False,
        "top": float(v.logits[i].max()),
    }


def distance(x: Tensor, x_adv: Tensor, i: int) -> dict[str, Any]:
    """How far one sample was moved, and whether it left the pixel box."""
    delta = (x_adv[i] - x[i])[None]
    sizes = {norm: float(norms(delta, norm)) for norm in ("linf", "l2", "l1")}
    return {**sizes, "outside_box": bool((x_adv[i] < 0).any() or (x_adv[i] > 1).any())}
