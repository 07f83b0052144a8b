"""Every registered attack still does on eight images what it did when its revision was written down.

The store believes that an attack of the same name, fields and revision makes the same examples. A change that moves the
numbers below needs a higher ``revision``; then renew the file, look at the difference, and commit both:

    IRONCLIP_RENEW_FROZEN=1 python -m pytest tests/attacks/test_frozen.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import Conv, images, tensor
from torch import Tensor, nn

from ironclip.core.rng import SampleRNG
from ironclip.core.types import prediction
from ironclip.core.vlm import VLM
from ironclip.core.zeroshot import ZeroShot
from ironclip.registry import ATTACK_PRESETS, ATTACKS, attack_table, build_attack

FILE = Path(__file__).with_name("frozen.json")
B, K = 8, 10
SPECS = [
    "FGSM(eps=2/255)",
    "PGD(eps=2/255, steps=5)",
    "PGD(eps=1/4, steps=5, norm=l2, loss=dlr, momentum=0.9)",
    "PGD(eps=2, steps=4, norm=l1, loss=margin)",
    "table2-pgd10",
    "table2-cw",
    "tecoa",
    "rtpt",
    "FeaturePGD(eps=2/255, steps=4)",
    "FeaturePGD(eps=2/255, steps=4, level=tokens, loss=feat_cos)",
    "fare-train",
    "RandomPoints(eps=2/255, points=4)",
    "APGD(eps=2/255, steps=10)",
    "APGD(eps=1/4, norm=l2, loss=dlr, steps=10, restarts=2, policy=first_success)",
    "APGDT(eps=2/255, steps=5, targets=3)",
    "FABT(eps=2/255, steps=6, targets=2)",
    "FABT(eps=1/4, norm=l2, steps=6, targets=2)",
    "Square(eps=2/255, queries=30)",
    "Square(eps=1/4, norm=l2, queries=30)",
    "AutoAttack(eps=2/255, members=('APGD(steps=6)', 'APGDT(steps=4, targets=2)', 'FABT(steps=4, targets=2)', "
    "'Square(queries=10)'))",
    "CW(steps=10, search=3, c=1)",
    "Transfer(eps=4/255, steps=5, di=0.7, ti=3)",
    "RayS(eps=8/255, queries=60)",
    "Universal(eps=8/255, epochs=3, batch_size=3)",
]


class Tower(nn.Module):
    """The toy classifier's outputs as embedding, and a pooled token with four patches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x.roll(2 * i, -1)) for i in range(5)], dim=1)


@pytest.fixture(scope="module")
def clf() -> ZeroShot:
    made = VLM.wrap(
        Tower().eval(), lambda texts: torch.cat([tensor(1, K, seed=sum(map(ord, t))) for t in texts]), 8, scale=5.0
    )
    return ZeroShot.build(made, [f"thing {'x' * i}" for i in range(K)])


def summary(clf: ZeroShot, text: str) -> dict[str, Any]:
    """Small numbers that no change of the outputs leaves alone."""
    x = images(B, low=0.0, high=1.0, seed=4)
    with torch.no_grad():
        y = prediction(clf(x))
    attack = build_attack(text)
    r = attack(clf, x, y, rng=SampleRNG.of(5, [f"photo-{i}" for i in range(B)]))
    delta = (r.x_adv - x).double().flatten(1)
    probe = tensor(delta.shape[1], seed=9).double()

    def short(values: Tensor) -> list[float]:
        return [float(f"{v:.6g}") for v in values.tolist()]

    return {
        "revision": attack.revision,
        "probe": short(delta @ probe),
        "size": short(delta.abs().sum(dim=1)),
        "loss": short(r.loss),
        "success": "".join(str(int(s)) for s in r.success),
        "forwards": r.forwards.tolist(),
        "backwards": r.backwards.tolist(),
    }


@pytest.mark.parametrize("text", SPECS)
def test_outputs_are_those_of_the_revision(clf: ZeroShot, text: str) -> None:
    now = summary(clf, text)
    if os.environ.get("IRONCLIP_RENEW_FROZEN"):
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**known, text: now}.items() if k in SPECS]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        pytest.skip("written down again")
    then = json.loads(FILE.read_text())[text]
    assert now["revision"] == then["revision"], "a new revision: renew frozen.json (see the top of this file)"
    hint = "outputs changed: raise the attack's revision, then renew frozen.json (see the top of this file)"
    for key in ("success", "forwards", "backwards"):
        assert now[key] == then[key], hint
    for key in ("probe", "size", "loss"):
        assert now[key] == pytest.approx(then[key], rel=1e-4, abs=1e-4), hint


def test_every_registered_attack_is_written_down() -> None:
    assert {build_attack(t).name for t in SPECS} == set(ATTACKS)
    assert set(json.loads(FILE.read_text())) == set(SPECS)
    assert set(ATTACK_PRESETS) <= set(attack_table())
