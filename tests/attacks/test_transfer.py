"""Momentum, diversity and smoothing: each is a no-op at its neutral value, and together they transfer."""

from __future__ import annotations

import pytest
import torch
from attack_toys import Conv, Fixed, Linear, Noisy, images, labels_of, tensor

from ironclip.attacks.pgd import PGD
from ironclip.attacks.transfer import Diverse, Transfer, diverse, gaussian, smoothed
from ironclip.core.grad import loss_and_grad
from ironclip.core.losses import ce
from ironclip.core.rng import SampleRNG
from ironclip.core.views import Eot, ensemble, eot
from ironclip.registry import build_attack

R8 = SampleRNG.rows(8)


@pytest.fixture(scope="module")
def conv() -> Conv:
    return Conv()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_the_three_it_is_pgd(conv: Conv, norm: str) -> None:
    x = images(8)
    y = labels_of(conv, x)
    a = Transfer(eps="1/20", steps=5, norm=norm, mi=0)(conv, x, y, rng=R8)
    b = PGD(eps="1/20", rel_alpha="1/5", steps=5, norm=norm, start="zero", returned="last")(conv, x, y, rng=R8)
    assert torch.equal(a.x_adv, b.x_adv)


def test_neutral_values_change_nothing(conv: Conv) -> None:
    x = images(8)
    y = labels_of(conv, x)
    plain = Transfer(steps=4)(conv, x, y, rng=R8)
    assert torch.equal(Transfer(steps=4, ti=1)(conv, x, y, rng=R8).x_adv, plain.x_adv)
    assert torch.equal(Transfer(steps=4, di=0)(conv, x, y, rng=R8).x_adv, plain.x_adv)
    assert torch.equal(Transfer(steps=4, di=1, di_low=1)(conv, x, y, rng=R8).x_adv, plain.x_adv)
    assert diverse(conv, 0) is conv
    delta = torch.zeros(5, 5)
    delta[2, 2] = 1
    g = tensor(2, 3, 8, 8)
    torch.testing.assert_close(smoothed(g, delta), g)


def test_momentum_by_hand() -> None:
    """Two pixels of a linear ramp: g / mean|g| is added to mu times the old direction."""
    seen = []
    w = tensor(2, 3)
    clf = Fixed(lambda v: seen.append(v.detach()) or torch.stack([(v.mean((2, 3)) ** 2) @ r for r in w], 1))
    x, y = images(1, size=1), torch.tensor([0])
    Transfer(eps=1, alpha="1/10", steps=3, mi=0.5, loss="margin")(clf, x, y, rng=SampleRNG.rows(1))
    m, at = torch.zeros_like(x), x.clone()
    for i in range(3):
        torch.testing.assert_close(seen[i], at)
        g = 2 * at * (w[1] - w[0]).view(1, 3, 1, 1)
        m = 0.5 * m + g / g.abs().mean()
        at = (at + 0.1 * m.sign()).clamp(0, 1)


def test_kernel_sums_to_one_and_peaks_in_the_middle() -> None:
    k = gaussian(15, 3.0)
    assert float(k.sum()) == pytest.approx(1)
    assert int(k.argmax()) == 15 * 7 + 7
    torch.testing.assert_close(k, k.T)
    assert float(k[7, 10] / k[7, 7]) == pytest.approx(float(torch.tensor(-0.5).exp()), rel=1e-5)


def test_diversity_keeps_size_pads_with_zeros_and_follows_the_stream() -> None:
    seen = []
    view = Diverse(Fixed(lambda v: seen.append(v) or v.mean((2, 3))), 1.0, 0.5)
    x = torch.ones(16, 3, 8, 8)
    view(x, SampleRNG.rows(16))
    view(x, SampleRNG.rows(16).at(1))
    view(x[3:5], SampleRNG.rows(16)[3:5])
    assert seen[0].shape == x.shape
    sides = (seen[0][:, 0] > 0.5).any(2).sum(1)
    assert set(sides.tolist()) == {4, 5, 6, 7, 8}
    assert bool(((seen[0] == 0) | (seen[0] - 1).abs().lt(1e-6)).all())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[0][3:5])


