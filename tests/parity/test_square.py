"""Square against the independent pyautoattack: the same numbers give the same image, other numbers the same rate."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from attack_toys import Conv, images, labels_of
from torch import Tensor

from ironclip.attacks.square import Square
from ironclip.core.rng import SampleRNG

pytest.importorskip("pyautoattack")
from pyautoattack.square import SquareAttack

N = 100
RNG = SampleRNG.of(7, [f"s{i}" for i in range(N)])


@pytest.fixture(scope="module")
def problem() -> tuple[Conv, Tensor, Tensor]:
    clf, x = Conv(), images(N, low=0.0, high=1.0, seed=11)
    return clf, x, labels_of(clf, x)


class Replayed(SquareAttack):
    """The peer with our numbers: stripes from the start stream, places and signs from the blocks of moves."""

    def __init__(self, rng: SampleRNG, sides: list[int], clf: Conv, eps: float, queries: int) -> None:
        super().__init__(clf, norm="Linf", n_queries=queries, eps=eps, p_init=0.8, resc_schedule=False, device="cpu")
        self.init_hyperparam(torch.zeros(1, 3, 8, 8))
        self.stripes = rng.fold("start").uniform(3, 1, 8)
        moves = rng.fold("moves")
        self.u = torch.cat([moves.at(i).uniform(64, 8)[0] for i in range(queries // 64 + 1)])
        self.sides, self.query, self.asked = sides, 0, 0

    def random_choice(self, shape: list[int]) -> Tensor:
        if len(shape) == 4:
            return (self.stripes < 0.5).float() * 2 - 1
        self.query += 1
        return ((self.u[self.query - 1, 5:] < 0.5).float() * 2 - 1)[:, None, None]

    def random_int(self, low: int = 0, high: int = 1, shape: tuple[int, ...] = (1,)) -> Tensor:
        number = self.u[self.query, self.asked % 2] * (8 - self.sides[self.query] + 1)
        self.asked += 1
        return number.long()


def test_square_with_the_same_numbers(problem: tuple) -> None:
    clf, x, y = problem
    eps, queries = float(Fraction(3, 255)), 200
    attack = Square(eps=Fraction(3, 255), queries=queries, policy="first_success")
    ours = attack(clf, x[:30], y[:30], rng=RNG[:30])
    sides = [attack.side(q, 8, 8) for q in range(queries)]
    flags, worst = [], 0.0
    for i in range(30):
        peer = Replayed(RNG[[i]].fold("square", 0), sides, clf, eps, queries)
        used, best = peer.attack_single_run(x[i : i + 1], y[i : i + 1])
        flags.append(bool(labels_of(clf, best) != y[i]))
        assert int(used) == int(ours.forwards[i])
        worst = max(worst, float((best[0] - ours.x_adv[i]).abs().max()))
    assert flags == ours.success.tolist()
    assert 5 < sum(flags) < 28
    assert worst < 1e-6


class AllPlaces(SquareAttack):
    """The peer with the last admissible place, which its own draw leaves out: on 8 x 8 images that matters."""

    def random_int(self, low: int = 0, high: int = 1, shape: tuple[int, ...] = (1,)) -> Tensor:
        return super().random_int(low, high + 1, list(shape))


@pytest.mark.parametrize(("norm", "eps", "seeds"), [("linf", Fraction(3, 255), 4), ("l2", Fraction(12, 100), 1)])
def test_square_with_streams_of_its_own(problem: tuple, norm: str, eps: Fraction, seeds: int) -> None:
    clf, x, y = problem
    ours = theirs = 0
    attack = Square(eps=eps, norm=norm, queries=500, policy="first_success")
    state = torch.random.get_rng_state()
    for seed in range(seeds):
        ours += int(attack(clf, x, y, rng=SampleRNG.rows(N, seed)).success.sum())
        peer = AllPlaces(clf, norm=norm.capitalize(), n_queries=500, eps=float(eps), resc_schedule=False, seed=seed)
        theirs += int((labels_of(clf, peer.perturb(x, y)) != y).sum())
    torch.random.set_rng_state(state)
    assert 15 < theirs / seeds < 95
    assert abs(ours - theirs) / seeds <= 2, (ours / seeds, theirs / seeds)
