"""Speed and error of the attention engine: every schedule against one GPU's kernel, against the
ring on FlashAttention 2, packed and not.

    python benchmarks/attention.py --out results          # one or two GPUs: starts one process for each
    python benchmarks/attention.py --smoke --out results  # two CPU processes, tiny shapes: does it run?

Beside them PyTorch's context_parallel and, where they are installed, ring-flash-attn and yunchang
(see published.py), on the same inputs.

Prints one table; writes attention.json and attention.md into --out. A row that fails is reported
and the others go on. Figures are TFLOP/s for each GPU: 4 * pairs * heads * head_dim forward and 2.5
times that backward, where the mask lets so many pairs see each other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import published
from _table import command_line
from longfactory import sp
from longfactory.sp import backends, kernels
from longfactory.sp.kernels import Call
from longfactory.sp.layout import balanced, chunk_work
from longfactory.sp.schedules import ring as ring_schedule
from longfactory.sp.tiles import Tile
from per_document_zigzag import PerDocumentZigzag, attention_pairs


@dataclasses.dataclass
class Setting:
    device: torch.device
    dtype: torch.dtype
    ranks: int
    rank: int
    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    dim: int
    packed_length: int
    check_length: int
    repeats: int
    smoke: bool

    @property
    def one(self) -> sp.SequenceParallel:
        return sp.SequenceParallel(device_type=self.device.type)


Row = dict[str, str | float | None]
rows: list[Row] = []
contexts: dict[tuple[str, str], sp.SequenceParallel] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="sections by name, comma separated: " + ", ".join(SECTIONS)
    )
    args = parser.parse_args()
    if "RANK" not in os.environ:
        count = 2 if args.smoke else min(args.gpus, torch.cuda.device_count())
        if count == 0:
            raise SystemExit("No GPU here. --smoke runs tiny shapes on CPUs.")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={count}",
            *sys.argv,
        ]
        os.execv(sys.executable, command)
    setting = start(args.smoke)
    began = time.perf_counter()
    for name, section in SECTIONS.items():
        if not args.only or name in args.only.split(","):
            section(setting)
            if setting.rank == 0:  # what is measured stays, whatever comes after
                text = report(setting, args.out, time.perf_counter() - began)
    if setting.rank == 0:
        print(text)
    dist.barrier()
    dist.destroy_process_group()


def start(smoke: bool) -> Setting:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if smoke:
        dist.init_process_group("gloo")
        device, dtype = torch.device("cpu"), torch.float32
        return Setting(device, dtype, ranks, rank, (256, 512), ((4, 2),), 16, 512, 128, 1, True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=datetime.timedelta(seconds=120))
    return Setting(
        device,
        torch.bfloat16,
        ranks,
        rank,
        (65536, 131072),
        ((28, 4), (32, 8)),
        128,
        131072,
        2048,
        3,
        False,
    )


def context(setting: Setting, mode: str, backend: str = "auto") -> sp.SequenceParallel:
    if (mode, backend) not in contexts:
        contexts[mode, backend] = sp.SequenceParallel.create(
            setting.ranks, mode=mode, backend=backend, device_type=setting.device.type
        )
    return contexts[mode, backend]


def attempt(setting: Setting, name: str, body: Callable[[], Row | None]) -> Row | None:
    """A row, or the reason why there is none. Whether it failed anywhere is agreed on by all ranks."""
    row, problem = None, ""
    try:
        row = body()
    except Exception as error:
        problem = (
            f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            if str(error)
            else type(error).__name__
        )
        if setting.rank == 0:
            traceback.print_exc()
    failed = torch.tensor(float(bool(problem)), device=setting.device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed.item():
        row = {"row": name, "failed": problem or "on another rank"}
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    if row is not None:
        row = {"row": name, **row}
        rows.append(row)
        if setting.rank == 0:
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                ),
                flush=True,
            )
    return row


def note(name: str, text: str) -> None:
    """A row that says why it has no figures."""
    rows.append({"row": name, "note": text})
    if dist.get_rank() == 0:
        print(f"row {name}  note {text}", flush=True)


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, setting: Setting, seed: int = 0
) -> list[Tensor]:
    """q, k, v, dout of so many rows. The same on every rank for the same seed."""
    g = torch.Generator(setting.device).manual_seed(seed)
    shape = {"device": setting.device, "dtype": setting.dtype, "generator": g}
    return [torch.randn(length, h, dim, **shape) for h in (heads, kv_heads, kv_heads, heads)]


def timed(setting: Setting, step: Callable[[], object]) -> float:
    return timed_in_turn(setting, [step], setting.repeats)[0]


def timed_in_turn(
    setting: Setting, steps: Sequence[Callable[[], object]], repeats: int
) -> list[float]:
    """Seconds of the slowest rank, median of the repeats, after one round to warm up. In turn: a
    GPU's clock falls as it grows warm.
    """
    times: list[list[float]] = [[] for _ in steps]
    for i in range(repeats + 1):
        for step, found in zip(steps, times, strict=True):
            dist.barrier()
            synchronize(setting)
            began = time.perf_counter()
            step()
            synchronize(setting)
            if i:
                found.append(time.perf_counter() - began)
    worst = torch.tensor(
        [statistics.median(t) for t in times], device=setting.device, dtype=torch.float64
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def synchronize(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def forward_backward(
    attention: published.Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def planned(plan: sp.RowPlan) -> published.Attention:
    return lambda q, k, v: sp.attention(q, k, v, plan)


def speed(setting: Setting, plan: sp.RowPlan, shape: tuple[int, int], pairs: int) -> Row:
    return speed_of(setting, planned(plan), plan.local_length, shape, pairs, plan.ctx.size)


def speed_of(
    setting: Setting,
    attention: published.Attention,
    local: int,
    shape: tuple[int, int],
    pairs: int,
    gpus: int,
) -> Row:
    q, k, v, dout = inputs(local, *shape, setting.dim, setting)
    with torch.no_grad():
        forward = timed(setting, lambda: attention(q, k, v))
    both = timed(setting, lambda: forward_backward(attention, q, k, v, dout))
    return figures(setting, pairs, shape, forward, both, gpus)


def figures(
    setting: Setting, pairs: int, shape: tuple[int, int], forward: float, both: float, gpus: int
) -> Row:
    flop = 4.0 * pairs * shape[0] * setting.dim / gpus / 1e12
    return {"forward": flop / forward, "both": 3.5 * flop / both, "ms": both * 1e3}


# --- errors ---------------------------------------------------------------------------------------


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
    worst = max(a / b for a, b in zip(many, single, strict=True))
    names = ("out", "dq", "dk", "dv")
    return {
        **dict(zip(names, many, strict=True)),
        "over one GPU": worst,
        "same twice": str(torch.equal(shared[0], again[0])),
    }


# --- published implementations --------------------------------------------------------------------


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


# --- one long document ----------------------------------------------------------------------------


def dense(setting: Setting) -> None:
    for shape in setting.heads:
        for length in setting.lengths:
            pairs, label = (
                length * (length + 1) // 2,
                f"{shape[0]}/{shape[1]} heads, {length // 1024}k",
            )
            one = attempt(
                setting,
                f"one GPU, {label}",
                lambda: speed(setting, sp.plan(length, None, setting.one), shape, pairs),
            )
            if setting.ranks == 1:
                continue
            found: list[Row] = []
            for mode in ("zigzag-ring", "ulysses", "llama3", "auto"):
                ctx = context(setting, mode)
                ctx.set_heads(*shape)
                row = attempt(
                    setting,
                    f"{mode}, {label}",
                    lambda: speed(setting, sp.plan(length, None, ctx), shape, pairs),
                )
                if row is not None and "both" in row:
                    found.append(row)
                    if mode == "auto":
                        row["note"] = sp.plan(length, None, ctx).choice.reason
            if setting.device.type == "cuda":
                plan = sp.plan(length, None, context(setting, "zigzag-ring", "flash"))
                slow = attempt(
                    setting,
                    f"zigzag ring on FlashAttention 2, {label}",
                    lambda: speed(setting, plan, shape, pairs),
                )
                ratio(found, slow, "over FA2 ring")
                if shape == setting.heads[0]:
                    torch_cp = attempt(
                        setting,
                        f"torch context_parallel, {label}",
                        lambda: torch_context_parallel(setting, length, shape),
                    )
                    ratio([torch_cp], one, "over one GPU")
            others = [
                peer_speed(setting, peer, f"{peer.name}, {label}", shape, pairs)
                for peer in peers(setting, [length])
            ]
            ratio([*found, *others], one, "over one GPU")
            ratio(found, others[0], "over ring-flash-attn")


def ratio(found: Sequence[Row | None], base: Row | None, name: str) -> None:
    if base is not None and "both" in base:
        for row in found:
            if row is not None and "both" in row:
                row[name] = row["both"] / base["both"]  # type: ignore[operator]


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


# --- packed rows ----------------------------------------------------------------------------------


def documents(length: int, median: int, sigma: float, cap: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    out: list[int] = []
    while sum(out) < length:
        out.append(
            min(length - sum(out), int(min(cap, max(16, median * rng.lognormvariate(0, sigma)))))
        )
    return out


MIXES = {"long mix, median 8k": (8192, 1.0, 65536), "chat mix, median 1k": (1024, 1.2, 32768)}


def mixed(setting: Setting, mix: str, length: int) -> list[int]:
    median, sigma, cap = MIXES[mix]
    if setting.smoke:
        median, cap = median // 128, cap // 128
    return documents(length, median, sigma, cap, seed=1)


def segments_of(sizes: list[int]) -> list[sp.Segment]:
    return [sp.Segment(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def packed(setting: Setting) -> None:
    for mix in MIXES:
        length, shape = setting.packed_length, setting.heads[0]
        sizes = mixed(setting, mix, length)
        segments = segments_of(sizes)
        pairs, label = attention_pairs(sizes), f"{mix}, {len(sizes)} documents, {length // 1024}k"
        kernel = varlen_kernel(setting, shape)
        plain = sp.SequenceParallel(device_type=setting.device.type, backend=kernel)
        found: list[Row] = []
        one = attempt(
            setting,
            f"one GPU, one {kernel} call, {label}",
            lambda: packed_speed(setting, segments, plain, shape, pairs),
        )
        rows_of = [("one GPU", setting.one)]
        if setting.ranks > 1:
            rows_of += [
                (mode, context(setting, mode))
                for mode in ("zigzag-ring", "ulysses", "llama3", "auto")
            ]
            rows_of += [(f"llama3 on {kernel}", context(setting, "llama3", kernel))]
        for name, ctx in rows_of:
            ctx.set_heads(*shape)
            row = attempt(
                setting,
                f"{name}, {label}",
                lambda: packed_speed(setting, segments, ctx, shape, pairs),
            )
            found += [row] if row is not None and "both" in row else []
        ratio(found, one, "over one GPU")
        if setting.ranks > 1:
            ring = PerDocumentZigzag(sizes, ring_group(setting), kernel, setting.device)
            local, gpus = ring.local_length, setting.ranks
            usual = attempt(
                setting,
                f"per-document zigzag ring, {label}",
                lambda: {
                    **speed_of(setting, ring.attention, local, shape, pairs, gpus),
                    "note": f"kernel {kernel}",
                },
            )
            others = [
                peer_speed(setting, peer, f"{peer.name}, {label}", shape, pairs)
                for peer in peers(setting, sizes)
            ]
            ratio([usual, *others], one, "over one GPU")
            ratio(found, usual, "over per-document ring")
            ratio(found, others[0], "over ring-flash-attn")


def packed_speed(
    setting: Setting,
    segments: list[sp.Segment],
    ctx: sp.SequenceParallel,
    shape: tuple[int, int],
    pairs: int,
) -> Row:
    plan = sp.plan(setting.packed_length, segments, ctx)
    row = speed(setting, plan, shape, pairs)
    return {**row, "note": plan.choice.reason} if ctx.mode == "auto" else row


def varlen_kernel(setting: Setting, shape: tuple[int, int]) -> str:
    """Name of the backend that does several documents in one call here."""
    tile = Tile(slice(0, 256), slice(0, 256), "varlen", (0, 100, 256))
    q, _, v, _ = inputs(256, *shape, setting.dim, setting)
    chosen = backends.select("auto", tile, q, v, None)
    return next(name for name, backend in backends.BACKENDS.items() if backend is chosen)


def balance(setting: Setting) -> None:
    """Work of the busiest of 8 ranks over the mean, for 40 packs of each mix. Counted, not timed."""
    for mix, (median, sigma, cap) in MIXES.items():
        ratios = []
        for seed in range(40):
            length, ranks = 131072, 8
            segments = segments_of(documents(length, median, sigma, cap, seed))
            work = chunk_work(length, 512, segments)
            layout = balanced(length, ranks, segments, 512)
            load = [
                sum(work[c] for a, b in i for c in range(a // 256, b // 256))
                for i in layout.intervals
            ]
            ratios.append(max(load) * ranks / sum(load))
        row: Row = {"row": f"work of the busiest of 8 ranks over the mean, {mix}"}
        rows.append({**row, "mean": statistics.mean(ratios), "worst of 40": max(ratios)})


def bookkeeping(setting: Setting) -> None:
    """Share of the time that is not inside the kernels, without messages: merges, sums, casts,
    copies, Python.
    """
    local = 16384 if not setting.smoke else 128
    # The rank of two that merges most: its second tile has all of its queries.
    plan = sp.plan(2 * local, None, sp.SequenceParallel(2, 1, device_type=setting.device.type))
    bookkeeping_rows(setting, f"one document, {local // 1024}k local tokens", plan)
    for mix in MIXES:
        segments = segments_of(mixed(setting, mix, setting.packed_length // 2))
        plan = sp.plan(setting.packed_length // 2, segments, setting.one)
        bookkeeping_rows(setting, f"{mix}, {setting.packed_length // 2048}k local tokens", plan)


def bookkeeping_rows(setting: Setting, label: str, plan: sp.RowPlan) -> None:
    """One rank, with messages that are there at once. Its whole step beside the same kernel calls
    alone, by the clock and by kernel.
    """
    name = f"merge and bookkeeping, {label}"
    shape, scale = setting.heads[0], setting.dim**-0.5
    q, k, v, dout = inputs(plan.local_length, *shape, setting.dim, setting)

    @functools.cache
    def calls() -> list[tuple]:
        call, out = Call(plan, scale), []
        cut = kernels.bulk(q, v, call)
        for tile in (t for source in call.mask.ring_order for t in call.mask.tiles(source, cut)):
            tensors = (q[tile.q], k[tile.k], v[tile.k])
            backend = backends.select("auto", tile, tensors[0], tensors[2], None)
            block, lse = backend.forward(*tensors, tile, scale, None)
            out.append((backend, tile, tensors, dout[tile.q], block.contiguous(), lse.contiguous()))
        return out

    def bare() -> None:
        for backend, tile, tensors, *_ in calls():
            backend.forward(*tensors, tile, scale, None)
        for backend, tile, tensors, grad, out, lse in calls():
            backend.backward(grad, *tensors, out, lse, tile, scale, None)

    def whole() -> None:
        forward_backward(planned(plan), q, k, v, dout)

    def by_the_clock() -> Row:
        inside, all_of_it = timed_in_turn(setting, [bare, whole], 3 * setting.repeats)
        return {
            "kernels ms": inside * 1e3,
            "all ms": all_of_it * 1e3,
            "share": 1 - inside / all_of_it,
        }

    def by_kernel() -> Row:
        inside, all_of_it = device_ms(setting, bare), device_ms(setting, whole)
        # What the attention operators fill and copy themselves is theirs.
        added = {
            kind: all_of_it.get(kind, 0.0) - inside.get(kind, 0.0)
            for kind in KINDS
            if kind != "attention"
        }
        attention = sum(all_of_it.values()) - sum(added.values())
        share = sum(added.values()) / sum(all_of_it.values())
        return {
            "kernels ms": attention,
            "all ms": sum(all_of_it.values()),
            "share": share,
            **{f"{k} ms": x for k, x in added.items()},
        }

    with messages_at_once():
        attempt(setting, name, by_the_clock)
        attempt(setting, f"{name}, by kernel", by_kernel)


class Loopback:
    """A message that is its own answer, already here."""

    def __init__(self, buffer: Tensor, *_: object) -> None:
        self.buffer = buffer

    def wait(self) -> Tensor:
        return self.buffer


@contextlib.contextmanager
def messages_at_once() -> Iterator[None]:
    original = ring_schedule.Exchange
    ring_schedule.Exchange = Loopback  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        ring_schedule.Exchange = original  # type: ignore[misc]


KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash", "sdpa", "fmha", "cudnn", "attention"),
    "merge": ("_merge",),
    "add": ("add",),
    "copy": ("copy", "memcpy", "index", "cat"),
    "fill": ("fill", "memset", "zero"),
    "other": ("",),
}
"""Parts of the names of kernels; the first kind that fits."""


def device_ms(setting: Setting, step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the device of a step by kind of kernel (on CPUs: of operators), mean of the
    repeats after one to warm up.
    """
    step()
    synchronize(setting)
    with torch.profiler.profile() as profile:
        for _ in range(setting.repeats):
            step()
        synchronize(setting)
    out: dict[str, float] = {}
    for event in profile.events():
        if setting.device.type == "cuda":
            ms = (
                event.time_range.elapsed_us() / 1e3
                if event.device_type == torch.autograd.DeviceType.CUDA
                else 0.0
            )
        else:
            ms = event.self_cpu_time_total / 1e3 if event.name.startswith("aten::") else 0.0
        if ms:
            kind = next(
                kind
                for kind, parts in KINDS.items()
                if any(part in event.name.lower() for part in parts)
            )
            out[kind] = out.get(kind, 0.0) + ms / setting.repeats
    if not out:
        raise RuntimeError("the profiler saw nothing on the device")
    return out


