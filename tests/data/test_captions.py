"""Caption sets: what a folder must hold, what `shapes` says, and subsets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ironclip.data.captions import CaptionSet, load_captions
from ironclip.data.load import load_data


def folder(base: Path, table: Any, files: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    """images/ with small coloured pictures, and captions.json."""
    (base / "images").mkdir(parents=True)
    for k, name in enumerate(files):
        Image.new("RGB", (20, 16), (40 * k, 90, 200)).save(base / "images" / name)
    (base / "captions.json").write_text(table if isinstance(table, str) else json.dumps(table))
    return base


GOOD = {"images/b.png": {"captions": ["one", "two"], "licence": "own"}, "images/a.png": {"captions": ["three"]}}


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    folder(tmp_path / "set" / "dev", GOOD)
    for where in ("captions:set", "captions:set/dev", f"captions:{tmp_path / 'set'}"):
        found = load_captions(where, 16, root=tmp_path)
        assert found.name == "captions:set/dev"
        assert [i.split(":")[1] for i in found.ids] == ["images/a.png", "images/b.png"]
        assert found.captions == [["three"], ["one", "two"]]
        assert found.texts == ["three", "one", "two"]
        assert found.owner.tolist() == [0, 1, 1]
    ((x, ids),) = found.batches(5)
    assert x.shape == (2, 3, 16, 16)
    assert ids == found.ids
    torch.testing.assert_close(x[1, :, 0, 0], torch.tensor([40, 90, 200]) / 255)


def test_the_environment_names_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "set", GOOD)
    monkeypatch.setenv("IRONCLIP_DATA", str(tmp_path))
    assert load_captions("captions:set", 16).name == "captions:set"


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({**GOOD, "images/c.png": {"captions": ["x"]}}, r"images/c\.png: captions without an image"),
        ({"images/a.png": {"captions": ["x"]}}, r"images/b\.png: image without captions"),
        ({**GOOD, "images/a.png": {"captions": []}}, r"images/a\.png: no captions"),
        ({**GOOD, "images/a.png": {}}, r"images/a\.png: no captions"),
        ({**GOOD, "images/a.png": {"captions": ["x", " "]}}, r"images/a\.png: caption 1 is empty"),
        ({**GOOD, "images/a.png": {"captions": "x"}}, r"images/a\.png: captions must be a list of strings"),
        ({**GOOD, "images/a.png": {"captions": [3]}}, r"images/a\.png: captions must be a list of strings"),
        ({}, "names no images"),
        ([1], "must map image files"),
        ({"images/a.png": ["x"]}, "must map image files"),
        ("{", "not valid JSON"),
    ],
)
def test_captions_that_do_not_fit_are_named(tmp_path: Path, table: Any, match: str) -> None:
    folder(tmp_path, table)
    with pytest.raises(ValueError, match=match):
        load_captions(f"captions:{tmp_path}", 16)


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base = folder(tmp_path / "none", GOOD, files=())
    with pytest.raises(ValueError, match="holds no images"):
        load_captions(f"captions:{base}", 16)
    (base / "images").rmdir()
    with pytest.raises(ValueError, match="no folder images/"):
        load_captions(f"captions:{base}", 16)
    base = folder(tmp_path / "broken", GOOD)
    (base / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images/b\.png: not an image"):
        load_captions(f"captions:{base}", 16)


def test_paths_and_specs_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no captions\.json"):
        load_captions("captions:empty", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean"):
        load_captions("captions:emptyy", root=tmp_path)
    with pytest.raises(ValueError, match="needs a path"):
        load_captions("captions:")
    with pytest.raises(ValueError, match="captions:PATH"):
        load_captions("photos")
    with pytest.raises(ValueError, match="limit must be"):
        load_captions("shapes", limit=0)


def test_shapes_say_what_they_show() -> None:
    found, data = load_captions("shapes", 16, limit=5), load_data("shapes", 16, limit=5)
    assert found.ids == data.ids
    assert torch.equal(next(found.batches(5))[0], next(data.batches(5))[0])
    for i, own in enumerate(found.captions):
        assert len(set(own)) == 6
        assert all(word in text for text in own for word in data.class_names[data.labels[i]].split())
    assert load_captions("shapes:val", 16, limit=1).name == "shapes:val"


def test_subsets_are_nested_and_lazy() -> None:
    read: list[int] = []

    def reader(rows: Any) -> torch.Tensor:
        read.extend(rows)
        return torch.stack([torch.full((3, 2, 2), r / 10) for r in rows])

    whole = CaptionSet("set", reader, [f"i{k}" for k in range(9)], [[f"caption {k}"] for k in range(9)])
    small, large = whole.subset(3), whole.subset(7)
    assert small.ids == large.ids[:3]
    assert small.ids != whole.subset(3, seed=1).ids
    assert not read
    (x, ids), _ = small.batches(2)
    assert [f"i{round(float(v) * 10)}" for v in x[:, 0, 0, 0]] == ids
    assert sorted(read) == sorted(int(i[1:]) for i in small.ids)
    assert whole.subset(None) is whole


def test_sets_made_by_hand_are_checked() -> None:
    x = torch.rand(2, 3, 4, 4)
    pixels = CaptionSet("set", x, ["a", "b"], [["one"], ["two", "three"]]).take([1])
    assert torch.equal(next(pixels.batches(1))[0], x[1:])
    for args, match in (
        ((x, ["a"], [["one"], ["two"]]), "one length, got 2, 1, 2"),
        ((x, ["a", "a"], [["one"], ["two"]]), "distinct"),
        ((x, ["a", "b"], [["one"], []]), "b: no captions"),
        ((x, ["a", "b"], [["one"], [""]]), "b: caption 0 is empty"),
        ((x[:0], [], []), "no images"),
        ((x * 255, ["a", "b"], [["one"], ["two"]]), "divide by 255"),
    ):
        with pytest.raises(ValueError, match=match):
            CaptionSet("set", *args)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        next(pixels.batches(0))


def test_photographs_with_captions(shared: Path) -> None:
    if not (shared / "coco_captions").is_dir():
        pytest.skip("no coco_captions in the folder of data sets")
    found = load_captions("captions:coco_captions", 64, root=shared)
    assert len(found.texts) == len(found.owner) >= 5 * len(found)
    assert next(found.batches(2))[0].shape == (2, 3, 64, 64)
