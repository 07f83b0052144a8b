"""Drawing scenes from signed distances, a batch at a time: anti-aliased at any size, exact in float32.

Every operation per pixel is IEEE add, multiply, divide or square root, and angles are turned into cosines one by one,
so an image comes out the same whichever others are drawn with it.
"""

from __future__ import annotations

import math

import numpy as np

from ironclip.data.scenes import BACKGROUNDS, COLOURS, SHAPES, Draws

_SPECKS = 3


def column(values: np.ndarray, dims: int = 3) -> np.ndarray:
    return values.astype(np.float32).reshape(-1, *[1] * (dims - 1))


def draw(d: Draws, size: int) -> np.ndarray:
    """The n scenes without grain: (n, 3, size, size) float32, about [0, 1]."""
    n = len(d.colour)
    step = 2 / size
    axis = ((np.arange(size) + 0.5) * step - 1).astype(np.float32)
    x, y = np.broadcast_to(axis, (n, size, size)), np.broadcast_to(axis[:, None], (n, size, size))
    image = _background(d, x, y, step)
    for k in range(_SPECKS):
        _speck(image, d, x, y, step, k)
    turn = (2 * d.u[:, 5] - 1) * (15 * np.pi / 180)
    cos, sin = _turn(turn)
    c, s = column(cos / d.radius), column(sin / d.radius)
    dx, dy = x - column(d.x), y - column(d.y)
    u, v = c * dx + s * dy, c * dy - s * dx
    inside = np.empty((n, size, size), np.float32)
    for k, shape in enumerate(SHAPES):
        rows = np.flatnonzero(d.shape == k)
        inside[rows] = _cover(distance(shape, u[rows], v[rows]), column(d.radius[rows] / step))
    paint = np.array(list(COLOURS.values()))[d.colour] / 255 + (d.u[:, 8:11] - 0.5) * 0.16
    shade = 1 + (d.u[:, 11] - 0.5)[:, None, None] * 0.3 * (u + v)  # the light falls across the shape
    image += (paint[:, :, None, None].astype(np.float32) * shade[:, None].astype(np.float32) - image) * inside[:, None]
    return image * column(0.85 + 0.25 * d.u[:, 12], 4)


def _turn(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine one by one: vector kernels may round the same angle differently in another batch."""
    return np.array([math.cos(a) for a in angle]), np.array([math.sin(a) for a in angle])


def _cover(distance: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Share of a pixel inside, from the signed distance and the number of pixels in its unit."""
    return (np.float32(0.5) - distance * np.asarray(scale, np.float32)).clip(0, 1)


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a shape of about unit radius; v points down."""
    f = np.float32
    if shape == "circle":
        return np.sqrt(u * u + v * v) - f(0.85)
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - f(0.74)) - f(0.22)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - f(0.78)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.maximum(np.maximum(a, b) - f(0.98), np.minimum(a, b) - f(0.32))
    if shape == "triangle":
        return np.maximum(v, f(0.8660254) * np.abs(u) - f(0.5) * v) - f(0.55)
    return _star(u, -v)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star: fold the plane onto one half of one point, then measure the distance to its edge."""
    f = np.float32
    cos, sin = f(0.809016994), f(0.587785252)
    u = np.abs(u)
    fold = 2 * np.maximum(cos * u - sin * v, 0)
    u, v = u - fold * cos, v + fold * sin
    fold = 2 * np.maximum(-cos * u - sin * v, 0)
    u, v = u + fold * cos, v + fold * sin
    u, v = np.abs(u), v - f(1.08)
    ex, ey = f(0.46) * sin, f(0.46) * cos - f(1)
    along = ((u * ex + v * ey) / (ex * ex + ey * ey)).clip(0, f(1.08))
    du, dv = u - ex * along, v - ey * along
    return np.sqrt(du * du + dv * dv) * np.sign(v * ex - u * ey)


def _background(d: Draws, x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
    """Two muted colours mixed by the pattern of the scene's background: (n, 3, size, size)."""
    base = 0.34 + 0.3 * d.u[:, 13:14] + (d.u[:, 14:17] - 0.5) * 0.2
    contrast = np.where(d.u[:, 17:18] < 0.5, -1, 1) * (0.05 + 0.1 * d.u[:, 18:19])
    other = base + contrast + (d.u[:, 19:22] - 0.5) * 0.08
    angle = d.u[:, 22] * np.pi
    often = 1.5 + 3 * d.u[:, 23]  # repeats of the pattern in half the image side
    cos, sin = _turn(angle)
    c, s = column(cos * often), column(sin * often)
    a, b = c * x + s * y + column(d.u[:, 24]), c * y - s * x + column(d.u[:, 25])
    mix = np.zeros_like(a)
    for k, kind in enumerate(BACKGROUNDS):
        rows = np.flatnonzero(d.background == k)
        mix[rows] = _pattern(kind, a[rows], b[rows], column(1 / (often[rows] * step)), d.u[rows, 28:64])
    first, second = (t.astype(np.float32)[:, :, None, None] for t in (base, other))
    return first + (second - first) * mix[:, None]


def _pattern(kind: str, a: np.ndarray, b: np.ndarray, pixels: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Mixing weight in [0, 1] at pattern coordinates a, b, whose unit is one repeat and spans `pixels`
    pixels.
    """
    f = np.float32
    if kind == "plain":
        return np.zeros_like(a)
    if kind in ("striped", "chequered"):
        p, q = (_cover(np.abs(t - np.floor(t) - f(0.5)) - f(0.25), pixels) for t in (a, b))
        return p if kind == "striped" else p + q - 2 * p * q
    if kind == "dotted":
        p, q = a - np.floor(a) - f(0.5), b - np.floor(b) - f(0.5)
        return _cover(np.sqrt(p * p + q * q) - f(0.27), pixels)
    size = a.shape[-1]
    place = np.linspace(0, 5, size)
    if kind == "shaded":  # the straight ramp from one of the corners' mean
        ramp = (place / 5).astype(np.float32)
        return column(u[:, 0]) * ramp + column(1 - u[:, 0]) * ramp[:, None]
    cell = np.minimum(place.astype(np.int64), 4)  # cloudy: a 6 x 6 lattice, linearly interpolated
    part = (place - cell).astype(np.float32)
    lattice = u.reshape(-1, 6, 6).astype(np.float32)
    wide = lattice[:, :, cell] * (1 - part) + lattice[:, :, cell + 1] * part
    return wide[:, cell] * (1 - part[:, None]) + wide[:, cell + 1] * part[:, None]


def _speck(image: np.ndarray, d: Draws, x: np.ndarray, y: np.ndarray, step: float, k: int) -> None:
    """Mix distractor k, a small coloured dot anywhere, into `image`."""
    u = d.u[:, 28 + 8 * k : 36 + 8 * k]
    dx, dy = x - column(2 * u[:, 0] - 1), y - column(2 * u[:, 1] - 1)
    radius = 0.03 + 0.05 * u[:, 2]
    dot = _cover(np.sqrt(dx * dx + dy * dy) - column(radius), 1 / step) * column(0.7 * u[:, 3])
    image += (u[:, 4:7].astype(np.float32)[:, :, None, None] - image) * dot[:, None]
