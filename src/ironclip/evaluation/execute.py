"""Several workers on one job: each takes every w-th sample and writes to the same store; the rows are the same.

Workers are processes of this machine, or tasks of Ray (``cluster.py``); both do ``work``, and the caller's own run
afterwards does what is missing and makes the table.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ironclip.core.check import check_choice
from ironclip.core.vlm import VLM
from ironclip.evaluation.block import Progress
from ironclip.evaluation.job import Job
from ironclip.evaluation.run import run

EXECUTORS = ("serial", "process", "ray")


def check_executor(executor: str, workers: int, jobs: Sequence[Job]) -> None:
    """Refuse an unknown executor and jobs that cannot be sent to its workers. Raises ValueError."""
    kind, colon, address = executor.partition(":")
    check_choice(kind, EXECUTORS, "executor")
    if colon and (kind != "ray" or not address):
        raise ValueError(
            f"executor {executor!r}: only ray takes an address; write serial, process, ray, ray:auto or ray:HOST:PORT"
        )
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if kind == "serial" or (kind == "process" and workers == 1):
        return
    for job in jobs:
        specs = (*job.data, *job.defenses, *job.attacks, *job.relatives)
        if isinstance(job.vlm, VLM) or any(not isinstance(v, str) for v in specs):
            raise ValueError(
                f"executor={kind} needs specs as text for vlm, data, defenses, attacks and relatives; "
                "or use executor=serial"
            )


@contextmanager
def spreading(executor: str, workers: int) -> Iterator[Callable[[Job, Path, Progress], None]]:
    """How to fill a store with an executor's workers; what ``serial`` gives does nothing."""
    kind, _, address = executor.partition(":")
    if kind == "ray":
        from ironclip.evaluation.cluster import connected

        with connected(address or "local", workers) as fill:
            yield fill
    elif kind == "process" and workers > 1:
        yield lambda job, folder, progress: _spread(job, folder, workers, progress)
    else:
        yield lambda job, folder, progress: None


class Sender:
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


def work(job: Job, folder: str, shard: tuple[int, int], threads: int, progress: Progress) -> None:
    """One worker's samples of every cell of a job, whoever started the worker."""
    torch.set_num_threads(threads)
    run(job, Path(folder), progress, shard=shard)


def _process(job: Job, folder: str, shard: tuple[int, int], threads: int, told: Any) -> None:
    work(job, folder, shard, threads, Sender(told))


def _spread(job: Job, folder: Path, workers: int, progress: Progress) -> None:
    """Fill the store with ``workers`` processes. A worker that dies costs its batch in flight: the caller's own run
    does what is missing. An interrupt ends the workers too."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    running = [
        context.Process(target=_process, args=(job, str(folder), (i, workers), threads, told)) for i in range(workers)
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
