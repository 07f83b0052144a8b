"""`folder:PATH`: class lists, paths, bad images, ids."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ironclip.data import load_data
from ironclip.data.decode import BadImageError, decode


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """The noisy RGB image that `make_folder` stores under this seed."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_class_names_come_from_folder_names(make_folder: Callable[..., Path]) -> None:
    base = make_folder(tiger_cat=2, dog=1)
    data = load_data(f"folder:{base}", 32)
    assert data.class_names == ["dog", "tiger cat"]
    assert data.labels == [0, 1, 1]
    assert data.templates == ["a photo of a {}."]
    assert data.prompt_set == "generic"
    assert data.recipe == "resize32-bicubic-crop32"
    assert data.skipped == 0
    sample = data[1]
    assert sample.x.shape == (3, 32, 32)
    assert sample.x.dtype == torch.float32
    assert sample.x.min() >= 0
    assert sample.x.max() <= 1
    assert sample.y == 1
    assert sample.id == data.ids[1]


def test_id_is_content_path_and_label(make_folder: Callable[..., Path]) -> None:
    from hashlib import sha256

    base = make_folder(cat=1)
    expected = sha256(np.asarray(picture(0)).tobytes()).hexdigest()[:16]
    assert load_data(f"folder:{base}", 32).ids == [f"{expected}:cat/0.png:0"]


def test_classes_json_lists_the_classes_of_all_parts(make_folder: Callable[..., Path]) -> None:
    base = make_folder("pets/dev", b=1, c=2)
    (base.parent / "classes.json").write_text(json.dumps({"c": "cee", "a": "ay", "b": "bee"}))
    data = load_data(f"folder:{base}", 16)
    assert data.class_names == ["ay", "bee", "cee"]
    assert data.labels == [1, 2, 2]


def test_label_space_decides_over_classes_json(make_folder: Callable[..., Path]) -> None:
    base = make_folder("set/dev", x=1, y=1)
    (base.parent / "classes.json").write_text(json.dumps({"x": "ex", "y": "why"}))
    (base.parent / "label_space.json").write_text(json.dumps(["zed", "why", "ex"]))
    data = load_data(f"folder:{base}", 16)
    assert data.class_names == ["zed", "why", "ex"]
    assert data.labels == [2, 1]
    entries = [
        {"folder": "y", "name": "first"},
        {"folder": "q", "name": "none here"},
        {"folder": "x", "name": "last"},
    ]
    (base.parent / "label_space.json").write_text(json.dumps(entries))
    data = load_data(f"folder:{base}", 16)
    assert data.class_names == ["first", "none here", "last"]
    assert data.labels == [2, 0]


def test_class_files_that_disagree_are_refused(make_folder: Callable[..., Path]) -> None:
    base = make_folder("set/dev", persian_cat=1)
    parent = base.parent / "classes.json"
    parent.write_text(json.dumps({"persian_cats": "Persian"}))
    with pytest.raises(ValueError, match=r"class folder 'persian_cat' .* nearest known folder: persian_cats"):
        load_data(f"folder:{base}")
    parent.write_text("{")
    with pytest.raises(ValueError, match=r"classes.json is not valid JSON"):
        load_data(f"folder:{base}")
    parent.write_text(json.dumps(["a"]))
    with pytest.raises(ValueError, match=r"must map folder names to class names"):
        load_data(f"folder:{base}")
    parent.write_text(json.dumps({"persian_cat": "Persian"}))
    (base / "label_space.json").write_text(json.dumps(["a", "a", "Persian"]))
    with pytest.raises(ValueError, match=r"repeats a name"):
        load_data(f"folder:{base}")


def test_forgotten_part_is_named(make_folder: Callable[..., Path]) -> None:
    base = make_folder("set/dev", x=1)
    (base.parent / "classes.json").write_text(json.dumps({"x": "ex"}))
    with pytest.raises(ValueError, match=r"has the parts dev; choose one, for example folder:\.\.\./set/dev"):
        load_data(f"folder:{base.parent}")


