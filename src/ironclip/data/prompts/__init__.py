"""Versioned prompt sets and class names: which templates and which names a data set is classified with.

`sets/ID.json`: `templates` per data set, and under "default" for every other set (absent: the prompt set serves
only the data sets it lists); `names`, the name lists it wants, best first; `lower` and `spaces` (marks that become
blanks), which apply to names under the default templates; `merge`: classes of equal name become one.
`names/SET.json`: the classes of a named data set: `keys` as its own files spell them, in label order, and `names`
lists by variant; `own` names the prompt sets that take the names from disk. Nothing is built from a directory listing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources

from ironclip.data.imageset import check_templates


@dataclass(frozen=True)
class Prompts:
    """The outcome of a choice. `names[i]` is how class i of the data set is prompted; `merge`: equal names are one."""

    id: str
    templates: list[str]
    names: list[str]
    preprocessing: str
    merge: bool = False


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


def merges(name: str) -> bool:
    """Whether classes of equal name become one under prompt set `name`."""
    return bool(_set(name).get("merge", False))


def class_list(dataset: str) -> dict:
    """The shipped record of a named data set: `keys`, `names` and what its file says beside them."""
    if dataset not in known_names():
        raise ValueError(f"no class list is shipped for {dataset!r}; there is one for {', '.join(known_names())}")
    return _load("names", dataset)


def default_names(dataset: str) -> list[str]:
    """The names of a named data set where no prompt set asks for others: audited, else as published with CLIP."""
    lists = class_list(dataset)["names"]
    return list(lists.get("fixed", lists["clip"]))


def prompt_set(name: str, dataset: str) -> tuple[list[str], list[str] | None]:
    """(templates, class names) of prompt set `name` for `dataset`, a named set such as "pets".

    Names are None where the data set brings its own: no list is shipped for it, or the prompt set wants the names
    as its files spell them. Raises ValueError with the nearest match for an unknown prompt set, and with those that
    would do where `name` has no templates for `dataset`.
    """
    record, key = _record(name, dataset)
    found = _variant(record, dataset)
    names = (
        None if found in (None, "own") else [_styled(n, record, key) for n in class_list(dataset)["names"][str(found)]]
    )
    return list(record["templates"][key]), names


def choose_prompts(
    prompts: str | None, dataset: str, own: Sequence[str], *, default: str, spelled: Sequence[str] = ()
) -> Prompts:
    """The prompts of an open data set: `prompts` is a set id, a template containing "{}", or None for `default`.

    `own`: class names as the data set brings them, in label order. They are joined to the shipped list by name; if
    one is not in it, or no list is shipped for `dataset`, all of them are kept. `spelled`: the same classes letter
    for letter as the files of the set have them, for prompt sets that want that (`own` in the list).
    """
    if prompts is not None and "{" in prompts:
        check_templates([prompts])
        return Prompts(prompts, [prompts], list(own), "clip")
    record, key = _record(default if prompts is None else prompts, dataset)
    found = _variant(record, dataset)
    names = list(own)
    if found == "own":
        names = list(spelled or own)
    elif found is not None:
        shipped = class_list(dataset)
        place = match_classes(own, dataset)
        strange = {n for n, i in zip(own, place, strict=True) if i is None}
        if strange <= set(shipped.get("extra", {}).values()):
            wanted = shipped["names"][found]
            names = [n if i is None else wanted[i] for n, i in zip(own, place, strict=True)]
    names = [_styled(n, record, key) for n in names]
    return Prompts(record["id"], list(record["templates"][key]), names, record["preprocessing"], merges(record["id"]))


def match_classes(own: Sequence[str], dataset: str) -> list[int | None]:
    """Label of each name in the shipped list of `dataset`, None where it is not in it.

    Case and punctuation do not count, nor does the order of words where that leaves no doubt ("outdoor tent"). A
    name may be a key or from any variant; one that a variant gives to two classes matches neither, unless `own` is
    that whole variant in order.
    """
    record = class_list(dataset)
    lists = [record["keys"], *record["names"].values()]
    plain = [_plain(o) for o in own]
    if any(plain == [_plain(n) for n in names] for names in lists):
        return list(range(len(own)))
    exact: dict[str, int] = {}
    shuffled: dict[str, int] = {}
    for names in reversed(lists):  # keys last, so that they win
        for place, forms in ((exact, [_plain(n) for n in names]), (shuffled, [_words(n) for n in names])):
            often = Counter(forms)
            place.update({f: i for i, f in enumerate(forms) if often[f] == 1})
    for name, key in record.get("alias", {}).items():
        exact[_plain(name)] = record["keys"].index(key)
    return [exact.get(p, shuffled.get(_words(p))) for p in plain]


def _record(name: str, dataset: str) -> tuple[dict, str]:
    record = _set(name)
    key = dataset if dataset in record["templates"] else "default"
    if key not in record["templates"]:
        able = [s for s in known_sets() if {dataset, "default"} & set(_load("sets", s)["templates"])]
        raise ValueError(f"prompt set {name!r} has no templates for {dataset!r}; those that have: {', '.join(able)}")
    return record, key


def _variant(record: dict, dataset: str) -> str | None:
    """The name list that the prompt set takes; "own": as the files spell them; None: those the caller has."""
    if dataset not in known_names():
        return None
    shipped = class_list(dataset)
    if record["id"] in shipped.get("own", ()):
        return "own"
    return next((v for v in record["names"] if v in shipped["names"]), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower().replace("'", "")).strip()


def _words(name: str) -> str:
    return " ".join(sorted(_plain(name).split()))


def _styled(name: str, record: dict, key: str) -> str:
    if key != "default":
        return name
    for mark in record.get("spaces", ""):
        name = name.replace(mark, " ")
    return name.lower() if record.get("lower") else name
