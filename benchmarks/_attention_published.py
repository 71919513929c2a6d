"""Published implementations on the rows of `attention.py` (see `published.py`), and PyTorch's own ring."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import published
from _attention_setting import Row, Setting, attempt, context, figures, inputs, note, speed_of
from per_document_zigzag import PerDocumentZigzag


class Peer(NamedTuple):
    """`rows`: positions of this rank's rows in the row of documents, each padded as the peer needs."""

    package: str
    name: str
    rows: Tensor
    make: Callable[[], published.Attention]


def peers(setting: Setting, sizes: list[int]) -> list[Peer]:
    """Published implementations of attention over documents of these lengths."""
    group, rank, length = ring_group(setting), setting.rank, sum(sizes)
    ring = PerDocumentZigzag(sizes, group, "none", setting.device)
    zigzag = ring.positions()
    straight = torch.arange(rank * length // setting.ranks, (rank + 1) * length // setting.ranks)
    if len(sizes) == 1:
        return [
            Peer(
                "ring-flash-attn",
                "ring-flash-attn zigzag ring",
                zigzag,
                lambda: published.zigzag(group),
            ),
            Peer("yunchang", "yunchang ulysses", straight, lambda: published.ulysses(group)),
        ]
    edges = torch.tensor(
        [0, *itertools.accumulate(sizes)], dtype=torch.int32, device=setting.device
    )
    kv_heads = setting.heads[0][1]
    return [
        Peer(
            "ring-flash-attn",
            "ring-flash-attn zigzag varlen",
            zigzag,
            lambda: published.zigzag_varlen(group, ring.cu, ring.longest),
        ),
        Peer(
            "ring-flash-attn",
            "ring-flash-attn llama3",
            straight,
            lambda: published.llama3(group, edges, kv_heads),
        ),
    ]


def theirs(setting: Setting) -> Setting:
    """flash-attn has no float32, and ring-flash-attn's gradients are wrong there: what it makes
    float32 must become a copy.
    """
    return dataclasses.replace(setting, dtype=torch.bfloat16)


def installed(peer: Peer, name: str) -> bool:
    if published.version(peer.package) is None:
        note(name, published.missing(peer.package))
        return False
    return True


def peer_speed(
    setting: Setting, peer: Peer, name: str, shape: tuple[int, int], pairs: int
) -> Row | None:
    if not installed(peer, name):
        return None
    return attempt(
        setting,
        name,
        lambda: speed_of(theirs(setting), peer.make(), len(peer.rows), shape, pairs, setting.ranks),
    )


def ring_group(setting: Setting) -> dist.ProcessGroup:
    group = context(setting, "zigzag-ring").axes[1].ring
    assert group is not None
    return group


def torch_context_parallel(setting: Setting, length: int, shape: tuple[int, int]) -> Row:
    """PyTorch's own ring, with the kernel that its scaled_dot_product_attention prefers here; key
    heads are repeated, as it needs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh("cuda", (setting.ranks,))
    times: list[list[float]] = [[], []]
    for i in range(setting.repeats + 1):
        q, k, v, _ = inputs(length, shape[0], shape[0], setting.dim, setting)
        q, k, v = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v))
        with (
            sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
            context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
        ):
            for x in (q, k, v):
                x.requires_grad_()
            dist.barrier()
            torch.cuda.synchronize()
            began = time.perf_counter()
            # Through the module: the context replaces the module's function.
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            out.backward(torch.ones_like(out))
            torch.cuda.synchronize()
            if i:
                times[0].append(middle - began)
                times[1].append(time.perf_counter() - began)
            for x in (q, k, v):
                x.requires_grad_(False)
    return figures(
        setting,
        length * (length + 1) // 2,
        shape,
        *(statistics.median(t) for t in times),
        setting.ranks,
    )
