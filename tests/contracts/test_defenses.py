"""Laws that every defense keeps, whatever it does. To add a defense, add a row to ``ROWS``; nothing else here changes.

They run on toy towers with random weights, and on the shipped ``tiny`` model where it is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_models import TINY_UNET, tiny_unet
from fits import few_steps
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import CLASSES, toy_clf, toy_images

import ironclip
from ironclip.core import spec
from ironclip.core.rng import SampleRNG
from ironclip.core.types import Classifier, Defense, State, Surrogate
from ironclip.core.views import base_of
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import DEFENSES, build_defense, defense_table


@dataclasses.dataclass(frozen=True)
class Row:
    """``spec``: the defense as text. ``fit``: its state for a classifier, None where it needs none. ``ranged``: refuses
    pixels outside [0, 1] by itself. ``atol``: how far logits may be apart between batch sizes (scale is 20 to 100).
    ``models``: those that the defense can stand on, all of them where none is named.
    """

    spec: str
    fit: Callable[[Defense, ZeroShot], State] | None = None
    ranged: bool = True
    atol: float = 2e-3
    models: tuple[str, ...] = ()


ROWS = (
    Row("none", ranged=False),
    Row("noise"),
    Row("Noise(sigma=0.2, draws=3)"),
    Row("ttc"),
    Row("ttc(preset=reference)"),
    Row("TTC(tau=0.25, clean_offset=zero)"),
    Row("TTC(tau=1000, steps=3)"),
    Row("TTC(steps=1)", fit=lambda d, clf: d.fit(clf, toy_images(32, size=clf.vlm.image_size, seed=9))),
    Row("TTC(tau=1000, norm=l2, eps=1, alpha=1/2)"),
    Row("clipure"),
    Row("CLIPure(mode=per_sample)"),
    Row("clipure(preset=reference)"),
    Row("clipure_diff", fit=few_steps, atol=1e-2),
    Row("CLIPureDiff(mode=reference, eta=1, steps=3, low=300)", fit=few_steps, atol=1e-2),
    Row(f"DiffPure(model='{TINY_UNET}', steps=3)", fit=lambda *_: tiny_unet(), atol=1e-2),
    Row("aom"),
    Row("AOM(lam=0.5, path=geodesic, antithetic=True, draws=4)"),
    Row("AOM(gate=high_noise_drift)", fit=lambda d, clf: d.fit(clf, toy_images(32, size=clf.vlm.image_size, seed=9))),
    Row("AOM(gate=high_noise_drift, threshold=1e-9, draws=4, lam=0.5)"),
    Row("COLA(texts=8)", atol=1e-2),
    Row("COLA(texts=3, views=2, solver=exact, weights=paper_formula)"),
    Row("tte"),
    Row("tte(preset=reference)"),
    Row("anti_adversary"),
    Row("AntiAdversary(pixels=raw, alpha=0.05, steps=3, box=True)"),
    Row("Hedge(steps=5)"),
    Row("agc", fit=lambda d, clf: d.fit(clf, toy_images(32, size=clf.vlm.image_size, seed=9))),
    Row("AGC(tau=0.05)"),
    Row("FPTNoise(stable=0.01)"),
    Row("purify"),
    *(Row(f"Purify(filter={f})") for f in ("jpeg", "median", "blur", "bits")),
    Row("Smoothing(sigma=0.5, draws=40)"),
    Row("FPTNoise(levels=2)", fit=lambda d, clf: d.fit(clf, toy_images(32, size=clf.vlm.image_size, seed=9))),
    Row("RTPT(steps=0, views=8, neighbours=3)"),
    Row("RTPT(views=8, neighbours=3, share=0.25)", atol=1e-2, models=("tiny",)),
    Row("TAPT(views=8, share=0.25)", fit=few_steps, atol=1e-2, models=("tiny",)),
    Row("TAPT(views=8, share=0.25, variant=vlj)", fit=few_steps, atol=1e-2, models=("tiny",)),
    Row("tecoa", fit=few_steps, ranged=False),
    Row("TeCoA(mix_alpha=0.5, label_space=per_set)", fit=few_steps, ranged=False),
    Row("tecoa(preset=reference)", fit=few_steps, ranged=False),
    Row("APT(tokens=4, attack=perturbed, position=middle)", fit=few_steps, ranged=False, models=("tiny",)),
    Row("apt(preset=reference, context=class_specific)", fit=few_steps, ranged=False, models=("tiny",)),
    Row("AdvPT(eps=(1/255, 8/255), steps=2)", fit=few_steps, ranged=False, models=("tiny",)),
    Row("advpt(preset=reference, tokens=8)", fit=few_steps, ranged=False, models=("tiny",)),
    Row("tga_zsr", fit=few_steps, ranged=False),
    Row("tga_zsr(preset=reference)", fit=few_steps, ranged=False),
    Row("laat", fit=few_steps, ranged=False),
    Row("LAAT(anchors=level, mix_alpha=0.5)", fit=few_steps, ranged=False),
    Row("laat(preset=reference)", fit=few_steps, ranged=False),
    Row("FARE(steps=2)", fit=few_steps, ranged=False),
    Row("fare(preset=reference, steps=2)", fit=few_steps, ranged=False),
    Row("pmg_aft", fit=few_steps, ranged=False),
    Row("pmg_aft(preset=reference)", fit=few_steps, ranged=False),
    Row("tima", fit=few_steps, ranged=False),
    Row("TIMA(mix_alpha=0.5, order=alternating, rows=free)", fit=few_steps, ranged=False),
    Row("TIMA(text=table, deploy=original)", fit=few_steps, ranged=False),
    Row("mmcoa", fit=few_steps, ranged=False, models=("tiny",)),
    Row("MMCoA(towers=image, mix_alpha=0.5)", fit=few_steps, ranged=False),
)
MODELS = ("toy-conv", "toy-attention", "tiny")
B = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One defense on one model, with images whose streams have names."""

    row: Row
    defense: Defense
    clf: ZeroShot
    state: State | None
    x: Tensor
    rng: SampleRNG

    @property
    def defended(self) -> Classifier:
        return self.defense.apply(self.clf, self.state)

    def call(self, view: Classifier, rows: slice = slice(None), rng: SampleRNG | None = None) -> Tensor:
        with torch.no_grad():
            return view(self.x[rows], (rng or self.rng)[rows])


