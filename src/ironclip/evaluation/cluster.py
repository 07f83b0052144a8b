"""The shards of a job as tasks of Ray, on this machine or on a cluster; the only module that imports Ray.

The store is how workers and caller meet, so all nodes of a cluster must see its folder under the same path.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ironclip import __version__
from ironclip.evaluation.block import Progress
from ironclip.evaluation.execute import Sender, work
from ironclip.evaluation.job import Job
from ironclip.evaluation.store import Store

CONNECT = 5.0  # seconds for a TCP connection to the head node
ANSWER = 20.0  # seconds for the head node to answer as Ray, start of the asking process included
LEAVE = 5.0  # seconds a cancelled worker has for removing what is half-written
POLL = 0.2


@contextmanager
def connected(address: str, workers: int) -> Iterator[Callable[[Job, Path, Progress], None]]:
    """Within the block Ray is there, and the value fills a store with ``workers`` tasks.

    ``address``: ``local`` starts Ray on this machine and ends it afterwards, ``auto`` is the cluster this machine
    belongs to, ``HOST:PORT`` or ``ray://HOST:PORT`` any other. A session that the caller has opened with ``ray.init``
    is used for ``local`` and stays open. Raises ImportError without Ray, ValueError for a cluster that is not there.
    """
    ray = _library()
    if ray.is_initialized():
        if address != "local":
            raise ValueError(
                f"executor 'ray:{address}' asks for a cluster, but this process has a Ray session already; "
                "use executor='ray' for that session, or call ray.shutdown() first"
            )
        yield lambda job, folder, progress: _spread(ray, job, folder, workers, progress)
        return
    _reach(address)
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of dead workers; standard output is for results
        _open(ray, address, workers)
        try:
            yield lambda job, folder, progress: _spread(ray, job, folder, workers, progress)
        finally:
            ray.shutdown()


def _library() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read on import: nothing is reported to anyone
    try:
        import ray
    except ImportError as err:
        raise ImportError(f"executor=ray needs Ray ({err}); run: pip install ironclip[ray]") from err
    return ray


def _reach(address: str) -> None:
    """Ask before ``ray.init`` does, which tries a dead address for minutes. Raises ValueError."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"executor 'ray:{address}' needs an address HOST:PORT; write ray:10.0.0.1:6379, "
            "ray:auto for the cluster of this machine, or ray to start Ray here"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
    except OSError as err:
        raise ValueError(_absent(address, str(err))) from err
    if address.startswith("ray://"):
        return
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"{host}:{port}"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired as err:
        raise ValueError(_absent(address, f"no answer in {ANSWER:g} s")) from err
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip() or "no answer").splitlines()[-1]
        raise ValueError(_absent(address, f"what listens there does not answer as Ray: {said}"))


def _absent(address: str, reason: str) -> str:
    return (
        f"no Ray cluster at {address} ({reason}); start one there with ray start --head --port=6379, "
        "or write --executor ray to use this machine"
    )


def _open(ray: Any, address: str, workers: int) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"num_cpus": max(workers, torch.get_num_threads()), "include_dashboard": False}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ImportError, RuntimeError, TimeoutError, ValueError) as err:
        if address == "local":
            raise ValueError(f"Ray does not start here ({err}); write --executor process") from err
        raise ValueError(_absent(address, str(err))) from err
    finally:
        if main and before is not None:  # Ray puts its own in place, which ends the process without any clearing up
            signal.signal(signal.SIGTERM, before)


class _Told:
    """The sending end of Ray's queue; a queue that is gone costs the progress bar, not the worker."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, item: tuple[Any, ...]) -> None:
        """Send, if anybody is there."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            self.queue.put(item)


def _task(job: Job, folder: str, token: str, version: str, shard: tuple[int, int], threads: int, queue: Any) -> None:
    here = socket.gethostname()
    if version != __version__:
        raise ValueError(f"{here} has ironclip {__version__}, the caller {version}; install the same version on both")
    if not (Path(folder) / token).exists():
        raise ValueError(f"{here} does not see the store {folder}; pass --store FOLDER on a disk that all nodes share")
    work(job, folder, shard, threads, Sender(_Told(queue)))


def _share(ray: Any, job: Job, workers: int) -> tuple[Job, int, int]:
    """The job as the workers get it, and CPUs and GPUs of one worker. Raises ValueError where none can ever start."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    cpus, largest = sum(n.get("CPU", 0) for n in nodes), max((n.get("CPU", 0) for n in nodes), default=0)
    gpus = 0
    if torch.device(job.device).type == "cuda":
        job, gpus = replace(job, device="cuda"), 1  # Ray shows each worker its own GPU, and only that
        if not any(n.get("GPU", 0) >= 1 for n in nodes):
            raise ValueError("the Ray cluster has no GPU, but device is cuda; write --device cpu or start Ray with one")
    if largest < 1:
        raise ValueError("the Ray cluster offers no CPU; start its nodes with ray start --num-cpus N")
    return job, int(max(1, min(cpus // workers, largest))), gpus


def _spread(ray: Any, job: Job, folder: Path, workers: int, progress: Progress) -> None:
    """Fill the store. A worker that dies costs its batch in flight; the caller's own run does what is missing.

    Raises ValueError where a worker could not begin, with its reason. An interrupt cancels the workers.
    """
    from ray.util.queue import Empty, Queue

    folder = folder.resolve()
    Store(folder)
    token = f".seen-{secrets.token_hex(8)}"  # a folder of the same name on another machine does not have it
    (folder / token).touch()
    sent, threads, gpus = _share(ray, job, workers)
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_task)
    running: list[Any] = []
    told = Queue(actor_options={"num_cpus": 0})
    try:
        running = [
            task.remote(sent, str(folder), token, __version__, (i, workers), threads, told) for i in range(workers)
        ]
        while running:
            with contextlib.suppress(Empty, ray.exceptions.RayError):
                while True:
                    what, *args = told.get(timeout=POLL)
                    getattr(progress, what)(*args)
            ended, running = ray.wait(running, num_returns=len(running), timeout=POLL)
            for ref in ended:
                _result(ray, ref)
    finally:
        _cancel(ray, running)
        told.shutdown(force=True)
        (folder / token).unlink(missing_ok=True)


def _result(ray: Any, ref: Any) -> None:
    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        said = f"{type(err.cause).__name__}: {err.cause}"
        raise ValueError(
            f"a Ray worker could not do its share ({said}); to leave Ray out, write --executor serial"
        ) from err
    except ray.exceptions.RayError:  # killed, out of memory, or its node is gone
        return


def _cancel(ray: Any, running: list[Any]) -> None:
    """A KeyboardInterrupt in each worker, and after a few seconds the end of it."""
    if not running:
        return
    for ref in running:
        ray.cancel(ref)
    _, left = ray.wait(running, num_returns=len(running), timeout=LEAVE)
    for ref in left:
        ray.cancel(ref, force=True)
