"""Linear recurrences in chunks, for all documents of a row at once and over all ranks.

    S_t = a_t S_{t-1} + k_t (beta_t v_t)^T                             plain: Mamba 2, lightning
    S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T       delta: gated delta rule, KDA
    o_t = scale S_t^T q_t

with a_t = exp(g_t), one number of a head or one of each key channel. In chunks (Yang et al., arXiv
2412.06464; Dao and Gu, arXiv 2405.21060) the tokens of a chunk are products of matrices, and only
the states of chunks follow one another:

    S' = a S + Kd^T (U - W S)        o = Qd S + P (U - W S)

A stretch of a document that begins on another rank starts from a state that is not here yet. It is
affine in that state, so every rank computes how its own stretches change any state, all ranks
exchange that (a state and a square matrix of each head, whatever the length), and each goes on from
the true states. The backward pass does the same with gradients, from the end.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import raw_all_gather
from .checked import are_right
from .fragments import Chunks, Fragment, Fragments

log = logging.getLogger(__name__)

Kind = Literal["plain", "delta"]
CHUNK = 64
"""Tokens of a chunk."""
BLOCK = 16
"""Tokens of a chunk's parts, where each key channel has a decay of its own."""
WIDEST = 256
"""Channels of keys, and of values, of a head that kernels take."""
WORKSPACE = 8 << 30
"""Bytes that the chunks of the heads computed at once may take."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one recurrence computes.

    Attributes:
        kind: whether a token first takes out what the state has of its key.
        scale: of the queries.
        normalize: queries and keys are divided by their length.
        eps: added to the squared length.
    """

    kind: Kind
    scale: float
    normalize: bool = False
    eps: float = 1e-6


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    rule: Rule,
    fragments: Fragments,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The recurrence over this rank's tokens. Differentiable. Collective where a document crosses
    ranks.

    Args:
        q, k: [T/n, Hk, Dk].
        v: [T/n, H, Dv]; every H / Hk heads share a key head.
        g: [T/n, H] or [T/n, H, Dk]: logarithms of decays, at most 0.
        beta: [T/n, H]; None for 1.
        dtype: of the output; by default that of q.

    Returns:
        [T/n, H, Dv].
    """
    if beta is None:
        beta = torch.ones_like(g[..., 0] if g.dim() == 3 else g)
    out: Tensor = _Recurrence.apply(q, k, v, g, beta, rule, fragments, group, dtype or q.dtype)
    return out


@dataclasses.dataclass
class Within:
    """What the chunks of some heads need of their own tokens alone. N chunks, C tokens of each.

    Attributes:
        qd: [N, h, C, Dk] queries, decayed from the chunk's beginning.
        kd: [N, h, C, Dk] keys, decayed to its end.
        p: [N, h, C, C] scores within the chunk.
        w: [N, h, C, Dk] what a token takes out of the state before the chunk; None without deltas.
        u: [N, h, C, Dv] what it writes, the state before the chunk being zero.
        decay: [N, h, 1 or Dk, 1] of the whole chunk.
    """

    qd: Tensor
    kd: Tensor
    p: Tensor
    w: Tensor | None
    u: Tensor
    decay: Tensor


def within(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rule: Rule) -> Within:
    """Chunks of [N, C, h, ...] -> what they need of their own tokens. Differentiable.

    Args:
        q, k: of the key heads of v's heads, as many or a divisor.
    """
    # [N, C, h, D] -> [N, h, C, D]
    q, k, v, g, beta = (x.transpose(1, 2).to(_wide(v)) for x in (q, k, v, g, beta))
    q, k = normalized(q, rule) * rule.scale, normalized(k, rule)
    repeats = v.shape[1] // k.shape[1]
    sums = g.cumsum(2)
    v = v * beta[..., None]
    delta, kk = rule.kind == "delta", None
    if g.dim() == 3:
        # [N, hk, C, C] -> [N, h, C, C]
        products = [x @ k.transpose(-1, -2) for x in ((q, k) if delta else (q,))]
        falls = _falls(sums)
        p, *rest = [x.repeat_interleave(repeats, 1) * falls for x in products]
        kk = rest[0] if delta else None
        sums = sums[..., None]
    else:
        p = decayed_products(q, k, sums)
        if delta:
            kk = decayed_products(k, k, sums)
    q, k = (x.repeat_interleave(repeats, 1) for x in (q, k))
    last = sums[:, :, -1:]
    w, u = None, v
    if kk is not None:
        solved = inverse((kk * beta[..., None]).tril(-1))
        w, u = solved @ (k * sums.exp() * beta[..., None]), solved @ v
    return Within(q * sums.exp(), k * (last - sums).exp(), p, w, u, last.transpose(-1, -2).exp())


def _falls(sums: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: the decay from token j to token i; 0 where j is later."""
    size = sums.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
    falls = sums[..., :, None] - sums[..., None, :]
    return falls.masked_fill(later, float("-inf")).exp()


