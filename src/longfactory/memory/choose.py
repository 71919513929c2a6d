"""`memory: auto | fast | long`: the settings that are fastest among those that fit this machine,
and the budget that says why.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from longfactory.memory.cost import MARGIN, Budget, Choice, Job, choose, hidden_bytes, kept_bytes
from longfactory.memory.report import advice, table
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, machine

log = logging.getLogger(__name__)

HOST_SHARE = 0.85  # of the host's memory, for optimizer states and parked activations together
GiB = 2**30


def host_memory() -> int:
    """Bytes that this container or machine may use, whichever is less."""
    limits = []
    for line in (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    ):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What `choose_memory` decided. `table` is for the log."""

    settings: MemorySettings
    job: Job
    choice: Choice
    budget: Budget
    fits: bool
    table: str


def choose_memory(
    model_config: Any,
    tokens: int,
    *,
    gpu_bytes: int,
    host_bytes: int,
    gpu_name: str = "",
    world: int = 1,
    sp: int = 1,
    gpus_per_host: int | None = None,
    mode: str = "auto",
    sharded: bool | None = None,
    trainable: int | None = None,
    parameters: int | None = None,
    lora: bool = False,
    head_trained: bool | None = None,
    split_master: bool = False,
    accumulates: bool = False,
    state_bytes: float = 8,
    leavable: bool = True,
    overlaps: bool = False,
    width: int = 2,
    tf32: bool = False,
    user: dict[str, Any] | None = None,
) -> MemoryPlan:
    """Memory settings for rows of at most `tokens` tokens.

    Args:
        model_config: the transformers configuration.
        gpu_bytes: memory of one GPU; 0 without GPUs, where nothing is chosen: layers are recomputed
            and attention is kept.
        host_bytes: memory of one host.
        gpu_name: for its measured rates.
        world: GPUs of the run; sp of them share a row; gpus_per_host of them a host.
        sharded: parameters are spread over all GPUs; by default with more than one.
        trainable, parameters: counts, where known. lora: the trained ones are adapters (a
            hundredth, if not counted).
        head_trained: whether the output layer is, where known.
        split_master: trained weights are bf16 with a 16-bit remainder (`SplitAdamW`), not fp32.
        accumulates, state_bytes, leavable, overlaps: as in `plan.model.Job`; buffers of DDP are
            seen here.
        width: bytes of a number as layers compute it: 2 in bf16 and fp16, 4 in fp32. tf32: products
            of fp32 may be rounded (`tf32: true`).
        user: keys that the user set, as in `plan.model.Choice`; they are kept.
    """
    user = dict(user or {})
    shape = ModelShape.of(model_config, trainable, parameters, lora, head_trained, width)
    if lora and trainable is None:
        shape = dataclasses.replace(
            shape, trainable=shape.parameters // 100, head_trained=bool(head_trained)
        )
    sharded = world > 1 if sharded is None else sharded
    if gpu_bytes == 0:
        user |= {"offload": "none"} if user.get("offload") == "any" else {}
        choice = dataclasses.replace(Choice(), **user)
        kept = f"layers are recomputed, attention is kept in {choice.keep_attention:.0%} of them"
        kept = "every activation is stored" if choice.checkpoint == "none" else kept
        job = Job(
            shape,
            machine("cpu", world, host_bytes, gpu_bytes=host_bytes),
            tokens,
            sp,
            sharded,
            overlaps=overlaps,
        )
        return MemoryPlan(
            _settings(choice, 0),
            job,
            choice,
            Budget({}, {}, 0.0),
            True,
            f"Memory plan: no GPU; {kept}.",
        )
    kind = machine(gpu_name, world, host_bytes, gpus_per_host, gpu_bytes, tf32)
    early = accumulates or (world > 1 and not sharded)
    leavable = leavable and (sharded or world == 1)
    job = Job(
        shape,
        kind,
        tokens,
        sp,
        sharded,
        2 if split_master else 4,
        early,
        state_bytes,
        leavable,
        overlaps,
    )
    choice, budget, fits = choose(job, mode, HOST_SHARE, user)
    parked = budget.host.get("layer inputs and kept attention", 0.0) / kind.on_host
    # Sizes in the plan are estimates: a tenth more may be locked, within the share of the host.
    free = (HOST_SHARE * host_bytes - budget.host_total) / kind.on_host + parked
    return MemoryPlan(
        _settings(choice, int(min(1.1 * parked + GiB, max(free, 0)))),
        job,
        choice,
        budget,
        fits,
        table(job, choice, budget, fits, mode),
    )


