"""Every diagnostic is raised by the fault that it is meant for, and by nothing on a sound classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from planted import DetachedGradient
from torch import Tensor, nn
from toys import words
from toyset import Rows, toy_block

import ironclip
from ironclip.core.spec import method
from ironclip.core.types import Info
from ironclip.core.views import Scored
from ironclip.core.vlm import VLM
from ironclip.evaluation.checks import twins
from ironclip.evaluation.judge import judge
from ironclip.evaluation.probes import probe_flags
from ironclip.evaluation.results import from_store
from ironclip.evaluation.run import evaluate
from ironclip.evaluation.store import Store
from ironclip.evaluation.suspicion import FATAL, adaptive_flags, budget_flags
from ironclip.report.flags import FATAL as PRINTED
from ironclip.report.flags import FLAGS
from ironclip.report.tables import markdown

ATTACK = "PGD(eps=9/510, steps=3)"
FAULTS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {}


def fault(fn: Callable[[Any, Tensor, Any], Tensor]) -> Callable[[Any, Tensor, Any], Tensor]:
    """``fn(clf, x, rng) -> logits``: what a broken defense answers."""
    FAULTS[fn.__name__] = fn
    return fn


@method
class Broken:
    """A defense with one fault, by name."""

    info: ClassVar[Info] = Info("broken", "broken", "training-free", "none", "test")

    how: str = "sound"

    def apply(self, clf: Any, state: Any = None) -> Any:
        return Scored(clf, lambda x, rng: FAULTS[self.how](clf, x, rng))


@fault
def sound(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return clf(x)


@fault
def probabilities(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return clf(x).softmax(dim=1)


@fault
def undeclared_noise(clf: Any, x: Tensor, rng: Any) -> Tensor:
    noise = torch.from_numpy(rng.generator(0).standard_normal(x.shape)).to(x)
    return clf(x + 0.01 * noise)


@fault
def constant(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return torch.arange(clf.k).float().expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


@fault
def one_more_column(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return F.pad(clf(x), (0, 1))


@fault
def not_a_number(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return clf(x) / 0 * 0


@fault
def through_numpy(clf: Any, x: Tensor, rng: Any) -> Tensor:
    return clf(torch.from_numpy(x.numpy().copy()))


@fault
def optimises_when_attacked(clf: Any, x: Tensor, rng: Any) -> Tensor:
    """Takes a gradient of the scores alone, and only for pixels off the 8-bit lattice."""
    z = clf(x)
    off = ((x * 255) - (x * 255).round()).abs().amax(dim=(1, 2, 3)) > 1e-3
    if bool(off.any()):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(leaf.logsumexp(1).sum(), leaf)
        z = z + 0 * grad
    return z


def table(how: str, threat: str = "static,adaptive", **options: Any) -> dict[str, Any]:
    vlm, data = toy_block(10)
    data = replace(data, read=Rows((data.read.x * 255).round() / 255))
    settings: dict[str, Any] = {"budget": "smoke", "costs": False, "gallery": 0} | options
    return evaluate(vlm, data, [Broken(how=how)], ATTACK, threat, **settings)


def flags(how: str, threat: str, **options: Any) -> set[str]:
    (row,) = [r for r in table(how, threat, **options)["rows"] if r["threat"] == threat]
    return set(row["flags"]) - {"not-converged"}


@pytest.mark.parametrize("threat", ["static", "adaptive", "blackbox"])
def test_a_sound_classifier_raises_nothing(threat: str) -> None:
    assert flags("sound", threat) - {"bb-beats-wb", "random-beats"} == set()


@pytest.mark.parametrize("threat", ["static", "adaptive", "blackbox"])
@pytest.mark.parametrize(
    ("how", "flag"),
    [
        ("probabilities", "probabilities"),
        ("undeclared_noise", "stochastic"),
        ("constant", "constant"),
        ("optimises_when_attacked", "dynamic"),
    ],
)
def test_each_fault_has_its_flag(how: str, flag: str, threat: str) -> None:
    assert flag in flags(how, threat)


def test_inner_optimisation_is_seen_although_clean_images_never_start_it() -> None:
    (row,) = table("optimises_when_attacked", "static")["rows"]
    assert row["backwards"] == 0, "no image-tower pass gives it away"
    assert "dynamic" in row["flags"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one_more_column", "the classifier must return logits of shape (10, 5), got (10, 6)"),
        ("not_a_number", "the classifier returned NaN or infinite logits"),
    ],
)
def test_what_is_no_classifier_is_a_failed_cell_that_says_why(how: str, message: str) -> None:
    results = table(how, "adaptive")
    assert not results["rows"]
    assert results["errors"][0]["error"] == f"ValueError: {message}"


def test_a_constant_is_never_printed_as_robust() -> None:
    results = table("constant", "adaptive")
    assert {"zero-grad", "constant"} <= set(results["rows"][0]["flags"])
    assert "unreliable" in markdown(results)


@pytest.mark.parametrize("defense", [Broken(how="through_numpy"), DetachedGradient()])
def test_without_gradient_and_surrogate_black_box_members_run_and_the_record_says_so(
    defense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ironclip.evaluation import recipes

    monkeypatch.setitem(recipes.RECIPES, "transform", recipes.RECIPES["none"])
    vlm, data = toy_block(10)
    options: dict[str, Any] = {"costs": False, "gallery": 0}
    results = evaluate(vlm, data, [defense], ATTACK, "adaptive,blackbox", budget="short", **options)
    adaptive, black = results["rows"]
    assert {"no-gradient", "zero-grad"} <= set(adaptive["flags"])
    assert adaptive["unreliable"]
    by_name = {m["name"]: m for m in adaptive["members"]}
    assert [n for n, m in by_name.items() if m["no_gradient"]] == ["through-ce", "through-margin", "apgd-dlr"]
    assert by_name["square"]["ran"] > 0
    assert not black["unreliable"]
    assert [m["name"] for m in black["members"]] == ["random", "square", "rays"]
    assert all(m["ran"] for m in black["members"])


def test_numpy_inside_falls_to_bpda() -> None:
    vlm, data = toy_block(10)

    @method
    class Hidden:
        info: ClassVar[Info] = Info("hidden", "hidden", "training-free", "transform", "test")

        def apply(self, clf: Any, state: Any = None) -> Any:
            return Scored(clf, lambda x, rng: FAULTS["through_numpy"](clf, x, rng))

    results = evaluate(vlm, data, [Hidden()], "PGD(eps=12/255, steps=5)", "adaptive", budget="quick", costs=False)
    by_name = {m["name"]: m for m in results["rows"][0]["members"]}
    assert by_name["bpda"]["broke"] + by_name["bpda-margin"]["broke"] >= 5
    assert "no-gradient" in results["rows"][0]["flags"]
    assert not results["rows"][0]["unreliable"]


class Same(nn.Module):
    """Every image has the same feature."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 8) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_constant_model_is_flagged_without_any_defense() -> None:
    vlm = VLM.wrap(Same().eval(), words(8), 8)
    _, data = toy_block(10)
    (row,) = ironclip.evaluate(vlm, data, "none", ATTACK, "static", budget="smoke", costs=False)["rows"]
    assert {"constant", "zero-grad"} <= set(row["flags"])
    assert row["unreliable"]


