"""Ends that a run does not choose: a scheduler's SIGTERM, and ``--max-hours``. Both stop it as Ctrl-C does."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, so that what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def at_most(hours: float | None) -> Iterator[None]:
    """After ``hours`` the block is interrupted and the command ends with 130. Raises ValueError for 0 or less.

    It belongs inside ``terminable``, whose handler it calls.
    """
    if hours is None:
        yield
        return
    if not 0 < hours < threading.TIMEOUT_MAX / 3600:
        raise ValueError(f"max-hours must be above 0, got {hours:g}; write --max-hours 2.5")
    over = threading.Event()

    def stop() -> None:
        over.set()
        _thread.interrupt_main(signal.SIGTERM)  # SIGINT is ignored in commands that a shell has put in the background

    timer = threading.Timer(3600 * hours, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt as err:
        if not over.is_set():
            raise
        print(f"time is up: --max-hours {hours:g}", file=sys.stderr)
        raise typer.Exit(130) from err
    finally:
        timer.cancel()
