"""EfficientNet-Lite0: MobileNet-style inverted residuals without squeeze-and-excitation, ReLU6 throughout.

Tan and Le 2019 (arXiv 1905.11946), the `lite` variant for phones. Batch norm is folded into the convolutions when the
weights are read: exact in eval mode, and one pass over memory less per layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# expansion, kernel, stride of the first block, channels out, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, WIDTH, BN_EPS = 32, 1280, 1e-3


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: an odd pixel of padding goes right and down."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride > 1:
            total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
            (top, left) = (t // 2 for t in total)
            x = F.pad(x, (left, total[1] - left, top, total[0] - top))
        return super().forward(x)


class Block(nn.Module):
    """1x1 expansion (none for ratio 1), depthwise convolution, linear 1x1 projection, shortcut where shapes agree."""

    def __init__(self, c_in: int, c_out: int, ratio: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = c_in * ratio
        self.expand = SameConv(c_in, wide, 1) if ratio > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, c_out, 1)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(out)))
        return out + x if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """(b, 3, h, w) normalised pixels to the spatial map (b, 1280, ceil(h/32), ceil(w/32)) before pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, stride=2)
        blocks, channels = [], STEM
        for ratio, kernel, stride, out, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out, ratio, kernel, stride if i == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.top = SameConv(channels, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.top(self.blocks(F.relu6(self.stem(x)))))


def fold_batch_norm(weight: Tensor, norm: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``weight`` followed by the eval-mode batch norm ``norm``.

    ``norm`` has weight, bias, running_mean and running_var. Computed in float64.
    """
    gain = norm["weight"].double() / (norm["running_var"].double() + BN_EPS).sqrt()
    bias = norm["bias"].double() - norm["running_mean"].double() * gain
    return (weight.double() * gain.view(-1, 1, 1, 1)).float(), bias.float()


def folded_weights(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint as the state of ``EfficientNetLite0``; the classifier ``_fc`` is not part of it.

    Raises ValueError for a checkpoint without the tensors of this architecture.
    """
    layers = {"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1")}
    ratios = [ratio for ratio, _, _, _, repeats in STAGES for _ in range(repeats)]
    for i, ratio in enumerate(ratios):
        theirs, ours = f"_blocks.{i}.", f"blocks.{i}."
        if ratio > 1:
            layers[ours + "expand"] = (theirs + "_expand_conv", theirs + "_bn0")
        layers[ours + "depthwise"] = (theirs + "_depthwise_conv", theirs + "_bn1")
        layers[ours + "project"] = (theirs + "_project_conv", theirs + "_bn2")
    state: dict[str, Tensor] = {}
    for ours, (conv, norm) in layers.items():
        parts = {k: f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
        missing = [k for k in (f"{conv}.weight", *parts.values()) if k not in raw]
        if missing:
            raise ValueError(f"not an EfficientNet-Lite0 checkpoint: it has no tensor {missing[0]!r}")
        weight, bias = fold_batch_norm(raw[f"{conv}.weight"], {k: raw[name] for k, name in parts.items()})
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weight, bias
    return state


def load_efficientnet(raw: Mapping[str, Tensor]) -> EfficientNetLite0:
    """The backbone with the checkpoint's weights, batch norm folded in, in eval mode."""
    net = EfficientNetLite0()
    net.load_state_dict(folded_weights(raw))
    return net.eval()


def classifier(raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight (1000, 1280) and bias (1000,) of the ImageNet classifier on pooled features."""
    return torch.as_tensor(raw["_fc.weight"]), torch.as_tensor(raw["_fc.bias"])
