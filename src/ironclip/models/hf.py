"""`hf:NAME`: CLIP and SigLIP models of the transformers library, by hub name or local folder.

CLIP: Radford et al. 2021 (arXiv 2103.00020). SigLIP: Zhai et al. 2023 (arXiv 2303.15343).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ironclip.core.parts import Parts
from ironclip.core.vlm import VLM
from ironclip.models.clip_rules import MAX_SCALE, MEAN, STD, check_quick_gelu, first_index, hub_tokenize
from ironclip.models.hf_towers import ClipImage, ClipText, SiglipImage, SiglipText


def wrap_clip(
    model: Any,
    tokenizer: Any,
    name: str,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    size: int | None = None,
) -> VLM:
    """A ``transformers.CLIPModel`` as a VLM that shares its modules; put into eval mode.

    ``tokenizer``: one of transformers, or a function from texts to ids (n, l) that ends each text with the model's
    end-of-text token. ``size``: expected input size, the model's own by default. The temperature is capped at 100, as
    in CLIP. Raises ValueError where tokenizer, activation or size do not fit the model.
    """
    text, vision = model.config.text_config, model.config.vision_config
    _check_size(name, size, vision.image_size)
    source = str(getattr(model.config, "_name_or_path", "") or "")
    check_quick_gelu(
        [name, source], [text.hidden_act, vision.hidden_act], 'set "hidden_act" to "quick_gelu" in its config.json'
    )
    # configurations of before transformers 4.31 say 2 whatever the vocabulary, and mean the largest id
    eos = None if text.eos_token_id == 2 else text.eos_token_id
    eot = partial(first_index, token=eos)
    if hasattr(tokenizer, "eos_token_id"):
        _check_ends(name, tokenizer, eot, text.vocab_size)
        tokenizer = hub_tokenize(tokenizer, text.max_position_embeddings, pad=tokenizer.eos_token_id)
    grid = vision.image_size // vision.patch_size
    return VLM(
        name,
        ClipImage(model),
        ClipText(model),
        tokenizer,
        image_size=vision.image_size,
        dim=model.config.projection_dim,
        scale=min(float(model.logit_scale.detach().exp()), MAX_SCALE),
        mean=mean,
        std=std,
        eot=eot,
        causal=True,
        parts=Parts(
            token_embedding="text.text_model.embeddings.token_embedding",
            vision_blocks="image.vision_model.encoder.layers",
            vision_width=vision.hidden_size,
            patch_grid=(grid, grid),
        ),
        facts={"tower": "transformer", "max_tokens": text.max_position_embeddings, "activation": vision.hidden_act},
    )


def wrap_siglip(
    model: Any,
    tokenizer: Any,
    name: str,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    size: int | None = None,
) -> VLM:
    """A ``transformers.SiglipModel`` as a VLM; arguments as for ``wrap_clip``.

    Texts are padded to the full context, as in training, and read at the last token, so nothing can be cut off. Its
    sigmoid bias shifts all logits alike and changes no prediction; it is kept in ``facts["logit_bias"]``.
    """
    text, vision = model.config.text_config, model.config.vision_config
    _check_size(name, size, vision.image_size)
    if not getattr(model.vision_model, "use_head", True):
        raise ValueError(
            f"{name}: a SigLIP model without its pooling head has no image features; use a full checkpoint"
        )
    if hasattr(tokenizer, "eos_token_id"):
        lower = type(tokenizer).__name__.startswith("Gemma")  # SigLIP 2 was trained on lower-case text only
        tokenizer = hub_tokenize(tokenizer, text.max_position_embeddings, pad=None, lower=lower)
    grid = vision.image_size // vision.patch_size
    return VLM(
        name,
        SiglipImage(model),
        SiglipText(model),
        tokenizer,
        image_size=vision.image_size,
        dim=vision.hidden_size,
        scale=float(model.logit_scale.detach().exp()),
        mean=mean,
        std=std,
        parts=Parts(
            token_embedding="text.text_model.embeddings.token_embedding",
            vision_blocks="image.vision_model.encoder.layers",
            vision_width=vision.hidden_size,
            patch_grid=(grid, grid),
        ),
        facts={
            "tower": "transformer",
            "max_tokens": text.max_position_embeddings,
            "activation": vision.hidden_act,
            "logit_bias": float(model.logit_bias.detach()),
        },
    )


def load_hf(rest: str) -> VLM:
    """``openai/clip-vit-base-patch32``, with ``@REVISION`` if wanted, or a folder as ``save_pretrained`` writes it.

    Weights are read from safetensors, or from a pickle restricted to tensors. Raises ValueError for a model of another
    kind, damaged or incomplete weights or a wrong activation, FileNotFoundError where neither folder, cache nor hub
    has the files.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel, SiglipModel

    if not rest:
        raise ValueError("hf: needs a name or a folder; write hf:openai/clip-vit-base-patch32 or hf:/path/to/folder")
    folder = Path(rest).expanduser()
    options: dict[str, Any] = {}
    if folder.is_dir():
        source, options = str(folder), {"local_files_only": True}
    else:
        source, _, revision = rest.partition("@")
        options |= {"revision": revision} if revision else {}
    with _explained(rest), _quiet():
        config = AutoConfig.from_pretrained(source, **options)
        kinds: dict[str, tuple[Any, Any]] = {"clip": (CLIPModel, wrap_clip), "siglip": (SiglipModel, wrap_siglip)}
        if config.model_type not in kinds:
            raise ValueError(
                f"hf:{rest} is a model of type {config.model_type!r}; expected clip or siglip, for others use VLM.wrap"
            )
        build, wrap = kinds[config.model_type]
        pixels = _pixels(source, options)
        model, report = build.from_pretrained(
            source,
            **options,
            dtype=torch.float32,
            attn_implementation="sdpa",
            weights_only=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            lost = sorted(report["missing_keys"])
            raise ValueError(f"hf:{rest}: the weights lack {len(lost)} tensors, the first is {lost[0]!r}")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return wrap(model, tokenizer, f"hf:{rest}", **pixels)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar of transformers' own while a local file is read in a blink."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pixels(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """mean, std and size of the model's preprocessing file, if any. Raises ValueError for another scale."""
    from transformers.utils.hub import cached_file

    for file in ("processor_config.json", "preprocessor_config.json"):
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **options)
        table = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        table = table if file.startswith("pre") else table.get("image_processor", {})
        if "image_mean" not in table:
            continue
        factor = float(table.get("rescale_factor", 1 / 255))
        if abs(factor * 255 - 1) > 1e-3:
            raise ValueError(f"{source}: {file} rescales bytes by {factor}, expected 1/255")
        size = table.get("crop_size") or table.get("size")
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        return {"mean": table["image_mean"], "std": table["image_std"], "size": size}
    return {}


def _check_size(name: str, wanted: int | None, own: int) -> None:
    if wanted is not None and wanted != own:
        raise ValueError(f"{name}: preprocessing gives {wanted} pixels, but the model takes {own}")


def _check_ends(name: str, tokenizer: Any, eot: Any, vocabulary: int) -> None:
    row = torch.tensor(tokenizer(["a photo"])["input_ids"])
    if int(row.max()) >= vocabulary:
        raise ValueError(f"{name}: the tokenizer knows ids up to {int(row.max())}, the model only {vocabulary}")
    if int(eot(row)[0]) != row.shape[1] - 1 or int(row[0, -1]) != tokenizer.eos_token_id:
        raise ValueError(
            f"{name}: the tokenizer ends 'a photo' as {row[0].tolist()}, but the model does not look for its "
            "end-of-text token there; the tokenizer belongs to another model"
        )


@contextmanager
def _explained(rest: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as err:
        raise ValueError(f"hf:{rest}: the weight file is damaged ({err}); fetch it again") from err
    except OSError as err:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise FileNotFoundError(
            f"hf:{rest} could not be loaded: tried it as a folder, then the local hub cache, then the hub ({reason}). "
            "Without a connection, fetch the repository elsewhere and write hf:/path/to/folder, a folder with "
            "config.json, model.safetensors and the tokenizer's files"
        ) from err
