"""COLA against hand cases, its literal transcription, and its own shortcuts."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import cola_literal
from torch import Tensor
from toys import CLASSES, toy_clf, toy_images, words

import ironclip
from ironclip.core.rng import SampleRNG
from ironclip.core.views import base_of
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.defenses import cola as module
from ironclip.defenses._descriptions import Texts, entropy, text_entropies
from ironclip.defenses.cola import COLA


def unit(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def clf_of(dim: int, k: int, scale: float = 20.0) -> ZeroShot:
    return ZeroShot.build(
        VLM.wrap(lambda x: x.flatten(1)[:, :dim], words(dim), 4, scale=scale), [f"c{i}" for i in range(k)]
    )


def near(z: Tensor, size: float, seed: int) -> Tensor:
    """Unit rows around unit rows, so that weights and plans are not trivial."""
    g = torch.Generator().manual_seed(seed)
    return F.normalize(z + size * torch.randn(z.shape, generator=g, dtype=torch.float64), dim=-1)


# by hand


def test_projection_and_cost_by_hand() -> None:
    clf = clf_of(3, 2)
    rows = torch.eye(3)[:2, None]
    x = torch.tensor([[[0.6, 0.0, 0.8]]])
    cola = COLA(views=1, tau=1)
    texts = cola.prepare(clf, rows)
    torch.testing.assert_close((texts.basis @ texts.basis.T) @ x[0, 0], torch.tensor([0.6, 0.0, 0.0]))
    torch.testing.assert_close(cola.scores(x, texts), -torch.tensor([[0.0, 1.0]]))
    everything = replace_basis(texts, torch.eye(3))
    torch.testing.assert_close(cola.scores(x, everything), -torch.tensor([[0.4, 1.0]]))


def replace_basis(texts: Texts, basis: Tensor) -> Texts:
    return replace(texts, basis=basis, inside=texts.rows @ basis)


@pytest.mark.parametrize(
    ("kind", "want"), [("entropy", (2 / 3, 1 / 3)), ("paper_formula", (1 / 3, 2 / 3)), ("uniform", (0.5, 0.5))]
)
def test_weights_by_hand(kind: str, want: tuple[float, float]) -> None:
    got = COLA(temperature=1)._weights(torch.tensor([0.0, math.log(2)]), kind)
    torch.testing.assert_close(got, torch.tensor(want))


@pytest.mark.parametrize("spread", [0.3, 5.0, 60.0])
def test_incremental_text_entropy_is_brute_force(spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    mean = logits.mean(-1)
    for kind, dtype, atol in (
        (logits, torch.float64, 1e-9),
        (logits.float(), torch.float32, 2e-5 if spread < 50 else 1e-4),
    ):
        got = text_entropies(kind, torch.ones(5, 3, dtype=torch.bool))
        assert got.dtype == dtype
        for i in range(4):
            for y in range(5):
                for m in range(3):
                    want = cola_literal.text_entropy(mean[i].tolist(), y, float(logits[i, y, m]))
                    assert float(got[i, y, m]) == pytest.approx(want, abs=atol)


def test_text_entropy_has_a_finite_gradient_where_one_class_is_certain() -> None:
    leaf = torch.zeros(1, 3, 2)
    leaf[0, 0] = 100.0
    leaf.requires_grad_(True)
    (grad,) = torch.autograd.grad(text_entropies(leaf, torch.ones(3, 2, dtype=torch.bool)).sum(), leaf)
    assert bool(torch.isfinite(grad).all())


def test_entropy_in_nats() -> None:
    torch.testing.assert_close(entropy(torch.zeros(1, 8)), torch.tensor([math.log(8)]))


# against the transcription


@pytest.mark.parametrize(("sign", "kind"), [(-1.0, "entropy"), (1.0, "paper_formula")])
@pytest.mark.parametrize(("n", "m", "rank"), [(5, 6, 9), (1, 6, 12), (4, 1, 4), (5, 6, 3)])
def test_equals_the_literal_transcription(sign: float, kind: str, n: int, m: int, rank: int) -> None:
    clf, centres = clf_of(12, 4), unit(4, 1, 12)
    rows = near(centres.expand(4, m, 12), 0.2, 1)
    views = near(centres[[0, 1, 2, 3, 1], 0][:, None].expand(5, n, 12), 0.4, 2)
    cola = COLA(rank=rank, weights=kind, text_weights=kind, tau=1)
    texts = replace(cola.prepare(clf, rows), scale=20.0)
    got = -cola.scores(views, texts)
    lists = [list(row) for row in rows]
    want = [cola_literal.distances(v, lists, 20.0, rank, sign) for v in views]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    single = COLA(rank=rank, weights=kind, text_weights=kind, tau=1)
    got32 = -single.scores(views.float(), replace(single.prepare(clf, rows.float()), scale=20.0))
    torch.testing.assert_close(got32.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_the_whole_method_from_pixels() -> None:
    clf, x, rng = toy_clf(1), toy_images(3), SampleRNG.rows(3, 2)
    cola = COLA(texts=6)
    from ironclip.core.augment import random_views
    from ironclip.data.prompts import prompt_set

    views = random_views(x, 5, rng.fold("cola"), scale=(0.5, 1.0), plain=True)
    torch.testing.assert_close(views[:, 0], x)
    templates = ["a photo of a {}."]
    templates += [t for t in prompt_set("openai", "imagenet")[0] if t not in templates]
    features = torch.stack([clf.vlm.encode_image(v) for v in views]).double()
    texts = [[t.double() for t in clf.vlm.encode_text([s.format(c) for s in templates[:6]])] for c in CLASSES]
    want = [cola_literal.distances(v, texts, clf.scale, 16) for v in features]
    got = cola.apply(clf)(x, rng)
    torch.testing.assert_close(got.double(), -100 * torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=2e-3)


def test_one_view_one_text_full_rank_is_plain_clip() -> None:
    clf, x = toy_clf(), toy_images(40)
    defended = COLA(views=1, texts=1).apply(clf)
    assert torch.equal(defended(x).argmax(1), clf(x).argmax(1))
    assert not base_of(defended, "randomized")
    assert base_of(COLA().apply(clf), "randomized")


# shortcuts


def test_chunks_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clf, centres = clf_of(12, 7), unit(7, 1, 12)
    rows, views = near(centres.expand(7, 6, 12), 0.2, 1), near(centres[:4].expand(4, 5, 12), 0.4, 2)
    cola = COLA(tau=1)
    texts = cola.prepare(clf, rows)
    want = cola.scores(views, texts)
    monkeypatch.setattr(module, "CELLS", 4 * 5 * 6 * 2)
    torch.testing.assert_close(cola.scores(views, texts), want)
    monkeypatch.undo()
    order = [0, 3, 1, 4, 2]
    torch.testing.assert_close(cola.scores(views[:, order], texts), want, rtol=1e-6, atol=1e-6)
    shuffled = cola.prepare(clf, rows[:, [5, 1, 3, 0, 2, 4]])
    torch.testing.assert_close(cola.scores(views, shuffled), want, rtol=1e-6, atol=1e-6)


def test_pruned_and_full_search_agree() -> None:
    clf, centres = clf_of(12, 10), unit(10, 1, 12)
    rows = near(centres.expand(10, 4, 12), 0.5, 1)
    full, pruned = COLA(solver="exact"), COLA(solver="exact", prune=True)
    texts = full.prepare(clf, rows)
    views = near(centres[torch.arange(100) % 10].expand(100, 3, 12), 0.8, 3)
    calls: list[int] = []
    solve = module.exact
    try:
        module.exact = lambda cost, a, b: (calls.append(cost[..., 0, 0].numel()), solve(cost, a, b))[1]
        slow, fast = full.scores(views, texts), pruned.scores(views, texts)
    finally:
        module.exact = solve
    assert torch.equal(slow.argmax(1), fast.argmax(1))
    best = slow.argmax(1, keepdim=True)
    torch.testing.assert_close(slow.gather(1, best), fast.gather(1, best))
    assert calls[0] == 1000
    assert calls[1] < 800


def test_sinkhorn_is_near_the_exact_cost() -> None:
    clf, centres = clf_of(12, 4), unit(4, 1, 12)
    rows, views = near(centres.expand(4, 6, 12), 0.2, 1), near(centres.expand(4, 5, 12), 0.4, 2)
    texts = COLA().prepare(clf, rows)
    exact = COLA(solver="exact", tau=1).scores(views, texts)
    close = COLA(eps=0.005, iterations=2000, tol=1e-6, tau=1).scores(views, texts)
    assert float((close - exact).abs().max()) < 5e-3


def test_texts_are_encoded_once() -> None:
    clf = toy_clf()
    with clf.vlm.counting() as count:
        COLA(texts=7).apply(clf)
        COLA(texts=7, weights="uniform").surrogate(clf)
        COLA(texts=7).apply(clf.with_vlm(clf.vlm.at_precision("bf16")))
    assert count.texts == 7 * 5
    cola = COLA(texts=7)
    assert cola.prepare(clf) is cola.prepare(clf.with_vlm(clf.vlm.at_precision("bf16")))
    assert COLA(texts=7, rank=3).prepare(clf).basis.shape[1] == 3
    other = toy_clf()
    assert cola.prepare(other) is not cola.prepare(clf), "another text tower, though its weights are equal"


def test_cost_is_one_forward_per_view() -> None:
    clf, x = toy_clf(), toy_images(4)
    defended = COLA(views=3, texts=2).apply(clf)
    with clf.vlm.counting() as count, torch.no_grad():
        defended(x, SampleRNG.rows(4))
    assert (count.forwards, count.backwards, count.texts) == (12, 0, 0)


# gradients


@pytest.mark.parametrize("how", ["exact", "unrolled"])
def test_gradient_matches_finite_differences(how: str) -> None:
    clf = toy_clf()
    clf = replace(clf, vlm=copy.deepcopy(clf.vlm).double(), weights=clf.weights.double())
    rng, x = SampleRNG.rows(2), (0.3 + 0.4 * toy_images(2)).double()
    if how == "exact":
        view = COLA(views=3, texts=4, solver="exact").apply(clf)
    else:
        view = COLA(views=3, texts=4, tol=0.0, iterations=30).surrogate(clf, None, "unrolled")
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(view(leaf, rng)[:, 0].sum(), leaf)
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = 1e-6
    up, down = (view(x + s * h * along, rng)[:, 0].sum() for s in (1, -1))
    assert float((up - down) / (2 * h)) == pytest.approx(float((grad * along).sum()), rel=1e-3)


def test_derivatives_of_the_envelope_and_the_unrolled_loop_point_the_same_way() -> None:
    clf, x, rng = toy_clf(), toy_images(6).requires_grad_(True), SampleRNG.rows(6)
    cola = COLA(texts=10)
    grads = {}
    for name in ("envelope", "unrolled", "partial"):
        view = cola.apply(clf) if name == "envelope" else cola.surrogate(clf, None, name)
        out = view(x, rng)
        (grads[name],) = torch.autograd.grad(F.cross_entropy(out, out.argmax(1), reduction="sum"), x)
    cosine = torch.cosine_similarity(grads["envelope"].flatten(1), grads["unrolled"].flatten(1))
    assert float(cosine.min()) > 0.5
    assert float((grads["partial"] - grads["envelope"]).abs().max()) > 0


# descriptions


def test_descriptions_from_a_file(tmp_path: Path) -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    path = tmp_path / "texts.json"
    held = {c: [f"{c} one", f"{c} two"] for c in (*CLASSES, "zebra")}
    path.write_text(json.dumps(held))
    cola = ironclip.build(f"COLA(descriptions='{path}')")
    rows = torch.stack([clf.vlm.encode_text([*held[c], f"a photo of a {c}."]) for c in CLASSES])
    assert cola.descriptions.startswith(f"{path}#")
    assert ironclip.build(repr(cola)) == cola
    texts = cola.prepare(clf)
    torch.testing.assert_close(texts.rows, rows)
    torch.testing.assert_close(
        cola.apply(clf)(x, rng).argmax(1), cola.scores(features(clf, cola, x, rng), texts).argmax(1)
    )
    path.write_text(json.dumps({**held, "ant": ["another", "text"]}))
    with pytest.raises(ValueError, match=r"has changed: its digest is \w{12}, the spec says \w{12}"):
        ironclip.build(repr(cola))
    with pytest.raises(ValueError, match="has changed"):
        cola.apply(clf)


def features(clf: ZeroShot, cola: COLA, x: Tensor, rng: SampleRNG) -> Tensor:
    from ironclip.core.augment import random_views

    views = random_views(x, cola.views, rng.fold("cola"), scale=(0.5, 1.0), plain=True)
    return clf.vlm.encode_image(views.flatten(0, 1)).unflatten(0, (len(x), cola.views))


def test_ragged_descriptions_only_when_asked_for(tmp_path: Path) -> None:
    clf, x, rng = toy_clf(), toy_images(3), SampleRNG.rows(3)
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({c: [f"{c} {i}" for i in range(1 + j)] for j, c in enumerate(CLASSES)}))
    with pytest.raises(ValueError, match="has 1 to 5 descriptions per class; equalise them or write ragged=True"):
        COLA(descriptions=str(path)).apply(clf)
    cola = COLA(descriptions=str(path), ragged=True)
    texts = cola.prepare(clf)
    assert texts.mask.sum(1).tolist() == [2, 3, 4, 5, 6]
    got = -cola.apply(clf)(x, rng) / 100
    lists = [
        [t.double() for t, there in zip(row, own, strict=True) if there]
        for row, own in zip(texts.rows, texts.mask, strict=True)
    ]
    want = [cola_literal.distances(v, lists, clf.scale, 16) for v in features(clf, cola, x, rng).double()]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=2e-5)
    exact = COLA(descriptions=str(path), ragged=True, solver="exact")
    out = exact.apply(clf)(x.clone().requires_grad_(True), rng)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r'must hold {"class name": \["a text", ...\], ...}, got a list'),
        ("{", "is not JSON"),
        ('{"ant": ["a"]}', "has no descriptions of 4 classes: bee, cat, dog, elk"),
        (json.dumps({c: [] for c in CLASSES}), r"must hold .* got \[\] for 'ant'"),
        (json.dumps(dict.fromkeys(CLASSES, "text")), "must hold .* got 'text' for 'ant'"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        COLA(descriptions=str(path)).apply(toy_clf())
    with pytest.raises(ValueError, match=r"descriptions file '.*nowhere.json' does not exist; write"):
        COLA(descriptions=str(tmp_path / "nowhere.json"))


# refusals and fallbacks


def test_views_outside_the_span_fall_back_to_the_plain_cosine() -> None:
    clf = clf_of(3, 2)
    cola = COLA(views=1, tau=1)
    texts = cola.prepare(clf, torch.eye(3)[:2, None])
    x = torch.tensor([[[0.0, 0.0, 1.0]], [[0.6, 0.0, 0.8]]])
    with pytest.warns(UserWarning, match="1 views lie outside the span of the texts and are not projected"):
        got = cola.scores(x, texts)
    torch.testing.assert_close(got, -torch.tensor([[1.0, 1.0], [0.0, 1.0]]))


def test_rank_is_reduced_with_a_warning() -> None:
    clf = clf_of(12, 4)
    rows = unit(4, 2, 12)
    with pytest.warns(UserWarning, match="COLA keeps 8 directions, not 10: the texts span no more"):
        assert COLA(rank=10).prepare(clf, rows).basis.shape == (12, 8)
    assert COLA().prepare(clf, rows).basis.shape == (12, 8)
    with pytest.raises(ValueError, match=r"rank must be in 1..12 for wrapped, got 13; write rank=12"):
        COLA(rank=13).prepare(clf, rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": 0}, "views must be at least 1, got 0; write 5"),
        ({"texts": 0}, "texts must be at least 1, got 0; write 50"),
        ({"rank": 0}, "rank must be at least 1, got 0; write 256"),
        ({"eps": 0}, "eps must be positive, got 0.0; write 0.1"),
        ({"temperature": -1}, "temperature must be positive, got -1.0; write 0.5"),
        ({"weights": "entropie"}, "unknown weights 'entropie'; did you mean 'entropy'"),
        ({"solver": "simplex"}, "unknown solver 'simplex'"),
        ({"prune": True}, "prune is safe with the exact solver only; write solver=exact or prune=False"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COLA(**fields)


def test_bad_features() -> None:
    clf, cola = clf_of(12, 4), COLA()
    with pytest.raises(ValueError, match="text features must be unit rows"):
        cola.prepare(clf, 2 * unit(4, 2, 12))
    with pytest.raises(ValueError, match="NaN or infinite"):
        cola.prepare(clf, unit(4, 2, 12) * torch.nan)
    with pytest.raises(ValueError, match="image features hold NaN"):
        cola.scores(torch.nan * unit(2, 5, 12), cola.prepare(clf, unit(4, 2, 12)))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        COLA(texts=2).apply(toy_clf())(toy_images(2) + 1, SampleRNG.rows(2))


def test_reference_is_the_paper_as_written() -> None:
    cola = COLA(preset="reference")
    assert (cola.weights, cola.text_weights, cola.temperature, cola.solver) == (
        "paper_formula",
        "paper_formula",
        1.0,
        "exact",
    )
    assert (cola.views, cola.texts, cola.rank) == (5, 50, None)
