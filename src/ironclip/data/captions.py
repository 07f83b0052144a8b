"""Images with several captions each, for retrieval: a folder with `captions.json`, or `shapes` with its own sentences.

The folder holds `images/` and `captions.json`, which maps `images/NAME.jpg` to `{"captions": ["...", ...]}`; other keys
of an entry, such as a licence, are left alone. Every image has an entry and every entry an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ironclip.core.check import check_images
from ironclip.data.imageset import Reader
from ironclip.data.load import load_data
from ironclip.data.manifest import hash_images
from ironclip.data.preprocess import check_preprocessing, recipe_id
from ironclip.data.roots import data_root, nearest_folder
from ironclip.data.shapes import ShapesSet
from ironclip.data.sources import Files, SourceReader

FORMS = ("shapes", "shapes:SPLIT", "captions:PATH")
_SHOWN = 10
_LAYOUT = 'expected images/ and captions.json with {"images/NAME.jpg": {"captions": ["a dog on a sofa"]}}'
_DETAILED = (3, 4, 5, 6, 7, 9)  # of the ten sentences about a scene, those that say more than colour, shape and size


@dataclass(frozen=True)
class Picked:
    """Some rows of a reader as a reader of their own: row i is ``rows[i]`` of ``read``."""

    read: Reader
    rows: tuple[int, ...]

    def __call__(self, rows: Sequence[int]) -> Tensor:
        return self.read([self.rows[i] for i in rows])


@dataclass(frozen=True, eq=False)
class CaptionSet:
    """``images``: (n, 3, h, w) float pixels in [0, 1], or a function from row numbers to such a batch, read when asked.

    ``ids``: n distinct stable ids; ``captions``: for each image one sentence or more. Raises ValueError naming the
    images whose captions are missing or empty.
    """

    name: str
    images: Tensor | Reader
    ids: list[str]
    captions: list[list[str]]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"{self.name}: no images; expected at least one image with a caption")
        if isinstance(self.images, Tensor):
            check_images(self.images)
        n = len(self.images) if isinstance(self.images, Tensor) else len(self.ids)
        if not n == len(self.ids) == len(self.captions):
            raise ValueError(
                f"{self.name}: images, ids and captions must have one length, got {n}, {len(self.ids)}, "
                f"{len(self.captions)}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{self.name}: ids must be distinct, got {len(set(self.ids))} different of {n}")
        bad = [(i, _fault(c)) for i, c in zip(self.ids, self.captions, strict=True) if _fault(c)]
        if bad:
            raise ValueError(_listed(f"{self.name}: captions must be lists of sentences, one or more an image", bad))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        """All m captions, image by image."""
        return [text for own in self.captions for text in own]

    @property
    def owner(self) -> Tensor:
        """(m,) int64: the image of each of ``texts``."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor([len(c) for c in self.captions]))

    def take(self, positions: Sequence[int]) -> CaptionSet:
        """The images at ``positions`` with their captions, in that order."""
        images = self.images
        return replace(
            self,
            images=images[list(positions)] if isinstance(images, Tensor) else Picked(images, tuple(positions)),
            ids=[self.ids[i] for i in positions],
            captions=[self.captions[i] for i in positions],
        )

    def subset(self, n: int | None, seed: int = 0) -> CaptionSet:
        """The first ``n`` images in the order of SHA-256(seed, name, id): subset(100) starts subset(1000); None: all.

        Raises ValueError for anything but a whole number of 1 or more.
        """
        if n is None:
            return self
        _check_limit(n)
        keys = [hashlib.sha256(f"{seed}\n{self.name}\n{s}".encode()).digest() for s in self.ids]
        return self.take(sorted(range(len(self)), key=keys.__getitem__)[:n])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield (x, ids): pixels (b, 3, h, w) float32 in [0, 1] and the ids of the rows."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            x = self.images[rows.start : rows.stop] if isinstance(self.images, Tensor) else self.images(list(rows))
            yield x.float(), self.ids[rows.start : rows.stop]


def load_captions(
    spec: str, size: int = 224, *, limit: int | None = None, seed: int = 0, root: Path | None = None
) -> CaptionSet:
    """Open ``shapes``, ``shapes:SPLIT`` or ``captions:PATH`` at ``size`` x ``size`` pixels.

    PATH: absolute, below ``root`` (else the folder IRONCLIP_DATA), or below the working directory; it has
    ``captions.json`` itself or in its sub-folder ``dev``. ``limit``, ``seed``: nested subsets, see ``subset``. Raises
    ValueError for another spec or a folder that is not as described, FileNotFoundError for a path that is not there.
    """
    kind, _, rest = spec.strip().partition(":")
    if limit is not None:
        _check_limit(limit)
    if kind == "shapes":
        return _shapes(spec.strip(), size, limit, seed)
    if kind == "captions":
        return _folder(rest, size, root).subset(limit, seed)
    raise ValueError(
        f"unknown data with captions {spec!r}; valid: {', '.join(FORMS)}; write captions:coco_captions for a folder"
    )


