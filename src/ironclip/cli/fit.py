"""``ironclip fit``: train a defense's weights or find its threshold; ``bench --state`` reads what it leaves."""

from __future__ import annotations

import json
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from ironclip.cli import options as o
from ironclip.cli.progress import Steps
from ironclip.core import spec


def fit(
    defense: Annotated[str, typer.Argument(help="the defense as a spec: tecoa, 'TeCoA(eps=4/255)'")],
    data: Annotated[str, typer.Option("--data", help="training sets, comma separated; several are joined")],
    out: Annotated[Path, typer.Option("--out", help="folder of NAME.safetensors and NAME.json")] = Path("states"),
    vlm: o.Vlm = "lite",
    steps: Annotated[int | None, typer.Option("--steps", help="updates; default: those of the recipe")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="images an update")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="highest learning rate")] = None,
    train: Annotated[str | None, typer.Option("--train", help="what learns: all, last-N layers, lora-R")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="of the training pass: fp32 or bf16")] = None,
    loop: Annotated[str, typer.Option("--loop", help="other fields of the loop: 'ema=0.99, clip_norm=1'")] = "",
    limit: o.Limit = None,
    shots: Annotated[int | None, typer.Option("--shots", help="images of each class instead (nested)")] = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    devices: Annotated[int, typer.Option("--devices", help="processes that share each batch")] = 1,
    prompts: o.Prompts = None,
    skip_bad: o.SkipBad = False,
    half: Annotated[bool, typer.Option("--half", help="store the state as float16")] = False,
    licence: Annotated[str, typer.Option("--licence", help="licence of the state, for its manifest")] = "",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with a killed run, or start over")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="two steps, then time and memory of the whole")] = False,
    as_json: o.Json = False,
) -> int:
    """Train a defense on labelled images and write its state; a killed run goes on where it stopped.

    A defense with a threshold (TTC, AOM with a gate, AGC, FPTNoise) is calibrated on clean images without labels; the
    spec with the threshold is printed.
    """
    from ironclip.evaluation.fitting import estimate_fit, fit_defense

    given: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "train": train, "precision": precision
    }  # fmt: skip
    changes = {**more_of(loop), **{k: v for k, v in given.items() if v is not None}}
    shared: Any = {"changes": changes, "seed": seed, "limit": limit, "shots": shots}
    shared |= {"prompts": prompts, "skip_bad": skip_bad}
    if dry_run:
        told = estimate_fit(defense, vlm, data, device=device, **shared)
        print(json.dumps(told) if as_json else cost_text(told))
        return 0
    command = shlex.join(["ironclip", *sys.argv[1:]])
    with Steps("fit") as bar:
        manifest = fit_defense(
            defense, vlm, data, out,
            device=device, devices=devices, half=half, resume=resume, licence=licence, command=command, progress=bar,
            **shared,
        )  # fmt: skip
    if not manifest:  # a process that only helped
        return 0
    if as_json:
        print(json.dumps(manifest))
        return 0
    if "spec" in manifest:
        found, file = manifest["spec"], out / manifest["state"]["file"]
        print(f"{found}: calibrated on {manifest['images']} images; the state is {file}")
        print(f"next: ironclip bench --vlm {vlm} --defenses {shlex.quote(found)} --data DATA (other images)")
        return 0
    metrics, state = manifest["metrics"], manifest["state"]
    shown = ", ".join(f"{k} {v:g}" for k, v in metrics.items() if k.startswith("val_"))
    print(f"{out / state['file']}: {state['tensors']} tensors, {state['bytes'] / 1e6:.1f} MB; held out: {shown or '-'}")
    print(f"next: ironclip bench --vlm {vlm} --defenses {shlex.quote(defense)} --state {out} --data DATA")
    return 0


def more_of(text: str) -> dict[str, Any]:
    """``a=1, b=word`` as fields of a loop. Raises ValueError."""
    if not text.strip():
        return {}
    _, places, fields = spec.split(f"Loop({text})")
    if places:
        raise ValueError(f"--loop needs names, got {text!r}; write --loop 'ema=0.99, clip_norm=1'")
    return {k: float(v) if isinstance(v, Fraction) else v for k, v in fields.items()}


def cost_text(told: dict[str, Any]) -> str:
    """An estimate in words."""
    sizes = told["bytes"]
    parts = ", ".join(f"{k} {v / 1e6:,.0f} MB" for k, v in sizes.items() if k != "peak")
    return (
        f"{told['defense']}\n{told['steps']} steps, {told['epochs']} epochs, "
        f"{told['trained_parameters']:,} parameters\n"
        f"{told['seconds_per_step']:.2f} s a step on this machine as it is now: {told['hours']:.2f} h\n"
        f"{told['forwards_per_image']:g} forwards and {told['backwards_per_image']:g} backwards of the image tower "
        f"per image\nmemory: {sizes['peak'] / 1e6:,.0f} MB ({parts})"
    )