SECTIONS: dict[str, Callable[[Setting], None]] = {
    "errors": errors,
    "bookkeeping": bookkeeping,
    "dense": dense,
    "packed": packed,
    "balance": balance,
}


def report(setting: Setting, folder: Path, seconds: float) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    cuda = setting.device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "processes": setting.ranks,
        "dtype": str(setting.dtype),
        "head dim": setting.dim,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **{package: published.version(package) for package in ("flash-attn-4", *published.MODULES)},
        "command": command_line(),
        "seconds": round(seconds, 1),
    }
    (folder / "attention.json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        "# Attention",
        "",
        ", ".join(f"{k}: {v}" for k, v in about.items() if v is not None),
        "",
    ]
    lines += ["Speeds are TFLOP/s for each GPU: forward alone, and forward with backward.", ""]
    tables = {
        "error": "Errors (relative root mean square, from float64)",
        "merge": "Merge and bookkeeping of one rank",
        "": "Speed",
    }
    for prefix, title in tables.items():
        chosen = [
            r for r in rows if next(p for p in tables if str(r["row"]).startswith(p)) == prefix
        ]
        columns = list(dict.fromkeys(k for r in chosen for k in r))
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for r in chosen:
            cells = [r.get(c, "") for c in columns]
            lines.append(
                "| "
                + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
                + " |"
            )
        lines.append("")
    (folder / "attention.md").write_text("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
