"""AdvPT by hand, against the fp64 transcription; its bank: built once, stored, and the last thing to see an image."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clips import byte_tokenizer, small_clip
from fits import image_set
from reference import advpt_literal, apt_literal
from torch import Tensor
from toys import generator, toy_clf, toy_images

from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.zeroshot import ZeroShot
from ironclip.data.imageset import ImageSet
from ironclip.defenses._bank import Bank, ascent, bank_of, build_rows, kl
from ironclip.defenses._learned import CLASSES, VECTORS
from ironclip.defenses._train import BASE, RECIPE
from ironclip.defenses.advpt import BANK, AdvPT
from ironclip.models.hf import wrap_clip
from ironclip.training.feed import Feed
from ironclip.training.finetune import Session, finetune

NAMES = ("cat", "ox", "bee")
LOOP = Loop(steps=3, batch_size=6, lr=0.5, optimizer="sgd", weight_decay=5e-4, warmup=1, hold_out=0)
SMALL: dict[str, Any] = {"tokens": 4, "init_std": 0.2}
FAST: dict[str, Any] = {**SMALL, "eps": ("2/255", "8/255"), "steps": 2}


class Counted:
    """Reads rows of a tensor and says how many were read."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.reads = x, 0

    def __call__(self, rows: Sequence[int]) -> Tensor:
        self.reads += len(rows)
        return self.x[list(rows)]


@pytest.fixture(scope="module")
def problem() -> tuple[ZeroShot, ImageSet]:
    vlm = wrap_clip(small_clip(), byte_tokenizer(), "small").freeze()
    vlm.scale = 5.0
    coarse = torch.rand(3, 3, 4, 4, generator=generator(5)).repeat(4, 1, 1, 1)
    x = 0.8 * F.interpolate(coarse, vlm.image_size) + 0.2 * toy_images(12, size=vlm.image_size, seed=3)
    return ZeroShot.build(vlm, NAMES, ["a b {}"]), image_set(x, torch.arange(12) % 3, list(NAMES))


@pytest.fixture(scope="module")
def bank(problem: Any) -> Bank:
    return AdvPT(**FAST).bank(*problem, seed=2)


def counted(data: ImageSet) -> tuple[ImageSet, Counted]:
    read = Counted(data.read(range(len(data))))
    return replace(data, read=read), read


@pytest.mark.parametrize("start", ["symmetric", "one_sided"])
def test_the_bank_equals_the_literal_transcription(start: str, problem: Any) -> None:
    clf, data = problem
    method = AdvPT(eps="8/255", steps=3, start=start, **SMALL)
    rows = method.bank(clf, data.take(range(3)), seed=4).rows
    tower = copy.deepcopy(clf.vlm.image).double()
    mean, std = (clf.vlm.get_buffer(n)[0].double() for n in ("mean", "std"))

    def encode(x: Tensor) -> Tensor:
        return tower(((x - mean) / std)[None])[0]

    eps, (alpha,) = 8 / 255, method.alphas
    assert alpha == pytest.approx(2.5 * eps / 3)
    for i in range(3):
        x = data.read([i])
        noise = SampleRNG.of(4, [data.ids[i]]).fold("bank").fold(0)
        delta = eps * noise.uniform_like(x, 0.0 if start == "one_sided" else -1.0, 1.0)
        at = advpt_literal.attacked(encode, x[0].double(), delta[0].double(), eps, alpha, 3, start == "one_sided")
        want = torch.stack([encode(x[0].double()), encode(at)]).detach()
        torch.testing.assert_close(rows[i].double(), want, rtol=1e-4, atol=1e-4)
        assert float((want[1] - want[0]).abs().max()) > 1e-2


