"""Image files on disk: find the root, decode each file once for its hash, refuse or skip the bad ones, read
pixels.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from ironclip.data.decode import BadImageError, content_hash, decode
from ironclip.data.preprocess import preprocess

_SHOWN = 10


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


@dataclass(frozen=True)
class FileReader:
    """Reads `base / paths[row]`, preprocessed by `recipe`."""

    base: Path
    paths: tuple[str, ...]
    recipe: str

    def __call__(self, rows: Sequence[int]) -> Tensor:
        out = []
        for r in rows:
            try:
                out.append(preprocess(decode(self.base / self.paths[r]), self.recipe))
            except BadImageError as err:
                raise ValueError(
                    f"{self.base / self.paths[r]}: {err}; it was readable when the set was opened"
                ) from err
        return torch.stack(out)


def hash_files(base: Path, paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Decode every file once: (content hash of each path or "" if bad, list of (path, reason)).

    Hashes of files whose size and modification time are unchanged come from a small cache in the folder
    IRONCLIP_CACHE (default ~/.cache/ironclip); without a writable one every file is decoded again.
    """
    store = _cache_file(base)
    known = _read_cache(store)

    def one(path: str) -> tuple[str, list[int | str], str]:
        try:
            stat = (base / path).stat()
            seen = known.get(path)
            if seen and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
                return str(seen[2]), seen, ""
            digest = content_hash(decode(base / path))
        except OSError as err:
            return "", [], f"cannot be read ({err.strerror or err})"
        except BadImageError as err:
            return "", [], str(err)
        return digest, [stat.st_size, stat.st_mtime_ns, digest], ""

    with ThreadPoolExecutor(
        max_workers=min(8, os.cpu_count() or 1)
    ) as pool:  # Pillow decodes outside the lock
        results = list(pool.map(one, paths))
    fresh = {p: entry for p, (_, entry, _) in zip(paths, results, strict=True) if entry}
    if any(known.get(p) != entry for p, entry in fresh.items()):
        _write_cache(store, {**known, **fresh})
    bad = [(p, reason) for p, (_, _, reason) in zip(paths, results, strict=True) if reason]
    return [digest for digest, _, _ in results], bad


def refuse_bad(name: str, bad: Sequence[tuple[str, str]], skip_bad: bool) -> None:
    """Raise ValueError naming up to ten bad files, unless they are to be skipped."""
    if not bad or skip_bad:
        return
    lines = "".join(f"\n  {path}: {reason}" for path, reason in bad[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    count = "1 bad file" if len(bad) == 1 else f"{len(bad)} bad files"
    raise ValueError(
        f"{name} has {count}:{lines}{more}\nrepair or remove them, or leave them out with --skip-bad"
    )


def _cache_file(base: Path) -> Path:
    home = os.environ.get("IRONCLIP_CACHE")
    folder = Path(home) if home else Path.home() / ".cache" / "ironclip"
    return folder / "hashes" / f"{sha256(str(base.resolve()).encode()).hexdigest()[:24]}.json"


def _read_cache(store: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
    if (
        not isinstance(content, dict)
        or content.get("format") != 1
        or not isinstance(content.get("files"), dict)
    ):
        return {}
    return {k: v for k, v in content["files"].items() if isinstance(v, list) and len(v) == 3}


def _write_cache(store: Path, files: dict[str, list[int | str]]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=store.parent, prefix=store.stem, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump({"format": 1, "files": files}, file)
        os.replace(temp, store)
    except OSError:
        return  # only speed is lost
