"""The part `peers` of `many_gpus.py`: DeepSpeed ALST beside LongFactory."""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _many_table import K, Row, earlier, keep, wanted
from _table import Clock, GiB, ended_by_signals, job, log_file, run_row

SYSTEMS = {"ours": "LongFactory", "alst": "DeepSpeed ALST"}


class Case(NamedTuple):
    """A row of tokens through so many layers; the whole model without."""

    what: str
    tokens: int
    layers: int | None = None

    @property
    def name(self) -> str:
        return f"{self.what}, {self.tokens:,} tokens"


def peers(a: argparse.Namespace) -> int:
    """LongFactory and DeepSpeed's ALST on the same kernel, each in processes of its own."""
    rows, failed = earlier(a), False
    clock, log = Clock(a.end - time.time()), log_file("many-gpus-peers")
    for case in cases(a):
        if not wanted(a, case.name):
            continue
        keys: Row = {"layers": case.layers, "steps": int(a.smoke), "profile": True}
        keys |= {"shape": "tiny", "kernel": "cpu"} if a.smoke else {"shape": "7b"}
        # what the plan takes where there is room, as on four H200
        saved = {"settings": {"keep_mlp": 1.0}} if a.smoke else {}
        jobs = [
            job("ours", [case.tokens], mode="auto", **keys, **saved),
            job("alst", [case.tokens], **keys),
        ]
        # the whole model is beside itself on no GPU
        results = in_turn if case.layers is not None else one_by_one
        ours: Row | None = None
        for name, fact in results(jobs, a.gpus, clock, log):
            row = peer_row(fact, case.tokens, a.gpus, ours)
            if "error" in row:
                print(log.read_text()[-3000:], file=sys.stderr, flush=True)
                failed = True
            elif name == "ours":
                ours = row
            keep(a, {"row": f"{SYSTEMS[name]}, {case.name}", **row}, rows)
    return int(failed)


def cases(a: argparse.Namespace) -> list[Case]:
    if a.smoke:
        return [Case("tiny", 512), Case("tiny, 2 layers", 512, 2)]
    if a.small:
        return [Case("7B, 2 layers", 8 * K, 2)]
    if a.gpus == 2:
        return [Case("7B, 4 of 28 layers", length * K, 4) for length in (64, 128)]
    return [Case("7B", 128 * K), Case("7B, 4 of 28 layers", 512 * K, 4)]


Found = Iterator[tuple[str, dict[str, Any]]]


def one_by_one(jobs: Sequence[Row], gpus: int, clock: Clock, log: Path) -> Found:
    """What each row reports; a row starts when the one before it has ended."""
    for each in jobs:
        for fact in run_row(each, gpus, clock, log):
            yield each["row"], fact


def in_turn(jobs: Sequence[Row], gpus: int, clock: Clock, log: Path) -> Found:
    """The same of rows that start at once, which saves the minute of a start: their models are on
    the GPUs side by side. Steps follow each other: no row begins before all have said that they are
    ready, nor before the one before it has ended.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ended_by_signals(clock),
        concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool,
    ):
        running = {
            each["row"]: pool.submit(run_row, {**each, "turn": folder}, gpus, clock, log)
            for each in jobs
        }
        while any(
            not (future.done() or (Path(folder) / f"{name}-ready").exists())
            for name, future in running.items()
        ):
            time.sleep(0.1)
        print(f"All are ready, {clock.left:.0f} s left", flush=True)
        for name, future in running.items():
            (Path(folder) / f"{name}-begins").touch()
            for fact in future.result():
                yield name, fact


def peer_row(fact: Row, tokens: int, gpus: int, ours: Row | None) -> Row:
    """What a system's processes said of a length; beside LongFactory's row, where there is one."""
    if "seconds" not in fact:
        return {"error": fact.get("error", "no result")}
    row: Row = {
        "step s": fact["seconds"],
        "tokens/s a GPU": tokens / gpus / fact["seconds"],
        "peak GiB": fact["peak"] / GiB,
        "kernels": ", ".join(fact.get("kernels", [])),
    }
    if "deepspeed" in (versions := fact.get("versions", {})):
        row["version"] = versions["deepspeed"]
    spent = {f"{k} ms": v for k, v in fact.get("device_ms", {}).items()}
    if ours is not None:
        row["LongFactory is"] = f"{fact['seconds'] / ours['step s']:.2f}x"
        if spent:
            more = {k: v - ours[k] for k, v in spent.items() if k in ours and k != "messages ms"}
            row["more than LongFactory"] = ", ".join(f"{k} {v:+.0f}" for k, v in more.items())
    if "passes" in fact:
        row["passes"] = ", ".join(f"{part} {times:.2f}" for part, times in fact["passes"].items())
    for key, column in (("exposed_ms", "exposed by operation"), ("rest_ms", "most of the rest")):
        if key in fact:
            row[column] = ", ".join(f"{name} {ms:.0f}" for name, ms in fact[key].items())
    return row | spent


PEERS_NOTE = (
    "Complete training steps (`_peers.py`): full parameters, AdamW with exact fp32 weights and states"
    " sharded over the GPUs, random tokens. A step that compiles is followed by the"
    " one that is timed, under the profiler. Milliseconds are of the first rank: sums of kernels by kind"
    " (attention; products of matrices; the rest: norms, copies, casts, sums of gradients, the update),"
    " messages (NCCL's kernels: the exchange of sequence parallelism and the gathering of weights and"
    " gradients, with waiting for other ranks), of these what no other kernel hides (exposed), and the"
    " time in which nothing runs (idle). `more than LongFactory` divides the difference of the steps."
    " Rows of some of the layers start together, and the second system's steps begin when the first"
    " one's processes have ended."
)
