"""Named sets read from small stand-ins in the layouts of torchvision and of the hub."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from ironclip.data import known_data, load_data
from ironclip.data.named import LAYOUTS
from ironclip.data.prompts import class_list
from ironclip.data.survey import SETS


def jpeg(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, "JPEG")


def make_pets(root: Path) -> None:
    """Sorted folders would put Bengal before beagle; the official list ignores case."""
    base = root / "oxford-iiit-pet"
    lines = []
    for i, (name, label) in enumerate([("Bengal_5", 6), ("beagle_1", 5), ("Abyssinian_2", 1), ("beagle_7", 5)]):
        jpeg(base / "images" / f"{name}.jpg", i)
        lines.append(f"{name} {label} 1 1")
    (base / "annotations").mkdir()
    (base / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")


def make_first_pets(root: Path) -> None:
    """torchvision numbers the classes that occur, so only a file that starts with all of them agrees with it."""
    base = root / "oxford-iiit-pet"
    lines = []
    for i, name in enumerate(("Abyssinian_9", "american_bulldog_3", "american_pit_bull_terrier_1")):
        jpeg(base / "images" / f"{name}.jpg", i)
        lines.append(f"{name} {i + 1} 1 1")
    (base / "annotations").mkdir()
    (base / "annotations" / "test.txt").write_text("\n".join(reversed(lines)) + "\n")


def make_flowers(root: Path) -> None:
    base = root / "flowers-102"
    for i in range(1, 6):
        jpeg(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "imagelabels.mat", {"labels": np.array([1, 60, 102, 60, 1])})
    savemat(base / "setid.mat", {"trnid": [1], "valid": [2], "tstid": [5, 4, 3]})


def make_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    for i in (7, 9):
        jpeg(base / "images" / f"{i:07d}.jpg", i)
    (base / "variants.txt").write_text("\n".join(class_list("aircraft")["keys"]) + "\n")
    (base / "images_variant_test.txt").write_text("0000009 BAE 146-200\n0000007 707-320\n")


def make_cars(root: Path) -> None:
    base = root / "stanford_cars"
    for i in (1, 2):
        jpeg(base / "cars_test" / f"{i:05d}.jpg", i)
    (base / "devkit").mkdir()
    names = np.array(class_list("cars")["keys"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    marks = np.array([("00001.jpg", 23), ("00002.jpg", 24)], dtype=[("fname", object), ("class", object)])
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": marks})


def make_sun(root: Path) -> None:
    base = root / "SUN397"
    for i, where in enumerate(("t/tent/outdoor/sun_b", "a/abbey/sun_z", "t/tent/outdoor/sun_a")):
        jpeg(base / f"{where}.jpg", i)
    (base / "ClassName.txt").write_text("/t/tent/outdoor\n/a/abbey\n")


def make_food(root: Path) -> None:
    base = root / "food-101"
    for i, where in enumerate(("waffles/1", "apple_pie/2")):
        jpeg(base / "images" / f"{where}.jpg", i)
    (base / "meta").mkdir()
    (base / "meta" / "test.json").write_text(json.dumps({"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2"]}))


def make_eurosat(root: Path) -> None:
    for i, where in enumerate(("SeaLake/SeaLake_1", "AnnualCrop/AnnualCrop_1", "Forest/Forest_2")):
        jpeg(root / "eurosat" / "2750" / f"{where}.jpg", i)


def make_dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for i, where in enumerate(("zigzagged/zigzagged_0001", "polka-dotted/polka-dotted_0002")):
        jpeg(base / "images" / f"{where}.jpg", i)
    (base / "labels").mkdir()
    (base / "labels" / "test1.txt").write_text("zigzagged/zigzagged_0001.jpg\npolka-dotted/polka-dotted_0002.jpg\n")


def make_caltech(root: Path) -> None:
    for i, where in enumerate(("Faces", "Faces_easy", "BACKGROUND_Google", "yin_yang", "accordion")):
        jpeg(root / "caltech101" / "101_ObjectCategories" / where / "image_0001.jpg", i)


def make_cifar10(root: Path) -> None:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    (base / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [3, 9, 0, 3]}, protocol=2))
    names = [k.encode() for k in class_list("cifar10")["keys"]]
    (base / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))


def make_stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8).tofile(base / "test_X.bin")
    np.array([10, 1, 2], np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("\n".join(class_list("stl10")["keys"]) + "\n")


def make_imagenet(root: Path) -> None:
    for i, wnid in enumerate(("n01440764", "n03710637", "n03710721", "n15075141")):
        jpeg(root / "imagenet" / "val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG", i)


def make_country(root: Path) -> None:
    for i, code in enumerate(("ZW", "AD")):
        jpeg(root / "country211" / "test" / code / "1.jpg", i)


def make_tiny(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    for i in range(2):
        jpeg(base / "val" / "images" / f"val_{i}.JPEG", i)
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tred fox\nn03\tunused\n")


def make_caltech256(root: Path) -> None:
    for i, name in enumerate(("001.ak47", "251.airplanes-101")):
        jpeg(root / "caltech256" / "256_ObjectCategories" / name / f"{name[:3]}_0001.jpg", i)


# name: (maker, class names of the samples in order under the default prompts, number of classes)
STAND_INS: dict[str, tuple[Callable[[Path], None], list[str], int]] = {
    "pets": (make_pets, ["Bengal", "Beagle", "Abyssinian", "Beagle"], 37),
    "flowers102": (make_flowers, ["pink primrose", "pink and yellow dahlia", "blackberry lily"], 102),
    "aircraft": (make_aircraft, ["BAE 146-200", "Boeing 707-320"], 100),
    "cars": (make_cars, ["Audi S4 Sedan 2012", "Audi S4 Sedan 2007"], 196),
    "sun397": (make_sun, ["abbey", "tent outdoor", "tent outdoor"], 397),
    "food101": (make_food, ["apple pie", "waffles"], 101),
    "eurosat": (make_eurosat, ["annual crop land", "forest", "lake or sea"], 10),
    "dtd": (make_dtd, ["zigzagged", "polka-dotted"], 47),
    "caltech101": (make_caltech, ["face", "face", "accordion", "yin and yang symbol"], 100),
    "cifar10": (make_cifar10, ["cat", "truck", "airplane", "cat"], 10),
    "stl10": (make_stl10, ["truck", "airplane", "bird"], 10),
    "imagenet": (make_imagenet, ["tench", "tights", "one-piece bathing suit", "toilet paper"], 1000),
    "country211": (make_country, ["Andorra", "Zimbabwe"], 211),
    "tinyimagenet": (make_tiny, ["red fox", "goldfish"], 2),
    "caltech256": (make_caltech256, ["ak47", "airplanes"], 2),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_labels_are_joined_by_name(name: str, tmp_path: Path) -> None:
    make, expected, classes = STAND_INS[name]
    make(tmp_path)
    data = load_data(f"tv:{name}", 32, root=tmp_path)
    seen = [data.class_names[y] for y in data.labels]
    assert seen == expected
    assert len(data.class_names) == classes
    assert data.name == f"tv:{name}"
    assert data.prompt_set == "fixed"
    assert data.recipe == f"resize32-bicubic-crop32/tv-{SETS[name].splits[0]}"
    assert data[0].x.shape == (3, 32, 32)
    bare = load_data(name, 32, root=tmp_path)
    assert bare.ids == data.ids
    assert bare.name == data.name


def test_every_named_set_has_a_reader_and_a_class_count() -> None:
    assert set(LAYOUTS) == set(SETS)
    for name in set(SETS) - {"caltech256", "tinyimagenet"}:
        record = class_list(name)
        assert len(record["keys"]) == SETS[name].classes
        assert len(set(record["keys"])) == len(record["keys"])
        for variant, names in record["names"].items():
            assert len(names) == SETS[name].classes, (name, variant)
    assert [s.name for s in SETS.values() if s.survey] == [
        "caltech101",
        "pets",
        "flowers102",
        "aircraft",
        "cars",
        "sun397",
        "food101",
        "eurosat",
        "dtd",
    ]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pets", lambda d, root: d.OxfordIIITPet(root, split="test")),
        ("aircraft", lambda d, root: d.FGVCAircraft(root, split="test")),
        ("food101", lambda d, root: d.Food101(root, split="test")),
        ("eurosat", lambda d, root: d.EuroSAT(root)),
        ("dtd", lambda d, root: d.DTD(root, split="test")),
        ("country211", lambda d, root: d.Country211(root, split="test")),
        ("cars", lambda d, root: d.StanfordCars(root, split="test")),
        ("sun397", lambda d, root: d.SUN397(root)),
    ],
)
def test_same_images_and_classes_as_torchvision(name: str, call: Callable, tmp_path: Path) -> None:
    """Pixels and class of every image, matched by pixels, since torchvision does not sort all of its sets."""
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    (make_first_pets if name == "pets" else STAND_INS[name][0])(tmp_path)
    theirs = call(datasets, str(tmp_path))
    ours = load_data(f"tv:{name}", 28, root=tmp_path, recipe="ttc")  # 28 * 256 / 224 = 32 exactly
    prepare = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()])
    keys = class_list(name)["keys"]
    found = {s.x.numpy().tobytes(): keys[s.y] for s in (ours[i] for i in range(len(ours)))}
    assert len(found) == len(theirs)
    for image, label in (theirs[i] for i in range(len(theirs))):
        key = found[prepare(image.convert("RGB")).numpy().tobytes()]
        plain = str(theirs.classes[label]).lower().replace("_", " ").replace("/", " ")
        assert plain == key.lower().replace("_", " ").replace("/", " ")


def test_cifar_pixels_equal_torchvision(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    make_cifar10(tmp_path)
    raw = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())
    theirs = datasets.CIFAR10.__new__(datasets.CIFAR10)
    theirs.data = raw[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    ours = load_data("tv:cifar10", 32, root=tmp_path)
    for i in range(4):
        assert torch.equal((ours[i].x * 255).round().byte(), torch.from_numpy(theirs.data[i]).permute(2, 0, 1))


def test_cifar_files_cannot_run_code(tmp_path: Path) -> None:
    make_cifar10(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("ran",)

    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="has no place in a CIFAR file"):
        load_data("tv:cifar10", 32, root=tmp_path)


def test_parity_prompts_of_ttc(tmp_path: Path) -> None:
    for make in (make_caltech, make_sun, make_imagenet, make_cars):
        make(tmp_path)
    caltech = load_data("tv:caltech101", 28, root=tmp_path, prompts="ttc")
    assert caltech.class_names[:4] == ["person", "person", "Leopards", "Motorbikes"]
    assert caltech.labels == [0, 1, 4, 100]
    assert len(caltech.class_names) == 101
    assert caltech.templates == ["This is a photo of a {}."]
    assert caltech.recipe == "resize32-bilinear-crop28/tv-all"
    sun = load_data("tv:sun397", 28, root=tmp_path, prompts="ttc")
    assert sun.class_names[sun.labels[1]] == "tent/outdoor"
    imagenet = load_data("tv:imagenet", 28, root=tmp_path, prompts="ttc")
    assert len(imagenet.class_names) == 999
    assert imagenet.labels == [0, 638, 998]  # n03710637 is gone and later labels move up
    full = load_data("tv:imagenet", 28, root=tmp_path)
    assert full.labels == [0, 638, 639, 999]
    assert imagenet.class_names[998] == full.class_names[999]
    cars = load_data("tv:cars", 28, root=tmp_path, prompts="ttc")
    assert [cars.class_names[y] for y in cars.labels] == ["audi s4 sedan", "audi s4 sedan"]
    assert cars.labels == [22, 23]


def test_fixed_merges_the_two_face_classes(tmp_path: Path) -> None:
    make_caltech(tmp_path)
    data = load_data("tv:caltech101", 32, root=tmp_path)
    assert len(set(data.class_names)) == len(data.class_names) == 100
    assert data.labels[:2] == [0, 0]
    assert load_data("tv:caltech101", 32, root=tmp_path, prompts="openai").labels[:2] == [0, 1]


def test_coop_split_has_its_own_classes(tmp_path: Path) -> None:
    make_caltech(tmp_path)
    parts = {
        "train": [["Faces/image_0001.jpg", 1, "face"]],
        "val": [],
        "test": [["yin_yang/image_0001.jpg", 2, "yin_yang"], ["accordion/image_0001.jpg", 0, "accordion"]],
    }
    (tmp_path / "caltech101" / "split_zhou_Caltech101.json").write_text(json.dumps(parts))
    data = load_data("tv:caltech101:coop", 32, root=tmp_path, prompts="coop")
    assert data.class_names == ["accordion", "face", "yin yang"]
    assert data.labels == [2, 0]
    assert data.recipe.endswith("/tv-coop")
    assert data.name == "tv:caltech101:coop"
    published = load_data("tv:caltech101", 32, root=tmp_path, split="coop", prompts="openai")
    assert published.class_names[2] == "yin and yang symbol"


def test_files_of_published_sets_are_read_as_their_loaders_do(tmp_path: Path) -> None:
    """CMYK and palette files occur in them; a folder of the user's would refuse these, a truncated file is refused."""
    make_eurosat(tmp_path)
    base = tmp_path / "eurosat" / "2750" / "Forest"
    Image.new("CMYK", (20, 20), (0, 255, 0, 0)).save(base / "Forest_3.jpg")
    assert len(load_data("tv:eurosat", 32, root=tmp_path)) == 4
    (base / "Forest_4.jpg").write_bytes((base / "Forest_2.jpg").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"1 bad file:\n  Forest/Forest_4.jpg: corrupt or truncated"):
        load_data("tv:eurosat", 32, root=tmp_path)
    assert load_data("tv:eurosat", 32, root=tmp_path, skip_bad=True).skipped == 1


