"""One fine-tuning run in memory: the student, its optimiser, the last good point."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ironclip.core.loop import Loop
from ironclip.core.types import State, prediction
from ironclip.training.checkpoint import Checkpoint, load_checkpoint
from ironclip.training.feed import Batch, Feed, Source
from ironclip.training.finetune import Plan
from ironclip.training.journal import CHECKPOINTS, Journal
from ironclip.training.select import changed, frozen, student_of, with_extra
from ironclip.training.team import Team

WINDOW = 20
_MEMORY = "memory.safetensors"


class Student:
    """The state of a run. ``trouble``: why the last step was not made, empty if it was."""

    def __init__(self, plan: Plan, data: Source, loop: Loop, seed: int, team: Team | None = None) -> None:
        self.plan, self.data, self.loop, self.seed, self.team = plan, data, loop, seed, team or Team()
        self.feed = Feed(plan.clf, data, loop, seed, plan.labels, self.team)
        self.vlm, self.chosen = student_of(plan.clf.vlm, plan.towers, loop, seed)
        self.chosen |= with_extra(self.vlm, plan.extra)
        self.training = self.vlm.under_autocast(loop.precision)
        self.attacked = self.vlm.under_autocast(loop.attack_precision)
        self.optimizer = optimizer_of(self.chosen, loop, plan.rates)
        self.ema = {k: p.detach().clone() for k, p in self.chosen.items()} if loop.ema else {}
        self.journal: Journal | None = None
        self.losses: list[float] = []  # the first WINDOW and the last WINDOW
        self.good: Checkpoint | None = None
        self.trouble = ""

    def begin(self, folder: Path | None, recipe: str, resume: bool) -> int:
        """Take up the run in the folder, or start one; returns the steps already done."""
        if folder is not None and self.team.leads:
            if not resume:
                (folder / _MEMORY).unlink(missing_ok=True)
            self.journal = Journal(folder, self.settings(recipe), resume)
            self.good = self.journal.begin()
        self.team.wait()
        if folder is not None and not self.team.leads:
            self.good = load_checkpoint(folder / CHECKPOINTS)
        if self.good is not None:
            self._restore(self.good)
        self._remember(folder)
        return 0 if self.good is None else self.good.step

    def settings(self, recipe: str) -> dict[str, Any]:
        """Everything that the weights depend on."""
        vlm, clf = self.plan.clf.vlm, self.plan.clf
        pixels = {"preprocessing": getattr(self.data, "recipe", ""), "manifest_hash": self.data.manifest_hash}
        return {
            "recipe": recipe,
            "config": dataclasses.asdict(self.loop),
            "seed": self.seed,
            "model": {"name": vlm.name, "weights": vlm.weights_hash},
            "classes": clf.prototype_hash if self.plan.labels else "",
            "data": {"name": self.data.name, "images": len(self.data), **pixels},
        }

    def _remember(self, folder: Path | None) -> None:
        """What the method keeps of the clean images, once, where every image will be seen more than once on average."""
        if not self.plan.remembers or self.loop.steps * self.loop.batch_size <= len(self.feed.rows):
            return
        path = None if folder is None else folder / _MEMORY
        if path is not None and path.exists():
            self.feed.memory = load_file(path)
            return
        size, found = self.loop.batch_size // self.loop.accumulate, list[dict[str, Tensor]]()
        for start in range(0, len(self.data), size):
            places = list(range(start, min(start + size, len(self.data))))
            batch = self.feed.batch(places, -1)
            with torch.no_grad():
                found.append({k: v.float().cpu() for k, v in self.plan.recall(batch).items()})
        memory = {k: torch.cat([f[k] for f in found]) for k in found[0]}
        if path is not None and self.team.leads:
            aside = path.with_suffix(".part")
            save_file(memory, aside)
            os.replace(aside, path)
        self.feed.memory = memory

    def _known(self, batch: Batch) -> Batch:
        if not self.plan.remembers or self.feed.memory:
            return batch
        with torch.no_grad():
            return self.feed.remembering(batch, self.plan.recall(batch))

    def _prepared(self, batch: Batch) -> Batch:
        if self.plan.prepare is None:
            return batch
        return self.feed.remembering(batch, self.plan.prepare(self.training, batch))

    def adversarial(self, batch: Batch) -> Tensor:
        """The method's attack on a batch."""
        with frozen(self.chosen):
            return self.plan.attack(self.attacked, batch).detach()

    def step(self, step: int) -> dict[str, Any]:
        """One update; with ``trouble`` set nothing was changed."""
        self.optimizer.zero_grad(set_to_none=True)
        total, named = 0.0, dict[str, float]()
        for part in self.feed.parts(step):
            batch = self._prepared(self._known(part))
            x_adv = self.adversarial(batch)
            loss, figures = self.plan.loss(self.training, batch, x_adv)
            share = len(batch) / self.loop.batch_size
            (loss * share).backward()
            total += float(loss.detach()) * share
            _add(named, figures, share)
        summed = self.team.add_up(self.chosen.values(), {"loss": total, **{f"of {k}": v for k, v in named.items()}})
        total, named = summed.pop("loss"), {k.removeprefix("of "): v for k, v in summed.items()}
        norm = float(torch.nn.utils.clip_grad_norm_(self.chosen.values(), self.loop.clip_norm or math.inf))
        self.losses = [*self.losses[:WINDOW], *[*self.losses[WINDOW:], total][-WINDOW:]]
        self.trouble = self._judge(total, norm)
        rate = self.loop.rate(step)
        if not self.trouble:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("times", 1.0)
            self.optimizer.step()
            for name, kept in self.ema.items():
                kept.lerp_(self.chosen[name].detach(), 1 - self.loop.ema)
        figures_out = {k: round(v, 6) for k, v in named.items()}
        return {"step": step + 1, "loss": round(total, 6), **figures_out, "grad_norm": round(norm, 4), "lr": rate}

    def _judge(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:g}, gradient norm {norm:g}"
        if len(self.losses) < 2 * WINDOW:
            return ""
        first, now = sum(self.losses[:WINDOW]) / WINDOW, sum(self.losses[WINDOW:]) / WINDOW
        limit = first + (self.loop.diverged - 1) * abs(first) + 1e-3  # losses may be negative
        return f"mean loss {now:.4g} after {first:.4g} at first" if now > limit else ""

    def give_up(self, step: int) -> None:
        """Go back to the last checkpoint. Raises RuntimeError if there is none."""
        why = f"training diverged at step {step + 1} ({self.trouble})"
        advice = f"use a lower lr than {self.loop.lr:g} or a longer warmup"
        self.log({"step": step + 1, "diverged": self.trouble})
        if self.good is None:
            raise RuntimeError(f"{why} before the first checkpoint: there is no good state to keep; {advice}")
        self._restore(self.good)
        warnings.warn(f"{why}: the state of step {self.good.step} is kept; {advice}", stacklevel=3)

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss on the held-out training images and, where there are labels, accuracies in percent.

        ``val_robust`` is measured under the method's own training attack: an upper bound, for watching only.
        """
        sums, right, n = dict[str, float](), [0, 0], len(self.feed.held)
        if not n:
            return {}
        with self.averaged():
            for part in self.feed.validation():
                batch = self._prepared(self._known(part))
                x_adv = self.adversarial(batch)
                loss, figures = self.plan.loss(self.training, batch, x_adv)
                _add(sums, {"loss": loss, **figures}, len(batch) / n)
                if self.plan.labels:
                    for i, x in enumerate((batch.x, x_adv)):
                        right[i] += int((prediction(self._logits(x)) == batch.y).sum())
        out: dict[str, Any] = {f"val_{k}": round(v, 6) for k, v in sums.items()}
        if self.plan.labels:
            out |= {"val_clean": round(100 * right[0] / n, 2), "val_robust": round(100 * right[1] / n, 2)}
        return out

    def _logits(self, x: Tensor) -> Tensor:
        if self.plan.logits is not None:
            return self.plan.logits(self.vlm, x)
        return self.plan.clf.with_vlm(self.vlm)(x)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the student has the weights that would be kept: their running mean if there is one."""
        now = {k: p.detach().clone() for k, p in self.chosen.items()} if self.ema else {}
        self._load(self.ema)
        try:
            yield
        finally:
            self._load(now)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.chosen[name].copy_(value)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        if self.journal is not None:
            self.journal.log(metrics)

    def save(self, step: int) -> None:
        """Remember this point as good, on disk too."""
        weights = {k: p.detach().clone() for k, p in self.chosen.items()}
        weights |= {f"ema.{k}": v.clone() for k, v in self.ema.items()}
        optimizer = {"optimizer": self.optimizer.state_dict(), "losses": list(self.losses)}
        self.good = Checkpoint(step, weights, optimizer)
        if self.journal is not None:
            self.journal.save(self.good)

    def _restore(self, point: Checkpoint) -> None:
        self._load({k: v for k, v in point.weights.items() if not k.startswith("ema.")})
        for name, kept in self.ema.items():
            kept.copy_(point.weights[f"ema.{name}"])
        if point is self.good and not self.trouble:  # after a divergence nothing is trained any more
            self.optimizer.load_state_dict(point.optimizer["optimizer"])
            self.losses = list(point.optimizer["losses"])

    def state(self) -> State:
        """The tensors that are kept."""
        with self.averaged():
            own = {k: p.detach().cpu().clone() for k, p in self.chosen.items() if k.startswith("extra.")}
            return {**changed(self.plan.clf.vlm, self.vlm, self.plan.towers), **own}


def optimizer_of(
    chosen: Mapping[str, torch.nn.Parameter], loop: Loop, rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The loop's optimiser; ``times`` of a group is its multiple of the loop's learning rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in chosen.items():
        times = next((v for start, v in rates.items() if name.startswith(start)), 1.0)
        groups.setdefault(times, []).append(p)
    made = [{"params": params, "times": times} for times, params in groups.items()]
    common: dict[str, Any] = {"lr": loop.lr, "weight_decay": loop.weight_decay}
    if loop.optimizer == "sgd":
        return torch.optim.SGD(made, momentum=loop.momentum, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[loop.optimizer]
    return kind(made, betas=loop.betas, eps=loop.adam_eps, **common)


def _add(sums: dict[str, float], figures: Mapping[str, Tensor], share: float) -> None:
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
