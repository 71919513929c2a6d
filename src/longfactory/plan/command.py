"""`longfactory plan`: what a run would need, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longfactory.errors import UserError
from longfactory.memory import calibration
from longfactory.memory.cost import longest
from longfactory.memory.shapes import GPUS, Gpu, Machine, kind_of, machine

if TYPE_CHECKING:
    from longfactory.config import RunConfig
    from longfactory.train.memory_plan import Memory

GiB = 2**30
FITS, DOES_NOT_FIT, NOT_ALL_PRICED = 0, 1, 3
"""Exit statuses; 2 is a mistake that the user can put right."""


def count(text: str) -> int:
    """A number of tokens: 131072, 128k (times 1,024) or 1m (times 1,048,576)."""
    match = re.fullmatch(r"([0-9][0-9_,]*)([km]?)", text.strip().lower())
    number = (
        int(re.sub("[_,]", "", match[1])) * {"": 1, "k": 2**10, "m": 2**20}[match[2]]
        if match
        else 0
    )
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number of tokens: 131072 or 128k"
        )
    return number


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return number


def several(text: str) -> tuple[int, str | None]:
    """`8` or `8xH100`: how many GPUs, and of what kind."""
    match = re.fullmatch(r"([0-9]+)(?:x(.+))?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 8 or 8xH100")
    return int(match[1]), match[2]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longfactory plan", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "run",
        nargs="*",
        metavar="RUN",
        help="a run's file, and key=value words that change it; or a model: a folder or hub id with"
        " a config.json",
    )
    parser.add_argument("--tokens", type=count, help="cutoff_len: 131072 or 128k")
    parser.add_argument(
        "--gpus", type=several, default=(8, None), help="GPUs of the run, 8 or 8xH100 (default 8)"
    )
    parser.add_argument("--gpu", help=f"kind of GPU: {', '.join(GPUS)} (default H100)")
    parser.add_argument(
        "--gpus-per-host", type=int, default=None, help="GPUs of one host (default: up to 8)"
    )
    parser.add_argument(
        "--gpu-gib", type=positive, help="memory of one GPU in GiB, where it is not the usual one"
    )
    parser.add_argument(
        "--gpu-tflops",
        type=positive,
        help="dense bf16 TFLOP/s of a GPU that is not in the list, from its data sheet",
    )
    parser.add_argument(
        "--host-gib",
        type=positive,
        default=1024.0,
        help="memory of one host in GiB (default 1024)",
    )
    parser.add_argument(
        "--network-gbit",
        type=positive,
        default=400.0,
        help="Gbit/s of a GPU to other hosts (default 400)",
    )
    parser.add_argument(
        "--sequence-parallel-size", type=int, help="GPUs that share a row (a model: all)"
    )
    parser.add_argument("--memory", choices=["auto", "fast", "long"])
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--lora", type=int, metavar="RANK", default=0, help="train adapters of this rank"
    )
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32", "tf32"],
        help="what layers compute in (a model: bf16)",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure this machine's rates, and write them where training looks for them, or here",
    )
    parser.add_argument(
        "--calibrated", metavar="FILE", help="plan with the rates that --calibrate wrote"
    )
    return parser


def words_of(a: argparse.Namespace) -> list[str]:
    """The run's file and words, with what the options change, as `load_config` reads them."""
    from longfactory.config.read import FILES

    words = list(a.run)
    if not words[0].lower().endswith(FILES):
        # A model alone: all its weights, rows of 128k tokens over all GPUs.
        words = [
            f"model_name_or_path={words[0]}",
            "stage=sft",
            "finetuning_type=full",
            "template=empty",
            "dataset=not_given",
            "output_dir=not_given",
            "per_device_train_batch_size=1",
            *words[1:],
        ]
        a.tokens = a.tokens or 131072
        a.sequence_parallel_size = a.sequence_parallel_size or a.gpus[0]
        a.precision = a.precision or "bf16"
    if a.tokens:
        words.append(f"cutoff_len={a.tokens}")
    if a.sequence_parallel_size is not None:
        words.append(f"sequence_parallel_size={a.sequence_parallel_size}")
    if a.memory:
        words.append(f"memory={a.memory}")
    if a.lora:
        words += ["finetuning_type=lora", f"lora_rank={a.lora}"]
    if a.trust_remote_code:
        words.append("trust_remote_code=true")
    if a.precision:
        words += [f"bf16={str(a.precision == 'bf16').lower()}", "fp16=false"]
        words.append(f"tf32={str(a.precision == 'tf32').lower()}")
    return words


