"""Sequence parallelism over the GPUs of one machine: attention, scaling, length, peers, parity.

    python benchmarks/many_gpus.py --gpus 4 --part attention --out benchmarks/results
    python benchmarks/many_gpus.py --gpus 4 --part length --only "7B, 1,048,576" --out benchmarks/results
    python benchmarks/many_gpus.py --gpus 8 --part length --only "7B, 1,572,864"   # see EIGHT below
    python benchmarks/many_gpus.py --gpus 4 --check             # every part at once, small, a minute
    python benchmarks/many_gpus.py --smoke --part attention     # two CPU processes, tiny shapes

Each part is one command of less than 10 minutes, bounded by `--limit`, and writes
many_gpus_PART_NxGPU.json and .md into `--out`; with it, rows that were measured before stay unless
they are measured again.

attention  every schedule, and `auto`, on documents of 64k to 1M tokens and on packed rows, head
           dims 128, 256 and 192/128; TFLOP/s a GPU, over one GPU's kernel at the same work, and the
           exchange: NCCL's kernels (with waiting for other ranks) and what of them no other kernel
           hides
packed     packed rows taken apart: small tiles, imbalance, launches, exchange; any number of ranks,
           timed share by share on what GPUs there are
scaling    Qwen2.5-7B's shape, all parameters, 32,768 local tokens, SP 1, 2, 4, ... with DP for the rest;
           tokens/s a GPU over the attention-corrected ideal; and DP x SP at the same samples a step:
           tokens/s and losses
length     one step of the longest rows through the command; each with a time limit of its own
peers      DeepSpeed ALST beside LongFactory (`_peers.py`), and where a step's time goes on the device
parity     20 steps of a 0.5B shape in bf16: SP's distance from the float32 curve beside one GPU's.
           Nothing is timed: all runs share the GPUs
resume     a run over all GPUs whose process of one rank is killed, resumed over half of them

Commands that have not run yet, in order of value, each less than 10 minutes with `--out
benchmarks/results`. FOUR GPUs, with their seconds (those of whole models need H200):

    many_gpus.py --gpus 4 --part scaling --only "SP 1, 4 rows" ", 1 rows" "2 rows" --limit 200  # 150
    many_gpus.py --gpus 4 --part attention --only "of 256k" "of 512k"     # 75: messages of long rows
    many_gpus.py --gpus 4 --part attention --only "32k, 28/4"    # 60, with ring-flash-attn, yunchang
    many_gpus.py --gpus 4 --part length --only "14B, 524,288" --limit 500      # the whole model: 350 is too little
    length.py --gpus 4 --probe 524288 --limit 60; length.py --gpus 4 --probe 2097152 --limit 170

EIGHT; the rows of the part `length` are then others (`_many_length.WIDE`):

    many_gpus.py --gpus 8 --part length --only "7B, 1,572,864"
    many_gpus.py --gpus 8 --part length --only "14B, 983,040"
    many_gpus.py --gpus 8 --part length --only "7B, 786,432"
    many_gpus.py --gpus 8 --part length --only "Qwen3-8B"
    many_gpus.py --gpus 8 --part length --only "Llama-3-8B"
    many_gpus.py --gpus 8 --part length --only "B-A3B, 131,072" "B-A3B, 1,048,576"
    many_gpus.py --gpus 8 --part length --only "2,097,152" "1,310,720"
    many_gpus.py --gpus 8 --part length --only "5,242,880"
    many_gpus.py --gpus 8 --part scaling
    many_gpus.py --gpus 8 --part attention --only "of 128k" "of 256k" "long mix" "chat mix"
    many_gpus.py --gpus 8 --part parity
    many_gpus.py --gpus 8 --part peers
    length.py --gpus 8 --probe 2097152
    seed_table.py                                # 72B on 32 GPUs: the plan's answer
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _many_attention import ATTENTION_NOTE, attention  # noqa: E402
from _many_length import LENGTH_NOTE, length  # noqa: E402
from _many_packed import PACKED_NOTE, packed  # noqa: E402
from _many_parity import PARITY_NOTE, parity  # noqa: E402
from _many_peers import PEERS_NOTE, peers  # noqa: E402
from _many_resume import RESUME_NOTE, resume  # noqa: E402
from _many_scaling import SCALING_NOTE, scaling  # noqa: E402
from _many_table import from_log, wanted  # noqa: E402
from plan_accuracy import ended_in_time  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--check", action="store_true", help="every part at once, small")
    parser.add_argument("--small", action="store_true", help="small shapes, on GPUs")
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name has one of these")
    parser.add_argument("--repeats", type=int, help="default 5: of what is timed; seeds of parity")
    parser.add_argument("--layers", type=int, default=28, help="of the part scaling")
    parser.add_argument("--limit", type=float, default=540, help="no row begins later (seconds)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--after",
        type=Path,
        help="runs in a group begin, all imported, when there is such a file",
    )
    parser.add_argument("--log", type=Path, help="what this command printed, to write tables of")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.check == (a.part is not None):
        parser.error("either --part or --check is needed")
    a.title, a.notes = TITLES.get(a.part), NOTES.get(a.part, [])
    if a.log is not None:
        return from_log(a)
    a.gpus_asked_for = a.gpus  # a table of rows is for so many, with --smoke too
    if a.smoke:
        a.gpus = 2
    if a.smoke or a.small:
        a.repeats, a.small = a.repeats or 1, True
    a.repeats = a.repeats or 5
    if not a.smoke and torch.cuda.device_count() < a.gpus:
        raise SystemExit(f"{a.gpus} GPUs are needed, found {torch.cuda.device_count()}.")
    a.end = time.time() + a.limit
    if a.check:
        return check(a)
    if a.part in ("attention", "packed") and "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run([*command, f"--nproc_per_node={a.gpus}", *sys.argv]).returncode
    return PARTS[a.part](a)


def check(a: argparse.Namespace) -> int:
    """Starts each part with small shapes in processes of their own; prints how each ended."""
    begun = time.time()

    def one(part: str) -> tuple[str, int, str]:
        command = [sys.executable, __file__, "--part", part, "--gpus", str(a.gpus)]
        command += ["--smoke" if a.smoke else "--small", "--limit", str(a.end - time.time() - 5)]
        code, text = ended_in_time(command, dict(os.environ), max(10.0, a.end - time.time()))
        return part, code, text

    parts = [part for part in PARTS if wanted(a, part)]
    failed = False
    with concurrent.futures.ThreadPoolExecutor(1 if a.smoke else len(parts)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, p) for p in parts]):
            part, code, text = done.result()
            bad = code != 0 or '"error"' in text
            failed |= bad
            print(f"--- {part}: exit status {code}, {time.time() - begun:.0f} s", flush=True)
            print(text[-6000:] if bad else text[-1500:], flush=True)
    return int(failed)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attention": attention,
    "packed": packed,
    "scaling": scaling,
    "length": length,
    "peers": peers,
    "parity": parity,
    "resume": resume,
}


TITLES = {
    "attention": "Attention over the GPUs of one machine",
    "packed": "Packed rows: what binds",
    "scaling": "Sequence parallelism: tokens a second of a GPU as a row is spread wider",
    "length": "The longest rows",
    "peers": "Beside DeepSpeed ALST",
    "resume": "Resumed over half of the GPUs",
    "parity": "bf16 with sequence parallelism, as far from float32 as one GPU?",
}


NOTES = {
    "attention": [ATTENTION_NOTE],
    "packed": [PACKED_NOTE],
    "scaling": [SCALING_NOTE],
    "length": [LENGTH_NOTE],
    "peers": [PEERS_NOTE],
    "parity": [PARITY_NOTE],
    "resume": [RESUME_NOTE],
}


if __name__ == "__main__":
    raise SystemExit(main())
