"""Readers of the sets that come as arrays in a few large files: CIFAR, STL-10, PatchCamelyon."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ironclip.data.layouts import Listing
from ironclip.data.sources import Arrays, HdfRows


def cifar10(base: Path, split: str) -> Listing:
    files = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(base, files, b"labels", "batches.meta", b"label_names")


def cifar100(base: Path, split: str) -> Listing:
    return _cifar(base, [split], b"fine_labels", "meta", b"fine_label_names")


def _cifar(base: Path, files: list[str], label: bytes, meta: str, names: bytes) -> Listing:
    parts = [_unpickle(base / f) for f in files]
    array = np.concatenate([np.asarray(p[b"data"], dtype=np.uint8) for p in parts])
    images = np.ascontiguousarray(array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes = [n.decode() for n in _unpickle(base / meta)[names]]
    labels = [int(y) for p in parts for y in p[label]]
    paths = tuple(f"{f}/{i:05d}" for f, p in zip(files, parts, strict=True) for i in range(len(p[label])))
    return Listing(Arrays(base, paths, images, files[0]), labels, classes)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain containers, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "scalar",
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file")


def _unpickle(path: Path) -> dict[bytes, Any]:
    with path.open("rb") as file:
        return _ArraysOnly(file, encoding="bytes").load()


def stl10(base: Path, split: str) -> Listing:
    raw = np.memmap(base / f"{split}_X.bin", dtype=np.uint8, mode="r").reshape(-1, 3, 96, 96)
    labels = np.fromfile(base / f"{split}_y.bin", dtype=np.uint8)
    classes = (base / "class_names.txt").read_text().split()
    paths = tuple(f"{split}/{i:05d}" for i in range(len(labels)))
    images = raw.transpose(0, 3, 2, 1)  # stored by columns
    return Listing(Arrays(base, paths, images, f"{split}_X.bin"), [int(y) - 1 for y in labels], classes)


def pcam(base: Path, split: str) -> Listing:
    try:
        import h5py
    except ImportError:
        raise ImportError("tv:pcam needs h5py; type pip install h5py") from None
    part = "valid" if split == "val" else split
    stem = f"camelyonpatch_level_2_split_{part}"
    with h5py.File(base / f"{stem}_y.h5", "r") as file:
        labels = np.asarray(file["y"]).reshape(-1).tolist()
    paths = tuple(f"{split}/{i:06d}" for i in range(len(labels)))
    return Listing(HdfRows(base, paths, f"{stem}_x.h5"), labels, ["0", "1"])
