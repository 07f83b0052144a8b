"""Versioned prompt sets and class names: which templates and which names a data set is classified with.

`sets/ID.json` holds templates: per data set, and under "default" for every other set (absent: the prompt set
serves only the data sets it lists). `names/SET.json` holds the classes of a named data set: `keys` as its own
files spell them, in label order, and one or more `names` lists. Nothing is ever built from a directory
listing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources

from ironclip.data.imageset import check_templates


@dataclass(frozen=True)
class Prompts:
    """The outcome of a choice: `id` of the prompt set, its templates, class names as prompted, preprocessing
    kind.
    """

    id: str
    templates: list[str]
    names: list[str]
    preprocessing: str


def known_sets() -> list[str]:
    """Ids of the shipped prompt sets, sorted."""
    return _stems("sets")


def known_names() -> list[str]:
    """Data sets with a shipped class list, sorted."""
    return _stems("names")


@cache
def _stems(folder: str) -> list[str]:
    files = resources.files("ironclip.data.prompts").joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


@cache
def _load(folder: str, stem: str) -> dict:
    file = resources.files("ironclip.data.prompts").joinpath(folder, f"{stem}.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _set(name: str) -> dict:
    if name not in known_sets():
        near = get_close_matches(name, known_sets(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown prompt set {name!r}; {hint}valid are {', '.join(known_sets())}, "
            'or a template with one {} such as "a photo of a {}."'
        )
    return _load("sets", name)


def class_list(dataset: str) -> dict:
    """The shipped record of a named data set: `keys`, `names` and what its file says beside them."""
    if dataset not in known_names():
        raise ValueError(
            f"no class list is shipped for {dataset!r}; there is one for {', '.join(known_names())}"
        )
    return _load("names", dataset)


def prompt_set(name: str, dataset: str) -> tuple[list[str], list[str] | None]:
    """(templates, class names) of prompt set `name` for `dataset`, a named set such as "pets".

    Names are None where no list is shipped for the data set: it keeps its own. Raises ValueError with the
    nearest match for an unknown set, and with the valid sets where `name` has no templates for `dataset`.
    """
    record = _set(name)
    key = dataset if dataset in record["templates"] else "default"
    if key not in record["templates"]:
        able = [s for s in known_sets() if {dataset, "default"} & set(_load("sets", s)["templates"])]
        raise ValueError(
            f"prompt set {name!r} has no templates for {dataset!r}; those that have: {', '.join(able)}"
        )
    templates = list(record["templates"][key])
    if dataset not in known_names():
        return templates, None
    lists = class_list(dataset)["names"]
    variant = next((v for v in record["names"] if v in lists), "fixed")
    return templates, [_styled(n, record) for n in lists[variant]]


def choose_prompts(prompts: str | None, dataset: str, own_names: list[str], *, default: str) -> Prompts:
    """The prompts of an open data set: `prompts` is a set id, a template containing "{}", or None for
    `default`.

    `own_names` is the class list that the set found on disk; it is kept wherever no list is shipped for
    `dataset`.
    """
    if prompts is not None and "{" in prompts:
        check_templates([prompts])
        listed = prompt_set(default, dataset)[1]
        return Prompts(prompts, [prompts], list(own_names) if listed is None else listed, "clip")
    chosen = default if prompts is None else prompts
    templates, names = prompt_set(chosen, dataset)
    record = _set(chosen)
    if names is None:
        names = [_styled(n, record) for n in own_names]
    if len(names) != len(own_names):
        raise ValueError(
            f"{dataset}: {len(own_names)} classes on disk, {len(names)} names in prompt set {chosen!r}"
        )
    return Prompts(chosen, templates, names, record["preprocessing"])


def _styled(name: str, record: dict) -> str:
    for mark in record.get("spaces", ""):
        name = name.replace(mark, " ")
    return name.lower() if record.get("lower") else name
