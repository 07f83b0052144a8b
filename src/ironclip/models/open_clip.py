"""`open_clip:NAME/TAG`, `open_clip:hf-hub:ORG/NAME`, `open_clip:/folder`: models of the open_clip library.

The extra `open-clip` brings it. Published robust checkpoints (TeCoA, FARE) are hub repositories of this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ironclip.core.parts import Parts, warn_truncated
from ironclip.core.vlm import VLM
from ironclip.models.clip_rules import MAX_SCALE, MEAN, STD, Tokenize, check_quick_gelu, first_index
from ironclip.models.open_clip_towers import CausalText, FullText, OpenClipImage, OpenClipViT


def wrap_open_clip(model: Any, tokenizer: Any, name: str) -> VLM:
    """A model of the library as a VLM that shares its modules; put into eval mode.

    ``tokenizer``: as ``open_clip.get_tokenizer`` gives it, or None if you encode token ids only. The temperature is
    capped at 100, as in CLIP, except for sigmoid models. Raises ValueError for weights by OpenAI without QuickGELU and
    for a text tower whose pooling we do not know.
    """
    check_quick_gelu([name], activations(model), "use the -quickgelu variant of the model, or set quick_gelu")
    part = getattr(model, "text", model)
    pool = getattr(part, "text_pool_type", getattr(part, "pool_type", None))
    causal = getattr(part, "attn_mask", None) is not None and getattr(part, "cls_emb", None) is None
    if causal and pool not in ("argmax", "eos"):
        raise ValueError(f"{name}: a causal text tower pooled by {pool!r} is not supported; expected argmax or eos")
    if not causal and part is model:
        raise ValueError(f"{name}: a text tower without a causal mask needs custom_text in its configuration")
    eot = partial(first_index, token=_eos(part) if pool == "eos" else None)
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    batch_first = getattr(getattr(visual, "transformer", None), "batch_first", False)
    by_token = blocks is not None and getattr(visual, "attn_pool", 1) is None and visual.pool_type == "tok"
    image = OpenClipViT(visual) if by_token else OpenClipImage(visual)
    text: nn.Module = CausalText(part, eot) if causal else FullText(part)
    tokens = "text." if causal else "text.tower."
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    pixels = getattr(visual, "preprocess_cfg", {})
    bias = getattr(model, "logit_bias", None)
    scale = float(model.logit_scale.detach().exp().flatten()[0])
    model.eval()
    with torch.no_grad():
        dim = image(torch.zeros(1, 3, size, size)).shape[-1]
    return VLM(
        name,
        image,
        text,
        None if tokenizer is None else warned(tokenizer, model.context_length),
        image_size=size,
        dim=dim,
        scale=scale if bias is not None else min(scale, MAX_SCALE),
        mean=pixels.get("mean", MEAN),
        std=pixels.get("std", STD),
        eot=eot if causal else None,
        causal=causal,
        parts=Parts(
            token_embedding=tokens + "token_embedding" if hasattr(part, "token_embedding") else "",
            vision_blocks="image.visual.transformer.resblocks" if blocks is not None and batch_first else "",
            vision_width=blocks[0].ln_1.weight.shape[0] if blocks is not None else 0,
            patch_grid=tuple(visual.grid_size) if by_token else (0, 0),
        ),
        facts={
            "tower": "transformer" if blocks is not None else type(visual).__name__,
            "max_tokens": model.context_length,
            "activation": activations(model)[0] if activations(model) else "",
            **({} if bias is None else {"logit_bias": float(bias.detach().flatten()[0])}),
        },
    )


def load_open_clip(rest: str) -> VLM:
    """``ViT-B-32/openai`` (model/tag or model/file), ``hf-hub:org/name``, or a folder with open_clip_config.json.

    Weights are read from safetensors, or from a pickle restricted to tensors; QuickGELU is taken from the tag. Raises
    ValueError for an unknown model or tag and for weights that do not fit, FileNotFoundError where neither folder,
    cache nor hub has the files, ImportError without the extra.
    """
    library = _library()
    quick, tag = False, None
    folder = Path(rest).expanduser()
    if rest.startswith("hf-hub:"):
        source = rest
    elif rest and folder.is_dir():
        _check_folder(rest, folder)
        source = f"local-dir:{folder}"
    else:
        source, tag, quick = _known(library, rest)
    try:
        model = library.create_model(
            source, tag, precision="fp32", force_quick_gelu=quick, require_pretrained=True, weights_only=True
        )
        tokenizer = library.get_tokenizer(source)
    except SafetensorError as err:
        raise ValueError(f"open_clip:{rest}: the weight file is damaged ({err}); fetch it again") from err
    except (RuntimeError, OSError) as err:
        reason = " ".join(str(err).split())[:300] or type(err).__name__
        if source.startswith("local-dir:") or (tag and Path(tag).is_file()):
            raise ValueError(f"open_clip:{rest}: the weights do not fit the model's configuration ({reason})") from err
        raise FileNotFoundError(
            f"open_clip:{rest} could not be loaded: tried the local hub cache, then the hub ({reason}). Without a "
            "connection, fetch the repository elsewhere and write open_clip:/path/to/folder, a folder with "
            "open_clip_config.json and open_clip_model.safetensors"
        ) from err
    if quick and "gelu" in activations(model):
        raise ValueError(f"open_clip:{rest}: the tag {tag} needs quick_gelu, got {', '.join(activations(model))}")
    return wrap_open_clip(model, tokenizer, f"open_clip:{rest}")


def activations(model: Any) -> list[str]:
    """ "quick_gelu" or "gelu" of the transformer blocks, vision first; a convolutional tower has none."""
    found = []
    for tower in (model.visual, getattr(model, "text", model)):
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is not None:
            found.append("quick_gelu" if type(blocks[0].mlp.gelu).__name__ == "QuickGELU" else "gelu")
    return found


def warned(tokenizer: Any, context: int) -> Tokenize:
    """The library's tokenizer, with a warning for texts that it cuts at ``context``."""

    def tokenize(texts: Sequence[str]) -> Tensor:
        ids: Tensor = tokenizer(list(texts))
        unpadded = [t for t, row in zip(texts, ids, strict=True) if bool(row[-1] != row[-2])]
        beyond = {t: tokenizer([t], context_length=8 * context)[0, context:] for t in unpadded}
        warn_truncated([t for t, rest in beyond.items() if bool((rest != rest[-1]).any())], context)
        return ids

    return tokenize


