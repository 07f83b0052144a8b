"""SQL over the finished cells of a store, by DuckDB; nothing is written.

Two views: ``rows``, one line per image and cell, with what the cell is (``vlm``, ``data``, ``defense``, ``threat`` and
more) beside what was seen; ``cells``, one line per cell with its accuracies in percent. ``outcome`` is in every line of
``rows``: the share of draws on which the image stays right (clean cells: on clean pixels; static and graybox: on clean
*and* attacked pixels; adaptive and blackbox: under every member). Lists with one entry per member of a composition are
named ``member_*``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ironclip.evaluation.store import Store, StoreError, open_store

SPEC = {
    **dict.fromkeys(("digest", "vlm", "data", "defense", "defense_spec", "title", "paradigm", "threat"), pa.string()),
    **dict.fromkeys(("attack", "eps"), pa.string()),
    "eps_value": pa.float64(),
    "norm": pa.string(),
    "seed": pa.int64(),
    **dict.fromkeys(("prompts", "recipe", "precision", "budget", "state", "weights"), pa.string()),
}
"""Columns of both views; ``eps`` is text such as 4/255, ``eps_value`` the number."""

MORE = {
    **dict.fromkeys(("n", "k", "draws", "batch_size"), pa.int64()),
    **dict.fromkeys(("forwards", "backwards"), pa.float64()),
    "members": pa.list_(pa.string()),
    **dict.fromkeys(("device", "ironclip", "torch", "python"), pa.string()),
}
"""Further columns of ``cells``; ``forwards`` and ``backwards``: tower passes of one judged prediction."""

OUTCOMES = {
    "clean": "correct",
    "static": "least(clean_correct, correct)",
    "graybox": "least(clean_correct, correct)",
    "adaptive": "robust",
    "blackbox": "robust",
}


def query(store: str | Path, sql: str) -> pa.Table:
    """The answer to one SELECT over the views ``rows`` and ``cells`` of a store.

    Raises ValueError for a folder that is no store, a store without finished cells, or SQL that is not one readable
    SELECT; the message has the valid columns.
    """
    import duckdb

    opened = open_store(store)
    table, groups = _catalogue(opened)
    if not table:
        raise ValueError(f"{store} has no finished cell yet; run ironclip bench --store {store} first")
    with duckdb.connect() as db:
        made = pa.Table.from_pylist(table, schema=pa.schema({**SPEC, **MORE}))
        db.register("footers", made)
        db.execute("CREATE TABLE cell_table AS SELECT * FROM footers")
        db.unregister("footers")
        db.execute(f"CREATE VIEW rows AS {_rows_sql(groups)}")
        db.execute(f"CREATE VIEW cells AS {_CELLS}")
        folder = _quoted(str((opened.root / "cells").resolve()) + "/")
        for setting in (f"allowed_directories=[{folder}]", "enable_external_access=false", "lock_configuration=true"):
            db.execute(f"SET {setting}")
        try:
            parts = duckdb.extract_statements(sql)
            if len(parts) != 1 or parts[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
                raise ValueError('a query is one SELECT, such as "select defense, robust from cells"')
            return db.sql(parts[0].query).to_arrow_table()
        except duckdb.Error as err:
            said = " ".join(str(err).split("\n\n")[0].split())
            raise ValueError(f"{said}\n{columns_text(db)}") from err


def columns_text(db: Any) -> str:
    """The columns of both views, for messages."""
    found = {v: [r[0] for r in db.execute(f"DESCRIBE {v}").fetchall()] for v in ("rows", "cells")}
    return "\n".join(f"{view} has: {', '.join(names)}" for view, names in found.items())


def _catalogue(store: Store) -> tuple[list[dict[str, Any]], dict[str, list[Path]]]:
    """One line per finished cell, and the files by the SELECT that reads them: cells of one layout share one."""
    table: list[dict[str, Any]] = []
    groups: dict[str, list[Path]] = defaultdict(list)
    for digest in store.digests():
        path = store.cell_path(digest)
        try:
            meta = pq.read_metadata(path)
            foot = json.loads((meta.metadata or {})[b"ironclip"])
            line = _line(digest, foot, meta.num_rows)
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as err:
            raise StoreError(f"{path} is damaged; ironclip store verify --store {store.root} lists all such") from err
        table.append(line)
        groups[_select(foot["threat"], meta.schema.to_arrow_schema())].append(path)
    return table, groups


def _line(digest: str, foot: dict[str, Any], n: int) -> dict[str, Any]:
    tally, eps = foot.get("tally", {}), foot.get("eps")
    judged = max(tally.get("n", 0), 1)
    known = {k: foot.get(k) for k in (*SPEC, *MORE)}
    return known | {
        "digest": digest,
        "eps_value": None if eps is None else float(Fraction(eps)),
        "weights": foot["key"]["weights"],
        "n": n,
        "forwards": tally["forwards"] / judged if "forwards" in tally else None,
        "backwards": tally["backwards"] / judged if "backwards" in tally else None,
        "members": [m["name"] for m in foot["members"]],
        **foot["versions"],
    }


def _select(threat: str, schema: pa.Schema) -> str:
    """The columns of one layout: lists renamed, the outcome added."""
    names = []
    for field in schema:
        new = f"member_{field.name}" if pa.types.is_list(field.type) else field.name
        names.append(f'"{field.name}" AS "{new}"')
    if threat == "clean":
        names.append("correct AS clean_correct")
    return (
        f"SELECT {', '.join(names)}, CAST({OUTCOMES[threat]} AS DOUBLE) AS outcome, parse_filename(filename, true) AS d"
    )


def _rows_sql(groups: dict[str, list[Path]]) -> str:
    parts = []
    for select, files in groups.items():
        listed = ", ".join(_quoted(str(f.resolve())) for f in files)
        parts.append(f"({select} FROM read_parquet([{listed}], filename=true, union_by_name=true))")
    spec = ", ".join(f"c.{name}" for name in SPEC)
    union = " UNION ALL BY NAME ".join(parts)
    return f"SELECT {spec}, r.* EXCLUDE (d) FROM ({union}) r JOIN cell_table c ON c.digest = r.d"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_CELLS = """
SELECT c.*, s.clean, s.robust FROM cell_table c LEFT JOIN (
  SELECT digest, 100 * avg(clean_correct) AS clean,
         100 * avg(CASE threat WHEN 'clean' THEN NULL ELSE outcome END) AS robust
  FROM rows GROUP BY digest
) s ON s.digest = c.digest
"""
