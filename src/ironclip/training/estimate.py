"""What a fine-tuning run will cost, from two of its steps: seconds, tower passes, bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ironclip.core.loop import Loop
from ironclip.training.feed import Source
from ironclip.training.finetune import Plan
from ironclip.training.student import Student


def estimate(plan: Plan, data: Source, loop: Loop, seed: int = 0) -> dict[str, Any]:
    """Makes two steps on real batches and keeps nothing of them.

    ``seconds_per_step`` and ``hours`` are those of the second step on this machine as busy as it is now.
    ``forwards_per_image`` and ``backwards_per_image`` count passes of the image tower in a step. Bytes: ``model``
    (all towers and the student's copy), ``training`` (gradients, optimiser, running means, the last good point),
    ``activations`` (most that autograd held at one moment), ``remembered`` (what the method keeps of every image),
    ``peak``: their sum, which the allocator and the libraries come on top of.
    """
    run = Student(plan, data, loop, seed)
    run.step(0)
    held = _Held(p.untyped_storage().data_ptr() for p in run.vlm.parameters())
    clock = time.perf_counter()
    with plan.clf.vlm.counting() as count, saved_tensors_hooks(held.pack, held.unpack):
        run.step(1)
    seconds = time.perf_counter() - clock
    trained = sum(p.numel() * p.element_size() for p in run.chosen.values())
    buffers = (1 if loop.optimizer == "sgd" else 2) + 1 + (2 if loop.ema else 1) + (1 if loop.ema else 0)
    own = sum(v.numel() * v.element_size() for v in plan.clf.vlm.state_dict().values())
    copied = sum(
        v.numel() * v.element_size() for k, v in run.vlm.state_dict().items() if k.split(".")[0] in plan.towers
    )
    remembered = _remembered(run) * len(data)
    parts = {"model": own + copied, "training": buffers * trained, "activations": held.most, "remembered": remembered}
    images = loop.batch_size
    return {
        "steps": loop.steps,
        "epochs": round(loop.steps * images / len(run.feed.rows), 2),
        "seconds_per_step": round(seconds, 3),
        "hours": round(seconds * loop.steps / 3600, 2),
        "forwards_per_image": count.forwards / images,
        "backwards_per_image": count.backwards / images,
        "trained_parameters": sum(p.numel() for p in run.chosen.values()),
        "bytes": {**parts, "peak": sum(parts.values())},
    }


def _remembered(run: Student) -> int:
    """Bytes that the method keeps of one image, 0 where images are seen once and nothing is kept."""
    plan, loop = run.plan, run.loop
    if not plan.remembers or loop.steps * loop.batch_size <= len(run.feed.rows):
        return 0
    with torch.no_grad():
        found = plan.recall(run.feed.batch(run.feed.rows[:1], -1))
    return sum(4 * v.numel() for v in found.values())


class _Held:
    """Bytes of storage that autograd keeps alive, and the most it ever did."""

    def __init__(self, free: Iterable[int]) -> None:
        self.free, self.users = set(free), Counter[int]()
        self.now = self.most = 0

    def pack(self, value: Tensor) -> _Kept:
        return _Kept(value, self)

    def unpack(self, kept: _Kept) -> Tensor:
        return kept.value

    def add(self, storage: Any, sign: int) -> None:
        key = storage.data_ptr()
        if key in self.free:
            return
        first = self.users[key] == (0 if sign > 0 else 1)
        self.users[key] += sign
        if first:
            self.now += sign * storage.nbytes()
            self.most = max(self.most, self.now)


class _Kept:
    """One saved tensor; freed with the graph that holds it."""

    def __init__(self, value: Tensor, book: _Held) -> None:
        self.value, self.book = value, book
        book.add(value.untyped_storage(), 1)

    def __del__(self) -> None:
        self.book.add(self.value.untyped_storage(), -1)
