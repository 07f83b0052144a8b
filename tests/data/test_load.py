"""`photos`, unknown specs, the table of data sets."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ironclip.data import known_data, load_data, photos


def test_photos_have_the_labels_of_their_file_names() -> None:
    pytest.importorskip("foolbox")
    data = load_data("photos")
    assert len(data) == 20
    assert len(data.class_names) == 1000
    assert data.name == "photos"
    assert data.size == 224
    seen = {i.split(":")[1]: data.class_names[y] for i, y in zip(data.ids, data.labels, strict=True)}
    assert seen["imagenet_16_251.jpg"] == "Dalmatian"
    assert seen["imagenet_17_22.jpg"] == "bald eagle"
    assert seen["imagenet_04_949.jpg"] == "strawberry"
    assert seen["imagenet_11_630.jpg"] == "slip-on shoe"
    assert data[3].x.shape == (3, 224, 224)
    assert data.recipe == "resize224-bicubic-crop224"
    assert load_data("photos", recipe="ttc").recipe == "resize256-bilinear-crop224"


def test_other_photographs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imagenet_00_243.jpg").write_bytes(b"another picture")
    monkeypatch.setattr(photos, "photos_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"the 1 photographs in .* are not those of foolbox 3\.3\.4"):
        load_data("photos")


def test_without_foolbox_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "ironclip\[lite\]"'):
        load_data("photos")
    assert not next(d for d in known_data() if d.name == "photos").available


def test_photos_do_not_import_foolbox_or_torchvision() -> None:
    code = (
        "import sys; from ironclip.data import load_data, known_data; known_data(); load_data('shapes', 32)\n"
        "try: load_data('photos', 32)\n"
        "except ImportError: pass\n"
        "print([m for m in ('foolbox', 'torchvision', 'datasets', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_specs_get_the_nearest_and_all_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'photo'; did you mean 'photos'\? valid are photos, shapes"):
        load_data("photo")
    with pytest.raises(ValueError, match=r"to read that folder write folder:"):
        load_data(str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown prompt set 'genric'; did you mean 'generic'\?"):
        load_data("shapes", 32, prompts="genric")
    with pytest.raises(ValueError, match=r'exactly one "\{\}"'):
        load_data("shapes", 32, prompts="a {} and a {}")
    with pytest.raises(ValueError, match=r"photos has no splits"):
        load_data("photos", split="train")
    with pytest.raises(ValueError, match=r"recipe must be clip or ttc, got 'squash'"):
        load_data("photos", recipe="squash")


def test_a_template_can_be_given_directly() -> None:
    data = load_data("shapes", 32, prompts="a drawing of a {}")
    assert data.templates == ["a drawing of a {}"] == [data.prompt_set]


def test_data_sets_travel_to_other_processes() -> None:
    data = load_data("shapes", 32, limit=3)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.ids == data.ids
    assert torch.equal(copy[1].x, data[1].x)


def test_table_names_every_set_once() -> None:
    rows = known_data()
    assert len({r.name for r in rows}) == len(rows)
    for row in rows:
        assert row.title
        assert row.licence
        assert row.how_to_get
        assert row.traps