def test_tuning_equals_the_literal_transcription(problem: Any, bank: Bank) -> None:
    clf, data = problem
    for clean in (True, False):
        method = AdvPT(clean=clean, **FAST)
        got = method.fit(clf, data, loop=LOOP, seed=2, bank=bank)[VECTORS]
        feed, batches = Feed(clf, bank, LOOP, 2), []
        for step in range(LOOP.steps):
            (batch,) = feed.parts(step)
            batches.append((batch.x if clean else batch.x[:, 1:], batch.y.tolist()))
        rows = [clf.vlm.tokenize([f"x {n}", f"x {n}."]).tolist() for n in NAMES]
        parts = [apt_literal.pieces(a, b, 257) for a, b in rows]
        start = method.tuning(clf, 2).extra["context"]
        want = advpt_literal.train(
            lambda v, parts=parts: apt_literal.class_features(clf.vlm.text, parts, v, "end", 24, 257),
            start, batches, clf.scale, rates=[LOOP.rate(s) for s in range(3)], momentum=0.9, decay=5e-4,
        )  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        assert float((want - start).abs().max()) > 1e-2


def test_loss_by_hand_whatever_the_length_of_the_rows() -> None:
    """Two orthonormal texts, the row on the right one, s = ln 3: ln(4/3)."""
    clf = replace(toy_clf(dim=2, classes=("ant", "bee")).with_weights(torch.eye(2)), scale=math.log(3))
    for length in (1.0, 10.0):
        rows = length * torch.tensor([[[1.0, 0.0]]])
        literal = advpt_literal.loss(rows.double(), torch.eye(2).double(), [0], clf.scale)
        assert float(literal) == pytest.approx(0.2876820724, abs=1e-9)
        z = clf.head(F.normalize(rows[:, 0], dim=-1))
        assert float(F.cross_entropy(z, torch.tensor([0]))) == pytest.approx(0.287682, abs=1e-6)


def test_scaling_the_bank_changes_nothing(problem: Any, bank: Bank) -> None:
    clf, data = problem
    method = AdvPT(**FAST)
    one, ten = (method.fit(clf, data, loop=LOOP, bank=replace(bank, rows=s * bank.rows))[VECTORS] for s in (1, 10))
    torch.testing.assert_close(one, ten, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rel_alpha", "start", "end"),
    [("1/8", 1.0, -0.25), ("1/8", 0.25, -1.0), ("1/8", 0.0, -1.0), (None, 1.0, -1.0), (None, -1.0, -1.0)],
)
def test_how_far_a_pixel_gets(rel_alpha: str | None, start: float, end: float) -> None:
    """Ten steps against a constant slope: the published attack cannot cross the ball, ours does from anywhere."""
    method, x, eps = AdvPT(eps="8/255", rel_alpha=rel_alpha), torch.full((1, 3, 4, 4), 0.5), 8 / 255
    (alpha,) = method.alphas
    got = ascent(lambda at: -at.flatten(1).sum(dim=1), x, x + start * eps, eps, alpha, method.steps)
    torch.testing.assert_close(got - x, torch.full_like(x, end * eps), rtol=0, atol=1e-6)
    assert advpt_literal.final_offset(start * eps, eps, alpha, 10) == pytest.approx(end * eps)


def test_presets() -> None:
    theirs = AdvPT(preset="reference")
    assert (theirs.eps, theirs.tokens, theirs.start, theirs.clean) == ((Fraction(8, 255),), 32, "one_sided", False)
    assert theirs.alphas == pytest.approx([1 / 255])
    ours = AdvPT()
    assert ours.eps == (Fraction(1, 255), Fraction(2, 255))
    assert ours.alphas == pytest.approx([2.5 * float(e) / 10 for e in ours.eps])
    assert AdvPT(eps="8/255").eps == (Fraction(8, 255),)
    assert AdvPT(eps=("8/255", "1/255", "8/255")).eps == (Fraction(1, 255), Fraction(8, 255))


