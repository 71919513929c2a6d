"""Errors of `attention.py`: each kernel and each schedule beside float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import published
from _attention_published import installed, peers, ring_group, theirs
from _attention_rows import segments_of, varlen_kernel
from _attention_setting import (
    Row,
    Setting,
    attempt,
    context,
    forward_backward,
    inputs,
    note,
    planned,
)
from longfactory import sp
from longfactory.sp import backends
from longfactory.sp.distance import worst
from longfactory.sp.tiles import Tile
from per_document_zigzag import PerDocumentZigzag


def relative(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, exact, strict=True)
    ]


def errors(setting: Setting) -> None:
    """Root mean square error from float64, of each kernel alone and of each schedule over what one
    GPU's kernel has.
    """
    n, shape = setting.check_length, setting.heads[0]
    square = slice(0, n)
    tiles = {
        "causal": Tile(square, square, "causal"),
        "full": Tile(slice(0, n // 2), square, "full"),
        "documents": Tile(square, square, "varlen", (0, n // 5, n // 5 + 1, n)),
        "window": Tile(square, square, "causal", window=n // 7),
        "rectangle in a window": Tile(slice(0, n // 2), square, "full", window=n // 3),
    }
    for name in backends.BACKENDS:
        for kind, tile in tiles.items():
            backend = backends.BACKENDS[name]
            q, k, v, dout = inputs(n, *shape, setting.dim, setting)
            q, dout = q[tile.q].contiguous(), dout[tile.q].contiguous()
            request = backends.Request(
                q.device.type,
                q.dtype,
                setting.dim,
                setting.dim,
                tile.kind,
                tile.window is not None,
                False,
                True,
            )
            reason = backend.refuses(request)
            if reason is not None:
                if kind == "causal":
                    note(f"error {name}", reason)
                continue
            attempt(
                setting,
                f"error {name}, {kind}",
                lambda: kernel_error(backend, tile, q, k, v, dout, setting.dim**-0.5),
            )
    if setting.ranks == 1:
        return
    for packed in (False, True):
        segments = [sp.Segment(0, n // 3), sp.Segment(n // 3, n)] if packed else None
        for mode in ("zigzag-ring", "ulysses", "llama3"):
            plan = sp.plan(n, segments, context(setting, mode))
            name = f"error {mode}, {'two documents' if packed else 'one document'}"
            attempt(
                setting, name, lambda: sharded_error(setting, segments, plan.index, planned(plan))
            )
    # The comparisons must be right, too.
    sizes = [n // 4, n // 2, n // 4]
    segments = segments_of(sizes)
    ring = PerDocumentZigzag(
        sizes, ring_group(setting), varlen_kernel(setting, shape), setting.device
    )
    attempt(
        setting,
        "error per-document zigzag ring",
        lambda: sharded_error(setting, segments, ring.positions(), ring.attention),
    )
    for length, parts, documents in (
        ([n], None, "one document"),
        (sizes, segments, "three documents"),
    ):
        for peer in peers(setting, length):
            name = f"error {peer.name}, {documents}"
            if installed(peer, name):
                attempt(
                    setting,
                    name,
                    lambda: sharded_error(theirs(setting), parts, peer.rows, peer.make()),
                )


def kernel_error(
    backend: object, tile: Tile, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float
) -> Row:
    plain = backends.BACKENDS["math"]
    wide = [x.double() for x in (q, k, v)]
    out, lse = backend.forward(q, k, v, tile, scale, None)  # type: ignore[attr-defined]
    exact, exact_lse = plain.forward(*wide, tile, scale, None)
    # A tile of a larger mask: half of the probability is elsewhere.
    whole, whole_out = lse + 0.6931, (out * 0.5)
    found = [out, *backend.backward(dout, q, k, v, whole_out, whole, tile, scale, None)]  # type: ignore[attr-defined]
    grads = plain.backward(
        dout.double(), *wide, whole_out.double(), exact_lse + 0.6931, tile, scale, None
    )
    names = ("out", "dq", "dk", "dv")
    values = dict(zip(names, relative(found, [exact, *grads]), strict=True))
    return {**values, "lse": (lse - exact_lse).abs().max().item()}


def sharded_error(
    setting: Setting,
    segments: list[sp.Segment] | None,
    rows: Tensor,
    attention: published.Attention,
) -> Row:
    """Of all ranks' rows together. `rows`: positions of this rank's."""
    length, shape = setting.check_length, setting.heads[0]
    alone = sp.plan(length, segments, setting.one)
    tensors = inputs(length, *shape, setting.dim, setting)
    exact = forward_backward(planned(alone), *(x.double() for x in tensors))  # type: ignore[arg-type]
    single = relative(forward_backward(planned(alone), *tensors), exact)  # type: ignore[arg-type]
    rows = rows.to(setting.device)
    mine = [x[rows] for x in tensors]

    def everywhere(x: Tensor) -> Tensor:
        whole = torch.zeros(length, *x.shape[1:], dtype=torch.float64, device=x.device)
        whole[rows] = x.double()
        dist.all_reduce(whole)
        return whole

    shared, again = ([everywhere(x) for x in forward_backward(attention, *mine)] for _ in range(2))  # type: ignore[arg-type]
    many = relative(shared, exact)
    over_one = worst(a / b for a, b in zip(many, single, strict=True))
    names = ("out", "dq", "dk", "dv")
    return {
        **dict(zip(names, many, strict=True)),
        "over one GPU": over_one,
        "same twice": str(torch.equal(shared[0], again[0])),
    }
