"""``evaluate``: specs in, honest numbers out. The command line calls this and adds nothing."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch

from ironclip.core.space import Space
from ironclip.core.spec import full_text, split_list
from ironclip.core.types import Attack, Defense
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data import load_data
from ironclip.data.types import Dataset
from ironclip.evaluation import gallery as pictures
from ironclip.evaluation.adaptive import run_adaptive
from ironclip.evaluation.block import Block, Entry, Progress, Silent
from ironclip.evaluation.cells import Cell, cell, run_static
from ironclip.evaluation.cost import cost
from ironclip.evaluation.entries import applicable, expand_defenses
from ironclip.evaluation.gates import pass_gates
from ironclip.evaluation.job import Job, validate
from ironclip.evaluation.missing import refuse_missing
from ironclip.evaluation.probes import probe
from ironclip.evaluation.recipes import Budget
from ironclip.evaluation.recipes import budget as budget_named
from ironclip.evaluation.results import NO_COST, assemble, merged
from ironclip.evaluation.store import Store, StoreError
from ironclip.models import load
from ironclip.registry import build_attack


def evaluate(
    vlm: str | VLM = "lite",
    data: str | Dataset | Sequence[str | Dataset] = "photos",
    defenses: str | Sequence[str | Defense] = "none",
    attacks: str | Sequence[str | Attack] = "table2-pgd10",
    threat: str | Sequence[str] = "static",
    *,
    limit: int | None = None,
    adaptive_limit: int | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    state: str | Path | None = None,
    batch_size: int = 16,
    precision: str = "fp32",
    budget: str | Budget = "standard",
    prompts: str | None = None,
    device: str = "cpu",
    executor: str = "serial",
    workers: int = 2,
    gallery: int = 4,
    skip_bad: bool = False,
    merge_duplicates: bool = True,
    costs: bool = True,
    space: str = "model-input",
    relatives: str | Sequence[str | VLM] = (),
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Clean, static, graybox and adaptive accuracy of defenses on one model, per sample, with intervals.

    ``vlm``: spec or VLM. ``data``: specs, comma separated or a list, or data sets. ``defenses``: names or specs, or
    ``all``. ``attacks``: specs of the static attacks; their budgets are those of the adaptive compositions too.
    ``threat``: static, graybox, adaptive, blackbox. ``limit``: first n of each set in a fixed order (nested subsets);
    ``adaptive_limit``: the same for the adaptive threat. ``store``: folder of results, reused and resumed; without
    one a temporary folder is used. ``state``: folder of fitted states, ``NAME.safetensors`` per defense.
    ``precision``: of the attack; predictions that count are always fp32. ``budget``: smoke, quick, short, standard,
    full. ``costs``: measure milliseconds per image too, where the store has none yet. ``space``: where budgets apply,
    ``model-input``, ``native:SIZE`` or ``file:SIZE`` (``core/space.py``). ``relatives``: other models
    whose examples the adaptive attack tries too. ``executor``: ``serial``, ``process`` (``workers`` processes here),
    ``ray`` (Ray, started here) or ``ray:ADDRESS`` (a cluster; all its nodes must see ``store``).

    Returns the results dictionary of ``evaluation/results.py``. Raises ValueError for bad input before any work begins;
    a cell that fails later is recorded under ``errors``. Of several defenses, those that cannot be run here are listed
    under ``not_applicable`` with the reason; a single one that cannot be run is bad input.
    """
    job = Job(
        vlm=vlm,
        data=_listed(data),
        defenses=expand_defenses(_listed(defenses)),
        attacks=_listed(attacks),
        threat=_listed(threat),
        limit=limit,
        adaptive_limit=adaptive_limit,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
        budget=budget_named(budget),
        prompts=prompts,
        state=None if state is None else str(state),
        device=device,
        gallery=gallery,
        skip_bad=skip_bad,
        merge_duplicates=merge_duplicates,
        costs=costs,
        space=space,
        relatives=_listed(relatives),
    )
    return evaluate_jobs([job], store, executor=executor, workers=workers, progress=progress, command=command)


