"""One table of attacks, one contract: what every attack promises, whatever it does inside."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import Conv, images, tensor
from torch import Tensor, nn

from ironclip.core.ball import norms
from ironclip.core.losses import margin
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Attack, AttackResult, prediction
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import ATTACK_PRESETS, ATTACKS, attack_table, build_attack

TABLE = [
    "FGSM(eps=2/255)",
    "FGSM(eps=2/255, start=uniform)",
    "FGSM(eps=1/4, norm=l2)",
    "PGD(eps=2/255, steps=4)",
    "PGD(eps=2/255, steps=4, loss=dlr, start=volume)",
    "PGD(eps=2/255, steps=4, loss=margin, policy=first_success, restarts=2)",
    "PGD(eps=2/255, steps=4, momentum=0.9, returned=last)",
    "PGD(eps=1/4, steps=4, norm=l2, start=surface)",
    "PGD(eps=2, steps=4, norm=l1)",
    "FeaturePGD(eps=2/255, steps=3)",
    "FeaturePGD(eps=2/255, steps=3, loss=feat_cos, momentum=0.9, returned=last)",
    "FeaturePGD(eps=1/4, steps=3, norm=l2)",
    "RandomPoints(eps=2/255, points=3)",
    "APGD(eps=2/255, steps=5)",
    "APGD(eps=1/4, norm=l2, loss=dlr, steps=5, restarts=2, policy=first_success)",
    "APGDT(eps=2/255, steps=3, targets=2)",
    "APGDT(eps=1/4, norm=l2, steps=3, targets=3, policy=first_success, loss=ce_t)",
    "FABT(eps=2/255, steps=4, targets=2)",
    "FABT(eps=1/4, norm=l2, steps=3, targets=2, restarts=2, policy=first_success)",
    "FABT(eps=2, norm=l1, steps=3, targets=2)",
    "Square(eps=2/255, queries=12)",
    "Square(eps=2/255, queries=8, loss=ce, restarts=2, policy=first_success)",
    "Square(eps=1/4, norm=l2, queries=8)",
    "AutoAttack(eps=2/255, members=('APGD(steps=4)', 'APGDT(steps=3, targets=2)', 'FABT(steps=3, targets=2)', "
    "'Square(queries=8)'))",
    "AutoAttack(eps=1/4, norm=l2, members=('PGD(steps=3)', 'APGD(loss=dlr, steps=3)'), eot=2)",
    "CW(steps=8, search=3, c=1)",
    "CW(eps=1/4, steps=8, search=2, c=1, abort=False)",
    "Transfer(eps=4/255, steps=3)",
    "Transfer(eps=4/255, steps=3, mi=0.5, di=0.7, ti=3, loss=margin)",
    "Transfer(eps=1/4, norm=l2, steps=3, di=1, di_low=0.5)",
    "RayS(eps=8/255, queries=40)",
    "RayS(eps=8/255, queries=40, policy=min_norm)",
    "Universal(eps=8/255, epochs=2, batch_size=3)",
    "Universal(eps=1/2, norm=l2, epochs=2, loss=feat_cos)",
    "table2-pgd10",
    "fare-train",
]
COUPLED = {t for t in TABLE if t.startswith("Universal")}
"""Attacks that look at all images together by design."""

B, K = 8, 10


def row(text: str) -> Any:
    return pytest.param(text, id=text)


CASES = [row(t) for t in TABLE]


class Tower(nn.Module):
    """The toy classifier's outputs serve as the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _texts(prompts: list[str]) -> Tensor:
    return torch.cat([tensor(1, K, seed=sum(map(ord, p))) for p in prompts])


@pytest.fixture(scope="module")
def clf() -> ZeroShot:
    vlm = VLM.wrap(Tower().eval(), _texts, 8, scale=5.0)
    return ZeroShot.build(vlm, [f"thing {'x' * i}" for i in range(K)])


@pytest.fixture(scope="module")
def batch(clf: ZeroShot) -> tuple[Tensor, Tensor, SampleRNG]:
    """Eight correctly classified images and a wrongly classified one among them."""
    x = images(B, low=0.0, high=1.0, seed=4)
    with torch.no_grad():
        y = prediction(clf(x))
    y[3] = (y[3] + 1) % K
    return x, y, SampleRNG.of(5, [f"photo-{i}" for i in range(B)])


