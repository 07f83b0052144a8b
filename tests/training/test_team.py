"""Several processes on one run: the same curve as one process with the joined batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ironclip.evaluation.fitting import fit_defense
from ironclip.training import team as module
from ironclip.training.team import Team, gather

WHAT = ["FARE(steps=1)", "--vlm", "tiny", "--data", "shapes:train", "--limit", "40", "--steps", "3"]


class Echo:
    """A fabric whose other process has the very same tensors."""

    def all_reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return 2 * value


def test_shares_cover_a_batch_and_gradients_add_up() -> None:
    parts = [Team(rank, 3).share(list(range(9))) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(9))
    assert Team().share([4, 2]) == [4, 2]
    with pytest.raises(ValueError, match="8 images at once cannot be shared equally by 3 processes; write a batch siz"):
        Team(0, 3).share(list(range(8)))
    p, unused = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    p.grad = torch.arange(6.0).view(2, 3)
    assert Team(0, 2, Echo()).add_up([p, unused], {"loss": 1.5, "kl": 0.25}) == {"loss": 3.0, "kl": 0.5}
    assert torch.equal(p.grad, 2 * torch.arange(6.0).view(2, 3))
    assert unused.grad is not None
    assert not unused.grad.any()


def test_one_device_needs_nothing_and_more_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather(1, "cpu").size == 1
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ImportError, match=r'type pip install "ironclip\[distributed\]"'):
        gather(2, "cpu")
    with pytest.raises(ValueError, match="devices must be 1 or more, got 0"):
        fit_defense("tecoa", "tiny", "shapes:train", Path("unused"), devices=0)
    assert module.Team().leads


def test_two_processes_make_the_curve_of_one(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric", reason="the extra distributed is not installed")
    program = Path(sys.executable).parent / "ironclip"
    if not program.exists():
        pytest.skip("no ironclip command beside this Python")
    changes = {"steps": 3, "batch_size": 8, "log_every": 1, "hold_out": 8}
    fit_defense("FARE(steps=1)", "tiny", "shapes:train", tmp_path / "one", limit=40, changes=changes)
    options = ["--batch-size", "8", "--loop", "log_every=1, hold_out=8", "--out", str(tmp_path / "two")]
    done = subprocess.run([program, "fit", *WHAT, *options, "--devices", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: ironclip bench") == 1, "one process reports"
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "fare.run" / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [e["step"] for e in one] == [e["step"] for e in two] == [0, 1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert [b[k] for k in a] == pytest.approx([a[k] for k in a], rel=2e-3)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
