"""Models by name. Each backend lives in its own file and is imported when it is asked for."""

from __future__ import annotations

import importlib

import torch

from ironclip.core.check import unknown
from ironclip.core.vlm import VLM

BACKENDS: dict[str, str] = {
    "lite": "ironclip.models.lite:load_lite",
    "tiny": "ironclip.models.tiny:load_tiny",
    "hf": "ironclip.models.hf:load_hf",
    "open_clip": "ironclip.models.open_clip:load_open_clip",
    "conv4": "ironclip.models.conv4:load_conv4",
}


def load(spec: str, *, device: str = "cpu", precision: str = "fp32") -> VLM:
    """A frozen model in eval mode from ``backend`` or ``backend:rest``. Raises ValueError for an unknown backend.

    ``tiny-v1``, the name that results carry, is ``tiny:v1``.
    """
    text = spec.strip()
    backend, _, rest = (f"tiny:{text[5:]}" if text.startswith("tiny-") else text).partition(":")
    if backend not in BACKENDS:
        names = ["lite", "lite:conse", "tiny", "hf:NAME", "open_clip:NAME", "conv4:MODEL"]
        raise ValueError(unknown("model", spec, names))
    module, function = BACKENDS[backend].split(":")
    build = getattr(importlib.import_module(module), function)
    with torch.random.fork_rng(devices=[]):  # modules draw initial weights before the real ones replace them
        vlm: VLM = build(rest)
    vlm = vlm.freeze().to(device)
    return vlm.at_precision(precision)
