"""Several processes on one job: each takes every w-th sample and writes to the same store; the rows are the same."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import torch

from ironclip.core.vlm import VLM
from ironclip.evaluation.block import Progress
from ironclip.evaluation.job import Job
from ironclip.evaluation.run import run


class _Sender:
    """Progress of a worker, told to the parent."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def start(self, text: str, work: float) -> None:
        """A piece of work begins."""
        self.told.put(("start", text, work))

    def advance(self, work: float) -> None:
        """Some of it is done."""
        self.told.put(("advance", work))

    def done(self) -> None:
        """The piece is done."""
        self.told.put(("done",))


def _work(job: Job, folder: str, shard: tuple[int, int], threads: int, told: Any) -> None:
    torch.set_num_threads(threads)
    run(job, Path(folder), _Sender(told), shard=shard)


def spread(job: Job, folder: Path, workers: int, progress: Progress) -> None:
    """Fill the store with ``workers`` processes. A worker that dies costs its batch in flight: the caller's own run
    does what is missing. Raises ValueError for objects that cannot be sent; an interrupt ends the workers too."""
    if isinstance(job.vlm, VLM) or any(
        not isinstance(v, str) for v in (*job.data, *job.defenses, *job.attacks, *job.relatives)
    ):
        raise ValueError(
            "executor=process needs specs as text for vlm, data, defenses, attacks and relatives; "
            "or use executor=serial"
        )
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    running = [
        context.Process(target=_work, args=(job, str(folder), (i, workers), threads, told)) for i in range(workers)
    ]
    for p in running:
        p.start()
    try:
        while any(p.is_alive() for p in running):
            try:
                what, *args = told.get(timeout=0.2)
            except queue.Empty:
                continue
            getattr(progress, what)(*args)
    finally:
        for p in running:
            if p.is_alive():
                p.terminate()
            p.join()
