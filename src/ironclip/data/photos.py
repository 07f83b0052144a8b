"""`photos`: the twenty labelled ImageNet photographs that the foolbox package carries, among the 1000
ImageNet names.

File names read imagenet_PLACE_LABEL.jpg. foolbox itself is never imported. A fixed digest of the files guards
against a release that carries other photographs, since figures would no longer be comparable.
"""

from __future__ import annotations

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from ironclip.data.imageset import ImageSet
from ironclip.data.manifest import Options, open_set
from ironclip.data.prompts import choose_prompts, default_names
from ironclip.data.sources import Files

FILES_SHA256 = "614fda491c113314542e7caed709298bdbeab063efe60e15313bb26b58b5f448"
_NAME = re.compile(r"imagenet_(\d{2})_(\d{1,3})\.jpg")


def photos_folder() -> Path | None:
    """Where the photographs lie, or None without foolbox."""
    spec = find_spec("foolbox")
    places = [] if spec is None else [Path(p) / "data" for p in spec.submodule_search_locations or []]
    return next((p for p in places if p.is_dir()), None)


def load_photos(options: Options) -> ImageSet:
    """Open `photos`. Raises ImportError without foolbox, ValueError for other files than the known."""
    base = photos_folder()
    if base is None:
        raise ImportError('the photographs of `photos` come with foolbox; type pip install "ironclip[lite]"')
    found = {p.name: _NAME.fullmatch(p.name) for p in base.iterdir()}
    paths = sorted(name for name, match in found.items() if match)
    digest = files_digest(base, paths)
    if digest != FILES_SHA256:
        raise ValueError(
            f"the {len(paths)} photographs in {base} are not those of foolbox 3.3.4 (digest {digest[:16]}, "
            f"expected {FILES_SHA256[:16]}); reinstall with pip install --force-reinstall foolbox==3.3.4"
        )
    labels = [int(match[2]) for p in paths if (match := found[p])]
    chosen = choose_prompts(options.prompts, "imagenet", default_names("imagenet"), default="generic")
    return open_set("photos", Files(base, tuple(paths)), labels, chosen, options)


def files_digest(base: Path, paths: list[str]) -> str:
    """Hex SHA-256 over name and content of the files in order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.encode() + b"\0" + hashlib.sha256((base / path).read_bytes()).digest())
    return whole.hexdigest()
