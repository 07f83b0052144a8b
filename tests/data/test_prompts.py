"""Prompt sets, class names and their audit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ironclip.data import audit, load_data, prompt_set
from ironclip.data.prompts import (
    choose_prompts,
    class_list,
    default_names,
    known_names,
    known_sets,
    match_classes,
)
from ironclip.data.survey import SETS

OPENAI_COUNTS = {
    "imagenet": 80,
    "cifar10": 18,
    "cifar100": 18,
    "caltech101": 34,
    "cars": 8,
    "dtd": 8,
    "country211": 5,
    "eurosat": 3,
    "sun397": 2,
    "aircraft": 2,
    "pcam": 2,
    "stl10": 2,
    "food101": 1,
    "pets": 1,
    "flowers102": 1,
}


def test_shipped_sets() -> None:
    assert known_sets() == ["coop", "fixed", "generic", "openai", "tecoa", "ttc"]
    assert set(known_names()) == set(SETS) - {"caltech256", "tinyimagenet"}


def test_every_template_has_one_place_and_every_set_serves_the_survey() -> None:
    for name in known_sets():
        for dataset in SETS:
            if name == "openai" and dataset in ("caltech256", "tinyimagenet"):
                continue
            templates, names = prompt_set(name, dataset)
            assert all(t.count("{}") == 1 for t in templates)
            assert len(set(templates)) == len(templates)
            assert names is None or len(names) == SETS[dataset].classes


def test_sizes_of_the_published_ensembles() -> None:
    for dataset, count in OPENAI_COUNTS.items():
        assert len(prompt_set("openai", dataset)[0]) == count
        assert prompt_set("fixed", dataset)[0] == prompt_set("openai", dataset)[0]


def test_imagenet_templates_and_names_equal_open_clip() -> None:
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    templates, names = prompt_set("openai", "imagenet")
    assert templates == [t("{}") for t in metadata.OPENAI_IMAGENET_TEMPLATES]
    assert names == list(metadata.IMAGENET_CLASSNAMES)
    changed = [i for i, (a, b) in enumerate(zip(names or [], default_names("imagenet"), strict=True)) if a != b]
    assert changed == [744, 836]


@pytest.mark.parametrize(
    ("name", "dataset", "index", "prompt"),
    [
        ("ttc", "caltech101", 1, "This is a photo of a person."),
        ("tecoa", "caltech101", 4, "This is a photo of a accordion"),
        ("tecoa", "caltech101", 19, "This is a photo of a car side"),
        ("ttc", "caltech101", 19, "This is a photo of a car_side."),
        ("ttc", "cifar100", 1, "This is a photo of a aquarium_fish."),
        ("tecoa", "cifar100", 1, "This is a photo of a aquarium fish"),
        ("tecoa", "sun397", 8, "This is a photo of a apartment building outdoor"),
        ("ttc", "pets", 1, "A photo of a american bulldog, a type of pet."),
        ("tecoa", "pets", 1, "A photo of a american bulldog, a type of pet."),
        ("coop", "pets", 1, "a photo of a american bulldog, a type of pet."),
        ("openai", "pets", 1, "a photo of a American Bulldog, a type of pet."),
        ("ttc", "flowers102", 59, "A photo of a pink yellow dahlia?, a type of flower."),
        ("coop", "flowers102", 59, "a photo of a pink-yellow dahlia?, a type of flower."),
        ("fixed", "flowers102", 59, "a photo of a pink and yellow dahlia, a type of flower."),
        ("ttc", "aircraft", 0, "A photo of a boeing 707-320, a type of aircraft."),
        ("openai", "aircraft", 0, "a photo of a 707-320, a type of aircraft."),
        ("fixed", "aircraft", 0, "a photo of a Boeing 707-320, a type of aircraft."),
        ("ttc", "cars", 4, "A photo of a acura tsx sedan."),
        ("coop", "cars", 4, "a photo of a 2012 Acura TSX Sedan."),
        ("ttc", "food101", 0, "A photo of apple pie, a type of food."),
        ("ttc", "eurosat", 1, "A centered satellite photo of a forest."),
        ("coop", "eurosat", 2, "a centered satellite photo of Herbaceous Vegetation Land."),
        ("ttc", "dtd", 30, "A surface with a polka dotted texture."),
        ("coop", "dtd", 30, "polka-dotted texture."),
        ("ttc", "pcam", 0, "This is a photo of a healthy lymph node tissue."),
        ("tecoa", "pcam", 0, "Tthis is a photo of healthy lymph node tissue."),
        ("tecoa", "pcam", 1, "This is a photo of lymph node tumor tissue."),
        ("ttc", "country211", 0, "A photo I took in Andorra."),
        ("openai", "country211", 0, "a photo i took in Andorra."),
        ("ttc", "stl10", 2, "This is a photo of a car."),
    ],
)
def test_prompts_letter_for_letter(name: str, dataset: str, index: int, prompt: str) -> None:
    templates, names = prompt_set(name, dataset)
    assert names is not None
    assert templates[0].format(names[index]) == prompt


def test_parity_names_follow_the_published_rules() -> None:
    """Derived again from the keys, by the rules of the published loaders."""
    cars = class_list("cars")
    assert cars["names"]["ttc"] == [k[:-5].lower().replace("-", " ") for k in cars["keys"]]
    food = class_list("food101")
    assert prompt_set("ttc", "food101")[1] == [k.replace("_", " ") for k in food["keys"]]
    pets = class_list("pets")
    assert pets["names"]["ttc"] == [k.replace("_", " ").lower() for k in pets["keys"]]
    assert pets["keys"] == sorted(pets["keys"], key=str.lower)
    assert class_list("country211")["keys"] == sorted(class_list("country211")["keys"])
    assert class_list("cifar100")["names"]["clip"] == [k.replace("_", " ") for k in class_list("cifar100")["keys"]]


def test_lists_agree_with_the_shared_photographs(shared: Path) -> None:
    for folder, dataset in (
        ("oxford_pets", "pets"),
        ("flowers102", "flowers102"),
        ("stanford_cars", "cars"),
        ("eurosat", "eurosat"),
        ("cifar100", "cifar100"),
        ("caltech101", "caltech101"),
    ):
        names = list(json.loads((shared / folder / "classes.json").read_text()).values())
        place = match_classes(names, dataset)
        assert None not in place
        assert len(set(place)) == len(names)


def test_a_sample_folder_takes_the_names_of_its_set(shared: Path) -> None:
    """Labels and order stay those of the folder; only the wording changes."""
    plain = load_data("folder:stanford_cars/dev", 32, root=shared)
    ttc = load_data("folder:stanford_cars/dev", 32, root=shared, prompts="ttc")
    assert ttc.templates == ["A photo of a {}."]
    assert ttc.recipe == "resize37-bilinear-crop32"
    assert ttc.class_names == [n[:-5].lower().replace("-", " ") for n in plain.class_names]
    assert ttc.labels == plain.labels
    openai = load_data("folder:oxford_pets/dev", 32, root=shared, prompts="openai")
    assert openai.templates == ["a photo of a {}, a type of pet."]
    coarse = load_data("folder:sun15/dev", 32, root=shared, prompts="openai")
    assert "computer room" in coarse.class_names
    assert coarse.templates == ["a photo of a {}.", "a photo of the {}."]


def test_own_names_are_kept_where_the_list_does_not_fit() -> None:
    chosen = choose_prompts("ttc", "pets", ["Beagle", "my own cat"], default="fixed")
    assert chosen.names == ["Beagle", "my own cat"]
    assert chosen.templates == ["A photo of a {}, a type of pet."]
    styled = choose_prompts("tecoa", "folder:mine", ["Red_Fox", "A-10/B"], default="generic")
    assert styled.names == ["red fox", "a 10 b"]
    assert choose_prompts("ttc", "folder:mine", ["Red_Fox"], default="generic").names == ["Red_Fox"]
    assert choose_prompts(None, "pets", ["beagle"], default="generic").names == ["beagle"]


def test_matching_needs_no_order_or_spelling_but_no_guess_either() -> None:
    assert match_classes(["british_shorthair", "Abyssinian", "dachshund"], "pets") == [9, 0, None]
    assert (
        match_classes(["outdoor tent", "tent_outdoor"], "sun397")
        == [350, 350]
        == match_classes(["t/tent/outdoor"[2:], "tent/outdoor"], "sun397")
    )
    assert match_classes(["missile", "projectile"], "imagenet") == [657, 744]
    assert match_classes(["audi s4 sedan"], "cars") == [None]  # two model years share it
    assert match_classes(["face", "centered face"], "caltech101") == [0, 1]


def test_unknown_sets_get_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown prompt set 'openia'; did you mean 'openai'\? valid are coop, fixed"):
        prompt_set("openia", "pets")
    with pytest.raises(ValueError, match=r"'openai' has no templates for 'shapes'; those that have: coop, fixed"):
        load_data("shapes", 32, prompts="openai")
    with pytest.raises(ValueError, match=r"no class list is shipped for 'dogs'"):
        class_list("dogs")


def test_fixed_lists_pass_the_audit() -> None:
    assert [r for r in audit() if r.dataset.endswith("/fixed")] == []


def test_audit_finds_the_known_traps() -> None:
    rows = audit()
    cars = [r for r in rows if r.dataset == "cars/ttc" and r.check == "duplicate"]
    assert len(cars) == 7  # fourteen classes
    assert all(len(r.names) == 2 for r in cars)
    found = {(r.dataset, r.check) for r in rows}
    assert {
        ("caltech101/ttc", "duplicate"),
        ("caltech101/openai", "blank"),
        ("flowers102/coop", "question mark"),
        ("flowers102/coop", "blank"),
        ("imagenet/openai", "duplicate"),
        ("cifar100/ttc", "underscore"),
    } <= found
    [imagenet] = [r for r in rows if r.dataset == "imagenet/openai" and "missile" in r.names[0]]
    assert imagenet.names == ("missile [657]", "missile [744]")


def test_audit_of_a_folder_with_lengths_and_cosines(make_folder: Callable[..., Path]) -> None:
    base = make_folder(a=1, b=1, c=1)
    names = {"a": "café", "b": "word " * 90 + "end", "c": "Café"}
    (base / "classes.json").write_text(json.dumps(names))

    def encode(texts: list[str]) -> torch.Tensor:
        """Letter counts: equal up to case, as a text tower would nearly have it."""
        rows = [[float(Counter(t.lower())[chr(97 + k)]) for k in range(26)] for t in texts]
        return torch.tensor(rows)

    rows = audit(f"folder:{base}", tokenizer=lambda t: re.findall(r"\w+", t), encode=encode)
    by_check = {r.check: r for r in rows}
    assert set(by_check) == {"duplicate", "non-ASCII", "too long", "near duplicate"}
    assert by_check["too long"].detail == "95 tokens, the text tower reads 77"
    assert by_check["near duplicate"].names == ("café", "Café")
    assert by_check["near duplicate"].detail == "cosine 1.00000"


def test_audit_script_runs() -> None:
    script = Path(__file__).parents[2] / "scripts" / "audit_names.py"
    done = subprocess.run([sys.executable, str(script), "pets"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "no finding")
    done = subprocess.run(
        [sys.executable, str(script), "cars", "--prompts", "ttc"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.count("duplicate") == 7