def _eos(part: Any) -> int:
    return int(part.text_eos_id if hasattr(part, "text_eos_id") else part.eos_id)


def _library() -> Any:
    try:
        import open_clip
    except ImportError as err:
        raise ImportError(f'open_clip: models need an extra; type pip install "ironclip[open-clip]" ({err})') from err
    return open_clip


def _check_folder(rest: str, folder: Path) -> None:
    config = (folder / "open_clip_config.json").is_file()
    weights = any(p.suffix in (".safetensors", ".bin", ".pth") for p in folder.iterdir())
    if not (config and weights):
        raise FileNotFoundError(
            f"open_clip:{rest}: the folder needs open_clip_config.json ({'there' if config else 'missing'}) and "
            f"open_clip_model.safetensors ({'there' if weights else 'missing'})"
        )


def _known(library: Any, rest: str) -> tuple[str, str, bool]:
    """Model, tag or weight file, and whether it was trained with QuickGELU, by the tag or by the model's name."""
    name, _, tag = rest.partition("/")
    if name not in library.list_models():
        near = get_close_matches(name, library.list_models(), n=3, cutoff=0.3)
        raise ValueError(
            f"unknown open_clip model {name!r}; nearest: {', '.join(near) or 'none'}. Write open_clip:ViT-B-32/openai, "
            "open_clip:hf-hub:org/name or open_clip:/path/to/folder"
        )
    tags = library.list_pretrained_tags_by_model(name)
    own = bool(library.get_model_config(name).get("quick_gelu", False))
    if tag not in tags and Path(tag).is_file():
        return name, tag, own
    if tag not in tags:
        near = get_close_matches(tag, tags, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        got = f"unknown tag {tag!r} of {name}" if tag else f"open_clip:{name} names no weights"
        raise ValueError(f"{got}; {hint}write open_clip:{name}/TAG with one of {', '.join(tags) or 'none (a file)'}")
    quick = own or bool(library.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    return name, tag, quick
