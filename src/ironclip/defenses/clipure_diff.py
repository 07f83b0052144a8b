"""CLIPure-Diff: the image embedding is moved to where a diffusion prior of embeddings finds it likely.

Zhang, Bi, Chen, Guo, Cheng 2025 (arXiv 2502.18176). Minus the denoising error of a prior stands for the likelihood of
an embedding; ten normalised gradient steps lower it. Published with the DALL-E 2 prior of ViT-L/14 alone. Ours is
trained by ``fit`` on embeddings of unlabelled images of whatever model it is to guard. The published code draws one
step for the whole batch and normalises over it, so that neighbours decide; here, outside ``mode=reference``, every
image has its own draws and its own norm, and the derivative is that of the whole chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.core.check import check_choice, check_images
from ironclip.core.diffusion import cosine_kept, noised
from ironclip.core.grad import forwarded, wants_graph
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG, rng_or_rows
from ironclip.core.spec import method
from ironclip.core.types import Info, State
from ironclip.core.views import Defended
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses._bank import OBJECTIVES, bank_of, build_rows, load_bank
from ironclip.defenses._inner import checkpointed, inner_gradient
from ironclip.defenses._prior import STEPS, Prior, denoising_loss, hub_prior, initial, own_prior
from ironclip.defenses._train import BASE, RECIPE, as_bytes, cast_source, check_base, checked_state, fingerprint
from ironclip.defenses.clipure import null_prompts
from ironclip.training.feed import Batch
from ironclip.training.finetune import Plan, Session, finetune

EXTRA, ROWS = "extra.", "embeddings.safetensors"


@dataclass(frozen=True, eq=False)
class Draw:
    """One step's random numbers: ``t`` (b,) steps of the prior, ``noise`` (b, d)."""

    t: Tensor
    noise: Tensor


