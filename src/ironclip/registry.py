"""Name -> "module:Class", imported on demand. To add a method, add its row here and in the contract tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ironclip.core import spec
from ironclip.core.check import unknown
from ironclip.core.types import Attack, Defense

if TYPE_CHECKING:
    from ironclip.attacks.pair import PairAttack
    from ironclip.attacks.text import TextAttack
    from ironclip.defenses.speller import Speller

ATTACKS: dict[str, str] = {
    "fgsm": "ironclip.attacks.pgd:FGSM",
    "pgd": "ironclip.attacks.pgd:PGD",
    "feature_pgd": "ironclip.attacks.feature:FeaturePGD",
    "random": "ironclip.attacks.random:RandomPoints",
    "apgd": "ironclip.attacks.apgd:APGD",
    "apgd_t": "ironclip.attacks.apgd:APGDT",
    "fab_t": "ironclip.attacks.fab:FABT",
    "square": "ironclip.attacks.square:Square",
    "autoattack": "ironclip.attacks.autoattack:AutoAttack",
    "cw": "ironclip.attacks.cw:CW",
    "transfer": "ironclip.attacks.transfer:Transfer",
    "rays": "ironclip.attacks.rays:RayS",
    "universal": "ironclip.attacks.universal:Universal",
}

ATTACK_PRESETS: dict[str, tuple[str, str]] = {
    "table2-pgd10": ("pgd", "table2-pgd10"),
    "tecoa": ("pgd", "tecoa"),
    "pmg": ("pgd", "pmg"),
    "rtpt": ("pgd", "rtpt"),
    "apt": ("pgd", "apt"),
    "csr": ("pgd", "csr"),
    "table2-cw": ("pgd", "table2-cw"),
    "fare-train": ("feature_pgd", "fare-train"),
    "aa-standard": ("autoattack", "aa-standard"),
    "aa-rand": ("autoattack", "aa-rand"),
    "aa-fast": ("autoattack", "aa-fast"),
    "aa-tecoa": ("autoattack", "aa-tecoa"),
    "mi-fgsm": ("transfer", "mi-fgsm"),
    "di-fgsm": ("transfer", "di-fgsm"),
    "ti-fgsm": ("transfer", "ti-fgsm"),
    "mi-di-ti": ("transfer", "mi-di-ti"),
}

DEFENSES: dict[str, str] = {
    "none": "ironclip.defenses.none:NoDefense",
    "noise": "ironclip.defenses.noise:Noise",
    "ttc": "ironclip.defenses.ttc:TTC",
    "clipure": "ironclip.defenses.clipure:CLIPure",
    "clipure_diff": "ironclip.defenses.clipure_diff:CLIPureDiff",
    "diffpure": "ironclip.defenses.diffpure:DiffPure",
    "aom": "ironclip.defenses.aom:AOM",
    "cola": "ironclip.defenses.cola:COLA",
    "tte": "ironclip.defenses.tte:TTE",
    "anti_adversary": "ironclip.defenses.anti_adversary:AntiAdversary",
    "hedge": "ironclip.defenses.hedge:Hedge",
    "agc": "ironclip.defenses.agc:AGC",
    "fpt_noise": "ironclip.defenses.fpt_noise:FPTNoise",
    "purify": "ironclip.defenses.purify:Purify",
    "smoothing": "ironclip.defenses.smoothing:Smoothing",
    "rtpt": "ironclip.defenses.rtpt:RTPT",
    "tapt": "ironclip.defenses.tapt:TAPT",
    "tecoa": "ironclip.defenses.tecoa:TeCoA",
    "apt": "ironclip.defenses.apt:APT",
    "advpt": "ironclip.defenses.advpt:AdvPT",
    "tga_zsr": "ironclip.defenses.tga_zsr:TGAZSR",
    "laat": "ironclip.defenses.laat:LAAT",
    "fare": "ironclip.defenses.fare:FARE",
    "pmg_aft": "ironclip.defenses.pmg_aft:PMGAFT",
    "tima": "ironclip.defenses.tima:TIMA",
    "mmcoa": "ironclip.defenses.mmcoa:MMCoA",
}


TEXT_ATTACKS: dict[str, str] = {
    "word_swap": "ironclip.attacks.text:WordSwap",
    "charmer": "ironclip.attacks.characters:Charmer",
}

PAIR_ATTACKS: dict[str, str] = {
    "sga": "ironclip.attacks.sga:SGA",
    "co_attack": "ironclip.attacks.co_attack:CoAttack",
}

TEXT_DEFENSES: dict[str, str] = {"speller": "ironclip.defenses.speller:Speller"}


def locate(target: str) -> Any:
    """Import ``module:Class``. Raises ImportError with the package's own message if an extra is missing."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