def _settings(c: Choice, pool: int) -> MemorySettings:
    return MemorySettings(
        checkpoint=c.checkpoint,  # type: ignore[arg-type]
        keep_attention=c.keep_attention if c.checkpoint == "full" else 0.0,
        offload=c.offload if pool else "none",  # type: ignore[arg-type]
        pool_bytes=pool if c.offload != "none" else 0,
        last_layers_on_gpu=c.last_layers_on_gpu,
        mlp_chunk=c.mlp_chunk,
        attention_groups=c.attention_groups,
        segment_layers=c.segment_layers,
        late_prefetch=c.late_prefetch,
        optimizer=c.optimizer,  # type: ignore[arg-type]
        gradients=c.gradients if c.optimizer == "host" else "gpu",  # type: ignore[arg-type]
    )


def user_keys(args: Any) -> dict[str, Any]:
    """The memory keys of a configuration that are not "auto", as `choose_memory` takes them."""
    keys: dict[str, Any] = {}
    if args.disable_gradient_checkpointing:
        return {"checkpoint": "none", "keep_attention": 0.0, "offload": "none", "segment_layers": 1}
    if args.keep_attention != "auto":
        keys["keep_attention"] = float(args.keep_attention)
    if args.offload_activations not in ("auto", False):
        keys["offload"] = "any"
    elif args.offload_activations is False:
        keys["offload"] = "none"
    if args.mlp_chunk != "auto":
        keys["mlp_chunk"] = int(args.mlp_chunk) or None
    if args.segment_layers != "auto":
        keys["segment_layers"] = int(args.segment_layers)
    if args.optimizer_placement != "auto":
        keys["optimizer"] = args.optimizer_placement
    if args.offload_gradients != "auto":
        keys["gradients"] = "host" if args.offload_gradients else "gpu"
    return keys


def corrected(plan: MemoryPlan, peak: int) -> tuple[MemorySettings, str | None]:
    """Settings for the steps to come, from the real peak of the first one; and a line for the log
    where they change.

    Only what can change between steps is changed. Too near to the limit: more groups, smaller
    pieces, later prefetch. Far below the plan: more of the last layers stay on the GPU.
    """
    s, total = plan.settings, plan.job.machine.gpu_bytes
    if s.checkpoint == "none":
        return s, None
    if peak > 0.96 * total:
        kv, groups = plan.job.shape.kv_heads, s.attention_groups
        more = (
            next((g for g in (2, 4, 8) if g > groups and kv % g == 0), groups)
            if plan.job.shape.written_layer
            else groups
        )
        new = dataclasses.replace(
            s,
            attention_groups=more,
            mlp_chunk=max(1024, (s.mlp_chunk or plan.job.local) // 2),
            late_prefetch=True,
            last_layers_on_gpu=max(1, s.last_layers_on_gpu // 2),
        )
        return (
            new,
            (
                f"The first step's peak was {peak / GiB:.1f} of {total / GiB:.1f} GiB: pieces of"
                f" {new.mlp_chunk:,} tokens from now on."
            ),
        )
    free = MARGIN * total - peak
    if s.offload != "none" and s.segment_layers == 1:
        layer = plan.job.local * (
            hidden_bytes(plan.job.shape)
            + (kept_bytes(plan.job.shape) if s.offload == "inputs+attention" else 0)
        )
        stay = min(plan.job.shape.layers - 1, s.last_layers_on_gpu + int(free // layer))
        if free > 0 and stay > s.last_layers_on_gpu:
            new = dataclasses.replace(s, last_layers_on_gpu=stay)
            return (
                new,
                (
                    f"The first step's peak was {peak / GiB:.1f} of {total / GiB:.1f} GiB: the last"
                    f" {stay} layers stay on the GPU from now on."
                ),
            )
    return s, None


def explain_out_of_memory(plan: MemoryPlan, error: BaseException) -> str:
    """The message that ends a run whose GPU or host memory is exhausted."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"Memory ran out on rows of up to {plan.job.tokens:,} tokens ({plan.job.local:,} a"
        f" GPU).\n{plan.table}\nThe device said: {first[:200]}\n{advice(plan.job, plan.choice)}"
    )
