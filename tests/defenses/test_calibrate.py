"""One notation for thresholds: `calibrate`, `fit`, the state, the warning, `ironclip fit`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import image_set
from safetensors.torch import load_file, save_file
from toys import toy_clf, toy_images

import ironclip
from ironclip.cli import main
from ironclip.core.rng import SampleRNG
from ironclip.core.spec import full_text
from ironclip.defenses import _calibrate
from ironclip.defenses.aom import AOM
from ironclip.defenses.ttc import TTC
from ironclip.evaluation.block import Entry
from ironclip.evaluation.entries import load_state
from ironclip.evaluation.job import Job

GATED = ("TTC", "AOM(gate=high_noise_drift)", "AGC", "FPTNoise(levels=2)")


@pytest.fixture(autouse=True)
def nobody_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calibrate, "_told", set())


def settled(spec: str, **given: Any) -> Any:
    defense: Any = ironclip.build(spec)
    return getattr(defense.settled(toy_clf(), **given), defense.THRESHOLD.field)


# the number


def test_ttc_takes_the_low_end_and_the_others_the_high_end_of_the_drift() -> None:
    clf, x = toy_clf(), toy_images(50)
    rng = SampleRNG.of(3, range(50))
    for spec in GATED:
        defense: Any = ironclip.build(spec)
        drift = torch.cat([defense.drift(clf, x[i : i + 1], rng[i : i + 1]) for i in range(50)]).detach()
        share = 0.05 if spec == "TTC" else 0.95
        want = float(np.quantile(drift.double().numpy(), share))
        assert defense.calibrate(clf, x, seed=3) == pytest.approx(want, rel=6e-4), spec


def test_calibrated_tau_touches_the_asked_share_of_clean_images() -> None:
    clf, x = toy_clf(), toy_images(200)
    for quantile in (0.05, 0.25):
        tau = TTC().calibrate(clf, x, quantile)
        touched = TTC(tau=tau).gate(clf, x, SampleRNG.rows(200)).float().mean()
        assert float(touched) == pytest.approx(quantile, abs=0.011)
        assert ironclip.build(f"TTC(tau={tau})") == TTC(tau=tau)


@pytest.mark.parametrize("spec", GATED)
def test_the_same_number_from_any_kind_of_data(spec: str) -> None:
    clf, x = toy_clf(), toy_images(70)
    defense: Any = ironclip.build(spec)
    data = image_set(x, torch.arange(70) % 5, list(clf.class_names))
    plain = defense.calibrate(clf, x, seed=2)
    assert defense.calibrate(clf, [x[:33], x[33:]], seed=2) == plain
    named = defense.calibrate(clf, data, seed=2)
    assert named == defense.calibrate(clf, [(x[:9], None, data.ids[:9]), (x[9:], None, data.ids[9:])], seed=2)
    assert named != plain, "images with names have streams of their own"
    assert named == pytest.approx(plain, rel=0.5)


# the state


@pytest.mark.parametrize("spec", GATED)
def test_a_state_is_the_number_in_the_spec(spec: str) -> None:
    clf, x = toy_clf(), toy_images(40)
    defense: Any = ironclip.build(spec)
    state = defense.fit(clf, x)
    field, rng = defense.THRESHOLD.field, SampleRNG.rows(40)
    written = defense.calibrated(state)
    assert getattr(written, field) == defense.calibrate(clf, x)
    assert ironclip.build(repr(written)) == written
    assert torch.equal(defense.apply(clf, state)(x, rng), written.apply(clf)(x, rng))
    for name in getattr(defense, "surrogates", ()):
        pair = (defense.surrogate(clf, state, name), written.surrogate(clf, None, name))
        assert torch.equal(*(view(x, rng) for view in pair))
    if hasattr(defense, "penalty"):
        assert torch.equal(defense.penalty(clf, state)(x, rng), written.penalty(clf)(x, rng))


def test_a_threshold_in_the_spec_stands_against_any_state() -> None:
    state = TTC().fit(toy_clf(), toy_images(40))
    assert settled("TTC(tau=0.5)", state=state) == 0.5
    assert settled("TTC", state=state) == float(state["tau"]) != 0.2
    assert settled("AOM") is None, "without a gate there is nothing to settle"


def test_states_of_another_model_or_another_noise_are_refused() -> None:
    state = TTC().fit(toy_clf(), toy_images(40))
    with pytest.raises(ValueError, match=r"fitted on a backbone with weights .*, toy-conv has"):
        TTC().apply(toy_clf(seed=1), state)
    with pytest.raises(
        ValueError, match=r"calibrated for TTC\(eps=4/255, norm=linf\), not for TTC\(eps=8/255, norm=linf\)"
    ):
        TTC(eps="8/255").apply(toy_clf(), state)
    with pytest.raises(ValueError, match="the state of TTC must hold 'tau', it holds threshold"):
        TTC().apply(toy_clf(), {"threshold": torch.ones(1)})
    bare = {"tau": torch.tensor([0.31])}
    assert settled("TTC(eps=8/255)", state=bare) == 0.31, "states without marks are taken at their word"


# no threshold at all


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("TTC(steps=3)", r"TTC is not calibrated for toy-conv and takes tau=0\.2; run ironclip fit 'TTC\(steps=3\)' "
         r"--vlm toy-conv --data folder:PATH/train and write the tau= that it prints, or take TTC\(\)\.calibrate\(clf"),
        ("AGC", r"AGC is not calibrated for toy-conv and takes tau=0\.2; run ironclip fit AGC --vlm toy-conv "),
        ("FPTNoise", r"FPTNoise is not calibrated for toy-conv and takes stable=0\.1; run ironclip fit FPTNoise "),
    ],
)  # fmt: skip
def test_the_warning_names_the_command_and_is_given_once_per_model(spec: str, message: str) -> None:
    defense: Any = ironclip.build(spec)
    with pytest.warns(UserWarning, match=message):
        defense.apply(toy_clf())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defense.apply(toy_clf())
    with pytest.warns(UserWarning, match="is not calibrated for toy-attention"):
        defense.apply(toy_clf(tower="attention"))


def test_no_warning_on_the_published_backbone_and_with_a_figure() -> None:
    clf = toy_clf()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("hf:openai/clip-vit-base-patch32", "open_clip:ViT-B-32/openai"):
            clf.vlm.name = name
            TTC().apply(clf)
        clf.vlm.name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
        TTC(tau=0.3).apply(clf)
    with pytest.warns(UserWarning, match="is not calibrated for open_clip:ViT-B-32/laion2b"):
        TTC().apply(clf)


def test_specs_and_digests_are_those_of_before() -> None:
    assert repr(TTC(preset="reference")) == "TTC()"
    assert full_text(TTC()) == (
        "TTC(eps=4/255, alpha=1/255, steps=2, tau=0.2, beta=2.0, norm=linf, clean_offset=noise)"
    )
    assert full_text(AOM()).endswith("gate=off, gate_sigma=0.1, threshold=None)")
    assert Entry(TTC()).state_hash == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clf, x: TTC().calibrate(clf, x, quantile=5), r"quantile must lie in \(0, 1\), got 5; write 0\.05"),
        (lambda clf, x: TTC().calibrate(clf, x[:0]), "calibration needs clean images, got none"),
        (lambda clf, x: AOM().calibrate(clf, x), r"AOM\(gate=off\) has no threshold; write AOM\(gate=high_noise_dri"),
        (lambda clf, x: TTC().calibrate(clf, x * 255), "divide by 255"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(toy_clf(), toy_images(4))


# the command


def fit(*arguments: str) -> int:
    return main(["fit", *arguments, "--vlm", "tiny", "--data", "shapes:train", "--limit", "24"])


def test_the_command_prints_the_spec_and_leaves_a_state_for_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "states"
    assert fit("TTC", "--out", str(out)) == 0
    text = capsys.readouterr().out
    manifest = json.loads((out / "ttc.json").read_text(encoding="utf-8"))
    found = ironclip.build(manifest["spec"])
    assert text.startswith(f"{found!r}: calibrated on 24 images; the state is {out / 'ttc.safetensors'}")
    assert f"next: ironclip bench --vlm tiny --defenses '{found!r}' --data DATA" in text
    assert (manifest["recipe"], manifest["vlm"], manifest["images"]) == (full_text(TTC()), "tiny-v1", 24)
    assert "loop" not in manifest
    state = load_file(out / "ttc.safetensors")
    assert float(state["tau"]) == found.tau != 0.2
    job = Job(vlm="tiny", data=("shapes",), state=str(out))
    for spec, waits in (("TTC", True), ("TTC(steps=3)", True), ("TTC(tau=0.3)", False), ("AOM", False)):
        assert (load_state(job, spec, "tiny-v1", ironclip.load("tiny").weights_hash) is not None) == waits, spec
    assert fit("TTC", "--out", str(out)) == 0, "a calibration may be made again"
    assert json.loads((out / "ttc.json").read_text(encoding="utf-8"))["state"] == manifest["state"]
    shared = ["bench", "--vlm", "tiny", "--data", "shapes", "--limit", "4", "--json"]
    seen = []
    for defense in (["TTC", "--state", str(out)], [repr(found)]):
        capsys.readouterr()
        store = str(tmp_path / f"store{len(seen)}")
        assert main([*shared, "--threat", "static", "--store", store, "--defenses", *defense]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        seen.append((row["clean"], row["robust"]))
    assert seen[0] == seen[1]


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "states"
    for arguments, message in (
        (["AOM"], "AOM() has no gate to calibrate; write AOM(gate=high_noise_drift)"),
        (["TTC(tau=0.3)"], "TTC(tau=0.3) has its tau already; leave tau= out to find it again"),
        (["TTC", "--steps", "3"], "TTC is calibrated, not trained; leave steps out"),
        (["TTC", "--half"], "TTC has one number to store; leave --half out"),
        (["TTC", "--dry-run"], "ttc is not trained step by step: there is nothing to estimate"),
    ):
        assert fit(*arguments, "--out", str(out)) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    save_file({"tau": torch.ones(1)}, out / "ttc.safetensors")
    assert fit("TTC", "--out", str(out)) == 2
    assert "exists already and was made elsewhere" in capsys.readouterr().err