def test_diversity_touches_the_given_share_and_sits_inside_eot() -> None:
    seen = []
    view = Diverse(Fixed(lambda v: seen.append(v) or v.mean((2, 3))), 0.5, 0.5)
    x = torch.ones(400, 3, 6, 6)
    view(x, SampleRNG.rows(400))
    changed = (seen[0] != x).flatten(1).any(1).float().mean()
    assert 0.3 < float(changed) < 0.5  # one size in four is the full one
    inner = diverse(eot(Noisy(Linear()), 3), 0.5)
    assert isinstance(inner, Eot)
    assert inner.draws == 3


def test_result_is_judged_by_the_classifier_itself(conv: Conv) -> None:
    x = images(8)
    y = labels_of(conv, x)
    result = Transfer(eps="4/255", di=1, di_low=0.5)(conv, x, y, rng=R8)
    assert torch.equal(labels_of(conv, result.x_adv) != y, result.success)
    torch.testing.assert_close(result.loss, ce(conv(result.x_adv), y))
    assert result.forwards.tolist() == [11] * 8


def test_ensembles_average_logits_or_losses(conv: Conv) -> None:
    other, x = Conv(seed=1), images(4)
    y = labels_of(conv, x)
    rng = SampleRNG.rows(4)
    logits, losses = ensemble([conv, other]), ensemble([conv, other], of="losses")
    torch.testing.assert_close(logits(x), (conv(x) + other(x)) / 2)
    torch.testing.assert_close(losses(x), logits(x))
    each = [loss_and_grad(c, x, lambda z: ce(z, y), rng) for c in (conv, other)]
    got = loss_and_grad(losses, x, lambda z: ce(z, y), rng)
    torch.testing.assert_close(got.grad, (each[0].grad + each[1].grad) / 2)
    torch.testing.assert_close(got.loss, (each[0].loss + each[1].loss) / 2)
    assert not torch.allclose(loss_and_grad(logits, x, lambda z: ce(z, y), rng).grad, got.grad)
    with pytest.raises(ValueError, match="an ensemble needs at least 2 classifiers, got 1"):
        ensemble([conv])
    with pytest.raises(ValueError, match="of must be logits or losses, got 'mean'"):
        ensemble([conv, other], of="mean")


def test_ensemble_hands_each_model_its_draws() -> None:
    a, b = Noisy(Linear(3), 0.1), Noisy(Linear(3, seed=1), 0.1)
    x, rng = images(2), SampleRNG.rows(2)
    got = ensemble([a, b], of="losses")(x, rng.at(4))
    torch.testing.assert_close(got, (a(x, rng.at(4)) + b(x, rng.at(4))) / 2)
    assert ensemble([a, Linear(3)]).randomized  # type: ignore[attr-defined]
    assert not ensemble([Linear(3), Linear(3)]).randomized  # type: ignore[attr-defined]


def test_an_ensemble_of_noisy_relatives_transfers_better_than_one_model() -> None:
    """Six models that share a signal and differ in noise; the sixth is the victim."""
    signal = tensor(2, 192, seed=9)
    models = []
    for seed in range(6):
        m = Linear(2, seed=seed)
        with torch.no_grad():
            m.w.copy_(signal + 2.0 * tensor(2, 192, seed=100 + seed))
        models.append(m)
    victim, x = models[-1], images(64)
    y = labels_of(victim, x)
    attack = Transfer(eps="8/255", loss="margin")
    rng = SampleRNG.rows(64)

    def fooled(clf: object) -> int:
        return int((labels_of(victim, attack(clf, x, y, rng=rng).x_adv) != y).sum())  # type: ignore[arg-type]

    assert fooled(ensemble(models[:5])) > max(fooled(m) for m in models[:5])


def test_presets_and_bad_fields() -> None:
    assert build_attack("mi-fgsm") == Transfer()
    assert build_attack("mi-di-ti") == Transfer(di=0.5, ti=15)
    assert build_attack("ti-fgsm") == Transfer(mi=0, ti=15)
    for bad, words in (({"ti": 4}, "ti must be 0 or an odd side"), ({"di": 2}, r"di must be in \[0, 1\]")):
        with pytest.raises(ValueError, match=words):
            Transfer(**bad)
