"""A module run in chunks of the sequence: the same values, with the intermediates of one chunk at a
time.

`run_in_chunks(fn, x, params, chunk)` computes `fn(x)` chunk by chunk and stores nothing but `x`.
Its backward runs each chunk again with gradients and differentiates it there, so a chunk is
recomputed once. It is two autograd functions on purpose. The first stores `x`, the second computes
and stores nothing: inside a checkpointed layer the recompute stops when everything that was stored
exists again, that is before the second one, and so the module is not computed a third time (unless
a later module of the layer stores its output).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longfactory.memory import norms
from longfactory.memory.layer_ops import autocast_as_now, wide
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, Technique, Work
from longfactory.memory.temporaries import temporary_bytes
from longfactory.sp.position import at

TOKENS = -2  # the dim of hidden states that is cut, [..., T, H]

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)


def _run_at(start: int | None, fn: Callable[[Tensor], Any], x: Tensor) -> Any:
    """`fn(x)`, where x begins at token `start` of a module's input."""
    with at(start):
        return fn(x)


@contextlib.contextmanager
def whole(start: int | None = 0) -> Iterator[None]:
    """Inside the block modules run without what `install` has put in place of their forward, on
    tokens that begin at `start`.
    """
    token = _inside.set(True)
    try:
        with at(start):
            yield
    finally:
        _inside.reset(token)


