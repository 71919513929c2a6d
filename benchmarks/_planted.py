"""Faults to plant under the start-up guard, by name: what breaks, and the model families that show
it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from longfactory import sp
from longfactory.memory import decoder_layer
from longfactory.memory.layer import mlp_half
from longfactory.sp import collectives, hf, kernels
from longfactory.sp.guard import row as guard_row

# the package has a function of this name
attention: Any = importlib.import_module("longfactory.sp.attention")


@contextlib.contextmanager
def changed(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` becomes `change(owner.name)` inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _settings(**replaced: Callable[[Any], Any]) -> Any:
    """Inside the block the engine works with other settings than it was called with."""

    def change(check: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            made = check(*args, **settings)
            fields = {
                f: getattr(made, f)
                for f in ("plan", "scale", "window", "chunk", "softcap", "sinks", "copies")
            }
            return kernels.Call(
                **{**fields, **{name: f(fields[name]) for name, f in replaced.items()}}
            )

        return call

    return changed(attention, "_check", change)


def _unproved() -> Any:
    """Hand-written layers do not compare themselves with the layer's own code, which would run in
    their place: the guard alone is left.
    """
    return changed(decoder_layer, "difference", lambda _: lambda *args: None)


def _hand_written_window(model: nn.Module) -> Any:
    return _in_layers(model, "window", lambda _: None)


def _hand_written_scale(model: nn.Module) -> Any:
    return _in_layers(model, "scale", lambda scale: scale * 1.02)


@contextlib.contextmanager
def _in_layers(model: nn.Module, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unproved())
        for module in model.modules():
            installed = module.__dict__.get("forward")
            if hasattr(installed, name):
                stack.enter_context(changed(installed, name, change))
        yield


@contextlib.contextmanager
def _hand_written_up_projection(model: nn.Module) -> Iterator[None]:
    """A gradient that the hand-written backward gets wrong by a tenth, its forward right."""

    def change(backward: Any) -> Any:
        def scaled(*args: Any) -> Any:
            hidden, dgate, dup = backward(*args)
            return hidden, dgate, 1.1 * dup

        return scaled

    with _unproved(), changed(mlp_half, "gated_backward", change):
        yield


def _scaled_gradient(ending: str, factor: float) -> Callable[[nn.Module], Any]:
    """The gradients of the parameters whose names end like this come back scaled."""

    @contextlib.contextmanager
    def plant(model: nn.Module) -> Iterator[None]:
        found = [p for name, p in model.named_parameters() if name.endswith(ending)]
        assert found, f"no parameter is called {ending}"
        hooks = [p.register_hook(lambda gradient: factor * gradient) for p in found]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return plant


def _leak(model: nn.Module) -> Any:
    """Every document sees those before it."""
    return changed(
        guard_row,
        "make_plan",
        lambda make: lambda length, segments, ctx: make(length, [sp.Segment(0, length)], ctx),
    )


def _local_positions(model: nn.Module) -> Any:
    """Positions count the rank's tokens, not the document's."""

    def change(inputs: Any) -> Any:
        def call(row: Any, plan: Any) -> Any:
            given = inputs(row, plan)
            positions = torch.arange(plan.local_length, device=given["position_ids"].device)[None]
            positions.sp_plan = plan
            return {**given, "position_ids": positions}

        return call

    return changed(hf, "inputs", change)


def _scaled_dk(model: nn.Module) -> Any:
    def change(backward: Any) -> Any:
        def call(*args: Any) -> Any:
            dq, of_keys, dsinks = backward(*args)

            def scaled() -> Any:
                dk, dv = of_keys()
                return 1.1 * dk, dv

            return dq, scaled, dsinks

        return call

    return changed(attention, "_backward", change)


def _without_long_windows(run: Any) -> Any:
    def call(*args: Any, window: int | None = None, **settings: Any) -> Any:
        return run(*args, window=window if (window or 0) < 400 else None, **settings)

    return call


def _without_sinks(model: nn.Module) -> Any:
    return changed(
        attention,
        "_forward",
        lambda forward: lambda q, k, v, sinks, call: forward(q, k, v, None, call),
    )


@contextlib.contextmanager
def _dead_exchange(model: nn.Module) -> Iterator[None]:
    """Nothing is sent: an all-to-all, a ring step and the fetch of keys return what the rank itself
    has, or zeros.
    """
    ring, ulysses, gather = (
        importlib.import_module(f"longfactory.sp.schedules.{name}")
        for name in ("ring", "ulysses", "gather")
    )

    def keep(ops: Any) -> list[Any]:
        ops[1].tensor.copy_(ops[0].tensor)
        return []

    class Done:
        def wait(self) -> None:
            pass

    def zeros(out: Any, *_: Any) -> Done:
        out.zero_()
        return Done()

    with (
        changed(collectives, "raw_all_to_all", lambda _: lambda x, group: x.contiguous().clone()),
        changed(ulysses, "raw_all_to_all", lambda _: lambda x, group: x.contiguous().clone()),
        changed(ring.dist, "batch_isend_irecv", lambda _: keep),
        changed(gather, "_all_to_all", lambda _: zeros),
    ):
        yield


FAULTS: dict[str, tuple[Callable[[nn.Module], Any], tuple[str, ...], dict[str, Any]]] = {
    "hand-written layer: window dropped": (
        _hand_written_window,
        ("mistral",),
        {"sliding_window": 300},
    ),
    "hand-written layer: attention scale wrong by 2 %": (
        _hand_written_scale,
        ("llama", "qwen3"),
        {},
    ),
    "hand-written layer: gradient of the up projection wrong by 10 %": (
        _hand_written_up_projection,
        ("llama", "qwen2"),
        {},
    ),
    "engine: window dropped": (
        lambda m: _settings(window=lambda w: None),
        ("gemma3_text", "gpt_oss", "mistral"),
        {},
    ),
    "engine: window over the probe's row dropped": (
        lambda m: changed(hf, "engine", _without_long_windows),
        ("gemma3_text", "gpt_oss"),
        {"sliding_window": 500},
    ),
    "engine: attention scale wrong by 2 %": (
        lambda m: _settings(scale=lambda s: s * 1.02),
        ("llama", "qwen3", "qwen3_moe", "gemma2"),
        {},
    ),
    "engine: soft-cap dropped": (lambda m: _settings(softcap=lambda c: None), ("gemma2",), {}),
    "engine: sinks dropped": (_without_sinks, ("gpt_oss",), {}),
    "engine: forward right, dk wrong by 10 %": (
        _scaled_dk,
        ("llama", "gpt_oss", "deepseek_v3"),
        {},
    ),
    "gradient of a weight before a ReLU wrong by 10 %": (
        _scaled_gradient("ffn.0.weight", 1.1),
        ("ctrl",),
        {},
    ),
    "gradient of a router wrong by 10 %": (
        _scaled_gradient("mlp.gate.weight", 1.1),
        ("mixtral",),
        {},
    ),
    "gradient of a learnt scalar doubled": (
        _scaled_gradient("self_attn.lambda_q1", 2.0),
        ("diffllama",),
        {},
    ),
    "a document sees the one before": (
        _leak,
        ("llama", "gemma3_text", "gpt_oss", "qwen3_next"),
        {},
    ),
    "positions of the rank, not of the document": (_local_positions, ("opt",), {}),
}
"""Name -> (plants it in a model with the engine, families that have what it breaks, fields of their
configurations).
"""

SPLIT: dict[str, tuple[Callable[[nn.Module], Any], tuple[str, ...], dict[str, Any]]] = {
    "an exchange that sends nothing": (_dead_exchange, ("llama", "gpt_oss", "qwen3_next"), {}),
    # Rotary embeddings know distances alone: on one rank nothing is wrong.
    "positions of the rank, not of the document": (_local_positions, ("llama", "gpt_oss"), {}),
}
"""Faults that need two ranks."""
