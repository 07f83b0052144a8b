"""Decode every image of a set once for its content hash; name the bad ones; put the open data set together."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ironclip.data.decode import BadImageError, content_hash
from ironclip.data.imageset import ImageSet, sample_id
from ironclip.data.preprocess import recipe_id
from ironclip.data.prompts import Prompts
from ironclip.data.sources import Source, SourceReader

_SHOWN = 10
Bad = tuple[str, str]  # path, reason


@dataclass(frozen=True)
class Options:
    """What the caller of `load_data` asked for beside the spec; see there."""

    size: int = 224
    prompts: str | None = None
    split: str | None = None
    skip_bad: bool = False
    root: Path | None = None
    recipe: str | None = None


def open_set(
    name: str,
    source: Source,
    labels: Sequence[int | None],
    prompts: Prompts,
    options: Options,
    *,
    origin: str = "",
    bad: Sequence[Bad] = (),
) -> ImageSet:
    """Hash, refuse or skip bad images, and build the set. Rows with the label None are left out.

    `origin` ("tv-test") becomes part of the recipe id: the same preprocessing of another split is another recipe.
    `bad`: problems that the caller found already. Raises ValueError naming up to ten bad files.
    """
    hashes, found = hash_images(source)
    every = [*bad, *found]
    if every and not options.skip_bad:
        lines = "".join(f"\n  {path}: {reason}" for path, reason in every[:_SHOWN])
        more = f"\n  ... and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
        count = "1 bad file" if len(every) == 1 else f"{len(every)} bad files"
        raise ValueError(f"{name} has {count}:{lines}{more}\nrepair or remove them, or leave them out with --skip-bad")
    usable = [i for i, digest in enumerate(hashes) if digest]
    if not usable:
        first = f"; the first is {every[0][0]}: {every[0][1]}" if every else ""
        raise ValueError(f"{name}: none of its {len(hashes)} files is usable{first}")
    names, place = merged(prompts)
    y = {i: place[label] for i in usable if (label := labels[i]) is not None}
    rows = list(y)
    used = recipe_id(options.recipe or prompts.preprocessing, options.size)
    return ImageSet(
        name=name,
        class_names=names,
        templates=prompts.templates,
        prompt_set=prompts.id,
        recipe=f"{used}/{origin}" if origin else used,
        size=options.size,
        labels=[y[i] for i in rows],
        ids=[sample_id(hashes[i], source.paths[i], y[i]) for i in rows],
        read=SourceReader(source, used),
        rows=rows,
        skipped=len(every),
    )


def merged(prompts: Prompts) -> tuple[list[str], list[int]]:
    """Class names and the new label of each class, with classes of equal name made one where the prompts say so."""
    if not prompts.merge:
        return prompts.names, list(range(len(prompts.names)))
    names = list(dict.fromkeys(prompts.names))
    return names, [names.index(n) for n in prompts.names]


def hash_images(source: Source) -> tuple[list[str], list[Bad]]:
    """Decode every image once: (content hash of each row or "" if bad, list of (path, reason)).

    Hashes of rows whose file has an unchanged size and modification time come from a small cache in the folder
    IRONCLIP_CACHE (default ~/.cache/ironclip); without a writable one every image is decoded again.
    """
    kind = f"{type(source).__name__}:{getattr(source, 'strict', False)}:{source.base.resolve()}"
    store = _cache_folder() / "hashes" / f"{sha256(kind.encode()).hexdigest()[:24]}.json"
    known = _read_cache(store)

    def one(row: int) -> tuple[str, list[int | str], str]:
        try:
            stamp = source.stamp(row)
            seen = known.get(source.paths[row])
            if seen and seen[:2] == stamp:
                return str(seen[2]), seen, ""
            digest = content_hash(source.image(row))
        except OSError as err:
            return "", [], f"cannot be read ({err.strerror or err})"
        except BadImageError as err:
            return "", [], str(err)
        return digest, [*stamp, digest], ""

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the lock
        results = list(pool.map(one, range(len(source.paths))))
    fresh = {p: entry for p, (_, entry, _) in zip(source.paths, results, strict=True) if entry}
    if any(known.get(p) != entry for p, entry in fresh.items()):
        _write_cache(store, {**known, **fresh})
    bad = [(p, reason) for p, (_, _, reason) in zip(source.paths, results, strict=True) if reason]
    return [digest for digest, _, _ in results], bad


def _cache_folder() -> Path:
    home = os.environ.get("IRONCLIP_CACHE")
    return Path(home) if home else Path.home() / ".cache" / "ironclip"


def _read_cache(store: Path) -> dict[str, list[int | str]]:
    try:
        content = json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("files"), dict):
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
