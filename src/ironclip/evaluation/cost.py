"""What a defended prediction costs: milliseconds per image, image-tower passes, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ironclip.core.rng import SampleRNG
from ironclip.core.spec import digest
from ironclip.core.types import Classifier
from ironclip.evaluation.block import Block, Entry


def timed(clf: Classifier, x: Tensor, rng: SampleRNG, runs: int = 50, warmup: int = 10, seconds: float = 3.0) -> float:
    """Median milliseconds per image of ``runs`` calls after ``warmup`` ones, cut short after about ``seconds``."""
    times: list[float] = []
    begin = time.perf_counter()
    for i in range(warmup + runs):
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            clf(x, rng)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if i >= warmup or now - begin > seconds / 3:
            times.append(1000 * (now - start) / x.shape[0])
        if now - begin > seconds and len(times) >= 3:
            break
    return statistics.median(times)


def memory_mb(device: torch.device) -> float:
    """Peak memory of the process (CPU) or of the device (CUDA), in MB."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated() / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def cost_key(block: Block, entry: Entry) -> str:
    """Under which the timings of a defense on this model and class list are stored."""
    return digest(
        block.key(defense=entry.text, state=entry.state_hash, device=str(block.device), batch=block.batch_size)
    )


def cost(block: Block, entry: Entry, seconds: float = 1.0) -> dict[str, Any]:
    """Timings of a defense on this model and class list, measured once per store."""
    defended = entry.defense.apply(block.clf, entry.state)
    key = cost_key(block, entry)
    found: dict[str, Any] | None = block.store.get_json("cost", key)
    if found is None:
        x, _, ids = next(iter(block.data.batches(min(block.batch_size, len(block.data)))))
        x, rng = x.to(block.device), block.rng(ids)
        found = {
            "ms_per_image": timed(defended, x[:1], rng[:1], seconds=seconds),
            "ms_batch": timed(defended, x, rng, seconds=seconds),
            "memory_mb": memory_mb(block.device),
        }
        block.store.put_json("cost", key, found)
    return found
