"""Gradients of a step: taken from the processes whole, and compared parameter by parameter."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory.sp.distance import distance, norm
from longfactory.train.ranks import everywhere, is_distributed
from longfactory.train.verify import alone, zero
from longfactory.train.verify.report import FLOOR, Deviation, measured


@torch.no_grad()
def stir_adapters(model: nn.Module) -> int:
    """Gives adapter matrices that are zero small random numbers, the same on every process that
    holds a copy. Returns how many.
    """
    count = 0
    for number, (name, p) in enumerate(model.named_parameters()):
        if not (p.requires_grad and ("lora_" in name or "oft_R" in name)):
            continue
        with zero.whole(p, writes=True):
            local = p.to_local() if hasattr(p, "to_local") else p
            if everywhere(not bool(local.any()), local.device):
                rank = dist.get_rank() if local is not p else 0
                generator = torch.Generator().manual_seed(1000 * number + rank)
                local.copy_(0.02 * torch.randn(local.shape, generator=generator))
                count += 1
    return count


@torch.no_grad()
def take_gradients(model: nn.Module, main: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the whole gradients by name on the host, if `main`; name -> relative difference of copies
    that are not the same on all processes). Collective."""
    out: dict[str, Tensor] = {}
    unreduced: dict[str, float] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.grad is not None and hasattr(p.grad, "full_tensor"):
            g = alone.whole(p.grad)
        else:
            g = p.grad
            if is_distributed():
                mine = torch.zeros_like(p) if g is None else g.detach().clone()
                first = mine.clone()
                dist.broadcast(first, src=0)
                numbers = torch.stack([(mine.float() - first.float()).norm(), first.float().norm()])
                dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
                difference = float(numbers[0] / numbers[1].clamp(min=1e-30))
                if not difference <= 1e-6:
                    unreduced[name] = difference
        if main and g is not None:
            out[name] = g.detach().to("cpu", torch.float32, copy=True)
    return out, unreduced


def gradient_deviations(
    found: dict[str, Tensor], expected: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[dict[str, Deviation], Deviation]:
    """(of each parameter, the worst first; of all together). A gradient that is not there is
    zero.
    """

    def off(a: dict[str, Tensor], name: str) -> float:
        x, y = a.get(name), expected.get(name)
        if y is None:
            return 0.0 if x is None else norm([x])
        return float(distance(x, y))

    names = list(dict.fromkeys([*expected, *found]))
    total = norm(expected.values())
    errors = {name: (off(found, name), off(own, name)) for name in names}
    of_all = [
        math.sqrt(sum(e[i] ** 2 for e in errors.values())) / max(total, 1e-30) for i in (0, 1)
    ]
    measures = {}
    for name in names:
        sizes = [norm([a[name]]) if name in a else 0.0 for a in (found, expected)]
        scale = max(sizes[1], FLOOR * total, 1e-30)
        mine, theirs = (e / scale for e in errors[name])
        measures[name] = measured(sizes[0], sizes[1], mine, max(theirs, of_all[1]))
    ordered = sorted(measures.items(), key=lambda item: -_worst_first(item[1]))
    whole = measured(norm(found.values()), total, of_all[0], of_all[1])
    return {plain_name(name): m for name, m in ordered}, whole


def _worst_first(m: Deviation) -> float:
    return math.inf if math.isnan(m.difference) else m.difference / max(m.allowed, 1e-30)


def scale_reasons(
    loss: Deviation, found: dict[str, Tensor], expected: dict[str, Tensor], total: Deviation
) -> list[str]:
    """A loss, or all gradients, that are a number of times what they should be. Where gradients
    differ otherwise, a loss that does too is no scale.
    """
    reasons = []
    dot = sum(
        float((found[name].double() * g.double()).sum())
        for name, g in expected.items()
        if name in found
    )
    times = dot / max(total.alone**2, 1e-30)
    rest = sum(
        float(((found[name].double() - times * g.double()) ** 2).sum())
        for name, g in expected.items()
        if name in found
    )
    same_direction = math.sqrt(rest) <= max(total.allowed, 1e-3) * abs(times) * total.alone
    if same_direction and not loss.exact and abs(loss.split / (loss.alone or 1.0) - 1) > 0.01:
        reasons.append(f"The loss is {loss.split / loss.alone:.4g} times what it should be.")
    if same_direction and abs(times - 1) > total.allowed:
        reasons.append(f"Every gradient is {times:.4g} times what it should be.")
    return reasons


def plain_name(name: str) -> str:
    return name.removeprefix("module.").replace("base_model.model.", "")


def share_reasons(
    found: dict[str, Tensor], samples: dict[int, dict[str, Tensor]], total: Deviation
) -> list[str]:
    """How many times each row counts in the gradient, where that is not once.

    Args:
        samples: [row] a few numbers of the gradient of each parameter that the row gives.
        total: of the gradient as a whole.
    """
    rows = sorted(samples)
    names = [name for name in found if any(name in samples[row] for row in rows)]
    if total.exact or len(rows) < 2 or not names:
        return []
    given = torch.cat([alone.sampled(found[name]) for name in names])
    columns = []
    for row in rows:
        nothing = [torch.zeros_like(alone.sampled(found[name])) for name in names]
        pairs = zip(names, nothing, strict=True)
        columns.append(torch.cat([samples[row].get(name, zero) for name, zero in pairs]))
    shares = torch.linalg.lstsq(torch.stack(columns, 1), given[:, None]).solution[:, 0]
    rest = (torch.stack(columns, 1) @ shares - given).norm() / given.norm().clamp(min=1e-30)
    if not float(rest) <= max(total.allowed, 1e-3) or float((shares - 1).abs().max()) < 0.003:
        return []
    counted = zip(rows, shares.tolist(), strict=True)
    told = ", ".join(f"row {row + 1} {round(share, 3) + 0:g} times" for row, share in counted)
    return [
        f"Rows count wrongly in the gradient: {told}. They are not divided by the number of "
        "items of the whole step (a mean of means), or one is lost."
    ]


def kind_reasons(parameters: dict[str, Deviation]) -> list[str]:
    """The part of parameters' names that those with a wrong gradient have in common, and no
    other.
    """
    wrong = {name for name, m in parameters.items() if not m.exact}
    right = set(parameters) - wrong
    if not wrong or not right:
        return []
    common = set.intersection(*(set(name.split(".")) for name in wrong))
    common -= {word for name in right for word in name.split(".")}
    common -= {word for word in common if word.isdigit()}
    if not common:
        return []
    return [
        f"Only the gradients of {', '.join(sorted(common))} are wrong ({len(wrong)} parameters);"
        f" those of the other {len(right)} agree."
    ]
