"""`open_clip:` against the library's own functions and against `hf:` with the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import ironclip
from ironclip import VLM
from ironclip.core.hooks import deep_prompts
from ironclip.models.hf import wrap_clip
from ironclip.models.open_clip import activations, wrap_open_clip

pytestmark = pytest.mark.usefixtures("need_open_clip")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def build(act: str = "quick_gelu") -> Any:
    """The weights of ``clips.small_clip(act)`` in an open_clip model."""
    from open_clip.model import CLIP

    model = CLIP(**clips.open_clip_config(act))
    model.load_state_dict(clips.to_open_clip(clips.small_clip(act)))
    return model.eval()


def ids_of(*texts: str) -> torch.Tensor:
    return clips.byte_tokenizer()(list(texts), padding="max_length", return_tensors="pt")["input_ids"]


@pytest.fixture
def vlm() -> VLM:
    return wrap_open_clip(build(), None, "small").freeze()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_backends_agree_on_the_same_weights(act: str) -> None:
    ours = wrap_open_clip(build(act), None, "small").freeze()
    theirs = wrap_clip(clips.small_clip(act), clips.byte_tokenizer(), "small").freeze()
    x, ids = clips.images(), ids_of(*clips.TEXTS)
    with torch.no_grad():
        for a, b in (
            (ours.encode_image(x, normalize=False), theirs.encode_image(x, normalize=False)),
            (ours.encode_tokens(ids, normalize=False), theirs.encode_tokens(ids, normalize=False)),
            (ours.patch_tokens(x), theirs.patch_tokens(x)),
            (ours.image_tokens(x)[:, 0], ours.encode_image(x, normalize=False)),
        ):
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=1e-5)
    assert ours.scale == pytest.approx(theirs.scale)
    assert (ours.image_size, ours.dim, ours.causal) == (theirs.image_size, theirs.dim, theirs.causal)
    assert ours.parts.vision_width == theirs.parts.vision_width == 48
    assert ours.parts.patch_grid == theirs.parts.patch_grid == (4, 4)
    assert ours.facts["activation"] == theirs.facts["activation"] == act


def test_the_activation_matters() -> None:
    quick, plain = build("quick_gelu"), build("gelu")
    plain.load_state_dict(quick.state_dict())
    with torch.no_grad():
        assert not torch.allclose(quick.encode_image(clips.images()), plain.encode_image(clips.images()), atol=1e-3)
    assert activations(quick) == ["quick_gelu"] * 2
    with pytest.raises(ValueError, match=r"RN/openai: OpenAI weights need the activation quick_gelu, got gelu; use"):
        wrap_open_clip(plain, None, "open_clip:RN/openai")


def test_deep_prompts_equal_in_both_backends_and_leave_no_trace(vlm: VLM) -> None:
    theirs = wrap_clip(clips.small_clip(), clips.byte_tokenizer(), "small").freeze()
    x = clips.images()
    before = vlm.encode_image(x)
    for shape in ((2, 5, 48), (3, 2, 4, 48)):
        prompts = torch.randn(shape, generator=clips.generator(3)).requires_grad_()
        with deep_prompts(vlm.vision_blocks, prompts):
            a = vlm.encode_image(x)
        with deep_prompts(theirs.vision_blocks, prompts):
            b = theirs.encode_image(x)
        assert torch.allclose(a, b, atol=1e-5)
        assert not torch.allclose(a, before, atol=1e-3)
        ga, gb = (torch.autograd.grad(f[:, 0].sum(), prompts)[0] for f in (a, b))
        assert torch.allclose(ga, gb, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(vlm.encode_image(x), before, atol=1e-6)


def test_text_cut_at_its_end_equals_the_library_on_full_contexts(vlm: VLM) -> None:
    model, ids = build(), ids_of(*clips.TEXTS)
    lengths = []
    handle = vlm.text.register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        assert torch.allclose(vlm.encode_tokens(ids, normalize=False), model.encode_text(ids), atol=1e-5)
        handle.remove()
        assert torch.allclose(vlm.text(ids), model.encode_text(ids), atol=1e-5)
    assert (ids.shape[1], lengths) == (clips.CONTEXT, [14])


def test_soft_prompts_start_at_the_token_embeddings(vlm: VLM) -> None:
    ids = ids_of(*clips.TEXTS)
    with torch.no_grad():
        assert torch.equal(vlm.encode_tokens(ids, embeds=vlm.embed_tokens(ids)), vlm.encode_tokens(ids))


def test_state_copies_precision_and_counts(vlm: VLM) -> None:
    x = clips.images()
    before, proj = vlm.weights_hash, vlm.state_dict()["image.visual.proj"].clone()
    with torch.no_grad(), vlm.counting() as count:
        features = vlm.encode_image(x)
        other = vlm.with_state({"image.visual.proj": -proj})
        assert torch.allclose(other.encode_image(x), -features, atol=1e-6)
        low = vlm.at_precision("bf16")
        assert float((low.encode_image(x) * features).sum(dim=1).min()) > 0.99
        assert torch.equal(vlm.encode_image(x), features)
    assert (count.forwards, count.backwards) == (8, 0)
    assert other.weights_hash != before == vlm.weights_hash


def test_second_derivatives_exist_under_the_math_kernel(vlm: VLM) -> None:
    x = clips.images(1).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (g,) = torch.autograd.grad(vlm.encode_image(x)[:, 0].sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
    assert float(h.abs().sum()) > 0


def test_a_tower_that_looks_both_ways_gets_full_contexts() -> None:
    from open_clip.model import CustomTextCLIP

    config = clips.open_clip_config("gelu")
    config["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last"}
    model = clips.randomised(CustomTextCLIP(**config, init_logit_bias=-10.0), seed=2)
    vlm, ids = wrap_open_clip(model, None, "sigmoid"), ids_of(*clips.TEXTS)
    assert not vlm.causal
    with torch.no_grad():
        assert torch.allclose(vlm.encode_tokens(ids, normalize=False), model.encode_text(ids), atol=1e-6)
        embeds = vlm.embed_tokens(ids)
        assert torch.equal(vlm.encode_tokens(ids, embeds=embeds), vlm.encode_tokens(ids))
    assert "logit_bias" in vlm.facts


def test_a_convolutional_tower_has_neither_blocks_nor_patches() -> None:
    from open_clip.model import CLIP

    config = clips.open_clip_config("quick_gelu")
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    vlm = wrap_open_clip(CLIP(**config), None, "resnet")
    assert vlm.encode_image(clips.images()).shape == (2, 24)
    with pytest.raises(ValueError, match="resnet has no transformer image tower"):
        _ = vlm.vision_blocks
    with pytest.raises(ValueError, match="resnet exposes no patch tokens"):
        vlm.patch_tokens(clips.images())


def folder_of(place: Path, act: str = "quick_gelu", drop: str = "") -> Path:
    place.mkdir(parents=True)
    config = clips.open_clip_config(act)
    config["text_cfg"]["hf_tokenizer_name"] = "."
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    weights = {k: v.contiguous() for k, v in clips.to_open_clip(clips.small_clip(act)).items() if k != drop}
    save_file(weights, place / "open_clip_model.safetensors")
    clips.byte_tokenizer().save_pretrained(place)
    return place


def test_a_folder_gives_weights_pixels_and_tokenizer(tmp_path: Path, vlm: VLM) -> None:
    loaded = ironclip.load(f"open_clip:{folder_of(tmp_path / 'model')}")
    assert loaded.get_buffer("mean").flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    with torch.no_grad():
        assert torch.allclose(loaded.encode_text(clips.TEXTS), vlm.encode_tokens(ids_of(*clips.TEXTS)), atol=1e-6)
        with pytest.warns(UserWarning, match=f"1 texts are longer than {clips.CONTEXT} tokens and were cut: 'zzz"):
            assert loaded.encode_text(["a", "y" * (clips.CONTEXT - 2), "z" * 40]).shape == (3, 24)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not fit the model's configuration .*visual\.proj"):
        ironclip.load(f"open_clip:{folder_of(tmp_path / 'short', drop='visual.proj')}")
    with pytest.raises(ValueError, match="OpenAI weights need the activation quick_gelu"):
        ironclip.load(f"open_clip:{folder_of(tmp_path / 'openai' / 'x', act='gelu')}")
    damaged = folder_of(tmp_path / "damaged") / "open_clip_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"the weight file is damaged \(.*fetch it again"):
        ironclip.load(f"open_clip:{damaged.parent}")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json \(missing\) and open_clip_model.safetensors"):
        ironclip.load(f"open_clip:{bare}")


def test_names_and_tags_are_checked_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"unknown open_clip model 'ViT-B-33'; nearest: ViT-B-32"):
        ironclip.load("open_clip:ViT-B-33/openai")
    with pytest.raises(ValueError, match=r"unknown open_clip model ''; .*Write open_clip:ViT-B-32/openai"):
        ironclip.load("open_clip:")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32 names no weights; write open_clip:ViT-B-32/TAG with one"):
        ironclip.load("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match=r"unknown tag 'opanai' of ViT-B-32; did you mean 'openai'\? write"):
        ironclip.load("open_clip:ViT-B-32/opanai")


def test_what_was_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hint = "tried the local hub cache, then the hub .*write open_clip:/path/to/folder"
    with pytest.raises(FileNotFoundError, match=hint):
        ironclip.load("open_clip:hf-hub:nobody/no-such-model")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'type pip install "ironclip\[open-clip\]"'):
        ironclip.load("open_clip:ViT-B-32/openai")


def test_quick_gelu_follows_the_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    asked: dict[str, bool] = {}

    def create(source: str, tag: str, **options: Any) -> Any:
        asked[f"{source}/{tag}"] = options["force_quick_gelu"]
        assert options["weights_only"]
        assert options["require_pretrained"]
        return build("gelu")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _name: None)
    for tag in ("openai", "metaclip_400m"):
        with pytest.raises(ValueError, match=f"the tag {tag} needs quick_gelu, got gelu"):
            ironclip.load(f"open_clip:ViT-B-32/{tag}")
    assert ironclip.load("open_clip:ViT-B-32/laion2b_e16").facts["activation"] == "gelu"
    assert asked == {"ViT-B-32/openai": True, "ViT-B-32/metaclip_400m": True, "ViT-B-32/laion2b_e16": False}
