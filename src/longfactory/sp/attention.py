"""Attention of a sharded row: exact, differentiable, with a hand-written backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from . import probe, replay
from .kernels import Call, KeyGradients
from .plan import RowPlan
from .schedules import gather, ring, ulysses


class Settings(TypedDict, total=False):
    """What may be asked for by name, as `attention` has it."""

    scale: float | None
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RowPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T + mask) v over the whole row, for this rank's queries. Collective over
    the sequence-parallel group.

    Args:
        q: [T/n, H, D]. k: [T/n, Hk, D]. v: [T/n, Hk, Dv]. One dtype; H a multiple of Hk. Rows in
            the plan's local order.
        scale: 1 / sqrt(D) by default.
        window: keys that a query sees, itself included, counted in positions of its document
            (transformers' `sliding_window`).
        chunk: a query sees only keys in its own chunk of so many positions (Llama 4's
            `attention_chunk_size`).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [H], one more score for each head that takes probability and gives nothing (gpt-oss).
        dropout_p: only 0.

    Returns:
        [T/n, H, Dv], in q's dtype; under autocast in autocast's.

    Raises:
        ValueError: shapes, dtypes or head counts that do not fit, before any message is sent.
        NotImplementedError: attention dropout.
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        # As PyTorch's own attention under autocast: rotary embeddings may have left queries and
        # keys in float32.
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    call = _check(
        q,
        k,
        v,
        plan,
        scale=scale,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    with torch.autocast(kind, enabled=False):
        return _Attention.apply(q, k, v, sinks, call)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RowPlan,
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor]:
    """`attention` without autograd, by the same arguments, and the log-sum-exp that
    `attention_backward` needs.

    Returns out [T/n, H, Dv] and lse [H, T/n], natural logarithm, float32 (float64 for float64), the
    sinks included.
    """
    call = _check(q, k, v, plan, **settings)
    with torch.no_grad():
        out, lse, _ = _forward(q, k, v, settings.get("sinks"), call)
        # [H/u, u * T/n] -> [H, T/n]
        lse = ulysses.to_rows(lse.t().unsqueeze(-1), plan.axes.ulysses).squeeze(-1).t().contiguous()
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: RowPlan,
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks of `attention_forward`, in the inputs' dtypes. dsinks is this rank's
    share: the gradient is its sum over ranks.

    Heads are independent: a call with some of the heads, their share of out and lse, and their key
    heads gives those heads' gradients.

    Args:
        dout: [T/n, H, Dv], the gradient of out.
        q, k, v, plan, settings: as of the forward pass.
        out, lse: what that gave.
    Raises:
        ValueError: as `attention`; out, dout and lse that do not belong to q.
    """
    dq, of_keys, dsinks = attention_backward_in_parts(dout, q, k, v, out, lse, plan, **settings)
    return dq, *of_keys(), dsinks


def attention_backward_in_parts(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: RowPlan,
    **settings: Unpack[Settings],
) -> tuple[Tensor, KeyGradients, Tensor | None]:
    """`attention_backward` for a caller that has something to compute of dq alone: dk and dv come
    of a function, which waits for the parts that other ranks have computed. It is called once: what
    it needs is given up then.
    """
    call = _check(q, k, v, plan, **settings)
    if (
        lse.shape != (q.shape[1], q.shape[0])
        or out.shape != (*q.shape[:2], v.shape[2])
        or dout.shape != out.shape
    ):
        raise ValueError(
            f"out {tuple(out.shape)}, dout {tuple(dout.shape)}, lse {tuple(lse.shape)} do not"
            f" belong to q {tuple(q.shape)}."
        )
    with torch.no_grad():
        # [H, T/n] -> [H/u, u * T/n]
        lse = (
            ulysses.to_heads(lse.t().unsqueeze(-1), plan.axes.ulysses).squeeze(-1).t().contiguous()
        )
        return _backward(dout, _to_heads(q, k, v, out, call), lse, settings.get("sinks"), call)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """out [T/n, H, Dv], lse, and (q, k, v, out) as the schedule holds them between its exchanges of
    heads.
    """
    plan = call.plan
    schedule = _schedule(call)
    hq, hk, hv, _ = _to_heads(q, k, v, None, call)
    total, lse = schedule.forward(hq, hk, hv, call)
    if sinks is not None:
        # One more score with no value: it changes the sum of exponentials only. P and rowsum(dout *
        # out) of the backward stay exact.
        mine = _own_sinks(sinks, call).to(lse.dtype).unsqueeze(1)
        total = total * torch.sigmoid(lse - mine).t().unsqueeze(-1).to(total.dtype)
        lse = torch.logaddexp(lse, mine)
    held = total.to(q.dtype)
    out = ulysses.to_rows(held, plan.axes.ulysses)
    return out, lse, (hq, hk, hv, held)