def test_the_divergence() -> None:
    """Zero with zero gradient at the clean features, positive elsewhere; of raw features, lengths included."""
    clean = torch.randn(3, 8, generator=generator(0))
    leaf = clean.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(kl(leaf, clean).sum(), leaf)
    assert float(kl(clean, clean).abs().max()) < 1e-6
    assert float(grad.abs().max()) < 1e-6
    assert bool((kl(clean + 0.5 * torch.randn(3, 8, generator=generator(1)), clean) > 0).all())
    assert bool((kl(2 * clean, clean) > 1e-3).all())
    want = advpt_literal.divergence(clean[0].double(), 2 * clean[0].double())
    assert float(kl(2 * clean, clean)[0]) == pytest.approx(float(want), rel=1e-5)


def test_cost_of_the_bank_and_none_after_it(problem: Any) -> None:
    """1 + e (steps + 1) F and e steps B an image; then the tower is not called and no image is opened."""
    clf, data = problem
    data, read = counted(data)
    method, seen = AdvPT(**FAST), dict[int, tuple[int, int]]()
    with clf.vlm.counting() as count:
        made = method.bank(clf, data)
        assert (count.forwards, count.backwards, read.reads) == (12 * (1 + 2 * 3), 12 * 2 * 2, 12)
        at = Session(progress=lambda step, _n, _m: seen.update({step: (count.forwards, read.reads)}))
        method.fit(clf, data, loop=replace(LOOP, hold_out=2, validate_every=1), bank=made, session=at)
        assert seen == dict.fromkeys((1, 2, 3), (12 * 7, 12))
        assert (count.forwards, count.backwards, read.reads) == (12 * 7, 12 * 4, 12)
    each = method.prompts(clf).shared.packs.ends.numel()
    with clf.vlm.counting() as count:
        method.fit(clf, data, loop=LOOP, bank=made)
    assert (count.forwards, count.texts) == (0, LOOP.steps * each)


def test_a_stored_bank_is_taken_up_and_a_stale_one_refused(problem: Any, tmp_path: Path) -> None:
    clf, data = problem
    data, read = counted(data)
    method, session = AdvPT(**FAST), Session(tmp_path)
    state = method.fit(clf, data, loop=LOOP, session=session)
    assert read.reads == 12
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("bank")] == [BANK]
    stored = method.bank(clf, data, session=session)
    assert read.reads == 12
    assert torch.equal(stored.rows, method.bank(clf, data).rows)
    read.reads = 0
    again = AdvPT(**{**FAST, "tokens": 3}).bank(clf, data, session=session)
    assert torch.equal(again.rows, stored.rows), "the bank does not hang on the prompts"
    stale = {
        r"attack\.eps: \['2/255', '8/255'\] there, \['4/255'\] now": (replace(method, eps="4/255"), clf, data, 0),
        r"attack\.start: symmetric there, one_sided now": (replace(method, start="one_sided"), clf, data, 0),
        "seed: 0 there, 1 now": (method, clf, data, 1),
        r"data\.images: 12 there, 11 now": (method, clf, data.take(range(11)), 0),
        r"preprocessing\.recipe: none there, clip now": (method, clf, replace(data, recipe="clip"), 0),
    }
    other = wrap_clip(small_clip(seed=1), byte_tokenizer(), "other").freeze()
    stale[r"model\.name: small there, other now"] = (method, ZeroShot.build(other, NAMES), data, 0)
    for message, (changed, model, images, seed) in stale.items():
        with pytest.raises(ValueError, match=f"was built otherwise: .*{message}"):
            changed.bank(model, images, seed=seed, session=session)
    assert read.reads == 0
    changed = replace(method, eps="4/255")
    assert changed.bank(clf, data, session=Session(tmp_path, resume=False)).rows.shape[1] == 2
    (tmp_path / BANK).write_bytes(b"not a bank")
    with pytest.raises(ValueError, match="is no bank of features"):
        method.bank(clf, data, session=session)
    assert torch.equal(method.fit(clf, data, loop=LOOP)[VECTORS], state[VECTORS])


