"""``ironclip retrieval``: recall between images and captions, clean and under attack."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ironclip.cli import options as o
from ironclip.cli.progress import Bar

EXAMPLES = "\n\n".join(
    (
        "Examples:",
        '[bold]ironclip retrieval --vlm tiny --data shapes --limit 40 --attack "FeaturePGD(eps=4/255)" '
        '--text-attack "WordSwap(words=1)" --json[/bold]',
        '[bold]ironclip retrieval --data captions:coco_captions --attack "FeaturePGD(eps=4/255)"[/bold]',
    )
)


def retrieval(
    vlm: o.Vlm = "lite",
    data: Annotated[str, typer.Option("--data", help="shapes, shapes:SPLIT or captions:PATH")] = "shapes",
    attack: Annotated[str | None, typer.Option("--attack", help="on images: FeaturePGD(eps=4/255)")] = None,
    text_attack: Annotated[
        str | None, typer.Option("--text-attack", help="on captions: WordSwap(words=1), Charmer(k=1)")
    ] = None,
    pair: Annotated[
        str | None, typer.Option("--pair", help="on both together: SGA(eps=2/255), CoAttack(eps=2/255)")
    ] = None,
    defense: Annotated[
        str, typer.Option("--defense", help="one that ends in an image embedding, such as ttc")
    ] = "none",
    text_defense: Annotated[
        str | None, typer.Option("--text-defense", help="Speller(): captions are corrected before they are encoded")
    ] = None,
    threat: Annotated[
        str, typer.Option("--threat", help="with a text defense: static, or adaptive (captions attacked through it)")
    ] = "adaptive",
    limit: o.Limit = None,
    seed: o.Seed = 0,
    state: o.State = None,
    device: o.Device = "cpu",
    batch_size: o.BatchSize = 16,
    as_json: o.Json = False,
) -> int:
    """Recall at 1, 5 and 10 between images and captions, clean and with images, captions or both attacked.

    Attacks are static: made on the model without the defense. Ties count against the query. ASR is the percentage of
    clean hits that an attack loses. "pair" is an attack on images and captions together, "worst" the worst rank of
    every query over all attacked lines.
    """
    from ironclip.core.check import check_choice
    from ironclip.data.captions import load_captions
    from ironclip.evaluation.entries import load_state
    from ironclip.evaluation.job import Job
    from ironclip.evaluation.retrieval import check_attacks, retrieve
    from ironclip.models import load
    from ironclip.registry import build_defense, build_text_defense

    check_attacks(attack, text_attack, pair)
    check_choice(threat, ("static", "adaptive"), "threat")
    speller = None if text_defense is None else build_text_defense(text_defense)
    shield = build_defense(defense)
    model = load(vlm, device=device)
    captions = load_captions(data, model.image_size, limit=limit, seed=seed)
    job = Job(state=None if state is None else str(state))
    fitted = load_state(job, shield, model.name, model.weights_hash)
    known = threat == "adaptive"
    with Bar() as bar:
        found = retrieve(
            model,
            captions,
            shield,
            attack,
            text_attack,
            seed,
            batch_size,
            pair=pair,
            text_defense=speller,
            through=known,
            state=fitted,
            progress=bar,
        ).as_dict()
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    ks = [k for k in found["rows"][0]["image_to_text"] if k.startswith("R@")]
    title = f"{found['vlm']}, {found['data']}: {found['images']} images, {found['texts']} captions, {found['defense']}"
    shown = Table(title=title)
    for name in ("attacked", "query", *ks, f"ASR of {ks[0]}"):
        shown.add_column(name, justify="left" if name in ("attacked", "query") else "right")
    for row in found["rows"]:
        what = {"clean": "nothing", "image": "images", "text": "captions", "joint": "both, apart"}.get(
            row["setting"], row["setting"]
        )
        for way, query in (("image_to_text", "image"), ("text_to_image", "caption")):
            part = row[way]
            lost = f"{part['asr_cond'][ks[0]]:.1f}" if "asr_cond" in part else ""
            shown.add_row(what, query, *(f"{part[k]:.1f}" for k in ks), lost)
    Console(file=sys.stdout).print(shown)
