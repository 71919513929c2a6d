"""`longfactory plan`: what a run would need, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfactory.errors import UserError
from longfactory.memory import calibration
from longfactory.memory.shapes import (
    CHOSEN,
    GPUS,
    NETWORK_LATENCY,
    Gpu,
    Machine,
    TrainingJob,
    kind_of,
    machine,
)
from longfactory.plan import facts
from longfactory.plan.curve import chart, check_picture, falls, picture, points
from longfactory.plan.sizes import SIZES, model_folder
from longfactory.plan.table import Compared, compare, longest_ways, table, with_other_memory
from longfactory.plan.write import chosen_keys, write
from longfactory.shard.settings import in_words
from longfactory.terminal import NOISE
from longfactory.train.auto import WORTH, Planned, Way

if TYPE_CHECKING:
    from longfactory.config import RunConfig
    from longfactory.data.module import Datasets

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


def whole(text: str) -> int:
    """A whole number above 0."""
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


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
        help=(
            "a run's file, with key=value words that override its keys; or a model, as for --model"
        ),
    )
    parser.add_argument(
        "--model",
        help="overrides the run's model: a folder, a hub id in this machine's cache, a "
        f"config.json, or a size: {', '.join(SIZES)}",
    )
    parser.add_argument("--tokens", type=count, help="cutoff_len: 131072 or 128k")
    _machine_options(parser)
    parser.add_argument(
        "--sequence-parallel-size",
        help=("GPUs that share a row, or auto (default without a run's file: auto)"),
    )
    parser.add_argument("--memory", choices=["auto", "fast", "long"])
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--lora", type=whole, metavar="RANK", default=0, help="plan LoRA with this rank"
    )
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32", "tf32"],
        help="precision of the layers (default without a run's file: bf16)",
    )
    _further_options(parser)
    return parser


def _machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        type=several,
        default=(None, None),
        help="number of GPUs, 8 or 8xH100 (default 8, or as many as share a row)",
    )
    parser.add_argument("--gpu", help=f"kind of GPU: {', '.join(GPUS)} (default H100)")
    parser.add_argument(
        "--gpus-per-host", type=whole, default=None, help="GPUs per host (default: up to 8)"
    )
    parser.add_argument(
        "--gpu-gib", type=positive, help="memory per GPU in GiB, if it differs from the usual"
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
        help="memory per host in GiB (default 1024)",
    )
    parser.add_argument(
        "--network-gbit",
        type=positive,
        default=400.0,
        help="network bandwidth per GPU to other hosts in Gbit/s (default 400)",
    )
    parser.add_argument(
        "--network-latency-us",
        type=positive,
        default=1e6 * NETWORK_LATENCY,
        help="latency of a message between hosts in microseconds: InfiniBand about 25 "
        "(default), Ethernet about 60",
    )


def _further_options(parser: argparse.ArgumentParser) -> None:
    """Rates, the run's data, and what is written."""
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FILE",
        help=(
            "measure this machine's speed and save the rates to FILE (default: where training "
            "looks for them)"
        ),
    )
    parser.add_argument("--calibrated", metavar="FILE", help="plan with rates saved by --calibrate")
    parser.add_argument(
        "--read-data",
        action="store_true",
        help="tokenise the run's data, as training does; needed for the time of an epoch and "
        "for cutoff_len: auto",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help=("plot peak memory and seconds over length: png, svg or pdf"),
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the run's file with the best settings"
    )


