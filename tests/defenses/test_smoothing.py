"""Randomised smoothing: votes, abstentions, certificates, and the gradient that stands in for the vote's."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from reference import smoothing_literal
from torch import Tensor
from toys import toy_clf, toy_images, words

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses import smoothing as module
from ironclip.defenses.smoothing import Smoothing, clopper_pearson


def threshold_clf() -> ZeroShot:
    """Class a where the only pixel's first channel is below 0.5, class b above; smooth in between."""

    def tower(x: Tensor) -> Tensor:
        angle = torch.pi / 4 * (1 + torch.tanh(4 * (x[:, 0, 0, 0] - 0.5)))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    return replace(ZeroShot.build(VLM.wrap(tower, words(2), 1, scale=20.0), ["a", "b"]), weights=torch.eye(2))


def pixel(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).contiguous()


def test_counts_and_answers_equal_the_literal_transcription() -> None:
    clf, x, rng = toy_clf(), toy_images(12), SampleRNG.rows(12, 3)
    smoothing = Smoothing(sigma=0.6, draws=60, alpha=0.05)
    stream = rng.fold("smoothing")
    noise = torch.stack([0.6 * stream.at(i).normal_like(x) for i in range(60)], dim=1)
    votes = smoothing.predict(clf, x, rng)
    for i in range(12):
        want = smoothing_literal.count(lambda v: int(clf(v[None])[0].argmax()), x[i], list(noise[i]), clf.k)
        assert votes.counts[i].tolist() == want
        assert int(votes.labels[i]) == smoothing_literal.predict(want, 0.05)
    assert 0 < votes.abstained < 12
    logits = smoothing.apply(clf)(x, rng)
    torch.testing.assert_close(logits, ((votes.counts + 0.5) / 62.5).log())
    assert torch.equal(logits.argmax(1)[votes.labels >= 0], votes.labels[votes.labels >= 0])


def test_certificates_equal_the_literal_transcription() -> None:
    clf, x, rng = toy_clf(), toy_images(10), SampleRNG.rows(10, 3)
    smoothing = Smoothing(sigma=0.5)
    made = smoothing.certify(clf, x, rng, n0=20, n=80)
    stream = rng.fold("smoothing", "certify")
    for i in range(10):
        select, counts = (
            smoothing.votes(clf, x, stream.fold(s), m)[i].tolist() for s, m in (("select", 20), ("count", 80))
        )
        label, radius = smoothing_literal.certify(select, counts, 0.5, 0.001)
        assert int(made.labels[i]) == label
        assert float(made.radius[i]) == pytest.approx(radius, abs=1e-9)
        assert counts == made.counts[i].tolist()
    assert 0 < int((made.labels < 0).sum()) < 10


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (95, 100), (990, 1000)])
def test_clopper_pearson_is_the_exact_bound(hits: int, n: int) -> None:
    got = clopper_pearson(hits, n, 0.01)
    assert got == pytest.approx(smoothing_literal.lower_bound(hits, n, 0.01), abs=1e-9)
    if hits == n:
        assert got == pytest.approx(0.01 ** (1 / n))


def test_radius_of_a_threshold_stays_below_the_distance_and_comes_near_it() -> None:
    """For a linear boundary the vote changes exactly at the distance, here 0.1 along one pixel's one channel."""
    clf, x, rng = threshold_clf(), pixel(*[0.6] * 50), SampleRNG.rows(50)
    smoothing = Smoothing(sigma=0.1)
    made = smoothing.certify(clf, x, rng, n=2000)
    assert made.labels.tolist() == [1] * 50
    assert float(made.radius.max()) < 0.1, "a bound that is wrong one time in a thousand"
    assert float(made.radius.mean()) > 0.08
    share = made.counts[:, 1].double().mean() / 2000
    assert float(share) == pytest.approx(NormalDist().cdf(1.0), abs=0.01)
    few = smoothing.certify(clf, x, rng, n=50)
    assert float(few.radius.mean()) < float(made.radius.mean())
    y = torch.ones(50, dtype=torch.long)
    assert (made.accuracy(y), made.accuracy(y, 0.05), made.accuracy(y, 0.1), made.accuracy(1 - y)) == (
        1.0,
        1.0,
        0.0,
        0.0,
    )


def test_at_the_boundary_it_abstains() -> None:
    clf, rng = threshold_clf(), SampleRNG.rows(200)
    votes = Smoothing().predict(clf, pixel(*[0.5] * 200), rng)
    assert votes.abstained >= 195
    assert int(Smoothing(alpha=0.9).predict(clf, pixel(*[0.5] * 200), rng).abstained) < 100
    made = Smoothing().certify(clf, pixel(*[0.5] * 200), rng, n=200)
    assert int((made.labels >= 0).sum()) <= 3
    assert float(made.radius[made.labels < 0].max()) == 0.0


def test_selection_and_counting_use_different_draws() -> None:
    clf, x, rng = toy_clf(), toy_images(6), SampleRNG.rows(6)
    smoothing = Smoothing(sigma=0.5)
    stream = rng.fold("smoothing", "certify")
    first, second = (smoothing.votes(clf, x, stream.fold(s), 30) for s in ("select", "count"))
    assert not torch.equal(first, second)


def test_draws_are_packed_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    smoothing = Smoothing(sigma=0.4, draws=30)
    with clf.vlm.counting() as count:
        want = smoothing.apply(clf)(x, rng)
    assert (count.forwards, count.backwards) == (90, 0)
    monkeypatch.setattr(module, "ROWS", 5)
    assert torch.equal(smoothing.apply(clf)(x, rng), want)


def test_gradients_are_those_of_the_soft_votes() -> None:
    clf, x, rng = toy_clf(), toy_images(4).requires_grad_(True), SampleRNG.rows(4)
    smoothing = Smoothing(sigma=0.3, draws=20, grad_draws=5)
    stream = rng.fold("smoothing")
    copies = [clf(x + 0.3 * stream.at(i).normal_like(x)) for i in range(5)]
    soft = torch.stack([c.softmax(1) for c in copies]).mean(0).log()
    y = torch.tensor([0, 1, 2, 3])
    for view, other in ((smoothing.apply(clf), soft), (smoothing.surrogate(clf), torch.stack(copies).mean(0))):
        out = view(x, rng)
        torch.testing.assert_close(out.detach(), smoothing.apply(clf)(x.detach(), rng))
        (got,) = torch.autograd.grad(F.nll_loss(out, y), x, retain_graph=True)
        (want,) = torch.autograd.grad(F.nll_loss(other, y), x, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_soft_votes_do_not_overflow() -> None:
    logits = torch.tensor([[[0.0, 500.0]], [[500.0, 0.0]]])
    torch.testing.assert_close(module._log_mean(logits), torch.tensor([[math.log(1.0), math.log(1.0)]]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Smoothing(sigma=0)", r"sigma must be positive, got 0.0; write 0.1"),
        ("Smoothing(draws=0)", "draws must be at least 1, got 0; write 100"),
        ("Smoothing(grad_draws=0)", "grad_draws must be at least 1, got 0; write 8"),
        ("Smoothing(alpha=1)", r"alpha must lie in \(0, 1\), got 1.0; write 0.001"),
    ],
)
def test_bad_fields(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(spec)


def test_bad_calls() -> None:
    clf, x = toy_clf(), toy_images(2)
    with pytest.raises(ValueError, match=r"n0 and n must be at least 1, got 0 and 1000; write n0=100"):
        Smoothing().certify(clf, x, SampleRNG.rows(2), n0=0)
    for call in (Smoothing().predict, Smoothing().certify):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
            call(clf, x + 1, SampleRNG.rows(2))
