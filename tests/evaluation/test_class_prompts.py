"""Attacked class prompts: by hand on a toy, on the model that ships, and from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from toyset import toy_block

import ironclip
from ironclip.attacks.characters import Charmer
from ironclip.attacks.text import TextResult, WordSwap
from ironclip.cli import main
from ironclip.cli.prompts import marked
from ironclip.evaluation.class_prompts import attack_prompts
from ironclip.evaluation.run import open_data


class Swapped:
    """Turns the prompts of the first two classes round, whatever is forbidden."""

    name = "swapped"

    def __call__(self, encode: object, texts: Sequence[str], **_: object) -> TextResult:
        n = len(texts)
        return TextResult([texts[1], texts[0], *texts[2:]], torch.tensor([1, 1] + [0] * (n - 2)), torch.zeros(n))


def test_prompts_turned_round_turn_answers_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from ironclip.evaluation import class_prompts

    monkeypatch.setattr(class_prompts.spec, "full_text", lambda a: a.name)
    vlm, data = toy_block()
    found = attack_prompts(vlm, data, Swapped(), batch_size=3)  # type: ignore[arg-type]
    clf = ironclip.ZeroShot.build(vlm, data.class_names, data.templates)
    (x, labels, _), *_ = data.batches(len(data.ids))
    z, y = vlm.encode_image(x) @ clf.weights.T, clf.labels(labels)
    turned = z[:, [1, 0, *range(2, z.shape[1])]]
    own = z.clone()
    own[torch.arange(len(y)), y] = turned[torch.arange(len(y)), y]
    want = [100 * float((p.argmax(dim=1) == y).double().mean()) for p in (z, own, turned)]
    assert [line.accuracy for line in found.lines] == pytest.approx(want)
    assert [e.crossed for e in found.edits[:3]] == [clf.class_names[1], clf.class_names[0], ""]
    assert found.crossed == 2


@pytest.mark.parametrize("attack", [Charmer(), WordSwap()], ids=lambda a: a.name)
def test_tiny_loses_classes_to_edited_prompts(attack: Charmer | WordSwap) -> None:
    vlm = ironclip.load("tiny")
    data = open_data("shapes", vlm, limit=40)
    found = attack_prompts(vlm, data, attack)
    by = {line.attacker: line.accuracy for line in found.lines}
    assert found.n == 40
    assert by["nobody"] > 90
    assert by["own"] < by["nobody"]
    assert by["all"] < by["nobody"]
    texts = {e.before for e in found.edits}
    assert all(e.after not in texts for e in found.edits if e.changed)


def test_no_budget_changes_nothing() -> None:
    vlm = ironclip.load("tiny")
    found = attack_prompts(vlm, open_data("shapes", vlm, limit=10), Charmer(k=0))
    assert len({line.accuracy for line in found.lines}) == 1
    assert all(e.before == e.after and not e.crossed for e in found.edits)


def test_edits_are_marked() -> None:
    assert [(s.start, s.end) for s in marked("a cat", "a cut").spans] == [(3, 4)]
    assert marked("a cat", "a ct").plain == "a c\u2038t"


def test_the_command_prints_json_and_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prompts", "--vlm", "tiny", "--data", "shapes", "--limit", "5", "--text-attack", "Charmer(k=1, places=2)"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["attacker"] for line in found["lines"]] == ["nobody", "own", "all"]
    assert main(words) == 0
    assert "5 clean images" in capsys.readouterr().out
    assert main(["prompts", "--text-attack", "Chamer(k=1)"]) == 2
    assert "did you mean 'Charmer'" in capsys.readouterr().err
