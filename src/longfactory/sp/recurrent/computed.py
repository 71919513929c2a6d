"""Some heads of a recurrence: by Triton where it computes them and is right, else by PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from .checked import are_right
from .fragments import Chunks, Fragment, Fragments
from .rule import CHUNK, Kind, Rule
from .states import Changes, changes, reverse, scan
from .within import Within, within

log = logging.getLogger(__name__)

WIDEST = 256
"""Channels of keys, and of values, of a head that kernels take."""

NARROW = 16
"""Channels up to which a head's products in float32 are without tensor cores."""

_INPUTS = ("first state", "q", "k", "v", "g", "beta", "skip")
RESULTS = ("output", "state", "matrix", *(f"gradient of {name}" for name in _INPUTS))
"""The names of `results`."""


def by_kernels(inputs: list[Tensor], rule: Rule, skip: bool = False) -> bool:
    """Whether Triton computes a recurrence of these: it can, and is right on this device.

    Args:
        skip: values are added to the outputs, by kernels of their own.
    """
    _, k, v, g, _ = inputs
    kernels = _kernels()
    if kernels is None or not kernels.runs_on(v.device) or v.dtype == torch.float64:
        return False
    if max(k.shape[2], v.shape[2]) > WIDEST:
        _say_too_wide(k.shape[2], v.shape[2])
        return False
    return _are_right(v.device, v.dtype, rule.kind, k.shape[2], v.shape[2], g.dim() == 3, skip)


@functools.cache
def _say_too_wide(key_dim: int, value_dim: int) -> None:
    """Once a process for each kind of call."""
    log.warning(
        "A recurrence with keys of %d and values of %d runs in PyTorch, slowly: LongFactory's"
        " Triton kernels take at most %d.",
        key_dim,
        value_dim,
        WIDEST,
    )


@functools.cache
def _are_right(
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind,
    key_dim: int,
    value_dim: int,
    per_channel: bool,
    skip: bool,
) -> bool:
    """Computes two short documents by the kernels, forward and backward, and compares. Once a
    process for each kind of call.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device)

    tokens, rule = 96, Rule(kind, key_dim**-0.5, normalize=kind == "delta")
    # Triton compiles for strides that 16 divides, as those of a model are: the run's own kernels.
    heads = 16
    both = (
        Fragment(0, 0, 70, 0, -1),
        Fragment(0, 70, tokens - 70, 70, -1),
    )
    chunks = Fragments(both, 0, 1, tokens).chunks(CHUNK, device)
    low = [normal(tokens, 1, key_dim), normal(tokens, 1, key_dim), normal(tokens, heads, value_dim)]
    decays = (tokens, heads, key_dim) if per_channel else (tokens, heads)
    gates = [-0.2 * normal(*decays).square(), normal(tokens, heads).sigmoid()]
    inputs = [*(x.to(dtype) for x in low), *gates]
    first, after = normal(2, 2, heads, key_dim, value_dim)
    slope = normal(tokens, heads, value_dim).to(dtype)
    factors = normal(heads) if skip else None

    def kernels() -> list[Tensor]:
        return results(inputs, rule, chunks, first, slope, after, True, factors)

    def expected() -> list[Tensor]:
        wide = [x.double() for x in inputs]
        given = first.double(), slope.double(), after.double()
        return results(
            wide, rule, chunks, *given, False, None if factors is None else factors.double()
        )

    what = f"A {kind} recurrence with keys of {key_dim} and values of {value_dim} runs"
    if per_channel:
        what = what.replace(" with", " with a decay of each channel,")
    return are_right(what, kernels, expected, dtype, RESULTS)


def results(
    inputs: list[Tensor],
    rule: Rule,
    chunks: Chunks,
    first: Tensor,
    slope: Tensor,
    after: Tensor,
    kernels: bool,
    skip: Tensor | None = None,
) -> list[Tensor]:
    """All that is computed of some heads, and every gradient: what `_are_right` compares."""
    out = torch.empty_like(inputs[2])
    made = make(inputs, rule, chunks, kernels)
    forward(made, chunks, first, out, inputs[2], skip)
    found = changes_of(made, chunks, [0, 1])
    own = slopes(made, chunks, slope)
    start = first_gradients(made, chunks, *own)
    job = made if kernels else None
    rest = gradients(inputs, rule, chunks, first, slope, after.clone(), job, own, skip)
    return [out, found.state, found.matrix, start, *rest]


def make(inputs: list[Tensor], rule: Rule, chunks: Chunks, kernels: bool) -> Any:
    """What the chunks of these heads need of their own tokens: a job of Triton, or `Within`."""
    return _job(inputs, rule, chunks) if kernels else _within(inputs, rule, chunks)


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import chunk_kernels

    return chunk_kernels


def _job(inputs: list[Tensor], rule: Rule, chunks: Chunks) -> Any:
    from . import unit_kernels

    q, k, v, g, beta = inputs
    eps = rule.eps if rule.normalize else None
    q, k = unit_kernels.scaled(q, rule.scale, eps), unit_kernels.scaled(k, 1.0, eps)
    precision = precision_of(v.dtype, k.shape[2], v.shape[2])
    return _kernels().Job(q, k, v, g, beta, chunks, rule.kind == "delta", precision)


def precision_of(dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """Of the kernels' products, in Triton's words.

    Three products of TF32 have nearly float32's precision. Of heads as narrow as Mamba 1's (keys of
    16, values of 1) ptxas 12.8, the assembler that Triton 3.6 brings, makes wrong code for sm_90:
    `chunk_value_gradients` reads a product's shared memory at an address that was never set. Those
    are multiplied without tensor cores, which would compute mostly padding.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if min(key_dim, value_dim) > NARROW else "ieee"


