"""One stream per sample: batch size, order and company change nothing, to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch

from ironclip.core import rng as rng_module
from ironclip.core.rng import SampleRNG, rng_or_rows, sample_key

IDS = [f"photo-{i}" for i in range(64)]
DRAWS = {
    "uniform": lambda r: r.uniform(3, 5, low=-2.0, high=3.0),
    "normal": lambda r: r.normal(3, 5),
    "integers": lambda r: r.integers(-4, 9, 3, 5),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_changes_no_bit(kind: str, size: int) -> None:
    whole = DRAWS[kind](SampleRNG.of(3, IDS))
    parts = [DRAWS[kind](SampleRNG.of(3, IDS[i : i + size])) for i in range(0, 64, size)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", DRAWS)
def test_order_changes_no_bit(kind: str) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    whole = DRAWS[kind](SampleRNG.of(3, IDS))
    mixed = SampleRNG.of(3, [IDS[i] for i in order])
    assert torch.equal(DRAWS[kind](mixed), whole[order])
    assert torch.equal(DRAWS[kind](SampleRNG.of(3, IDS)[order]), whole[order])


def test_masks_slices_and_indices_select_the_same_streams() -> None:
    r = SampleRNG.of(0, IDS[:6]).fold("x").at(2)
    mask = torch.tensor([True, False, True, True, False, False])
    assert r[mask] == r[[0, 2, 3]] == r[torch.tensor([0, 2, 3])]
    assert r[1:4].ids == r.ids[1:4]
    assert r[mask].draw == 2
    assert r[mask].path == r.path
    assert len(r[mask]) == 3
    with pytest.raises(ValueError, match=r"mask must have shape \(6,\), got \(2,\)"):
        r[torch.tensor([True, False])]


def test_seed_sample_path_and_draw_each_make_another_stream() -> None:
    base = SampleRNG.of(0, ["a"])
    others = [SampleRNG.of(1, ["a"]), SampleRNG.of(0, ["b"]), base.at(1), base.fold("p"), base.fold("q"), base.fold(1)]
    values = [tuple(r.uniform(4).flatten().tolist()) for r in (base, *others)]
    assert len(set(values)) == len(values)
    assert torch.equal(base.at(1).at(0).uniform(4), base.uniform(4))


def test_fold_keeps_the_draw_apart_and_restarts_the_count() -> None:
    base = SampleRNG.of(0, ["a"])
    assert base.at(3).fold("p") != base.fold("p")
    assert base.at(3).fold("p").draw == 0
    assert not torch.equal(base.at(3).fold("p").uniform(4), base.fold("p").uniform(4))


def test_numbers_are_what_they_claim() -> None:
    r = SampleRNG.of(0, IDS)
    u = r.uniform(2000, low=-1.0, high=1.0)
    assert u.dtype == torch.float32
    assert u.min() >= -1
    assert u.max() < 1
    assert abs(float(u.mean())) < 0.01
    n = r.normal(2000)
    assert abs(float(n.mean())) < 0.02
    assert abs(float(n.std()) - 1) < 0.02
    i = r.integers(-2, 3, 2000)
    assert i.unique().tolist() == [-2, -1, 0, 1, 2]
    x = torch.zeros(64, 3, 2, 2, dtype=torch.float64)
    assert r.uniform_like(x).dtype == torch.float64
    assert r.normal_like(x).shape == x.shape


def test_known_bits_never_change() -> None:
    r = SampleRNG.of(0, ["photo-0"])
    assert sample_key("photo-0") == 2056883643586086969
    assert sample_key(5) == 5
    assert r.fold("pgd", 0).at(2).integers(0, 1000, 3).tolist() == [[216, 260, 455]]
    torch.testing.assert_close(r.uniform(3), torch.tensor([[0.0272, 0.4712, 0.4947]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(r.normal(3), torch.tensor([[-0.0937, -0.9416, -1.2425]]), atol=1e-4, rtol=0)


def test_views_of_an_image_have_streams_of_their_own() -> None:
    r = SampleRNG.of(0, ["a", "b"])
    views = r.repeat(3)
    assert len(views) == 6
    assert len(set(views.ids)) == 6
    assert views.ids[3:] == SampleRNG.of(0, ["b"]).repeat(3).ids
    assert r.at(1).repeat(3).ids != views.ids


def test_rows_must_fit_and_a_missing_rng_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"rng carries 2 sample ids but x has 3 rows; pass rng\[mask\]"):
        rng_or_rows(SampleRNG.rows(2), x, "toy")
    monkeypatch.setattr(rng_module, "_told", set())
    with pytest.warns(UserWarning, match="toy is random and was called without rng"):
        assert rng_or_rows(None, x, "toy") == SampleRNG.rows(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rng_or_rows(None, x, "toy")