def decayed_products(x: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """[N, h, C, D] each -> [N, h, C, C]: products of x_i and k_j, every channel decayed from j to
    i; 0 where j is later.

    No decay is ever undone, which would overflow: rows are taken in blocks, and what lies between
    an earlier key and a row is split at the beginning of the row's block.
    """
    size, rows = x.shape[2], []
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own, at = sums[:, :, start:stop], sums[:, :, start : start + 1]
        falls = _falls(own.transpose(-1, -2)).movedim(2, -1)  # [N, h, B, B, D]
        near = (x[:, :, start:stop, None] * k[:, :, None, start:stop] * falls).sum(-1)
        before = k[:, :, :start] * (at - sums[:, :, :start]).exp()
        far = (x[:, :, start:stop] * (own - at).exp()) @ before.transpose(-1, -2)
        rows.append(torch.nn.functional.pad(torch.cat([far, near], -1), (0, size - stop)))
    return torch.cat(rows, 2)


def inverse(lower: Tensor) -> Tensor:
    """The inverse of I + a strictly lower triangular matrix [..., C, C], C a power of two."""
    out: Tensor = _Inverse.apply(lower)
    return out


class _Inverse(torch.autograd.Function):
    """Inverses of the blocks on the diagonal, merged two by two: no powers, which would grow."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        flat = lower.reshape(-1, size, size)
        out = torch.eye(size, dtype=lower.dtype, device=lower.device).repeat(len(flat), 1, 1)
        half = 1
        while half < size:
            done, given = (_diagonal(x, 2 * half) for x in (out, flat))
            first, second = done[..., :half, :half], done[..., half:, half:]
            done[..., half:, :half] = -(second @ given[..., half:, :half] @ first)
            half *= 2
        ctx.save_for_backward(out)
        return out.view(lower.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        transposed = out.transpose(-1, -2)
        return -(transposed @ grad.reshape(out.shape) @ transposed).tril(-1).view(grad.shape)


def _diagonal(x: Tensor, block: int) -> Tensor:
    """[B, C, C] -> a view [B, C / block, block, block] of the blocks on the diagonal."""
    batch, size, _ = x.shape
    blocks = x.view(batch, size // block, block, size // block, block)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


# ---- states of chunks


Steps = list[tuple[int, int]]


def scan(x: Within, steps: Steps, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk, and after the last ones.

    Args:
        start: [F, h, Dk, Dv] of each fragment.

    Returns:
        states [N, h, Dk, Dv], values written [N, h, C, Dv], ends [F, h, Dk, Dv].
    """
    return _Scan.apply(x.kd, x.w, x.u, x.decay, start, steps)  # type: ignore[no-any-return]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kd: Tensor,
        w: Tensor | None,
        u: Tensor,
        decay: Tensor,
        start: Tensor,
        steps: Steps,
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = u.new_empty(u.shape[0], u.shape[1], kd.shape[3], u.shape[3])
        state = start.to(u.dtype).clone()
        if w is None:
            written, added = u, kd.transpose(-1, -2) @ u
            for a, b in steps:
                current = state[: b - a]
                states[a:b] = current
                torch.addcmul(added[a:b], decay[a:b], current, out=current)
        else:
            written = torch.empty_like(u)
            for a, b in steps:
                current = state[: b - a]
                states[a:b] = current
                torch.sub(u[a:b], w[a:b] @ current, out=written[a:b])
                added = kd[a:b].transpose(-1, -2) @ written[a:b]
                torch.addcmul(added, decay[a:b], current, out=current)
        ctx.save_for_backward(kd, w, written, decay, states)
        ctx.steps = steps
        return states, written.clone() if w is None else written, state

    @staticmethod
    def backward(
        ctx: Any, d_states: Tensor, d_written: Tensor, d_ends: Tensor
    ) -> tuple[Tensor | None, ...]:
        kd, w, written, decay, states = ctx.saved_tensors
        after, du, d_start = reverse(kd, w, decay, d_states, d_written, d_ends, ctx.steps)
        dkd = written @ after.transpose(-1, -2)
        dw = None if w is None else -(du @ states.transpose(-1, -2))
        d_decay = after * states
        d_decay = d_decay.sum(-1, keepdim=True)
        if decay.shape[2] == 1:
            d_decay = d_decay.sum(2, keepdim=True)
        return dkd, dw, du, d_decay, d_start, None


def reverse(
    kd: Tensor,
    w: Tensor | None,
    decay: Tensor,
    d_states: Tensor,
    d_written: Tensor,
    d_ends: Tensor,
    steps: Steps,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan's adjoint: from the gradients of its results to those of the states after each
    chunk, of what the chunks write, and of the fragments' first states.
    """
    after = torch.empty_like(d_states)
    grad = d_ends.clone()
    if w is None:
        for a, b in reversed(steps):
            current = grad[: b - a]
            after[a:b] = current
            torch.addcmul(d_states[a:b], decay[a:b], current, out=current)
        return (
            after,
            torch.baddbmm(_flat(d_written), _flat(kd), _flat(after)).view_as(d_written),
            grad,
        )
    du = torch.empty_like(d_written)
    for a, b in reversed(steps):
        current = grad[: b - a]
        after[a:b] = current
        torch.add(d_written[a:b], kd[a:b] @ current, out=du[a:b])
        before = d_states[a:b] - w[a:b].transpose(-1, -2) @ du[a:b]
        torch.addcmul(before, decay[a:b], current, out=current)
    return after, du, grad


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


# ---- states of fragments, over ranks


@dataclasses.dataclass
class Changes:
    """How open fragments change a state: after = matrix . before + state.

    Attributes:
        state: [F, H, Dk, Dv].
        matrix: [F, H, Dk, Dk] for deltas, else [F, H, 1 or Dk, 1], numbers to multiply with.
    """

    state: Tensor
    matrix: Tensor


def changes(x: Within, chunks: Chunks, chosen: list[int]) -> Changes:
    """Of the fragments at these places of `chunks.order`, for some heads."""
    index, steps = chunks.part(chosen)
    index = index.to(x.u.device)
    kd, u, decay = (t.index_select(0, index) for t in (x.kd, x.u, x.decay))
    dim, heads = kd.shape[3], kd.shape[1]
    zero = u.new_zeros(len(chosen), heads, dim, u.shape[3])
    if x.w is None:
        *_, ends = _Scan.apply(kd, None, u, decay, zero, steps)
        whole = torch.ones_like(decay[: len(chosen)])
        for a, b in steps:
            whole[: b - a] *= decay[a:b]
        return Changes(ends, whole)
    w = x.w.index_select(0, index)
    start = torch.cat([zero, _identity(zero, dim)], -1)
    wide = torch.cat([u, u.new_zeros(*u.shape[:3], dim)], -1)
    *_, ends = _Scan.apply(kd, w, wide, decay, start, steps)
    return Changes(ends[..., : u.shape[3]], ends[..., u.shape[3] :])


def _identity(like: Tensor, size: int) -> Tensor:
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.expand(*like.shape[:2], size, size)


def applied(matrix: Tensor, state: Tensor, transposed: bool = False) -> Tensor:
    """What becomes of a state by a fragment's matrix."""
    if matrix.shape[-1] == 1:
        return matrix * state
    return (matrix.transpose(-1, -2) if transposed else matrix) @ state


def gathered(mine: Changes, fragments: Fragments, group: dist.ProcessGroup | None) -> Changes:
    """[F of this rank] -> of all open fragments, in the order of `Fragments.place`."""
    if group is None:
        return mine
    out = []
    for x in (mine.state, mine.matrix):
        filled = x.new_zeros(fragments.width, *x.shape[1:])
        filled[: len(x)] = x
        out.append(raw_all_gather(filled, group))
    return Changes(*out)


def first_states(every: Changes, fragments: Fragments) -> Tensor:
    """[F, H, Dk, Dv]: the states from which this rank's fragments start, in local order."""
    after: dict[int, Tensor] = {}
    for i in _needed(fragments):
        before = fragments.every[i].previous
        place = fragments.place[i]
        after[i] = every.state[place]
        if before >= 0:
            after[i] = after[i] + applied(every.matrix[place], after[before])
    zero = every.state.new_zeros(every.state.shape[1:])
    previous = [fragments.every[i].previous for i in fragments.local]
    return torch.stack([after[i] if i >= 0 else zero for i in previous])


def last_gradients(
    d_first: Tensor, matrix: Tensor, fragments: Fragments, group: dist.ProcessGroup | None
) -> Tensor:
    """Gradients of the states after this rank's open fragments, [F, H, Dk, Dv] in the order of
    `open_local`.

    Args:
        d_first: [F, H, Dk, Dv] gradients of the states from which its fragments start, by what the
            fragments themselves give out, in local order.
        matrix: of all open fragments.
    """
    number = {i: at for at, i in enumerate(fragments.open)}
    total = d_first.new_zeros(len(number), *d_first.shape[1:])
    for at, i in enumerate(fragments.local):
        if fragments.every[i].previous >= 0:
            total[number[fragments.every[i].previous]] += d_first[at]
    if group is not None:
        dist.all_reduce(total, group=group)
    for i in reversed(fragments.open):
        before = fragments.every[i].previous
        if before >= 0:
            total[number[before]] += applied(
                matrix[fragments.place[i]], total[number[i]], transposed=True
            )
    mine = [total[number[i]] for i in fragments.open_local]
    return torch.stack(mine) if mine else total[:0]


def _needed(fragments: Fragments) -> list[int]:
    """Open fragments before this rank's, the earliest first."""
    found: set[int] = set()
    for i in fragments.local:
        at = fragments.every[i].previous
        while at >= 0 and at not in found:
            found.add(at)
            at = fragments.every[at].previous
    return sorted(found)


# ---- the whole


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Heads [start, stop) of the values, and their key heads."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    def inputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """q, k, v, g and beta of all heads -> views of these heads'."""
        q, k, *others = inputs
        keys, heads = slice(self.key_start, self.key_stop), slice(self.start, self.stop)
        return [q[:, keys], k[:, keys], *(x[:, heads] for x in others)]


def _parts(heads: int, key_heads: int, at_once: int) -> Iterator[_Heads]:
    """All heads, in parts of at most `at_once` (or 1): whole groups of one key head, or parts of
    one group.
    """
    share = heads // key_heads
    if at_once >= share:
        keys = at_once // share
        for start in range(0, key_heads, keys):
            stop = min(start + keys, key_heads)
            yield _Heads(start * share, stop * share, start, stop)
        return
    size = max(d for d in range(1, share + 1) if share % d == 0 and d <= max(at_once, 1))
    for start in range(0, heads, size):
        yield _Heads(start, start + size, start // share, start // share + 1)


def head_bytes(
    kind: Kind,
    key_dim: int,
    value_dim: int,
    per_channel: bool,
    kernels: bool,
    backward: bool = True,
) -> float:
    """That a pass takes of a token and a head while it computes them.

    Args:
        kernels: whether Triton computes it, which stores no more than it must.
    """
    states = key_dim * value_dim / CHUNK
    if not kernels:
        numbers = 14 * key_dim + 10 * value_dim + 12 * CHUNK + 4 * states
        return 4.0 * (numbers + 8 * BLOCK * key_dim if per_channel else numbers)
    numbers = states
    if kind == "delta":
        numbers += key_dim + 2 * value_dim + CHUNK
    if per_channel:
        numbers += key_dim + CHUNK
    if backward:
        numbers += states + 2 * key_dim + 1.5 * value_dim + CHUNK
    if backward and kind == "delta":
        numbers += CHUNK
    if backward and per_channel:
        numbers += key_dim
    return 4.0 * numbers


class _Recurrence(torch.autograd.Function):
    """Stores its inputs, and what fragments start from; chunks are computed again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        rule: Rule,
        fragments: Fragments,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = [q, k, v, g, beta]
        chunks = fragments.chunks(CHUNK, q.device)
        start, matrix = None, None
        with torch.autocast(q.device.type, enabled=False):
            kernels = by_kernels(inputs, rule)
            parts = list(_parts_of(inputs, rule, chunks, kernels, False))
            made = _made_once(inputs, rule, chunks, kernels, len(parts) == 1)
            if fragments.open:
                mine = _changes(inputs, rule, fragments, chunks, parts, made)
                every = gathered(mine, fragments, group)
                start, matrix = first_states(every, fragments), every.matrix
            out = v.new_empty(v.shape, dtype=dtype)
            for part in parts:
                first = _start(start, part, chunks, inputs)
                _forward(made(part), chunks, first, out[:, part.start : part.stop])
        ctx.save_for_backward(*inputs, start, matrix)
        ctx.settings = rule, fragments, group, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, start, matrix = ctx.saved_tensors
        rule, fragments, group, kernels = ctx.settings
        chunks = fragments.chunks(CHUNK, grad.device)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            parts = list(_parts_of(inputs, rule, chunks, kernels, True))
            # By PyTorch, the gradients make their own.
            alone = kernels and len(parts) == 1
            made = _made_once(inputs, rule, chunks, kernels, alone)
            ends, slopes = None, None
            if fragments.open:
                d_first = torch.empty_like(start)
                for part in parts:
                    slopes = _slopes(made(part), chunks, grad[:, part.start : part.stop])
                    found = _first_gradients(made(part), chunks, *slopes)
                    mine = d_first[:, part.start : part.stop]
                    mine.index_copy_(0, chunks.index(chunks.order), found)
                ends = last_gradients(d_first, matrix, fragments, group)
            if not alone:
                slopes = None
            grads: list[Tensor] = []
            if len(parts) > 1:
                grads = [torch.zeros_like(x) for x in inputs]
            for part in parts:
                first = _start(start, part, chunks, inputs)
                d_after = torch.zeros_like(first)
                if ends is not None and fragments.open_local:
                    at = chunks.index([chunks.rank_of[i] for i in fragments.open_local])
                    mine = ends[:, part.start : part.stop].to(d_after.dtype)
                    d_after.index_copy_(0, at, mine)
                given = first, grad[:, part.start : part.stop], d_after
                job = made(part) if kernels else None
                found = _gradients(part.inputs(inputs), rule, chunks, *given, job, slopes)
                if len(parts) == 1:
                    grads = [one.to(x.dtype) for one, x in zip(found, inputs, strict=True)]
                    break
                for total, one in zip(part.inputs(grads), found, strict=True):
                    total.add_(one)
        return (*grads, None, None, None, None)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parts_of(
    inputs: list[Tensor], rule: Rule, chunks: Chunks, kernels: bool, backward: bool
) -> Iterator[_Heads]:
    """All heads, in equal parts whose chunks fit in the workspace."""
    _, k, v, g, _ = inputs
    heads = v.shape[1]
    one = head_bytes(rule.kind, k.shape[2], v.shape[2], g.dim() == 3, kernels, backward)
    most = max(1, int(WORKSPACE / (chunks.count * chunks.size * one)))
    parts = -(-heads // most)
    return _parts(heads, k.shape[1], -(-heads // parts))


def _made_once(
    inputs: list[Tensor], rule: Rule, chunks: Chunks, kernels: bool, alone: bool
) -> Callable[[_Heads], Any]:
    """Makes what the chunks of a part need of their own tokens: a job of the kernels, or `Within`.

    Args:
        alone: the part has all heads, and what is made is kept. Several parts' would not fit: it
            is made anew each time.
    """

    @functools.lru_cache(maxsize=int(alone))
    def made(part: _Heads) -> Any:
        given = part.inputs(inputs)
        return _job(given, rule, chunks) if kernels else _within(given, rule, chunks)

    return made


def _start(start: Tensor | None, part: _Heads, chunks: Chunks, inputs: list[Tensor]) -> Tensor:
    """[F, h, Dk, Dv] in the order of the chunks' fragments."""
    _, k, v, _, _ = inputs
    if start is None:
        heads = part.stop - part.start
        return v.new_zeros(len(chunks.order), heads, k.shape[2], v.shape[2], dtype=_wide(v))
    return start[:, part.start : part.stop].index_select(0, chunks.index(chunks.order))


def _changes(
    inputs: list[Tensor],
    rule: Rule,
    fragments: Fragments,
    chunks: Chunks,
    parts: list[_Heads],
    made: Callable[[_Heads], Any],
) -> Changes:
    """Of this rank's open fragments, in the order of `open_local`."""
    _, k, v, g, _ = inputs
    heads, key_dim, value_dim = v.shape[1], k.shape[2], v.shape[2]
    count = len(fragments.open_local)
    decays = key_dim if g.dim() == 3 else 1
    size = (key_dim, key_dim) if rule.kind == "delta" else (decays, 1)
    state = v.new_zeros(count, heads, key_dim, value_dim, dtype=_wide(v))
    matrix = v.new_zeros(count, heads, *size, dtype=_wide(v))
    if not count:
        return Changes(state, matrix)
    at = [chunks.rank_of[i] for i in fragments.open_local]
    chosen = sorted(at)
    order = chunks.index([chosen.index(place) for place in at])
    for part in parts:
        found = _changes_of(made(part), chunks, chosen)
        state[:, part.start : part.stop] = found.state.index_select(0, order)
        matrix[:, part.start : part.stop] = found.matrix.index_select(0, order)
    return Changes(state, matrix)


# ---- some heads, by Triton where it computes them, else by PyTorch


def by_kernels(inputs: list[Tensor], rule: Rule) -> bool:
    """Whether Triton computes a recurrence of these: it can, and is right on this device."""
    _, k, v, g, _ = inputs
    kernels = _kernels()
    if kernels is None or not kernels.runs_on(v.device) or v.dtype == torch.float64:
        return False
    if max(k.shape[2], v.shape[2]) > WIDEST:
        _say_too_wide(k.shape[2], v.shape[2])
        return False
    return _are_right(v.device, v.dtype, rule.kind, k.shape[2], v.shape[2], g.dim() == 3)


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

    def kernels() -> list[Tensor]:
        return _results(inputs, rule, chunks, first, slope, after, True)

    def expected() -> list[Tensor]:
        wide = [x.double() for x in inputs]
        given = first.double(), slope.double(), after.double()
        return _results(wide, rule, chunks, *given, False)

    what = f"A {kind} recurrence with keys of {key_dim} and values of {value_dim} runs"
    if per_channel:
        what = what.replace(" with", " with a decay of each channel,")
    return are_right(what, kernels, expected, dtype)


def _results(
    inputs: list[Tensor],
    rule: Rule,
    chunks: Chunks,
    first: Tensor,
    slope: Tensor,
    after: Tensor,
    kernels: bool,
) -> list[Tensor]:
    out = torch.empty_like(inputs[2])
    made = _job(inputs, rule, chunks) if kernels else _within(inputs, rule, chunks)
    _forward(made, chunks, first, out)
    found = _changes_of(made, chunks, [0, 1])
    slopes = _slopes(made, chunks, slope)
    start = _first_gradients(made, chunks, *slopes)
    job = made if kernels else None
    gradients = _gradients(inputs, rule, chunks, first, slope, after.clone(), job, slopes)
    return [out, found.state, found.matrix, *gradients, start]


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
    precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
    return _kernels().Job(q, k, v, g, beta, chunks, rule.kind == "delta", precision)


def normalized(x: Tensor, rule: Rule) -> Tensor:
    """In a wide type, divided by its length where the rule says so."""
    x = x.to(_wide(x))
    if rule.normalize:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + rule.eps)
    return x


def _forward(made: Any, chunks: Chunks, first: Tensor, out: Tensor) -> None:
    """Writes the outputs [T/n, h, Dv]."""
    if not isinstance(made, Within):
        states, written, _ = made.scan(first)
        made.outputs(states, written, out)
        return
    states, written, _ = scan(made, chunks.steps, first)
    out.copy_(_outputs(made, states, written, chunks))


def _changes_of(made: Any, chunks: Chunks, chosen: list[int]) -> Changes:
    if not isinstance(made, Within):
        return Changes(*made.changes(chosen))
    return changes(made, chunks, chosen)


def _slopes(made: Any, chunks: Chunks, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states before the chunks and of what they write, by their outputs alone."""
    if not isinstance(made, Within):
        found: tuple[Tensor, Tensor] = made.output_gradients(grad)
        return found
    d_out = chunks.laid_out(grad).unflatten(0, (chunks.count, chunks.size))
    d_out = d_out.transpose(1, 2).to(made.u.dtype)
    return made.qd.transpose(-1, -2) @ d_out, made.p.transpose(-1, -2) @ d_out


def _first_gradients(made: Any, chunks: Chunks, d_states: Tensor, d_written: Tensor) -> Tensor:
    """[F, h, Dk, Dv] gradients of the states from which fragments start, by their own outputs, in
    the order of the chunks' fragments.
    """
    d_ends = d_states.new_zeros(len(chunks.order), *d_states.shape[1:])
    if not isinstance(made, Within):
        found: Tensor = made.reverse(d_states, d_written, d_ends, keep=False)
        return found
    return reverse(made.kd, made.w, made.decay, d_states, d_written, d_ends, chunks.steps)[2]


def _gradients(
    inputs: list[Tensor],
    rule: Rule,
    chunks: Chunks,
    first: Tensor,
    grad: Tensor,
    d_after: Tensor,
    job: Any,
    slopes: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Of the inputs, from those of the outputs and of the states after the fragments.

    Args:
        job: of the kernels, which cannot be used again after it; None: by PyTorch.
        slopes: `_slopes`, if they are known; written over.
    """
    if job is not None:
        from . import unit_kernels

        q, k = inputs[:2]
        eps = rule.eps if rule.normalize else None
        states, written, _ = job.scan(first)
        d_states, d_written = job.output_gradients(grad) if slopes is None else slopes
        job.reverse(d_states, d_written, d_after)
        dq, dk, *others = job.input_gradients(grad, states, written, d_states, d_written)
        dq = unit_kernels.scaled_gradients(q, dq, rule.scale, eps)
        dk = unit_kernels.scaled_gradients(k, dk, 1.0, eps)
        return (dq, dk, *others)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        x = _within(leaves, rule, chunks)
        states, written, after = scan(x, chunks.steps, first)
        out = _outputs(x, states, written, chunks)
    return torch.autograd.grad([out, after], leaves, [grad.to(out.dtype), d_after])


def _within(inputs: list[Tensor], rule: Rule, chunks: Chunks) -> Within:
    # [T/n, h, ...] -> [N, C, h, ...]
    shape = (chunks.count, chunks.size)
    q, k, v, g, beta = (chunks.laid_out(x).unflatten(0, shape) for x in inputs)
    return within(q, k, v, g, beta, rule)


def _outputs(x: Within, states: Tensor, written: Tensor, chunks: Chunks) -> Tensor:
    """-> [T/n, h, Dv]."""
    out = x.qd @ states + x.p @ written
    return chunks.taken_back(out.transpose(1, 2).flatten(0, 1))
