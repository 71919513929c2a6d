"""How rows are spread over the processes of a run, and how long they may be: what
`sequence_parallel_size: auto` and `cutoff_len: auto` become, and what `longfactory plan` compares.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longfactory.config import RunConfig
from longfactory.config.folder import MANIFEST
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.module import Datasets
from longfactory.data.saved import is_saved
from longfactory.errors import UserError
from longfactory.memory.search import longest
from longfactory.memory.shapes import Machine
from longfactory.memory.technique import techniques
from longfactory.model import load
from longfactory.train.memory_plan import (
    Counts,
    Memory,
    choose_sharding,
    count_parameters,
    plan_run,
    this_machine,
)
from longfactory.train.ranks import from_main
from longfactory.train.survival.board import Board

UNCUT = 10**9
"""A cutoff_len that no sample reaches."""
WORTH = 0.97
"""Of the fastest way's tokens a second: the plan does not tell ways apart that reach as much."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """What every way of spreading a run's rows has in common."""

    cfg: RunConfig
    model_config: Any
    counts: Counts
    sharding: str
    machine: Machine

    @property
    def sizes(self) -> list[int]:
        """Values that sequence_parallel_size may have."""
        if self.cfg.trainer.predict_with_generate:  # which generates on one device
            return [1]
        gpus = self.machine.gpus
        return [size for size in range(1, gpus + 1) if gpus % size == 0]

    @property
    def documents(self) -> int:
        """Sequences of up to cutoff_len tokens in a row."""
        cfg = with_length(self.cfg, 1)
        return cfg.longest_row


@dataclasses.dataclass(frozen=True)
class Way:
    """Rows spread over groups of `size` GPUs by a mode, and what a step takes then."""

    size: int
    mode: str
    memory: Memory
    accumulation: int = 1

    @property
    def fits(self) -> bool:
        return self.memory.plan.fits

    @property
    def update(self) -> float:
        """Seconds of the optimizer that no backward pass hides."""
        plan = self.memory.plan
        return sum(
            technique.update(plan.job, plan.settings, float("inf"))
            for technique in techniques()
            if technique.update is not None
        )

    @property
    def step(self) -> float:
        """Seconds of an optimizer step."""
        return (
            self.accumulation * self.memory.plan.budget.seconds
            - (self.accumulation - 1) * self.update
        )

    @property
    def tokens(self) -> int:
        """Of an optimizer step, with rows as long as they may be."""
        job = self.memory.plan.job
        return self.accumulation * job.tokens * (job.machine.gpus // self.size)

    @property
    def rate(self) -> float:
        """Tokens a second of all GPUs."""
        return self.tokens / self.step if self.step else 0.0


def way(planned: Planned, tokens: int, size: int, mode: str | None = None, **memory: Any) -> Way:
    """The plan of rows of `tokens` over groups of `size` GPUs, as training would make it.

    Args:
        tokens: of the longest row.
        mode: of sequence parallelism; the run's own by default.
        memory: keys of the memory group that differ from the run's.
    """
    cfg = with_size(planned.cfg, size, mode)
    if memory:
        cfg = dataclasses.replace(cfg, memory=dataclasses.replace(cfg.memory, **memory))
    found = plan_run(
        cfg, planned.model_config, planned.counts, tokens, planned.sharding, planned.machine
    )
    steps = int(cfg.trainer.gradient_accumulation_steps)
    return Way(size, cfg.parallel.sequence_parallel_mode, found, steps)


def best(ways: Sequence[Way]) -> Way | None:
    """The fastest of those that fit; of those as fast one that needs nothing of the host, and of
    these the first. None where none fits.
    """
    fitting = [each for each in ways if each.fits]
    if not fitting:
        return None
    fastest = max(each.rate for each in fitting)
    as_fast = [each for each in fitting if each.rate >= WORTH * fastest]
    alone = [each for each in as_fast if not each.memory.plan.budget.host_total]
    return (alone or as_fast)[0]


def longest_row(planned: Planned, size: int, mode: str | None = None) -> int:
    """Tokens of the longest row that fits groups of `size` GPUs; 0 where none does."""
    for unit in (8192, 256):
        first = way(planned, unit, size, mode)
        if first.fits:
            break
    else:
        return 0
    mode_of_memory = planned.cfg.memory.memory

    def reach(found: Way) -> int:
        plan = found.memory.plan
        return longest(plan.job, mode_of_memory, unit=unit, fixed=plan.fixed)

    tokens = reach(first)
    further = way(planned, tokens + unit, size, mode)  # split masters, where these reach further
    return reach(further) if further.fits else tokens


def with_size(cfg: RunConfig, size: int, mode: str | None = None) -> RunConfig:
    """The run over groups of `size` processes. Degrees of usp stay where they are for that."""
    keys = cfg.parallel
    changed: dict[str, Any] = {"sequence_parallel_size": size}
    if mode is not None:
        changed["sequence_parallel_mode"] = mode
    if (size, mode or keys.sequence_parallel_mode) != (
        keys.sequence_parallel_size,
        keys.sequence_parallel_mode,
    ):
        changed |= {"sequence_parallel_ulysses_degree": None, "sequence_parallel_ring_degree": None}
    return dataclasses.replace(cfg, parallel=dataclasses.replace(keys, **changed))


def with_length(cfg: RunConfig, cutoff_len: int) -> RunConfig:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cutoff_len=cutoff_len))


def uncut(cfg: RunConfig) -> RunConfig:
    """The run with its samples as long as they are, for their lengths."""
    keys: dict[str, Any] = {"cutoff_len": UNCUT, "cutoff_strategy": "llamafactory"}
    keys |= {"packing": False, "neat_packing": False, "overwrite_cache": False}
    if not is_saved(cfg.data.tokenized_path):
        keys["tokenized_path"] = None
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **keys))


def longest_sample(datasets: Datasets) -> int:
    """The cutoff_len by which no sample of these is cut, for training or evaluation."""
    sets = [datasets.train, *datasets.eval.values()]
    return max(each.longest_uncut() for each in sets if isinstance(each, TokenizedDataset))


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `auto` became, and why, in lines for the log."""

    sequence_parallel_size: int | None = None
    cutoff_len: int | None = None
    lines: tuple[str, ...] = ()

    def applied(self, cfg: RunConfig) -> RunConfig:
        """The run with these numbers where it said auto."""
        undecided = cfg.undecided
        if "sequence_parallel_size" in undecided:
            assert self.sequence_parallel_size is not None
            cfg = with_size(cfg, self.sequence_parallel_size)
        if "cutoff_len" in undecided:
            assert self.cutoff_len is not None
            cfg = with_length(cfg, self.cutoff_len)
        return dataclasses.replace(cfg, decided=undecided)


