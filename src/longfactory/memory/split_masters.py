"""fp32 master weights without loss at two bytes beside the model's own bf16 weight, and one AdamW
step of them.

The fp32 master weight is not stored: its upper half is the model's bf16 weight, and only the lower
half is kept, as a 16-bit number.

    master bits = (bf16 bits << 16) + low,   low in [-32768, 32767],
    bf16 = master rounded to nearest (a tie goes up)

So master = join(bf16, low) without loss, and the model computes with a correctly rounded weight.
The update itself is torch's fused AdamW in fp32 on blocks; on a GPU it is one Triton kernel for all
parameters, in one pass over memory (`split_kernel`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longfactory.sp.distance import worst

split_update: Callable[..., None] | None
try:
    from longfactory.memory.split_kernel import update as split_update
except ImportError:  # Triton comes with CUDA builds of PyTorch
    split_update = None

log = logging.getLogger(__name__)

# elements computed together on the host: a core's share and its scratch stay in its cache
INNER = (1 << 15) * torch.get_num_threads()


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 rounded to nearest, int16 remainder)."""
    weight, low = (
        torch.empty(master.shape, dtype=t, device=master.device)
        for t in (torch.bfloat16, torch.int16)
    )
    split_into(weight, low, master, torch.empty_like(master, dtype=torch.int32))
    return weight, low


def split_into(weight: Tensor, low: Tensor, master: Tensor, scratch: Tensor) -> None:
    bits = master.view(torch.int32)
    high = torch.add(bits, 0x8000, out=scratch).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(high)
    # the lower 16 bits, with their sign, are the remainder: bits = (high << 16) + low
    low.copy_(bits)


def join(weight: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """(bf16, int16) -> the fp32 master weight; in the memory of `out`, int32, if it is given."""
    bits = (
        torch.empty(weight.shape, dtype=torch.int32, device=weight.device) if out is None else out
    )
    return (
        bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(low).view(torch.float32)
    )


def inner_length(t: Tensor) -> int:
    return max(t.numel(), 1) if t.is_cuda else INNER


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of one parameter, [N], and what belongs to it.

    Attributes:
        weight, grad: [N]; grad in the parameter's dtype or fp32.
        low: [N] int16, the remainder of a bf16 weight; None of a weight that is its own master.
        m, v: [N], first and second moment.
        step: [], steps made, this one included.
        group: the optimizer's settings of the parameter.
        scale: what the gradient is multiplied by.
        away: the gradient is where the states are, and the weight may be elsewhere.
    """

    weight: Tensor
    grad: Tensor
    low: Tensor | None
    m: Tensor
    v: Tensor
    step: Tensor
    group: dict[str, Any]
    scale: float
    away: bool = False

    def cut(self, a: int, b: int) -> Block:
        low = self.low[a:b] if self.low is not None else None
        return dataclasses.replace(
            self,
            weight=self.weight[a:b],
            grad=self.grad[a:b],
            low=low,
            m=self.m[a:b],
            v=self.v[a:b],
        )

    def update_at(self, weight: Tensor, grad: Tensor) -> None:
        """One AdamW step of `weight`, the block's own or a copy where its states are."""
        dataclasses.replace(self, weight=weight, grad=grad).update()

    def update(self) -> None:
        """One AdamW step of tensors that are all on one device."""
        # CPU parameters with states elsewhere, or the reverse
        if self.weight.device != self.m.device:
            raise RuntimeError(
                f"SplitAdamW: states are on {self.m.device}, the parameter is on"
                f" {self.weight.device}."
            )
        n = self.weight.numel()
        inner = min(inner_length(self.weight), n)
        # Scratch is allocated once: fresh memory for each part would cost the host more than the
        # update itself.
        grads = torch.empty(inner, dtype=self.m.dtype, device=self.m.device)
        wide, spare = torch.empty(
            2, inner if self.low is not None else 0, dtype=torch.int32, device=self.m.device
        )
        for a in range(0, n, inner):
            part = self.cut(a, a + inner)
            here = len(part.weight)
            grad = grads[:here].copy_(part.grad)
            if part.scale != 1.0:
                grad.mul_(part.scale)
            master = part.weight if part.low is None else join(part.weight, part.low, wide[:here])
            _adamw(master, grad, part)
            if part.low is not None:
                split_into(part.weight, part.low, master, spare[:here])


def update_in_one_pass(
    parameters: Sequence[tuple[Tensor, ...]], group: dict[str, Any], step: float, scale: float
) -> None:
    """One AdamW step of split masters on one GPU by one call of the kernel.

    Args:
        parameters: of each its weight, remainder, gradient, first and second moment.
        group: the optimizer's settings of them.
        step: its number, from 1. scale: of the gradient.
    """
    assert split_update is not None
    split_update(
        parameters,
        step=step,
        scale=scale,
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


@functools.cache
def is_one_pass(device: torch.device) -> bool:
    """Whether the Triton kernel is there and computes what PyTorch's operations compute: tried once
    a process.
    """
    if split_update is None:
        return False
    reason = None
    try:
        far = difference_of_one_pass(device)
        if not far <= 1e-5:
            reason = f"weights are off by {far:.1e}, tolerated are 1e-5"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's many errors have no common type
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    if reason is not None:
        log.warning("AdamW of split masters runs in several passes: its kernel fails (%s).", reason)
    return reason is None


def difference_of_one_pass(device: torch.device) -> float:
    """The largest difference of masters and moments after a step, between the kernel and PyTorch's
    operations. Relative for numbers above 1; smaller ones are differences of numbers around 1, and
    have their roundings. Infinity where bf16 weights are not the rounded masters.
    """
    generator = torch.Generator().manual_seed(0)
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    step, scale = torch.tensor(3.0), 0.5
    parameters, expected = [], []
    for n, begin in ((40_000, 0), (5001, 1), (7, 0)):  # the second's memory is not aligned
        master, m, v, grad = (torch.randn(n, generator=generator).to(device) for _ in range(4))
        weight, low = (t[begin:] for t in split(master))
        m, v, grad = m[begin:], v[begin:].abs(), grad[begin:].bfloat16()
        parameters.append((weight, low, grad, m.clone(), v.clone()))
        block = Block(weight, grad, low, m, v, step, group, scale)
        wide = join(weight, low)
        _adamw(wide, grad.float() * scale, block)
        expected.append((wide, m, v))
    update_in_one_pass(parameters, group, float(step), scale)
    far = []
    for (weight, low, _, *moments), wanted in zip(parameters, expected, strict=True):
        found = join(weight, low)
        if not torch.equal(split(found)[0], weight):
            return math.inf
        for a, b in zip((found, *moments), wanted, strict=True):
            far.append(((a - b).abs() / b.abs().clamp(min=1.0)).max())
    return worst(far)


def _adamw(master: Tensor, grad: Tensor, part: Block) -> None:
    group = part.group
    torch._fused_adamw_(
        [master],
        [grad],
        [part.m],
        [part.v],
        [],
        [part.step.to(master.device)],
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
