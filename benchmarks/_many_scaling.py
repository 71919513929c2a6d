"""The part `scaling` of `many_gpus.py`: a row over more and more GPUs, and DP x SP."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from _many_attention import ONE_GPU_AT
from _many_commands import Job, in_one_group, workplace
from _many_models import model_folder, on_gpus
from _many_table import Row, earlier, keep, wanted
from longfactory import sp
from longfactory.sp.distance import worst
from longfactory.sp.measure import forward_backward
from make_model import SHAPES
from sp_training import make_data


def scaling(a: argparse.Namespace) -> int:
    """Runs over all GPUs: SP 1, 2, 4, ... at the same local tokens, and the same
    samples a step as DP x SP.
    """
    layers, local, steps = a.layers, 32768, 3
    if a.small:
        layers, local, steps = 2, 256 if a.smoke else 2048, 3
    sizes = [n for n in (1, 2, 4, 8) if n <= a.gpus]
    rows, found = earlier(a), {}
    with workplace() as home:
        model = model_folder(a, home / "model", "qwen2.5-7b", layers)

        def job(n: int, length: int, accumulation: int) -> Job:
            data = home / f"data-{length}"
            if not data.exists():
                make_data(data, steps * accumulation * a.gpus // n, length + 64)
            keys = {
                "model_name_or_path": model,
                "train_from_scratch": "true",
                "dataset_dir": data,
                "cutoff_len": length,
                "sequence_parallel_size": n,
                "sequence_parallel_mode": "auto",
                "gradient_accumulation_steps": accumulation,
                "max_steps": steps,
                **on_gpus(a, a.gpus),
            }
            name = f"DP {a.gpus // n} x SP {n}, {a.gpus // n * accumulation} rows of {length:,}"
            if layers != 28 and not a.small:
                name += f", {layers} of 28 layers"
            return Job(name, keys)

        by_size = {n: job(n, local * n, 1) for n in sizes}
        spread = {n: job(n, local, n) for n in sizes[1:]}
        # the widest first after SP 1, should time end
        widest = sorted(by_size, key=lambda n: (n > 1, -n))
        every = [*(by_size[n] for n in widest), *reversed(spread.values())]
        jobs = [each for each in every if wanted(a, each.name)]

        def tell(name: str, row: Row) -> None:
            if "step s" in row:
                row["tokens/s a GPU"] = row["tokens"] / row["step s"] / a.gpus
            keep(a, {"row": name, **row}, rows)

        found = in_one_group(home, range(a.gpus), jobs, a.end - 10, tell, a.after)
    first = found.get(by_size[1].name, {})
    rate: dict[int, float] = {}
    longer = any(by_size[n].name in found for n in sizes[1:])
    if not a.smoke and "step s" in first and longer:
        config = {**SHAPES["qwen2.5-7b"], "num_hidden_layers": layers}
        rate = kernel_seconds(config, [local * n for n in sizes])
    for n, at in by_size.items():
        row = found.get(at.name, {})
        if rate and "step s" in row:
            # seconds of a local token: t1 - a1 + a2, each GPU's share of the row's attention
            t1 = 1 / first["tokens/s a GPU"]
            a1, a2 = rate[local] / local, rate[local * n] / (local * n)
            ideal = 1.0 / (t1 - a1 + a2)
            row |= {"ideal": ideal, "over the ideal": row["tokens/s a GPU"] / ideal}
            keep(a, {"row": at.name, **row}, rows)
    for at in spread.values():
        row = found.get(at.name, {})
        if "losses" in row and "losses" in first:
            pairs = zip(row["losses"], first["losses"], strict=True)
            row[DIFFERENCE] = worst(abs(x - y) / abs(y) for x, y in pairs)
            keep(a, {"row": at.name, **row}, rows)
    return int(len(found) < len(jobs) or any("error" in r for r in found.values()))


DIFFERENCE = "largest relative difference of losses"


SCALING_NOTE = (
    "Qwen2.5-7B's shape, all parameters, FSDP2 over all GPUs, memory: auto, mode auto, rows of real text;"
    " what `longfactory train` calls, each run in processes of its own that have imported everything;"
    " seconds of the steps after the first. Ideal, for rows of 32,768 tokens times SP: 1 / (t1 - a1 + a2) tokens/s a GPU, t1 the"
    " seconds of a local token at SP 1, a1 and a2 those of attention (all layers, forward and backward,"
    " one GPU's kernel, timed in the same command) at the local and at the whole length. Losses of the"
    " last rows beside those of the first row: the same samples in each step."
)


def kernel_seconds(config: Row, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds of attention's forward and backward, all layers, of one document of each length on
    one GPU; longer ones than 128k by the rate at 128k.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, layers = config["hidden_size"] // heads, config["num_hidden_layers"]
    one = sp.SequenceParallel(device_type="cuda")
    out: dict[int, float] = {}
    for length in lengths:
        measured = min(length, ONE_GPU_AT)
        q, k, v, dout = (
            torch.randn(measured, h, dim, device="cuda", dtype=torch.bfloat16)
            for h in (heads, kv_heads, kv_heads, heads)
        )
        plan = sp.plan(measured, None, one)
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            forward_backward(plan, q, k, v, dout)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        out[length] = layers * sorted(found)[2] * (length / measured) ** 2
    return out
