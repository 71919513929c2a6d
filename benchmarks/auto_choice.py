"""`auto` beside every schedule that it could have taken, on the GPUs of one machine: is its choice
within 3 % of the best one of each row?

    python benchmarks/auto_choice.py --gpus 4 --out benchmarks/results     # some three minutes
    python benchmarks/auto_choice.py --smoke --out results                 # two CPU processes, tiny shapes: does it run?

One layer's attention, forward and backward, bf16, head dim 128: documents of 64k and 128k tokens
with 28/4 and 32/8 heads, and the two packed mixes of attention.py. Schedules are timed in turn,
median of `--repeats` rounds, on the slowest rank. `auto` is there twice: as it measures
(`sp/measure.py`; the time that this took is in the table) and by its rule alone
(`sp/schedules/choose.py`). Writes auto_choice.json and auto_choice.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import _attention_rows as mixes
import _attention_setting as bench
from _table import command_line
from longfactory import sp
from longfactory.sp.measure import Measure, forward_backward
from longfactory.sp.plan import RowPlan
from longfactory.sp.schedules.choose import candidates, choice_of
from per_document_zigzag import attention_pairs

Row = dict[str, str | float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    if "RANK" not in os.environ:
        count = 2 if a.smoke else min(a.gpus, torch.cuda.device_count())
        if count < 2:
            raise SystemExit("Two GPUs or more are needed. --smoke runs tiny shapes on CPUs.")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={count}",
            *sys.argv,
        ]
        os.execv(sys.executable, command)
    setting = bench.start(a.smoke)
    dtype = setting.dtype
    rows: list[Row] = []
    for shape in setting.heads:
        # Contexts of one shape: what was measured for another one's heads says nothing here.
        by_clock, by_rule = (
            sp.SequenceParallel.create(setting.ranks, "auto", device_type=setting.device.type)
            for _ in range(2)
        )
        for ctx in (by_clock, by_rule):
            ctx.set_heads(*shape)
        measure = Measure(by_clock, setting.dim, setting.dim, dtype, setting.device)
        documents: dict[str, list[int]] = {
            f"one document, {length // 1024}k": [length] for length in setting.lengths
        }
        if shape == setting.heads[0]:
            documents |= {
                mix: mixes.mixed(setting, mix, setting.packed_length) for mix in mixes.MIXES
            }
        for label, sizes in documents.items():
            rows.append(
                row(
                    f"{label}, {shape[0]}/{shape[1]} heads",
                    setting,
                    shape,
                    mixes.segments_of(sizes),
                    measure,
                    by_rule,
                    a.repeats,
                )
            )
            if setting.rank == 0:
                print(
                    "  ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else str(v)
                        for k, v in rows[-1].items()
                    ),
                    flush=True,
                )
    if setting.rank == 0:
        write(rows, setting, a.out)
    dist.barrier()
    dist.destroy_process_group()


def row(
    label: str,
    setting: bench.Setting,
    shape: tuple[int, int],
    segments: list[sp.Segment],
    measure: Measure,
    by_rule: sp.SequenceParallel,
    repeats: int,
) -> Row:
    """TFLOP/s a GPU of each schedule, and what `auto` takes over the best of them."""
    length, by_clock = segments[-1].stop, measure.ctx
    began = time.perf_counter()
    measure(length, segments)
    measured_for = time.perf_counter() - began
    names = {c.name(setting.ranks): c for c in candidates(by_clock, length)}
    plans = {
        name: RowPlan(
            length, tuple(segments), by_clock, choice_of(c, setting.ranks, length, segments)
        )
        for name, c in names.items()
    }
    q, k, v, dout = bench.inputs(
        length // setting.ranks, *shape, setting.dim, setting, seed=setting.rank
    )
    steps = [functools.partial(forward_backward, plan, q, k, v, dout) for plan in plans.values()]
    times = dict(zip(plans, bench.timed_in_turn(setting, steps, repeats), strict=True))
    flop = (
        3.5
        * 4.0
        * attention_pairs([s.stop - s.start for s in segments])
        * shape[0]
        * setting.dim
        / setting.ranks
        / 1e12
    )
    out: Row = {"row": label} | {name: flop / seconds for name, seconds in times.items()}
    best = min(times.values())
    for how, ctx in (("auto, measured", by_clock), ("auto, rule", by_rule)):
        choice = sp.plan(length, segments, ctx).choice
        taken = next(
            name
            for name, c in names.items()
            if (c.ulysses, c.exchange) == (choice.ulysses, choice.exchange)
        )
        out |= {how: taken, f"{how}: over the best": best / times[taken]}
    return out | {"seconds of measuring": measured_for}


def write(rows: list[Row], setting: bench.Setting, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {**bench.about(setting), "command": command_line()}
    (folder / "auto_choice.json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        "# What auto chooses",
        "",
        ", ".join(f"{k}: {v}" for k, v in about.items() if v is not None),
        "",
    ]
    lines += ["Speeds are TFLOP/s for each GPU, forward with backward.", ""]
    lines += bench.table(rows)
    (folder / "auto_choice.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
