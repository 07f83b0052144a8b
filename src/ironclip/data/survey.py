"""The table of named data sets: where their files lie, what goes wrong with them, on what terms they come."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class NamedSet:
    """`folder`: where torchvision puts it below its root. `splits`: those on disk, the evaluation split first."""

    name: str
    title: str
    classes: int
    folder: str
    splits: tuple[str, ...]
    hub: str  # repository of the hub, "" if there is none
    traps: str
    licence: str
    hub_split: str = "test"
    survey: bool = False  # one of the nine sets of the survey's Table II
    loader: str = ""  # the call in torchvision.datasets that downloads it, "" if none can


_ALL = ("all",)
_TT = ("test", "train")
_TVT = ("test", "val", "train")
_CB = "clip-benchmark/wds_"

SETS = {
    s.name: s
    for s in (
        NamedSet(
            name="caltech101",
            title="Caltech 101",
            classes=101,
            folder="caltech101/101_ObjectCategories",
            splits=_ALL,
            hub=_CB + "vtab-caltech101",
            traps="no official split: all 8,677 images; Faces and Faces_easy are both prompted as person by ttc",
            licence="CC BY 4.0",
            survey=True,
            loader="Caltech101('ROOT', download=True)",
        ),
        NamedSet(
            name="pets",
            title="Oxford-IIIT Pet",
            classes=37,
            folder="oxford-iiit-pet",
            splits=("test", "trainval"),
            hub=_CB + "vtab-pets",
            traps="labels follow the class list, not the sorted folder names; some files are no JPEG",
            licence="CC BY-SA 4.0",
            survey=True,
            loader="OxfordIIITPet('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="flowers102",
            title="Oxford Flowers 102",
            classes=102,
            folder="flowers-102",
            splits=_TVT,
            hub=_CB + "vtab-flowers",
            traps="labels start at 1; the circulating names file has a question mark and trailing blanks",
            licence="none stated",
            survey=True,
            loader="Flowers102('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="aircraft",
            title="FGVC Aircraft, variants",
            classes=100,
            folder="fgvc-aircraft-2013b",
            splits=("test", "val", "train", "trainval"),
            hub=_CB + "fgvc_aircraft",
            traps="21 names begin with 7 and want Boeing in front",
            licence="non-commercial research",
            survey=True,
            loader="FGVCAircraft('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="cars",
            title="Stanford Cars",
            classes=196,
            folder="stanford_cars",
            splits=_TT,
            hub=_CB + "cars",
            traps="the original host is gone; ttc strips the year, so fourteen classes share seven names",
            licence="none explicit",
            survey=True,
        ),
        NamedSet(
            name="sun397",
            title="SUN397",
            classes=397,
            folder="SUN397",
            splits=_ALL,
            hub=_CB + "sun397",
            traps="no split in torchvision: all 108,754 images, listed here by sorted path",
            licence="none explicit",
            survey=True,
            loader="SUN397('ROOT', download=True)",
        ),
        NamedSet(
            name="food101",
            title="Food-101",
            classes=101,
            folder="food-101",
            splits=_TT,
            hub="ethz/food101",
            hub_split="validation",
            traps="the training part is noisy; on the hub the test part is called validation",
            licence="none stated",
            survey=True,
            loader="Food101('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="eurosat",
            title="EuroSAT (RGB)",
            classes=10,
            folder="eurosat/2750",
            splits=_ALL,
            hub=_CB + "vtab-eurosat",
            traps="no official split: all 27,000 images; raw folder names are poor prompts",
            licence="MIT",
            survey=True,
            loader="EuroSAT('ROOT', download=True)",
        ),
        NamedSet(
            name="dtd",
            title="Describable Textures, partition 1",
            classes=47,
            folder="dtd/dtd",
            splits=_TVT,
            hub=_CB + "vtab-dtd",
            traps="ten official partitions; this is the first",
            licence="research only",
            survey=True,
            loader="DTD('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="cifar10",
            title="CIFAR-10",
            classes=10,
            folder="cifar-10-batches-py",
            splits=_TT,
            hub=_CB + "vtab-cifar10",
            traps="32 px: budgets in native and model-input space are not comparable",
            licence="none stated",
            loader="CIFAR10('ROOT', train=False, download=True)",
        ),
        NamedSet(
            name="cifar100",
            title="CIFAR-100, fine labels",
            classes=100,
            folder="cifar-100-python",
            splits=_TT,
            hub=_CB + "vtab-cifar100",
            traps="32 px; ttc keeps the underscores of the names",
            licence="none stated",
            loader="CIFAR100('ROOT', train=False, download=True)",
        ),
        NamedSet(
            name="stl10",
            title="STL-10",
            classes=10,
            folder="stl10_binary",
            splits=_TT,
            hub=_CB + "stl10",
            traps="96 px; labels start at 1",
            licence="none stated",
            loader="STL10('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="imagenet",
            title="ImageNet-1k, validation images",
            classes=1000,
            folder="imagenet/val",
            splits=("val",),
            hub=_CB + "imagenet1k",
            traps="needs one folder per wnid; ttc leaves n03710637 out (49,950 images)",
            licence="access terms, non-commercial",
        ),
        NamedSet(
            name="pcam",
            title="PatchCamelyon",
            classes=2,
            folder="pcam",
            splits=_TVT,
            hub=_CB + "vtab-pcam",
            traps="two classes: no difference-of-logits ratio; reading needs h5py",
            licence="CC0",
            loader="PCAM('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="country211",
            title="Country211",
            classes=211,
            folder="country211",
            splits=("test", "valid", "train"),
            hub=_CB + "country211",
            traps="folders are country codes",
            licence="Creative Commons, per photograph",
            loader="Country211('ROOT', split='test', download=True)",
        ),
        NamedSet(
            name="caltech256",
            title="Caltech 256",
            classes=257,
            folder="caltech256/256_ObjectCategories",
            splits=_ALL,
            hub="",
            traps="no official split; the clutter class has no visual meaning; 12 names end in -101",
            licence="CC BY 4.0",
            loader="Caltech256('ROOT', download=True)",
        ),
        NamedSet(
            name="tinyimagenet",
            title="Tiny ImageNet",
            classes=200,
            folder="tiny-imagenet-200",
            splits=("val", "train"),
            hub="",
            traps="validation labels are in a text file, not in folders; names from words.txt",
            licence="as ImageNet",
        ),
    )
}


def named_set(name: str) -> NamedSet:
    """The row of `name`; ValueError with the nearest match for another name."""
    if name not in SETS:
        near = get_close_matches(name, SETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown named data set {name!r}; {hint}valid are {', '.join(SETS)}")
    return SETS[name]


def how_to_get(row: NamedSet) -> str:
    """What to type for a set that is not on this machine."""
    ways = []
    if row.loader:
        ways.append(f'python -c "from torchvision.datasets import *; {row.loader}"')
    else:
        ways.append(f"unpack it to ROOT/{row.folder}")
    if row.hub:
        ways.append(f"load it once as hub:{row.name} while online ({row.hub})")
    return "; or ".join(ways)


IMAGES = {
    "caltech101": 8677,
    "pets": 3669,
    "flowers102": 6149,
    "aircraft": 3333,
    "cars": 8041,
    "sun397": 108754,
    "food101": 25250,
    "eurosat": 27000,
    "dtd": 1880,
    "cifar10": 10000,
    "cifar100": 10000,
    "stl10": 8000,
    "imagenet": 50000,
    "pcam": 32768,
    "country211": 21100,
    "caltech256": 30607,
    "tinyimagenet": 10000,
}
"""Images of the evaluation split in torchvision's layout, so that a run can be planned before the data is here."""
