"""Calls of the engine's own kernels (`tile_kernels`): sizes of blocks, what a tile's mask is to
them, memory for their results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..shared_memory import run_what_fits
from ..tiles import Tile
from . import tile_kernels


class Blocks(NamedTuple):
    """Queries and keys of a block, warps, and stages of the pipeline of loads."""

    m: int
    n: int
    warps: int
    stages: int


SETTINGS: dict[str, dict[int, Blocks]] = {
    "forward": {64: Blocks(64, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(128, 64, 8, 2)},
    "keys": {64: Blocks(32, 64, 4, 2), 128: Blocks(32, 128, 8, 2), 256: Blocks(32, 64, 8, 2)},
    "queries": {64: Blocks(64, 64, 4, 2), 128: Blocks(128, 64, 8, 2), 256: Blocks(128, 32, 8, 2)},
}
"""By the larger head dim, up to the next of these."""

SMALLER: dict[str, Blocks] = {
    "forward": Blocks(64, 32, 4, 2),
    "keys": Blocks(32, 32, 4, 2),
    "queries": Blocks(64, 32, 4, 1),
}
"""For GPUs whose shared memory is too small for `SETTINGS`: at most 96 KB for head dims up to 256,
by what Triton 3.6 makes for sm_89 and sm_120 (tests/sp/test_shared_memory.py). Not timed.
"""


class _Mask(NamedTuple):
    """What the kernels are told of a tile.

    Attributes:
        begins, ends: [Sq] int32, where a query's document begins and a key's ends; else a
            tensor that is not read.
        reach: i - j of the farthest key that a query in a window sees.
    """

    begins: Tensor
    ends: Tensor
    reach: int
    flags: dict[str, bool]


def _mask(tile: Tile, q: Tensor, softcap: float | None) -> _Mask:
    begins = ends = torch.empty(0, dtype=torch.int32, device=q.device)
    if tile.kind == "varlen":
        cu = tile.cu_seqlens_on(q.device)
        rows = torch.arange(tile.q_len, dtype=torch.int32, device=q.device)
        document = torch.bucketize(rows, cu[1:], right=True)
        begins, ends = cu[document], cu[document + 1]
    window = tile.window is not None
    reach = 0 if tile.window is None else tile.window + tile.q_len - tile.k_len
    flags = {
        "CAUSAL": tile.kind != "full",
        "PACKED": tile.kind == "varlen",
        "WINDOW": window,
        "CAPPED": softcap is not None,
    }
    return _Mask(begins, ends, reach, flags)


def _shape(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": max(16, triton.next_power_of_2(q.shape[2])),
        "E": max(16, triton.next_power_of_2(v.shape[2])),
        "DIM": q.shape[2],
        "VALUE": v.shape[2],
    }


def _launch(
    kernel: str, q: Tensor, shape: dict[str, int], mask: _Mask, run: Callable[..., object]
) -> None:
    """Runs with the blocks that the GPU has room for, and with the options of the launch."""
    widest = max(shape["D"], shape["E"])
    own = next(blocks for dim, blocks in SETTINGS[kernel].items() if widest <= dim)

    def launch(blocks: Blocks) -> None:
        sizes = {"M": blocks.m, "N": blocks.n}
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        run(blocks, **shape, **mask.flags, **sizes, **options)

    compiled_for = (q.device, q.dtype, *shape.values(), *mask.flags.values())
    run_what_fits(
        (f"attention's {kernel}", *compiled_for), (own, SMALLER[kernel]), launch, OutOfResources
    )


def _contiguous_head(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """By which q k^T is multiplied, and what the soft-cap's tanh is multiplied by, in base 2."""
    if softcap is None:
        return scale * tile_kernels.LOG2_E.value, 0.0
    return scale / softcap, softcap * tile_kernels.LOG2_E.value


def forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Sq, H, Dv] and lse [H, Sq] of a tile; see `backends`."""
    q, k, v = (_contiguous_head(x) for x in (q, k, v))
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    shape, mask = _shape(q, k, v), _mask(tile, q, softcap)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], lse.stride(0))
    lengths = (q.shape[0], k.shape[0], mask.reach, *_factors(scale, softcap))

    def run(blocks: Blocks, **options: Any) -> None:
        grid = (triton.cdiv(q.shape[0], blocks.m), q.shape[1])
        tile_kernels._forward[grid](q, k, v, out, lse, mask.begins, *lengths, *strides, **options)

    _launch("forward", q, shape, mask, run)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a tile, from the out and lse of the whole row; see `backends`."""
    shape, mask = _shape(q, k, v), _mask(tile, q, softcap)
    call = Backward(dout, q, k, v, out, lse, shape, mask, scale, softcap)
    return call.queries(), *call.keys()


class Backward:
    """What the kernels of one tile's backward pass are given."""

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        shape: dict[str, int],
        mask: _Mask,
        scale: float,
        softcap: float | None,
    ) -> None:
        dout, q, k, v, out = (_contiguous_head(x) for x in (dout, q, k, v, out))
        lse = lse if lse.stride(1) == 1 else lse.contiguous()
        delta = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        strides = (*dout.stride()[:2], *out.stride()[:2])
        rows = 64
        tile_kernels._delta[(triton.cdiv(q.shape[0], rows), q.shape[1])](
            dout, out, delta, q.shape[0], *strides, M=rows, E=shape["E"], VALUE=shape["VALUE"]
        )
        self.shape, self.mask = shape, mask
        self.given = (q, k, v, dout, lse, delta)
        self.lengths = (q.shape[0], k.shape[0], mask.reach, *_factors(scale, softcap), scale)
        self.strides = tuple(n for x in self.given[:4] for n in x.stride()[:2])
        self.strides += (lse.stride(0),)

    def keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv."""
        q, k, v, *_ = self.given
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))

        def run(blocks: Blocks, **options: Any) -> None:
            tile_kernels._keys_backward[(triton.cdiv(k.shape[0], blocks.n), k.shape[1])](
                *self.given,
                dk,
                dv,
                self.mask.begins,
                self.mask.ends,
                *self.lengths,
                *self.strides,
                *dk.stride()[:2],
                *dv.stride()[:2],
                **options,
            )

        _launch("keys", q, self.shape, self.mask, run)
        return dk, dv

    def queries(self) -> Tensor:
        """dq."""
        q = self.given[0]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)

        def run(blocks: Blocks, **options: Any) -> None:
            tile_kernels._queries_backward[(triton.cdiv(q.shape[0], blocks.m), q.shape[1])](
                *self.given,
                dq,
                self.mask.begins,
                *self.lengths,
                *self.strides,
                *dq.stride()[:2],
                **options,
            )

        _launch("queries", q, self.shape, self.mask, run)
        return dq
