"""Our AutoAttack members against the independent pyautoattack on small deterministic models.

With the same start and settings the flags agree image by image, except where the margin is under 1e-3; with random
streams of their own they differ by at most 2 images in 100 (decisions, section 6).
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from attack_toys import Conv, images, labels_of
from torch import Tensor

from ironclip.attacks.apgd import APGD, APGDT, ranked
from ironclip.attacks.autoattack import AutoAttack
from ironclip.attacks.fab import FABT
from ironclip.core.ball import norms, start_delta
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG

pytest.importorskip("pyautoattack")
import pyautoattack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT

N = 100
RNG = SampleRNG.of(7, [f"s{i}" for i in range(N)])
EPS = {"linf": Fraction(2, 255), "l2": Fraction(8, 100)}
PEER = {"linf": "Linf", "l2": "L2"}


@pytest.fixture(scope="module")
def problem() -> tuple[Conv, Tensor, Tensor]:
    clf, x = Conv(), images(N, low=0.0, high=1.0, seed=11)
    return clf, x, labels_of(clf, x)


def agree(clf: Conv, y: Tensor, ours: Tensor, theirs: Tensor, x_ours: Tensor, x_theirs: Tensor) -> int:
    """Number of images whose flags differ although neither margin is under 1e-3."""
    with torch.no_grad():
        near = torch.minimum(margin(clf(x_ours), y).abs(), margin(clf(x_theirs), y).abs()) < 1e-3
    return int(((ours != theirs) & ~near).sum())


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [10, 40])
def test_apgd_from_the_same_start(problem: tuple, loss: str, norm: str, steps: int) -> None:
    clf, x, y = problem
    eps = EPS[norm]
    attack = APGD(eps=eps, norm=norm, loss=loss, steps=steps, reference_quirk=True)
    ours = attack(clf, x, y, rng=RNG)
    start = x + start_delta(x, float(eps), norm, "surface", RNG.fold("apgd", 0).fold("start"))
    peer = APGDAttack(clf, n_iter=steps, norm=PEER[norm], eps=float(eps), loss=loss, device="cpu")
    peer.init_hyperparam(x)
    x_best, acc, loss_best, x_adv = peer.attack_single_run(x, y, x_init=start)
    flags = ~acc.bool()
    assert 20 < int(flags.sum()) < 90
    assert agree(clf, y, ours.success, flags, ours.x_adv, x_adv) == 0
    if loss == "ce":
        held = ~flags & ~ours.success
        torch.testing.assert_close(ours.loss[held], loss_best[held], atol=1e-3, rtol=1e-3)
    if loss == "ce" and norm == "linf":  # the very same pixels, until rounding decides "did the loss rise?"
        same = (ours.x_adv == x_best).flatten(1).all(1)[~flags]
        assert same.float().mean() > (0.95 if steps == 10 else 0.7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_t_from_the_same_starts(problem: tuple, norm: str) -> None:
    clf, x, y = problem
    eps, steps, targets = EPS[norm], 20, 4
    ours = APGDT(eps=eps, norm=norm, steps=steps, targets=targets, reference_quirk=True)(clf, x, y, rng=RNG)
    peer = APGDAttack_targeted(
        clf, n_iter=steps, norm=PEER[norm], eps=float(eps), n_target_classes=targets, device="cpu"
    )
    peer.init_hyperparam(x)
    _, classes, _ = ranked(clf, x, y, targets, RNG.fold("apgd_t"))
    fooled, images_ = torch.zeros(N, dtype=torch.bool), x.clone()
    for t in range(targets):
        start = x + start_delta(x, float(eps), norm, "surface", RNG.fold("apgd_t").fold("target", t, 0).fold("start"))
        peer.y_target = classes[:, t]
        _, acc, _, x_adv = peer.attack_single_run(x, y, x_init=start)
        new = ~acc.bool() & ~fooled
        images_[new] = x_adv[new]
        fooled |= new
    assert 20 < int(fooled.sum()) < 95
    assert agree(clf, y, ours.success, fooled, ours.x_adv, images_) == 0


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_with_streams_of_its_own(problem: tuple, loss: str) -> None:
    clf, x, y = problem
    ours = APGD(eps=EPS["linf"], loss=loss, steps=50)(clf, x, y, rng=RNG)
    peer = APGDAttack(clf, n_iter=50, norm="Linf", eps=float(EPS["linf"]), loss=loss, seed=0, device="cpu")
    state = torch.random.get_rng_state()
    theirs = labels_of(clf, peer.perturb(x, y)) != y
    torch.random.set_rng_state(state)
    assert abs(int(ours.success.sum()) - int(theirs.sum())) <= 2


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_t_deterministic_from_the_clean_image(problem: tuple, norm: str) -> None:
    """No randomness at all: the smallest norms agree, and so the flags do at any budget."""
    clf, x, y = problem
    eps, steps, targets = {"linf": 2 / 255, "l2": 0.08, "l1": 0.6}[norm], 20, 3
    wide = {"linf": 1, "l2": 30, "l1": 200}[norm]
    ours = FABT(eps=wide, norm=norm, steps=steps, targets=targets)(clf, x, y, rng=RNG)
    peer = FABAttack_PT(clf, norm=norm.capitalize(), n_iter=steps, eps=eps, device="cpu")
    best, size = x.clone(), torch.full((N,), torch.inf)
    for t in range(targets):
        peer.target_class = t + 2
        found = peer.attack_single_run(x, y, use_rand_start=False, is_targeted=True)
        fooled = labels_of(clf, found) != y
        now = torch.where(fooled, norms(found - x, norm), torch.inf)
        best[now < size], size = found[now < size], torch.minimum(now, size)
    mine = norms(ours.x_adv - x, norm)
    assert bool(ours.success.all())
    assert bool(torch.isfinite(size).all())
    close = (mine / size - 1).abs() < 1e-3
    assert float(close.float().mean()) >= 0.97
    assert abs(int((mine <= eps).sum()) - int((size <= eps).sum())) <= 1
    assert 20 < int((mine <= eps).sum()) < 95


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_whole_ensemble_with_streams_of_its_own(problem: tuple, norm: str) -> None:
    """The four members in the published order and settings, but 3 targets and 200 queries."""
    clf, x, y = problem
    members = ("APGD()", "APGDT(targets=3)", "FABT(targets=3)", "Square(queries=200)")
    ours = AutoAttack(eps=EPS[norm], norm=norm, members=members)(clf, x, y, rng=RNG)
    peer = pyautoattack.AutoAttack(
        clf,
        attacks=["apgd-ce", "apgd-t", "fab-t", "square"],
        version="custom",
        norm=PEER[norm],
        eps=float(EPS[norm]),
        seed=0,
    )
    peer.apgd.n_restarts = 1
    peer.apgd_targeted.n_target_classes = peer.fab.n_target_classes = 3
    peer.square.n_queries = 200
    state = torch.random.get_rng_state()
    found, _ = peer.run_standard_evaluation(x, y, batch_size=N)
    torch.random.set_rng_state(state)
    theirs = labels_of(clf, found) != y
    assert 20 < int(theirs.sum()) < 95
    assert abs(int(ours.success.sum()) - int(theirs.sum())) <= 2
    assert int((ours.success ^ theirs).sum()) <= 2
