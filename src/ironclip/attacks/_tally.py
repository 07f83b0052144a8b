"""What every attack does around its own idea: count, remember the best point, merge runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ironclip.attacks._objective import RowLoss
from ironclip.core.grad import Fn, Grad, draws_of, loss_and_grad
from ironclip.core.rng import SampleRNG
from ironclip.core.types import AttackResult
from ironclip.core.views import base_of


def independent(clf: Fn) -> bool:
    """Does every image get the answer it would get alone, every time? Only then may fooled images leave the batch."""
    return not base_of(clf, "batchwise") and not base_of(clf, "randomized")


class Tally:
    """Best point, costs and diagnostics of one run over the images ``x``: (b, 3, h, w)."""

    def __init__(self, x: Tensor, steps: int = 0, best: bool = True) -> None:
        b, dev = x.shape[0], x.device
        self.x_adv, self.steps, self.best = x.clone(), steps, best
        self.loss = x.new_full((b,), -torch.inf)
        self.rank = self.loss.clone()
        self.hit = torch.zeros(b, dtype=torch.bool, device=dev)
        self.zero_grad = self.hit.clone()
        self.final, self.first, self.early, self.zero_pixels, self.grads = (x.new_zeros(b) for _ in range(5))
        self.forwards, self.backwards = (torch.zeros(b, dtype=torch.long) for _ in range(2))

    def spend(self, rows: Tensor, forwards: int = 0, backwards: int = 0) -> None:
        """Count calls for some rows."""
        at = rows.cpu()
        self.forwards[at] += forwards
        self.backwards[at] += backwards

    def gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Note where the gradients (n, 3, h, w) of some rows are zero; returns their zero shares (n,)."""
        counts = (
            [g.count_nonzero() for g in grad] if grad.is_cpu and len(grad) else [grad.flatten(1).count_nonzero(dim=1)]
        )
        share = (
            1 - torch.stack(counts).flatten() / grad.shape[1:].numel()
        )  # image by image is three times faster on a CPU
        self.zero_grad[rows] |= share == 1
        self.zero_pixels[rows] += share
        self.grads[rows] += 1
        return share

    def offer(
        self, rows: Tensor, at: Tensor, loss: Tensor, hit: Tensor, step: int = 0, rank: Tensor | None = None
    ) -> Tensor:
        """Keep better points of ``rows`` (ascending): fooling first, then the higher ``rank`` (the loss).

        Returns which were kept, (n,).
        """
        rank = loss if rank is None else rank
        old = self.hit[rows]
        better = (hit & ~old) | ((hit == old) & (rank > self.rank[rows]))
        if not self.best:
            better = torch.ones_like(better)
        if bool(better.any()):
            kept = rows[better]
            if len(kept) == len(self.x_adv):
                self.x_adv.copy_(at)
            else:
                self.x_adv[kept] = at[better]
            self.loss[kept], self.rank[kept], self.hit[kept] = loss[better], rank[better], hit[better]
        self.final[rows] = loss
        if step == 0:
            self.first[rows] = loss
        if step <= 0.9 * self.steps:
            self.early[rows] = self.loss[rows]
        return better

    def restart(self, rows: Tensor) -> None:
        """The loss of some rows has changed: what was reached before no longer compares."""
        self.rank[rows] = -torch.inf

    def result(self, trace: dict[str, list[Tensor]] | None = None, notes: tuple[str, ...] = ()) -> AttackResult:
        """Everything as an ``AttackResult``."""
        gain = (self.loss - self.first).clamp(min=1e-12)
        return AttackResult(
            x_adv=self.x_adv,
            success=self.hit,
            loss=self.loss,
            final_loss=self.final,
            forwards=self.forwards,
            backwards=self.backwards,
            zero_grad=self.zero_grad,
            zero_pixels=self.zero_pixels / self.grads.clamp(min=1),
            late_gain=((self.loss - self.early) / gain).clamp(0.0, 1.0).nan_to_num(0.0),
            trace={k: torch.stack(v) for k, v in trace.items() if v} if trace else None,
            notes=notes,
        )


def spread(values: Tensor, rows: Tensor, b: int) -> Tensor:
    """Values (n,) of some rows as (b,), NaN elsewhere: one line of a trace."""
    return values.new_full((b,), torch.nan).index_copy(0, rows, values)


