"""``ironclip prompts``: attack the class prompts of a data set."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from typing import Annotated

import typer
from rich.text import Text

from ironclip.cli import options as o
from ironclip.cli.progress import Bar
from ironclip.evaluation.class_prompts import Outcome


def prompts(
    vlm: o.Vlm = "lite",
    data: Annotated[str, typer.Option("--data", help="one data set: shapes, folder:PATH, cifar10, ...")] = "shapes",
    text_attack: Annotated[str, typer.Option("--text-attack", help="Charmer(k=1), WordSwap(words=1)")] = "Charmer(k=1)",
    text_defense: Annotated[
        str | None, typer.Option("--text-defense", help="Speller(): corrected before they are encoded")
    ] = None,
    threat: Annotated[
        str, typer.Option("--threat", help="with a text defense: static (attacker does not know it) or adaptive")
    ] = "adaptive",
    prompt_set: Annotated[str | None, typer.Option("--prompts", help="prompt set, as in bench")] = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    batch_size: o.BatchSize = 16,
    as_json: o.Json = False,
) -> int:
    """Accuracy on clean images when class prompts are edited: those of each image's own class, or all of them."""
    from ironclip.core.check import check_choice
    from ironclip.evaluation.class_prompts import attack_prompts
    from ironclip.evaluation.run import open_data
    from ironclip.models import load
    from ironclip.registry import build_text_attack, build_text_defense

    attack = build_text_attack(text_attack)
    check_choice(threat, ("static", "adaptive"), "threat")
    speller = None if text_defense is None else build_text_defense(text_defense)
    model = load(vlm, device=device)
    images = open_data(data, model, prompts=prompt_set, limit=limit, seed=seed)
    shown = model if speller is None else speller.wrap(model, images.class_names)
    seen = (model,) if threat == "static" or shown is model else (shown, model)
    with Bar() as bar:
        found = attack_prompts(shown, images, attack, batch_size, bar, through=seen)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _print(found)
    return 0


def _print(found: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{found.vlm}, {found.data}: {found.n} clean images, {found.text_attack}")
    for name in ("prompts edited by", "accuracy", "95 %"):
        table.add_column(name, justify="left" if name == "prompts edited by" else "right")
    said = {"nobody": "nobody", "own": "an attacker of the true class", "all": "an attacker of all classes"}
    for line in found.lines:
        table.add_row(said[line.attacker], f"{line.accuracy:.1f}", f"[{line.lo:.1f}, {line.hi:.1f}]")
    console.print(table)
    edits = Table(title=f"{found.crossed} of {len(found.edits)} prompts are nearest to another class after the edit")
    for name in ("prompt", "edited", "nearest to"):
        edits.add_column(name)
    for e in found.edits[:20]:
        edits.add_row(Text(e.before), marked(e.before, e.after), Text(e.crossed))
    console.print(edits)


def marked(before: str, after: str) -> Text:
    """The edited text with what is new in reverse, and a caret where something is gone."""
    out = Text()
    for what, _, _, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        out.append(after[k:m] if k < m else "\u2038", style="" if what == "equal" else "reverse")
    return out
