"""The part `peers` of `many_gpus.py`: DeepSpeed ALST beside LongFactory."""

from __future__ import annotations

import argparse
import sys
import time

from _many_table import K, Row, earlier, keep
from _table import Clock, GiB, job, log_file, run_row


def peers(a: argparse.Namespace) -> int:
    """LongFactory and DeepSpeed's ALST on the same kernel, each in processes of its own."""
    cases: list[tuple[str, list[int], int | None]] = [
        ("7B", [128 * K], None),
        ("7B, 4 of 28 layers", [512 * K], 4),
    ]
    if a.gpus == 2:
        cases = [("7B, 4 of 28 layers", [64 * K, 128 * K], 4)]
    if a.small:
        cases = [("7B, 2 layers", [512 if a.smoke else 8192], None if a.smoke else 2)]
    rows, failed = earlier(a), False
    clock, log = Clock(a.end - time.time()), log_file("many-gpus-peers")
    for what, lengths, layers in cases:
        ours: dict[int, Row] = {}
        for name, system in (("ours", "LongFactory"), ("alst", "DeepSpeed ALST")):
            keys: Row = {"layers": layers, "steps": int(a.smoke)}
            keys |= {"shape": "tiny", "kernel": "cpu"} if a.smoke else {"shape": "7b"}
            if name == "ours":
                keys["mode"] = "auto"
            asked = job(name, lengths, profile=True, **keys)
            for fact in run_row(asked, a.gpus, clock, log):
                tokens = fact.get("tokens") or lengths[0]
                row = peer_row(fact, tokens, a.gpus, ours.get(tokens))
                if "error" in row:
                    print(log.read_text()[-3000:], file=sys.stderr, flush=True)
                    failed = True
                elif name == "ours":
                    ours[tokens] = row
                keep(a, {"row": f"{system}, {what}, {tokens:,} tokens", **row}, rows)
    return int(failed)


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
    spent = {f"{k} ms": v for k, v in fact.get("device_ms", {}).items()}
    if ours is not None:
        row["LongFactory is"] = f"{fact['seconds'] / ours['step s']:.2f}x"
        if spent:
            more = {k: v - ours[k] for k, v in spent.items() if k in ours and k != "messages ms"}
            row["more than LongFactory"] = ", ".join(f"{k} {v:+.0f}" for k, v in more.items())
    return row | spent


PEERS_NOTE = (
    "Complete training steps (`_peers.py`): full parameters, AdamW with exact fp32 weights and states"
    " sharded over the GPUs, random tokens. A step that compiles is followed by the"
    " one that is timed, under the profiler. Milliseconds are of the first rank: sums of kernels by kind, messages (with waiting for other ranks), of these"
    " what no other kernel hides (exposed), and the time in which nothing runs (idle). `more than"
    " LongFactory` divides the difference: attention is what is computed a second time, exposed the"
    " exchange, the rest norms, copies and casts."
)