def value(clf: Fn, x: Tensor, loss: Callable[[Tensor], Tensor], rng: SampleRNG) -> tuple[Tensor, Tensor]:
    """Output (b, k) and loss (b,) without gradient; an ``eot`` view gives means over draws, as the gradient does."""
    draws = draws_of(clf)
    base = getattr(clf, "base", clf) if draws > 1 else clf
    outs, losses = [], []
    penalty = getattr(base, "penalty", None)
    with torch.no_grad():
        for i in range(draws):
            draw = rng.at(rng.draw * draws + i) if draws > 1 else rng
            outs.append(base(x, draw))
            check_width(clf, outs[-1])
            losses.append(loss(outs[-1]) if penalty is None else loss(outs[-1]) - penalty(x, draw))
    if draws == 1:
        return outs[0], losses[0]
    return torch.stack(outs).mean(0), torch.stack(losses).mean(0)


def check_width(clf: Fn, out: Tensor) -> None:
    """Refuse logits (b, k) whose k is not the number of classes that the classifier names. Raises ValueError."""
    k = base_of(clf, "k")
    if isinstance(k, int) and (out.ndim != 2 or out.shape[1] != k):
        raise ValueError(f"the classifier has {k} classes but returned {tuple(out.shape)}; return logits (b, {k})")


def mixed(loss: RowLoss, rescue: RowLoss | None, rows: Tensor, swapped: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of some rows: ``rescue`` where it was ``swapped`` in, (b,)."""
    if rescue is None or not bool(swapped[rows].any()):
        return lambda out: loss(out, rows)
    other, where = rescue, swapped[rows]
    return lambda out: torch.where(where, other(out, rows), loss(out, rows))


def gradient(
    clf: Fn,
    x: Tensor,
    loss: RowLoss,
    rescue: RowLoss | None,
    rows: Tensor,
    swapped: Tensor,
    rng: SampleRNG,
    tally: Tally,
) -> tuple[Grad, Tensor]:
    """Loss and gradient at ``x``, the points of ``rows``; all-zero gradients are taken again of ``rescue``.

    ``swapped`` (b,) marks the images whose loss was replaced and is updated. Also returns which rows (n,) were swapped
    in this call. Costs are counted in ``tally``.
    """
    draws, before = draws_of(clf), swapped[rows]
    g = loss_and_grad(clf, x, mixed(loss, rescue, rows, swapped), rng)
    check_width(clf, g.out)
    tally.spend(rows, draws, draws)
    if rescue is not None:
        dead = (g.grad.flatten(1).abs().amax(dim=1) == 0) & ~before
        if bool(dead.any()):
            tally.zero_grad[rows[dead]] = True
            other, at = rescue, rows[dead]
            again = loss_and_grad(clf, x[dead], lambda out: other(out, at), rng[dead])
            tally.spend(at, draws, draws)
            tally.restart(at)
            swapped[at] = True
            grad, now = g.grad.clone(), g.loss.clone()  # autograd may hand out views
            grad[dead], now[dead] = again.grad, again.loss
            return Grad(g.out, now, grad, draws), dead
    return g, torch.zeros(len(rows), dtype=torch.bool, device=x.device)


def absorb(total: AttackResult, new: AttackResult, rows: Tensor, by_loss: bool = True) -> AttackResult:
    """Add a run over some rows: per image the fooling point, then (``by_loss``) the higher loss; costs add up."""
    old_hit, at = total.success[rows], rows.cpu()
    take = new.success & ~old_hit
    if by_loss:
        take |= (new.success == old_hit) & (new.loss > total.loss[rows])
    won = rows[take]

    def put(old: Tensor, fresh: Tensor) -> Tensor:
        out = old.clone()
        out[won] = fresh[take]
        return out

    spent = total.backwards[at] + new.backwards
    shares = total.zero_pixels.clone()
    mine, theirs = total.backwards[at].to(shares), new.backwards.to(shares)
    shares[rows] = (shares[rows] * mine + new.zero_pixels * theirs) / spent.to(shares).clamp(min=1)
    zero = total.zero_grad.clone()
    zero[rows] |= new.zero_grad
    return replace(
        total,
        x_adv=put(total.x_adv, new.x_adv),
        success=put(total.success, new.success),
        loss=put(total.loss, new.loss),
        final_loss=put(total.final_loss, new.final_loss),
        late_gain=put(total.late_gain, new.late_gain),
        forwards=total.forwards.index_add(0, at, new.forwards),
        backwards=total.backwards.index_add(0, at, new.backwards),
        zero_grad=zero,
        zero_pixels=shares,
        notes=tuple(dict.fromkeys(total.notes + new.notes)),
    )