def _backward(
    dout: Tensor, held: tuple[Tensor, ...], lse: Tensor, sinks: Tensor | None, call: Call
) -> tuple[Tensor, KeyGradients, Tensor | None]:
    plan = call.plan
    group = plan.axes.ulysses
    schedule = _schedule(call)
    q, k, v, out = held
    dout = ulysses.to_heads(dout, group)
    dq, of_keys = schedule.backward(dout, q, k, v, out, lse, call)
    dsinks = None
    if sinks is not None:
        mine = _own_sinks(sinks, call).to(lse.dtype).unsqueeze(1)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
        dsinks = torch.zeros_like(sinks)
        _own_sinks(dsinks, call).copy_(-(torch.exp(mine - lse) * delta).sum(1))
    dq = ulysses.to_rows(dq.to(q.dtype), group)
    dtypes = k.dtype, v.dtype

    @torch.no_grad()
    def in_rows() -> tuple[Tensor, Tensor]:
        dk, dv = (ulysses.to_rows(g, group, call.copies) for g in of_keys())
        return dk.to(dtypes[0]), dv.to(dtypes[1])

    return dq, in_rows, dsinks


def _schedule(call: Call) -> ModuleType:
    """A ring passes everything to everyone; where windows or documents leave little to pass, the
    little is fetched.
    """
    return gather if call.plan.choice.exchange == "gather" or call.mask.fetch_is_smaller else ring


def _to_heads(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, call: Call
) -> tuple[Tensor, ...]:
    group = call.plan.axes.ulysses
    held = (
        ulysses.to_heads(q, group),
        ulysses.to_heads(k, group, call.copies),
        ulysses.to_heads(v, group, call.copies),
    )
    return (*held, ulysses.to_heads(out, group) if out is not None else q)


def _own_sinks(sinks: Tensor, call: Call) -> Tensor:
    degree = call.plan.choice.ulysses
    return sinks.view(degree, -1)[call.plan.ctx.rank % degree]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call
    ) -> Tensor:
        replayed = replay.kept()
        if replayed is not None:
            out, lse = replayed
            if out.shape != (*q.shape[:2], v.shape[2]):
                raise RuntimeError(
                    f"sp.keep: the recompute asks for {tuple(q.shape)}, the forward pass kept"
                    f" {tuple(out.shape)}."
                )
        else:
            out, lse, held = _forward(q, k, v, sinks, call)
            replay.record(out, lse)
        # A recompute must save what the first pass saved, and a replay has exchanged no heads.
        ctx.local = replay.active()
        if ctx.local:
            held = (q, k, v, out)
        ctx.call = call
        ctx.save_for_backward(*held, lse, sinks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        held = _to_heads(q, k, v, out, ctx.call) if ctx.local else (q, k, v, out)
        with torch.autocast(q.device.type, enabled=False):
            dq, of_keys, dsinks = _backward(dout, held, lse, sinks, ctx.call)
            dk, dv = of_keys()
        return dq, dk, dv, dsinks, None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RowPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Call:
    """Everything that could fail on one rank only, or in the middle of an exchange, fails here."""
    if dropout_p:
        raise NotImplementedError(
            f"Attention dropout ({dropout_p}) has no exact form when a row is sharded over ranks."
            " Set attention_dropout: 0."
        )
    if not (
        q.dim() == k.dim() == v.dim() == 3
        and q.shape[2] == k.shape[2]
        and k.shape[:2] == v.shape[:2]
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: needed [T/n, H, D], [T/n,"
            " Hk, D], [T/n, Hk, Dv]."
        )
    if q.shape[0] != plan.local_length or k.shape[0] != plan.local_length:
        raise ValueError(
            f"The plan gives this rank {plan.local_length} tokens, q has {q.shape[0]} and k"
            f" {k.shape[0]}."
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}. Attention needs one dtype.")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks have shape {tuple(sinks.shape)}, needed ({heads},).")
    for name, size in (("window", window), ("chunk", chunk)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: needed a positive number of tokens, or None.")
    ulysses.check(heads, kv_heads, plan.choice.ulysses)
    copies = ulysses.copies(heads, kv_heads, plan.choice.ulysses)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if (seen := probe.current()) is not None:
        asked = probe.settings(scale, window, chunk, softcap, sinks)
        seen.arrived[seen.layer].add(asked)
        seen.kernels.add((asked, probe.Shape(heads, kv_heads, q.shape[2], v.shape[2], q.dtype)))
    return Call(plan, scale, window, chunk, softcap or None, sinks is not None, copies)
