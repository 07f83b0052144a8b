"""`tiny`: CLIP's own architecture at 64 pixels, trained on `shapes` by `ironclip pretrain`; nothing is downloaded.

A version is a transformers folder that ships with the package and never changes: another training is another version,
so that figures stay comparable. How it was made and how good it is stands in its README and manifest. It knows
coloured shapes and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from ironclip.core.vlm import VLM
from ironclip.models.hf import load_hf
from ironclip.models.weights import check_sha256

VERSIONS: dict[str, dict[str, str]] = {
    "v1": {
        "config.json": "d3c87289f839a48a5a6f0a61c88d48576bb779fc90bd63f36b3711090d209f98",
        "model.safetensors": "4f607366c87ac1bf97077db10de4c13ac0bd74a2713cd46808e5779cf9fbecd6",
        "preprocessor_config.json": "e4f256a088896674aab4446c1e34b6f702ce1ffc3f33749780973d5fcf6d8f43",
        "tokenizer.json": "3aa1fd0d4810183a939c75417c42ffd4d7c1c28783a566eaa585022c9238b88e",
        "tokenizer_config.json": "fc0c39b164b3ed8852a82470cbf1bef6c79d0b88dd813dfee6e562c29f5cda0d",
    },
}
NEWEST = "v1"


def folder_of(version: str = NEWEST) -> Path:
    """Where the files of a version lie; ``hf:FOLDER`` opens them too."""
    return Path(__file__).with_name(f"tiny_{version}")


def load_tiny(rest: str = "", *, folder: Path | None = None) -> VLM:
    """``""`` or ``v1``: the model `tiny-v1`, 64 px, d = 128. ``folder`` names its files elsewhere than in the package.

    Raises ValueError for an unknown version and for files that are not the ones recorded here.
    """
    version = rest or NEWEST
    if version not in VERSIONS:
        valid = ", ".join(["tiny", *(f"tiny:{v}" for v in VERSIONS)])
        raise ValueError(f"unknown version of tiny {rest!r}; valid: {valid}")
    place = folder_of(version) if folder is None else folder
    for file, expected in VERSIONS[version].items():
        check_sha256(place / file, expected, "type pip install --force-reinstall --no-deps ironclip")
    vlm = load_hf(str(place))
    vlm.name = f"tiny-{version}"
    return vlm
