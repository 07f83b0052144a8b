"""Contrastive pre-training of a small CLIP: one process, resumable to the bit.

Radford et al. 2021 (arXiv 2103.00020): symmetric cross-entropy over the cosines of a batch with a learned temperature.
Two departures. Equal captions in a batch count as equally right, since on procedural captions they are frequent and
calling them wrong teaches nothing. The patch embedding starts whitened (``architecture.whiten_patches``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ironclip.training.batches import Captioned, Images
from ironclip.training.config import Pretrain
from ironclip.training.run import Perturb, Run

Progress = Callable[[int, int, dict[str, Any]], None]


def pretrain(
    config: Pretrain,
    data: Captioned,
    val: Images,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    perturb: Perturb | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a CLIP on ``data`` and leave it in ``out`` as a transformers folder; returns the last metrics.

    A killed run goes on from its newest whole checkpoint and, on the CPU, ends with the same bits.
    ``perturb(x, texts)`` may replace the images (b, 3, h, w) in [0, 1] of every step by adversarial ones; it must
    depend on its arguments only. ``progress(step, steps, metrics)`` is called after each step. Raises ValueError if
    ``out`` holds a run with other settings or data: what differs is listed.
    """
    run = Run(config, data, val, Path(out), device)
    done = run.begin(resume)
    for step in range(done, config.steps):
        metrics = run.step(step, perturb)
        last = step + 1 == config.steps
        if last or (step + 1) % config.validate_every == 0:
            metrics["val_accuracy"] = run.validate()
        if last or "val_accuracy" in metrics or (step + 1) % config.log_every == 0:
            run.log(metrics)
        if last or (step + 1) % config.checkpoint_every == 0:
            run.save(step + 1)
        if progress is not None:
            progress(step + 1, config.steps, metrics)
    return run.finish()