def words_of(a: argparse.Namespace) -> list[str]:
    """The run's file and words, with what the options change, as `load_config` reads them. Words
    alone are a run, as for `longfactory train`, where they name its model.
    """
    from longfactory.config.read import FILES

    words = list(a.run)
    is_file = bool(words) and words[0].lower().endswith(FILES)
    if is_file and Path(words[0]).name == "config.json":
        is_file = False  # a model's
    named = any(word.startswith("model_name_or_path=") for word in words)
    if not is_file and not (named and "=" in words[0] and a.model is None):
        if words and "=" not in words[0]:
            if a.model is not None:
                raise UserError(f"{words[0]} and --model {a.model} name two models. Keep one.")
            a.model = words.pop(0)
        if a.model is None:
            raise UserError("plan needs a run's file, model_name_or_path=..., or --model.")
        # A model alone: all its weights, rows of 128k tokens.
        words = [
            "stage=sft",
            "finetuning_type=full",
            "template=empty",
            "dataset=not_given",
            "output_dir=not_given",
            "per_device_train_batch_size=1",
            *words,
        ]
        given = [word.partition("=")[0] for word in words]
        if "cutoff_len" not in given:
            a.tokens = a.tokens or 131072
        if "sequence_parallel_size" not in given:
            a.sequence_parallel_size = a.sequence_parallel_size or "auto"
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


def machine_of(a: argparse.Namespace, gpus: int, tf32: bool) -> tuple[Machine, str, Gpu]:
    """The machines that the options describe, with so many GPUs, and their kind of GPU: its name,
    and its data sheet.

    Raises:
        UserError: a kind of GPU that is not known, and not described.
    """
    kind = a.gpus[1]
    if kind is not None and a.gpu is not None and kind_of(kind) != kind_of(a.gpu):
        raise UserError(f"--gpus {a.gpus[0]}x{kind} and --gpu {a.gpu} name two kinds. Keep one.")
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
        found = described
    elif known is None:
        raise UserError(
            f"--gpu: got {name!r}, which is not a kind that is known: {', '.join(GPUS)}. Give its"
            " memory and its dense bf16 rate from the data sheet: --gpu-gib 32 --gpu-tflops 210."
        )
    else:
        found = GPUS[known]
    where = machine(
        found,
        gpus,
        a.host_gib * GiB,
        a.gpus_per_host,
        a.gpu_gib * GiB if a.gpu_gib else None,
        tf32,
        a.network_gbit / 8 * 1e9,
        network_latency=a.network_latency_us / 1e6,
    )
    if a.calibrated is not None:
        where = calibration.of_file(Path(a.calibrated), where, name)
    return where, name, found


def not_priced(cfg: RunConfig) -> list[str]:
    """What the run asks for and the plan does not count, a line each."""
    from longfactory.train.optimizer_names import EXACT, NARROW

    found = []
    name = str(cfg.trainer.optim)
    if name not in EXACT and name not in NARROW:
        found.append(f"optim: {name} (its states are counted like AdamW's, 8 bytes per weight)")
    if cfg.model.enable_liger_kernel:
        found.append("enable_liger_kernel (its savings)")
    if cfg.trainer.deepspeed is not None:
        from longfactory.shard.settings import deepspeed_config

        zero = deepspeed_config(cfg.trainer.deepspeed, bf16=False).get("zero_optimization") or {}
        if (zero.get("offload_param") or {}).get("device", "none") != "none":
            found.append("deepspeed: offload_param (weights are counted on the GPU)")
    return found


def masked(job: TrainingJob) -> str:
    """Of attention over keys that an indexer chose: how its seconds are counted; "" without any."""
    chosen = sorted({kind.chosen for kind in job.shape.kinds if kind.chooses(job.tokens)})
    if not chosen:
        return ""
    keys = " or ".join(f"{n:,}" for n in chosen)
    return (
        f"sparse attention ({keys} keys a query): computed over all earlier keys with the others"
        f" masked, counted at {CHOSEN} of the rates of full attention on Hopper (one layer was"
        " measured); an indexer's scores at those of fp32"
    )