def test_a_missing_image_is_an_error_not_a_shorter_set(tmp_path: Path) -> None:
    make_pets(tmp_path)
    (tmp_path / "oxford-iiit-pet" / "images" / "beagle_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"images/beagle_1.jpg: cannot be read \(No such file"):
        load_data("tv:pets", 32, root=tmp_path)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"is incomplete: .*test.txt is missing"):
        load_data("tv:pets", 32, root=tmp_path)


def test_sets_that_are_not_here_say_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "oxford_pets" / "dev").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        load_data("pets", root=tmp_path)
    message = str(caught.value)
    assert "OxfordIIITPet('ROOT', split='test', download=True)" in message
    assert "clip-benchmark/wds_vtab-pets" in message
    assert "a sample is here: folder:oxford_pets/dev" in message
    with pytest.raises(FileNotFoundError, match=r"unpack it to ROOT/imagenet/val"):
        load_data("tv:imagenet", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hub:pets is not in the local cache"):
        load_data("hub:pets", root=tmp_path)


def test_wrong_names_and_splits(tmp_path: Path) -> None:
    make_eurosat(tmp_path)
    with pytest.raises(ValueError, match=r"unknown named data set 'pet'; did you mean 'pets'\?"):
        load_data("tv:pet", root=tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'eurosatt'; did you mean 'eurosat'\?"):
        load_data("eurosatt", root=tmp_path)
    with pytest.raises(ValueError, match=r"tv:eurosat has the splits all, coop; it has no official split; got 'test'"):
        load_data("tv:eurosat", root=tmp_path, split="test")
    with pytest.raises(ValueError, match=r"name two splits"):
        load_data("tv:eurosat:all", root=tmp_path, split="coop")
    with pytest.raises(ValueError, match=r"only hub: takes @PATH"):
        load_data(f"tv:eurosat@{tmp_path}", root=tmp_path)
    jpeg(tmp_path / "eurosat" / "2750" / "Glacier" / "1.jpg", 0)
    with pytest.raises(ValueError, match=r"1 classes of these files are not in the shipped list: 'Glacier'"):
        load_data("tv:eurosat", root=tmp_path)


def make_parquet(base: Path, names: list[str], labels: list[int], split: str = "test") -> None:
    """Through the library that writes the hub's files, so that its metadata are the real ones."""
    datasets = pytest.importorskip("datasets")
    images = []
    for i in range(len(labels)):
        values = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        images.append(Image.fromarray(values))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    (base / "data").mkdir(parents=True, exist_ok=True)
    table.to_parquet(base / "data" / f"{split}-00000-of-00001.parquet", batch_size=2)


def test_hub_parquet_joins_by_name(tmp_path: Path) -> None:
    """The hub may number classes in any order: here waffles come first."""
    make_parquet(tmp_path, ["waffles", "apple_pie", "sushi"], [0, 1, 2, 1, 0], split="validation")
    data = load_data(f"hub:food101@{tmp_path}", 32)
    assert [data.class_names[y] for y in data.labels] == ["waffles", "apple pie", "sushi", "apple pie", "waffles"]
    assert len(data.class_names) == 101
    assert data.recipe == "resize32-bicubic-crop32/hub-validation"
    assert data.name == f"hub:food101@{tmp_path}"
    values = np.random.default_rng(3).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    from hashlib import sha256

    assert data.ids[3].split(":")[0] == sha256(values.tobytes()).hexdigest()[:16]
    x, y, _ = next(data.subset(3).batches(3))
    assert x.shape == (3, 3, 32, 32)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[4].x, data[4].x)
    assert y.tolist() == data.subset(3).labels


def test_hub_folder_without_a_known_name(tmp_path: Path) -> None:
    make_parquet(tmp_path / "mine", ["tiger_cat", "dog"], [1, 0, 1])
    data = load_data(f"hub:{tmp_path / 'mine'}", 32)
    assert data.class_names == ["tiger_cat", "dog"]
    assert data.labels == [1, 0, 1]
    assert data.templates == ["a photo of a {}."]
    with pytest.raises(FileNotFoundError, match=r"no split 'train' in .*, which has data/test-00000"):
        load_data(f"hub:{tmp_path / 'mine'}", 32, split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no Parquet file and no tar"):
        load_data(f"hub:{tmp_path / 'empty'}", 32)


def make_tar(base: Path, rows: list[tuple[str, int]], classnames: list[str] | None) -> None:
    (base / "test").mkdir(parents=True)
    with tarfile.open(base / "test" / "0.tar", "w") as tar:
        for i, (stem, label) in enumerate(rows):
            out = io.BytesIO()
            values = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(values).save(out, "PNG")
            for ext, body in (("cls", str(label).encode()), ("png", out.getvalue())):
                info = tarfile.TarInfo(f"{stem}.{ext}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    if classnames is not None:
        (base / "classnames.txt").write_text("\n".join(classnames) + "\n")


def test_hub_tars_join_by_classnames(tmp_path: Path) -> None:
    names = sorted(class_list("pets")["names"]["clip"])  # another order than the official one
    make_tar(tmp_path, [("s0", names.index("Beagle")), ("s1", names.index("Bengal"))], names)
    data = load_data(f"hub:pets@{tmp_path}", 32)
    assert [data.class_names[y] for y in data.labels] == ["Beagle", "Bengal"]
    assert data.labels == [4, 5]
    values = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    resized = load_data(f"hub:pets@{tmp_path}", 20)[1].x
    assert torch.equal((resized * 255).round().byte(), torch.from_numpy(values[:, 2:22]).permute(2, 0, 1))


def test_vtab_background_is_an_extra_class(tmp_path: Path) -> None:
    names = ["background", *class_list("caltech101")["names"]["clip"]]
    make_tar(tmp_path, [("a", 0), ("b", 1), ("c", 101)], names)
    data = load_data(f"hub:caltech101@{tmp_path}", 32, prompts="openai")
    assert len(data.class_names) == 102
    assert [data.class_names[y] for y in data.labels] == ["background", "off-center face", "yin and yang symbol"]


def test_repeated_names_of_imagenet_still_join(tmp_path: Path) -> None:
    names = class_list("imagenet")["names"]["clip"]
    assert len(set(names)) < 1000
    make_tar(tmp_path, [("a", 657), ("b", 744)], names)
    data = load_data(f"hub:imagenet@{tmp_path}", 32)
    assert [data.class_names[y] for y in data.labels] == ["missile", "projectile"]


def test_hub_files_that_do_not_say_enough(tmp_path: Path) -> None:
    make_tar(tmp_path / "a", [("s0", 0)], None)
    with pytest.raises(ValueError, match=r"nothing says what they mean: expected a ClassLabel feature or classnames"):
        load_data(f"hub:pets@{tmp_path / 'a'}", 32)
    make_tar(tmp_path / "b", [("s0", 7)], ["Beagle", "Bengal"])
    with pytest.raises(ValueError, match=r"labels in .* run to 7, but it names 2 classes"):
        load_data(f"hub:pets@{tmp_path / 'b'}", 32)
    with pytest.raises(FileNotFoundError, match=r"there is no folder"):
        load_data(f"hub:pets@{tmp_path / 'c'}", 32)


def test_table_marks_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_eurosat(tmp_path)
    monkeypatch.setenv("IRONCLIP_DATA", str(tmp_path))
    rows = {r.name: r for r in known_data()}
    assert set(SETS) < set(rows)
    assert rows["eurosat"].available
    assert not rows["pets"].available
    assert rows["eurosat"].kind == "survey"
    assert rows["cifar10"].kind == "named"
