"""The decoder layers of a model: which they are, which of them are of one kind, where a call of one
has its hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..probe import Probe

Layers = dict[int, nn.Module]
"""By their place among all modules that stand in lists."""


def listed_modules(model: nn.Module) -> Layers:
    """The elements of module lists that lie in no other list: decoder layers, and layers of parts
    that do not run.
    """
    found: list[tuple[str, nn.Module]] = []
    outer: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(outer):
            outer = (*outer, f"{name}.")
            found += [(f"{name}.{place}", layer) for place, layer in module.named_children()]
    return dict(enumerate(dict.fromkeys(layer for _, layer in found)))


def decoder_layers(listed: Layers, seen: Probe) -> Layers:
    """Those that hold attention which ran, and those of the same classes."""
    held = {
        i: m
        for i, m in listed.items()
        if i in seen.asked or any(id(part) in seen.linear for part in m.modules())
    }
    if not held:
        raise ValueError(
            "its attention is not in a list of layers, and the guard cannot compare it layer by"
            " layer"
        )
    return held


def one_of_each_kind(layers: Layers, seen: Probe) -> list[tuple[int, nn.Module]]:
    """The first layer of each kind: its class and those of its parts, what was installed in it, its
    attention's settings.
    """
    kinds: dict[Any, tuple[int, nn.Module]] = {}
    for index, layer in layers.items():
        parts = tuple(sorted({type(m).__name__ for m in layer.modules()}))
        trained = any(p.requires_grad for p in layer.parameters())
        kind = (
            type(layer),
            type(layer.__dict__.get("forward")),
            parts,
            frozenset(seen.asked.get(index, ())),
            trained,
        )
        kinds.setdefault(kind, (index, layer))
    return list(kinds.values())


@contextlib.contextmanager
def marked(layers: Layers, seen: Probe) -> Iterator[None]:
    """Tells the probe which layer is running. Hooks on the layer itself do not make a hand-written
    one step aside.
    """

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen.layer = index

        return hook

    def leave(*_: Any) -> None:
        seen.layer = -1

    hooks: list[RemovableHandle] = []
    for index, layer in layers.items():
        hooks += [
            layer.register_forward_pre_hook(enter(index)),
            layer.register_forward_hook(leave, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def name_of(layers: Layers, index: int) -> str:
    return (
        f"layer {index} ({type(layers[index]).__name__})"
        if index >= 0
        else "a module outside the layers"
    )


def hidden_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where a layer's call has its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    raise ValueError("a layer is called without hidden states")


def token_dim(x: Tensor, tokens: int) -> int:
    """The dimension of the tokens: the last but one, [..., T/n, h]."""
    for dim in (x.dim() - 2, *range(x.dim())):
        if dim >= 0 and x.shape[dim] == tokens:
            return dim
    raise ValueError(
        f"a layer's hidden states {tuple(x.shape)} have no dimension of the row's {tokens} tokens"
    )