@method
class CLIPureDiff:
    """``steps`` steps u <- u - eta g / |g|, normalised. g is the gradient of the prior's squared error at u, noised to
    a step drawn from ``low``..``high`` of 1000; the error's target is differentiated too, as published.

    ``mode``: per_sample, or reference: |g| and the drawn step are those of the batch. ``eta``: 30, the published value,
    replaces the embedding rather than moving it, and at the published 900..999 a prior sees almost nothing of it; with
    0.05 at 400..600, ours, `tiny`'s embeddings turn by 9 degrees and keep their class. ``prior``: fitted (ours, a
    state), or a prior of the hub by name or folder through ``diffusers``, such as 'kakaobrain/karlo-v1-alpha' for
    OpenAI's ViT-L/14, conditioned on the prompt without a class (``null`` as in CLIPure). ``width``, ``depth``: of our
    network. ``recipe``: the loop of its training.

    Costs 1 forward of the image tower and ``steps`` forwards and backwards of the prior; differentiated, one more of
    second order each, computed in backward so that memory holds one step. Raises ValueError for bad fields and images,
    a missing state, one of another model or network, and features of length zero; see ``hub_prior`` for the hub's.
    """

    info: ClassVar[Info] = Info(
        name="clipure_diff",
        title="CLIPure-Diff",
        paradigm="training-free",
        kind="purification",
        paper="Zhang et al. 2025, arXiv 2502.18176",
        code="https://github.com/TMLResearchGroup-CAS/CLIPure",
        randomized=True,
        needs_state=True,
    )
    LABELS: ClassVar[bool] = False
    surrogates: ClassVar[tuple[str, ...]] = ("identity",)
    LOOPS: ClassVar[Mapping[str, Loop]] = {
        "default": Loop(steps=3000, batch_size=256, lr=1e-3, warmup=100, ema=0.995, clip_norm=1.0)
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reference": {
            "mode": "reference", "steps": 10, "eta": 30.0, "low": 900, "high": 999, "null": "imagenet80",
            "prior": "kakaobrain/karlo-v1-alpha",
        }
    }  # fmt: skip

    mode: str = "per_sample"
    steps: int = 10
    eta: float = 0.05
    low: int = 400
    high: int = 600
    prior: str = "fitted"
    null: str = "own"
    width: int = 256
    depth: int = 3
    recipe: str = "default"

    def __post_init__(self) -> None:
        check_choice(self.mode, ("per_sample", "reference"), "mode")
        check_choice(self.null, ("own", "imagenet80"), "null")
        check_choice(self.recipe, self.LOOPS, "recipe")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}; write 10")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"eta must be positive and finite, got {self.eta}; write 0.05")
        if not 0 <= self.low <= self.high < STEPS:
            raise ValueError(f"low and high must satisfy 0 <= low <= high <= 999, got {self.low} and {self.high}")
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.prior:
            raise ValueError("prior names nothing; write prior=fitted, or a hub name or folder in quotes")

    @property
    def needs_state(self) -> bool:
        """Is the prior the one that ``fit`` trains?"""
        return self.prior == "fitted"

    def loop(self) -> Loop:
        """The recipe's loop."""
        return self.LOOPS[self.recipe]

    def fit(
        self, clf: ZeroShot, data: Any, *, loop: Loop | None = None, seed: int = 0, session: Session | None = None
    ) -> State:
        """Encode the images of ``data`` once, without labels, then train the prior on their embeddings.

        In a session's folder the embeddings are kept, and a killed run goes on. Raises ValueError for data or settings
        that cannot be used and for a spec whose prior is the hub's, RuntimeError where training diverges at once.
        """
        if not self.needs_state:
            raise ValueError(f"{self.prior} is trained already; write prior=fitted to train one here")
        used, source, vlm = loop or self.loop(), cast_source(data), clf.vlm
        facts = {
            "data": {"images": len(source), "manifest_hash": source.manifest_hash},
            "preprocessing": {"recipe": getattr(source, "recipe", ""), "size": vlm.image_size},
            "model": {"name": vlm.name, "weights": vlm.weights_hash},
        }
        path = None if session is None or session.folder is None else session.folder / ROWS
        if path is not None and session is not None and session.resume and path.exists():
            bank = load_bank(path, source, facts)
        else:
            bank = bank_of(build_rows(clf, source, [], 0, [], "symmetric", OBJECTIVES["feat_l2"], seed), source, facts)
            if path is not None and session is not None and session.team.leads:
                bank.save(path)
        kept, first = cosine_kept(STEPS), initial(vlm.dim, self.width, self.depth, seed)

        def loss(student: VLM, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            points = F.normalize(x[:, 0], dim=-1) * math.sqrt(vlm.dim)
            weights = {k: student.get_parameter(EXTRA + k) for k in first}
            return denoising_loss(weights, points, batch.rng, kept).mean(), {}

        plan = Plan(clf, lambda _student, batch: batch.x, loss, towers=(), labels=False, extra=first)
        learned = finetune(plan, bank, loop=used, seed=seed, recipe=self._trained_as(), session=session)
        return {**learned, BASE: fingerprint(vlm), RECIPE: as_bytes(self._trained_as())}

    def apply(self, clf: ZeroShot, state: State | None = None) -> Defended:
        """The purifying classifier; randomised, and batchwise in reference mode only."""
        return self._defended(clf, state, "exact")

    def surrogate(self, clf: ZeroShot, state: State | None = None, name: str = "identity") -> Defended:
        """The same values with another derivative. ``identity``: as if nothing were purified (BPDA). ``published``, to
        show what published attacks have seen and not for attacking: each step's direction is a constant."""
        check_choice(name, (*self.surrogates, "published"), "surrogate of CLIPureDiff")
        return self._defended(clf, state, name)

    def prior_of(self, clf: ZeroShot, state: State | None = None) -> Prior:
        """The prior that this spec names. Raises as ``apply`` does."""
        with torch.inference_mode(False), torch.no_grad():  # it outlives the caller's mode
            if not self.needs_state:
                null = clf.vlm.encode_text(null_prompts(clf, self.null), normalize=False).mean(dim=0)
                return hub_prior(self.prior, clf, null)
            state = checked_state(state, self.info.name, self._trained_as())
            check_base(clf.vlm, state)
            weights = {k.removeprefix(EXTRA): v for k, v in state.items() if k.startswith(EXTRA)}
            return own_prior({k: v.to(clf.vlm.device, torch.float32) for k, v in weights.items()})

    def draws(self, stream: SampleRNG, like: Tensor) -> list[Draw]:
        """The random numbers of every step; in reference mode all rows take the first one's step."""
        out = []
        with torch.inference_mode(False):
            for i in range(self.steps):
                t = stream.fold("step", i).integers(self.low, self.high + 1)
                t = t[:1].expand_as(t) if self.mode == "reference" else t
                out.append(Draw(t.to(like.device), stream.fold("noise", i).normal(like.shape[1]).to(like)))
        return out

    def _trained_as(self) -> str:
        return f"CLIPureDiff(width={self.width}, depth={self.depth}, recipe={self.recipe})"

    def _defended(self, clf: ZeroShot, state: State | None, how: str) -> Defended:
        prior, whole = self.prior_of(clf, state), self.mode == "reference"

        def encode(x: Tensor, rng: SampleRNG | None = None) -> Tensor:
            check_images(x, clf.vlm.image_size)
            stream = rng_or_rows(rng, x, "clipure_diff").fold("clipure_diff")
            raw: Tensor = clf.vlm.encode_image(x, normalize=False)
            length = raw.norm(dim=1)
            if bool((length.detach() < 1e-12).any()):
                raise ValueError(f"{clf.vlm.name} gives an image a feature of length zero, which has no direction")
            u = F.normalize(raw, dim=-1)
            draws = self.draws(stream, u)
            if how != "identity":
                return climb(u, length, prior, draws, self.eta, whole, constant=how == "published")
            return forwarded(climb(u.detach(), length.detach(), prior, draws, self.eta, whole), u)

        return Defended(clf, encode, randomized=self.steps > 0, batchwise=whole and self.steps > 0)


def climb(
    u: Tensor, length: Tensor, prior: Prior, draws: list[Draw], eta: float, whole: bool, constant: bool = False
) -> Tensor:
    """Unit directions (b, d) after a step of size ``eta`` per draw; ``whole``: the norm is that of the batch."""

    def step_of(draw: Draw) -> Callable[[Tensor, Tensor], Tensor]:
        def energy(v: Tensor, size: Tensor) -> Tensor:
            z = prior.scaled(v, size)
            x_t = noised(z, draw.noise.to(z), prior.kept.to(z)[draw.t])
            return (prior.predict(x_t, draw.t) - z).square().mean(dim=1)

        def step(u: Tensor, length: Tensor) -> Tensor:
            keep = wants_graph(u) and not constant
            size = length if keep else length.detach().clone()
            g = inner_gradient(lambda v: energy(v, size), u, keep)
            norm = g.norm() if whole else g.norm(dim=1, keepdim=True)
            return F.normalize(u - eta * g / norm.clamp(min=1e-12), dim=-1)

        return step

    for draw in draws:
        step = step_of(draw)
        u = checkpointed(step, u, length) if wants_graph(u) and not constant else step(u, length)
    return u
