"""Few-shot sets, and learned prompts through `ironclip fit --shots` and `bench --state`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import image_set
from safetensors.torch import load_file

import ironclip
from ironclip.cli import main
from ironclip.data.imageset import ImageSet
from ironclip.evaluation.fitting import estimate_fit

SMALL = ["--vlm", "tiny", "--data", "shapes:train", "--steps", "2", "--batch-size", "4"]
APT = "APT(tokens=4, steps=1, alpha=1/255)"
ADVPT = "AdvPT(tokens=4, steps=1, eps=4/255)"


@pytest.fixture(scope="module")
def uneven() -> ImageSet:
    """Nine images of a, six of b, three of c."""
    y = torch.tensor([0] * 9 + [1] * 6 + [2] * 3)
    return image_set(torch.rand(18, 3, 4, 4), y, ["a", "b", "c"])


def test_shots_are_nested_and_in_the_order_of_subsets(uneven: ImageSet) -> None:
    order = uneven.subset(18, seed=1).ids
    for n in (1, 2, 3):
        few = uneven.shots(n, seed=1)
        assert [few.labels.count(y) for y in range(3)] == [n] * 3
        assert few.ids == [i for i in order if i in set(few.ids)]
        for label in range(3):
            own = [i for i in order if uneven.labels[uneven.ids.index(i)] == label]
            assert set(own[:n]) <= set(few.ids)
    assert uneven.shots(3, seed=1).ids != uneven.shots(3, seed=2).ids
    assert set(uneven.shots(2, seed=1).ids) < set(uneven.shots(3, seed=1).ids)


def test_more_shots_than_images_are_refused(uneven: ImageSet) -> None:
    told = "toys has fewer than 7 images of 2 of its 3 classes, of 'c' only 3; write at most --shots 3"
    with pytest.raises(ValueError, match=told):
        uneven.shots(7)
    with pytest.warns(UserWarning, match="toys has no image of 1 classes: c"):
        assert len(uneven.take(range(15)).shots(2)) == 4
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="shots must be a whole number of samples a class, 1 or more, got"):
            uneven.shots(bad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:shapes.train has no image of 4 classes")
@pytest.mark.parametrize(("spec", "name"), [(APT, "apt"), (ADVPT, "advpt")])
def test_fit_from_shots_and_bench(spec: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", spec, *SMALL, "--shots", "1", "--out", str(tmp_path)]) == 0
    manifest: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    train = ironclip.load_data("shapes:train", 64)
    assert manifest["images"] == len({*train.labels})
    assert manifest["data"] == [{"name": "shapes:train", "limit": None, "shots": 1}]
    state = load_file(tmp_path / f"{name}.safetensors")
    assert state["extra.context"].shape == (4, 128)
    assert manifest["state"]["bytes"] < 8192, "kilobytes"
    shared = ["--vlm", "tiny", "--data", "shapes", "--limit", "2", "--json", "--store", str(tmp_path / "store")]
    capsys.readouterr()
    assert main(["bench", *shared, "--defenses", spec, "--state", str(tmp_path), "--threat", "static,graybox"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(r["defense"], r["threat"]) for r in rows} == {(name, "static"), (name, "graybox")}


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", APT, *SMALL, "--shots", "1", "--limit", "4", "--out", str(tmp_path / "a")]) == 2
    assert "--limit 4 and --shots 1 both choose the images; give one" in capsys.readouterr().err
    assert main(["fit", APT, *SMALL, "--shots", "100000", "--out", str(tmp_path / "a")]) == 2
    assert "shapes:train has fewer than 100000 images of " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore:shapes.train has no image of 4 classes")
def test_a_dry_run() -> None:
    told = estimate_fit(APT, "tiny", "shapes:train", shots=1, changes={"steps": 2, "batch_size": 4})
    assert (told["forwards_per_image"], told["backwards_per_image"]) == (2, 1)
    assert told["trained_parameters"] == 4 * 128
