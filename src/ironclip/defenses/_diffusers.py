"""Models of the diffusers library, by hub name or folder; imported only when one is named (extra ``diffusion``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def need_diffusers() -> None:
    """Raises ImportError naming our extra."""
    if find_spec("diffusers") is None:
        raise ImportError('the package diffusers is not installed; type pip install "ironclip[diffusion]"')


def from_hub(kind: Any, name: str, folder: str, record: str = "config.json") -> Any:
    """``kind.from_pretrained`` in the sub-folder of a pipeline or, failing that, at the top; weights in float32, from
    safetensors alone. ``record``: the file that describes it. Raises FileNotFoundError that says what was tried.
    """
    source = Path(name).expanduser()
    local = source.is_dir()
    options = {"use_safetensors": True, "low_cpu_mem_usage": False} if record == "config.json" else {}
    reason = f"no {folder}/{record} and no {record} in that folder"
    for place in (folder, None):
        if local and not (source / (place or "") / record).is_file():
            continue
        try:
            return kind.from_pretrained(
                str(source) if local else name, subfolder=place, local_files_only=local, **options
            )
        except OSError as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
    raise FileNotFoundError(
        f"{name} could not be loaded as a {kind.__name__}: tried it as a folder, the local hub cache and the hub "
        f"({reason}). Without a connection, fetch the repository elsewhere and name its folder, with {record}"
        f"{' and diffusion_pytorch_model.safetensors' if options else ''}"
    )
