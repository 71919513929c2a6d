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
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import published
from _attention_bookkeeping import bookkeeping
from _attention_errors import errors
from _attention_published import peer_speed, peers, ring_group, torch_context_parallel
from _attention_rows import MIXES, documents, mixed, segments_of, varlen_kernel
from _attention_setting import (
    Row,
    Setting,
    about,
    attempt,
    context,
    ratio,
    rows,
    speed,
    speed_of,
    start,
    table,
)
from _table import command_line
from longfactory import sp
from longfactory.sp.layout import balanced, chunk_work
from per_document_zigzag import PerDocumentZigzag, attention_pairs


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


SECTIONS: dict[str, Callable[[Setting], None]] = {
    "errors": errors,
    "bookkeeping": bookkeeping,
    "dense": dense,
    "packed": packed,
    "balance": balance,
}


def report(setting: Setting, folder: Path, seconds: float) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        **about(setting),
        **{package: published.version(package) for package in ("flash-attn-4", *published.MODULES)},
        "command": command_line(),
        "seconds": round(seconds, 1),
    }
    (folder / "attention.json").write_text(
        json.dumps({"about": head, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        "# Attention",
        "",
        ", ".join(f"{k}: {v}" for k, v in head.items() if v is not None),
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
        lines += [f"## {title}", "", *table(chosen)]
        lines.append("")
    (folder / "attention.md").write_text("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