def test_paths_below_the_root_and_the_working_directory(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_folder("root/set/dev", cat=1)
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    by_root = load_data("folder:set/dev", 16, root=root)
    assert by_root.name == load_data(f"folder:{base}", 16, root=root).name == "folder:set/dev"
    assert load_data("folder:set", 16, root=root, split="dev").name == "folder:set/dev"
    monkeypatch.setenv("IRONCLIP_DATA", str(root))
    assert load_data("folder:set/dev", 16).ids == by_root.ids
    monkeypatch.delenv("IRONCLIP_DATA")
    assert load_data(f"folder:{base}", 16).name == f"folder:{base.resolve().as_posix()}"
    monkeypatch.chdir(root)
    assert load_data("folder:set/dev", 16).name == "folder:set/dev"


def test_ambiguous_relative_path_is_refused(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder("root/set", cat=1)
    make_folder("here/set", cat=1)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"ambiguous.*write the absolute path"):
        load_data("folder:set", root=tmp_path / "root")


def test_missing_path_suggests_the_nearest(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    make_folder("top/oxford_pets/dev", cat=1)
    with pytest.raises(FileNotFoundError, match=r"does not exist; did you mean .*/top/oxford_pets\?"):
        load_data("folder:oxford_petz/dev", root=tmp_path / "top")
    with pytest.raises(FileNotFoundError, match=r"nearest existing folder is .*/top, which has oxford_pets"):
        load_data("folder:zzz", root=tmp_path / "top")
    with pytest.raises(FileNotFoundError, match=r"root must be an existing folder"):
        load_data("folder:x", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"folder: needs a path"):
        load_data("folder:")


def test_layouts_without_classes_or_images(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    with pytest.raises(ValueError, match=r"holds no image and no class folder; expected flat/CLASS/IMAGE.jpg"):
        load_data(f"folder:{flat}")
    picture(0).save(flat / "cat.png")
    with pytest.raises(ValueError, match=r"has 1 images but no class folders; .* for example flat/cat/cat.png"):
        load_data(f"folder:{flat}")
    with pytest.raises(ValueError, match=r"expects a folder .* got the file"):
        load_data(f"folder:{flat / 'cat.png'}")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no image in its 1 class folders"):
        load_data(f"folder:{tmp_path / 'hollow'}")


def _png16() -> bytes:
    """A 2 x 2 RGB PNG of 16 bits a channel, which Pillow would open as plain RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def _bomb() -> bytes:
    return _saved(Image.new("1", (8001, 8000)), "PNG")


BAD = {
    "empty.jpg": (lambda: b"", r"empty file \(0 bytes\)"),
    "text.jpg": (lambda: b"no image at all", r"not an image"),
    "notes.txt": (lambda: b"remember", r"not an image"),
    "cut.jpg": (lambda: _saved(picture(1, 200, 200), "JPEG")[:3000], r"corrupt or truncated"),
    "cut.png": (lambda: _saved(picture(1, 90, 90), "PNG")[:9000], r"corrupt or truncated"),
    "flipped.png": (lambda: _flipped(_saved(picture(1), "PNG")), r"corrupt"),
    "cmyk.jpg": (lambda: _saved(picture(1).convert("CMYK"), "JPEG"), r"CMYK image"),
    "grey16.png": (
        lambda: _saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PNG"),
        r"more than 8 bits",
    ),
    "rgb16.png": (_png16, r"more than 8 bits"),
    "float.tif": (lambda: _saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), r"more than 8 bits"),
    "palette.png": (lambda: _saved(picture(1).quantize(16), "PNG"), r"palette image"),
    "moving.gif": (
        lambda: _saved(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
        r"animated or multi-page \(2 frames\)",
    ),
    "huge.png": (_bomb, r"oversize: 8001 x 8000 is more than 64 megapixels"),
    "glass.png": (lambda: _saved(_glass(), "PNG"), r"transparent pixels"),
}


def _glass() -> Image.Image:
    image = picture(1).convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, 0))
    return image


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize("name", BAD)
def test_each_bad_image_has_its_reason(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(BadImageError, match=reason):
        decode(make())


def test_bad_images_are_named_and_nothing_runs(make_folder: Callable[..., Path]) -> None:
    base = make_folder(cat=2, dog=1)
    for name, (make, _) in BAD.items():
        (base / "cat" / name).write_bytes(make())
    with pytest.raises(ValueError) as caught:
        load_data(f"folder:{base}", 16)
    message = str(caught.value)
    assert f"has {len(BAD)} bad files:" in message
    assert message.count("\n  cat/") == 10
    assert f"... and {len(BAD) - 10} more" in message
    assert "--skip-bad" in message
    assert "\n  cat/cmyk.jpg: CMYK image" in message
    data = load_data(f"folder:{base}", 16, skip_bad=True)
    assert len(data) == 3
    assert data.skipped == len(BAD)
    assert data.labels == [0, 0, 1]
    assert [x.shape for x, _, _ in data.batches(2)] == [(2, 3, 16, 16), (1, 3, 16, 16)]


def test_all_bad_is_an_error_even_when_skipping(make_folder: Callable[..., Path]) -> None:
    base = make_folder(cat=1)
    (base / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of its 1 files is usable; the first is cat/0.png: empty file"):
        load_data(f"folder:{base}", 16, skip_bad=True)


def test_stray_images_and_empty_classes_count_as_bad(make_folder: Callable[..., Path]) -> None:
    base = make_folder(cat=1)
    picture(3).save(base / "stray.png")
    (base / "void").mkdir()
    (base / ".hidden").mkdir()
    (base / "cat" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 bad files:\n  stray.png: image outside .*\n  void/: class folder without"):
        load_data(f"folder:{base}", 16)
    assert load_data(f"folder:{base}", 16, skip_bad=True).skipped == 2


def test_conversions_that_keep_the_meaning() -> None:
    grey = picture(1).convert("L")
    assert np.array_equal(np.asarray(decode(_saved(grey, "PNG")))[..., 1], np.asarray(grey))
    opaque = picture(1).convert("RGBA")
    assert np.array_equal(np.asarray(decode(_saved(opaque, "PNG"))), np.asarray(picture(1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode(_saved(picture(1, 20, 16), "PNG", exif=exif)).size == (16, 20)


def test_subsets_are_nested_and_depend_on_the_seed(make_folder: Callable[..., Path]) -> None:
    base = make_folder(a=20, b=20)
    full = load_data(f"folder:{base}", 16)
    ten, four = load_data(f"folder:{base}", 16, limit=10), load_data(f"folder:{base}", 16, limit=4)
    assert four.ids == ten.ids[:4]
    assert set(ten.ids) < set(full.ids)
    assert full.subset(10).subset(4).ids == four.ids
    assert load_data(f"folder:{base}", 16, limit=10, seed=1).ids != ten.ids
    assert full.subset(None) is full
    assert sorted(full.subset(99).ids) == sorted(full.ids)
    for i in range(len(ten)):
        place = full.ids.index(ten.ids[i])
        assert torch.equal(ten[i].x, full[place].x)
        assert ten[i].y == full[place].y
    assert ten.manifest_hash == full.subset(10).manifest_hash != full.manifest_hash
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="limit must be a whole number of samples, 1 or more"):
            full.subset(bad)  # type: ignore[arg-type]


def test_batches_follow_the_indices(make_folder: Callable[..., Path]) -> None:
    data = load_data(f"folder:{make_folder(a=3, b=2)}", 16)
    (x, y, ids), (tail, _, _) = data.batches(2, [4, 0, 2])
    assert ids == [data.ids[4], data.ids[0]]
    assert y.tolist() == [1, 0]
    assert torch.equal(x[0], data[4].x)
    assert torch.equal(tail[0], data[2].x)
    assert len([*data]) == 5  # plain iteration ends
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        next(data.batches(0))


def test_hash_cache_notices_a_changed_file(make_folder: Callable[..., Path]) -> None:
    base = make_folder(cat=2)
    before = load_data(f"folder:{base}", 16).ids
    assert load_data(f"folder:{base}", 16).ids == before
    picture(77, 33, 21).save(base / "cat" / "0.png")
    after = load_data(f"folder:{base}", 16).ids
    assert after[0] != before[0]
    assert after[1] == before[1]
    (base / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty file"):
        load_data(f"folder:{base}", 16)


def test_a_broken_cache_only_costs_time(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_folder(cat=1)
    monkeypatch.setenv("IRONCLIP_CACHE", str(tmp_path / "cache"))
    before = load_data(f"folder:{base}", 16).ids
    [file] = (tmp_path / "cache" / "hashes").iterdir()
    file.write_text("{broken")
    assert load_data(f"folder:{base}", 16).ids == before
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("IRONCLIP_CACHE", str(tmp_path / "blocked"))
    assert load_data(f"folder:{base}", 16).ids == before


def test_a_file_that_breaks_after_opening_is_named(make_folder: Callable[..., Path]) -> None:
    base = make_folder(cat=1)
    data = load_data(f"folder:{base}", 16)
    (base / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"cat/0.png: cannot be read .*it was readable when the set was opened"):
        data[0]


def test_real_photographs(shared: Path) -> None:
    pets = load_data("folder:oxford_pets/dev", 64, root=shared)
    assert len(pets) == 259
    assert len(pets.class_names) == 37
    assert pets.name == "folder:oxford_pets/dev"
    imagenet = load_data("folder:imagenet1k_sample/dev", 64, root=shared)
    assert len(imagenet.class_names) == 1000
    assert len(set(imagenet.labels)) == 300
    names = json.loads((shared / "imagenet1k_sample" / "classes.json").read_text())
    for i in (0, 150, 299):
        folder = imagenet.ids[i].split(":")[1].split("/")[0]
        assert imagenet.class_names[imagenet.labels[i]] == names[folder]
    assert len(load_data("folder:dtd/dev", 64, root=shared).class_names) == 47
