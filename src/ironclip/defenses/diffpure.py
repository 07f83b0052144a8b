"""DiffPure: noise drowns the perturbation, a diffusion model of images takes the noise away again.

Nie, Guo, Huang, Xiao, Vahdat, Anandkumar 2022 (arXiv 2205.07460). They solve the reverse SDE of score models of their
own; here it is the DDPM chain (Ho et al. 2020, arXiv 2006.11239) of any unconditional model of ``diffusers``, over an
even stride of its steps. The published robust figures fell under stronger gradients through the whole chain (Lee & Kim
2023, arXiv 2303.09051): read the adaptive column. The derivative here is that of the whole chain, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.diffusion import PREDICTIONS, ancestral, clean_of, noised
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._diffusers import from_hub, need_diffusers
from ironclip.defenses._inner import checkpointed


@dataclass(frozen=True, eq=False)
class Model:
    """``net``: noisy images (b, 3, s, s) in [-1, 1] and a step to its ``kind`` of prediction. ``kept``: its schedule.
    ``clip``: predicted images are cut to [-clip, clip], None leaves them."""

    net: Any
    size: int
    kept: Tensor
    kind: str
    clip: float | None


@method
class DiffPure:
    """``model``: an unconditional image model by hub name or folder, such as 'google/ddpm-cifar10-32'. ``t``: share of
    its steps that the image is noised by (published: 0.1 on CIFAR-10, 0.15 on ImageNet). ``steps``: of the way back,
    evenly spread, None for every one.

    Images are resized to the model's size and back. Costs ``steps`` forwards of the model and 1 of the tower;
    differentiated, 2 forwards and 1 backward each, with one step's graph in memory. Every image has its own noise.
    Raises ValueError for bad fields and images, no model, or one that is conditional or not of colour images,
    FileNotFoundError where the model is neither folder, cached nor on the hub, ImportError without the extra
    ``diffusion``.
    """

    info: ClassVar[Info] = Info(
        name="diffpure",
        title="DiffPure",
        paradigm="training-free",
        kind="purification",
        paper="Nie et al. 2022, arXiv 2205.07460",
        code="https://github.com/NVlabs/DiffPure",
        randomized=True,
    )
    surrogates: ClassVar[tuple[str, ...]] = ("identity",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reference": {"t": 0.15, "steps": None}}

    model: str = ""
    t: float = 0.1
    steps: int | None = 10

    def __post_init__(self) -> None:
        if not 0 < self.t <= 1:
            raise ValueError(f"t must lie in (0, 1], got {self.t}; write 0.1 (share of the model's steps)")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}; write 10, or None for every step")

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The classifier behind the purifier; randomised, images independent of each other."""
        return self._defended(clf, "exact")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "identity") -> Defended:
        """The same values with the derivative of no purifier at all (BPDA)."""
        check_choice(name, self.surrogates, "surrogate of DiffPure")
        return self._defended(clf, name)

    def times(self, total: int) -> list[int]:
        """Steps of the model that are visited, from the noisiest down to 0. Raises ValueError for too many."""
        last = max(round(self.t * total), 1) - 1
        n = last + 1 if self.steps is None else self.steps
        if n > last + 1:
            raise ValueError(f"t={self.t} of {total} steps leaves {last + 1} to go back, got steps={n}; write fewer")
        return [last] if n == 1 else [round(last * (n - 1 - i) / (n - 1)) for i in range(n)]

    def _defended(self, clf: ZeroShot, how: str) -> Defended:
        if not self.model:
            raise ValueError(
                "DiffPure needs an image model; write DiffPure(model='google/ddpm-cifar10-32') or name a folder"
            )
        model = load_model(self.model, str(clf.vlm.device))
        times = self.times(len(model.kept))

        def seen(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x, clf.vlm.image_size)
            stream = rng_or_rows(rng, x, "diffpure").fold("diffpure")
            if how == "exact":
                return purified(model, times, x, stream)
            with torch.no_grad():
                value = purified(model, times, x, stream)
            return forwarded(value, x)

        def encode(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            features: Tensor = clf.vlm.encode_image(seen(x, rng))
            return features

        return Defended(clf, encode, randomized=True, seen=seen)


def purified(model: Model, times: list[int], x: Tensor, stream: SampleRNG) -> Tensor:
    """Pixels (b, 3, h, w) in [0, 1], noised to ``times[0]`` and taken back over ``times``."""
    kept = model.kept.to(x)
    z = 2 * resized(x, model.size) - 1
    z = noised(z, stream.fold("start").normal_like(z), kept[times[0]])
    for i, t in enumerate(times):
        before = kept[times[i + 1]] if i + 1 < len(times) else torch.ones_like(kept[0])
        noise = stream.fold("back", i).normal_like(z)
        step = partial(_back, model, t, kept[t], before, noise)
        z = checkpointed(step, z) if wants_graph(z) else step(z)
    return resized((z + 1) / 2, x.shape[-1]).clamp(0.0, 1.0)


def _back(model: Model, t: int, kept: Tensor, before: Tensor, noise: Tensor, z: Tensor) -> Tensor:
    out = model.net(z, t).sample[:, :3]  # models with a learned variance give it in further channels
    x0 = clean_of(out, z, kept, model.kind)
    x0 = x0 if model.clip is None else x0.clamp(-model.clip, model.clip)
    return ancestral(z, x0, noise, kept, before)


def resized(x: Tensor, size: int) -> Tensor:
    """(b, 3, size, size), antialiased; the very same tensor where nothing changes."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)


@lru_cache(maxsize=2)
def load_model(name: str, device: str) -> Model:
    """An unconditional ``UNet2DModel`` and its scheduler, by hub name or folder. Raises as ``DiffPure`` says."""
    need_diffusers()
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.inference_mode(False):  # it outlives the caller's mode
        net = from_hub(UNet2DModel, name, "unet").eval().requires_grad_(False).to(device)
        plan = from_hub(DDPMScheduler, name, "scheduler", "scheduler_config.json")
    config = net.config
    if config.in_channels != 3 or config.out_channels not in (3, 6):
        raise ValueError(f"{name} has {config.in_channels} channels in and {config.out_channels} out; expected 3 and 3")
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise ValueError(f"{name} is a class-conditional model; name an unconditional one")
    size = config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"{name} names no square image size (sample_size={size!r})")
    check_choice(plan.config.prediction_type, PREDICTIONS, f"prediction_type of {name}")
    clip = float(plan.config.clip_sample_range) if plan.config.clip_sample else None
    return Model(net, size, plan.alphas_cumprod.double(), plan.config.prediction_type, clip)