def main(argv: list[str] | None = None) -> int:
    """Compares ways of sharding a run's longest row over its GPUs, and prints the memory budget of
    this run's settings, the longest rows that fit, and disk and time. Needs no GPU and no weights.
    Exit status: 0 the run fits, 1 it does not, 2 an error in the run, 3 it fits, except for what
    could not be counted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    a = make_parser().parse_intermixed_args(words)
    if a.calibrate is not None:
        from longfactory.plan import calibrate

        return calibrate.main(Path(a.calibrate) if a.calibrate else None)
    for path, check in ((a.picture, check_picture), (a.write, partial(check_target, a.run))):
        if path is not None:
            check(path)
    run = words_of(a)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE.pattern)
        if a.model is None:
            return plan(a, run, f"longfactory plan {shlex.join(words)}")
        with model_folder(a.model) as folder:
            run.append(f"model_name_or_path={folder}")
            return plan(a, run, f"longfactory plan {shlex.join(words)}")


def check_target(run: Sequence[str], path: Path) -> None:
    """Refuses a file that --write cannot make.

    Raises:
        UserError: there is no run's file to complete, or no folder.
    """
    if not run or "=" in run[0] or not Path(run[0]).is_file():
        raise UserError("--write completes a run's file: give one.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--write: there is no folder {path.parent}.")


def plan(a: argparse.Namespace, run: list[str], command: str) -> int:
    """Plans a run and prints what was found. Returns the exit status.

    Args:
        a: the options.
        run: the run's file and words.
        command: all of it, for the file that is written.
    """
    from longfactory.config import load_config
    from longfactory.config.stage_facts import STAGES
    from longfactory.model import load
    from longfactory.train.auto import decide_on, longest_sample, uncut
    from longfactory.train.memory_plan import (
        choose_sharding,
        count_parameters,
        with_images_of,
    )

    cfg = load_config([*run, "--dry_run"])
    size = cfg.parallel.sequence_parallel_size
    gpus = a.gpus[0] or (8 if size == "auto" else max(size, 8))
    if size != "auto" and gpus % size:
        raise UserError(f"sequence_parallel_size: {size} does not divide the {gpus} GPUs.")
    where, kind, sheet = machine_of(a, gpus, bool(cfg.trainer.tf32))

    own = dataclasses.replace(cfg.model, rope_scaling=None)
    model_config = load.load_config(own, 0)
    counts = count_parameters(cfg, model_config, images=names_media(cfg, model_config))
    sharding = choose_sharding(cfg, counts.total, gpus, True, where.gpu_bytes)
    planned = Planned(cfg, model_config, counts, sharding, where)
    notes = []
    if cfg.undecided:
        sample = None
        if "cutoff_len" in cfg.undecided and a.read_data:
            sample = longest_sample(read_data(uncut(cfg)))
        elif "cutoff_len" in cfg.undecided:
            notes.append("cutoff_len: auto: data not read (--read-data), the longest that fits.")
        decision = decide_on(planned, sample)
        cfg = decision.applied(cfg)
        notes += decision.lines
    planned = dataclasses.replace(planned, cfg=cfg)
    if cfg.model.rope_scaling is not None:
        load.load_config(cfg.model, cfg.cutoff_len)  # refuses one that is not for the model
    data = None
    if a.read_data:
        read = read_data(cfg)
        data = facts.lengths_of(read, STAGES[cfg.method.stage].documents)
        planned = dataclasses.replace(planned, counts=with_images_of(counts, read.train))
    elif counts.tower is not None:
        notes.append(
            "vision tower: data not read (--read-data), every token of a row is taken to be of an"
            " image of image_max_pixels."
        )

    compared = compare(planned, cfg.longest_row)
    found = compared.best
    far = longest_ways(planned, found)
    curve = points(planned, found or compared.own)
    print("\n".join(title(planned, compared.own, kind)))
    print("\n".join(notes), end="\n" if notes else "")
    peak = sheet.rate(compared.own.memory.plan.job.shape.width, bool(cfg.trainer.tf32))
    more = with_other_memory(planned, cfg.longest_row, found) if found else []
    print("\n".join(table(planned, compared, peak, more, far)))
    if curve:
        print(f"Longer and longer rows, SP {curve[0].size}, memory: {cfg.memory.memory}:")
        print("\n".join([*chart(curve), *falls(curve)]))
    print(compared.own.memory.plan.table)
    lines = [
        advice(compared),
        facts.context(cfg, model_config),
        facts.epoch(planned, compared.own, data),
        facts.disk(planned, compared.own, data.tokens if data else None),
    ]
    lines.append(masked(compared.own.memory.plan.job))
    missing = not_priced(cfg)
    if missing:
        lines.append("not counted: " + "; ".join(missing))
    print("\n".join(line for line in lines if line))
    if a.picture is not None and curve:
        about = f"{title(planned, curve[0], kind)[0]}, SP {curve[0].size} ({curve[0].mode})"
        picture(curve, a.picture, about)
        print(f"{a.picture} is written.")
    if a.write is not None:
        if found is None:
            print(f"{a.write} is not written: nothing fits.")
        else:
            keys = {**given_keys(a.run, run), **chosen_keys(cfg, found)}
            write(Path(a.run[0]), a.write, keys, command)
            print(f"{a.write} is written.")
    if not compared.own.fits:
        return DOES_NOT_FIT
    return NOT_ALL_PRICED if missing else FITS


def read_data(cfg: RunConfig) -> Datasets:
    """The run's data, tokenised as training does, or from its cache."""
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    if not cfg.data.dataset and not cfg.data.tokenized_path:
        raise UserError("--read-data: the run names no data.")
    return load_data(cfg, load.load_tokenizer(cfg.model), quiet=True)


