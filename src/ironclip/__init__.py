"""ironclip: attack, defend and honestly measure vision-language models of the CLIP family."""

from __future__ import annotations

from typing import Any

from ironclip.core.rng import SampleRNG
from ironclip.core.types import AttackResult, Info, Loop, State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import build

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "AttackResult",
    "Info",
    "Loop",
    "SampleRNG",
    "State",
    "ZeroShot",
    "__version__",
    "build",
    "evaluate",
    "load",
    "load_data",
]


def load(spec: str, *, device: str = "cpu", precision: str = "fp32") -> VLM:
    """A model by name: ``lite``, ``lite:conse``, ``tiny``, ``hf:NAME_OR_FOLDER``, ``open_clip:NAME_OR_FOLDER``.

    Raises ValueError for an unknown name and for weights whose hash differs, ImportError naming the missing extra.
    """
    from ironclip.models import load as load_model

    return load_model(spec, device=device, precision=precision)


def load_data(spec: str, size: int = 224, **options: Any) -> Any:
    """A data set by name: ``photos``, ``shapes``, ``folder:PATH``, a survey set; see ``ironclip.data.load_data``."""
    from ironclip.data import load_data as load_set

    return load_set(spec, size, **options)


def evaluate(*args: Any, **options: Any) -> Any:
    """Clean, static, graybox and adaptive accuracy of defenses; see ``ironclip.evaluation.run.evaluate``."""
    from ironclip.evaluation.run import evaluate as run

    return run(*args, **options)
