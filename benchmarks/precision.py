"""Speed of `lite` by precision and memory format, and the labels that bf16 changes.

    python benchmarks/precision.py [--batch-size 16] [--repeats 5] [--json]

Forward, and forward plus gradient to the pixels, in images a second: the best of the repeats, the formats taking turns
so that a busy machine hurts all alike. Ratios to plain fp32 NCHW are the result. Labels: the 20 photographs of
`photos`, plus the `dev` photographs of IRONCLIP_DATA's imagenet1k_sample where there are any; every image whose bf16
label differs is one that the fp32 re-check must set right.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
from torch import Tensor

import ironclip
from ironclip import VLM, ZeroShot


def seconds(vlm: VLM, x: Tensor, gradient: bool) -> float:
    """Time of one pass over the batch."""
    x = x.clone().requires_grad_(gradient)
    start = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        features = vlm.encode_image(x)
        if gradient:
            features[:, 0].sum().backward()
    return time.perf_counter() - start


def speeds(models: dict[str, VLM], x: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Images a second of each model, forward and forward plus backward, after one warm-up round."""
    best = {name: {"forward": float("inf"), "forward_backward": float("inf")} for name in models}
    for i in range(repeats + 1):
        for name, vlm in models.items():
            for kind in best[name]:
                took = seconds(vlm, x, kind == "forward_backward")
                best[name][kind] = min(best[name][kind], took) if i else float("inf")
    return {name: {kind: len(x) / t for kind, t in row.items()} for name, row in best.items()}


@torch.no_grad()
def changed_labels(full: VLM, low: VLM, spec: str, batch_size: int) -> dict[str, int | float]:
    """Images of the set, how many get another label in bf16, and the largest fp32 margin among those."""
    data = ironclip.load_data(spec, size=full.image_size)
    clf = ZeroShot.build(full, data.class_names, data.templates)
    count, changed, right, right_low, widest = 0, 0, 0, 0, 0.0
    for x, y, _ in data.batches(batch_size):
        z, w = clf(x), clf.with_vlm(low)(x)
        top = z.topk(2, dim=1).values
        differ = z.argmax(dim=1) != w.argmax(dim=1)
        count, changed = count + len(x), changed + int(differ.sum())
        right += int((z.argmax(dim=1) == clf.labels(y)).sum())
        right_low += int((w.argmax(dim=1) == clf.labels(y)).sum())
        if bool(differ.any()):
            widest = max(widest, float((top[:, 0] - top[:, 1])[differ].max()))
    return {"images": count, "changed": changed, "right_fp32": right, "right_bf16": right_low, "widest_margin": widest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    full = ironclip.load("lite")
    plain = ironclip.load("lite")
    plain.facts["channels_last"] = False
    models = {"fp32 NCHW": plain, "fp32 channels-last": full, "bf16 channels-last": full.at_precision("bf16")}
    x = torch.rand(args.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = speeds(models, x, args.repeats)
    base = rows["fp32 NCHW"]
    for row in rows.values():
        row |= {f"{kind}_ratio": row[kind] / base[kind] for kind in base if not kind.endswith("_ratio")}
    sets = ["photos"] + (["folder:imagenet1k_sample/dev"] if os.environ.get("IRONCLIP_DATA") else [])
    labels = {spec: changed_labels(full, models["bf16 channels-last"], spec, args.batch_size) for spec in sets}
    result = {"threads": torch.get_num_threads(), "batch_size": args.batch_size, "speed": rows, "labels": labels}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"lite, batch {args.batch_size}, {result['threads']} threads; images a second (ratio to fp32 NCHW)")
    for name, row in rows.items():
        cells = [f"{row[k]:7.1f} ({row[k + '_ratio']:.2f} x)" for k in ("forward", "forward_backward")]
        print(f"{name:20} forward {cells[0]}   forward + backward {cells[1]}")
    for spec, found in labels.items():
        print(
            f"{spec}: bf16 changes {found['changed']} of {found['images']} labels (right: fp32 {found['right_fp32']}, "
            f"bf16 {found['right_bf16']}; widest fp32 margin among them {found['widest_margin']:.2f} logits)"
        )


if __name__ == "__main__":
    main()
