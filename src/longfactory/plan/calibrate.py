"""`longfactory plan --calibrate`: the rates of this machine, measured in under a minute."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from longfactory import sp
from longfactory.memory.calibration import Calibration, default_path, write
from longfactory.memory.optimizer import SplitAdamW
from longfactory.sp.layout import Segment

SECONDS = 1.0  # that each rate is measured for, at least
SIDE = 8192  # of the matrices that are multiplied
TOKENS, HEADS, KEY_HEADS, HEAD_DIM = 16384, 32, 8, 128  # of attention
COPIED = 2**28  # bytes of a copy, and of what each GPU sends to the others
UPDATED = 2**26  # weights that AdamW on the host updates
UPDATE_BYTES = 28  # of each: as the memory plan counts


def main(path: Path | None = None) -> int:
    """Measures, prints and writes. Exit status 0."""
    path = default_path() if path is None else path
    measured = measure()
    write(measured, path)
    print("\n".join([*lines(measured), f"written to {path}"]))
    return 0


def measure() -> Calibration:
    """Rates of this machine: of its first GPU, of its host, and of the links between its GPUs. A
    machine without a GPU has its host's alone.
    """
    cores = os.cpu_count() or 1
    host = host_update(cores)
    if not torch.cuda.is_available():
        return Calibration(host, cores)
    device = torch.device("cuda", 0)
    forward, backward = attention(device, HEAD_DIM)
    wide = sum(1 / rate for rate in attention(device, 2 * HEAD_DIM))
    gpus = torch.cuda.device_count()
    return Calibration(
        host_memory=host,
        cores=cores,
        gpu=torch.cuda.get_device_name(device),
        products=products(device),
        attention_forward=forward,
        attention_backward=backward,
        wide_heads=(1 / forward + 1 / backward) / wide,
        copies=copies(device),
        links=links(gpus) if gpus > 1 else None,
        gpus=gpus if gpus > 1 else 0,
    )


def lines(measured: Calibration) -> list[str]:
    """What was measured, a line each."""
    host = f"AdamW on the host: {measured.host_memory / 1e9:.1f} GB/s with {measured.cores} cores"
    if measured.gpu is None:
        return [
            host,
            "No GPU is visible: products, attention, copies and links were not measured, and a plan"
            " takes those of the kind of GPU.",
        ]
    assert measured.products and measured.attention_forward and measured.attention_backward
    assert measured.copies
    found = [
        f"{measured.gpu}: products {measured.products / 1e12:.0f} TFLOP/s, attention forward"
        f" {measured.attention_forward / 1e12:.0f}, backward"
        f" {measured.attention_backward / 1e12:.0f} (heads of 256:"
        f" {measured.wide_heads or 0:.0%} of that)",
        f"pinned copies: {measured.copies / 1e9:.1f} GB/s",
        host,
    ]
    if measured.links is not None:
        found.append(f"gathering over {measured.gpus} GPUs: {measured.links / 1e9:.1f} GB/s a GPU")
    return found


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a call, after three that are not counted. A call that takes longer than all
    should is not made again.
    """

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        begun = time.perf_counter()
        call()
        finish()
        if (taken := time.perf_counter() - begun) > SECONDS:
            return taken
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        for _ in range(4):
            call()
        finish()
        calls += 4
    return (time.perf_counter() - begun) / calls


def products(device: torch.device) -> float:
    """FLOP/s of a product of two square matrices in bf16."""
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    return 2.0 * SIDE**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)


def attention(device: torch.device, head_dim: int) -> tuple[float, float]:
    """FLOP/s of causal attention in bf16, forward and backward, with the kernel that training
    would take.
    """
    ctx = sp.SequenceParallel.create(1)
    plan = sp.plan(TOKENS, [Segment(0, TOKENS)], ctx)
    q, k, v = (
        torch.randn(TOKENS, heads, head_dim, device=device).to(torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    out, lse = sp.attention_forward(q, k, v, plan)
    forward = functools.partial(sp.attention_forward, q, k, v, plan)
    backward = functools.partial(
        sp.attention_backward, torch.randn_like(out), q, k, v, out, lse, plan
    )
    flop = 2.0 * TOKENS**2 * HEADS * head_dim
    return flop / seconds_of(forward, device), 2.5 * flop / seconds_of(backward, device)


def copies(device: torch.device) -> float:
    """Bytes/s of copies from pinned memory or to it, whichever is slower."""
    here = torch.empty(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    to_host = seconds_of(lambda: here.copy_(there, non_blocking=True), device)
    to_gpu = seconds_of(lambda: there.copy_(here, non_blocking=True), device)
    return COPIED / max(to_host, to_gpu)


def host_update(cores: int) -> float:
    """Bytes/s of host memory of an update of `SplitAdamW` on the host: with all cores, or with a
    half or a quarter of them where these are faster. Threads wait for each other, so that one core
    that another process has holds up all.
    """
    before = torch.get_num_threads()
    weights = torch.nn.Parameter(torch.randn(UPDATED).to(torch.bfloat16))
    weights.grad = torch.randn(UPDATED).to(torch.bfloat16)
    optimizer = SplitAdamW([weights], placement="host")
    best = float("inf")
    try:
        for threads in (cores // 4, cores // 2, cores):
            if threads == 0:
                continue
            torch.set_num_threads(threads)
            taken = seconds_of(optimizer.step, weights.device)
            if taken > best:
                break
            best = taken
    finally:
        torch.set_num_threads(before)
    return UPDATE_BYTES * UPDATED / best


def links(gpus: int) -> float:
    """Bytes/s that one GPU receives while all of this host gather parameters."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        torch.multiprocessing.spawn(_gather, (gpus, store, Path(folder) / "rate"), nprocs=gpus)
        return float((Path(folder) / "rate").read_text())


def _gather(rank: int, gpus: int, store: Path, result: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=gpus)
    part = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    whole = torch.empty(gpus * COPIED, dtype=torch.uint8, device=device)
    # a number of calls that is the same on all: by time they would differ
    for _ in range(3):
        dist.all_gather_into_tensor(whole, part)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(20):
        dist.all_gather_into_tensor(whole, part)
    torch.cuda.synchronize(device)
    if rank == 0:
        seconds = (time.perf_counter() - begun) / 20
        result.write_text(str((gpus - 1) * COPIED / seconds))
    dist.destroy_process_group()
