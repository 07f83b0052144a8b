"""The schedule, noising, what predictions stand for, and the posterior step."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from reference import diffusion_literal
from toys import generator

from ironclip.core.diffusion import ancestral, clean_of, cosine_kept, noised


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_cosine_schedule() -> None:
    kept = cosine_kept()
    assert kept.shape == (1000,)
    assert bool((kept[1:] < kept[:-1]).all())
    for t in (0, 10, 500, 900, 999):
        assert float(kept[t]) == pytest.approx(diffusion_literal.cosine_bar(t), rel=1e-12)
    assert float(kept[499]) == pytest.approx(0.4938, abs=2e-4)
    assert float(kept[999]) < 1e-6


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
def test_cosine_schedule_is_that_of_the_hubs_priors() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(cosine_kept()[:990], theirs[:990], rtol=1e-3, atol=1e-7)


def test_every_prediction_gives_the_clean_point_back() -> None:
    x0, noise, kept = randn(3, 4), randn(3, 4, seed=1), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    x_t = noised(x0, noise, kept)
    v = kept.sqrt()[:, None] * noise - (1 - kept).sqrt()[:, None] * x0
    for kind, out in (("sample", x0), ("epsilon", noise), ("v_prediction", v)):
        torch.testing.assert_close(clean_of(out, x_t, kept, kind), x0)
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'; did you mean 'epsilon'"):
        clean_of(noise, x_t, kept, "eps")


def test_posterior_step_by_hand_and_in_the_limits() -> None:
    """kept 1/4, before 1/2: mean = sqrt(.5) .5 / .75 x0 + sqrt(.5) .5 / .75 x_t, variance .5 / .75 * .5."""
    kept, before = (torch.tensor(v, dtype=torch.float64) for v in (0.25, 0.5))
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    share = math.sqrt(0.5) * 0.5 / 0.75
    assert float(ancestral(zero, one, zero, kept, before)) == pytest.approx(share)
    assert float(ancestral(one, zero, zero, kept, before)) == pytest.approx(share)
    assert float(ancestral(zero, zero, one, kept, before)) == pytest.approx(math.sqrt(1 / 3))
    x0, x_t = randn(2, 5), randn(2, 5, seed=1)
    torch.testing.assert_close(ancestral(x_t, x0, randn(2, 5, seed=2), kept, torch.ones_like(kept)), x0)


def test_two_posterior_steps_have_the_marginal_of_the_forward_process() -> None:
    n, kept = 200_000, torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64)
    x0 = torch.full((n, 1), 0.7, dtype=torch.float64)
    z = noised(x0, randn(n, 1, seed=3), kept[2])
    for i in (1, 0):
        z = ancestral(z, x0, randn(n, 1, seed=4 + i), kept[i + 1], kept[i])
    assert float(z.mean()) == pytest.approx(math.sqrt(0.8) * 0.7, abs=5e-3)
    assert float(z.var()) == pytest.approx(0.2, abs=5e-3)
