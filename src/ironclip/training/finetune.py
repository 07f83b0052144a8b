"""Adversarial fine-tuning, the one loop of every defense that changes weights: one process, resumable to the bit.

A method brings a ``Plan``: how to attack a batch and what to minimise on the outcome. The loop brings everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ironclip.core.loop import Loop
from ironclip.core.types import State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.training.feed import Batch, Source
from ironclip.training.team import Team

Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method brings to the loop.

    ``clf``: the model as it was, which the method may use as its teacher, with the class weights, encoded once.
    ``attack(student, batch)``: adversarial images; the student's weights are frozen there. ``loss(student, batch,
    x_adv)``: the value to minimise, a mean over the images, and figures to write down, each a tensor of one value. It
    must not depend on how a batch is cut into parts unless the method says so. ``remember(x)``: what the method
    needs of each clean image and of nothing else, as float32 tensors (b, ...), computed once an image and then found in
    ``batch.cached``; ``remember_labelled(x, y)``: the same where it hangs on the label too. ``logits(student, x)``: for
    the accuracies of the validation; None for the class weights of ``clf``. ``towers``: those that are trained.
    ``labels``: does the method read any? ``marks``: tensors that are stored beside the weights.

    ``extra``: start values of tensors of the method's own that are trained too; the student has them as
    ``get_parameter("extra.NAME")``, the state under that name. ``rates``: by the beginning of a tensor's name, its
    learning rate as a multiple of the loop's. ``prepare(student, batch)``: what attack and loss share of the present
    weights, with its graph, found in ``batch.cached``; the attack must detach it.
    """

    clf: ZeroShot
    attack: Callable[[VLM, Batch], Tensor]
    loss: Callable[[VLM, Batch, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
    remember: Callable[[Tensor], dict[str, Tensor]] | None = None
    remember_labelled: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None
    logits: Callable[[VLM, Tensor], Tensor] | None = None
    towers: tuple[str, ...] = ("image",)
    labels: bool = True
    marks: State = field(default_factory=dict)
    extra: State = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    prepare: Callable[[VLM, Batch], dict[str, Tensor]] | None = None

    @property
    def remembers(self) -> bool:
        """Does the method keep anything of the clean images?"""
        return self.remember is not None or self.remember_labelled is not None

    def recall(self, batch: Batch) -> dict[str, Tensor]:
        """What the method keeps of these images, computed now."""
        plain = {} if self.remember is None else self.remember(batch.x)
        return plain if self.remember_labelled is None else plain | self.remember_labelled(batch.x, batch.y)


@dataclass(frozen=True, eq=False)
class Session:
    """Where a run lives and who watches. ``folder``: settings, metrics and checkpoints; None keeps nothing on disk.

    ``progress(step, steps, metrics)`` is called after each step. ``team``: processes that share the run; only the first
    writes and reports.
    """

    folder: Path | None = None
    resume: bool = True
    progress: Progress | None = None
    team: Team = field(default_factory=Team)


def finetune(
    plan: Plan, data: Source, *, loop: Loop, seed: int = 0, recipe: str = "", session: Session | None = None
) -> State:
    """Train a copy of the plan's towers and return the tensors that changed, and the plan's ``marks``.

    Nothing is written into the model. ``recipe``: the method's hyperparameters as text; a run in a folder is taken up
    only with the same recipe, loop, seed, model and data, and then ends with the same bits on the CPU. A run whose
    loss diverges stops, says so in a warning, and gives the state of its last checkpoint. Raises ValueError for data
    or settings that cannot be used, RuntimeError if it diverges before the first checkpoint.
    """
    from ironclip.training.student import Student

    session = session or Session()
    run = Student(plan, data, loop, seed, session.team)
    done = run.begin(session.folder, recipe, session.resume)
    for step in range(done, loop.steps):
        if step == 0:
            run.log({"step": 0, **run.validate()})
        metrics = run.step(step)
        if run.trouble:
            run.give_up(step)
            break
        last = step + 1 == loop.steps
        if last or (step + 1) % loop.validate_every == 0:
            metrics |= run.validate()
        if last or "val_loss" in metrics or (step + 1) % loop.log_every == 0:
            run.log(metrics)
        if last or (step + 1) % loop.checkpoint_every == 0:
            run.save(step + 1)
        if session.progress is not None and session.team.leads:
            session.progress(step + 1, loop.steps, metrics)
    return {**run.state(), **plan.marks}
