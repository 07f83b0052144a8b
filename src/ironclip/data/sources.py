"""Where encoded images lie: loose files, members of a tar, rows of a Parquet file, arrays. One reader for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ironclip.data.decode import BadImageError, decode
from ironclip.data.preprocess import preprocess


class Source(Protocol):
    """Random access to images. `paths[row]` is the stable relative path of a row; picklable."""

    @property
    def base(self) -> Path: ...

    @property
    def paths(self) -> Sequence[str]: ...

    def image(self, row: int) -> Image.Image:
        """The decoded RGB image; raises BadImageError."""

    def stamp(self, row: int) -> list[int]:
        """Size and modification time of the file behind a row; raises OSError."""


@dataclass(frozen=True)
class Files:
    """Image files below `base`. `strict` as in `decode`."""

    base: Path
    paths: tuple[str, ...]
    strict: bool = True

    def image(self, row: int) -> Image.Image:
        return decode(self.base / self.paths[row], self.strict)

    def stamp(self, row: int) -> list[int]:
        return _stamp(self.base / self.paths[row])


@dataclass(frozen=True)
class TarMembers:
    """Members of tar archives below `base`; `places[row]` = (archive, offset, length)."""

    base: Path
    paths: tuple[str, ...]
    places: tuple[tuple[str, int, int], ...]

    def image(self, row: int) -> Image.Image:
        archive, offset, length = self.places[row]
        try:
            with (self.base / archive).open("rb") as file:
                file.seek(offset)
                return decode(file.read(length), strict=False)
        except OSError as err:
            raise BadImageError(f"cannot be read ({err.strerror or err})") from None

    def stamp(self, row: int) -> list[int]:
        return _stamp(self.base / self.places[row][0])


@dataclass(frozen=True)
class ParquetRows:
    """Encoded images in a column of Parquet files; `places[row]` = (file, row group, row in the group)."""

    base: Path
    paths: tuple[str, ...]
    column: str
    places: tuple[tuple[str, int, int], ...]

    def image(self, row: int) -> Image.Image:
        file, group, place = self.places[row]
        cell = _row_group(self.base / file, group, self.column)[place].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data and isinstance(cell, dict) and cell.get("path"):
            return decode(self.base / file / ".." / cell["path"], strict=False)
        return decode(data or b"", strict=False)

    def stamp(self, row: int) -> list[int]:
        return _stamp(self.base / self.places[row][0])


@lru_cache(maxsize=8)  # rows come in hashed order; groups of image sets are about a hundred rows
def _row_group(file: Path, group: int, column: str):  # type: ignore[no-untyped-def]  # pyarrow has no types
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=[column]).column(column)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Raw images, (n, h, w, 3) uint8, that came from `file`."""

    base: Path
    paths: tuple[str, ...]
    array: np.ndarray
    file: str

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[row]))

    def stamp(self, row: int) -> list[int]:
        return _stamp(self.base / self.file)


@dataclass(frozen=True)
class HdfRows:
    """Raw images, (n, h, w, 3) uint8 under the key "x" of an HDF5 file."""

    base: Path
    paths: tuple[str, ...]
    file: str

    def image(self, row: int) -> Image.Image:
        import h5py

        with h5py.File(self.base / self.file, "r") as opened:
            return Image.fromarray(np.asarray(opened["x"][row], dtype=np.uint8))

    def stamp(self, row: int) -> list[int]:
        return _stamp(self.base / self.file)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class SourceReader:
    """Rows of a source as pixels: (n, 3, size, size) float32 in [0, 1] by `recipe`."""

    source: Source
    recipe: str

    def __call__(self, rows: Sequence[int]) -> Tensor:
        out = []
        for row in rows:
            try:
                out.append(preprocess(self.source.image(row), self.recipe))
            except BadImageError as err:
                where = self.source.base / self.source.paths[row]
                raise ValueError(f"{where}: {err}; it was readable when the set was opened") from err
        return torch.stack(out)
