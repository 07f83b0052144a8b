"""One notation for methods: the constructor call as text, ``PGD(eps=4/255, steps=10)``.

The same text is the value on the command line, in a matrix file, in the store's columns and in its keys.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

from ironclip.core.check import unknown

T = TypeVar("T", bound=type)
_CALL = re.compile(r"^\s*([A-Za-z][\w.\-]*)\s*(?:\((.*)\))?\s*$", re.S)


@dataclass_transform(frozen_default=True, kw_only_default=False)
def method(cls: T) -> T:
    """Frozen dataclass whose constructor also takes ``preset="name"`` and whose repr is its spec.

    Presets stand in the class attribute ``PRESETS``: name -> fields; fields that are given beside a preset win. The
    object keeps the fields, not the preset's name, so the canonical text says what really runs.
    """
    made: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
    plain_init = made.__init__
    known = dataclasses.fields(made)
    plain = {
        f.name: str(f.type).removesuffix(" | None") for f in known if str(f.type).removesuffix(" | None") in _PLAIN
    }
    may_be_none = {f.name for f in known if str(f.type).endswith(" | None")}

    def init(self: Any, *args: Any, preset: str | None = None, **fields: Any) -> None:
        for f, value in zip(known, args, strict=False):
            if f.name in fields:
                raise ValueError(f"{made.__name__} got {f.name} twice; write {f.name}={_literal(value)} once")
            fields[f.name] = value
        if preset not in (None, "default"):
            presets: Mapping[str, Mapping[str, Any]] = getattr(made, "PRESETS", {})
            if preset not in presets:
                raise ValueError(unknown(f"preset of {made.__name__}", str(preset), ["default", *presets]))
            fields = dict(presets[str(preset)]) | fields
        for name, kind in plain.items():
            if name in fields and not (fields[name] is None and name in may_be_none):
                fields[name] = _plain(fields[name], kind, name)
        plain_init(self, *args[len(known) :], **fields)

    init.__doc__ = plain_init.__doc__
    made.__init__ = init
    made.__repr__ = to_text
    out: T = made
    return out


_PLAIN = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a word"}


def _plain(value: Any, kind: str, name: str) -> Any:
    """The value of a field of a plain type: whole numbers for int, any finite number for float. Raises ValueError."""
    number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    match kind:
        case "int" if number and value == value // 1:
            return int(value)
        case "float" if number and math.isfinite(value):
            return float(value)
        case "bool" if isinstance(value, bool):
            return value
        case "str" if isinstance(value, str):
            return value
    example = {"int": "10", "float": "0.5", "bool": "True", "str": "name"}[kind]
    raise ValueError(f"{name} must be {_PLAIN[kind]}, got {value!r}; write {name}={example}")


def to_text(obj: Any) -> str:
    """Canonical spec of a method: class name and the fields that differ from their defaults, in field order."""
    parts = []
    for f in dataclasses.fields(obj):
        value = getattr(obj, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if default is dataclasses.MISSING or value != default or type(value) is not type(default):
            parts.append(f"{f.name}={_literal(value)}")
    return f"{type(obj).__name__}({', '.join(parts)})"


def full_text(obj: Any) -> str:
    """Spec with every field written out, defaults included: what digests are made of."""
    values = (f"{f.name}={_literal(getattr(obj, f.name))}" for f in dataclasses.fields(obj))
    return f"{type(obj).__name__}({', '.join(values)})"


def parse(text: str, table: Mapping[str, Callable[..., Any]], kind: str = "method") -> Any:
    """Build the object that a spec names; ``table`` maps names (case is ignored) to constructors.

    Values are literals, bare words and divisions of numbers. Raises ValueError: unknown name or field with the nearest
    match and the valid ones, bad syntax with an example.
    """
    name, args, kwargs = split(text)
    by_lower = {n.lower(): n for n in table}
    if name.lower() not in by_lower:
        raise ValueError(unknown(kind, name, table))
    make = table[by_lower[name.lower()]]
    cls = getattr(make, "func", make)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in kwargs:
            if key not in fields and key != "preset":
                raise ValueError(unknown(f"field of {cls.__name__}", key, [*fields, "preset"]))
        if len(args) > len(fields):
            raise ValueError(f"{cls.__name__} has {len(fields)} fields, got {len(args)} values in {text!r}")
    return make(*args, **kwargs)


def split(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional and named values of a spec. Raises ValueError with an example for anything else."""
    found = _CALL.match(text)
    example = "write a spec such as PGD(eps=4/255, steps=10)"
    if not found:
        raise ValueError(f"cannot read {text!r}; {example}")
    try:
        call = ast.parse(f"f({found.group(2) or ''})", mode="eval").body
    except SyntaxError as err:
        raise ValueError(f"cannot read {text!r}: {err.msg}; {example}") from err
    if not isinstance(call, ast.Call):
        raise ValueError(f"cannot read {text!r}; {example}")
    kwargs: dict[str, Any] = {}
    for kw in call.keywords:
        if kw.arg is None:
            raise ValueError(f"** is not allowed in {text!r}; {example}")
        kwargs[kw.arg] = _value(kw.value, text)
    return found.group(1), [_value(a, text) for a in call.args], kwargs


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=value) if isinstance(value, (bool, int, float, str)) or value is None:
            return value
        case ast.Name(id=word):
            return word
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            number = _value(inner, text)
            if isinstance(number, (int, float, Fraction)) and not isinstance(number, bool):
                return -number
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            top, bottom = _value(left, text), _value(right, text)
            if isinstance(top, (int, float)) and isinstance(bottom, (int, float)) and bottom != 0:
                return Fraction(str(top)) / Fraction(str(bottom))
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_value(i, text) for i in items)
    raise ValueError(f"cannot read {ast.unparse(node)!r} in {text!r}: write numbers, fractions such as 4/255, or words")


def _literal(value: Any) -> str:
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}" if value.denominator != 1 else str(value.numerator)
    if isinstance(value, tuple):
        return "(" + "".join(f"{_literal(v)}, " for v in value).rstrip(" ") + ")" if value else "()"
    if isinstance(value, str):
        bare = re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII) and not keyword.iskeyword(value)
        return value if bare else repr(value)
    return repr(value)


def split_list(text: str) -> list[str]:
    """Split ``a,B(c=1, d=2),e`` at the commas outside brackets and quotes."""
    out, depth, quote, last = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[last:i])
            last = i + 1
    out.append(text[last:])
    return [part.strip() for part in out if part.strip()]


def digest(value: Any) -> str:
    """First 32 hex characters of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
