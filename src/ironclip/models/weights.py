"""Weight files: find them, and refuse those that are not the ones we know."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, fix: str) -> None:
    """Refuse a weight file with another hash: ValueError with the file, both hashes and ``fix``, what to type."""
    got = sha256_of(path)
    if got != expected:
        raise ValueError(f"{path.name}: expected SHA-256 {expected}, got {got} ({path}); {fix}")


def package_folder(package: str, extra: str) -> Path:
    """Folder of an installed package, without importing it. Raises ImportError naming our extra that brings it."""
    spec = find_spec(package)
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if not places:
        raise ImportError(f'the package {package} is not installed; type pip install "ironclip[{extra}]"')
    return places[0]
