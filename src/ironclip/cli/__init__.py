"""The command line: thin files, one per command, over functions that Python users call too.

Exit status: 0 done, 2 bad input, 3 some cells failed or the disk was full, 130 interrupted (run again to resume).
"""

from __future__ import annotations

import errno
import sys
import warnings

import click
import typer

from ironclip.cli.attack import attack
from ironclip.cli.bench import bench
from ironclip.cli.doctor import doctor
from ironclip.cli.fit import fit
from ironclip.cli.leaderboard import leaderboard
from ironclip.cli.listing import listing
from ironclip.cli.pretrain import pretrain
from ironclip.cli.prompts import prompts
from ironclip.cli.query import EXAMPLES, query
from ironclip.cli.report import report
from ironclip.cli.retrieval import EXAMPLES as RETRIEVAL_EXAMPLES
from ironclip.cli.retrieval import retrieval
from ironclip.cli.run import run
from ironclip.cli.stopping import terminable
from ironclip.cli.store import store_app

app = typer.Typer(
    name="ironclip",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Attack, defend and honestly measure vision-language models of the CLIP family.",
)


def _example(text: str) -> str:
    return f"Example: [bold]{text}[/bold]"


app.command(epilog=_example("ironclip bench --vlm lite --data photos --defenses all --threat static,adaptive"))(bench)
app.command(epilog=_example("ironclip run quick --store store"))(run)
app.command(epilog=_example("ironclip attack --vlm tiny --data shapes --limit 8 --out adversarial"))(attack)
app.command(epilog=_example("ironclip fit 'TeCoA(eps=1/255)' --vlm tiny --data shapes:train --out states --steps 300"))(
    fit
)
app.command(epilog=_example("ironclip pretrain --out runs/tiny --steps 200"))(pretrain)
app.command(epilog=_example("ironclip report --store store --out report"))(report)
app.command(epilog=_example("ironclip leaderboard --store store --out leaderboard"))(leaderboard)
app.command(epilog=EXAMPLES)(query)
app.command(epilog=RETRIEVAL_EXAMPLES)(retrieval)
app.command(epilog=_example('ironclip prompts --vlm tiny --data shapes --text-attack "Charmer(k=1)"'))(prompts)
app.add_typer(store_app, epilog=_example("ironclip store verify --store store"))
app.command("list", epilog=_example("ironclip list defenses"))(listing)
app.command(epilog=_example("ironclip doctor --json"))(doctor)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status as well as raising SystemExit with it from the console script."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        with terminable():
            status = app(args=argv, standalone_mode=False)
        code = status if isinstance(status, int) else 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as err:
        err.show()
        code = 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = 130
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            print("the disk is full; finished batches are kept: free space and run the same command", file=sys.stderr)
            code = 3
        elif isinstance(err, (FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError)):
            print(f"error: {err}", file=sys.stderr)
            code = 2
        else:
            raise
    except (ValueError, ImportError) as err:
        print(f"error: {err}", file=sys.stderr)
        code = 2
    if code == 130:  # typer turns an interrupt into this status by itself
        print("interrupted; what was written so far is kept, run the same command to go on", file=sys.stderr)
    if argv is None:
        raise SystemExit(code)
    return code


def _warn(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print(f"note: {message}", file=sys.stderr)
