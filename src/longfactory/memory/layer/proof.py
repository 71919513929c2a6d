"""The hand-written function of a layer against the layer's own code, once for each kind of layer of
a model: forward and backward on a few random tokens, with the layer's own weights, in the run's
precision.

What is far is told by the layer itself: the difference that the written function makes is compared
with the one that moving the input by a rounding makes. (The start-up guard compares more finely,
with a computation in a wider type, and what it refuses does not run at all.) What attention was
asked for is compared too: few tokens do not show a window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longfactory import sp
from longfactory.memory import chunked
from longfactory.memory.layer.passes import backward, forward
from longfactory.sp import routers
from longfactory.sp.context import Axes
from longfactory.sp.position import trial
from longfactory.sp.probe import probe

TOKENS = 32
MOVED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""How far inputs are moved, of their size; in wider types by `MOVED_WIDE`: norms and rotary angles
of transformers are computed in float32, and products in TF32 on GPUs."""
MOVED_WIDE = {"cpu": 1e-5, "cuda": 1e-3}
TIMES = 10.0
"""So many times as far as the moved input's results is tolerated."""
TOKEN_INPUT = "the token's own input"
"""Its name among the gradients."""


def difference(owner: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What the hand-written function gives that the layer's own code does not; None where both give
    the same. Not collective.

    Args:
        owner: a `DecoderLayer`.
        x, args, kwargs: a call of the layer: rotary embeddings of its first tokens are used.
    Raises:
        torch.OutOfMemoryError: in the comparison.
    """
    total = x.shape[1]
    alignment = 128 if x.is_cuda else 1
    length = min(total, max(TOKENS, alignment))
    plan = _plan(length, x.device.type, kwargs["sp_plan"].ctx.backend)
    rest = [_first(a, total, length, plan) for a in args[1:]]
    named = {n: _first(a, total, length, plan) for n, a in kwargs.items() if n != "hidden_states"}
    named["sp_plan"] = plan
    draw = torch.Generator().manual_seed(3)
    given, slope, moves = (
        torch.randn(1, length, x.shape[2], generator=draw).to(x.device, x.dtype) for _ in range(3)
    )
    moved = MOVED.get(x.dtype, MOVED_WIDE.get(x.device.type, 1e-3))
    weights, _ = owner.weights()
    trained = {n: w for n, w in weights.items() if w is not None and w.requires_grad}
    own_input = owner.token_input((x, *rest), named)
    if own_input is not None:
        own_input = own_input.detach().clone().requires_grad_()
        rest = [own_input, *rest[1:]]
        named.pop("per_layer_input", None)
        trained[TOKEN_INPUT] = own_input

    def own(point: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad(), chunked.whole():
            leaf = point.clone().requires_grad_()
            y = owner.forward(leaf, *rest, **named)
            y = y[0] if isinstance(y, tuple) else y
        grads = torch.autograd.grad(y, [leaf, *trained.values()], slope, allow_unused=True)
        return _results(y, point, grads[0], slope, dict(zip(trained, grads[1:], strict=True)))

    def written(point: Tensor) -> dict[str, Tensor]:
        call = owner.call(plan, named, own_input)
        if own_input is not None:
            call.token_gradient = torch.empty_like(own_input[0])
        y, out, lse = forward(point[0], call)
        needed = [n in trained for n in call.names]
        dx = torch.empty_like(point[0])
        grads = backward(point[0], slope[0], dx, [(out, lse)], call, needed)
        every = dict(zip(call.names, grads, strict=True)) | {TOKEN_INPUT: call.token_gradient}
        return _results(y[None], point, dx[None], slope, {n: every[n] for n in trained})

    try:
        with trial():  # what counts tokens of a row does not count these
            with probe(installed=True) as asked, routers.record(owner.layer) as choices:
                wanted = own(given)
            with routers.replay(owner.layer, choices):
                near = own(given * (1 + moved * moves))
                with probe(installed=True) as arrived:
                    found = written(given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a changed module does
        return (
            f"it cannot be compared with the hand-written layer ({type(error).__name__}: {error})"
        )
    if asked.arrived[-1] != arrived.arrived[-1]:
        return (
            f"its attention asks for {sorted(asked.arrived[-1])}, the hand-written layer for"
            f" {sorted(arrived.arrived[-1])}"
        )
    for name, value in wanted.items():
        limit = TIMES * _distance(near[name], value) + moved * float(value.double().norm())
        far = _distance(found[name], value)
        if not far <= limit:
            return (
                f"the hand-written layer's {name} differs from its own by {far:.2e}, tolerated"
                f" are {limit:.2e}"
            )
    return None


def _results(
    y: Tensor, x: Tensor, dx: Tensor, slope: Tensor, grads: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Without what goes past the layer: its residual would hide the rest."""
    named = {f"gradient of {n}": g for n, g in grads.items() if g is not None}
    return {"output": (y - x).detach(), "gradient of the input": dx - slope, **named}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm())


def _plan(length: int, device: str, backend: str) -> Any:
    """Of two documents on this process alone. Making the context by itself is no collective."""
    ctx = sp.SequenceParallel(device_type=device, backend=backend, axes={1: Axes(None, None)})
    first = math.ceil(length / 3)
    segments = [sp.Segment(0, first), sp.Segment(first, length)]
    return sp.plan(length, segments if length > first else None, ctx)


def _first(given: Any, total: int, length: int, plan: Any) -> Any:
    """What belongs to the first tokens of a call's argument."""
    if isinstance(given, (tuple, list)):
        return type(given)(_first(g, total, length, plan) for g in given)
    if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[1] != total:
        return given
    part = given[:, :length]
    if not part.is_floating_point():
        part.sp_plan = plan  # type: ignore[attr-defined]
    return part
