"""The adaptive cell: a defense against an attacker who knows it, per-sample worst case over a composition."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ironclip.core.grad import NoGradientError
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import digest, full_text
from ironclip.core.types import Attack, AttackResult, Classifier
from ironclip.core.views import base_of
from ironclip.evaluation import gallery
from ironclip.evaluation.adversarial import COLUMNS, adversarial
from ironclip.evaluation.block import Block, Entry
from ironclip.evaluation.cells import Cell, Filled, cell, clean_cell, clean_rows, distance, fill, rows_by_id, run_static
from ironclip.evaluation.judge import Verdict, judge
from ironclip.evaluation.plans import Plan, plan
from ironclip.evaluation.recipes import Member
from ironclip.evaluation.threat import fitted
from ironclip.registry import build_attack


def run_adaptive(
    block: Block, entry: Entry, attacks: list[Attack], eps: Fraction, norm: str, threat: str = "adaptive"
) -> Cell:
    """Per-sample worst case over the defense's composition: white-box members first, transfer and random points last.

    With ``threat="blackbox"`` the members see answers only.

    Only samples that are still right on some draw go on to the next member, except where the defense couples the batch.
    """
    plans = plan(block, entry, eps, norm, threat)
    members = [p.member for p in plans]
    c = adaptive_cell(block, entry, attacks, eps, norm, threat, plans)
    clean = clean_rows(block, entry)
    stored = {
        p.member.view: [rows_by_id(block, run_static(block, entry, a, p.member.view)) for a in attacks]
        for p in plans
        if p.view is None
    }
    defended = entry.defense.apply(block.clf, entry.state)
    batchwise = bool(base_of(defended, "batchwise"))

    def rows(x: Tensor, y: Tensor, ids: list[str]) -> Filled:
        trial = Trial(block, entry, defended, batchwise, x, y, ids, clean)
        for p in plans:
            if p.view is None:
                trial.transfer(p.member, stored[p.member.view])
            else:
                trial.run(p, p.view)
        gallery.keep(block, entry, c.digest, None, threat, defended, x, trial.x_worst, y, ids, eps, norm)
        return trial.rows(), {"autograd": float(trial.autograd)}

    facts: dict[str, Any] = {"eps": f"{eps.numerator}/{eps.denominator}", "norm": norm}
    facts |= {"plans": [described(p) for p in plans], "examples": examples_of(block, entry, plans)}

    def weight() -> float:
        spent = block.store.tally(clean_cell(block, entry).digest)
        per = max(spent.get("forwards", 1) + spent.get("backwards", 0), 1) / max(spent.get("n", 1), 1)
        return sum(block.budget.steps * p.draws * per * 2 for p in plans if p.member.white)

    fill(block, entry, c, rows, weight=weight(), members=members, facts=facts)
    return c


def adaptive_cell(
    block: Block, entry: Entry, attacks: list[Attack], eps: Fraction, norm: str, threat: str, plans: list[Plan]
) -> Cell:
    """The cell of a composition."""
    return cell(
        block,
        entry,
        threat,
        eps=f"{eps.numerator}/{eps.denominator}",
        norm=norm,
        budget=asdict(block.budget),
        members=[p.key() for p in plans],
        transfer=sorted(full_text(a) for a in attacks),
        relatives=[r.vlm.weights_hash for r in block.relatives],
        precision=block.precision,
    )


def examples_of(block: Block, entry: Entry, plans: list[Plan]) -> list[str]:
    """Folders of the stored examples that members against the undefended (or fitted) model use."""
    specs = [p.spec for p in plans if p.member.view == "base"]
    if not specs:
        return []
    target = fitted(entry.defense.info, entry.defense, block.clf, entry.state)
    return [digest(block.adv_fields(target, build_attack(s))) for s in specs]


def described(p: Plan) -> dict[str, Any]:
    """What the cell's record says of a member: its attack, draws per gradient, cosine of two such gradients."""
    return {"name": p.member.name, "attack": p.spec, "draws": p.draws, "cosine": p.cosine}


