"""One pre-training run: the model and optimiser in memory, and the folder that they can be taken up from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.training.architecture import MEAN, STD, build_clip, log_scale_cap, whiten_patches
from ironclip.training.batches import Captioned, Images, content_hash, order, pick_captions
from ironclip.training.checkpoint import Checkpoint, write_json
from ironclip.training.config import Pretrain
from ironclip.training.export import save_model
from ironclip.training.journal import Journal
from ironclip.training.loss import contrastive_loss
from ironclip.training.vocabulary import train_vocabulary

Perturb = Callable[[Tensor, Sequence[str]], Tensor]

_MANIFEST = "manifest.json"


class Run:
    """The state of a run in memory and its folder."""

    def __init__(self, config: Pretrain, data: Captioned, val: Images, out: Path, device: str) -> None:
        self.config, self.data, self.val, self.out = config, data, val, out
        self.device = torch.device(device)
        sizes = config.sizes
        texts = (t for i in range(min(config.vocabulary_from, len(data))) for t in data.captions(i))
        self.tokenizer = train_vocabulary(texts, config.merges, sizes.context)
        self.model = build_clip(sizes, self.tokenizer, config.seed)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1).to(self.device) for v in (MEAN, STD))
        first = list(range(min(config.whiten_from, len(data))))
        x = next(iter(data.batches(len(first), first)))[0]
        if x.shape[-1] != sizes.image_size:
            raise ValueError(f"{data.name} gives {x.shape[-1]} px images; the architecture takes {sizes.image_size}")
        embedding = self.model.vision_model.embeddings.patch_embedding
        whiten_patches(embedding, self.normalise(x.to(self.device)).cpu(), config.seed, config.whiten_floor)
        self.model.to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-6)
        self.settings = {
            "config": json.loads(json.dumps(dataclasses.asdict(config))),
            "data": {
                "name": data.name,
                "images": len(data),
                "manifest_hash": data.manifest_hash,
                "content": content_hash(x, [data.captions(i) for i in first]),
            },
            "validation": {"name": val.name, "images": len(val), "manifest_hash": val.manifest_hash},
        }

    def begin(self, resume: bool) -> int:
        """Take up the run in the folder, or start one; returns the steps already done."""
        if not resume:
            (self.out / _MANIFEST).unlink(missing_ok=True)
        self.journal = Journal(self.out, self.settings, resume)
        point = self.journal.begin()
        if point is not None:
            self.model.load_state_dict(point.weights)
            self.optimizer.load_state_dict(point.optimizer)
        return 0 if point is None else point.step

    def step(self, step: int, perturb: Perturb | None) -> dict[str, Any]:
        """One update."""
        config, model = self.config, self.model
        rows = order(config.seed, step, config.batch_size, len(self.data))
        x = next(iter(self.data.batches(len(rows), rows)))[0].to(self.device)
        texts = pick_captions(self.data, rows, config.seed, step)
        if perturb is not None:
            x = perturb(x, texts).detach()
        model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(step)
        scale = model.logit_scale.exp()
        loss = contrastive_loss(self.images(x), self.texts(texts), scale, texts)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss of step {step} is {loss.item()}; use a lower lr than {config.lr}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        self.optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=log_scale_cap())
        return {
            "step": step + 1,
            "loss": round(loss.item(), 6),
            "scale": round(scale.item(), 4),
            "grad_norm": round(norm.item(), 4),
            "lr": config.rate(step),
        }

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] to the tower's input."""
        return (x - self.mean) / self.std

    def images(self, x: Tensor) -> Tensor:
        """(b, d) unit features of pixels in [0, 1]."""
        with self._cast():
            out = self.model.get_image_features(pixel_values=self.normalise(x)).pooler_output
        return F.normalize(out.float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) unit features."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")["input_ids"]
        with self._cast():
            out = self.model.get_text_features(input_ids=ids.to(self.device)).pooler_output
        return F.normalize(out.float(), dim=-1)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def validate(self) -> float:
        """Zero-shot accuracy, in percent, on the first images of the validation set."""
        self.model.eval()
        names, templates, right = self.val.class_names, self.val.templates, 0
        n = min(self.config.validate_on, len(self.val))
        with torch.no_grad():
            text = self.texts([t.format(c) for c in names for t in templates])
            weights = F.normalize(text.view(len(names), len(templates), -1).mean(dim=1), dim=-1)
            for x, y, _ in self.val.batches(self.config.batch_size, range(n)):
                right += int(((self.images(x.to(self.device)) @ weights.T).argmax(dim=1).cpu() == y).sum())
        return round(100 * right / n, 2)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        self.journal.log(metrics)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        self.journal.save(Checkpoint(step, self.model.state_dict(), self.optimizer.state_dict()))

    def finish(self) -> dict[str, Any]:
        """Write the model and its manifest."""
        hashes = save_model(self.model, self.tokenizer, self.out, self.config.sizes.image_size)
        manifest = {**self.settings, "metrics": self.journal.recent, "sha256": hashes}
        write_json(self.out / _MANIFEST, manifest)
        return manifest
