"""Published implementations of sequence-parallel attention, from their own packages, for the rows
beside ours.

    pip install --no-deps ring-flash-attn yunchang

Neither package is needed: a row of one that is missing says so. Both call the private functions of
flash-attn, which has no wheel. While they are imported they find a stand-in for it, whose functions
call the FlashAttention 2 that comes with PyTorch (on CPUs, PyTorch's CPU operator). Afterwards the
stand-in is gone from `sys.modules`, so that nothing else in the process takes it for flash-attn.
What it adds to their time is one copy of each kernel's gradients into the tensors that they pass
for them: some 0.5 % of a backward pass at 16k rows, by their bytes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

aten = torch.ops.aten

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [s, H, D], k, v [s, Hk, D] of this rank -> out [s, H, D], differentiable."""

MODULES = {"ring-flash-attn": "ring_flash_attn", "yunchang": "yunchang"}


def version(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(package: str) -> str:
    return f"package not installed (pip install --no-deps {package})"


@functools.cache
def load(package: str) -> Any:
    """The package's module, imported over the stand-in.

    Raises:
        ImportError: it is not installed.
    """
    with _stand_in():
        return importlib.import_module(MODULES[package])


# --- one document: the whole row is causal --------------------------------------------------------


def zigzag(group: dist.ProcessGroup) -> Attention:
    """ring-flash-attn's zigzag ring. Rank r of n holds chunks r and 2n - 1 - r."""
    function = load("ring-flash-attn").zigzag_ring_flash_attn_func
    return lambda q, k, v: function(q[None], k[None], v[None], causal=True, group=group)[0]


def ulysses(group: dist.ProcessGroup) -> Attention:
    """yunchang's exchange of heads. Rank r holds the r-th of n equal parts."""
    module = load("yunchang").UlyssesAttention(group)
    return lambda q, k, v: module(q[None], k[None], v[None], causal=True)[0]


# --- packed rows ----------------------------------------------------------------------------------


def zigzag_varlen(group: dist.ProcessGroup, cu_seqlens: Tensor, longest: int) -> Attention:
    """ring-flash-attn's zigzag ring of each document. `cu_seqlens`, `longest`: of this rank's rows,
    int32 on the device.
    """
    function = load("ring-flash-attn").zigzag_ring_flash_attn_varlen_func
    return lambda q, k, v: function(q, k, v, cu_seqlens, longest, causal=True, group=group)


def llama3(group: dist.ProcessGroup, cu_seqlens: Tensor, kv_heads: int) -> Attention:
    """ring-flash-attn's all-gather of keys, 4 key heads at a time as in its own benchmark.
    `cu_seqlens`: of the whole row.
    """
    package = load("ring-flash-attn")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cu_q, cu_k, longest_q, longest_k, rows = package.llama3_flash_attn_prepare_cu_seqlens(
        cu_seqlens, True, rank, size
    )
    settings = {
        "heads_k_stride": math.gcd(4, kv_heads),
        "local_k_slice": rows,
        "causal": True,
        "group": group,
    }
    function = package.llama3_flash_attn_varlen_func
    return lambda q, k, v: function(q, k, v, cu_q, cu_k, longest_q, longest_k, **settings)


# --- flash-attn 2.8's functions over PyTorch's operators ------------------------------------------


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    for function in (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
        flash_attn_func,
    ):
        setattr(interface, function.__name__, function)
    package = types.ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    package.flash_attn_func = flash_attn_func
    package.flash_attn_interface = interface
    # What patches transformers is not used, and would import it with the stand-in in place.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    modules = {m.__name__: m for m in (package, interface, adapters)}
    before = {name: sys.modules.get(name) for name in modules}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def _plain(
    dropout_p: float, left: int, right: int, softcap: float | None, alibi: Tensor | None
) -> None:
    if dropout_p or softcap or alibi is not None or (left, right) != (-1, -1):
        raise NotImplementedError(
            "The stand-in for flash-attn has no dropout, window, soft-cap or slopes."
        )


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """q [B, S, H, D] -> out, lse [B, H, S] float32."""
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.is_cuda:
        sides = (None, None, q.shape[1], k.shape[1])
        out, lse = aten._flash_attention_forward(
            q, k, v, *sides, 0.0, causal, False, scale=softmax_scale
        )[:2]
    else:
        out, lse = _cpu_forward(q, k, v, softmax_scale, causal)
    return out, lse, None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Fills dq, dk, dv."""
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.is_cuda:
        sides = (None, None, q.shape[1], k.shape[1])
        grads = aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse.contiguous(),
            *sides,
            0.0,
            causal,
            *_no_random_state(q),
            scale=softmax_scale,
        )
    else:
        grads = _cpu_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """q [T, H, D] -> out, lse [H, T] float32."""
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.is_cuda:
        sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = aten._flash_attention_forward(
            q, k, v, *sides, 0.0, causal, False, scale=softmax_scale
        )[:2]
        return out, lse, None, None
    parts = [
        _cpu_forward(q[None, i], k[None, j], v[None, j], softmax_scale, causal)
        for i, j in _documents(cu_seqlens_q, cu_seqlens_k)
    ]
    return (
        torch.cat([out[0] for out, _ in parts]),
        torch.cat([lse[0] for _, lse in parts], 1),
        None,
        None,
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Fills dq, dk, dv."""
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.is_cuda:
        sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse.contiguous(),
            *sides,
            0.0,
            causal,
            *_no_random_state(q),
            scale=softmax_scale,
        )
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return
    for i, j in _documents(cu_seqlens_q, cu_seqlens_k):
        tensors = (
            dout[None, i],
            q[None, i],
            k[None, j],
            v[None, j],
            out[None, i],
            softmax_lse[None, :, i],
        )
        grads = _cpu_backward(*tensors, softmax_scale, causal)
        for into, grad in zip((dq[i], dk[j], dv[j]), grads, strict=True):
            into.copy_(grad[0])


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _flash_attn_backward(
            dout, q, k, v, out, lse, *grads, 0.0, *ctx.settings, -1, -1, 0.0, None, False
        )
        return (*grads, None, None)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    _plain(dropout_p, *window_size, softcap, alibi_slopes)
    return _FlashAttention.apply(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal)


def _no_random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    # Never read without dropout, but the operator wants them.
    return torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(
        (), dtype=torch.uint64, device=q.device
    )


def _documents(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    edges = list(zip(cu_q.tolist(), cu_k.tolist(), strict=True))
    return [(slice(a, b), slice(c, d)) for (a, c), (b, d) in itertools.pairwise(edges)]


def _cpu_mask(q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """flash-attn's causal mask ends at the last key for the last query, also where there are more
    keys than queries.
    """
    if not causal:
        return None
    n, m = q.shape[1], k.shape[1]
    return torch.zeros(n, m, dtype=q.dtype).masked_fill_(
        torch.ones(n, m, dtype=torch.bool).triu_(m - n + 1), -math.inf
    )


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)),
        0.0,
        False,
        attn_mask=_cpu_mask(q, k, causal),
        scale=scale,
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
        lse,
        0.0,
        False,
        attn_mask=_cpu_mask(q, k, causal),
        scale=scale,
    )
    return tuple(g.transpose(1, 2) for g in grads)
