"""Diffusion priors over image embeddings: a small one that we train, and those of the hub by name or folder.

Ours is a residual network of a few layers that sees no text. The hub's are transformers conditioned on text (Ramesh et
al. 2022, arXiv 2204.06125); they get the prompt without a class, as CLIPure gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.diffusion import cosine_kept, noised
from ironclip.core.rng import SampleRNG
from ironclip.core.types import State
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._diffusers import from_hub, need_diffusers

STEPS = 1000
BEATS = 32
"""Pairs of sine and cosine that tell the network the step."""


@dataclass(frozen=True, eq=False)
class Prior:
    """``predict``: noisy points (b, d) and steps (b,) to clean points. ``scaled``: unit directions (b, d) and lengths
    (b,) of the tower's features to the points that the prior was trained on. ``kept``: (1000,) its schedule."""

    predict: Callable[[Tensor, Tensor], Tensor]
    scaled: Callable[[Tensor, Tensor], Tensor]
    kept: Tensor


def initial(dim: int, width: int, depth: int, seed: int) -> State:
    """Start values of our network: it answers sqrt(kept) times what it sees, the best guess without knowledge."""

    def drawn(name: str, rows: int, columns: int) -> Tensor:
        return SampleRNG.of(seed, [name]).fold("prior").normal(rows, columns)[0] / math.sqrt(columns)

    out = {"in_w": drawn("in", width, dim), "in_b": torch.zeros(width), "step_w": drawn("step", width, 2 * BEATS)}
    for i in range(depth):
        out |= {f"up{i}_w": drawn(f"up{i}", 2 * width, width), f"up{i}_b": torch.zeros(2 * width)}
        out |= {f"down{i}_w": torch.zeros(width, 2 * width), f"down{i}_b": torch.zeros(width)}
    return out | {"out_w": torch.zeros(dim, width), "out_b": torch.zeros(dim)}


def denoise(w: Mapping[str, Tensor], z: Tensor, t: Tensor, kept: Tensor) -> Tensor:
    """Our network: noisy points (b, d) at steps (b,) to clean ones.

    Skip and output are scaled as for points of unit variance (Karras et al. 2022, arXiv 2206.00364), so that nothing
    has to be learned to pass a nearly clean point on.
    """
    pace = torch.exp(torch.linspace(0, math.log(1e-4), BEATS, device=z.device, dtype=z.dtype))
    beat = t.to(z)[:, None] * pace
    share = kept.to(z)[t][:, None]
    h = F.linear(z, w["in_w"], w["in_b"]) + F.linear(torch.cat([beat.sin(), beat.cos()], dim=1), w["step_w"])
    for i in range(sum(k.startswith("up") and k.endswith("_w") for k in w)):
        inner = F.silu(F.linear(F.layer_norm(h, h.shape[1:]), w[f"up{i}_w"], w[f"up{i}_b"]))
        h = h + F.linear(inner, w[f"down{i}_w"], w[f"down{i}_b"])
    out = F.linear(F.layer_norm(h, h.shape[1:]), w["out_w"], w["out_b"])
    return share.sqrt() * z + (1 - share).sqrt() * out


def denoising_loss(w: Mapping[str, Tensor], z: Tensor, rng: SampleRNG, kept: Tensor) -> Tensor:
    """(b,) mean squared error of the clean points, each at a step and with noise of its own stream."""
    t = rng.fold("step").integers(0, STEPS).to(z.device)
    x_t = noised(z, rng.fold("noise").normal_like(z), kept.to(z)[t])
    return (denoise(w, x_t, t, kept) - z).square().mean(dim=1)


def own_prior(w: Mapping[str, Tensor]) -> Prior:
    """Our network's prior; points are unit features times sqrt(d), as the published one has them."""
    kept = cosine_kept(STEPS)

    def scaled(u: Tensor, _length: Tensor) -> Tensor:
        return u * math.sqrt(u.shape[1])

    return Prior(lambda z, t: denoise(w, z, t, kept), scaled, kept)


def hub_prior(name: str, clf: ZeroShot, null: Tensor) -> Prior:
    """A ``diffusers`` prior by hub name or folder, conditioned on ``null`` (d,), a text feature of the tower's length.

    Points are the tower's features, not normalised, shifted and divided by the statistics stored with the prior, which
    predicts clean points on the cosine schedule, as the unCLIP priors of the hub do. The text's token states are not at
    hand; the pooled feature stands in each of their places, as in CLIPure's code.
    Raises ValueError for a prior of another kind or width or without statistics, FileNotFoundError where there is none,
    ImportError without the extra ``diffusion``.
    """
    net = _loaded(name).to(clf.vlm.device)
    width, own = net.config.embedding_dim, clf.vlm.dim
    if width != own:
        raise ValueError(
            f"the prior {name} has embeddings of {width} dimensions, {clf.vlm.name} has {own}; "
            "the DALL-E 2 priors of the hub belong to OpenAI's ViT-L/14 (768)"
        )
    if net.encoder_hidden_states_proj is None or net.prd_embedding is None:
        raise ValueError(f"{name} is no prior of image embeddings given a text; name the prior of an unCLIP model")
    mean, std = net.clip_mean.detach()[0], net.clip_std.detach()[0]
    if not bool((std > 0).all()):
        raise ValueError(f"the prior {name} holds no statistics of embeddings (clip_std is not positive)")
    text = null[None].to(mean)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        b, tokens = z.shape[0], net.config.num_embeddings
        states, mask = text[:, None].expand(b, tokens, -1), torch.ones(b, tokens, device=z.device)
        out: Tensor = net(z, t, text.expand(b, -1), states, mask).predicted_image_embedding
        return out

    def scaled(u: Tensor, length: Tensor) -> Tensor:
        return (length[:, None] * u - mean) / std

    return Prior(predict, scaled, cosine_kept(STEPS))


@lru_cache(maxsize=2)
def _loaded(name: str) -> Any:
    need_diffusers()
    from diffusers import PriorTransformer

    with torch.inference_mode(False):
        return from_hub(PriorTransformer, name, "prior").eval().requires_grad_(False)
