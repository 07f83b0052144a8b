"""The one model type: pixels in [0, 1] in, unit features out; normalisation, and nothing else, inside."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.core.check import check_choice
from ironclip.core.hooks import replaced_output
from ironclip.core.parts import Function, Parts, TowerCount
from ironclip.core.space import Space
from ironclip.core.types import State

Tokenize = Callable[[Sequence[str]], Tensor]


class VLM(nn.Module):
    """A dual encoder. Build it with ``ironclip.load(spec)`` or ``VLM.wrap``.

    ``image``: module from normalised pixels (b, 3, h, w) to raw features (b, d). ``text``: module or function from ids
    (n, l) to raw features (n, d). ``tokenize``: texts to ids, padded; without it ``text`` takes the texts.
    ``eot``: ids to the index (n,) of the last token that matters, for trimming: exact where the tower is ``causal``,
    and with ``causal=False`` left to the tower's mask. ``scale``: the temperature applied to cosines (exp of CLIP's
    ``logit_scale``). ``load`` freezes the parameters; ``wrap`` leaves yours as they are.
    """

    def __init__(
        self,
        name: str,
        image: nn.Module,
        text: Callable[[Any], Tensor],
        tokenize: Tokenize | None,
        *,
        image_size: int,
        dim: int,
        scale: float,
        mean: Sequence[float],
        std: Sequence[float],
        eot: Callable[[Tensor], Tensor] | None = None,
        causal: bool = False,
        parts: Parts | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.dim, self.scale = name, image_size, dim, float(scale)
        self.image, self.text, self.tokenize = image, text, tokenize
        self.eot, self.causal = eot, causal
        self.parts = parts or Parts()
        self.facts = facts or {}
        self.precision, self.space, self._input_size = "fp32", Space(), image_size
        self._image_dtype = torch.float32
        self._autocast: torch.dtype | None = None
        self._hash: str | None = None
        self._counts: list[TowerCount] = []
        for label, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"{label} must have 3 values, one per channel, got {len(values)}")
            self.register_buffer(label, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def wrap(
        cls,
        image_fn: Callable[[Tensor], Tensor],
        text_fn: Callable[[Sequence[str]], Tensor],
        size: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        scale: float = 100.0,
        name: str = "wrapped",
    ) -> VLM:
        """Your own towers as a VLM.

        ``image_fn``: normalised pixels (b, 3, size, size) to features (b, d), of any length; ``text_fn``: list of n
        texts to features (n, d). Modules must be in eval mode: dropout would make every figure a lottery.
        Raises ValueError for a module in training mode or towers whose dimensions differ.
        """
        for label, fn in (("image_fn", image_fn), ("text_fn", text_fn)):
            if isinstance(fn, nn.Module) and fn.training:
                raise ValueError(f"{label} is in training mode; call .eval() on it first")
        image = image_fn if isinstance(image_fn, nn.Module) else Function(image_fn)
        first = next(iter(image.parameters()), torch.zeros(1))
        with torch.no_grad():
            d_image = image(torch.zeros(1, 3, size, size, device=first.device)).shape[-1]
            d_text = text_fn(["a photo"]).shape[-1]
        if d_image != d_text:
            raise ValueError(
                f"image_fn gives {d_image} dimensions but text_fn gives {d_text}; they must share one space"
            )
        return cls(name, image, text_fn, None, image_size=size, dim=d_image, scale=scale, mean=mean, std=std).to(
            first.device
        )

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.get_buffer("mean").device

    def normalize_pixels(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] to the tower's input, resized first where the model stands in another space."""
        x = self.space.to_input(x, self._input_size)
        return (x - self.get_buffer("mean")) / self.get_buffer("std")

    def encode_image(self, x: Tensor, normalize: bool = True) -> Tensor:
        """(b, 3, h, w) pixels in [0, 1] to (b, d) float32 features, of unit length unless ``normalize=False``."""
        features: Tensor = self._through_tower(self.image, x)
        self._note_images(x.shape[0], features)
        return F.normalize(features, dim=-1) if normalize else features

    def _through_tower(self, tower: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Normalised, in the tower's precision and memory format; the result in float32 where that was lowered."""
        inputs = self.normalize_pixels(x)
        lowered = self._image_dtype != torch.float32
        if lowered:
            inputs = inputs.to(self._image_dtype)
        if self.precision != "fp32" or self._autocast is not None or self.facts.get("channels_last"):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self._autocast is not None:
            with torch.autocast(inputs.device.type, dtype=self._autocast):
                return tower(inputs).float()
        return tower(inputs).float() if lowered else tower(inputs)

    def encode_text(self, texts: Sequence[str], batch_size: int = 256, normalize: bool = True) -> Tensor:
        """n texts to (n, d) features, of unit length unless ``normalize=False``. Equal texts are encoded once."""
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings; write [text]")
        unique = list(dict.fromkeys(texts))
        order = sorted(range(len(unique)), key=lambda i: len(unique[i]))
        rows: list[Tensor | None] = [None] * len(unique)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            encoded = self._encode_strings([unique[i] for i in chunk], normalize)
            for i, row in zip(chunk, encoded, strict=True):
                rows[i] = row
        where = {t: i for i, t in enumerate(unique)}
        kept = [r for r in rows if r is not None]
        return torch.stack([kept[where[t]] for t in texts]) if kept else torch.zeros(0, self.dim, device=self.device)

    def _encode_strings(self, texts: list[str], normalize: bool) -> Tensor:
        if self.tokenize is not None:
            return self.encode_tokens(self.tokenize(texts), normalize=normalize)
        for count in self._counts:
            count.texts += len(texts)
        features = self.text(texts)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_tokens(self, ids: Tensor, embeds: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Token ids (n, l) to (n, d) features. ``embeds`` (n, l, w) stand in for the token embeddings (soft prompts).

        On a causal tower everything after the longest end-of-text token is cut off first: exact, and much faster.
        Raises ValueError if ``embeds`` does not fit ``ids`` or the model has no token embedding.
        """
        ids = ids.to(self.device)
        if embeds is not None and embeds.shape[:2] != ids.shape:
            raise ValueError(f"embeds must be (n, l, w) with (n, l) = {tuple(ids.shape)}, got {tuple(embeds.shape)}")
        if self.causal and self.eot is not None and ids.numel():
            last = int(self.eot(ids).max()) + 1
            ids, embeds = ids[:, :last], None if embeds is None else embeds[:, :last]
        for count in self._counts:
            count.texts += ids.shape[0]
        if embeds is None:
            features = self.text(ids)
        else:
            with replaced_output(self.token_embedding, embeds):
                features = self.text(ids)
        return F.normalize(features, dim=-1) if normalize else features

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """(n, l) ids to (n, l, w) token embeddings, where soft prompts start."""
        out: Tensor = self.token_embedding(ids.to(self.device))
        return out

    @property
    def token_embedding(self) -> nn.Module:
        """Module from ids (n, l) to embeddings (n, l, w). Raises ValueError if the model shows none."""
        if not self.parts.token_embedding:
            raise ValueError(
                f"{self.name} has no token embedding; soft prompts need an hf:, open_clip: or embedded model"
            )
        return self.get_submodule(self.parts.token_embedding)

    @property
    def vision_blocks(self) -> list[nn.Module]:
        """Batch-first transformer blocks of the image tower. Raises ValueError for a tower without any."""
        if not self.parts.vision_blocks:
            raise ValueError(
                f"{self.name} has no transformer image tower; deep visual prompts need one: tiny, "
                "hf:openai/clip-vit-base-patch32 or open_clip:ViT-B-32"
            )
        return list(self.get_submodule(self.parts.vision_blocks).children())

    def patch_tokens(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) pixels in [0, 1] to (b, p, d) local features in the joint space, row by row, not normalised.

        Raises ValueError if the model has none.
        """
        return self.image_tokens(x)[:, 1:]

    def image_tokens(self, x: Tensor) -> Tensor:
        """One pass to (b, 1 + p, d): the image feature of ``encode_image`` before it is normalised, then the patches.

        Raises ValueError if the model has no patches.
        """
        tokens: Tensor = self._through_tower(self.token_tower, x)
        self._note_images(x.shape[0], tokens)
        return tokens

    @property
    def token_tower(self) -> Callable[[Tensor], Tensor]:
        """Normalised pixels to tokens (b, 1 + p, d). Raises ValueError if the model has none."""
        tower: Callable[[Tensor], Tensor] | None = getattr(self.image, "tokens", None)
        if tower is None:
            raise ValueError(f"{self.name} exposes no patch tokens; use an hf:, open_clip: or embedded model")
        return tower

    @property
    def weights_hash(self) -> str:
        """SHA-256 over every tensor by sorted name, of the fp32 weights as loaded."""
        if self._hash is None:
            digest = hashlib.sha256()
            for key, value in sorted(self.state_dict().items()):
                digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            digest.update(repr((self.scale, self.get_buffer("mean").flatten().tolist())).encode())
            self._hash = digest.hexdigest()
        return self._hash

    def with_state(self, state: State, prefix: str = "") -> VLM:
        """A copy with some tensors replaced; towers that do not change are shared.

        Keys are ``image.*`` and ``text.*`` names of ``state_dict()``, optionally behind ``prefix``. Raises ValueError
        for tensors that this model does not have or of another shape: the state was fitted on another backbone.
        """
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        own = self.state_dict()
        for key, value in state.items():
            if key not in own:
                raise ValueError(
                    f"state tensor {key!r} does not exist in {self.name}; it was fitted on another backbone"
                )
            if own[key].shape != value.shape:
                want, got = tuple(own[key].shape), tuple(value.shape)
                raise ValueError(f"state tensor {key!r} has shape {got}, {self.name} needs {want}: another backbone")
        changed = {key.split(".", 1)[0] for key in state}
        new = self._shallow()
        for tower in changed:
            setattr(new, tower, copy.deepcopy(getattr(self, tower)))
        new.load_state_dict(state, strict=False)
        new._hash = None
        return new

    def at_precision(self, precision: str) -> VLM:
        """``fp32``: this model. ``bf16``: a copy whose image tower computes in bfloat16, channels-last.

        Pixels, features and heads stay float32. Results found in bf16 must be checked again in fp32 before they count.
        """
        check_choice(precision, ("fp32", "bf16"), "precision")
        if precision == self.precision:
            return self
        if precision == "fp32":
            raise ValueError("a bf16 copy cannot go back to fp32; keep the original model")
        new = self._shallow()
        weights = self.weights_hash
        image = copy.deepcopy(self.image)
        cast = getattr(image, "to_precision", None)
        new.image = cast(torch.bfloat16) if cast else image.to(torch.bfloat16)
        new.image.to(memory_format=torch.channels_last)
        new.precision, new._image_dtype, new._hash = precision, torch.bfloat16, weights
        return new

    def in_space(self, space: str | Space) -> VLM:
        """A view of this model that takes images of ``native:SIZE`` or ``file:SIZE`` (``core/space.py``).

        Budgets then apply to those pixels, and so do defenses that change pixels; weights are shared. Raises ValueError
        for another word, or for a model that already stands in such a space.
        """
        space = Space.parse(space) if isinstance(space, str) else space
        if space == self.space:
            return self
        if self.space != Space():
            raise ValueError(f"{self.name} already stands in {self.space}; start from the model itself")
        new, new_hash = self._shallow(), self.weights_hash
        new.space, new.image_size, new.name, new._hash = space, space.size, f"{self.name}@{space}", new_hash
        return new

    def with_texts(self, change: Callable[[str], str], name: str) -> VLM:
        """A view of this model that encodes ``change(text)`` in place of every text; weights are shared.

        Token ids and soft prompts are left as they are. ``name`` joins the model's own, which tells results apart.
        """
        new, tokenize, text = self._shallow(), self.tokenize, self.text
        new.name, new._hash = f"{self.name}+{name}", self.weights_hash
        if tokenize is not None:
            new.tokenize = lambda texts: tokenize([change(t) for t in texts])
        else:
            new.text = Function(lambda texts: text([change(t) for t in texts]))
        return new

    def under_autocast(self, precision: str) -> VLM:
        """``fp32``: this model. ``bf16``: a view of the very same weights whose image tower multiplies in bfloat16.

        For training: gradients reach the fp32 weights. Features are float32.
        """
        check_choice(precision, ("fp32", "bf16"), "precision")
        if precision == "fp32":
            return self
        new = self._shallow()
        new._autocast = torch.bfloat16
        return new

    @contextmanager
    def counting(self) -> Iterator[TowerCount]:
        """Count tower passes made by this model and its precision and state copies inside the block."""
        count = TowerCount()
        self._counts.append(count)
        try:
            yield count
        finally:
            self._counts.remove(count)

    def _note_images(self, b: int, out: Tensor) -> None:
        if not self._counts:
            return
        counts = list(self._counts)
        for count in counts:
            count.forwards += b
        if out.requires_grad:

            def back(_grad: Tensor) -> None:
                for count in counts:
                    count.backwards += b

            out.register_hook(back)

    def _shallow(self) -> VLM:
        new = copy.copy(self)
        new.__dict__["_modules"] = dict(self._modules)
        new.__dict__["_buffers"] = dict(self._buffers)
        return new

    def freeze(self) -> VLM:
        """No gradients for any parameter; returns self."""
        self.requires_grad_(False)
        return self

    def __repr__(self) -> str:
        return f"VLM({self.name}, {self.image_size} px, d={self.dim}, scale={self.scale:g}, {self.precision})"
