"""CLIPure-Cos as its note states it: gradient steps by autograd in float64. Nothing here comes from the package."""

from __future__ import annotations

import torch


def null_embedding(features: torch.Tensor) -> torch.Tensor:
    """Mean of the null prompts' features, each of unit length first; the mean itself is not normalised."""
    unit = torch.stack([f / torch.sqrt((f**2).sum()) for f in features.double()])
    return unit.sum(0) / len(unit)


def purify(
    z: torch.Tensor, null: torch.Tensor, *, eta: float, steps: int, per_row: bool, graph: bool = False
) -> torch.Tensor:
    """``steps`` normalised gradient steps on minus the cosine with ``null``, with the lengths of the rows kept.

    ``per_row``: each row's gradient is normalised, else the whole batch's. ``graph``: the direction stays
    differentiable; the published code leaves it out of the graph.
    """
    for _ in range(steps):
        leaf = z if graph else z.detach().requires_grad_(True)
        if graph and not leaf.requires_grad:
            leaf = leaf.clone().requires_grad_(True)
        with torch.enable_grad():
            energy = -torch.cosine_similarity(leaf, null[None], dim=1).sum()
            (g,) = torch.autograd.grad(energy, leaf, create_graph=graph)
        r = torch.sqrt((z**2).sum(1, keepdim=True))
        big = r * g
        size = torch.sqrt((big**2).sum(1, keepdim=True)) if per_row else torch.sqrt((big**2).sum())
        direction = -big / size
        u = z / r + eta * direction
        z = r * u / torch.sqrt((u**2).sum(1, keepdim=True))
    return z


def geodesic(z: torch.Tensor, null: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation of unit rows: the point at ``share`` of the way to the null direction."""
    t = null / torch.sqrt((null**2).sum())
    out = []
    for row in z:
        theta = torch.arccos((row * t).sum())
        out.append((torch.sin((1 - share) * theta) * row + torch.sin(share * theta) * t) / torch.sin(theta))
    return torch.stack(out)


def logits(z: torch.Tensor, classes: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * z @ classes.double().T
