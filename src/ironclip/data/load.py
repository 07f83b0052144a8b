"""From a spec such as "folder:oxford_pets/dev" to an open data set."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ironclip.data.imageset import ImageSet
from ironclip.data.manifest import Options
from ironclip.data.preprocess import KINDS, check_preprocessing
from ironclip.data.survey import SETS

FORMS = ("photos", "shapes", "folder:PATH", "tv:NAME", "hub:NAME", *SETS)


def load_data(
    spec: str,
    size: int = 224,
    *,
    prompts: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    root: Path | None = None,
    split: str | None = None,
    recipe: str | None = None,
) -> ImageSet:
    """Open the data set `spec` at `size` x `size` pixels.

    `spec`: "photos", "shapes" or "shapes:SPLIT", "folder:PATH" (absolute, below the working directory, or
    below `root`, by default the environment variable IRONCLIP_DATA). `prompts`: id of a prompt set, or a
    template with one "{}"; None takes the default of the set. `limit`, `seed`: a nested subset, see
    `ImageSet.subset`. `skip_bad`: leave bad images out and count them. `split`: the split of a set that has
    several, the sub-folder of a folder. `recipe`: preprocessing "clip" or "ttc"; None takes the one that
    belongs to the prompts.

    Raises ValueError for a spec, prompt set or image that is not acceptable (before any work),
    FileNotFoundError for data that is not there, ImportError for a missing extra, RuntimeError where the
    preprocessing of this machine differs from the stored reference.
    """
    kind, _, rest = spec.strip().partition(":")
    if recipe is not None and recipe not in KINDS[:2]:
        raise ValueError(f"recipe must be clip or ttc, got {recipe!r}")
    options = Options(size, prompts, split, skip_bad, root, recipe)
    data: ImageSet
    if kind == "photos" and not rest:
        from ironclip.data.photos import load_photos

        if split:
            raise ValueError(f"photos has no splits, got split={split!r}")
        data = load_photos(options)
    elif kind == "shapes":
        from ironclip.data.shapes import load_shapes

        if rest and split and rest != split:
            raise ValueError(f"{spec} and split={split!r} name two splits; give one")
        if recipe is not None:
            raise ValueError("shapes is drawn at the wanted size; leave recipe out")
        data = load_shapes(rest or split or "test", options)
    elif kind == "folder":
        from ironclip.data.folder import load_folder

        data = load_folder(f"{rest}/{split}" if split else rest, options)
    elif kind in ("tv", "hub") or kind in SETS:
        from ironclip.data.named import load_named

        data = load_named(kind, rest, options) if kind in ("tv", "hub") else load_named("", spec.strip(), options)
    else:
        raise ValueError(_unknown(spec))
    if data.recipe != "none":
        check_preprocessing(data.recipe.partition("/")[0])
    return data.subset(limit, seed)


def _unknown(spec: str) -> str:
    near = get_close_matches(spec.strip().lower(), ["photos", "shapes", "folder", *SETS], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if Path(spec).expanduser().is_dir():
        hint = f"to read that folder write folder:{spec}; "
    return f"unknown data set {spec!r}; {hint}valid are {', '.join(FORMS)}"
