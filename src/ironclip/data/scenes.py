"""What a `shapes` image shows: its random parameters, its words, its captions. The pixels are drawn in
`shapes.py`.

One scene is one coloured shape on a patterned background. Everything about scene i of a split follows from
Philox(key = (seed, split, i)), so a scene does not depend on which others are made with it, nor on the image
size. Four of the 48 colour-shape combinations are held out: `train` and `val` never show them, `test` shows
all and `heldout` only these. Every colour and every shape occurs in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VERSION = "shapes-v1"
COLOURS = {
    "red": (200, 60, 55),
    "green": (70, 155, 75),
    "blue": (65, 90, 195),
    "yellow": (215, 195, 75),
    "purple": (140, 70, 165),
    "cyan": (75, 185, 195),
    "white": (232, 232, 230),
    "black": (30, 30, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = ("plain", "striped", "chequered", "dotted", "cloudy", "shaded")
SIZES = {"small": (0.35, 0.41), "medium": (0.46, 0.54), "large": (0.6, 0.7)}  # radius, in halves of the side
COMBINATIONS = tuple((c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)))
HELD_OUT_NAMES = (("red", "triangle"), ("blue", "star"), ("purple", "cross"), ("white", "ring"))
HELD_OUT = tuple((list(COLOURS).index(c), SHAPES.index(s)) for c, s in HELD_OUT_NAMES)
_SEEN = tuple(c for c in COMBINATIONS if c not in HELD_OUT)


@dataclass(frozen=True)
class Split:
    """`code` is part of the random key; `length` is that of the data set (`render` takes any index)."""

    code: int
    length: int
    combinations: tuple[tuple[int, int], ...]


SPLITS = {
    "test": Split(0, 2000, COMBINATIONS),
    "train": Split(1, 50_000, _SEEN),
    "val": Split(2, 960, _SEEN),
    "heldout": Split(3, 480, HELD_OUT),
}

_CAPTIONS = (
    "a photo of a {colour} {shape}.",
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a photo of a {size} {colour} {shape} {position}.",
    "a {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} on a {background} background",
    "a photo of a {colour} {shape} {position} of a {background} picture.",
    "one {shape}, {size} and {colour}, {position}",
    "there is a {colour} {shape} {position}.",
    "a {background} background with a {size} {colour} {shape} {position}",
)
_PLACES = {
    (0, 0): "at the top left",
    (0, 1): "at the top",
    (0, 2): "at the top right",
    (1, 0): "on the left",
    (1, 1): "in the center",
    (1, 2): "on the right",
    (2, 0): "at the bottom left",
    (2, 1): "at the bottom",
    (2, 2): "at the bottom right",
}


@dataclass(frozen=True)
class Scene:
    """The attributes of one image, as words."""

    colour: str
    shape: str
    size: str
    position: str
    background: str

    @property
    def name(self) -> str:
        """The class name, "red circle"."""
        return f"{self.colour} {self.shape}"

    def captions(self) -> list[str]:
        """All ten ways in which the caption writer may describe the image."""
        return [c.format(**vars(self)) for c in _CAPTIONS]


@dataclass(frozen=True)
class Draws:
    """Parameters of n scenes. `u`: (n, 64) float64 uniforms; see `shapes.draw` for the columns beyond those
    used here.
    """

    colour: np.ndarray  # (n,) int, index into COLOURS
    shape: np.ndarray  # (n,) int, index into SHAPES
    size: np.ndarray  # (n,) int, index into SIZES
    background: np.ndarray  # (n,) int, index into BACKGROUNDS
    radius: np.ndarray  # (n,) in halves of the image side
    x: np.ndarray  # (n,) centre, -1 left to 1 right
    y: np.ndarray  # (n,) centre, -1 top to 1 bottom
    u: np.ndarray

    def scene(self, k: int) -> Scene:
        row = 0 if self.y[k] < -0.22 else 2 if self.y[k] > 0.22 else 1
        column = 0 if self.x[k] < -0.22 else 2 if self.x[k] > 0.22 else 1
        return Scene(
            colour=list(COLOURS)[self.colour[k]],
            shape=SHAPES[self.shape[k]],
            size=list(SIZES)[self.size[k]],
            position=_PLACES[row, column],
            background=BACKGROUNDS[self.background[k]],
        )

    def caption(self, k: int) -> str:
        """The one caption that the scene's own randomness picks."""
        scene = self.scene(k)
        return _CAPTIONS[int(self.u[k, 6] * len(_CAPTIONS))].format(**vars(scene))


def class_names() -> list[str]:
    """The 48 names, "red circle" first, in label order."""
    return [f"{list(COLOURS)[c]} {SHAPES[s]}" for c, s in COMBINATIONS]


def held_out_names() -> list[str]:
    """The names of the four combinations that `train` and `val` never show."""
    return [f"{c} {s}" for c, s in HELD_OUT_NAMES]


def split_of(name: str) -> Split:
    if name not in SPLITS:
        raise ValueError(f"shapes has the splits {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]


def labels(indices: Sequence[int], split: str) -> list[int]:
    """Class of each index. Combinations take turns, so any run of indices is balanced to within one."""
    combos = [c * len(SHAPES) + s for c, s in split_of(split).combinations]
    return [combos[i % len(combos)] for i in indices]


def generators(indices: Sequence[int], split: str, seed: int) -> list[np.random.Generator]:
    """One independent stream a scene. `seed` and every index must be in [0, 2**56) and [0, 2**64)."""
    code = split_of(split).code
    if not 0 <= seed < 2**56:
        raise ValueError(f"seed must be in [0, 2**56), got {seed}")
    if any(i < 0 for i in indices):
        raise ValueError(f"shapes indices must be 0 or more, got {min(indices)}")
    return [np.random.Generator(np.random.Philox(key=[(seed << 8) | code, i])) for i in indices]


def draws(indices: Sequence[int], split: str, streams: Sequence[np.random.Generator]) -> Draws:
    """Take the first 64 uniforms of each stream and read the scene's parameters from them."""
    u = np.stack([g.random(64) for g in streams]) if len(indices) else np.empty((0, 64))
    label = np.array(labels(indices, split), dtype=np.int64)
    size = (u[:, 0] * len(SIZES)).astype(np.int64)
    low, high = np.array(list(SIZES.values())).T
    radius = low[size] + (high - low)[size] * u[:, 1]
    room = 0.94 - radius
    return Draws(
        colour=label // len(SHAPES),
        shape=label % len(SHAPES),
        size=size,
        background=(u[:, 2] * len(BACKGROUNDS)).astype(np.int64),
        radius=radius,
        x=(2 * u[:, 3] - 1) * room,
        y=(2 * u[:, 4] - 1) * room,
        u=u,
    )
