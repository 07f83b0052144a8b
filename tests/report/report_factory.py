"""Builds a results dictionary of format 1 from a few facts; the tests state what they need and the rest is plain."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

from ironclip.evaluation.stats import harmonic, wilson

PARADIGMS = {"none": "baseline", "tecoa": "training-time", "ttc": "training-free", "rtpt": "test-time adaptation"}


def png(rgb: tuple[int, int, int], size: int = 8) -> str:
    """A plain square of one colour, base64."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\0" + bytes(rgb) * size for _ in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def interval(name: str, percent: float | None, n: int) -> dict[str, Any]:
    """``name``, ``name_lo``, ``name_hi`` in percent."""
    if percent is None:
        return {name: None, f"{name}_lo": None, f"{name}_hi": None}
    lo, hi = wilson(percent / 100 * n, n)
    return {name: percent, f"{name}_lo": 100 * lo, f"{name}_hi": 100 * hi}


def row(
    defense: str, threat: str = "static", clean: float = 60.0, robust: float | None = 30.0, **more: Any
) -> dict[str, Any]:
    """One row with every field of the format."""
    n = more.get("n", 200)
    plain = {
        "vlm": "lite",
        "data": "photos",
        "defense": defense,
        "defense_spec": f"{defense.upper()}()",
        "title": defense.upper(),
        "paradigm": PARADIGMS.get(defense, "training-free"),
        "threat": threat,
        "attack": "adaptive" if threat == "adaptive" else "PGD(eps=1/255, steps=10)",
        "eps": "1/255",
        "norm": "linf",
        "n": n,
        **interval("clean", clean, n),
        **interval("robust", robust, n),
        "mean_per_class": None,
        "flags": [],
        "unreliable": False,
        "ms_per_image": 12.5,
        "ms_batch": 3.25,
        "forwards": 3.0,
        "backwards": 2.0,
        "attack_forwards": 11.0,
        "attack_backwards": 10.0,
        "memory_mb": None,
        "ties": 0,
        "members": [],
        "budget": "quick: 10 steps, EOT 2, 4 fresh draws",
        "prompts": "fixed",
        "seed": 0,
        "precision": "fp32",
        "recipe": "photos-224-bicubic",
        "state": "",
        "seconds": 4.5,
        "digest": "0123456789abcdef",
    }
    return {**plain, **more}


def worst(defense: str, clean: float = 60.0, robust: float = 20.0, **more: Any) -> dict[str, Any]:
    """The entry of ``worst`` that goes with `row`."""
    n = more.get("n", 64)
    plain = {
        "vlm": "lite",
        "data": "photos",
        "defense": defense,
        "title": defense.upper(),
        "eps": "1/255",
        "n": n,
        "clean": clean,
        **interval("robust", robust, n),
        "harmonic": harmonic(clean, robust),
        "members": [
            {"name": "through-ce", "alone": robust + 5, "ran": n},
            {"name": "transfer", "alone": robust, "ran": 20},
        ],
        "flags": [],
        "unreliable": False,
        "budget": "quick: 10 steps, EOT 2, 4 fresh draws",
    }
    return {**plain, **more}


def defended(
    defense: str, clean: float, static: float, adaptive: float | None, **more: Any
) -> dict[str, list[dict[str, Any]]]:
    """Rows and worst entry of one defense in one block; ``adaptive=None``: only static."""
    rows = [row(defense, "static", clean, static, **more)]
    if adaptive is None:
        return {"rows": rows, "worst": []}
    rows.append(row(defense, "adaptive", clean, adaptive, n=64, **more))
    kept = {k: v for k, v in more.items() if k in ("vlm", "data", "eps", "title", "flags", "unreliable")}
    return {"rows": rows, "worst": [worst(defense, clean, adaptive, **kept)]}


def results(*parts: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """The whole dictionary."""
    full: dict[str, Any] = {
        "format": 1,
        "command": "ironclip bench --vlm lite --data photos --defenses all",
        "version": "0.1.0",
        "notes": [],
        "rows": [r for p in parts for r in p["rows"]],
        "worst": [w for p in parts for w in p["worst"]],
        "pairs": [],
        "errors": [],
        "not_applicable": [],
        "gallery": [],
    }
    return {**full, **more}


def picture(defense: str, sample: str = "a1", **more: Any) -> dict[str, Any]:
    """One gallery entry."""
    top = [["tabby cat", 0.81], ["lynx", 0.1], ["dog", 0.05], ["fox", 0.03], ["chair", 0.01]]
    plain = {
        "vlm": "lite",
        "data": "photos",
        "defense": defense,
        "title": defense.upper(),
        "threat": "static",
        "attack": "PGD(eps=1/255, steps=10)",
        "eps": "1/255",
        "sample_id": sample,
        "label": 0,
        "class_name": "tabby cat",
        "clean_png": png((200, 60, 40)),
        "adv_png": png((190, 70, 40)),
        "diff_png": png((120, 130, 140)),
        "seen_png": png((195, 66, 41)),
        "undefended_clean": top,
        "undefended_adv": [["lynx", 0.6], *top[:1], *top[2:]],
        "defended_clean": top,
        "defended_adv": top,
    }
    return {**plain, **more}