def forward(
    made: Any, chunks: Chunks, first: Tensor, out: Tensor, v: Tensor, skip: Tensor | None
) -> None:
    """Writes the outputs [T/n, h, Dv]."""
    if not isinstance(made, Within):
        states, written, _ = made.scan(first)
        made.outputs(states, written, out, skip)
        return
    states, written, _ = scan(made, chunks.steps, first)
    out.copy_(_outputs(made, states, written, chunks, v, skip))


def changes_of(made: Any, chunks: Chunks, chosen: list[int]) -> Changes:
    if not isinstance(made, Within):
        return Changes(*made.changes(chosen))
    return changes(made, chunks, chosen)


def slopes(made: Any, chunks: Chunks, grad: Tensor) -> list[Tensor]:
    """Gradients of the states before the chunks and of what they write, by their outputs alone."""
    if not isinstance(made, Within):
        return list(made.output_gradients(grad))
    d_out = chunks.laid_out(grad).unflatten(0, (chunks.count, chunks.size))
    d_out = d_out.transpose(1, 2).to(made.u.dtype)
    return [made.qd.transpose(-1, -2) @ d_out, made.p.transpose(-1, -2) @ d_out]


def first_gradients(made: Any, chunks: Chunks, d_states: Tensor, d_written: Tensor) -> Tensor:
    """[F, h, Dk, Dv] gradients of the states from which fragments start, by their own outputs, in
    the order of the chunks' fragments.
    """
    d_ends = d_states.new_zeros(len(chunks.order), *d_states.shape[1:])
    if not isinstance(made, Within):
        found: Tensor = made.reverse(d_states, d_written, d_ends, keep=False)[2]
        return found
    return reverse(made.kd, made.w, made.decay, d_states, d_written, d_ends, chunks.steps)[2]


def gradients(
    inputs: list[Tensor],
    rule: Rule,
    chunks: Chunks,
    first: Tensor,
    grad: Tensor,
    d_after: Tensor,
    job: Any,
    slopes: list[Tensor] | None,
    skip: Tensor | None,
) -> tuple[Tensor, ...]:
    """Of the inputs, and of `skip` where there is one, from those of the outputs and of the states
    after the fragments.

    Args:
        job: of the kernels, which cannot be used again after it; None: by PyTorch.
        slopes: `slopes`, if they are known; taken out of the list, so that their memory is free
            for the inputs' gradients.
    """
    if job is not None:
        from . import unit_kernels

        q, k = inputs[:2]
        eps = rule.eps if rule.normalize else None
        states, written, _ = job.scan(first)
        if slopes is None:
            slopes = list(job.output_gradients(grad))
        after, d_values, _ = job.reverse(slopes.pop(0), slopes.pop(0), d_after)
        dq, dk, *others = job.input_gradients(grad, states, written, after, d_values, skip)
        dq = unit_kernels.scaled_gradients(q, dq, rule.scale, eps)
        dk = unit_kernels.scaled_gradients(k, dk, 1.0, eps)
        return (dq, dk, *others)
    more = [] if skip is None else [skip]
    leaves = [x.detach().requires_grad_() for x in (*inputs, *more)]
    with torch.enable_grad():
        x = _within(leaves[:5], rule, chunks)
        states, written, after = scan(x, chunks.steps, first)
        out = _outputs(x, states, written, chunks, leaves[2], leaves[5] if more else None)
    return torch.autograd.grad([out, after], leaves, [grad.to(out.dtype), d_after])


def _within(inputs: list[Tensor], rule: Rule, chunks: Chunks) -> Within:
    # [T/n, h, ...] -> [N, C, h, ...]
    shape = (chunks.count, chunks.size)
    q, k, v, g, beta = (chunks.laid_out(x).unflatten(0, shape) for x in inputs)
    return within(q, k, v, g, beta, rule)


def _outputs(
    x: Within, states: Tensor, written: Tensor, chunks: Chunks, v: Tensor, skip: Tensor | None
) -> Tensor:
    """-> [T/n, h, Dv]."""
    out = x.qd @ states + x.p @ written
    out = chunks.taken_back(out.transpose(1, 2).flatten(0, 1))
    return out if skip is None else out + skip[:, None] * v.to(out.dtype)