def names_media(cfg: RunConfig, model_config: Any) -> bool:
    """Whether rows of the run's data sets have images or videos, by the columns that
    dataset_info.json names. No data are read.
    """
    from longfactory.config.data_arguments import names
    from longfactory.data.sources import read_sources
    from longfactory.sp import vision

    if not cfg.data.dataset or vision.family_of(model_config) is None:
        return False
    log = logging.getLogger("longfactory")
    try:
        sources = read_sources(names(cfg.data.dataset), cfg.data.dataset_dir, log.debug)
    except UserError:  # said where the data are read
        return False
    return any(source.images or source.videos for source in sources)


def given_keys(file: Sequence[str], run: Sequence[str]) -> dict[str, Any]:
    """What words and options change of the run's file, but for the model that stands in for its
    own.
    """
    from longfactory.config import translate
    from longfactory.config.read import read

    words = [word for word in run if word != file[0]]
    found = read(words, translate.is_switch)
    found.pop("model_name_or_path", None)
    return found


def title(planned: Planned, own: Way, kind: str) -> list[str]:
    """What is planned, in a line."""
    cfg, job = planned.cfg, own.memory.plan.job
    masters = "split into bf16 weights and 16-bit remainders" if own.memory.split else "fp32"
    trained = f"; masters: {masters}" if cfg.method.finetuning_type == "full" else ""
    hosts = -(-job.machine.gpus // job.machine.gpus_per_host)
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return [
        f"{job.machine.gpus} x {kind}{where}, parameters:"
        f" {in_words(planned.sharding)}{trained}; stage:"
        f" {cfg.method.stage}, {cfg.method.finetuning_type}"
    ]


def advice(compared: Compared) -> str:
    """What to set for the best way, where the run is another."""
    own, found = compared.own, compared.best
    if found is None:
        return "No setting fits these rows."
    if found is own or (own.fits and own.rate >= WORTH * found.rate):
        return ""
    keys = f"sequence_parallel_size: {found.size}"
    if found.mode != own.mode and found.size > 1:
        keys += f", sequence_parallel_mode: {found.mode}"
    gain = f"{found.rate / own.rate - 1:.0%} more tokens/s" if own.fits else "fits"
    return f"Better: {keys} ({gain})."


if __name__ == "__main__":
    sys.exit(main())
