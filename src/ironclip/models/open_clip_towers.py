"""The towers of open_clip as modules of our own; nothing of the library is imported here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OpenClipImage(nn.Module):
    """Any image tower of the library: normalised pixels to features (b, d)."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        out = self.visual(x)
        return out[0] if isinstance(out, tuple) else out


class OpenClipViT(OpenClipImage):
    """A vision transformer read at its class token: every patch can be projected the same way."""

    visual: Any

    @property
    def last(self) -> Any:
        """The last block."""
        return self.visual.transformer.resblocks[-1]

    def class_token(self, hidden: Tensor) -> Tensor:
        """What the last block makes of the class token of hidden (b, n, w): (b, 1, w), and nothing else of its work."""
        block, keys = self.last, self.last.ln_1(hidden)
        top = hidden[:, :1] + block.ls_1(block.attn(keys[:, :1], keys, keys, need_weights=False)[0])
        return top + block.ls_2(block.mlp(block.ln_2(top)))

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """The normalisation that tokens pass before the first block."""
        return self.visual.ln_pre(tokens)

    def tokens(self, x: Tensor) -> Tensor:
        out = self.visual.forward_intermediates(x, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return torch.cat([out["image_features"].unsqueeze(1), out["image_intermediates"][0] @ self.visual.proj], dim=1)


class CausalText(nn.Module):
    """Ids (n, l), l at most the context, to the projected state at the end of the text (n, d).

    The library adds all its positions and so takes full contexts only; these are its own modules on the first l.
    """

    attn_mask: Tensor

    def __init__(self, part: Any, eot: Any) -> None:
        super().__init__()
        self.token_embedding, self.transformer = part.token_embedding, part.transformer
        self.ln_final, self.text_projection = part.ln_final, part.text_projection
        self.positional_embedding = part.positional_embedding
        self.register_buffer("attn_mask", part.attn_mask, persistent=False)
        self.eot = eot

    def forward(self, ids: Tensor) -> Tensor:
        n, length = ids.shape
        hidden = self.token_embedding(ids) + self.positional_embedding[:length]
        hidden = self.ln_final(self.transformer(hidden, attn_mask=self.attn_mask[:length, :length]))
        return self._project(hidden[torch.arange(n, device=ids.device), self.eot(ids)])

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.resblocks)

    def packed(self, embeds: Tensor, positions: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        """As for transformers' towers: several texts in a row, states (n, g, d) at ``ends`` (n, g)."""
        hidden = self.transformer(embeds + self.positional_embedding[positions], attn_mask=mask)
        hidden = hidden.gather(1, ends.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self._project(self.ln_final(hidden))

    def _project(self, out: Tensor) -> Tensor:
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(out)
        return out if self.text_projection is None else out @ self.text_projection


class FullText(nn.Module):
    """A text tower that looks in both directions or has tokens of its own (SigLIP, CoCa, BERT): full contexts only."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        out = self.tower(ids)
        return out[0] if isinstance(out, tuple) else out
