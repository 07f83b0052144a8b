"""Where data sets are looked for, and hints for paths that are not there."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path


def data_root(root: Path | None = None) -> Path | None:
    """`root`, else the environment variable IRONCLIP_DATA, else None. It must be a folder."""
    if root is None and not os.environ.get("IRONCLIP_DATA"):
        return None
    path = Path(os.environ["IRONCLIP_DATA"] if root is None else root).expanduser()
    if not path.is_dir():
        named = "root" if root is not None else "IRONCLIP_DATA"
        raise FileNotFoundError(f"{named} must be an existing folder, got {path}; {nearest_folder(path)}")
    return path.resolve()


def nearest_folder(path: Path) -> str:
    """A hint for a missing path: the deepest folder that exists, and what in it is closest to the name asked
    for.
    """
    here, asked = path.absolute(), path.name
    while not here.is_dir():
        here, asked = here.parent, here.name
    inside = sorted(p.name for p in here.iterdir() if p.is_dir() and not p.name.startswith("."))
    near = get_close_matches(asked, inside, n=1)
    if near:
        return f"did you mean {here / near[0]}?"
    listing = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
    return f"the nearest existing folder is {here}" + (f", which has {listing}" if inside else "")