def machine_of(a: argparse.Namespace, tf32: bool) -> tuple[Machine, str]:
    """The machines that the options describe, and their kind of GPU in words.

    Raises:
        UserError: a kind of GPU that is not known, and not described.
    """
    gpus, kind = a.gpus
    if kind is not None and a.gpu is not None and kind_of(kind) != kind_of(a.gpu):
        raise UserError(f"--gpus {gpus}x{kind} and --gpu {a.gpu} name two kinds. Keep one.")
    name = kind or a.gpu or "H100"
    known = kind_of(name)
    if a.gpu_tflops is not None:
        usual = GPUS[known or "A100"]
        rate = a.gpu_tflops * 1e12
        memory = a.gpu_gib * GiB if a.gpu_gib else usual.memory
        if known is None and a.gpu_gib is None:
            raise UserError(f"--gpu {name}: give its memory as well (--gpu-gib).")
        described = dataclasses.replace(usual, memory=memory, bf16=rate)
        if known is None:
            described = Gpu(memory, rate, rate / 16, rate / 2, usual.host, usual.host)
        found: str | Gpu = described
    elif known is None:
        raise UserError(
            f"--gpu: got {name!r}, which is not a kind that is known: {', '.join(GPUS)}. Give its"
            " memory and its dense bf16 rate from the data sheet: --gpu-gib 32 --gpu-tflops 210."
        )
    else:
        found = known
    where = machine(
        found,
        gpus,
        a.host_gib * GiB,
        a.gpus_per_host,
        a.gpu_gib * GiB if a.gpu_gib else None,
        tf32,
        a.network_gbit / 8 * 1e9,
    )
    if a.calibrated is not None:
        where = calibration.of_file(Path(a.calibrated), where, name)
    return where, name


def not_priced(cfg: RunConfig) -> list[str]:
    """What the run asks for and the plan does not count, a line each."""
    from longfactory.train.optimizer_names import EXACT, NARROW

    found = []
    name = str(cfg.trainer.optim)
    if name not in EXACT and name not in NARROW:
        found.append(f"optim: {name} (its states are counted as AdamW's, 8 bytes a weight)")
    if cfg.model.enable_liger_kernel:
        found.append("enable_liger_kernel (its savings)")
    if cfg.trainer.deepspeed is not None:
        from longfactory.shard.settings import deepspeed_config

        zero = deepspeed_config(cfg.trainer.deepspeed, bf16=False).get("zero_optimization") or {}
        if (zero.get("offload_param") or {}).get("device", "none") != "none":
            found.append("deepspeed: offload_param (weights are counted on the GPU)")
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints the budget of the settings that `memory:` would choose for a run's longest row, and
    the longest cutoff_len that fits. Needs no GPU and no weights. Exit status: 0 it fits, 1 it
    does not, 2 a mistake in the run, 3 it fits but for what could not be counted.
    """
    a = make_parser().parse_intermixed_args(argv)
    if a.calibrate is not None:
        from longfactory.plan import calibrate

        return calibrate.main(Path(a.calibrate) if a.calibrate else None)
    if not a.run:
        raise UserError("plan needs a run's file or a model.")
    from longfactory.config import load_config
    from longfactory.train.memory_plan import choose_sharding, count_parameters, plan_run

    cfg = load_config([*words_of(a), "--dry_run"])
    size = cfg.parallel.sequence_parallel_size
    gpus = a.gpus[0]
    if gpus % size:
        raise UserError(f"sequence_parallel_size: {size} does not divide the {gpus} GPUs.")
    where, kind = machine_of(a, bool(cfg.trainer.tf32))

    from longfactory.model import load

    model_config = load.load_config(cfg.model, 0)
    counts = count_parameters(cfg, model_config)
    sharding = choose_sharding(cfg, counts.total, gpus, True, where.gpu_bytes)
    memory = plan_run(cfg, model_config, counts, cfg.longest_row, sharding, where)
    print("\n".join(lines(cfg, memory, kind, sharding)))
    missing = not_priced(cfg)
    if missing:
        print("  not counted: " + "; ".join(missing))
    if not memory.plan.fits:
        return DOES_NOT_FIT
    return NOT_ALL_PRICED if missing else FITS


def lines(cfg: RunConfig, memory: Memory, kind: str, sharding: str) -> list[str]:
    """The budget, and the longest rows."""
    job, mode = memory.plan.job, cfg.memory.memory
    each = cfg.longest_row // cfg.data.cutoff_len  # sequences of up to cutoff_len in a row
    best = longest(job, mode, fixed=memory.plan.fixed)
    masters = "split into bf16 weights and 16-bit remainders" if memory.split else "fp32"
    trained = f"; masters: {masters}" if cfg.method.finetuning_type == "full" else ""
    row = f"{best:,} tokens" if each == 1 else f"{best // each:,} (rows of {best:,} tokens)"
    return [
        f"{job.machine.gpus} x {kind}, parameters: {sharding}{trained}",
        memory.plan.table,
        f"  longest cutoff_len that fits with these masters: {row} (predicted)",
    ]


if __name__ == "__main__":
    sys.exit(main())
