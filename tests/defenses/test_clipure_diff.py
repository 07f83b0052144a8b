"""CLIPure-Diff: the step of the note, against its literal transcription; our prior; a prior of the hub's kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusion_models import need_diffusers, tiny_prior
from fits import labelled
from reference import diffusion_literal
from safetensors.torch import load_file
from torch import Tensor
from toys import generator, toy_clf, toy_images, words

import ironclip
from ironclip.cli import main
from ironclip.core.diffusion import cosine_kept
from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.types import State
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses import clipure_diff
from ironclip.defenses._prior import Prior, denoise, denoising_loss, initial, own_prior
from ironclip.defenses.clipure_diff import CLIPureDiff, Draw, climb
from ironclip.training.finetune import Session

SMALL = CLIPureDiff(width=8, depth=2)
SHORT = Loop(steps=4, batch_size=4, lr=1e-2, hold_out=0, checkpoint_every=2)


def weights(dim: int, seed: int = 0) -> State:
    """A network whose every weight counts."""
    g = generator(seed)
    return {k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in initial(dim, 8, 2, seed).items()}


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(b, d, generator=generator(seed), dtype=torch.float64), dim=1)


def draws_of(b: int, d: int, n: int, seed: int = 1) -> list[Draw]:
    g = generator(seed)
    return [
        Draw(torch.randint(1000, (b,), generator=g), torch.randn(b, d, generator=g, dtype=torch.float64))
        for _ in range(n)
    ]


def stub(m: Tensor) -> Prior:
    """Predicts the point ``m`` whatever it sees."""
    return Prior(lambda z, _t: m.expand_as(z), lambda u, _r: u * math.sqrt(u.shape[1]), cosine_kept())


@pytest.fixture(scope="module")
def fitted() -> tuple[ZeroShot, State]:
    clf = toy_clf()
    return clf, SMALL.fit(clf, labelled(clf, 12), loop=SHORT, seed=1)


# the step, by hand


def test_a_constant_prediction_pulls_towards_it() -> None:
    u, m = rows(4, 6), 2 * torch.ones(6, dtype=torch.float64)
    out = climb(u, torch.ones(4), stub(m), draws_of(4, 6, 1), 0.1, whole=False)
    pull = F.normalize(m - math.sqrt(6) * u, dim=1)
    torch.testing.assert_close(out, F.normalize(u + 0.1 * pull, dim=1))
    one = climb(u, torch.ones(4), stub(m), draws_of(4, 6, 1), 0.1, whole=True)
    whole = (m - math.sqrt(6) * u) / (m - math.sqrt(6) * u).norm()
    torch.testing.assert_close(one, F.normalize(u + 0.1 * whole, dim=1))


def test_a_point_that_is_predicted_to_stay_stays() -> None:
    u = rows(2, 5)
    same = Prior(lambda z, _t: math.sqrt(5) * u, lambda v, _r: math.sqrt(5) * v, cosine_kept())
    out = climb(u, torch.ones(2), same, draws_of(2, 5, 1), 0.1, whole=False)
    torch.testing.assert_close(out, u)


@pytest.mark.parametrize("per_row", [True, False])
def test_steps_and_network_equal_the_transcription(per_row: bool) -> None:
    w = {k: v.double() for k, v in weights(6).items()}
    u, draws = rows(3, 6), draws_of(3, 6, 4)
    got = climb(u, torch.ones(3), own_prior(w), draws, 0.2, whole=not per_row)
    want = diffusion_literal.clipure_diff(
        u, lambda z, t: diffusion_literal.network(w, z, t), [(d.t.tolist(), d.noise) for d in draws],
        eta=0.2, per_row=per_row,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_logits_equal_the_transcription_in_fp32(fitted: tuple[ZeroShot, State]) -> None:
    clf, state = fitted
    x, rng = toy_images(3), SampleRNG.of(5, ["a", "b", "c"])
    w = {k.removeprefix("extra."): v.double() for k, v in state.items() if k.startswith("extra.")}
    z = F.normalize(clf.vlm.encode_image(x).double(), dim=1)
    drawn = SMALL.draws(rng.fold("clipure_diff"), z)
    assert all(400 <= t <= 600 for d in drawn for t in d.t.tolist())
    assert len({t for d in drawn for t in d.t.tolist()}) > 20
    want = diffusion_literal.clipure_diff(
        z, lambda v, t: diffusion_literal.network(w, v, t), [(d.t.tolist(), d.noise) for d in drawn],
        eta=0.05, per_row=True,
    )  # fmt: skip
    got = SMALL.apply(clf, state).features(x, rng)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_derivative_matches_finite_differences() -> None:
    w = {k: v.double() for k, v in weights(5).items()}
    draws, prior = draws_of(2, 5, 2), own_prior(w)

    def value(v: Tensor) -> Tensor:
        return climb(F.normalize(v, dim=1), v.norm(dim=1), prior, draws, 0.3, whole=False)

    assert torch.autograd.gradcheck(value, (rows(2, 5).requires_grad_(True),), eps=1e-6, atol=1e-5)


def test_published_gradient_is_shrunk_by_each_large_step(fitted: tuple[ZeroShot, State]) -> None:
    clf, state = fitted
    defense = CLIPureDiff(width=8, depth=2, eta=30, steps=3)
    norms = []
    for view in (defense.apply(clf, state), defense.surrogate(clf, state, "published")):
        x = toy_images(2).requires_grad_(True)
        out = view(x, SampleRNG.rows(2))
        (g,) = torch.autograd.grad((out[:, 0] - out[:, 1]).sum(), x)
        norms.append(float(g.norm()))
    assert norms[1] < 1e-3 * norms[0]


def test_same_streams_in_any_split_and_neighbours_in_reference_mode(fitted: tuple[ZeroShot, State]) -> None:
    clf, state = fitted
    x, rng = toy_images(5), SampleRNG.of(2, list("abcde"))
    view = SMALL.apply(clf, state)
    parts = [view(x[s], rng[s]) for s in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), view(x, rng), rtol=0, atol=1e-4)
    batch = CLIPureDiff(width=8, depth=2, mode="reference", eta=1.0)
    drawn = batch.draws(rng, torch.zeros(5, 16))
    assert all(len(set(d.t.tolist())) == 1 for d in drawn)
    view = batch.apply(clf, state)
    assert float((view(x, rng)[0] - view(x[:2], rng[:2])[0]).abs().max()) > 1e-3


# our prior


def test_an_untrained_network_answers_its_best_guess_and_training_lowers_the_error() -> None:
    kept, z = cosine_kept(), torch.randn(6, 4, generator=generator(3))
    t = torch.tensor([0, 10, 400, 600, 990, 999])
    out = denoise(initial(4, 8, 2, 0), z, t, kept)
    torch.testing.assert_close(out, kept[t].sqrt().float()[:, None] * z)
    clf = toy_clf()
    data = labelled(clf, 40)
    state = SMALL.fit(clf, data, loop=Loop(steps=150, batch_size=32, lr=1e-2, hold_out=0))
    points = F.normalize(clf.vlm.encode_image(next(iter(data.batches(40)))[0]), dim=1) * 4
    many, rng = points.repeat(20, 1), SampleRNG.rows(800, 9)
    learned = {k.removeprefix("extra."): v for k, v in state.items()}
    errors = [float(denoising_loss(w, many, rng, kept).mean()) for w in (initial(16, 8, 2, 0), learned)]
    assert errors[1] < 0.75 * errors[0]


def test_training_reads_each_image_once_and_no_label(tmp_path: Path) -> None:
    clf = toy_clf()
    data = labelled(clf, 10)
    with clf.vlm.counting() as count:
        first = SMALL.fit(clf, data, loop=SHORT, session=Session(tmp_path))
        again = SMALL.fit(clf, data, loop=SHORT, session=Session(tmp_path))
    assert (count.forwards, count.backwards, count.texts) == (10, 0, 0)
    assert (tmp_path / clipure_diff.ROWS).is_file()
    plain = SMALL.fit(clf, labelled(clf, 10, seed=7), loop=SHORT)
    for key, value in first.items():
        assert torch.equal(value, again[key])
        assert torch.equal(value, plain[key])


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    clf = toy_clf()
    data = labelled(clf, 10)

    def stop(step: int, _steps: int, _metrics: dict[str, Any]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SMALL.fit(clf, data, loop=SHORT, session=Session(tmp_path, progress=stop))
    resumed = SMALL.fit(clf, data, loop=SHORT, session=Session(tmp_path))
    whole = SMALL.fit(clf, data, loop=SHORT)
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def test_the_command_fits_and_bench_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = "CLIPureDiff(width=8, depth=1, steps=2)", tmp_path / "states"
    run = ["fit", spec, "--vlm", "tiny", "--data", "shapes:train", "--limit", "12", "--out", str(out)]
    assert main([*run, "--steps", "2", "--batch-size", "4"]) == 0
    assert load_file(out / "clipure_diff.safetensors")["extra.in_w"].shape == (8, 128)
    capsys.readouterr()
    shared = ["bench", "--vlm", "tiny", "--data", "shapes", "--limit", "3", "--json", "--store", str(tmp_path / "s")]
    assert main([*shared, "--threat", "static", "--defenses", spec, "--state", str(out)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["defense"] == "clipure_diff"


# a prior of the hub's kind


def test_a_hub_prior_from_a_folder(tmp_path: Path) -> None:
    need_diffusers()
    clf, folder = toy_clf(), tiny_prior(tmp_path)
    defense = CLIPureDiff(prior=str(folder), steps=2, eta=0.3)
    assert not defense.needs_state
    prior, x = defense.prior_of(clf), toy_images(3)
    raw = clf.vlm.encode_image(x, normalize=False)
    mean = torch.linspace(-0.1, 0.1, 16)
    torch.testing.assert_close(prior.scaled(F.normalize(raw, dim=1), raw.norm(dim=1)), (raw - mean) / 0.5)
    view, rng = defense.apply(clf), SampleRNG.rows(3)
    leaf = x.requires_grad_(True)
    out = view(leaf, rng)
    (grad,) = torch.autograd.grad(out[:, 0].sum(), leaf)
    assert bool((grad.flatten(1).abs().amax(1) > 0).all())
    alone = torch.cat([view(x[i : i + 1], rng[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-3)
    assert float((out - clf(x)).detach().abs().max()) > 0.1


def test_hub_priors_that_do_not_fit(tmp_path: Path) -> None:
    need_diffusers()
    wide, blank = tiny_prior(tmp_path / "wide", dim=24), tiny_prior(tmp_path / "blank", std=0.0)
    bare = tiny_prior(tmp_path / "bare", text=None)
    for folder, message in (
        (bare, "is no prior of image embeddings given a text"),
        (wide, r"has embeddings of 24 dimensions, toy-conv has 16; .*ViT-L/14 \(768\)"),
        (blank, "holds no statistics of embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            CLIPureDiff(prior=str(folder)).apply(toy_clf())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"could not be loaded as a PriorTransformer: .*no prior/config\.json"):
        CLIPureDiff(prior=str(tmp_path / "empty")).apply(toy_clf())


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ironclip.defenses._diffusers.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r'diffusers is not installed; type pip install "ironclip\[diffusion\]"'):
        CLIPureDiff(prior="someone/prior").apply(toy_clf())


# refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("eta=0", "eta must be positive and finite, got 0.0; write 0.05"),
        ("steps=-1", "steps must not be negative, got -1; write 10"),
        ("low=7, high=3", "0 <= low <= high <= 999, got 7 and 3"),
        ("high=1000", "0 <= low <= high <= 999, got 400 and 1000"),
        ("width=0", "width must be at least 1, got 0"),
        ("mode=batch", "unknown mode 'batch'"),
        ("prior=''", "prior names nothing; write prior=fitted"),
    ],
)
def test_bad_fields(fields: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ironclip.build(f"CLIPureDiff({fields})")


def test_bad_states_and_images(fitted: tuple[ZeroShot, State]) -> None:
    clf, state = fitted
    with pytest.raises(ValueError, match="clipure_diff must be fitted first; run ironclip fit 'clipure_diff'"):
        SMALL.apply(clf)
    with pytest.raises(ValueError, match=r"fitted by CLIPureDiff\(width=8, .*, not by CLIPureDiff\(width=256, "):
        CLIPureDiff().apply(clf, state)
    with pytest.raises(ValueError, match="fitted on a backbone with weights"):
        SMALL.apply(toy_clf(seed=1), state)
    with pytest.raises(ValueError, match="someone/prior is trained already; write prior=fitted"):
        CLIPureDiff(prior="someone/prior").fit(clf, labelled(clf))
    dark = VLM.wrap(lambda x: x.flatten(1)[:, :4], words(4), 2, name="dark")
    made = {f"extra.{k}": v for k, v in weights(4).items()}
    with pytest.raises(ValueError, match="dark gives an image a feature of length zero"):
        SMALL.apply(ZeroShot.build(dark, ["a", "b"]), made)(torch.zeros(1, 3, 2, 2), SampleRNG.rows(1))


def test_no_steps_are_the_plain_model_and_the_preset_is_the_published_one(fitted: tuple[ZeroShot, State]) -> None:
    clf, state = fitted
    x = toy_images(3)
    torch.testing.assert_close(CLIPureDiff(width=8, depth=2, steps=0).apply(clf, state)(x, SampleRNG.rows(3)), clf(x))
    told = repr(CLIPureDiff(preset="reference"))
    assert told == (
        "CLIPureDiff(mode=reference, eta=30.0, low=900, high=999, prior='kakaobrain/karlo-v1-alpha', null=imagenet80)"
    )