def evaluate_jobs(
    jobs: Sequence[Job],
    store: str | Path | None = None,
    *,
    executor: str = "serial",
    workers: int = 2,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Several jobs into one table; all are checked before the first one runs. Raises ValueError."""
    from ironclip.evaluation.execute import check_executor, spreading

    check_executor(executor, workers, jobs)
    for job in jobs:
        validate(job)
    refuse_missing(jobs)
    shown = progress or Silent()
    with spreading(executor, workers) as fill:
        if store is None:
            with tempfile.TemporaryDirectory(prefix="ironclip-") as folder:
                return _all(jobs, Path(folder) / "store", fill, shown, command)
        Store(store)
        return _all(jobs, Path(store), fill, shown, command)


def _all(
    jobs: Sequence[Job], folder: Path, fill: Callable[[Job, Path, Progress], None], progress: Progress, command: str
) -> dict[str, Any]:
    def execute(job: Job) -> dict[str, Any]:
        fill(job, folder, progress)
        return run(job, folder, progress, command)

    for job in jobs:
        pass_gates(job, execute)
    results = merged([execute(j) for j in jobs])
    absent = results["not_applicable"]
    if absent and not results["rows"] and not results["errors"]:
        said = "; ".join(dict.fromkeys(f"{a['defense']} on {a['vlm']}: {a['reason']}" for a in absent))
        raise ValueError(f"none of the defenses can be run: {said}")
    return results


def run(
    job: Job, folder: Path, progress: Progress, command: str = "", shard: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """All blocks of a job in this process; with a ``shard`` only that worker's samples, and no table."""
    model = job.vlm if isinstance(job.vlm, VLM) else load(job.vlm, device=job.device)
    model = model.in_space(job.space)
    store = Store(folder)
    sets = [_data(job, d, model) for d in job.data]
    parts = [_block(job, model, store, s, progress, shard, command) for s in sets]
    return merged(parts)


def _data(job: Job, spec: Any, model: VLM) -> Dataset:
    if not isinstance(spec, str):
        if spec.size != model.image_size:
            raise ValueError(f"data set {spec.name} is at {spec.size} px, {model.name} needs {model.image_size}")
        return spec.subset(job.limit, job.seed)
    return open_data(spec, model, prompts=job.prompts, limit=job.limit, seed=job.seed, skip_bad=job.skip_bad)


def open_data(spec: str, model: VLM, **options: Any) -> Dataset:
    """A data set at the size and in the space of ``model``; ``options`` as in ``load_data``.

    Outside ``model-input`` photographs are resized to the size itself: nothing is cropped away before the budget.
    """
    if model.space != Space() and spec.partition(":")[0] != "shapes":  # shapes are drawn at any size
        options["recipe"] = "clip"
    return cast(Dataset, load_data(spec, model.image_size, **options))


def _relative(job: Job, store: Store, spec: Any, model: VLM, data: Dataset) -> ZeroShot:
    """The same classes on another model, which reads the pixels of ``model`` and resizes them itself."""
    other = spec if isinstance(spec, VLM) else load(spec, device=job.device)
    native = f"native:{model.image_size}" if other.image_size != model.image_size else job.space
    space = job.space if job.space != "model-input" else native
    return classifier(store, other.in_space(space), data, job.merge_duplicates)


def blocks_of(
    job: Job, model: VLM, store: Store, data: Dataset, progress: Progress, shard: tuple[int, int] = (0, 1)
) -> tuple[Block, Block]:
    """A model on a data set: the block of static and graybox cells, and that of adaptive and blackbox ones."""
    clf = classifier(store, model, data, job.merge_duplicates)
    whole = Block(
        vlm=model,
        data=data,
        clf=clf,
        fast=clf.with_vlm(model.at_precision(job.precision)),
        store=store,
        budget=job.budget,
        seed=job.seed,
        batch_size=job.batch_size,
        precision=job.precision,
        gallery=job.gallery,
        shard=shard,
        progress=progress,
        relatives=tuple(_relative(job, store, r, model, data) for r in job.relatives),
    )
    few = whole if job.adaptive_limit is None else replace(whole, data=data.subset(job.adaptive_limit, job.seed))
    return whole, few


def budgets_of(attacks: Sequence[Any]) -> dict[tuple[Fraction, str], list[Any]]:
    """The static attacks by (eps, norm): each is one adaptive composition."""
    out: dict[tuple[Fraction, str], list[Any]] = {}
    for a in attacks:
        out.setdefault((a.eps, getattr(a, "norm", "linf")), []).append(a)
    return out


def _block(
    job: Job, model: VLM, store: Store, data: Dataset, progress: Progress, shard: tuple[int, int], command: str
) -> dict[str, Any]:
    whole, few = blocks_of(job, model, store, data, progress, shard)
    attacks = [build_attack(a) for a in job.attacks]
    entries, absent = applicable(job, whole.clf, data.name)
    done: list[tuple[Cell, Entry, Block]] = []
    errors: list[dict[str, Any]] = []
    again: list[str] = []

    def attempt(block: Block, entry: Entry, threat: str, what: str, make: Callable[[], Cell]) -> None:
        name = entry.defense.info.name
        try:
            made, first = _twice(make)
            done.append((made, entry, block))
            if first is not None:
                again.append(f"{name} on {data.name}, {threat} {what}: failed once ({_said(first)}) and was run again")
        except (StoreError, OSError):
            raise
        except Exception as err:
            c = cell(block, entry, threat, what=what)
            store.fail(c.digest, c.key, str(err), traceback.format_exc())
            errors.append(
                {
                    "vlm": model.name,
                    "data": data.name,
                    "defense": name,
                    "threat": threat,
                    "attack": what,
                    "error": _said(err),
                    "traceback": traceback.format_exc(),
                }
            )

    for e in entries:
        for a in attacks:
            if "static" in job.threat:
                attempt(whole, e, "static", full_text(a), lambda e=e, a=a: run_static(whole, e, a))  # type: ignore[misc]
            if "graybox" in job.threat and hasattr(e.defense, "fitted"):
                attempt(whole, e, "graybox", full_text(a), lambda e=e, a=a: run_static(whole, e, a, "graybox"))  # type: ignore[misc]
        for (eps, norm), same in budgets_of(attacks).items():
            for threat in ("adaptive", "blackbox"):
                if threat in job.threat:
                    attempt(
                        few,
                        e,
                        threat,
                        f"{norm} {eps}",
                        lambda e=e, s=same, p=eps, q=norm, t=threat: run_adaptive(few, e, s, p, q, t),  # type: ignore[misc]
                    )
    if shard != (0, 1):
        return assemble(store, ())
    table = _table(job, store, done, errors, command)
    return table | {"not_applicable": absent, "notes": [*table["notes"], *again]}


def _twice(make: Callable[[], Cell]) -> tuple[Cell, Exception | None]:
    """The cell, and what went wrong the first time; what the store already holds of it is not computed again.

    A failure of the disk or of the store is no cell's fault and is not tried again.
    """
    try:
        return make(), None
    except (StoreError, OSError):
        raise
    except Exception as err:
        return make(), err


def _said(err: Exception) -> str:
    return f"{type(err).__name__}: {err}"


def _table(
    job: Job, store: Store, done: list[tuple[Cell, Entry, Block]], errors: list[dict[str, Any]], command: str
) -> dict[str, Any]:
    ids, costs, shown = {}, {}, []
    for c, entry, block in done:
        ids[c.digest] = list(block.data.ids)
        costs[c.digest] = cost(block, entry) if job.costs else NO_COST
        shown += pictures.collect(block, c.digest)
        if c.key["threat"] == "adaptive":
            probe(block, entry, c.digest, Fraction(c.key["eps"]), c.key["norm"])
    return assemble(
        store,
        [c.digest for c, _, _ in done],
        ids=ids,
        costs=costs,
        command=command,
        gallery=shown,
        errors=errors,
        notes=[
            f"{b.data.skipped} unreadable images of {b.data.name} skipped" for _, _, b in done[:1] if b.data.skipped
        ],
    )


def classifier(store: Store, model: VLM, data: Dataset, merge_duplicates: bool = True) -> ZeroShot:
    """The zero-shot classifier of a data set, its class weights encoded once per store."""
    from ironclip.core.spec import digest

    key = digest([model.weights_hash, list(data.class_names), list(data.templates), merge_duplicates])

    def build() -> dict[str, torch.Tensor]:
        made = ZeroShot.build(model, data.class_names, data.templates, merge_duplicates=merge_duplicates)
        return {"weights": made.weights}

    weights = store.tensors("text", key, build)["weights"].to(model.device)
    return ZeroShot.build(model, data.class_names, data.templates, merge_duplicates=merge_duplicates, weights=weights)


def _listed(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return tuple(split_list(value))
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
