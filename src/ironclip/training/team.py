"""Several processes on one run: each takes its share of every batch, gradients are added up, one writes.

Lightning Fabric starts the processes and connects them (extra ``distributed``); nothing else of it is used, so that one
process and many run the same loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Team:
    """``rank`` of ``size`` processes. Rank 0 writes files and reports."""

    rank: int = 0
    size: int = 1
    fabric: Any = None

    @property
    def leads(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    def share(self, places: list[int]) -> list[int]:
        """This process's part of a batch. Raises ValueError where the parts would not be equal."""
        if len(places) % self.size:
            raise ValueError(
                f"{len(places)} images at once cannot be shared equally by {self.size} processes; "
                f"write a batch size that is a multiple of {self.size} times accumulate"
            )
        return places[self.rank :: self.size]

    def add_up(self, parameters: Iterable[nn.Parameter], figures: dict[str, float]) -> dict[str, float]:
        """Gradients and figures summed over the processes, the gradients in place."""
        if self.size == 1:
            return figures
        made = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in made]
        flat = self._sum(torch.cat([g.flatten() for g in grads]))
        for p, part in zip(made, flat.split([p.numel() for p in made]), strict=True):
            p.grad = part.view_as(p).clone()
        values = self._sum(torch.tensor(list(figures.values()), dtype=torch.float64, device=flat.device))
        return dict(zip(figures, values.tolist(), strict=True))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.fabric.barrier()

    def _sum(self, value: Tensor) -> Tensor:
        out: Tensor = self.fabric.all_reduce(value, reduce_op="sum")
        return out


def gather(devices: int, accelerator: str) -> Team:
    """Start ``devices`` processes of the present command, or join those that torchrun or a cluster started.

    Each runs the same program from its beginning; this call returns in all of them. Raises ImportError without the
    extra ``distributed``.
    """
    if devices == 1:
        return Team()
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise ImportError('several devices need Lightning Fabric; type pip install "ironclip[distributed]"') from None
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp")
    fabric.launch()
    return Team(fabric.global_rank, fabric.world_size, fabric)
