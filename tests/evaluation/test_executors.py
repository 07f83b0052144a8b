"""Ray does the work of one process: the same rows, also after kills; what cannot start says so within seconds."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ironclip
from ironclip.evaluation.run import evaluate

COMMAND = [sys.executable, "-c", "from ironclip.cli import main; main()"]
BENCH = ["bench", "--vlm", "tiny", "--data", "shapes", "--limit", "12", "--budget", "smoke", "--batch-size", "4"]
BENCH += ["--json", "--attacks", "PGD(steps=4)", "--defenses", "none,noise"]
TIMING = ("ms_per_image", "ms_batch", "memory_mb")

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ironclip[ray]")


def begin(store: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, *BENCH, "--store", str(store), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert not found["errors"]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found["rows"]]


def wait_for_rows(store: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(store.glob("cells/**/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[Any]:
    """Ray's worker processes below a command that are at our task."""
    import psutil

    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if p.is_running() and "ray::_task" in " ".join(p.cmdline())]


@contextmanager
def listening() -> Iterator[int]:
    """A port of this machine that accepts connections and never says anything."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return finish(begin(tmp_path_factory.mktemp("serial") / "store"))


@needs_ray
def test_two_ray_workers_give_the_rows_of_one_process(serial: list[dict[str, Any]], tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert finish(begin(store, "--executor", "ray", "--workers", "2")) == serial
    assert not list(store.glob(".seen-*"))


@needs_ray
def test_killed_ray_workers_cost_no_rows(serial: list[dict[str, Any]], tmp_path: Path) -> None:
    process = begin(tmp_path / "store", "--executor", "ray", "--workers", "2")
    wait_for_rows(tmp_path / "store", process)
    victims = workers_of(process)
    for p in victims:
        p.kill()
    assert finish(process) == serial
    assert victims


@needs_ray
def test_sigterm_ends_ray_and_its_workers(tmp_path: Path) -> None:
    import psutil

    store = tmp_path / "store"
    process = begin(store, "--executor", "ray", "--workers", "2")
    wait_for_rows(store, process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not list(store.rglob("*.tmp"))


@needs_ray
def test_a_cluster_that_is_not_there_is_said_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as s:  # a port that nothing listens on once it is closed
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"no Ray cluster at 127.0.0.1:{port} .*ray start --head"):
        evaluate("tiny", "shapes", limit=2, store=tmp_path / "store", executor=f"ray:127.0.0.1:{port}")
    assert time.monotonic() - began < 15
    assert not (tmp_path / "store").exists()


@needs_ray
def test_a_port_that_is_not_ray_is_said_within_a_minute(tmp_path: Path) -> None:
    began = time.monotonic()
    with listening() as port, pytest.raises(ValueError, match=rf"no Ray cluster at 127.0.0.1:{port} "):
        evaluate("tiny", "shapes", limit=2, store=tmp_path / "store", executor=f"ray:127.0.0.1:{port}")
    assert time.monotonic() - began < 60


@needs_ray
def test_no_cluster_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"no Ray cluster at auto .*--executor ray to use this machine"):
        evaluate("tiny", "shapes", limit=2, store=tmp_path / "store", executor="ray:auto")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install ironclip\[ray\]"):
        evaluate("tiny", "shapes", limit=2, executor="ray")


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_objects_cannot_be_sent(executor: str) -> None:
    with pytest.raises(ValueError, match=f"executor={executor} needs specs as text"):
        evaluate(ironclip.load("tiny"), "shapes", limit=2, executor=executor)


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ("rai", "unknown executor 'rai'; did you mean 'ray'"),
        ("process:4", "only ray takes an address; write serial, process, ray, ray:auto or ray:HOST:PORT"),
        ("ray:", "only ray takes an address"),
    ],
)
def test_a_wrong_executor_is_refused(executor: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate("tiny", "shapes", limit=2, executor=executor)


@needs_ray
@pytest.mark.parametrize("address", ["head", "head:x", ":6379", "10.0.0.1:99999"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"needs an address HOST:PORT; write ray:10\.0\.0\.1:6379"):
        evaluate("tiny", "shapes", limit=2, executor=f"ray:{address}")
