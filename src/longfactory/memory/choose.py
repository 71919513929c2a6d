"""`memory: auto | fast | long`: the settings that are fastest among those that fit this machine,
and the budget that says why.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longfactory.memory.budget import MARGIN, Budget
from longfactory.memory.report import advice, describe, table
from longfactory.memory.search import HOST_SHARE, choose
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import techniques

log = logging.getLogger(__name__)

GiB = 2**30
SPLIT_IS_WORTH = 0.98
"""Of the time with fp32 masters: where split ones take less than that, they are taken. fp32 masters
are what other trainers hold, and their checkpoints can be gone on from elsewhere.
"""


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
    """What `choose_memory` decided.

    Attributes:
        settings: to be applied.
        job, fixed: what it was asked.
        budget: what the settings take.
        fits: whether that fits the machine.
        table: the budget, for the log.
        advice: what makes room, for a run whose memory ran out.
    """

    settings: MemorySettings
    job: TrainingJob
    fixed: Mapping[str, Any]
    budget: Budget
    fits: bool
    table: str
    advice: str


def choose_memory(
    job: TrainingJob, fixed: Mapping[str, Any] | None = None, mode: str = "auto"
) -> MemoryPlan:
    """Memory settings for the rows of a job.

    Args:
        job: what is trained, and on what. On a machine without GPU memory nothing is chosen: layers
            are recomputed and attention outputs are saved, unless `fixed` says otherwise.
        fixed: fields of MemorySettings that the user set (`user_keys`); they are kept. `offload:
            "any"` is any but none.
        mode: "auto", "fast" or "long".

    Raises:
        ValueError: an unknown mode.
    """
    fixed = dict(fixed or {})
    if job.machine.gpu_bytes == 0:
        return _without_gpu(job, fixed)
    machine = job.machine
    found, budget, fits = _chosen(job, mode, tuple(fixed.items()))
    offloaded = budget.host.get("layer inputs and saved attention outputs", 0.0) / machine.on_host
    # Sizes in the plan are estimates: a tenth more may be pinned, within the share of the host.
    free = (HOST_SHARE * machine.host_bytes - budget.host_total) / machine.on_host + offloaded
    settings = _with_pool(found, int(min(1.1 * offloaded + GiB, max(free, 0))))
    return MemoryPlan(
        settings,
        job,
        fixed,
        budget,
        fits,
        table(job, found, budget, fits, mode),
        advice(job, found),
    )


@functools.lru_cache(256)
def _chosen(
    job: TrainingJob, mode: str, fixed: tuple[tuple[str, Any], ...]
) -> tuple[MemorySettings, Budget, bool]:
    """`search.choose`, once for each job: `longfactory plan` asks for some several times."""
    return choose(job, mode, HOST_SHARE, dict(fixed))


def choose_masters(
    job: TrainingJob,
    fixed: Mapping[str, Any] | None,
    mode: str,
    may_split: bool,
    always: bool = False,
) -> tuple[MemoryPlan, bool]:
    """`choose_memory` for fp32 masters and, where weights can be split (`SplitAdamW`), for split
    ones; the faster of the two.

    Args:
        job: with fp32 masters.
        may_split: whether the optimizer and the sharding can hold split masters.
        always: split wherever that can be.

    Returns:
        The plan, and whether masters are split.
    """
    # Split weights take less memory, and cost no time: fp32 gradients leave during backward only
    # where weights cannot be split.
    wide = dataclasses.replace(job, leavable=job.leavable and not may_split)
    plan = choose_memory(wide, fixed, mode)
    if not may_split:
        return plan, False
    other = choose_memory(dataclasses.replace(job, master=2), fixed, mode)
    if always or (other.fits and not plan.fits):
        return other, True
    faster = other.budget.seconds < SPLIT_IS_WORTH * plan.budget.seconds
    return (other, True) if plan.fits and other.fits and faster else (plan, False)


def _without_gpu(job: TrainingJob, fixed: dict[str, Any]) -> MemoryPlan:
    if fixed.get("offload") == "any":
        fixed["offload"] = "none"
    if fixed.get("checkpoint") != "none":
        fixed = {"keep_attention": 1.0, **fixed}
    settings = _with_pool(MemorySettings(**fixed), 0)
    share = f"{settings.keep_attention:.0%}"
    done = f"every layer recomputed; attention outputs saved in {share} of layers"
    if settings.checkpoint == "none":
        done = "every activation stored"
    line = f"Memory plan: no GPU; {done}."
    ways = advice(dataclasses.replace(job, leavable=False), settings)
    return MemoryPlan(settings, job, fixed, Budget({}, {}, 0.0), True, line, ways)


def _with_pool(settings: MemorySettings, pool: int) -> MemorySettings:
    """Settings that were found, with so many bytes of host memory; without what none of them
    leaves.
    """
    return dataclasses.replace(
        settings,
        offload=settings.offload if pool else "none",
        pool_bytes=pool if settings.offload != "none" else 0,
        gradients=settings.gradients if settings.optimizer == "host" else "gpu",
    )


def user_keys(arguments: Any) -> dict[str, Any]:
    """The memory keys of a configuration that are not "auto", as `choose_memory` takes them."""
    keys: dict[str, Any] = {}
    for technique in techniques():
        if technique.fixed is not None:
            keys |= technique.fixed(arguments)
    if arguments.disable_gradient_checkpointing:
        keys |= {
            "checkpoint": "none",
            "keep_attention": 0.0,
            "keep_mlp": 0.0,
            "offload": "none",
            "segment_layers": 1,
        }
    return keys


def corrected(plan: MemoryPlan, peak: int) -> tuple[MemorySettings, str | None]:
    """Settings for the steps to come, from the real peak of the first one; and a line for the log
    where they change.

    Only what can change between steps is changed. Too near to the limit: more groups, smaller
    chunks, later prefetch. Far below the plan: more of the last layers stay on the GPU.
    """
    s, total = plan.settings, plan.job.machine.gpu_bytes
    if s.checkpoint == "none":
        return s, None
    if peak > 0.96 * total:
        leaner = {
            each.key: each.leaner(plan.job, s) for each in techniques() if each.leaner is not None
        }
        new = dataclasses.replace(s, **leaner)
        return (
            new,
            f"Peak memory of the first step: {peak / GiB:.1f} of {total / GiB:.1f} GiB. "
            f"Settings from now on: {describe(new)}.",
        )
    free = MARGIN * total - peak
    if s.offload != "none" and s.segment_layers == 1:
        layer = plan.job.local * (
            plan.job.hidden_bytes
            + (plan.job.shape.saved_attention_bytes if s.offload == "inputs+attention" else 0)
        )
        stay = min(plan.job.shape.layers - 1, s.last_layers_on_gpu + int(free // layer))
        if free > 0 and stay > s.last_layers_on_gpu:
            new = dataclasses.replace(s, last_layers_on_gpu=stay)
            return (
                new,
                (
                    f"Peak memory of the first step: {peak / GiB:.1f} of {total / GiB:.1f} "
                    f"GiB. From now on the activations of the last {stay} layers stay on the "
                    "GPU."
                ),
            )
    return s, None


def explain_out_of_memory(plan: MemoryPlan, error: BaseException) -> str:
    """The message that ends a run whose GPU or host memory is exhausted."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"Out of memory on rows of up to {plan.job.tokens:,} tokens ({plan.job.local:,} per "
        "GPU).\n"
        f"{plan.table}\n"
        f"The device's error: {first[:200]}\n"
        f"{plan.advice}"
    )
