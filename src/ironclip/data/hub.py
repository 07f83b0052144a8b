"""Data sets of the Hugging Face hub, from its local cache or any local folder: Parquet files or webdataset tars.

Read with pyarrow and tarfile, so that images are found by offset and nothing is unpacked. Labels on the hub are
numbers; what they mean is read from the file itself (ClassLabel) or from classnames.txt beside it, and joined to the
shipped class list by name.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from ironclip.data.layouts import Listing
from ironclip.data.sources import ParquetRows, TarMembers
from ironclip.data.survey import NamedSet

_IMAGE_EXT = ("webp", "jpg", "jpeg", "png")
_LABELS = ("label", "labels", "fine_label", "cls", "class")


def cached(row: NamedSet, *, download: bool = False) -> Path | None:
    """Folder of the hub repository in the local cache, None without one; `download` fetches it where it can."""
    if not row.hub:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(row.hub, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        if not download:
            return None
    patterns = ["*.txt", "*.json", "test/*", "data/validation*", "data/test*"]
    try:
        return Path(snapshot_download(row.hub, repo_type="dataset", allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as err:
        raise FileNotFoundError(
            f"hub:{row.name} is not in the local cache and {row.hub} cannot be fetched ({type(err).__name__}); "
            "run it once while online, or give a local folder: hub:" + row.name + "@PATH"
        ) from err


def read_hub(base: Path, split: str) -> Listing:
    """The images of `split` below `base`. Raises FileNotFoundError or ValueError that say what is there."""
    tars = sorted(base.glob(f"{split}/*.tar")) or sorted(base.glob(f"{split}*.tar"))
    if tars:
        return _read_tars(base, tars)
    every = sorted(base.rglob("*.parquet"))
    wanted = [f for f in every if split in f.stem.split("-") or split in f.relative_to(base).parts[:-1]]
    if not wanted and len(every) == 1 and not set(every[0].stem.split("-")) & {"train", "test", "validation"}:
        wanted = every  # a single file without a split in its name
    if not wanted:
        inside = ", ".join(p.relative_to(base).as_posix() for p in every[:5]) or "no Parquet file and no tar"
        raise FileNotFoundError(f"no split {split!r} in {base}, which has {inside}")
    return _read_parquet(base, wanted)


def _read_parquet(base: Path, files: list[Path]) -> Listing:
    from pyarrow.parquet import ParquetFile

    paths: list[str] = []
    places: list[tuple[str, int, int]] = []
    labels: list[Any] = []
    names: list[str] | None = None
    image = ""
    for file in files:
        relative = file.relative_to(base).as_posix()
        with ParquetFile(file) as opened:
            schema = opened.schema_arrow
            image, label = _columns(schema, relative)
            names = _class_label(schema, label) or names
            for group in range(opened.num_row_groups):
                part = opened.read_row_group(group, columns=[label]).column(label).to_pylist()
                places += [(relative, group, i) for i in range(len(part))]
                labels += part
        paths += [f"{relative}/{i:06d}" for i in range(len(places) - len(paths))]
    source = ParquetRows(base, tuple(paths), image, tuple(places))
    if labels and isinstance(labels[0], str):
        classes = sorted(set(labels))
        return Listing(source, [classes.index(y) for y in labels], classes)
    classes = names or _classnames(base)
    return Listing(source, _checked(labels, classes, base), classes)


def _columns(schema: Any, file: str) -> tuple[str, str]:
    images = [n for n in ("image", "img", *_IMAGE_EXT) if n in schema.names]
    labels = [n for n in _LABELS if n in schema.names]
    if not images or not labels:
        raise ValueError(
            f"{file} needs an image column (image, img, {', '.join(_IMAGE_EXT)}) and a label column "
            f"({', '.join(_LABELS)}); it has {', '.join(schema.names)}"
        )
    return images[0], labels[0]


def _class_label(schema: Any, label: str) -> list[str] | None:
    """Names of a ClassLabel feature, which `datasets` keeps in the metadata of the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(n) for n in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _read_tars(base: Path, files: list[Path]) -> Listing:
    paths: list[str] = []
    places: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for file in files:
        relative = file.relative_to(base).as_posix()
        images: dict[str, tuple[str, int, int]] = {}
        marks: dict[str, int] = {}
        with tarfile.open(file) as opened:
            for member in opened:
                stem, _, ext = member.name.rpartition(".")
                if member.isfile() and ext.lower() in _IMAGE_EXT:
                    images[stem] = (member.name, member.offset_data, member.size)
                elif member.isfile() and ext == "cls" and (content := opened.extractfile(member)):
                    marks[stem] = int(content.read())
        if set(images) != set(marks):
            lost = sorted(set(images) ^ set(marks))
            raise ValueError(f"{file} has images without a .cls or the reverse: {', '.join(lost[:5])}")
        for stem, (member_name, offset, length) in images.items():
            paths.append(f"{relative}/{member_name}")
            places.append((relative, offset, length))
            labels.append(marks[stem])
    classes = _classnames(base)
    return Listing(TarMembers(base, tuple(paths), tuple(places)), _checked(labels, classes, base), classes)


def _checked(labels: list[int], classes: list[str], base: Path) -> list[int]:
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(f"labels in {base} run to {max(labels)}, but it names {len(classes)} classes")
    return labels


def _classnames(base: Path) -> list[str]:
    for file in (base / "classnames.txt", base.parent / "classnames.txt"):
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    raise ValueError(
        f"the labels in {base} are numbers and nothing says what they mean: expected a ClassLabel feature or "
        "classnames.txt with one class a line"
    )