def of_checkpoint(cfg: RunConfig, world: int) -> Decision:
    """What the checkpoint that the run goes on from allows: its cutoff_len, and a size with which a
    step has as many samples. Empty where it begins anew.
    """
    if not cfg.checkpoints or cfg.trainer.ignore_data_skip:
        return Decision()
    path = Path(cfg.checkpoints[0])
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["manifest"]
        keys, then = found["configuration"], found["world"]
        cutoff = int(keys["cutoff_len"])
        groups = int(then["processes"]) // int(then["sequence_parallel_size"])
        samples = groups * _samples(keys)
    except (OSError, ValueError, KeyError, TypeError):
        return Decision()
    own = int(cfg.trainer.per_device_train_batch_size) * int(
        cfg.trainer.gradient_accumulation_steps
    )
    lines = []
    size = None
    if "cutoff_len" in cfg.undecided:
        lines.append(f"cutoff_len: auto is {cutoff:,}, that of {path}.")
    if "sequence_parallel_size" in cfg.undecided:
        now = samples // own
        if samples % own == 0 and now and world % now == 0:
            size = world // now
            lines.append(
                f"sequence_parallel_size: auto is {size}: with {world} processes a step has as many"
                f" samples as in {path}, {samples}."
            )
        else:
            lines.append(
                f"sequence_parallel_size: auto: {world} processes with {own} samples each cannot"
                f" make steps of {samples} samples, as {path} has them."
            )
    return Decision(size, cutoff, tuple(lines))


def _samples(keys: dict[str, Any]) -> int:
    return int(keys["per_device_train_batch_size"]) * int(keys["gradient_accumulation_steps"])


