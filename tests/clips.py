"""Small random CLIPs in transformers' layout with a byte tokenizer, and the same weights in open_clip's layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from toys import generator
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

import ironclip
from ironclip.core.vlm import VLM
from ironclip.models.hf import wrap_clip

CONTEXT, EOS, GRID, SIZE = 24, 257, 4, 32
TEXTS = ["a cat", "two dogs run", "x"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 begins a text, 257 ends it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<begin>", "<end>"])
    raw.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 256), ("<end>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<begin>", eos_token="<end>", pad_token="<end>", model_max_length=CONTEXT
    )


def randomised(model: nn.Module, seed: int) -> Any:
    """The model in eval mode with weights of a useful size drawn from ``seed``; temperature 50."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("logit_scale"):
                p.fill_(math.log(50))
            elif p.ndim > 1:
                p.copy_(noise / math.sqrt(p[0].numel()))
            else:
                p.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def _tower(width: int, layers: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": act,
    }


def _configs(act: str, eos: int) -> dict[str, Any]:
    text = {"vocab_size": 258, "max_position_embeddings": CONTEXT, "bos_token_id": 256, "eos_token_id": eos}
    return {
        "text_config": {**_tower(32, 2, act), **text, "projection_size": 48},
        "vision_config": {**_tower(48, 3, act), "image_size": SIZE, "patch_size": SIZE // GRID},
    }


def small_clip(act: str = "quick_gelu", eos: int = 2, seed: int = 0) -> CLIPModel:
    """3 vision blocks of width 48 on 4 x 4 patches of 32 pixels, 2 text blocks of width 32, 24 dimensions."""
    return randomised(CLIPModel(CLIPConfig(**_configs(act, eos), projection_dim=24)), seed)


def small_siglip(seed: int = 0) -> SiglipModel:
    return randomised(SiglipModel(SiglipConfig(**_configs("gelu_pytorch_tanh", 1))), seed)


def save(model: Any, folder: Path, pixels: dict[str, Any] | None = None) -> Path:
    """Model, tokenizer and preprocessing file as a hub repository has them."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if pixels is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def images(n: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=generator(seed))


def open_clip_config(act: str) -> dict[str, Any]:
    """The architecture of ``small_clip`` in open_clip's terms."""
    return {
        "embed_dim": 24,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": {"image_size": SIZE, "patch_size": SIZE // GRID, "width": 48, "layers": 3, "head_width": 12},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 258, "width": 32, "heads": 4, "layers": 2},
    }


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """The weights of a transformers CLIP under open_clip's names."""
    theirs = model.state_dict()
    out = {
        "logit_scale": theirs["logit_scale"],
        "text_projection": theirs["text_projection.weight"].T.clone(),
        "visual.proj": theirs["visual_projection.weight"].T.clone(),
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for kind in ("weight", "bias"):
        out |= {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, name in norms.items()}
        for ours, name, n in (("", "text_model", 2), ("visual.", "vision_model", 3)):
            for i in range(n):
                a, b = f"{ours}transformer.resblocks.{i}.", f"{name}.encoder.layers.{i}."
                out[f"{a}attn.in_proj_{kind}"] = torch.cat([theirs[f"{b}self_attn.{m}_proj.{kind}"] for m in "qkv"])
                out[f"{a}attn.out_proj.{kind}"] = theirs[f"{b}self_attn.out_proj.{kind}"]
                pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
                out |= {f"{a}{x}.{kind}": theirs[f"{b}{y}.{kind}"] for x, y in pairs.items()}
    return out


def small_hf() -> VLM:
    """``small_clip`` as a model of the library."""
    return wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()


def small_open_clip() -> VLM:
    """The same weights in open_clip's layout; skips where that library is absent."""
    library = pytest.importorskip("open_clip")
    from ironclip.models.open_clip import wrap_open_clip

    model = library.model.CLIP(**open_clip_config("quick_gelu"))
    model.load_state_dict(to_open_clip(small_clip()), strict=False)

    def tokenize(texts: Sequence[str], context_length: int = CONTEXT) -> Tensor:
        rows = byte_tokenizer()(list(texts), padding="max_length", truncation=True, max_length=context_length)
        return torch.tensor(rows["input_ids"]) * torch.tensor(rows["attention_mask"])

    return wrap_open_clip(model, tokenize, "library").freeze()


MODELS: dict[str, Callable[[], VLM]] = {
    "hf": small_hf, "open_clip": small_open_clip, "tiny": lambda: ironclip.load("tiny")
}  # fmt: skip
