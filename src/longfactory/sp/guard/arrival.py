"""Pass 1: what the model asks of its attention and of its masks is what arrives at the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import hf, rope
from ..probe import Asked, Probe
from ..recurrent import layers as recurrent
from .fixed import WINDOW
from .layers import Layers, name_of
from .words import text_of


class Executed:
    """Attention modules, by their class name, that ran inside the block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules: dict[int, tuple[str, nn.Module]] = {}
        self._candidates = [
            (n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Attention")
        ]

    def __enter__(self) -> Executed:
        self._hooks = [m.register_forward_pre_hook(self._note(n)) for n, m in self._candidates]
        return self

    def _note(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.modules[id(module)] = (name, module)

        return hook

    def __exit__(self, *error: object) -> None:
        for h in self._hooks:
            h.remove()

    def missed(self, reached: set[int]) -> list[str]:
        """Names of those that neither called the attention function nor hold or belong to a module
        that did.
        """
        names = [n for i, (n, _) in self.modules.items() if i in reached]
        return [
            name
            for i, (name, module) in self.modules.items()
            if not any(id(m) in reached for m in module.modules())
            and not any(name.startswith(n + ".") for n in names)
        ]


def not_reached(model: PreTrainedModel, seen: Probe, executed: Executed) -> str | None:
    """A layer or a window that did not arrive at the engine."""
    if not seen.linear and recurrent.mixers(model):
        return recurrent.NOT_REACHED
    if not seen.calls and not seen.linear:
        return "none of its layers pass through transformers' attention registry"
    if missed := executed.missed(seen.modules | seen.linear):
        return (
            f"{len(missed)} of its attention layers do not pass through transformers' attention"
            f" registry ({missed[0]})"
        )
    types = hf.layer_types(model.config.get_text_config())
    wanted = sum(t in recurrent.LAYERS for t in types)
    if len(seen.linear) < wanted:
        return (
            f"{len(seen.linear)} of its {wanted} recurrent layers are computed over the whole row"
        )
    asked = {size for kind, size in seen.masks if kind == "window"}
    if wrong := seen.windows - asked:
        return (
            f"its attention names a sliding window of {min(wrong)} tokens that its own mask does"
            " not have"
        )
    if asked - seen.windows and not set(types) <= {"full_attention", *recurrent.LAYERS}:
        return (
            f"its sliding window of {min(asked - seen.windows)} tokens does not reach the attention"
            " function"
        )
    if rope.depends_on_length(model) and not seen.rows:
        return "its rotary frequencies depend on the length of the row, which does not reach them"
    return None


def not_arrived(seen: Probe, layers: Layers) -> str | None:
    """A setting that a layer gave to the attention function and the engine did not get."""
    for index in seen.asked:
        if different := _settings(seen.asked[index], seen.arrived[index]):
            return (
                f"the attention of {name_of(layers, index)} asks for {different[0]} and the engine"
                f" is called with {different[1]}"
            )
    return None


def differently_installed(seen: Probe, trained: Probe, layers: Layers) -> str | None:
    """A setting that the installed layer gives to the engine, in its forward or in its backward,
    and that the model does not ask for.
    """
    asked = {index: {_lowered(a) for a in seen.asked[index]} for index in seen.asked}
    for index, wanted in asked.items():
        if different := _settings(wanted, trained.arrived[index]):
            what = (
                f"its attention asks for {different[0]} and the engine is called with"
                f" {different[1]}"
            )
            return (
                f"{name_of(layers, index)}, as it is trained, differs from transformers' "
                f"layer: {what}"
            )
    every = set().union(*asked.values())
    if extra := {a for a in trained.arrived[-1] if _rounded(a) not in {_rounded(e) for e in every}}:
        return f"the backward pass calls the engine with {text_of(extra)}, which no layer asks for"
    return None


def _settings(wanted: set[Asked], found: set[Asked]) -> tuple[str, str] | None:
    same = {_rounded(a) for a in wanted} == {_rounded(a) for a in found}
    return None if same else (text_of(wanted), text_of(found))


def _rounded(a: Asked) -> Asked:
    return a._replace(scale=float(f"{a.scale:.6g}"))


def _lowered(a: Asked) -> Asked:
    return a._replace(
        window=a.window and min(a.window, WINDOW), chunk=a.chunk and min(a.chunk, WINDOW)
    )
