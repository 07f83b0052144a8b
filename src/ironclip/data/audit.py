"""Audit of class names: what may silently spoil a zero-shot evaluation before a single image is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from ironclip.data.prompts import known_names, known_sets, merges, prompt_set

CONTEXT = 77  # tokens, start and end included, that CLIP's text tower reads
COSINE = 0.999


@dataclass(frozen=True)
class Finding:
    """One row of `ironclip list data --audit`: `names` fail `check` under `dataset`; `detail` says how."""

    dataset: str
    check: str
    names: tuple[str, ...]
    detail: str


def audit(
    spec: str | None = None,
    *,
    prompts: str | None = None,
    tokenizer: Callable[[str], Sequence[int]] | None = None,
    encode: Callable[[list[str]], Tensor] | None = None,
    root: Path | None = None,
) -> list[Finding]:
    """Check class names, of one data set or of every shipped list under every prompt set; no finding is good news.

    `spec`: any spec of `load_data`, or the name of a shipped list ("pets", which needs no images); None: all lists.
    `tokenizer`: text to token ids, start and end included; more than 77 is a finding. `encode`: texts to features
    (n, d), any length; two classes of cosine above 0.999, averaged over templates as in zero-shot classification,
    are a finding. Raises what `load_data` raises.
    """
    rows: list[Finding] = []
    for dataset, names, templates in _subjects(spec, prompts, root):
        rows += _spelling(dataset, names, templates)
        if tokenizer is not None:
            rows += _lengths(dataset, names, templates, tokenizer)
        if encode is not None:
            rows += _cosines(dataset, names, templates, encode)
    return rows


def _subjects(spec: str | None, prompts: str | None, root: Path | None) -> list[tuple[str, list[str], list[str]]]:
    if spec is None or spec in known_names():
        out = []
        for dataset in known_names() if spec is None else [spec]:
            for name in known_sets() if prompts is None else [prompts]:
                templates, names = prompt_set(name, dataset)
                if names is not None:  # None: the data set brings them, give its spec
                    out.append((f"{dataset}/{name}", list(dict.fromkeys(names)) if merges(name) else names, templates))
        return out
    from ironclip.data.load import load_data

    data = load_data(spec, prompts=prompts, root=root, skip_bad=True)
    return [(f"{data.name}/{data.prompt_set}", data.class_names, data.templates)]


def _spelling(dataset: str, names: list[str], templates: list[str]) -> list[Finding]:
    rows = []
    texts: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        text = " ".join(templates[0].format(name).lower().split())
        texts.setdefault(text, []).append(f"{name} [{i}]")
    for text, same in texts.items():
        if len(same) > 1:
            rows.append(Finding(dataset, "duplicate", tuple(same), f"all read {text!r}"))
    checks: list[tuple[str, Callable[[str], bool], str]] = [
        ("blank", lambda n: n != " ".join(n.split()) or not n, "empty, or blanks at an end or doubled"),
        ("question mark", lambda n: "?" in n, "someone was not sure"),
        ("underscore", lambda n: "_" in n, "a file name, not a word"),
        ("non-ASCII", lambda n: not n.isascii(), "tokenised as bytes"),
    ]
    for check, fails, detail in checks:
        hit = tuple(n for n in names if fails(n))
        if hit:
            rows.append(Finding(dataset, check, hit, detail))
    return rows


def _lengths(
    dataset: str, names: list[str], templates: list[str], tokenizer: Callable[[str], Sequence[int]]
) -> list[Finding]:
    longest = {n: max(len(tokenizer(t.format(n))) for t in templates) for n in names}
    return [
        Finding(dataset, "too long", (n,), f"{count} tokens, the text tower reads {CONTEXT}")
        for n, count in longest.items()
        if count > CONTEXT
    ]


def _cosines(
    dataset: str, names: list[str], templates: list[str], encode: Callable[[list[str]], Tensor]
) -> list[Finding]:
    mean = sum(normalize(encode([t.format(n) for n in names]).double(), dim=1) for t in templates)
    weights = normalize(mean, dim=1)  # type: ignore[arg-type]  # at least one template
    close = (weights @ weights.T).triu(diagonal=1)
    return [
        Finding(dataset, "near duplicate", (names[i], names[j]), f"cosine {float(close[i, j]):.5f}")
        for i, j in (close > COSINE).nonzero().tolist()
    ]


def as_text(rows: Sequence[Finding]) -> str:
    """One line a finding, at most six names each."""
    if not rows:
        return "no finding"
    width = max(len(r.dataset) for r in rows)
    lines = []
    for r in rows:
        names = "; ".join(repr(n) for n in r.names[:6]) + (f"; and {len(r.names) - 6} more" if len(r.names) > 6 else "")
        lines.append(f"{r.dataset:<{width}}  {r.check:<14}  {names} ({r.detail})")
    return "\n".join(lines)
