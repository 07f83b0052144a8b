"""A dry run: which cells, what is there already, how many tower passes the rest takes, what cannot be run and why.

Nothing is guessed: attacks are counted on a toy that nothing fools, defenses on two images of the set (of ``shapes``
where the set is not here; on ``tiny`` where the model is not). So passes are an upper bound where an attack stops at
success or goes on with survivors only, and an estimate for defenses whose work depends on the image. Not counted:
texts, timings, checks, pictures, and the stored example of each batch that is classified again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ironclip.core.spec import full_text
from ironclip.core.vlm import VLM
from ironclip.data.survey import IMAGES, SETS, how_to_get
from ironclip.evaluation.adaptive import adaptive_cell
from ironclip.evaluation.block import Block, Entry, Silent
from ironclip.evaluation.cells import clean_cell, static_cell
from ironclip.evaluation.entries import applicable
from ironclip.evaluation.glance import Glance
from ironclip.evaluation.job import Job
from ironclip.evaluation.judge import is_random
from ironclip.evaluation.missing import missing_sets, named_set_of
from ironclip.evaluation.passes import Passes, of_answer, of_attack, of_gradient, rate
from ironclip.evaluation.plans import plan
from ironclip.evaluation.run import blocks_of, budgets_of, open_data
from ironclip.evaluation.threat import fitted
from ironclip.models import load
from ironclip.registry import build_attack


@dataclass
class Step:
    """One cell: ``n`` images (None: not known), ``done`` of them stored; passes that the rest takes, of attacks and of
    predictions that count."""

    vlm: str
    data: str
    defense: str
    title: str
    threat: str
    attack: str
    n: int | None
    done: int
    attack_forwards: float = 0.0
    attack_backwards: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0


def plan_jobs(jobs: Sequence[Job], store: str | Path, measure: bool = False) -> dict[str, Any]:
    """``steps``, ``total``, ``missing`` (what, name, get), ``not_applicable``, ``counted_on`` where the model is not
    here, and with ``measure`` the ``rates`` of the models that are (seconds per image) and ``hours`` of their steps.

    Raises ValueError as a run would, and for a store of another format. Nothing is written or fetched.
    """
    made = Planner(Glance(store))
    with warnings.catch_warnings():  # the run itself warns, of the model that it really has
        warnings.simplefilter("ignore", UserWarning)
        for job in jobs:
            made.job(job, measure)
    steps, names = made.steps, ("attack_forwards", "attack_backwards", "forwards", "backwards")
    total = {k: sum(getattr(s, k) for s in steps) for k in names}
    known = [s for s in steps if s.vlm in made.rates]
    hours = sum(_seconds(s, made.rates[s.vlm]) for s in known) / 3600
    return {
        "steps": [asdict(s) for s in steps],
        "total": total | {"cells": len(steps), "cached": sum(s.n == s.done for s in steps)},
        "missing": made.missing,
        "not_applicable": made.absent,
        "counted_on": made.stand_ins,
        "rates": made.rates,
        "hours": hours if known else None,
    }


def _seconds(s: Step, r: dict[str, float]) -> float:
    attack = (s.attack_forwards - s.attack_backwards) * r["forward"] + s.attack_backwards * r["gradient"]
    return attack + s.forwards * r["answer"] + s.backwards * (r["gradient"] - r["forward"])


class Planner:
    """Collects the steps of several jobs; a cell or an example that two of them need is counted once."""

    def __init__(self, store: Glance) -> None:
        self.store = store
        self.steps: list[Step] = []
        self.missing: list[dict[str, str]] = []
        self.absent: list[dict[str, Any]] = []
        self.stand_ins: dict[str, str] = {}
        self.rates: dict[str, dict[str, float]] = {}
        self.planned: dict[str, set[Any]] = {}
        self.counts: dict[tuple[Any, ...], Passes] = {}
        self.gradients: dict[tuple[Any, ...], Passes | None] = {}
        self._tiny: VLM | None = None

    @property
    def tiny(self) -> VLM:
        """What passes are counted on where the model is not here."""
        if self._tiny is None:
            self._tiny = load("tiny")
        return self._tiny

    def job(self, job: Job, measure: bool) -> None:
        """All blocks of a job."""
        model = self._model(job)
        if model is not None and measure:
            self.rates[model.name] = rate(model, job.batch_size, job.precision)
        gone = {row.name for row in missing_sets([job])}
        at = model or self.tiny
        shapes = open_data("shapes", at, limit=2)
        stand_in = blocks_of(replace(job, relatives=()), at, self.store, shapes, Silent())
        for spec in job.data:
            row = named_set_of(spec)
            if row is not None and row.name in gone:
                self._note("data", str(spec), how_to_get(row))
                self._site(job, model, str(spec), None, stand_in)
                continue
            try:
                data = open_data(spec, at, prompts=job.prompts, limit=job.limit, seed=job.seed, skip_bad=job.skip_bad)
            except (FileNotFoundError, ImportError) as err:
                self._note("data", str(spec), " ".join(str(err).split()))
                self._site(job, model, str(spec), None, stand_in)
            else:
                self._site(job, model, data.name, data, stand_in)

    def _model(self, job: Job) -> VLM | None:
        try:
            with offline():
                model = job.vlm if isinstance(job.vlm, VLM) else load(job.vlm, device=job.device)
        except (OSError, ImportError) as err:
            self._note("model", str(job.vlm), f"load it once while online ({' '.join(str(err).split())[:160]} ...)")
            self.stand_ins[str(job.vlm)] = "tiny"
            return None
        return model.in_space(job.space)

    def _note(self, what: str, name: str, get: str) -> None:
        line = {"what": what, "name": name, "get": get}
        if line not in self.missing:
            self.missing.append(line)

    def _site(self, job: Job, model: VLM | None, name: str, data: Any, stand_in: tuple[Block, Block]) -> None:
        known = model is not None and data is not None
        whole, few = blocks_of(job, model, self.store, data, Silent()) if model and known else stand_in
        entries, absent = applicable(job, whole.clf, name, "" if model is not None else str(job.vlm))
        row = named_set_of(name)
        n = len(data) if data is not None else min(IMAGES[row.name], job.limit or 10**9) if row else None
        ids: list[Any] = list(data.ids) if data is not None else list(range(n or 0))
        vlm = model.name if model is not None else str(job.vlm)
        self.absent += [{**a, "vlm": vlm} for a in absent]
        k = len(data.class_names) if data is not None else SETS[row.name].classes if row else 12
        for e in entries:
            Site(self, job, whole, few, e, vlm, name, ids, n, known, k).plan()


@dataclass
class Site:
    """One defense in one block. ``known``: model and data are here, so that cells can be looked up."""

    planner: Planner
    job: Job
    whole: Block
    few: Block
    entry: Entry
    vlm: str
    data: str
    ids: list[Any]
    n: int | None
    known: bool
    k: int

    def plan(self) -> None:
        """Steps in the order in which they run."""
        block, job = self.whole, self.job
        x, y, names = next(iter(block.data.batches(2, list(range(min(2, len(block.data)))))))
        self.x, self.y, self.rng = x.to(block.device), block.clf.labels(y.to(block.device)), block.rng(names)
        defended = self.entry.defense.apply(block.clf, self.entry.state)
        draws = block.budget.draws if is_random(defended) else 1
        self.verdict = self._answer("defended", defended) * draws
        attacks = [build_attack(a) for a in job.attacks]
        some = self.ids if job.adaptive_limit is None else self.ids[: job.adaptive_limit]
        grey = "graybox" in job.threat and hasattr(self.entry.defense, "fitted")
        if "static" in job.threat or grey:
            self._clean(self.ids)
        for a in attacks:
            if "static" in job.threat:
                self._static(a, "static", self.ids)
            if grey:
                self._static(a, "graybox", self.ids)
        for (eps, norm), same in budgets_of(attacks).items():
            for threat in ("adaptive", "blackbox"):
                if threat in job.threat:
                    self._clean(some)
                    self._adaptive(same, eps, norm, threat, some)

    def _answer(self, name: str, clf: Any) -> Passes:
        key = (*self._where, name)
        if key not in self.planner.counts:
            self.planner.counts[key] = of_answer(self.whole.vlm, clf, self.x, self.rng)
        return self.planner.counts[key]

    def _made(self, name: str, clf: Any, spec: str, draws: int) -> Passes:
        """Passes of an attack per image through the view ``name``."""
        key, counts = (*self._where, name, "gradient"), self.planner.gradients
        if key not in counts:
            counts[key] = of_gradient(self.whole.vlm, clf, self.x, self.y, self.rng)
        answer = self._answer(name, getattr(clf, "base", clf) if draws > 1 else clf)
        return of_attack(spec, draws, self.k, answer, counts[key])

    def _member(self, p: Any) -> Passes:
        """One member and the verdict on it."""
        return self._made(f"{p.member.view} {p.member.beta}", p.view, p.spec, p.draws) + self.verdict

    @property
    def _where(self) -> tuple[Any, ...]:
        return self.whole.vlm.name, self.whole.data.name, self.entry.text, self.entry.state_hash

    def _clean(self, ids: list[Any]) -> None:
        self._step("clean", "", clean_cell(self.whole, self.entry).digest, ids, Passes())

    def _static(self, attack: Any, threat: str, ids: list[Any]) -> None:
        e, block = self.entry, self.whole
        target = block.clf if threat == "static" else fitted(e.defense.info, e.defense, block.clf, e.state)
        fields = block.adv_fields(target, attack)
        have = self.planner.store.attacked(fields) if self.known else set()
        new = self._new(f"adv {self.vlm} {self.data} {fields}", ids, have)
        made = self._made(threat, target, full_text(attack), 1) + Passes(1.0)
        cell = static_cell(block, e, attack, threat)
        self._step(threat, full_text(attack), cell.digest, ids, made * len(new))

    def _adaptive(self, attacks: list[Any], eps: Any, norm: str, threat: str, ids: list[Any]) -> None:
        block, total = self.few, Passes()
        plans = plan(block, self.entry, eps, norm, threat, look=False)
        for p in plans:
            if p.view is not None:
                total += self._member(p)
            for a in attacks if p.view is None else []:
                self._static(a, p.member.view, ids)
        cell = adaptive_cell(block, self.entry, attacks, eps, norm, threat, plans)
        stored = self.planner.store.samples(cell.digest) if self.known else set()
        todo = [i for i in ids if i not in stored]
        spent = total * len(todo)
        if threat == "adaptive" and todo:
            spent += self._probes(plans, norm) * min(block.budget.probe, len(ids))
        self._step(threat, f"{norm} {eps.numerator}/{eps.denominator}", cell.digest, ids, spent, judged=False)

    def _probes(self, plans: list[Any], norm: str) -> Passes:
        """Runs of their own on a few images, as in ``probes.probe``: per image."""
        first = [p for p in plans if p.member.white and p.view is not None and p.member.view != "base"][:2]
        if not first:
            return Passes()
        one = self._member(first[0])
        rich = self.few.budget.name in ("standard", "full")
        total = one * (1 + 4 + (5 if rich else 0))
        for p in first if norm == "linf" else []:
            total += self._member(p)
        return total

    def _new(self, key: str, ids: list[Any], have: set[Any]) -> list[Any]:
        seen = self.planner.planned.setdefault(key, set())
        new = [i for i in ids if i not in have and i not in seen]
        seen.update(new)
        return new

    def _step(self, threat: str, attack: str, digest: str, ids: list[Any], spent: Passes, judged: bool = True) -> None:
        stored = self.planner.store.samples(digest) if self.known else set()
        key = f"{self.vlm} {self.data} {digest}"
        listed = key in self.planner.planned
        new = self._new(key, ids, stored)
        if listed and not new:
            return
        info, n = self.entry.defense.info, self.n if self.n is None else len(ids)
        step = Step(self.vlm, self.data, info.name, info.title, threat, attack, n, len(stored.intersection(ids)))
        step.attack_forwards, step.attack_backwards = spent.forwards, spent.backwards
        if judged:
            counted = self.verdict * len(new)
            step.forwards, step.backwards = counted.forwards, counted.backwards
        self.planner.steps.append(step)


@contextmanager
def offline() -> Iterator[None]:
    """Inside the block the hub's libraries look into their cache only."""
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