@pytest.fixture(scope="module")
def results(clf: ZeroShot, batch: tuple) -> dict[str, tuple[AttackResult, Any]]:
    """One run of every attack, made when first asked for."""

    class Once(dict):
        def __missing__(self, text: str) -> tuple[AttackResult, Any]:
            x, y, rng = batch
            with clf.vlm.counting() as count:
                made = build_attack(text)(clf, x, y, rng=rng)
            self[text] = made, count
            return self[text]

    return Once()


@pytest.mark.parametrize("text", CASES)
def test_shapes_types_and_ranges(results: dict, batch: tuple, text: str) -> None:
    x, _, _ = batch
    r, _ = results[text]
    assert r.x_adv.shape == x.shape
    assert r.x_adv.dtype == torch.float32
    assert not r.x_adv.requires_grad
    for name in ("success", "zero_grad"):
        assert getattr(r, name).dtype == torch.bool
        assert getattr(r, name).shape == (B,)
    for name in ("loss", "final_loss", "zero_pixels", "late_gain"):
        assert getattr(r, name).shape == (B,)
        assert bool(torch.isfinite(getattr(r, name)).all()), name
        assert not getattr(r, name).requires_grad
    for name in ("forwards", "backwards"):
        assert getattr(r, name).dtype == torch.long
        assert getattr(r, name).shape == (B,)
        assert bool((getattr(r, name) >= 0).all())
    assert bool(((r.zero_pixels >= 0) & (r.zero_pixels <= 1)).all())
    assert bool(((r.late_gain >= 0) & (r.late_gain <= 1)).all())
    for line in (r.trace or {}).values():
        assert line.shape[-1] == B
    assert all(isinstance(n, str) for n in r.notes)


@pytest.mark.parametrize("text", CASES)
def test_budget_and_box(results: dict, batch: tuple, text: str) -> None:
    x, _, _ = batch
    r, _ = results[text]
    attack = build_attack(text)
    assert float(r.x_adv.min()) >= 0
    assert float(r.x_adv.max()) <= 1
    eps = getattr(attack, "eps", None)
    if eps is not None:
        size = norms(r.x_adv - x, getattr(attack, "norm", "linf"))
        assert bool((size <= float(eps) + 1e-6).all()), size


@pytest.mark.parametrize("text", CASES)
def test_success_means_that_the_returned_image_is_misclassified(
    results: dict, clf: ZeroShot, batch: tuple, text: str
) -> None:
    _, y, _ = batch
    r, _ = results[text]
    with torch.no_grad():
        z = clf(r.x_adv)
    sure = margin(z, y).abs() > 1e-3
    assert torch.equal((prediction(z) != y)[sure], r.success[sure])
    if build_attack(text).name not in ("feature_pgd", "universal"):  # these may put a wrong image right
        assert bool(r.success[3]), "an image that was wrong from the start stays wrong"


@pytest.mark.parametrize("text", CASES)
def test_counts_are_those_of_the_towers(results: dict, text: str) -> None:
    r, count = results[text]
    assert int(r.forwards.sum()) == count.forwards
    assert int(r.backwards.sum()) == count.backwards


