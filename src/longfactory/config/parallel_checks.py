"""Contradictions about processes: sequence parallelism, process groups, sharding and DeepSpeed's
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from longfactory.config.fields import plain
from longfactory.config.run import RunConfig

BACKENDS = ("nccl", "gloo", "mpi", "ucc", "xccl", "ccl", "hccl", "cncl", "mccl")
"""What a process group can talk through; which of them a machine has, torch knows."""


def backends(ddp_backend: str) -> list[str]:
    """The names in `ddp_backend`: nccl, or cuda:nccl,cpu:gloo."""
    return [part.rpartition(":")[2].strip().lower() for part in ddp_backend.split(",")]


def parallel(cfg: RunConfig) -> Iterator[str]:
    """Keys of sequence parallelism, process groups and sharding that contradict each other."""
    p = cfg.parallel
    wanted = backends(cfg.trainer.ddp_backend or "gloo")
    if unknown := [name for name in wanted if name not in BACKENDS]:
        yield (
            f"ddp_backend: {plain(', '.join(unknown))} is not a choice. Choose from"
            f" {', '.join(BACKENDS)}; or leave it out."
        )
    elif cfg.trainer.use_cpu and "nccl" in wanted and "gloo" not in wanted:
        yield (
            "ddp_backend: nccl needs GPUs, and use_cpu: true uses none. Use gloo, or leave it out."
        )
    ulysses, ring = p.sequence_parallel_ulysses_degree, p.sequence_parallel_ring_degree
    size = p.sequence_parallel_size
    if size == "auto":
        for name, degree in (("ulysses", ulysses), ("ring", ring)):
            if degree is not None:
                yield (
                    f"sequence_parallel_{name}_degree: {degree} needs a fixed "
                    "sequence_parallel_size, and this run's is auto. Give the size, or leave "
                    "the degree out."
                )
    elif p.sequence_parallel_mode == "usp":
        if ulysses is not None and ring is not None and ulysses * ring != size:
            yield (
                f"usp: sequence_parallel_ulysses_degree {ulysses} x sequence_parallel_ring_degree"
                f" {ring} = {ulysses * ring}, and sequence_parallel_size is"
                f" {size}. Make them equal, or give one degree alone."
            )
        for name, degree in (("ulysses", ulysses), ("ring", ring)):
            if degree is not None and size % degree:
                yield (
                    f"sequence_parallel_{name}_degree: {degree} does not divide"
                    f" sequence_parallel_size: {size}."
                )
    elif (ulysses or 1) > 1 or (ring or 1) > 1:
        yield (
            "sequence_parallel_ulysses_degree and sequence_parallel_ring_degree are for"
            f" sequence_parallel_mode: usp; this run's is {p.sequence_parallel_mode}. Set usp, or"
            " leave them out."
        )
    deepspeed = cfg.trainer.deepspeed
    if deepspeed is not None:
        if p.sharding != "auto":
            yield f"deepspeed and sharding: {p.sharding} were both given. Keep one of them."
        yield from _deepspeed(deepspeed, cfg)


def _deepspeed(given: str | dict, cfg: RunConfig) -> Iterator[str]:
    config = given
    if isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            yield (
                f"deepspeed: there is no file {path}. Ready-made ones are in LongFactory's"
                " repository, in examples/deepspeed/."
            )
            return
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            yield f"deepspeed: {path} cannot be read: {e.strerror or e}."
            return
        except (ValueError, RecursionError) as e:
            yield f"deepspeed: {path} is not valid JSON ({e})."
            return
    if not isinstance(config, dict):
        yield f"deepspeed: {given} is not a JSON object; expected a DeepSpeed configuration."
        return
    if cfg.trainer.do_predict and not cfg.trainer.do_train:
        yield "do_predict without training does not use DeepSpeed. Leave deepspeed out."
    zero = config.get("zero_optimization")
    if (
        cfg.trainer.do_eval
        and not cfg.trainer.do_train
        and not (isinstance(zero, dict) and zero.get("stage") == 3)
    ):
        yield ("do_eval without training uses DeepSpeed only with ZeRO-3. Leave deepspeed out.")
    if isinstance(zero, dict) and zero.get("stage") == 3:
        if cfg.trainer.predict_with_generate:
            yield (
                "predict_with_generate cannot run under ZeRO-3. Use a ZeRO-2 JSON, or generate from"
                " the exported model."
            )
        if cfg.model.quantization_bit is not None:
            yield (
                "ZeRO-3 cannot shard quantised weights. Use a ZeRO-2 JSON, or leave"
                " quantization_bit out."
            )
        if cfg.method.pure_bf16 and zero.get("offload_optimizer"):
            yield (
                "pure_bf16 and offload_optimizer: DeepSpeed's optimizer on the host keeps float32"
                " states. Use bf16: true, or leave offload_optimizer out."
            )
        if cfg.method.pissa_init:
            yield (
                "pissa_init needs unsharded weights, which ZeRO-3 never has. Use a ZeRO-2 JSON "
                "or sharding: fsdp2."
            )


def processes(cfg: RunConfig, world_size: int) -> Iterator[str]:
    """Whether the run fits so many processes."""
    size = cfg.parallel.sequence_parallel_size
    if size == "auto" or world_size % size == 0:
        return
    if world_size < size:
        yield (
            f"sequence_parallel_size: {size} needs {size} processes or a multiple, and "
            f"{world_size} would start. Set sequence_parallel_size: {world_size}, or "
            f"nproc_per_node: {size} (on a machine without GPUs)."
        )
    else:
        fit = max(d for d in range(1, size + 1) if world_size % d == 0)
        near = world_size - world_size % size
        yield (
            f"sequence_parallel_size: {size} does not divide the {world_size} processes. Use {fit},"
            f" or {near} processes."
        )