def test_twin_classes_are_ties() -> None:
    weights = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1e-7], [1.0, 1.0]]), dim=1)
    assert twins(weights) == twins(weights, rows=2) == 2
    assert twins(torch.eye(5)) == 0


def test_normalised_logits_that_move_are_noted_though_the_label_stays() -> None:
    class Shaky:
        randomized = True

        def __call__(self, x: Tensor, rng: Any = None) -> Tensor:
            return torch.tensor([[10.0, 0.0, self.size * rng.draw]]).expand(len(x), -1)

    x, y, rng = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long), ironclip.SampleRNG.rows(2)
    shaky = Shaky()
    for size, moved in ((0.0, False), (4e-4, False), (0.1, True)):
        shaky.size = size
        assert judge(shaky, x, y, rng, 3).moved.tolist() == [moved] * 2


def record(**changes: Any) -> dict[str, Any]:
    """One sample of a composition of one white-box and one black-box member."""
    base = {
        "pred": 0, "clean_pred": 0, "clean_correct": 1.0, "clean_top": 1.0, "white_correct": 1.0, "correct": [1.0, 1.0],
        "ran": [True, True], "dead": [False, False], "blocked": [False, False], "late": [0.0, 0.0],
        "blank": [0.0, 0.0], "tie": False, "stochastic": False, "probabilities": False, "dtype_flip": False,
        "linf": 0.01, "l2": 0.1, "l1": 1.0, "outside_box": False,
    }  # fmt: skip
    return base | changes