@pytest.mark.parametrize("text", CASES)
def test_same_stream_same_result(results: dict, clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    again = build_attack(text)(clf, x, y, rng=rng)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(again.x_adv, results[text][0].x_adv)
    assert torch.equal(again.success, results[text][0].success)


@pytest.mark.parametrize("text", [c for c in CASES if c.id not in COUPLED])
def test_eight_images_together_equal_eight_alone(results: dict, clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    whole, _ = results[text]
    attack = build_attack(text)
    for i in (0, 3, 4, 7):
        one = attack(clf, x[i : i + 1], y[i : i + 1], rng=rng[[i]])
        torch.testing.assert_close(one.x_adv[0], whole.x_adv[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.loss[0], whole.loss[i], atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            sure = float(margin(clf(whole.x_adv[i : i + 1]), y[i : i + 1]).abs()) > 1e-3
        assert not sure or bool(one.success[0]) == bool(whole.success[i])
        assert int(one.forwards[0]) == int(whole.forwards[i])
        assert int(one.backwards[0]) == int(whole.backwards[i])


@pytest.mark.parametrize("text", [c for c in CASES if c.id not in COUPLED])
def test_memory_layout_and_gradient_mode_do_not_matter(results: dict, clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    x = x[:2].contiguous(memory_format=torch.channels_last).requires_grad_(True)
    with torch.no_grad():
        other = build_attack(text)(clf, x, y[:2], rng=rng[:2])
    torch.testing.assert_close(other.x_adv, results[text][0].x_adv[:2], atol=1e-5, rtol=0)
    assert not other.x_adv.requires_grad
    with torch.enable_grad():
        assert not build_attack(text)(clf, x, y[:2], rng=rng[:2]).x_adv.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("text", CASES)
def test_the_model_is_left_alone(clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    x, y = x[:2].clone(), y[:2].clone()
    kept = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    modes = [m.training for m in clf.vlm.modules()]
    wants = [p.requires_grad for p in clf.vlm.parameters()]
    build_attack(text)(clf, x, y, rng=rng[:2])
    assert all(torch.equal(v, kept[k]) for k, v in clf.vlm.state_dict().items())
    assert [m.training for m in clf.vlm.modules()] == modes
    assert [p.requires_grad for p in clf.vlm.parameters()] == wants
    assert all(p.grad is None for p in clf.vlm.parameters())
    assert torch.equal(x, batch[0][:2])
    assert torch.equal(y, batch[1][:2])
    assert not x.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("text", CASES)
def test_budget_zero_returns_the_image(clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    attack: Any = build_attack(text)
    if "eps" not in {f.name for f in fields(attack)}:
        pytest.skip("no budget")
    result = replace(attack, eps=0)(clf, x[2:5], y[2:5], rng=rng[2:5])
    assert torch.equal(result.x_adv, x[2:5])
    assert result.success.tolist() == [False, True, False]


@pytest.mark.parametrize("text", CASES)
def test_an_empty_batch_gives_an_empty_result(clf: ZeroShot, batch: tuple, text: str) -> None:
    x, y, rng = batch
    result = build_attack(text)(clf, x[:0], y[:0], rng=rng[:0])
    assert result.x_adv.shape == (0, *x.shape[1:])
    assert result.success.shape == result.loss.shape == result.forwards.shape == (0,)


@pytest.mark.parametrize("text", CASES)
def test_spec_reads_back(text: str) -> None:
    attack = build_attack(text)
    assert build_attack(repr(attack)) == attack
    assert isinstance(attack, Attack)
    assert attack.name in ATTACKS
    assert attack.revision >= 1  # type: ignore[attr-defined]
    assert hash(attack) == hash(build_attack(text))


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x * 255, y), "images must lie in"),
        (lambda x, y: (x[:, :1], y), "images must have shape"),
        (lambda x, y: (x * float("nan"), y), "images contain NaN"),
        (lambda x, y: (x, y[:1]), r"labels must have shape \(2,\), got \(1,\)"),
        (lambda x, y: (x, y.float()), "labels must be integers"),
        (lambda x, y: (x, y * 0 + K), "labels must lie in 0..9 for 10 classes, got 10..10"),
    ],
    ids=["bytes", "grey", "nan", "few", "float", "range"],
)
def test_bad_input_is_refused(clf: ZeroShot, batch: tuple, text: str, change: Any, words: str) -> None:
    x, y, rng = batch
    bad_x, bad_y = change(x[:2], y[:2])
    with pytest.raises(ValueError, match=words):
        build_attack(text)(clf, bad_x, bad_y, rng=rng[:2])


def test_every_registered_attack_and_preset_is_in_the_table() -> None:
    listed = {build_attack(t).name for t in TABLE}
    assert set(ATTACKS) <= listed, "add a row for the new attack"
    for name in ATTACK_PRESETS:
        assert name in set(attack_table())
        assert build_attack(name).name in listed
