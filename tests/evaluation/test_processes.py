"""Runs as users start them: real processes, real signals, the command line and its exit status."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ironclip.cli import main

COMMAND = [sys.executable, "-c", "from ironclip.cli import main; main()"]
BENCH = [
    "bench",
    "--vlm",
    "tiny",
    "--data",
    "shapes",
    "--limit",
    "12",
    "--budget",
    "smoke",
    "--attacks",
    "PGD(steps=4)",
]
BENCH += ["--defenses", "none,noise", "--batch-size", "4"]


def rows(store: Path, *options: str) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [*COMMAND, *BENCH, "--store", str(store), "--json", *options], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert not found["errors"]
    timing = ("ms_per_image", "ms_batch", "memory_mb")
    return [{k: v for k, v in row.items() if k not in timing} for row in found["rows"]]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows(tmp_path_factory.mktemp("serial") / "store")


def test_two_processes_give_the_same_rows(serial: list[dict[str, Any]], tmp_path: Path) -> None:
    assert rows(tmp_path / "store", "--executor", "process", "--workers", "2") == serial


def test_a_killed_run_resumes_to_the_same_rows(serial: list[dict[str, Any]], tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        [*COMMAND, *BENCH, "--store", str(store)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(store.glob("cells/**/*.parquet")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(store.glob("cells/**/*.parquet"))
    assert rows(store) == serial


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_exit_130_and_say_how_to_go_on(sent: signal.Signals, tmp_path: Path) -> None:
    store = tmp_path / "store"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in tests run in the background
    command = [*COMMAND, *BENCH, "--store", str(store)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(store.glob("cells/**/*.parquet")):
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to go on" in err
    assert "Traceback" not in err
    assert not list(store.rglob("*.tmp"))


def test_sigterm_ends_the_workers_too(tmp_path: Path) -> None:
    import psutil

    store = tmp_path / "store"
    command = [*COMMAND, *BENCH, "--store", str(store), "--executor", "process", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(store.glob("cells/**/*.parquet")):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--vlm", "lyte"], "unknown model 'lyte'; did you mean 'lite'?"),
        (["bench", "--vlm", "tiny", "--data", "fotos"], "unknown data set 'fotos'"),
        (["bench", "--vlm", "tiny", "--data", "shapes", "--attacks", "PGD(eps=8)"], "write 8/255"),
        (["bench", "--vlm", "tiny", "--data", "shapes", "--defenses", "TTC(stepz=2)"], "did you mean 'steps'"),
        (["run", "nothing.toml"], "no matrix file nothing.toml; shipped matrices: "),
        (["bench", "--preset", "quik"], "unknown preset 'quik'; did you mean 'quick'?"),
        (["report", "--store", "nowhere"], "nowhere is no store"),
        (["list", "defences"], "did you mean 'defenses'"),
    ],
)
def test_bad_input_exits_2_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[0] == "bench":
        arguments = [*arguments, "--store", str(tmp_path / "store")]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["models", "data", "attacks", "defenses", "presets"])
def test_lists_print_and_speak_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["list", kind, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_attack_writes_images_that_were_judged_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from PIL import Image

    out = tmp_path / "adv"
    options = ["--vlm", "tiny", "--data", "shapes", "--limit", "4", "--attacks", "PGD(eps=8/255, steps=5)", "--json"]
    assert main(["attack", *options, "--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert json.loads((out / "record.json").read_text()) == record
    assert len(record["images"]) == record["summary"]["n"] == 4
    for row in record["images"]:
        pixels = np.asarray(Image.open(out / row["file"]))
        assert pixels.shape == (64, 64, 3)
        assert row["linf"] <= 8 / 255 + 0.5 / 255 + 1e-6
    assert main(["attack", *options, "--out", str(out)]) == 2
    assert "already holds a record.json" in capsys.readouterr().err


def test_help_of_every_command_has_an_example() -> None:
    from typer.testing import CliRunner

    from ironclip.cli import app

    for command in ("bench", "run", "attack", "pretrain", "report", "list", "doctor"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"ironclip {command}" in result.output


def test_shipped_matrices_are_sound() -> None:
    from ironclip.evaluation.matrix import load_matrix, shipped

    for name in shipped():
        matrix = load_matrix(name)
        assert matrix.jobs
        assert matrix.title != name


def test_a_matrix_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    from ironclip.evaluation.matrix import load_matrix

    file = tmp_path / "mine.toml"
    file.write_text('[[block]]\nvlm = "tiny"\ndata = ["shapes"]\nlimits = 4\n')
    with pytest.raises(ValueError, match="mine block 1: unknown field 'limits'; did you mean 'limit'"):
        load_matrix(file)
    file.write_text("")
    with pytest.raises(ValueError, match=r"has no \[\[block\]\]"):
        load_matrix(file)