MEMBERS = [{"name": "a", "view": "through", "white": True}, {"name": "random", "view": "through", "white": False}]


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({}, []),
        ({"dead": [True, False]}, ["zero-grad"]),
        ({"blank": [0.6, 0.0]}, ["zero-grad"]),
        ({"blocked": [True, False], "dead": [True, False]}, ["zero-grad", "no-gradient"]),
        ({"late": [0.02, 0.0]}, ["not-converged"]),
        ({"correct": [1.0, 0.0]}, ["bb-beats-wb", "random-beats"]),
        ({"dtype_flip": True}, ["dtype"]),
        ({"tie": True}, ["tie"]),
    ],
)
def test_flags_of_a_composition_by_hand(changes: dict[str, Any], raised: list[str]) -> None:
    rows = [record(clean_top=float(i), **changes) for i in range(10)]
    assert adaptive_flags(rows, MEMBERS) == raised


def test_budget_by_hand_in_three_norms() -> None:
    assert budget_flags([record()], 0.01, "linf") == []
    assert budget_flags([record(linf=0.010002)], 0.01, "linf") == ["budget"]
    assert budget_flags([record()], 0.1, "l2") == budget_flags([record()], 1.0, "l1") == []
    assert budget_flags([record(l1=1.01)], 1.0, "l1") == ["budget"], "the l2 norm would not show it"
    assert budget_flags([record(outside_box=True)], 1.0, "linf") == ["budget"]


def test_probe_flags_by_hand() -> None:
    base = {"n": 40, "steps": [20, 20], "huge": 0.0}
    assert probe_flags(base, 0.5, 40, 1.0, ironclip.build("PGD(eps=4/255)").eps, 5) == []
    for changes, raised in (
        ({"steps": [20, 22]}, ["steps-hurt"]),
        ({"steps": [20, 21]}, []),
        ({"steps": [20, 18]}, ["not-converged"]),
        ({"huge": 0.2}, ["eps-sweep"]),
        ({"starts": 0.1}, ["start-spread"]),
        ({"starts": 0.025}, []),
    ):
        assert probe_flags(base | changes, 0.5, 40, 1.0, ironclip.build("PGD(eps=4/255)").eps, 5) == raised


def test_start_spread_and_the_other_probes_run_from_standard_on(tmp_path: Any) -> None:
    table("sound", "adaptive", budget=replace(ironclip.evaluation.recipes.BUDGETS["standard"], queries=5, points=4),
          limit=3, store=tmp_path / "s")  # fmt: skip
    (row,) = [r for r in from_store(Store(tmp_path / "s"))["rows"] if r["threat"] == "adaptive"]
    assert set(row["probes"]) == {"n", "huge", "steps", "starts"}
    assert set(row["checks"]) == {"moved", "labels", "twins"}


def test_every_flag_is_explained_and_the_fatal_ones_agree() -> None:
    assert PRINTED == FATAL
    everything = {"zero-grad", "no-gradient", "not-converged", "bb-beats-wb", "random-beats", "tie", "stochastic"}
    everything |= {"probabilities", "constant", "dtype", "budget", "eps-sweep", "steps-hurt", "start-spread", "dynamic"}
    assert set(FLAGS) == everything