def _shapes(spec: str, size: int, limit: int | None, seed: int) -> CaptionSet:
    """Six sentences an image that name its background or its place: shorter ones are true of other images as well."""
    data = load_data(spec, size, limit=limit, seed=seed)
    assert isinstance(data, ShapesSet)
    said = [data.captions(i) for i in range(len(data))]
    captions = [[own[k] for k in _DETAILED] for own in said]
    return CaptionSet(data.name, Picked(data.read, tuple(data.rows)), list(data.ids), captions)


def _folder(path: str, size: int, root: Path | None) -> CaptionSet:
    base, name = _resolve(path, root)
    file = base / "captions.json"
    table = _table(file)
    if not (base / "images").is_dir():
        raise ValueError(f"{base} has no folder images/; {_LAYOUT}")
    there = {
        p.relative_to(base).as_posix()
        for p in (base / "images").rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(base).parts)
    }
    if not there:
        raise ValueError(f"{base / 'images'} holds no images; {_LAYOUT}")
    bad = [(f, "captions without an image") for f in table if f not in there]
    bad += [(f, "image without captions") for f in sorted(there - set(table))]
    bad += [(f, fault) for f, own in table.items() if f in there and (fault := _fault(own))]
    if bad:
        raise ValueError(_listed(f"{file} and images/ do not fit; {_LAYOUT}", bad))
    files = sorted(table)
    source = Files(base, tuple(files))
    hashes, broken = hash_images(source)
    if broken:
        raise ValueError(
            _listed(f"{name} has images that cannot be used; repair them or remove them with entry", broken)
        )
    recipe = recipe_id("clip", size)
    check_preprocessing(recipe)
    ids = [f"{digest[:16]}:{f}" for digest, f in zip(hashes, files, strict=True)]
    return CaptionSet(name, SourceReader(source, recipe), ids, [table[f] for f in files])


def _resolve(path: str, root: Path | None) -> tuple[Path, str]:
    """The folder that holds captions.json, and the spec that finds it again."""
    if not path.strip():
        raise ValueError("captions: needs a path, for example captions:coco_captions")
    wanted, home = Path(path.strip()).expanduser(), data_root(root)
    tried = [wanted] if wanted.is_absolute() or home is None else [home / wanted, wanted]
    folders = [p for p in tried if p.is_dir()]
    found = [p for at in folders for p in (at, at / "dev") if (p / "captions.json").is_file()]
    if not folders:
        note = "" if home or wanted.is_absolute() else "; set IRONCLIP_DATA to the root of your data sets"
        raise FileNotFoundError(f"captions:{path} does not exist; {nearest_folder(tried[0])}{note}")
    if not found:
        raise ValueError(f"{folders[0]} has no captions.json, nor has its sub-folder dev; {_LAYOUT}")
    base = found[0].resolve()
    for anchor in (home, Path.cwd().resolve()):
        if anchor is not None and base.is_relative_to(anchor):
            return base, f"captions:{base.relative_to(anchor).as_posix()}"
    return base, f"captions:{base.as_posix()}"


def _table(file: Path) -> dict[str, list[str]]:
    """Image file to captions, as written; only the outline is checked here."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{file} is not valid JSON: {err}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ValueError(f"{file} must map image files to entries; {_LAYOUT}")
    if not content:
        raise ValueError(f"{file} names no images; {_LAYOUT}")
    return {f: entry.get("captions") for f, entry in content.items()}


def _fault(captions: object) -> str:
    """What is wrong with the captions of one image; empty if nothing is."""
    if captions is None or captions == []:
        return "no captions"
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        return f"captions must be a list of strings, got {captions!r:.60}"
    empty = [k for k, c in enumerate(captions) if not c.strip()]
    return f"caption {empty[0]} is empty" if empty else ""


def _listed(head: str, bad: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"\n  {file}: {reason}" for file, reason in bad[:_SHOWN])
    return f"{head}:{lines}" + (f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")


def _check_limit(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"limit must be a whole number of images, 1 or more, got {n!r}")