def planned_here(cfg: RunConfig, world: int, cuda: bool) -> Planned:
    """A run on this machine.

    Raises:
        UserError: its model cannot be planned.
    """
    model_config = load.load_config(cfg.model, cfg.known_cutoff_len)
    counts = count_parameters(cfg, model_config)
    sharding = choose_sharding(cfg, counts.total, world, cuda)
    return Planned(cfg, model_config, counts, sharding, this_machine(cfg, world, cuda))


def decide(cfg: RunConfig, world: int, cuda: bool, sample: int | None) -> Decision:
    """What `auto` becomes in a run of `world` processes on this machine.

    Args:
        sample: tokens of the data's longest sample; None where no length is to be decided.
    Raises:
        UserError: no length fits.
    """
    then = of_checkpoint(cfg, world)
    fixed = with_length(cfg, then.cutoff_len) if then.cutoff_len and sample is None else cfg
    if then.sequence_parallel_size:
        fixed = with_size(fixed, then.sequence_parallel_size)
    if not fixed.undecided:
        return then
    found = decide_on(planned_here(fixed, world, cuda), sample)
    return Decision(
        found.sequence_parallel_size or then.sequence_parallel_size,
        found.cutoff_len or then.cutoff_len,
        (*then.lines, *found.lines),
    )


def decide_on(planned: Planned, sample: int | None) -> Decision:
    """What `auto` becomes on the machines of a plan.

    cutoff_len is the longest sample, and no more than fits the groups that may be made;
    sequence_parallel_size the one with the most tokens a second for rows of that length.

    Args:
        sample: tokens of the data's longest sample; None: not known, the longest that fits counts.
    Raises:
        UserError: no length fits.
    """
    cfg, lines = planned.cfg, []
    each = planned.documents
    size: int | None = None
    open_size = "sequence_parallel_size" in cfg.undecided
    sizes = planned.sizes if open_size else [cfg.sequence_parallel_size]
    cutoff = cfg.known_cutoff_len or None
    if cutoff is None and planned.machine.gpu_bytes == 0:
        cutoff = sample or 0
        lines.append(f"cutoff_len: auto is {cutoff:,}, the longest sample of the data.")
    elif cutoff is None:
        reached = max(longest_row(planned, size) for size in (sizes[-1:] if open_size else sizes))
        most = reached // each
        if most == 0:
            raise UserError(
                "cutoff_len: auto: rows of 256 tokens do not fit.\n"
                + way(planned, 256, sizes[-1]).memory.plan.table
            )
        cutoff = most if sample is None else min(sample, most)
        of = "the longest that fits" if cutoff == most else "the longest sample of the data"
        other = "" if sample is None or cutoff == sample else f"; the longest sample has {sample:,}"
        lines.append(f"cutoff_len: auto is {cutoff:,}, {of}{other}.")
    if open_size and planned.machine.gpu_bytes == 0:
        size = 1
        lines.append("sequence_parallel_size: auto is 1: without a GPU, memory sets no limit.")
    elif open_size:
        ways = [way(planned, cutoff * each, n) for n in sizes]
        found = best(ways)
        size = ways[-1].size if found is None else found.size
        if found is None:
            lines.append(
                f"sequence_parallel_size: auto is {size}, the largest possible: no size fits."
            )
        else:
            rates = ", ".join(
                f"{w.size}: {w.rate / planned.machine.gpus:,.0f}"
                if w.fits
                else f"{w.size}: no room"
                for w in ways
            )
            lines.append(
                f"sequence_parallel_size: auto is {size}, for rows of {cutoff * each:,} tokens "
                f"(predicted tokens/s per GPU, by size: {rates})."
            )
    return Decision(size, cutoff if "cutoff_len" in cfg.undecided else None, tuple(lines))


def share(mine: Decision, store: Any) -> Decision:
    """What the first process decided. Collective: over the store, or over the group that is open.

    Machines may differ in their memory, and all must open the same groups.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        return from_main(mine)
    if store is None or world == 1:
        return mine
    board = Board(store, rank, world)
    if rank == 0:
        board.put("decided", dataclasses.asdict(mine))
    found = json.loads(store.get("decided"))  # waits for it
    return Decision(**{**found, "lines": tuple(found["lines"])})
