"""`pets`, `tv:pets`, `hub:pets`: named data sets from a torchvision root or from the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ironclip.data import hub, layouts, layouts_raw
from ironclip.data.folder import SAMPLES
from ironclip.data.imageset import ImageSet
from ironclip.data.layouts import Listing, coop
from ironclip.data.manifest import Options, open_set
from ironclip.data.prompts import choose_prompts, class_list, default_names, known_names, match_classes
from ironclip.data.roots import data_root, nearest_folder
from ironclip.data.survey import SETS, NamedSet, how_to_get, named_set

LAYOUTS: dict[str, Callable[[Path, str], Listing]] = {
    name: getattr(layouts_raw if hasattr(layouts_raw, name) else layouts, name) for name in SETS
}
_COOP_IMAGES = {  # where the paths of a CoOp split file start, below the set's folder
    "pets": "images",
    "flowers102": "jpg",
    "aircraft": "data/images",
    "food101": "images",
    "dtd": "images",
}


def load_named(kind: str, rest: str, options: Options) -> ImageSet:
    """Open a named set. `kind`: "tv", "hub" or "" (whichever is here); `rest`: NAME, NAME:SPLIT, hub also NAME@PATH.

    `hub:PATH` alone opens any local folder of Parquet files or tars. Raises ValueError for a wrong name or split,
    FileNotFoundError that tells how to get what is missing.
    """
    if kind == "hub" and "@" not in rest and Path(rest).expanduser().is_dir():
        return _local_hub(Path(rest).expanduser(), options)
    spec, _, place = rest.partition("@")
    name, _, part = spec.partition(":")
    if part and options.split and part != options.split:
        raise ValueError(f"{rest} and split={options.split!r} name two splits; give one")
    part = part or options.split or ""
    row = named_set(name)
    if place and kind != "hub":
        raise ValueError(f"only hub: takes @PATH, got {rest!r}; for torchvision set IRONCLIP_DATA to its root")
    if kind == "tv" or (not kind and tv_folder(row, options.root)):
        part = part or row.splits[0]
        listing = _read_tv(row, part, options.root)
        tail = "" if part == row.splits[0] else f":{part}"
        return _open(row, listing, f"tv:{name}{tail}", f"tv-{part}", options)
    folder = Path(place).expanduser() if place else hub.cached(row, download=kind == "hub")
    if folder is None:
        raise FileNotFoundError(missing([row], options.root))
    if not folder.is_dir():
        raise FileNotFoundError(f"hub:{rest}: there is no folder {folder}; {nearest_folder(folder)}")
    part = part or row.hub_split
    tail = ("" if part == row.hub_split else f":{part}") + (f"@{place}" if place else "")
    return _open(row, hub.read_hub(folder, part), f"hub:{name}{tail}", f"hub-{part}", options)


def tv_folder(row: NamedSet, root: Path | None) -> Path | None:
    """The folder of a set below the torchvision root, None where it is not there."""
    home = data_root(root)
    base = None if home is None else home / row.folder
    return base if base is not None and base.is_dir() else None


def missing(rows: list[NamedSet], root: Path | None) -> str:
    """The text of an error: a table of the sets that are not here, with the command that gets each."""
    home = data_root(root)
    where = f"below {home} or" if home else "(IRONCLIP_DATA is not set) or"
    lines = [f"  {row.name:<13}{how_to_get(row)}" for row in rows]
    samples = [] if home is None else [s for s, n in SAMPLES.items() for row in rows if n == row.name]
    near = [f"folder:{s}/dev" for s in [*samples, *(row.name for row in rows)] if home and (home / s / "dev").is_dir()]
    hint = f"\na sample is here: {', '.join(near)}" if near else ""
    return f"not found {where} in the hub cache:\n" + "\n".join(lines) + hint


def _read_tv(row: NamedSet, part: str, root: Path | None) -> Listing:
    base = tv_folder(row, root)
    if base is None:
        raise FileNotFoundError(missing([row], root))
    if part == "coop":
        homes = [base, base.parent] if "/" in row.folder else [base]
        home = next((h for h in homes if list(h.glob("split_zhou_*.json"))), None)
        if home is None:
            raise FileNotFoundError(f"split=coop of {row.name} needs CoOp's split_zhou_*.json in {homes[-1]}")
        return coop(home, "test", base / _COOP_IMAGES.get(row.name, ""))
    if part not in row.splits:
        extra = "; it has no official split" if row.splits == ("all",) else ""
        raise ValueError(f"tv:{row.name} has the splits {', '.join(row.splits)}, coop{extra}; got {part!r}")
    try:
        listing = LAYOUTS[row.name](base, part)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{base} is incomplete: {err.filename} is missing; {how_to_get(row)}") from None
    if not listing.labels:
        raise ValueError(f"{base} holds no image of split {part!r}; {how_to_get(row)}")
    return listing


def _open(row: NamedSet, listing: Listing, name: str, origin: str, options: Options) -> ImageSet:
    """Join classes by name, choose prompts, drop what the prompt set drops."""
    names = spelled = listing.names or listing.classes
    place = list(range(len(names)))
    own_order = origin == "tv-coop"  # CoOp's split file brings its own classes and order
    if row.name in known_names() and not own_order:
        names, spelled, place = _join(row, listing)
    chosen = choose_prompts(options.prompts, row.name, names, default="fixed", spelled=spelled)
    if own_order and chosen.id == "coop":  # and the names that its authors prompt with
        chosen = replace(chosen, names=[n.replace("_", " ") for n in names])
    labels: list[int | None] = [place[y] for y in listing.labels]
    shipped = class_list(row.name) if row.name in known_names() else {}
    for key in shipped.get("drop", {}).get(chosen.id, ()):
        at = shipped["keys"].index(key)
        chosen = replace(chosen, names=chosen.names[:at] + chosen.names[at + 1 :])
        labels = [None if y is None or y == at else y - (y > at) for y in labels]
    return open_set(name, listing.source, labels, chosen, options, origin=origin)


def _join(row: NamedSet, listing: Listing) -> tuple[list[str], list[str], list[int]]:
    """Shipped names in label order, the same as spelled on disk, and the label of each class of the listing."""
    shipped = class_list(row.name)
    names, keys = default_names(row.name), list(shipped["keys"])
    extra: dict[str, str] = shipped.get("extra", {})
    label: list[int] = []
    unknown = []
    for own, at in zip(listing.classes, match_classes(listing.classes, row.name), strict=True):
        if at is not None:
            label.append(at)
        elif own in extra or own in extra.values():
            label.append(len(names))
            names.append(extra.get(own, own))
            keys.append(own)
        else:
            unknown.append(own)
    if unknown:
        raise ValueError(
            f"{row.name}: {len(unknown)} classes of these files are not in the shipped list: "
            f"{', '.join(repr(u) for u in unknown[:5])}; labels are joined by class name, never by order"
        )
    if len(set(label)) != len(label):
        twice = sorted({keys[i] for i in label if label.count(i) > 1})
        raise ValueError(f"{row.name}: two classes of these files are one in the shipped list: {', '.join(twice)}")
    spelled = list(keys)
    for own, at in zip(listing.classes, label, strict=True):
        spelled[at] = own
    return names, spelled, label


def _local_hub(folder: Path, options: Options) -> ImageSet:
    part = options.split or "test"
    listing = hub.read_hub(folder, part)
    chosen = choose_prompts(options.prompts, folder.name, listing.classes, default="generic")
    return open_set(f"hub:{folder.as_posix()}", listing.source, listing.labels, chosen, options, origin=f"hub-{part}")
