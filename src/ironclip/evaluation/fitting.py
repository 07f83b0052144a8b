"""``fit_defense``: a defense, a model and training data in; a state that ``--state`` reads, and its manifest, out."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ironclip.core.loop import Loop
from ironclip.core.spec import full_text, split_list, to_text
from ironclip.core.types import State, Trainable
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.data import joined, load_data
from ironclip.defenses._calibrate import Gated
from ironclip.evaluation.calibrating import Watched, check_plain, repeats
from ironclip.evaluation.store import write_atomic
from ironclip.models import load
from ironclip.registry import DEFENSES, build_defense
from ironclip.training.estimate import estimate
from ironclip.training.finetune import Session
from ironclip.training.team import gather

Progress = Callable[[int, int, dict[str, Any]], None]


def fit_defense(
    spec: Any,
    vlm: str | VLM,
    data: str,
    out: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    limit: int | None = None,
    shots: int | None = None,
    prompts: str | None = None,
    skip_bad: bool = False,
    device: str = "cpu",
    devices: int = 1,
    half: bool = False,
    resume: bool = True,
    licence: str = "",
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit, write ``out/NAME.safetensors`` and ``out/NAME.json``, return the manifest. ``out/NAME.run`` keeps the run.

    A gated defense is calibrated instead: the images need no labels, and the manifest's ``spec`` has the threshold.

    ``data``: specs of training sets, comma separated; several are joined. ``changes``: fields of the recipe's loop.
    ``limit``: images of each set that are used; ``shots``: of each of its classes instead.
    ``half``: store tensors as float16. ``devices``: processes of this very command that share each batch (extra
    ``distributed``); all but the first return an empty dictionary. Raises ValueError for bad input before anything is
    written.
    """
    if devices < 1:
        raise ValueError(f"devices must be 1 or more, got {devices}")
    team = gather(devices, "cpu" if device == "cpu" else "auto")
    device = device if team.fabric is None else str(team.fabric.device)
    defense, model, source, clf = prepared(spec, vlm, data, limit, seed, prompts, skip_bad, device, shots)
    name, options = defense.info.name, {}
    gated = isinstance(defense, Gated)
    if gated:
        check_plain(defense, changes, half)
    loop = loop_of(defense, changes)
    takes = inspect.signature(defense.fit).parameters
    target, record, folder = out / f"{name}.safetensors", out / f"{name}.json", out / f"{name}.run"
    again = gated and repeats(record, model.weights_hash)
    if target.exists() and resume and not again and not (folder / "run.json").exists():
        raise ValueError(f"{target} exists already and was made elsewhere; name another --out, or write --no-resume")
    if "session" in takes:
        options["session"] = Session(folder, resume, progress, team)
    elif devices > 1:
        raise ValueError(f"{name} is fitted by one process; leave --devices out")
    shown = Watched(source, progress) if gated else source
    state = defense.fit(clf, shown, loop=loop, seed=seed, **options)
    if not team.leads:
        return {}
    write_state(target, state, half)
    manifest = {
        "defense": name,
        "recipe": full_text(defense),
        "vlm": model.name,
        "weights": model.weights_hash,
        "data": [{"name": s, "limit": limit} | ({"shots": shots} if shots else {}) for s in split_list(data)],
        "images": len(source),
        "manifest_hash": source.manifest_hash,
        "classes": len(set(source.class_names)),
        "templates": list(source.templates),
        "seed": seed,
        **({"spec": to_text(defense.calibrated(state))} if gated else {"loop": dataclasses.asdict(loop)}),
        "metrics": _recent(folder / "metrics.jsonl"),
        "state": {
            "file": target.name,
            "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
            "bytes": target.stat().st_size,
            "tensors": len(state),
            "dtype": "float16" if half else "float32",
        },
        "licence": licence or f"not stated; bound by those of {model.name} and of the training images ({data})",
        "command": command,
    }
    write_atomic(record, lambda p: p.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8"))
    return manifest


def estimate_fit(
    spec: Any, vlm: str | VLM, data: str, *, changes: Mapping[str, Any] | None = None, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Seconds, passes and bytes that ``fit_defense`` would take; nothing is written. Raises ValueError."""
    names = ("limit", "prompts", "skip_bad", "device", "shots")
    defaults: dict[str, Any] = {"limit": None, "prompts": None, "skip_bad": False, "device": "cpu", "shots": None}
    limit, prompts, skip_bad, device, shots = ({**defaults, **options}[n] for n in names)
    defense, _, source, clf = prepared(spec, vlm, data, limit, seed, prompts, skip_bad, device, shots)
    if not hasattr(defense, "plan"):
        raise ValueError(f"{defense.info.name} is not trained step by step: there is nothing to estimate")
    loop = loop_of(defense, changes)
    return {"defense": full_text(defense), **estimate(defense.plan(clf, loop), source, loop, seed)}


def prepared(
    spec: Any, vlm: str | VLM, data: str, limit: int | None, seed: int, prompts: str | None, skip_bad: bool,
    device: str, shots: int | None = None,
) -> tuple[Any, VLM, Any, ZeroShot]:  # fmt: skip
    """Defense, model, joined training data and their classifier. Raises ValueError."""
    defense: Any = build_defense(spec)
    if not isinstance(defense, Trainable):
        able = sorted(n for n in DEFENSES if isinstance(build_defense(n), Trainable))
        raise ValueError(f"{defense.info.name} learns nothing; fit takes {', '.join(able)}")
    if limit is not None and shots is not None:
        raise ValueError(f"--limit {limit} and --shots {shots} both choose the images; give one")
    specs = split_list(data)
    if not specs:
        raise ValueError("data names no training set; write --data shapes:train or --data folder:PATH/train")
    model = vlm if isinstance(vlm, VLM) else load(vlm, device=device)
    options: Any = {"prompts": prompts, "limit": limit, "seed": seed, "skip_bad": skip_bad}
    sets = [load_data(s, model.image_size, **options) for s in specs]
    source = joined(sets if shots is None else [s.shots(shots, seed) for s in sets])
    if getattr(defense, "LABELS", True):
        clf = ZeroShot.build(model, source.class_names, source.templates)
    else:  # a method that reads no labels needs no text either
        nothing = torch.zeros(1, model.dim, device=model.device)
        templates, places = tuple(source.templates), (0,) * len(source.class_names)
        clf = ZeroShot(model, ("image",), templates, nothing, model.scale, places)
    return defense, model, source, clf


def loop_of(defense: Any, changes: Mapping[str, Any] | None) -> Loop:
    """The recipe's loop, or the plain one, with some fields changed. Raises ValueError."""
    base: Loop = defense.loop() if hasattr(defense, "loop") else Loop()
    return base.resized(**(changes or {}))


def write_state(path: Path, state: State, half: bool = False) -> None:
    """A state as safetensors, whole or not at all; ``half`` stores float32 tensors as float16."""
    lowered = {k: v.half() if half and v.dtype == torch.float32 else v for k, v in state.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in lowered.items()}
    write_atomic(path, lambda p: save_file(tensors, p))
    path.chmod(0o644)


def _recent(path: Path) -> dict[str, Any]:
    """The newest value of every metric."""
    out: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        out |= json.loads(line)
    return out
