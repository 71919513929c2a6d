"""What of a model is trained, counted and told."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from longfactory.model import experts
from longfactory.sp import hf, indexer
from longfactory.sp.routers import is_router
from longfactory.sp.text_model import Idle, idle

_OF_ADAPTER = re.compile(r"lora_|\.oft_R\.|\.modules_to_save\.")
"""In the names of what PEFT adds to a model: adapters, and copies of modules that are trained."""


def describe_trained(model: nn.Module) -> list[tuple[int, str]]:
    """What is trained and what is not, as (level of logging, line)."""
    inner = hf.unwrap(model)
    trainable, total = count_parameters(model)
    lines = [
        (
            logging.INFO,
            (
                f"Trainable parameters: {trainable:,} of {total:,}"
                f" ({100 * trainable / max(total, 1):.2f} %)"
            ),
        )
    ]
    parts, choosers = idle(inner), set(indexer.indexers(inner))
    chooses = [name for name, m in inner.named_modules() if m in choosers]
    if others := [name for name in parts.modules if name not in chooses]:
        numbers = _inside(inner, others)
        names = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        line = (
            f"Text does not pass through {names}: {numbers:,} parameters are frozen and are saved"
            " as they were loaded."
        )
        lines.append((logging.INFO, line))
    if chooses:
        line = (
            f"{len(chooses)} indexers choose the keys of each query and get no gradient: "
            f"{_inside(inner, chooses):,} parameters are frozen."
        )
        lines.append((logging.INFO, line))
    lines += _describe_adapters(inner, parts)
    return lines


def _inside(inner: nn.Module, modules: list[str]) -> int:
    """Numbers in the parameters of these modules."""
    inside = tuple(f"{name}." for name in modules)
    names = {name for name, _ in inner.named_parameters() if name.startswith(inside)}
    return count_parameters(inner, names)[1]


def _describe_adapters(inner: nn.Module, parts: Idle) -> list[tuple[int, str]]:
    """How many numbers have an adapter and which matrices have none, as (level of logging,
    line).
    """
    adapted = {
        name if parameter == "weight" else f"{name}.{parameter}"
        for name, module in inner.named_modules()
        if _adapted(module)
        for name, parameter in [_adapted_parameter(name, module)]
    }
    if not adapted:
        return []
    numbers = 0
    bare: dict[str, int] = {}
    for name, p in inner.named_parameters():
        owner, _, own = name.replace(".base_layer", "").rpartition(".")
        matrix = owner if own in ("weight", "W_q") else f"{owner}.{own}"  # W_q: a layer of hqq
        # PEFT keeps the original of a module that is trained whole
        if _OF_ADAPTER.search(name) or ".original_module." in name:
            continue
        if matrix in adapted:
            numbers += _numbers_of(p)
        elif len(experts.whole_shape(p)) > 1 and not p.requires_grad and name not in parts:
            bare[matrix] = _numbers_of(p)
    total = count_parameters(inner)[1]
    total -= sum(_numbers_of(p) for n, p in inner.named_parameters() if _OF_ADAPTER.search(n))
    lines = [
        (
            logging.INFO,
            f"Adapters: {len(adapted)} ({_counted(adapted)}), on {numbers:,} of the model's"
            f" {total:,} parameters",
        )
    ]
    if bare:
        share = 100 * sum(bare.values()) / max(total, 1)
        lines.append(
            (
                logging.INFO,
                f"No adapter on: {_counted(bare)} ({share:.2f} % of the parameters). They are "
                "frozen.",
            )
        )
    routers = {m for r in inner.modules() if is_router(r) for m in r.modules()}
    routing = {name.replace(".base_layer", "") for name, m in inner.named_modules() if m in routers}
    routed = [
        n
        for n in bare
        if re.search(r"\bexperts\b", n)
        and "bias" not in n
        and not routing & {n, n.rpartition(".")[0]}
    ]
    if routed:
        share = 100 * sum(bare[n] for n in routed) / max(total, 1)
        lines.append(
            (
                logging.WARNING,
                f"The routed experts carry no adapter: {share:.0f} % of the parameters are frozen.",
            )
        )
    return lines


def _adapted_parameter(name: str, module: Any) -> tuple[str, str]:
    """The name that an adapted module has without adapters, and which of its parameters has the
    adapter.
    """
    parameter = module.parameter_name if experts.is_wrapper(module) else "weight"
    return name.replace(".base_layer", ""), parameter


def _counted(names: Iterable[str]) -> str:
    """`4 x experts.down_proj, 4 x q_proj`: of names in numbered layers, the part behind the number,
    as short as tells them apart.
    """
    ends = Counter(re.sub(r".*\.\d+\.(?=\D)", "", name) for name in names)
    leaves = Counter(end.rsplit(".", 1)[-1] for end in ends)

    def short(end: str) -> str:
        words = end.split(".")
        if leaves[words[-1]] > 1:
            return end
        return ".".join(words[-2:] if "experts" in words[-2:-1] else words[-1:])

    return ", ".join(f"{count} x {short(end)}" for end, count in sorted(ends.items()))


def _numbers_of(p: Any) -> int:
    """How many numbers a parameter stands for: four-bit weights hold two in a byte; under ZeRO-3 a
    parameter is empty between its uses.
    """
    if hasattr(p, "stands_for"):
        return math.prod(p.stands_for)
    n = int(getattr(p, "ds_numel", p.numel()))
    if p.__class__.__name__ == "Params4bit":
        n *= 2 * p.element_size() if hasattr(p, "element_size") else 2
    return n


def _adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and bool(module.active_adapters)


def count_parameters(
    model: nn.Module, names: frozenset[str] | set[str] | None = None
) -> tuple[int, int]:
    """(trainable, all), of `names` alone where given. Four-bit weights count as the numbers that
    they stand for.
    """
    trainable = total = 0
    for name, p in model.named_parameters():
        if names is not None and name not in names:
            continue
        n = _numbers_of(p)
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total
