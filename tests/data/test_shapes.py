"""Laws of the procedural set: scenes depend on their index only, pixels show what the words say."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from ironclip.data import load_data
from ironclip.data.drawing import distance, draw
from ironclip.data.scenes import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    SHAPES,
    class_names,
    draws,
    generators,
    held_out_names,
)
from ironclip.data.shapes import _CHUNK, render


def test_an_image_does_not_depend_on_its_batch_or_order() -> None:
    indices = [int(i) for i in np.random.default_rng(0).permutation(3 * _CHUNK + 5)]
    together = render(indices, "train")
    alone = [render([i], "train") for i in indices[:20]]
    assert torch.equal(together.x[:20], torch.cat([a.x for a in alone]))
    assert together.captions[:20] == [a.captions[0] for a in alone]
    back = render(sorted(indices), "train")
    assert torch.equal(back.x[torch.tensor(indices)], together.x)


def test_pixels_are_frozen() -> None:
    """A change of the renderer changes every figure of `tiny`: it needs a new version name, not a silent
    edit.
    """
    pixels = (render(range(64), "test").x * 255).round().to(torch.uint8).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "cbf9d472b68406fc"


def test_range_type_and_eight_bits() -> None:
    r = render(range(40), "test", size=48)
    assert r.x.shape == (40, 3, 48, 48)
    assert r.x.dtype == torch.float32
    assert r.y.dtype == torch.int64
    assert r.x.min() >= 0
    assert r.x.max() <= 1
    assert torch.equal((r.x * 255).round() / 255, r.x)


def test_splits_and_seeds_are_different_worlds() -> None:
    a, b, c = render(range(48), "train").x, render(range(48), "val").x, render(range(48), "train", seed=1).x
    for other in (b, c):
        assert ((a - other).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_held_out_combinations_never_occur_in_training() -> None:
    held = set(held_out_names())
    assert len(held) == len(HELD_OUT) == 4
    assert len(class_names()) == len(set(class_names())) == len(COMBINATIONS) == 48
    seen = set(COMBINATIONS) - set(HELD_OUT)
    assert {c for c, _ in seen} == set(range(len(COLOURS)))
    assert {s for _, s in seen} == set(range(len(SHAPES)))
    for split in ("train", "val"):
        data = load_data("shapes", 64, split=split)
        assert {data.class_names[y] for y in data.labels} == set(class_names()) - held
    heldout = load_data("shapes:heldout", 64)
    assert {heldout.class_names[y] for y in heldout.labels} == held
    assert len(heldout.class_names) == 48


def test_test_split_is_balanced_and_named() -> None:
    data = load_data("shapes", 64)
    assert len(data) == 2000
    assert data.name == "shapes"
    assert data.recipe == "none"
    assert data.prompt_set == "generic"
    assert set(Counter(data.labels).values()) == {41, 42}
    assert load_data("shapes:test", 64).ids == data.ids
    assert set(data.held_out) == set(held_out_names())


def test_the_shape_has_its_colour_and_its_place() -> None:
    """Without grain and light, the colour at the centre (ring: on the band) is nearest to the named one."""
    indices = list(range(480))
    d = draws(indices, "test", generators(indices, "test", 0))
    image = draw(d, 64)
    table = np.array(list(COLOURS.values())) / 255
    hits = 0
    for k in indices:
        off = 0.74 * d.radius[k] if SHAPES[d.shape[k]] == "ring" else 0.0
        column, row = int((d.x[k] + off + 1) * 32), int((d.y[k] + 1) * 32)
        seen = image[k, :, row, column] / (0.85 + 0.25 * d.u[k, 12])
        hits += int(np.abs(table - seen).sum(axis=1).argmin() == d.colour[k])
    assert hits / len(indices) > 0.98


def test_every_shape_covers_a_similar_area_and_stays_inside() -> None:
    indices = list(range(240))
    d = draws(indices, "test", generators(indices, "test", 0))
    assert (np.abs(d.x) + d.radius < 1).all()
    assert (np.abs(d.y) + d.radius < 1).all()
    axis = (np.arange(200) + 0.5) / 80 - 1.25
    u, v = (t.astype(np.float32)[None] for t in np.meshgrid(axis, axis))
    area = {s: float((distance(s, u, v) < 0).mean() * 2.5**2) for s in SHAPES}
    assert area["circle"] == pytest.approx(np.pi * 0.85**2, rel=0.02)
    assert area["square"] == pytest.approx(4 * 0.78**2, rel=0.02)
    assert area["ring"] == pytest.approx(np.pi * (0.96**2 - 0.52**2), rel=0.02)
    assert area["cross"] == pytest.approx(4 * (2 * 0.98 * 0.32 - 0.32**2), rel=0.02)
    assert area["triangle"] == pytest.approx(3 * 3**0.5 * 0.55**2, rel=0.02)
    # ten right triangles: outer radius 1.08, inner vertices 0.46 of the way along the fold
    assert 0.9 < area["star"] < 1.7


def test_star_has_five_points() -> None:
    """Crossings of a circle between inner and outer radius: ten changes of sign."""
    angle = np.linspace(0, 2 * np.pi, 3601, dtype=np.float32)
    inside = distance("star", 0.75 * np.cos(angle), 0.75 * np.sin(angle)) < 0
    assert int((inside[1:] != inside[:-1]).sum()) == 10
    assert (
        distance("star", np.float32([0]), np.float32([-1.0]))[0]
        < 0
        < distance("star", np.float32([0]), np.float32([1.0]))[0]
    )


def test_captions_are_true_and_vary() -> None:
    data = load_data("shapes", 64, limit=60)
    r = render(data.rows, "test")
    for i in range(len(data)):
        scene = data.scene(i)
        assert scene.name == data.class_names[data.labels[i]]
        assert data.caption(i) == r.captions[i]
        assert r.scenes[i] == scene
        assert data.caption(i) in data.captions(i)
        assert len(set(data.captions(i))) == 10
        assert all(scene.colour in c and scene.shape in c for c in data.captions(i))
    assert len({c.split()[0] for c in r.captions}) > 1
    scene = data.scene(0)
    assert f"a {scene.size} {scene.colour} {scene.shape} on a {scene.background} background" in data.captions(0)


def test_position_words_agree_with_the_place() -> None:
    indices = list(range(300))
    d = draws(indices, "test", generators(indices, "test", 0))
    for k in indices:
        words = d.scene(k).position
        assert ("left" in words) == (d.x[k] < -0.22)
        assert ("right" in words) == (d.x[k] > 0.22)
        assert ("top" in words) == (d.y[k] < -0.22)
        assert ("bottom" in words) == (d.y[k] > 0.22)


def test_other_sizes_show_the_same_scene() -> None:
    small = torch.nn.functional.avg_pool2d(render(range(24), "test", size=128).x, 2)
    assert (small - render(range(24), "test", size=64).x).abs().mean() < 0.02


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes has the splits test, train, val, heldout, got 'dev'"):
        load_data("shapes:dev")
    with pytest.raises(ValueError, match="name two splits"):
        load_data("shapes:val", split="train")
    with pytest.raises(ValueError, match="size must be 8 pixels or more, got 4"):
        render([0], size=4)
    with pytest.raises(ValueError, match="indices must be 0 or more, got -1"):
        render([-1])
    with pytest.raises(ValueError, match="seed must be in"):
        render([0], seed=-1)
