"""`folder:PATH`: any folder with one sub-folder of images per class.

Class list, first of these that exists in PATH, then in its parent:
1. `label_space.json`: the full official list, either names or entries {"folder": ..., "name": ...}; every
   name is a candidate although only some may have images here; the label is the place in this list.
2. `classes.json` {folder: name}: all its classes are candidates, also those of other parts; the label is the
   place in the sorted folder names.
3. Neither: the sorted folder names themselves, `_` read as a space.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ironclip.data.imageset import ImageSet
from ironclip.data.manifest import Options, open_set
from ironclip.data.prompts import choose_prompts, known_names
from ironclip.data.roots import data_root, nearest_folder
from ironclip.data.sources import Files

_SUFFIXES = ".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .jp2 .avif .heic".split()  # noqa: SIM905


SAMPLES = {  # common folder names of samples of the named sets
    "oxford_pets": "pets",
    "stanford_cars": "cars",
    "fgvc_aircraft": "aircraft",
    "oxford_flowers": "flowers102",
    "dtd47_lowres": "dtd",
    "food101_3": "food101",
    "imagenet1k_sample": "imagenet",
    "sun15": "sun397",
}


@dataclass(frozen=True)
class LabelSpace:
    """`names[label]` and the label of each folder."""

    names: list[str]
    label: dict[str, int]
    source: str


def load_folder(path: str, options: Options) -> ImageSet:
    """Open `folder:PATH`.

    Raises FileNotFoundError for a missing path, ValueError for a layout or images that it refuses.
    """
    base, name = resolve(path, options.root)
    folders, stray = _class_folders(base)
    space = label_space(base, folders)
    paths: list[str] = []
    labels: list[int] = []
    bad = [(f, "image outside the class folders") for f in stray]
    for folder in folders:
        inside = sorted(p.relative_to(base).as_posix() for p in (base / folder).rglob("*") if _listed(p, base))
        if not inside:
            bad.append((folder + "/", "class folder without a file"))
        paths += inside
        labels += [space.label[folder]] * len(inside)
    if not paths:
        raise ValueError(f"{name}: no image in its {len(folders)} class folders")
    chosen = choose_prompts(options.prompts, set_behind(name), space.names, default="generic")
    source = Files(base, tuple(paths))
    return open_set(name, source, labels, chosen, options, bad=bad)


def set_behind(name: str) -> str:
    """The named set that a folder is a part of, by the folder names in its path; else `name` itself.

    It decides which templates and class names a prompt set other than the default gives to the folder.
    """
    parts = [p.lower() for p in name.removeprefix("folder:").split("/")]
    return next((SAMPLES.get(p, p) for p in parts if SAMPLES.get(p, p) in known_names()), name)


def resolve(path: str, root: Path | None) -> tuple[Path, str]:
    """The folder behind PATH (absolute, below the working directory, or below the data root) and its
    canonical spec.
    """
    if not path.strip():
        raise ValueError("folder: needs a path, for example folder:my_images/test")
    wanted = Path(path).expanduser()
    home = data_root(root)
    tried = [wanted] if wanted.is_absolute() or home is None else [home / wanted, wanted]
    found = {p.resolve() for p in tried if p.is_dir()}
    if len(found) > 1:
        both = " and ".join(str(p) for p in sorted(found))
        raise ValueError(f"folder:{path} is ambiguous, both {both} exist; write the absolute path")
    if not found:
        at_file = next((p for p in tried if p.is_file()), None)
        if at_file is not None:
            raise ValueError(f"folder: expects a folder with one sub-folder per class, got the file {at_file}")
        note = "" if home or wanted.is_absolute() else "; set IRONCLIP_DATA to the root of your data sets"
        raise FileNotFoundError(f"folder:{path} does not exist; {nearest_folder(tried[0])}{note}")
    base = found.pop()
    for anchor in (home, Path.cwd().resolve()):
        if anchor is not None and base != anchor and base.is_relative_to(anchor):
            return base, f"folder:{base.relative_to(anchor).as_posix()}"
    return base, f"folder:{base.as_posix()}"


def _listed(path: Path, base: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(base).parts)


def _class_folders(base: Path) -> tuple[list[str], list[str]]:
    """Sorted class folders, and images that lie beside instead of in them."""
    inside = sorted(p for p in base.iterdir() if not p.name.startswith("."))
    folders = [p.name for p in inside if p.is_dir()]
    loose = [p.name for p in inside if p.is_file() and p.suffix.lower() in _SUFFIXES]
    if not folders and loose:
        raise ValueError(
            f"{base} has {len(loose)} images but no class folders; put each image into a sub-folder named "
            f"after its class, for example {base.name}/{Path(loose[0]).stem}/{loose[0]}"
        )
    if not folders:
        raise ValueError(f"{base} holds no image and no class folder; expected {base.name}/CLASS/IMAGE.jpg")
    return folders, loose


def label_space(base: Path, folders: list[str]) -> LabelSpace:
    """The class list of a folder, by the rules in the head of this file."""
    names = _read_json(base, "classes.json")
    full = _read_json(base, "label_space.json")
    if names is not None:
        file, table = names
        if not isinstance(table, dict) or not all(isinstance(v, str) and v.strip() for v in table.values()):
            raise ValueError(f"{file} must map folder names to class names, {{'folder': 'name', ...}}")
    else:
        table = {f: f.replace("_", " ") for f in folders}
    if full is None:
        source = "folder names" if names is None else str(names[0])
        keys = sorted(table)
        return _checked(LabelSpace([table[k] for k in keys], {k: i for i, k in enumerate(keys)}, source), folders, base)
    file, entries = full
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} must be a list of names or of {{'folder': ..., 'name': ...}}")
    if all(isinstance(e, str) for e in entries):
        place = {n: i for i, n in enumerate(entries)}
        if len(place) != len(entries):
            raise ValueError(f"{file} repeats a name; names must be distinct when entries have no folder")
        label = {k: place[v] for k, v in table.items() if v in place}
        return _checked(LabelSpace(list(entries), label, str(file)), folders, base)
    if not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("folder"), str) for e in entries
    ):
        raise ValueError(f"{file} must be a list of names or of {{'folder': ..., 'name': ...}}, not a mixture")
    label = {e["folder"]: i for i, e in enumerate(entries)}
    return _checked(LabelSpace([e["name"] for e in entries], label, str(file)), folders, base)


def _checked(space: LabelSpace, folders: list[str], base: Path) -> LabelSpace:
    lost = [f for f in folders if f not in space.label]
    if lost:
        parts = [f for f in lost if any((base / f / known).is_dir() for known in space.label)]
        if parts:
            raise ValueError(
                f"{base} has the parts {', '.join(parts)}; choose one, for example folder:.../{base.name}/{parts[0]}"
            )
        near = get_close_matches(lost[0], list(space.label), n=1)
        hint = f"; nearest known folder: {near[0]}" if near else ""
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(f"class folder {lost[0]!r}{more} in {base} is not listed in {space.source}{hint}")
    return space


def _read_json(base: Path, file: str) -> tuple[Path, object] | None:
    for path in (base / file, base.parent / file):
        if path.is_file():
            try:
                return path, json.loads(path.read_text(encoding="utf-8"))
            except ValueError as err:
                raise ValueError(f"{path} is not valid JSON: {err}") from None
    return None
