"""A trained CLIP as a folder that transformers, and therefore ``hf:FOLDER``, opens."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ironclip.training.architecture import MEAN, STD
from ironclip.training.checkpoint import write_json

WEIGHTS = "model.safetensors"


def save_model(model: Any, tokenizer: Any, out: Path, image_size: int) -> dict[str, str]:
    """Write weights (rounded to float16), config, tokenizer and preprocessing; returns file name to SHA-256.

    The config says float32: the weights are stored short and computed with in full.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as name:
        aside = Path(name)
        tensors = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        model.config.architectures = ["CLIPModel"]
        model.config.save_pretrained(aside)
        tokenizer.backend_tokenizer.no_padding()  # settings of the last call, not of the vocabulary
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.save_pretrained(aside)
        size = {"height": image_size, "width": image_size}
        write_json(
            aside / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": image_size},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": size,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(MEAN),
                "image_std": list(STD),
                "do_convert_rgb": True,
            },
        )
        hashes = {}
        for path in sorted(aside.iterdir()):
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            path.chmod(0o644)  # the weights' writer keeps them to its user
            os.replace(path, out / path.name)
    return hashes
