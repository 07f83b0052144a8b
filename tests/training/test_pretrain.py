"""Pre-training: the loss falls, a killed run ends with the same bits, half-written files never count."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ironclip.data import load_data
from ironclip.training.architecture import Architecture, whiten_patches
from ironclip.training.batches import order, pick_captions
from ironclip.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ironclip.training.config import Pretrain
from ironclip.training.loss import contrastive_loss
from ironclip.training.pretrain import pretrain

SIZES = Architecture(
    image_size=16,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
    context=24,
    dim=16,
)
MICRO = Pretrain(
    steps=12,
    batch_size=16,
    lr=3e-3,
    warmup=3,
    precision="fp32",
    merges=100,
    vocabulary_from=40,
    whiten_from=64,
    sizes=SIZES,
    validate_on=32,
    checkpoint_every=4,
    log_every=3,
    validate_every=6,
)


@pytest.fixture(scope="module")
def data() -> Any:
    return load_data("shapes:train", 16)


@pytest.fixture(scope="module")
def val() -> Any:
    return load_data("shapes:val", 16)


class KilledError(Exception):
    """Stands for the signal that ends a run between two steps."""


def kill_after(n: int) -> Any:
    def progress(step: int, _steps: int, _metrics: dict[str, Any]) -> None:
        if step == n:
            raise KilledError

    return progress


@pytest.fixture(scope="module")
def whole(data: Any, val: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    pretrain(MICRO, data, val, out)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    point = load_checkpoint(out / "checkpoints")
    assert point is not None
    return point.weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_falls(data: Any, val: Any, tmp_path: Path) -> None:
    """Below the loss of guessing, ln 16, and well below where it started."""
    config = replace(MICRO, steps=120, warmup=10, log_every=1, checkpoint_every=120, validate_every=120)
    pretrain(config, data, val, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 120
    start, end = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert end < start - 0.5
    assert end < math.log(16)


@pytest.mark.parametrize("killed", [5, 8, 11])
def test_a_killed_run_ends_with_the_same_bits(killed: int, whole: Path, data: Any, val: Any, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        pretrain(MICRO, data, val, tmp_path, progress=kill_after(killed))
    assert not (tmp_path / "model.safetensors").exists()
    torch.rand(7)  # whatever else happens to the global stream
    pretrain(MICRO, data, val, tmp_path)
    assert same(weights(tmp_path), weights(whole))
    for name in ("model.safetensors", "metrics.jsonl", "manifest.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_not_trained_again(whole: Path, data: Any, val: Any) -> None:
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    pretrain(MICRO, data, val, whole, progress=kill_after(1))
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()} == before


def test_a_truncated_checkpoint_is_never_read(whole: Path, data: Any, val: Any, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        pretrain(MICRO, data, val, tmp_path, progress=kill_after(9))
    stored = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert stored == ["00000004", "00000008"]
    broken = tmp_path / "checkpoints" / "00000008" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"checkpoint 00000008 is damaged \(optimizer.pt\); an earlier one is used"):
        point = load_checkpoint(tmp_path / "checkpoints")
    assert point is not None
    assert point.step == 4
    with pytest.warns(UserWarning, match="damaged"):
        pretrain(MICRO, data, val, tmp_path)
    assert same(weights(tmp_path), weights(whole))


def test_an_unfinished_write_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill inside the write leaves the earlier checkpoint, and the next write clears the remains."""
    point = Checkpoint(1, {"w": torch.ones(3)}, {"state": {}})
    save_checkpoint(tmp_path, point)

    def stop(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr("ironclip.training.checkpoint.os.replace", stop)
    with pytest.raises(KilledError):
        save_checkpoint(tmp_path, replace(point, step=2))
    monkeypatch.undo()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    save_checkpoint(tmp_path, replace(point, step=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000003"]


def test_other_settings_are_refused_with_the_difference(whole: Path, data: Any, val: Any) -> None:
    with pytest.raises(ValueError) as err:
        pretrain(replace(MICRO, lr=1e-3, sizes=replace(SIZES, dim=8)), data, val, whole)
    text = str(err.value)
    assert "lr: 0.003 there, 0.001 now" in text
    assert "sizes.dim: 16 there, 8 now" in text
    assert "--no-resume" in text
    assert "steps" not in text
    with pytest.raises(ValueError, match=r"data.name: shapes:train there, shapes:test now|data.images: 50000 there"):
        pretrain(MICRO, load_data("shapes:test", 16), val, whole)
    redrawn = replace(data, read=lambda rows: 1 - data.read(rows))
    with pytest.raises(ValueError, match=r"settings: data.content: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        pretrain(MICRO, redrawn, val, whole)
    pretrain(replace(MICRO, log_every=1), data, val, whole)  # how often to write is not a setting of the model


def test_no_resume_starts_over(data: Any, val: Any, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        pretrain(MICRO, data, val, tmp_path, progress=kill_after(9))
    seen: list[int] = []
    other = replace(MICRO, seed=1)
    pretrain(other, data, val, tmp_path, resume=False, progress=lambda step, *_: seen.append(step))
    assert seen == list(range(1, 13))
    assert json.loads((tmp_path / "run.json").read_text())["config"]["seed"] == 1


def test_seeds_give_other_weights_and_the_global_stream_is_left_alone(
    whole: Path, data: Any, val: Any, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    pretrain(replace(MICRO, seed=1), data, val, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(weights(tmp_path), weights(whole))


def test_perturbation_sees_pixels_and_texts(whole: Path, data: Any, val: Any, tmp_path: Path) -> None:
    calls = []

    def perturb(x: torch.Tensor, texts: Any) -> torch.Tensor:
        calls.append((tuple(x.shape), float(x.min()), float(x.max()), len(texts)))
        return 1 - x

    pretrain(MICRO, data, val, tmp_path, perturb=perturb)
    assert len(calls) == 12
    assert all(c[0] == (16, 3, 16, 16) and c[1] >= 0 and c[2] <= 1 and c[3] == 16 for c in calls)
    assert not same(weights(tmp_path), weights(whole))


def test_metrics_hold_no_clock_and_one_line_a_record(whole: Path) -> None:
    entries = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {key for e in entries for key in e} == {"step", "loss", "scale", "grad_norm", "lr", "val_accuracy"}
    assert len({e["step"] for e in entries}) == len(entries)
    assert [e["step"] for e in entries if "val_accuracy" in e] == [6, 12]


def test_loss_by_hand() -> None:
    """Two pairs at scale 1: cosines 1 and 0; then with equal captions, where both columns are right."""
    eye = torch.eye(2)
    wrong = math.log(1 + math.exp(-1))
    assert contrastive_loss(eye, eye, torch.tensor(1.0), ["a", "b"]).item() == pytest.approx(wrong)
    assert contrastive_loss(eye, eye, torch.tensor(1.0), ["a", "a"]).item() == pytest.approx(wrong + 0.5)
    image, text = F.normalize(torch.randn(5, 3), dim=1), F.normalize(torch.randn(5, 3), dim=1)
    logits = 7 * image @ text.T
    plain = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    assert contrastive_loss(image, text, torch.tensor(7.0), list("abcde")).item() == pytest.approx(plain.item())


def test_every_image_is_seen_once_an_epoch() -> None:
    seen = Counter(i for step in range(9) for i in order(0, step, 7, 21))
    assert set(seen.values()) == {3}
    assert len(seen) == 21
    assert order(0, 1, 7, 21) != order(0, 4, 7, 21)
    assert order(0, 1, 7, 21) != order(1, 1, 7, 21)
    assert len(set(order(0, 1, 16, 20))) < 16 + 1  # a batch may straddle two epochs


def test_captions_follow_from_seed_step_and_image(data: Any) -> None:
    rows = [3, 11, 500, 7]
    picked = pick_captions(data, rows, 0, 5)
    assert picked[::-1] == pick_captions(data, rows[::-1], 0, 5)
    assert all(t in data.captions(i) for t, i in zip(picked, rows, strict=True))
    assert len({tuple(pick_captions(data, rows, 0, s)) for s in range(8)}) > 4


def test_the_whitened_embedding_sees_all_directions_alike(data: Any) -> None:
    x = next(iter(data.batches(200, range(200))))[0]
    layer = torch.nn.Conv2d(3, 48, 4, 4, bias=False)
    whiten_patches(layer, x, seed=0, floor=1e-9)
    with torch.no_grad():
        rows = layer(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
    assert (torch.cov(rows.T) - torch.eye(48)).abs().max() < 1e-2


def test_learning_rate_rises_and_falls() -> None:
    config = Pretrain(steps=100, warmup=10, lr=1.0)
    rates = [config.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(config.rate(9), abs=0.03)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
        ({"batch_size": 1}, "batch_size must be 2 or more: a contrast needs another image, got 1"),
        ({"lr": -1.0}, "lr and clip must be positive"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pretrain(**fields)


def test_bad_sizes_are_refused(data: Any, val: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size 8, got 60"):
        Architecture(image_size=60)
    with pytest.raises(ValueError, match="vision_width must be a multiple of 4 and of vision_heads=3, got 128"):
        Architecture(vision_heads=3)
    with pytest.raises(ValueError, match="shapes:train gives 16 px images; the architecture takes 32"):
        pretrain(replace(MICRO, sizes=replace(SIZES, image_size=32)), data, val, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shipped_weights_are_the_rounded_last_ones(whole: Path) -> None:
    last, shipped = weights(whole), load_file(whole / "model.safetensors")
    assert {v.dtype for v in shipped.values()} == {torch.float16}
    assert same({k: v.half() for k, v in last.items()}, shipped)
