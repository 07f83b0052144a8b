"""The towers of transformers' CLIP and SigLIP as plain modules; state names stay those of the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClipImage(nn.Module):
    """Normalised pixels to projected class token (b, d); ``tokens`` sends every patch the same way."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values=x).pooler_output)

    @property
    def last(self) -> Any:
        """The last block."""
        return self.vision_model.encoder.layers[-1]

    def class_token(self, hidden: Tensor) -> Tensor:
        """What the last block makes of the class token of hidden (b, n, w): (b, 1, w), and nothing else of its work."""
        block, keys = self.last, self.last.layer_norm1(hidden)
        a = block.self_attn
        parts = (a.q_proj(keys[:, :1]), a.k_proj(keys), a.v_proj(keys))
        q, k, v = (t.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=a.scale).transpose(1, 2).flatten(2)
        top = hidden[:, :1] + a.out_proj(mixed)
        return top + block.mlp(block.layer_norm2(top))

    def pre_norm(self, tokens: Tensor) -> Tensor:
        """The normalisation that tokens pass before the first block."""
        return self.vision_model.pre_layrnorm(tokens)

    def tokens(self, x: Tensor) -> Tensor:
        out = self.vision_model(pixel_values=x)
        patches = self.vision_model.post_layernorm(out.last_hidden_state[:, 1:])
        first = self.visual_projection(out.pooler_output)
        return torch.cat([first.unsqueeze(1), self.visual_projection(patches)], dim=1)


class ClipText(nn.Module):
    """Ids (n, l) to the projected state at the end of the text (n, d)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_projection(self.text_model(input_ids=ids).pooler_output)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.text_model.encoder.layers)

    def packed(self, embeds: Tensor, positions: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        """Several texts in each row of embeds (n, l, w): the projected states (n, g, d) at ``ends`` (n, g).

        ``positions``: (l,) places in their texts. ``mask``: (l, l), 0 where a token looks and -inf where it must not.
        """
        model = self.text_model
        hidden = embeds + model.embeddings.position_embedding(positions)
        hidden = model.encoder(inputs_embeds=hidden, attention_mask=mask[None, None]).last_hidden_state
        hidden = hidden.gather(1, ends.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.text_projection(model.final_layer_norm(hidden))


class SiglipImage(nn.Module):
    """Normalised pixels to attention-pooled features (b, d); for ``tokens`` the pooling sees one patch alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_model(pixel_values=x).pooler_output

    def tokens(self, x: Tensor) -> Tensor:
        out = self.vision_model(pixel_values=x)
        patches = out.last_hidden_state
        alone = self.vision_model.head(patches.flatten(0, 1).unsqueeze(1)).view(patches.shape)
        return torch.cat([out.pooler_output.unsqueeze(1), alone], dim=1)


class SiglipText(nn.Module):
    """Ids (n, context), padded to the full context, to the state of the last token (n, d): no mask at all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model = model.text_model

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(input_ids=ids).pooler_output
