"""Files of a report: written beside their place and renamed, so that nothing is ever half there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ironclip.report import tables
from ironclip.report.summary import Results, check


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text at once; the temporary file is removed on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_all(results: Results, out_dir: str | Path) -> list[Path]:
    """``report.html``, ``results.json``, ``table.md``, ``table.tex``, ``table.csv``; returns their paths in this order.

    Everything is made before anything is written. Raises ImportError naming the extra if the page cannot be drawn.
    """
    from ironclip.report.html import render

    full = check(results)
    texts = {
        "report.html": render(full),
        "results.json": json.dumps(full, indent=1, allow_nan=False, default=str) + "\n",
        "table.md": tables.markdown(full),
        "table.tex": tables.latex(full),
        "table.csv": tables.csv(full),
    }
    return [write_text(Path(out_dir) / name, text) for name, text in texts.items()]
