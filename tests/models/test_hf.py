"""`hf:` against the library's own feature functions, on small random models."""

from __future__ import annotations

import json
from pathlib import Path

import clips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import ironclip
from ironclip import VLM
from ironclip.core.hooks import deep_prompts
from ironclip.models.hf import wrap_clip, wrap_siglip

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def vlm() -> VLM:
    return wrap_clip(clips.small_clip(), clips.byte_tokenizer(), "small").freeze()


@pytest.fixture
def siglip() -> VLM:
    return wrap_siglip(clips.small_siglip(), clips.byte_tokenizer(), "small-siglip").freeze()


@pytest.mark.parametrize("eos", [2, clips.EOS])
def test_features_are_the_librarys_own(eos: int) -> None:
    model, tokenizer = clips.small_clip(eos=eos), clips.byte_tokenizer()
    vlm = wrap_clip(model, tokenizer, "small", MEAN, STD)
    x = clips.images()
    full = tokenizer(clips.TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        want_image = model.get_image_features(pixel_values=normalised).pooler_output
        want_text = model.get_text_features(**full).pooler_output
        assert torch.allclose(vlm.encode_image(x, normalize=False), want_image, atol=1e-5)
        assert torch.allclose(vlm.encode_text(clips.TEXTS, normalize=False), want_text, atol=1e-5)
    assert vlm.scale == pytest.approx(50)
    assert (vlm.image_size, vlm.dim, vlm.causal) == (clips.SIZE, 24, True)
    assert torch.equal(vlm.eot(full["input_ids"]), torch.tensor([6, 13, 2]))


def test_truncation_at_the_end_of_text_is_exact(vlm: VLM) -> None:
    ids = clips.byte_tokenizer()(clips.TEXTS, padding="max_length", return_tensors="pt")["input_ids"]
    lengths = []
    handle = vlm.text.register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        short = vlm.encode_tokens(ids)
        handle.remove()
        full = F.normalize(vlm.text(ids), dim=-1)
    assert ids.shape[1] == clips.CONTEXT
    assert lengths == [14]
    assert torch.allclose(short, full, atol=1e-6)


def test_long_texts_are_cut_with_a_warning_and_still_end(vlm: VLM) -> None:
    fits, long = "y" * (clips.CONTEXT - 2), "z" * 40
    with pytest.warns(UserWarning, match=f"1 texts are longer than {clips.CONTEXT} tokens and were cut: 'zzz"):
        ids = vlm.tokenize(["a", fits, long])
    assert ids.shape == (3, clips.CONTEXT)
    assert ids[0].tolist()[2:] == [clips.EOS] * (clips.CONTEXT - 2)
    assert ids[1:, -1].tolist() == [clips.EOS] * 2


@pytest.mark.parametrize("kind", ["vlm", "siglip"])
def test_soft_prompts_start_at_the_token_embeddings(kind: str, request: pytest.FixtureRequest) -> None:
    model: VLM = request.getfixturevalue(kind)
    ids = model.tokenize(clips.TEXTS)
    with torch.no_grad():
        assert torch.equal(model.encode_tokens(ids, embeds=model.embed_tokens(ids)), model.encode_tokens(ids))
    moved = model.embed_tokens(ids).detach().requires_grad_()
    model.encode_tokens(ids, embeds=moved)[:, 0].sum().backward()
    assert float(moved.grad.abs().sum()) > 0
    assert moved.shape[-1] == 32
    if kind == "vlm":  # nothing after the end of a text matters
        assert bool((moved.grad[2, 3:] == 0).all())


@pytest.mark.parametrize("kind", ["vlm", "siglip"])
def test_deep_prompts_act_and_leave_no_trace(kind: str, request: pytest.FixtureRequest) -> None:
    model: VLM = request.getfixturevalue(kind)
    x, blocks = clips.images(), model.vision_blocks
    assert len(blocks) == 3
    prompts = torch.randn(2, 5, model.parts.vision_width, generator=clips.generator(3)).requires_grad_()
    with torch.no_grad():
        before, patches = model.encode_image(x), model.patch_tokens(x)
        with deep_prompts(blocks, prompts):
            inside = model.patch_tokens(x)
    with deep_prompts(blocks, prompts):
        prompted = model.encode_image(x)
    prompted[:, 0].sum().backward()
    assert inside.shape == patches.shape
    assert not torch.allclose(prompted, before, atol=1e-3)
    assert bool((prompts.grad.abs().sum(dim=(1, 2)) > 0).all())
    with torch.no_grad():
        assert torch.equal(model.encode_image(x), before)
        with deep_prompts(blocks, prompts.detach().unsqueeze(1).expand(-1, 2, -1, -1)):
            assert torch.allclose(model.encode_image(x), prompted, atol=1e-6)
        with deep_prompts(blocks, prompts.detach()[:0]):
            assert torch.equal(model.encode_image(x), before)


def test_patch_tokens_are_projected_like_the_class_token(vlm: VLM) -> None:
    x = clips.images()
    tokens = vlm.patch_tokens(x)
    assert tokens.shape == (2, 16, 24)
    assert vlm.parts.patch_grid == (4, 4)
    tower = vlm.image.vision_model
    hidden = tower(pixel_values=vlm.normalize_pixels(x)).last_hidden_state
    one = tower.post_layernorm(hidden[1, 1 + 4 * 2 + 3]) @ vlm.image.visual_projection.weight.T
    assert torch.allclose(tokens[1, 4 * 2 + 3], one, atol=1e-5)
    with vlm.counting() as count:
        every = vlm.image_tokens(x)
    assert count.forwards == 2
    assert torch.equal(every[:, 1:], tokens)
    assert torch.allclose(every[:, 0], vlm.encode_image(x, normalize=False), atol=1e-6)


def test_siglip_features_are_the_librarys_own(siglip: VLM) -> None:
    model, x = clips.small_siglip(), clips.images()
    full = clips.byte_tokenizer()(clips.TEXTS, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want_image = model.get_image_features(pixel_values=x * 2 - 1).pooler_output
        want_text = model.get_text_features(input_ids=full).pooler_output
        assert torch.allclose(siglip.encode_image(x, normalize=False), want_image, atol=1e-5)
        assert torch.allclose(siglip.encode_text(clips.TEXTS, normalize=False), want_text, atol=1e-5)
        probability = model(input_ids=full, pixel_values=x * 2 - 1).logits_per_image
        logits = siglip.scale * siglip.encode_image(x) @ siglip.encode_text(clips.TEXTS).T + siglip.facts["logit_bias"]
        assert torch.allclose(logits, probability, atol=1e-3)
    assert siglip.patch_tokens(x).shape == (2, 16, 48)
    assert not siglip.causal


def test_a_siglip_patch_token_is_the_pooling_of_that_patch_alone(siglip: VLM) -> None:
    tower, x = siglip.image.vision_model, clips.images()
    hidden = tower(pixel_values=siglip.normalize_pixels(x)).last_hidden_state
    assert torch.allclose(siglip.patch_tokens(x)[0, 5], tower.head(hidden[:1, 5:6])[0], atol=1e-5)
    assert torch.allclose(siglip.image_tokens(x)[:, 0], siglip.encode_image(x, normalize=False), atol=1e-6)


def test_state_copies_and_precision_leave_the_original_alone(vlm: VLM) -> None:
    x, key = clips.images(), "image.visual_projection.weight"
    before, kept = vlm.weights_hash, vlm.state_dict()[key].clone()
    with torch.no_grad():
        features = vlm.encode_image(x)
        other = vlm.with_state({key: -kept})
        assert torch.allclose(other.encode_image(x), -features, atol=1e-6)
        low = vlm.at_precision("bf16")
        assert low.encode_image(x).dtype == low.patch_tokens(x).dtype == torch.float32
        assert float((low.encode_image(x) * features).sum(dim=1).min()) > 0.99
        assert torch.equal(vlm.encode_image(x), features)
    assert other.weights_hash != before == vlm.weights_hash == low.weights_hash


def test_counting_sees_images_gradients_and_texts(vlm: VLM) -> None:
    x = clips.images(3).requires_grad_()
    with vlm.counting() as count:
        vlm.encode_image(x).sum().backward()
        vlm.encode_image(x.detach())
        vlm.encode_text(["a", "b", "a"])
    vlm.encode_image(x.detach())
    assert (count.forwards, count.backwards, count.texts) == (6, 3, 2)


def test_second_derivatives_exist_under_the_math_kernel(vlm: VLM) -> None:
    x = clips.images(1).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (g,) = torch.autograd.grad(vlm.encode_image(x)[:, 0].sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
    assert float(h.abs().sum()) > 0


def test_a_folder_gives_weights_pixels_and_tokenizer(tmp_path: Path, vlm: VLM) -> None:
    pixels = {"image_mean": MEAN, "image_std": STD, "crop_size": {"height": 32, "width": 32}, "rescale_factor": 1 / 255}
    folder = clips.save(clips.small_clip(), tmp_path / "model", pixels)
    loaded = ironclip.load(f"hf:{folder}")
    assert loaded.get_buffer("mean").flatten().tolist() == pytest.approx(MEAN)
    assert loaded.get_buffer("std").flatten().tolist() == pytest.approx(STD)
    with torch.no_grad():
        assert torch.allclose(loaded.encode_text(clips.TEXTS), vlm.encode_text(clips.TEXTS), atol=1e-6)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert ironclip.load(f"hf:{folder}").weights_hash == loaded.weights_hash
    plain = ironclip.load(f"hf:{clips.save(clips.small_siglip(), tmp_path / 'siglip')}")
    assert plain.get_buffer("mean").flatten().tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="preprocessing gives 64 pixels, but the model takes 32"):
        ironclip.load(f"hf:{clips.save(clips.small_clip(), tmp_path / 'big', pixels | {'crop_size': 64})}")
    with pytest.raises(ValueError, match=r"rescales bytes by 1\.0, expected 1/255"):
        ironclip.load(f"hf:{clips.save(clips.small_clip(), tmp_path / 'raw', pixels | {'rescale_factor': 1.0})}")


def test_openai_weights_need_quick_gelu(tmp_path: Path) -> None:
    folder = clips.save(clips.small_clip(act="gelu"), tmp_path / "openai" / "clip")
    with pytest.raises(
        ValueError, match=r"OpenAI weights need the activation quick_gelu, got gelu; set \"hidden_act\""
    ):
        ironclip.load(f"hf:{folder}")
    clips.save(clips.small_clip(), folder)
    assert ironclip.load(f"hf:{folder}").facts["activation"] == "quick_gelu"


def test_incomplete_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    folder = clips.save(clips.small_clip(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack 1 tensors, the first is 'visual_projection.weight'"):
        ironclip.load(f"hf:{folder}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="is a model of type 'bert'; expected clip or siglip"):
        ironclip.load(f"hf:{folder}")
    damaged = clips.save(clips.small_clip(), tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"the weight file is damaged \(.*fetch it again"):
        ironclip.load(f"hf:{damaged.parent}")
    tokenizer = clips.byte_tokenizer()
    with pytest.raises(ValueError, match="the tokenizer belongs to another model"):
        wrap_clip(clips.small_clip(eos=7), tokenizer, "other")


def test_what_was_tried_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hf: needs a name or a folder; write hf:openai/clip-vit-base-patch32"):
        ironclip.load("hf:")
    hint = r"tried it as a folder, then the local hub cache, then the hub \(.*write hf:/path/to/folder"
    for name in ("nobody/no-such-model", "nobody/no-such-model@v1", str(tmp_path / "missing"), "./nowhere/at/all"):
        with pytest.raises(FileNotFoundError, match=hint):
            ironclip.load(f"hf:{name}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=r"config\.json"):
        ironclip.load(f"hf:{empty}")


def test_three_lines_from_a_raw_module_to_a_defended_classifier() -> None:
    model, tokenizer = clips.small_clip(), clips.byte_tokenizer()
    image = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 24)).eval()

    def text(texts: list[str]) -> torch.Tensor:
        return model.get_text_features(
            **tokenizer(list(texts), padding="max_length", return_tensors="pt")
        ).pooler_output

    vlm = VLM.wrap(image, text, 32, mean=MEAN, std=STD)
    clf = ironclip.ZeroShot.build(vlm, ["cat", "dog"])
    defended = ironclip.build("TTC()").apply(clf)
    assert defended(clips.images(), rng=ironclip.SampleRNG.of(0, ["a", "b"])).shape == (2, 2)
