"""`longfactory plan`: what a run would need, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from longfactory.errors import UserError
from longfactory.memory.cost import choose, longest
from longfactory.memory.report import table
from longfactory.memory.shapes import GPUS, ModelShape, TrainingJob, machine

GiB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Prints the budget of the settings that `memory:` would choose, and the longest row that fits.
    Needs no GPU and no weights.
    """
    parser = argparse.ArgumentParser(prog="longfactory plan", description=main.__doc__)
    parser.add_argument("model", help="a folder or hub id with a config.json")
    parser.add_argument(
        "--tokens", type=int, default=131072, help="tokens of the longest row (default 131072)"
    )
    parser.add_argument(
        "--gpu", default="H100", help=f"kind of GPU: {', '.join(GPUS)} (default H100)"
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the run (default 8)")
    parser.add_argument(
        "--gpus-per-host", type=int, default=None, help="GPUs of one host (default: up to 8)"
    )
    parser.add_argument(
        "--gpu-gib",
        type=float,
        default=None,
        help="memory of one GPU in GiB, where it is not the kind's usual one",
    )
    parser.add_argument(
        "--host-gib", type=float, default=1024, help="memory of one host in GiB (default 1024)"
    )
    parser.add_argument(
        "--sequence-parallel-size",
        type=int,
        default=None,
        help="GPUs that share a row (default: all)",
    )
    parser.add_argument("--memory", choices=["auto", "fast", "long"], default="auto")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        default=0,
        help="train adapters of this rank on all linear layers",
    )
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32", "tf32"],
        default="bf16",
        help="what layers compute in (default bf16, fp16 is alike)",
    )
    a = parser.parse_args(argv)
    sp = a.sequence_parallel_size or a.gpus
    if a.gpus % sp:
        raise UserError(f"--sequence-parallel-size {sp} does not divide the {a.gpus} GPUs.")

    from longfactory.config.arguments import ModelArguments
    from longfactory.model import load

    named = ModelArguments(model_name_or_path=a.model, trust_remote_code=a.trust_remote_code)
    config = load.load_config(named, 0)
    load.empty_model(named, config)  # refuses what training would refuse
    width = 2 if a.precision == "bf16" else 4
    shape = ModelShape.of(config, width=width)
    if a.lora:
        s = shape
        qkv = s.hidden + (s.heads + 2 * s.kv_heads) * s.head_dim
        adapters = (
            s.layers
            * a.lora
            * (2 * s.hidden + 2 * s.heads * s.head_dim + qkv + 3 * (s.hidden + s.ffn))
        )
        shape = ModelShape.of(config, trainable=adapters, lora=True, width=width)
    kind = machine(
        a.gpu,
        a.gpus,
        int(a.host_gib * GiB),
        a.gpus_per_host,
        int(a.gpu_gib * GiB) if a.gpu_gib else None,
        a.precision == "tf32",
    )
    # As in training: fp32 masters, and split ones where those do not fit.
    wide = TrainingJob(shape, kind, a.tokens, sp, a.gpus > 1, 4, leavable=a.lora > 0)
    split = dataclasses.replace(wide, master=2, leavable=True)
    job, (settings, budget, ok) = wide, choose(wide, a.memory)
    if not ok and not a.lora and width == 2 and (found := choose(split, a.memory))[2]:
        job, (settings, budget, ok) = split, found
    print(table(job, settings, budget, ok, a.memory))
    best = max(longest(j, a.memory) for j in ((wide,) if a.lora or width == 4 else (wide, split)))
    print(f"  longest row that fits: {best:,} tokens (predicted)")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