class GradientSum:
    """The gradient of a parameter, summed over chunks. Wide if there is more than one chunk; one
    rounding at the end.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._sum: Tensor | None = None

    def add(self, g: Tensor | None) -> None:
        if g is None:
            return
        if self._sum is None:
            self._sum = g if self._chunks == 1 else g.to(wide(g.dtype))
        else:
            self._sum += g

    def take(self) -> Tensor | None:
        """The sum, as wide as it is; None where nothing was added."""
        total, self._sum = self._sum, None
        return total

    def total(self, like: Tensor) -> Tensor | None:
        total = self.take()
        return None if total is None else total.to(like.dtype).view(like.shape)


@dataclasses.dataclass
class _ChunkedCall:
    fn: Callable[[Tensor], Tensor]
    # asked again in backward: sharding swaps parameters between the passes
    params: Callable[[], Sequence[Tensor]]
    chunk: int
    amp: Callable[[], torch.autocast]
    dtype: torch.dtype | None = None  # of the output


class _Store(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _ChunkedCall, x: Tensor, *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.call = call
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """`dy` is the gradient of what `_Compute` returned."""
        call: _ChunkedCall = ctx.call
        (x,) = ctx.saved_tensors
        needs_x, needs_p = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        params = list(call.params())
        wanted = [p for p, needs in zip(params, needs_p, strict=True) if needs]
        length = x.shape[TOKENS]
        sums = [GradientSum(-(-length // call.chunk)) for _ in wanted]
        dx = torch.empty_like(x) if needs_x else None
        if call.dtype is not None:
            dy = dy.to(call.dtype)
        for i in range(0, length, call.chunk):
            n = min(call.chunk, length - i)
            with torch.enable_grad(), call.amp():
                part = x.narrow(TOKENS, i, n).detach().requires_grad_(needs_x)
                y = _run_at(i, call.fn, part)
            inputs = [part, *wanted] if needs_x else wanted
            grads = list(torch.autograd.grad(y, inputs, dy.narrow(TOKENS, i, n), allow_unused=True))
            if dx is not None:
                g = grads.pop(0)
                target = dx.narrow(TOKENS, i, n)
                target.zero_() if g is None else target.copy_(g)
            for total, g in zip(sums, grads, strict=True):
                total.add(g)
            del part, y, grads
        # Zeros for a parameter that no chunk used, as an expert that no token chose: DDP waits for
        # every gradient.
        totals = (sum_.total(p) for sum_, p in zip(sums, wanted, strict=True))
        done = iter(
            [
                torch.zeros_like(p) if total is None else total
                for total, p in zip(totals, wanted, strict=True)
            ]
        )
        return None, dx, *(next(done) if needs else None for needs in needs_p)


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _ChunkedCall, x: Tensor) -> Tensor:  # type: ignore[override]
        with call.amp():
            y = _in_chunks(call.fn, x, call.chunk)
        call.dtype = y.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, dy


def _in_chunks(fn: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    length = x.shape[TOKENS]
    if length <= chunk:
        return fn(x)
    out: Tensor | None = None
    for i in range(0, length, chunk):
        n = min(chunk, length - i)
        y = _run_at(i, fn, x.narrow(TOKENS, i, n))
        if out is None:
            out = torch.empty(x.shape, dtype=y.dtype, device=y.device)
        out.narrow(TOKENS, i, n).copy_(y)
    assert out is not None
    return out


def run_in_chunks(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    params: Callable[[], Sequence[Tensor]],
    chunk: int | None,
) -> Tensor:
    """`fn(x)`, where each token depends on the same token of `x` alone and the shape does not
    change.

    Args:
        x: [..., T, H].
        params: gives the parameters that `fn` uses. They become inputs of the autograd function, so
            that hooks on their gradients (DDP, FSDP2, ZeRO) see one gradient a call.
        chunk: tokens in a chunk; None for all at once (still: only `x` is stored).
    """
    chunk = chunk or x.shape[TOKENS]
    if not torch.is_grad_enabled():
        return _in_chunks(fn, x, chunk)
    call = _ChunkedCall(fn, params, chunk, autocast_as_now(x.device.type))
    return _Compute.apply(call, _Store.apply(call, x, *params()))


# Direct children of a decoder layer that work on each token alone.
_MLP_NAMES = frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"})


def install(
    layer: nn.Module,
    chunk: Callable[[], int | None],
    moe: bool = True,
    norms_only: bool = False,
    longest: int = 0,
) -> list[str]:
    """Run the MLP and the norms of a decoder layer in chunks of `chunk()` tokens. Returns the names
    of the children that will be.

    A child is left as it is if it has active dropout (a recompute would draw again) or, with
    `moe=False`, if it is a mixture of experts (whose router's outputs are being recorded, one
    record a call). The first call proves on a few tokens that the child treats tokens alone.

    `longest`: tokens of the longest sequence of any rank, 0 if unknown. ZeRO-3 gathers weights each
    time that a part runs, on all ranks together: there every rank runs as many chunks as that
    sequence has.
    """
    names = []
    for name, child in layer.named_children():
        is_norm = type(child).__name__.endswith("Norm")
        if not (is_norm or (name in _MLP_NAMES and not norms_only)) or any(
            isinstance(m, nn.Dropout) and m.p > 0 for m in child.modules()
        ):
            continue
        if norms.is_fused(child):
            continue  # it stores its input alone
        if not moe and any("router" in n or "experts" in n for n, _ in child.named_modules()):
            continue
        child.forward = _Chunked(child, chunk, longest)
        names.append(name)
    return names


def runs_in_chunks(module: nn.Module) -> bool:
    """Whether `install` has put its function in place of this module's forward. Parameters that no
    chunk used then have zeros.
    """
    return isinstance(module.__dict__.get("forward"), _Chunked)


class _Chunked:
    """Takes the place of a module's `forward`."""

    def __init__(
        self, module: nn.Module, chunk: Callable[[], int | None], longest: int = 0
    ) -> None:
        self.forward = module.forward
        self.module = module
        self.chunk = chunk
        self.longest = longest
        self.fits: bool | None = None

    def params(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() == 3
        # Of several sequences (generation) a chunk lies apart, which modules with a `view` refuse.
        plain = plain and len(args[0]) == 1
        if plain and self.fits is None and args[0].shape[1] > 1 and not _inside.get():
            self.fits = self._token_wise(args[0])
        if not plain or not self.fits or _inside.get():
            return self.forward(*args, **kwargs)
        if any(hasattr(p, "ds_id") for p in self.module.parameters()):
            return self._under_zero3(args[0])
        return run_in_chunks(self.forward, args[0], self.params, self.chunk())

    def _under_zero3(self, x: Tensor) -> Tensor:
        """ZeRO-3 gathers a linear's weight only while it runs: its backward has to be autograd's
        own, and chunks are checkpointed.
        """
        chunk = self.chunk()
        # as many on every rank, however long its own sequence is
        count = -(-self.longest // chunk) if chunk is not None else 1
        is_norm = type(self.module).__name__.endswith("Norm")
        if count < 2 or not torch.is_grad_enabled() or is_norm:
            return self.forward(x)
        start = 0
        results: list[Tensor] = []
        beyond: list[Tensor] = []
        for part in x.tensor_split(count, 1):
            empty = not part.shape[1]
            run = functools.partial(_run_at, None if empty else start, self.forward)
            result = checkpoint(run, x[:, :1] if empty else part, use_reentrant=False)
            (beyond if empty else results).append(result)
            start += part.shape[1]
        out = torch.cat(results, 1)
        for result in beyond:
            out = out + 0.0 * result.sum()
        return out

    @torch.no_grad()
    def _token_wise(self, x: Tensor) -> bool:
        head = x[:, : min(16, x.shape[1])]
        whole, half = (
            _run_at(None, self.forward, part) for part in (head, head[:, : head.shape[1] // 2])
        )
        if not isinstance(whole, Tensor) or whole.shape != head.shape:
            return False
        # Matrix products of another shape may round differently.
        return torch.allclose(
            whole[:, : half.shape[1]].float(),
            half.float(),
            rtol=5e-2,
            atol=1e-2 * float(whole.float().abs().max()),
        )


def chunk_length(settings: MemorySettings) -> int | None:
    """Tokens of a sequence that a layer works on at once; None for all."""
    return settings.mlp_chunk


# ---- what the planner needs to know --------------------------------------------------------------


def _values(job: TrainingJob, mode: str, settings: MemorySettings) -> list[int | None]:
    chunks: list[int | None] = (
        [4096, 2048] if mode == "long" else [None, 32768, 16384, 8192, 4096, 2048]
    )
    return [chunk for chunk in chunks if chunk is None or chunk < job.local] or [None]


def _fixed(arguments: Any) -> dict[str, Any]:
    return {} if arguments.mlp_chunk == "auto" else {"mlp_chunk": int(arguments.mlp_chunk) or None}


def _bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """The temporaries of one chunk in place of those of all local tokens."""
    chunk = min(settings.mlp_chunk or job.local, job.local)
    most = max(temporary_bytes(job, kind) for kind in job.shape.kinds)
    return Bytes(layer=LayerMoments(after_attention=(chunk - job.local) * most))


def _work(job: TrainingJob, settings: MemorySettings) -> Work:
    chunk = settings.mlp_chunk
    return Work(slower=min(0.05, 40.0 / chunk) if chunk and chunk < job.local else 0.0)


def _words(settings: MemorySettings) -> str | None:
    if settings.checkpoint == "none" or settings.mlp_chunk is None:
        return None
    return f"layers in chunks of {settings.mlp_chunk:,} tokens"


def _advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    lean = settings.mlp_chunk is not None and settings.mlp_chunk <= 4096
    return None if lean else (6, "mlp_chunk: 4096")


def _leaner(job: TrainingJob, settings: MemorySettings) -> int:
    return max(1024, (settings.mlp_chunk or job.local) // 2)


CHUNKS = Technique(
    "mlp_chunk",
    _values,
    4,
    _fixed,
    _bytes,
    _work,
    words=_words,
    advice=_advice,
    leaner=_leaner,
    ordered=True,
)