class Trial:
    """The members of one composition on one batch, and the worst that each sample has met."""

    def __init__(
        self,
        block: Block,
        entry: Entry,
        defended: Classifier,
        batchwise: bool,
        x: Tensor,
        y: Tensor,
        ids: list[str],
        clean: dict[str, dict[str, Any]],
    ) -> None:
        self.block, self.entry, self.defended, self.batchwise = block, entry, defended, batchwise
        self.x, self.y, self.ids = x, y, ids
        self.clean = [clean[i] for i in ids]
        self.value = torch.tensor([float(r["correct"]) for r in self.clean], dtype=torch.float32)
        self.white, self.worst_all = self.value.clone(), torch.tensor([bool(r["worst"]) for r in self.clean])
        self.x_worst, self.autograd, b = x.clone(), False, len(ids)
        self.by_member: dict[str, list[Tensor]] = {
            k: [] for k in ("correct", "ran", "dead", "blocked", "late", "blank")
        }
        self.broken_by = [""] * len(ids)
        self.tie = torch.zeros(len(ids), dtype=torch.bool)
        self.moved, self.pred = self.tie.clone(), torch.tensor([int(r["pred"]) for r in self.clean])
        self.cost, self.dtype = torch.zeros(b, 2, dtype=torch.long), self.tie.clone()

    def run(self, p: Plan, view: Classifier) -> None:
        """One member on the samples that are still right."""
        alive = torch.ones_like(self.tie) if self.batchwise else self.value > 0
        made = {"correct": torch.ones(len(self.ids)), "ran": alive.clone()}
        made |= {"dead": torch.zeros_like(alive), "blocked": torch.zeros_like(alive)}
        made |= {"late": torch.zeros(len(self.ids)), "blank": torch.zeros(len(self.ids))}
        if bool(alive.any()):
            idx = alive.nonzero().flatten()
            ids = [self.ids[i] for i in idx.tolist()]
            rng = self.block.rng(ids).fold("adaptive", p.member.name)
            x, y = self.x[idx], self.y[idx]
            result = self._attack(p, view, x, y, ids, rng)
            if result is None:
                made["dead"][idx] = made["blocked"][idx] = True
            else:
                verdict = judge(self.defended, result.x_adv, y, rng, self.block.budget.draws, self.block.clf.k)
                self.autograd |= verdict.autograd
                made["correct"][idx] = verdict.correct.cpu()
                made["dead"][idx] = result.zero_grad.cpu()
                made["late"][idx] = result.late_gain.cpu().float()
                made["blank"][idx] = result.zero_pixels.cpu().float()
                self.cost[idx, 0] += result.forwards.cpu()
                self.cost[idx, 1] += result.backwards.cpu()
                same = p.member.view in ("through", "bpda") and not base_of(view, "randomized")
                if same and self.block.precision != "fp32":
                    self.dtype[idx] |= (result.success != (verdict.correct < 0.5)).cpu()
                self._worse(idx, verdict, result.x_adv, p.member)
        for key, line in made.items():
            self.by_member[key].append(line)

    def _attack(
        self, p: Plan, view: Classifier, x: Tensor, y: Tensor, ids: list[str], rng: SampleRNG
    ) -> AttackResult | None:
        attack = build_attack(p.spec)
        block, entry = self.block, self.entry
        if p.member.view == "base":
            target = fitted(entry.defense.info, entry.defense, block.clf, entry.state)
            fast = fitted(entry.defense.info, entry.defense, block.fast, entry.state)
            kept = block.store.adversarial(block.adv_fields(target, attack))
            x_adv, cols = adversarial(block, target, fast, attack, kept, x, y, ids)
            notes: Any = {name: cols[name] for name in COLUMNS}
            return AttackResult(x_adv=x_adv, success=cols["success"], **notes)
        try:
            return attack(view, x, y, rng=rng)
        except NoGradientError:
            return None

    def _worse(self, idx: Tensor, verdict: Verdict, x_adv: Tensor, member: Member) -> None:
        got = verdict.correct.cpu()
        lower = got < self.value[idx]
        for i, less, value in zip(idx.tolist(), lower.tolist(), got.tolist(), strict=True):
            if less and value < 0.5 <= float(self.value[i]):
                self.broken_by[i] = member.name
        self.x_worst[idx[lower]] = x_adv[lower.to(x_adv.device)]
        self.pred[idx[lower]] = verdict.pred.cpu()[lower]
        self.value[idx] = torch.minimum(self.value[idx], got)
        self.worst_all[idx] &= verdict.worst.cpu()
        self.tie[idx] |= verdict.tie.cpu()
        self.moved[idx] |= verdict.moved.cpu()
        if member.white:
            self.white[idx] = torch.minimum(self.white[idx], got)

    def transfer(self, member: Member, static: list[dict[str, dict[str, Any]]]) -> None:
        """Stored examples of a weaker threat model, already judged."""
        got = torch.ones(len(self.ids))
        for rows in static:
            got = torch.minimum(got, torch.tensor([float(rows[i]["correct"]) for i in self.ids]))
        for i, value in enumerate(got.tolist()):
            if value < 0.5 <= float(self.value[i]):
                self.broken_by[i] = member.name
            if value < float(self.value[i]):
                self.pred[i] = min((r[self.ids[i]] for r in static), key=lambda r: r["correct"])["pred"]
        self.value = torch.minimum(self.value, got)
        if member.white:
            self.white = torch.minimum(self.white, got)
        made = {"correct": got, "ran": torch.full_like(self.tie, bool(static))}
        made |= {k: torch.zeros_like(self.tie) for k in ("dead", "blocked")}
        made |= {k: torch.zeros(len(self.ids)) for k in ("late", "blank")}
        for key, line in made.items():
            self.by_member[key].append(line)

    def rows(self) -> list[dict[str, Any]]:
        """One record per sample."""
        return [
            {
                "sample_id": self.ids[i],
                "label": int(self.y[i]),
                **{f"clean_{k}": self.clean[i].get(k) for k in ("pred", "correct", "margin", "top")},
                "pred": int(self.pred[i]),
                "robust": float(self.value[i]),
                "worst": bool(self.worst_all[i] and self.value[i] > 0),
                "white_correct": float(self.white[i]),
                "broken_by": self.broken_by[i],
                **{k: [m[i].item() for m in lines] for k, lines in self.by_member.items()},
                "attack_forwards": int(self.cost[i, 0]),
                "attack_backwards": int(self.cost[i, 1]),
                "tie": bool(self.tie[i] or self.clean[i]["tie"]),
                "stochastic": bool(self.moved[i] or self.clean[i]["stochastic"]),
                "probabilities": bool(self.clean[i]["probabilities"]),
                "dtype_flip": bool(self.dtype[i]),
                **distance(self.x, self.x_worst, i),
            }
            for i in range(len(self.ids))
        ]