@pytest.fixture(scope="module", params=MODELS)
def clf(request: pytest.FixtureRequest) -> ZeroShot:
    if request.param != "tiny":
        return toy_clf(seed=3, tower=request.param.removeprefix("toy-"))
    try:
        vlm = ironclip.load("tiny")
    except (ImportError, FileNotFoundError, AttributeError) as missing:
        pytest.skip(f"the tiny model is not installed: {missing}")
    return ZeroShot.build(vlm, ["red circle", "blue square", "green triangle", "yellow star"])


@pytest.fixture(params=ROWS, ids=lambda row: row.spec)
def case(request: pytest.FixtureRequest, clf: ZeroShot) -> Case:
    row: Row = request.param
    if row.models and not clf.vlm.name.startswith(row.models):
        pytest.skip(f"needs one of {', '.join(row.models)}")
    defense = build_defense(row.spec)
    state = row.fit(defense, clf) if row.fit else None
    x = toy_images(B, size=clf.vlm.image_size, seed=5)
    return Case(row, defense, clf, state, x, SampleRNG.of(11, [f"image{i}" for i in range(B)]))


@contextmanager
def nothing_changes(vlm: torch.nn.Module) -> Iterator[None]:
    """Weights, gradients, flags and both global generators are after the block what they were before it."""
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    modes = [m.training for m in vlm.modules()]
    flags = [p.requires_grad for p in vlm.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    yield
    assert all(torch.equal(v, before[k]) for k, v in vlm.state_dict().items())
    assert modes == [m.training for m in vlm.modules()]
    assert flags == [p.requires_grad for p in vlm.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.modules()]
    assert all(p.grad is None for p in vlm.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    now = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(now, numpy_state, strict=True))


def pixel_gradient(case: Case, view: Classifier) -> tuple[Tensor, Tensor]:
    leaf = case.x.clone().requires_grad_(True)
    out = view(leaf, case.rng)
    (grad,) = torch.autograd.grad(out.logsumexp(1).sum() - out[:, 0].sum(), leaf)
    return out.detach(), grad


def judged(case: Case) -> Tensor:
    """(b,) True where the defense's gate takes the image for attacked; everywhere for those without one."""
    defense: Any = case.defense
    if hasattr(defense, "gated"):
        return defense.gated(case.clf, case.x, case.rng, case.state)
    if hasattr(defense, "gate"):
        return defense.gate(case.clf, case.x, case.rng, case.state)
    return torch.ones(B, dtype=torch.bool)


def test_finite_logits_with_and_without_gradients(case: Case) -> None:
    plain = case.call(case.defended)
    assert plain.shape == (B, case.clf.k)
    assert plain.dtype == torch.float32
    assert bool(torch.isfinite(plain).all())
    assert not plain.requires_grad
    out, grad = pixel_gradient(case, case.defended)
    torch.testing.assert_close(out, plain, rtol=0, atol=case.row.atol)
    assert grad.shape == case.x.shape
    assert bool(torch.isfinite(grad).all())
    assert float(grad.abs().amax()) > 0


def test_runs_in_inference_mode(case: Case) -> None:
    want = case.call(case.defended)
    with torch.inference_mode():
        got = case.defended(case.x * 1.0, case.rng)
    torch.testing.assert_close(got.clone(), want, rtol=0, atol=case.row.atol)


def test_nothing_is_written_into_the_model(case: Case) -> None:
    with nothing_changes(case.clf.vlm):
        case.call(case.defended)
        pixel_gradient(case, case.defended)
    x = case.x.clone()
    case.call(case.defended)
    assert torch.equal(x, case.x)


def test_trainable_parameters_get_no_gradient(case: Case) -> None:
    """A user's own towers may arrive unfrozen: the defense's inner steps must not reach them."""
    case.clf.vlm.requires_grad_(True)
    try:
        with nothing_changes(case.clf.vlm):
            case.call(case.defended)
            pixel_gradient(case, case.defended)
    finally:
        case.clf.vlm.requires_grad_(False)


def test_eight_at_once_equal_eight_alone(case: Case) -> None:
    defended = case.defended
    if base_of(defended, "batchwise"):
        pytest.skip("batchwise: images of a batch influence each other")
    together = case.call(defended)
    alone = torch.cat([case.call(defended, slice(i, i + 1)) for i in range(B)])
    torch.testing.assert_close(together, alone, rtol=0, atol=case.row.atol)
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    with torch.no_grad():
        shuffled = defended(case.x[order], case.rng[order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=case.row.atol)


def test_batchwise_and_randomized_are_not_claimed_in_vain(case: Case) -> None:
    defended = case.defended
    if base_of(defended, "batchwise"):
        assert not torch.allclose(case.call(defended)[:1], case.call(defended, slice(0, 1)), atol=1e-3)
    assert bool(base_of(defended, "randomized")) <= case.defense.info.randomized


def test_the_seed_decides(case: Case) -> None:
    defended = case.defended
    first, again = case.call(defended), case.call(defended)
    assert torch.equal(first, again)
    others = [SampleRNG(12, case.rng.ids), case.rng.at(1), case.rng.fold("elsewhere")]
    if not base_of(defended, "randomized"):
        assert all(torch.equal(case.call(defended, rng=r), first) for r in others)
        return
    if not bool(judged(case).any()):
        pytest.skip("the gate leaves every one of these images alone")
    assert all(not torch.equal(case.call(defended, rng=r), first) for r in others)


@pytest.mark.filterwarnings("ignore:.*was called without rng")
def test_called_without_streams(case: Case) -> None:
    with torch.no_grad():
        got = case.defended(case.x)
    assert torch.equal(got, case.call(case.defended, rng=SampleRNG.rows(B)))


def test_streams_must_fit_the_rows(case: Case) -> None:
    if not base_of(case.defended, "randomized"):
        pytest.skip("draws nothing")
    with pytest.raises(ValueError, match="rng carries 3 sample ids but x has 8 rows"):
        case.defended(case.x, case.rng[:3])


def test_spec_round_trip(case: Case) -> None:
    defense: Any = case.defense
    assert spec.parse(repr(defense), defense_table()) == defense
    assert spec.parse(spec.full_text(defense), defense_table()) == defense
    assert hash(defense) == hash(build_defense(case.row.spec))
    assert dataclasses.is_dataclass(defense)
    field = dataclasses.fields(defense)[0].name if dataclasses.fields(defense) else "field"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(defense, field, 1)


def test_info_says_who_it_is(case: Case) -> None:
    info = case.defense.info
    assert isinstance(case.defense, Defense)
    assert info.name in DEFENSES
    assert type(build_defense(info.name)) is type(case.defense)
    assert info.title
    assert info.kind
    assert info.paper
    assert info.paradigm in ("baseline", "training-time", "test-time adaptation", "training-free")
    assert base_of(case.defended, "k") == case.clf.k


def test_surrogates_keep_the_value_and_have_a_gradient(case: Case) -> None:
    names = getattr(case.defense, "surrogates", ())
    if not names:
        pytest.skip("differentiable as it is, offers no surrogate")
    assert isinstance(case.defense, Surrogate)
    want = case.call(case.defended)
    for name in names:
        view = case.defense.surrogate(case.clf, case.state, name)
        with nothing_changes(case.clf.vlm):
            out, grad = pixel_gradient(case, view)
        torch.testing.assert_close(out, want, rtol=0, atol=10 * case.row.atol)
        assert bool(torch.isfinite(grad).all()), name
        assert bool((grad.flatten(1).abs().amax(1) > 0).all()), name
        assert bool(base_of(view, "randomized")) == bool(base_of(case.defended, "randomized"))
        assert bool(base_of(view, "batchwise")) == bool(base_of(case.defended, "batchwise"))
    with pytest.raises(ValueError, match="unknown surrogate of"):
        case.defense.surrogate(case.clf, case.state, "nonsense")


def test_penalty_and_gate(case: Case) -> None:
    defense: Any = case.defense
    if not hasattr(defense, "penalty"):
        pytest.skip("has no gate to evade")
    leaf = case.x.clone().requires_grad_(True)
    cost = defense.penalty(case.clf, case.state)(leaf, case.rng)
    assert cost.shape == (B,)
    assert bool((cost >= 0).all())
    (grad,) = torch.autograd.grad(cost.sum(), leaf)
    assert bool(torch.isfinite(grad).all())
    gate = judged(case)
    assert gate.dtype == torch.bool
    assert bool((cost[gate] > 0).all()), "an image that is touched has not evaded"


def test_seen_pixels_and_features(case: Case) -> None:
    defended = case.defended
    seen = base_of(defended, "seen")
    if seen is not None:
        with torch.no_grad():
            pixels = seen(case.x, case.rng)
            direct = case.clf(pixels.clamp(0, 1))
        assert pixels.shape == case.x.shape
        assert float(pixels.min()) >= -1e-6
        assert float(pixels.max()) <= 1 + 1e-6
        torch.testing.assert_close(direct, case.call(defended), rtol=0, atol=case.row.atol)
    if hasattr(defended, "features"):
        with torch.no_grad():
            features = defended.features(case.x, case.rng)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(B))


def test_state_survives_a_file(case: Case, tmp_path: Path) -> None:
    if case.state is None:
        assert not case.defense.info.needs_state
        pytest.skip("learns nothing")
    save_file(case.state, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    again = dataclasses.replace(case, state=loaded)
    assert torch.equal(again.call(again.defended), case.call(case.defended))


def test_pixels_out_of_range_are_refused(case: Case) -> None:
    if not case.row.ranged:
        pytest.skip("is the model itself; attacks and data check the range")
    for bad, why in ((case.x * 255, "divide by 255"), (case.x - 0.5, "before mean/std normalisation")):
        with pytest.raises(ValueError, match=why):
            case.defended(bad, case.rng)
    with pytest.raises(ValueError, match="NaN or infinite"):
        case.defended(case.x * torch.nan, case.rng)


def test_every_registered_defense_has_a_row() -> None:
    covered = {build_defense(row.spec).info.name for row in ROWS}
    assert covered == set(DEFENSES), "add a row for the defense that is missing"
    assert len(CLASSES) >= 4
