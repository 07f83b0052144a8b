"""Readers of the folder layouts that torchvision makes, without torchvision.

Labels are never taken from the order of folders: every reader gives the class of an image by its key, and keys are
joined to the shipped class list by name. Paths are sorted where the set itself does not order them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ironclip.data.sources import Files, Source


@dataclass(frozen=True)
class Listing:
    """Images of one split. `labels[i]` is the place of the class of row i in `classes`, which are keys.

    The order of `classes` has no meaning beyond this object: they are joined to the shipped list by name. `names`:
    how the set's own files call the classes, where they say more than the keys.
    """

    source: Source
    labels: list[int]
    classes: list[str]
    names: list[str] = field(default_factory=list)


def _files(base: Path, rows: list[tuple[str, str]], classes: list[str], names: list[str] | None = None) -> Listing:
    source = Files(base, tuple(p for p, _ in rows), strict=False)
    return Listing(source, _places([k for _, k in rows], classes, base), classes, names or [])


def _places(keys: list[str], classes: list[str], base: Path) -> list[int]:
    place = {c: i for i, c in enumerate(classes)}
    strange = sorted({k for k in keys if k not in place})
    if strange:
        raise ValueError(f"{base} has images of classes that its own list lacks: {', '.join(strange[:5])}")
    return [place[k] for k in keys]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _folders(base: Path, pattern: str = "*") -> list[tuple[str, str]]:
    """(relative path, name of the folder) of all files one level down, sorted by path."""
    found = sorted(p.relative_to(base).as_posix() for p in base.glob(f"*/{pattern}") if p.is_file())
    return [(p, p.split("/")[0]) for p in found]


def caltech101(base: Path, split: str) -> Listing:
    rows = [r for r in _folders(base, "*.jpg") if r[1] != "BACKGROUND_Google"]
    return _files(base, rows, sorted({k for _, k in rows}))


def caltech256(base: Path, split: str) -> Listing:
    rows = _folders(base, "*.jpg")
    classes = sorted({k for _, k in rows})
    names = [c.partition(".")[2].removesuffix("-101").replace("-", " ").strip() for c in classes]
    return _files(base, rows, classes, names)


def pets(base: Path, split: str) -> Listing:
    ids = [line.split()[0] for line in _lines(base / "annotations" / f"{split}.txt")]
    rows = [(f"images/{i}.jpg", i.rpartition("_")[0]) for i in ids]
    return _files(base, rows, sorted({k for _, k in rows}, key=str.lower))


def flowers102(base: Path, split: str) -> Listing:
    from scipy.io import loadmat

    column = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    images = loadmat(base / "setid.mat", squeeze_me=True)[column].reshape(-1)
    label = loadmat(base / "imagelabels.mat", squeeze_me=True)["labels"].reshape(-1)
    rows = [(f"jpg/image_{i:05d}.jpg", str(label[i - 1])) for i in images.tolist()]
    return _files(base, rows, [str(i) for i in range(1, 103)])


def aircraft(base: Path, split: str) -> Listing:
    pairs = [line.split(" ", 1) for line in _lines(base / "data" / f"images_variant_{split}.txt")]
    rows = [(f"data/images/{i}.jpg", variant) for i, variant in pairs]
    return _files(base, rows, _lines(base / "data" / "variants.txt"))


def cars(base: Path, split: str) -> Listing:
    from scipy.io import loadmat

    classes = [str(c) for c in loadmat(base / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"]]
    file = base / "cars_test_annos_withlabels.mat" if split == "test" else base / "devkit" / "cars_train_annos.mat"
    marks = np.atleast_1d(loadmat(file, squeeze_me=True)["annotations"])
    rows = [(f"cars_{split}/{m['fname']}", classes[int(m["class"]) - 1]) for m in marks]
    return _files(base, rows, classes)


def sun397(base: Path, split: str) -> Listing:
    classes = [line[3:] for line in _lines(base / "ClassName.txt")]  # "/a/abbey"
    paths = sorted(p.relative_to(base).as_posix() for p in base.rglob("sun_*.jpg"))
    return _files(base, [(p, "/".join(p.split("/")[1:-1])) for p in paths], classes)


def food101(base: Path, split: str) -> Listing:
    listed = json.loads((base / "meta" / f"{split}.json").read_text())
    rows = [(f"images/{p}.jpg", key) for key in sorted(listed) for p in listed[key]]
    return _files(base, rows, sorted(listed))


def eurosat(base: Path, split: str) -> Listing:
    rows = _folders(base)
    return _files(base, rows, sorted({k for _, k in rows}))


def dtd(base: Path, split: str) -> Listing:
    rows = [(f"images/{line}", line.split("/")[0]) for line in _lines(base / "labels" / f"{split}1.txt")]
    return _files(base, rows, sorted({k for _, k in rows}))


def imagenet(base: Path, split: str) -> Listing:
    rows = _folders(base)
    return _files(base, rows, sorted({k for _, k in rows}))


def country211(base: Path, split: str) -> Listing:
    rows = [(f"{split}/{p}", k) for p, k in _folders(base / split)]
    return _files(base, rows, sorted({k for _, k in rows}))


def tinyimagenet(base: Path, split: str) -> Listing:
    classes = sorted(_lines(base / "wnids.txt"))
    words = dict(line.split("\t", 1) for line in _lines(base / "words.txt"))
    names = [words[c].split(",")[0].strip() for c in classes]
    if split == "val":
        pairs = [line.split("\t")[:2] for line in _lines(base / "val" / "val_annotations.txt")]
        rows = sorted((f"val/images/{i}", wnid) for i, wnid in pairs)
    else:
        found = sorted((base / "train").glob("*/images/*.JPEG"))
        rows = [(p.relative_to(base).as_posix(), p.parts[-3]) for p in found]
    return _files(base, rows, classes, names)


def coop(base: Path, split: str, folder: Path) -> Listing:
    """A split of CoOp (Zhou et al. 2022, arXiv 2109.01134): split_zhou_NAME.json beside the images.

    Its class names and its order of classes hold, restricted to the classes in it.
    """
    [file] = sorted(base.glob("split_zhou_*.json"))
    parts = json.loads(file.read_text())
    order = sorted({(int(label), name) for part in parts.values() for _, label, name in part})
    if [label for label, _ in order] != list(range(len(order))):
        raise ValueError(f"{file} gives one label two names, or leaves a label out")
    rows = [(path, name) for path, _, name in parts[split]]
    return _files(folder, rows, [name for _, name in order])