def test_stored_features_are_those_of_images_in_ball_and_box(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clf, data = problem
    seen: list[Tensor] = []
    encode = clf.vlm.encode_image

    def watch(x: Tensor, normalize: bool = True) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append(x)
        return encode(x, normalize)

    monkeypatch.setattr(clf.vlm, "encode_image", watch)
    AdvPT(eps="8/255", steps=2, start="one_sided").bank(clf, data)
    clean, last = seen
    assert float((last - clean).abs().max()) <= 8 / 255 + 1e-6
    assert 0 <= float(last.min()) <= float(last.max()) <= 1
    monkeypatch.undo()
    nothing = AdvPT(eps=0).bank(clf, data).rows
    with torch.no_grad():
        torch.testing.assert_close(nothing[:, 1], clf.vlm.encode_image(clean, normalize=False))
    assert torch.equal(nothing[:, 0], nothing[:, 1])


def test_the_bank_does_not_hang_on_batches(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clf, data = problem
    whole = build_rows(clf, data, [4 / 255], 2, [4 / 255], "symmetric", kl, 0)
    monkeypatch.setattr("ironclip.defenses._bank.TOGETHER", 5)
    torch.testing.assert_close(
        build_rows(clf, data, [4 / 255], 2, [4 / 255], "symmetric", kl, 0), whole, rtol=1e-3, atol=1e-3
    )


def test_the_adversarial_switch_changes_the_data(problem: Any) -> None:
    """Guards against training on clean features under another name, as the published head does."""
    clf, data = problem
    first = {}
    for name, method in (("on", AdvPT(clean=False, **FAST)), ("off", AdvPT(eps=0, clean=False, **SMALL))):
        losses: list[float] = []
        method.fit(
            clf, data, loop=LOOP, session=Session(progress=lambda _s, _n, m, kept=losses: kept.append(m["loss"]))
        )
        first[name] = losses[0]
    assert abs(first["on"] - first["off"]) > 1e-3


def test_labels_stay_with_their_rows_over_epochs(problem: Any, bank: Bank) -> None:
    clf, _ = problem
    owner = {tuple(row[0].tolist()): label for row, label in zip(bank.rows, bank.labels, strict=True)}
    assert len(owner) == 12
    feed = Feed(clf, bank, LOOP, 0)
    orders = []
    for step in range(8):  # four epochs
        (batch,) = feed.parts(step)
        orders.append(batch.places)
        assert [owner[tuple(row[0].tolist())] for row in batch.x] == batch.y.tolist()
    assert orders[0] != orders[2]


def test_only_the_vectors_are_learned_and_the_seed_decides(problem: Any, bank: Bank) -> None:
    clf, data = problem
    before = {k: v.clone() for k, v in clf.vlm.state_dict().items()}
    rows = bank.rows.clone()
    clf.vlm.requires_grad_(True)
    try:
        one, again, other = (AdvPT(**FAST).fit(clf, data, loop=LOOP, seed=s) for s in (0, 0, 1))
        AdvPT(**FAST).fit(clf, data, loop=LOOP, bank=bank)
        assert all(p.grad is None and p.requires_grad for p in clf.vlm.parameters())
    finally:
        clf.vlm.freeze()
    assert set(one) == {VECTORS, CLASSES, BASE, RECIPE}
    assert torch.equal(one[VECTORS], again[VECTORS])
    assert not torch.equal(one[VECTORS], other[VECTORS])
    assert torch.equal(bank.rows, rows)
    assert all(torch.equal(v, before[k]) for k, v in clf.vlm.state_dict().items())
    fitted = AdvPT(**FAST).apply(clf, one)
    assert fitted.vlm is clf.vlm
    assert not torch.equal(fitted.weights, clf.weights)


def test_pseudo_labels_come_from_the_bank(problem: Any, bank: Bank) -> None:
    clf, data = problem
    means = F.normalize(bank.rows[:, 0], dim=-1).view(4, 3, -1).mean(dim=0)
    clf = clf.with_weights(means - means.mean(dim=0))
    sure = clf.head(F.normalize(bank.rows[:, 0], dim=-1)).softmax(dim=1).max(dim=1)
    least = round(float(sure.values.median()), 3)
    kept = (sure.values >= least).nonzero().flatten().tolist()
    assert len(kept) < 12
    method = AdvPT(labels="pseudo", confidence=least, **FAST)
    other = replace(data, labels=[(y + 1) % 3 for y in data.labels])
    with clf.vlm.counting() as count:
        states = [method.fit(clf, d, loop=LOOP, bank=b) for d, b in ((data, bank), (other, bank))]
    assert count.forwards == 0
    assert torch.equal(states[0][VECTORS], states[1][VECTORS])
    by_hand = bank_of(bank.rows[kept], replace(data.take(kept), labels=sure.indices[kept].tolist()), bank.facts)
    want = finetune(method.tuning(clf), by_hand, loop=LOOP)
    assert torch.equal(states[0][VECTORS], want[VECTORS])
    with pytest.raises(ValueError, match=r"labels=pseudo keeps 0 of 12 images of toys at confidence 0.99"):
        AdvPT(labels="pseudo", confidence=0.99, **FAST).fit(clf, data, loop=LOOP, bank=bank)


def test_bad_banks_are_refused(problem: Any, bank: Bank) -> None:
    clf, data = problem
    with pytest.raises(ValueError, match="12 labels and 12 ids"):
        replace(bank, rows=bank.rows[:11])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 0\.\.3"):
        replace(bank, labels=[3, *bank.labels[1:]])
    for bad in (torch.nan, 0.0, torch.inf):
        rows = bank.rows.clone()
        rows[4, 1] = bad
        with pytest.raises(ValueError, match="the bank holds NaN, infinite or all-zero features; build it again"):
            replace(bank, rows=rows)
    narrow = replace(bank, rows=bank.rows[..., :20])
    with pytest.raises(
        ValueError, match="the bank has features of 20 dimensions, small has 24; it was made for another"
    ):
        AdvPT(**FAST).fit(clf, data, loop=LOOP, bank=narrow)
    with pytest.raises(ValueError, match="toys is empty; training needs images"):
        Bank(bank.rows[:0], [], [], list(NAMES), "toys", {})


def test_bad_data_is_refused(problem: Any) -> None:
    clf, data = problem
    bright = image_set(255 * data.read(range(12)), torch.arange(12) % 3, list(NAMES))
    with pytest.raises(ValueError, match="divide by 255"):
        AdvPT(**FAST).fit(clf, bright, loop=LOOP)
    with pytest.raises(ValueError, match="data must be an open data set"):
        AdvPT(**FAST).fit(clf, torch.zeros(1, 3, 32, 32))
    data, read = counted(data)
    with pytest.raises(
        ValueError, match="22 context tokens and the name 'cat' make 29 tokens, small takes 24; write t"
    ):
        AdvPT(**{**FAST, "tokens": 22}).fit(clf, data, loop=LOOP)
    elsewhere = ZeroShot.build(clf.vlm, ["hen", "fly"])
    with pytest.raises(ValueError, match="the classifier was built for 2 classes that are not the 3 of toys"):
        AdvPT(**FAST).fit(elsewhere, data, loop=LOOP)
    assert read.reads == 0, "refused before any work"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 8}, r"eps must be in \(0, 1\], got 8; write 8/255"),
        ({"eps": ("1/255", "-1/255")}, "eps must not be negative"),
        ({"eps": ()}, "eps names no budget; write eps=8/255"),
        ({"rel_alpha": 0}, "rel_alpha must be positive, got 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0; eps=0 is the control without attack"),
        ({"start": "zero"}, "unknown start 'zero'"),
        ({"objective": "ce"}, "unknown objective 'ce'"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvPT(**fields)
