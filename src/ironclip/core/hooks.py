"""Reach inside a tower without touching its code: context managers over forward hooks.

A backend names its modules once (``core.vlm.Parts``); soft text prompts, deep visual prompts and captured tokens work
on those modules whatever library they come from, and the model is as before on exit, after an exception too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def replaced_output(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Inside the block the module returns ``value`` whatever it is given (soft text prompts)."""
    handle = module.register_forward_hook(lambda _m, _i, _o: value)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def captured_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the module returns, first element of a tuple, one entry per call."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def deep_prompts(blocks: Sequence[nn.Module], prompts: Tensor) -> Iterator[None]:
    """Prompt tokens in the first ``len(prompts)`` transformer blocks (deep visual prompt tuning, arXiv 2203.12119).

    ``prompts``: (depth, m, w) shared by all images or (depth, b, m, w) one set per image. They stand at the end of the
    sequence: appended before block 0, replaced before each later block of the depth, and taken off after the last
    block, so the class token keeps its place and the patch count seen from outside does not change. Blocks must be
    batch-first, (b, n, w). Raises ValueError if there are more prompts than blocks.
    """
    depth = prompts.shape[0]
    if depth > len(blocks):
        raise ValueError(f"prompts for {depth} blocks, but the tower has {len(blocks)}; use depth <= {len(blocks)}")
    m = prompts.shape[-2]

    def before(i: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            own = prompts[i] if prompts.ndim == 4 else prompts[i].expand(hidden.shape[0], -1, -1)
            kept = hidden if i == 0 else hidden[:, :-m]
            hidden = torch.cat([kept, own.to(hidden.dtype)], dim=1)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :-m], *output[1:])
        return output[:, :-m]

    with ExitStack() as stack:
        for i in range(depth):
            stack.callback(blocks[i].register_forward_pre_hook(before(i), with_kwargs=True).remove)
        if depth:
            stack.callback(blocks[-1].register_forward_hook(after).remove)
        yield


@contextmanager
def class_token_only(tower: nn.Module) -> Iterator[None]:
    """Inside, the last block of a transformer read at its class token works that one out and leaves the others alone.

    The same features, and of 12 blocks' work some 7 % are saved. Towers of another kind run as they are; hooks of the
    block are called as ever.
    """
    make = getattr(tower, "class_token", None)
    if make is None:
        yield
        return
    block: Any = tower.last

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return torch.cat([make(hidden), hidden[:, 1:]], dim=1)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
