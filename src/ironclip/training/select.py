"""Which tensors of a model are trained, and what a run has changed in the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ironclip.core.loop import Loop
from ironclip.core.rng import SampleRNG
from ironclip.core.types import State
from ironclip.core.vlm import VLM


class LowRank(nn.Module):
    """W + B A, for a weight W of any shape read as (out, rest). B starts at zero, so that nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int, noise: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(noise / weight[0].numel() ** 0.5)
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def student_of(vlm: VLM, towers: Sequence[str], loop: Loop, seed: int) -> tuple[VLM, dict[str, nn.Parameter]]:
    """A copy of the model with its own ``towers``, in eval mode, and the parameters to train by name.

    Everything else in the copy is shared and gets no gradient. Eval mode keeps the statistics of batch norm as they
    are; no tower of this family draws dropout. Raises ValueError for a tower without parameters or with too few layers.
    """
    state = {k: v for k, v in vlm.state_dict().items() if k.split(".", 1)[0] in towers}
    student = vlm.with_state(state)
    chosen: dict[str, nn.Parameter] = {}
    for tower in towers:
        module = getattr(student, tower)
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            raise ValueError(f"the {tower} tower of {vlm.name} has no parameters to train")
        module.eval().requires_grad_(False)
        kind, n = loop.trained()
        own = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        if kind == "last" and n > len(own):
            raise ValueError(f"train=last-{n}: the {tower} tower has only {len(own)} layers with parameters")
        if kind == "lora":
            _add_low_rank(module, n, seed)
            picked = {id(p) for m in module.modules() if isinstance(m, LowRank) for p in m.parameters()}
            if not picked:
                raise ValueError(f"train=lora-{n}: the {tower} tower has no weight matrix of a rank above {n}")
        else:
            picked = {id(p) for m in (own[-n:] if kind == "last" else own) for p in m.parameters(recurse=False)}
        chosen |= {f"{tower}.{k}": p for k, p in module.named_parameters() if id(p) in picked}
    for p in chosen.values():
        p.requires_grad_(True)
    return student, chosen


def with_extra(student: VLM, values: State) -> dict[str, nn.Parameter]:
    """Give the student tensors of a method's own, and return them as parameters to train, by name."""
    if not values:
        return {}
    device = student.device
    student.extra = nn.ParameterDict({k: nn.Parameter(v.detach().clone().to(device)) for k, v in values.items()})
    return {f"extra.{k}": student.get_parameter(f"extra.{k}") for k in values}


def _add_low_rank(tower: nn.Module, rank: int, seed: int) -> None:
    names = ("weight", "in_proj_weight")
    for path, module in list(tower.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            continue
        for name in names:
            weight = module._parameters.get(name)
            if weight is not None and min(weight.shape[0], weight[0].numel()) > rank:
                stream = SampleRNG.of(seed, [f"{path}.{name}"]).fold("lora")
                noise = stream.normal(rank, weight[0].numel())[0].to(weight)
                parametrize.register_parametrization(module, name, LowRank(weight, rank, noise))


@contextmanager
def frozen(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters inside the block: the attack saves memory and leaks nothing into the update."""
    for p in parameters.values():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters.values():
            p.requires_grad_(True)


def changed(vlm: VLM, student: VLM, towers: Sequence[str]) -> State:
    """The tensors of the student that differ from the model's, under the model's names, low-rank updates merged."""
    own, out = vlm.state_dict(), State()
    for tower in towers:
        module = copy.deepcopy(getattr(student, tower))
        for part in list(module.modules()):
            for name in list(getattr(part, "parametrizations", {})):
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
        for key, value in module.state_dict().items():
            if not torch.equal(value, own[f"{tower}.{key}"]):
                out[f"{tower}.{key}"] = value.detach().cpu().clone().contiguous()
    return out