class _Lazy(Mapping[str, Callable[..., Any]]):
    """Registry names, class names and attack presets to constructors; imports only what is asked for."""

    def __init__(self, rows: dict[str, str], presets: dict[str, tuple[str, str]] | None = None) -> None:
        self.rows, self.presets = rows, presets or {}
        self.classes = {target.split(":")[1]: name for name, target in rows.items()}

    def __getitem__(self, key: str) -> Callable[..., Any]:
        if key in self.presets:
            name, preset = self.presets[key]
            return partial(locate(self.rows[name]), preset=preset)
        made: Callable[..., Any] = locate(self.rows[self.classes.get(key, key)])
        return made

    def __iter__(self) -> Iterator[str]:
        taken = {name.lower() for name in self.classes}
        yield from self.classes
        yield from (name for name in (*self.rows, *self.presets) if name.lower() not in taken)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def attack_table() -> Mapping[str, Callable[..., Any]]:
    """Every name under which an attack can be written."""
    return _Lazy(ATTACKS, ATTACK_PRESETS)


def defense_table() -> Mapping[str, Callable[..., Any]]:
    """Every name under which a defense can be written."""
    return _Lazy(DEFENSES)


def build_attack(text: str | Attack) -> Attack:
    """An attack from its spec, such as ``PGD(eps=4/255)`` or the preset ``table2-pgd10``. Raises ValueError."""
    if not isinstance(text, str):
        return text
    attack: Attack = spec.parse(text, attack_table(), "attack")
    return attack


def build_defense(text: str | Defense) -> Defense:
    """A defense from its spec, such as ``ttc`` or ``TTC(steps=2)``. Raises ValueError."""
    if not isinstance(text, str):
        return text
    defense: Defense = spec.parse(text, defense_table(), "defense")
    return defense


def build_text_attack(text: str | TextAttack) -> TextAttack:
    """An attack on texts from its spec, such as ``Charmer(k=1)``. Raises ValueError."""
    made: TextAttack = spec.parse(text, _Lazy(TEXT_ATTACKS), "text attack") if isinstance(text, str) else text
    return made


def build_pair_attack(text: str | PairAttack) -> PairAttack:
    """An attack on images and captions together from its spec, such as ``SGA(eps=2/255)``. Raises ValueError."""
    made: PairAttack = spec.parse(text, _Lazy(PAIR_ATTACKS), "pair attack") if isinstance(text, str) else text
    return made


def build_text_defense(text: str | Speller) -> Speller:
    """A defense of texts from its spec, such as ``Speller()``. Raises ValueError."""
    made: Speller = spec.parse(text, _Lazy(TEXT_DEFENSES), "text defense") if isinstance(text, str) else text
    return made


def build(text: str) -> Any:
    """The attack or defense that a spec names: ``ironclip.build("TTC(steps=2)")``. Raises ValueError.

    Where an attack preset shares its name with a defense (``tecoa``), the defense is meant; ``build_attack`` takes the
    other.
    """
    name, _, _ = spec.split(text)
    attacks, defenses = attack_table(), defense_table()
    if name.lower() in {n.lower() for n in defenses}:
        return spec.parse(text, defenses, "defense")
    if name.lower() in {n.lower() for n in attacks}:
        return spec.parse(text, attacks, "attack")
    raise ValueError(unknown("attack or defense", name, [*attacks, *defenses]))
