"""Audit the class names of a data set, or of every shipped list: python scripts/audit_names.py [SPEC] [--prompts SET].

Exits with 1 if the prompt set `fixed`, which leaderboards use, has a duplicate or a badly spelled name.
"""

from __future__ import annotations

import argparse

from ironclip.data.audit import as_text, audit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", nargs="?", help="data set, for example pets or folder:my_images/test")
    parser.add_argument("--prompts", help="prompt set; default: all shipped ones, or that of the data set")
    args = parser.parse_args()
    rows = audit(args.spec, prompts=args.prompts)
    print(as_text(rows))
    return int(any(r.dataset.endswith("/fixed") for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
