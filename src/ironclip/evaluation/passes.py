"""What attacks and defenses will cost, found by running them: attacks on a toy, defenses on one or two images."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ironclip.core.grad import NoGradientError, draws_of, loss_and_grad
from ironclip.core.losses import ce
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import build_attack


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of the image tower, per image or in all."""

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forwards * times, self.backwards * times)


def of_answer(vlm: VLM, clf: Classifier, x: Tensor, rng: SampleRNG) -> Passes:
    """Passes of one answer per image, measured on the images ``x``: (b, 3, h, w)."""
    with torch.no_grad(), vlm.counting() as spent:
        clf(x, rng)
    return Passes(spent.forwards, spent.backwards) * (1 / len(x))


def of_gradient(vlm: VLM, clf: Classifier, x: Tensor, y: Tensor, rng: SampleRNG) -> Passes | None:
    """Passes of one gradient draw per image, a penalty included; None where there is no gradient."""
    view: Classifier = getattr(clf, "base", clf) if draws_of(clf) > 1 else clf
    try:
        with vlm.counting() as spent:
            loss_and_grad(view, x, lambda z: ce(z, y), rng)
    except NoGradientError:
        return None
    return Passes(spent.forwards, spent.backwards) * (1 / len(x))


def of_attack(spec: str, draws: int, k: int, answer: Passes, gradient: Passes | None) -> Passes:
    """Passes of an attack per image, at most: as if no image were ever fooled; every call takes ``draws`` draws."""
    gradients, plain = (n * draws for n in calls(spec, min(k, 12)))
    if gradients and gradient is None:
        return answer
    return (gradient or Passes()) * gradients + answer * plain


@lru_cache(maxsize=1024)
def calls(spec: str, k: int = 12) -> tuple[int, int]:
    """How often an attack asks for a gradient, and how often for an answer alone, per image that nothing fools.

    Counted by running it on a linear classifier of ``k`` classes whose first class always wins.
    """
    size, dim = 16, k + 4
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3 * size * size, dim, generator=generator) / (30 * size)

    def image(x: Tensor) -> Tensor:
        features = x.flatten(1) @ w.to(x)
        return features + torch.eye(dim)[0] * 10

    places = {f"a photo of a {i}.": i for i in range(k)}

    def text(texts: object) -> Tensor:
        rows = [places.get(str(t), 0) for t in texts]  # type: ignore[attr-defined]
        return torch.stack([torch.eye(dim)[0] * (1 if i == 0 else -1) + torch.eye(dim)[i] * (i > 0) for i in rows])

    vlm = VLM.wrap(image, text, size, scale=1.0)
    clf = ZeroShot.build(vlm, [str(i) for i in range(k)], ("a photo of a {}.",))
    x = torch.rand(1, 3, size, size, generator=generator)
    result = build_attack(spec)(clf, x, torch.zeros(1, dtype=torch.long), rng=SampleRNG.rows(1))
    gradients = int(result.backwards.max())
    return gradients, int(result.forwards.max()) - gradients


def rate(vlm: VLM, batch_size: int, precision: str, repeats: int = 3) -> dict[str, float]:
    """Seconds per image of a forward pass in fp32 (``answer``), of one at ``precision`` (``forward``), and of forward
    and backward together at ``precision`` (``gradient``): medians, on this machine as it is now."""
    x = torch.rand(batch_size, 3, vlm.image_size, vlm.image_size, generator=torch.Generator().manual_seed(0))
    x = x.to(vlm.device)
    fast = vlm.at_precision(precision)

    def gradient() -> None:
        leaf = x.clone().requires_grad_(True)
        torch.autograd.grad(fast.encode_image(leaf).square().sum(dim=1).sum(), leaf)

    def forward(model: VLM) -> None:
        with torch.no_grad():
            model.encode_image(x)

    runs = {"answer": lambda: forward(vlm), "forward": lambda: forward(fast), "gradient": gradient}
    out = {}
    for name, go in runs.items():
        times = []
        for _ in range(repeats + 1):
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            go()
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / batch_size)
        out[name] = statistics.median(times[1:])
    return out
