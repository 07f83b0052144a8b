"""``ironclip pretrain``: a small CLIP from nothing; its defaults rebuild ``tiny-v1``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ironclip.cli import options as o
from ironclip.cli.progress import Steps

CLEAN: int | None = None  # images that the figures are taken on; None: all
ATTACKED = 200


def pretrain(
    out: Annotated[Path, typer.Option("--out", help="folder of the run; opens as hf:FOLDER when done")],
    data: Annotated[str, typer.Option("--data", help="captioned training data: shapes:train")] = "shapes:train",
    steps: Annotated[int | None, typer.Option("--steps", help="updates; default: those of tiny-v1")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="images an update")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="highest learning rate")] = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="go on with a killed run, or start over")] = True,
    as_json: o.Json = False,
) -> int:
    """Train a small CLIP by contrast and measure it: clean, on held-out combinations, under attack.

    The defaults rebuild the shipped model: ironclip pretrain --out runs/tiny
    """
    from ironclip.training.config import Pretrain

    given = {"steps": steps, "batch_size": batch_size, "lr": lr}
    config = Pretrain(seed=seed, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    manifest = train(config, data, out, device, resume)
    if as_json:
        print(json.dumps(manifest))
    else:
        for line in manifest["figures"]:
            print(f"{line['data']:16} {line['attack']:22} {line['accuracy']:6.2f} % of {line['n']}")
        print(f"{out} is ready: ironclip bench --vlm hf:{out} --data shapes")
    return 0


def train(config: Any, data: str, out: Path, device: str, resume: bool) -> dict[str, Any]:
    """Open the data, train with a bar on standard error, measure, complete the manifest and return it."""
    from ironclip.data import load_data
    from ironclip.training.checkpoint import write_json
    from ironclip.training.pretrain import pretrain as run

    size = config.sizes.image_size
    source: Any = load_data(data, size)
    if not hasattr(source, "captions"):
        raise ValueError(f"pre-training needs captions, which {data} does not have; use --data shapes:train")
    with Steps("pretrain") as bar:
        manifest = run(config, source, load_data("shapes:val", size), out, device=device, resume=resume, progress=bar)
    manifest["command"] = (
        f"ironclip pretrain --data {data} --out OUT --seed {config.seed} --steps {config.steps} "
        f"--batch-size {config.batch_size} --lr {config.lr}"
    )
    manifest["figures"] = figures(f"hf:{out}", device)
    write_json(out / "manifest.json", manifest)
    return manifest


def figures(vlm: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Accuracy in percent of a model on shapes: clean on both test splits, attacked on a subset of the first."""
    import torch

    import ironclip
    from ironclip.core.types import prediction
    from ironclip.registry import build_attack

    model = ironclip.load(vlm, device=device)
    rows = []
    for spec, attack, n in (
        ("shapes", "none", CLEAN),
        ("shapes", "table2-pgd10", ATTACKED),
        ("shapes", "PGD(eps=4/255, steps=10)", ATTACKED),
        ("shapes:heldout", "none", CLEAN),
    ):
        data, right = ironclip.load_data(spec, model.image_size, limit=n), 0
        clf = ironclip.ZeroShot.build(model, data.class_names, data.templates)
        for x, y, ids in data.batches(50):
            x, y = x.to(device), y.to(device)
            if attack != "none":
                x = build_attack(attack)(clf, x, y, rng=ironclip.SampleRNG.of(0, ids)).x_adv
            with torch.no_grad():
                right += int((prediction(clf(x)) == y).sum())
        rows.append({"data": spec, "attack": attack, "n": len(data), "accuracy": round(100 * right / len(data), 2)})
    return rows
