"""The place of this process: its sequence-parallel group, its data-parallel group, and the groups
that the schedules use.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from longfactory.kernel_names import KERNELS, canonical

log = logging.getLogger(__name__)

Mode = Literal["zigzag-ring", "ulysses", "llama3", "usp", "auto"]
MODES: tuple[Mode, ...] = ("zigzag-ring", "ulysses", "llama3", "usp", "auto")


class Axes(NamedTuple):
    """A split of the sequence-parallel group: `ulysses` exchanges heads among consecutive ranks,
    `ring` exchanges keys and values.
    """

    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None


@dataclasses.dataclass(eq=False)
class SequenceParallel:
    """Sequence-parallel rank `rank` of `size`, data-parallel rank `dp_rank` of `dp_size`. A group
    of one process is None.

    Sequence-parallel groups are consecutive ranks of the world: world rank = dp_rank * size + rank.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    dp_size: int = 1
    dp_rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    mode: Mode = "zigzag-ring"
    ulysses_degree: int | None = None
    backend: str = "auto"
    device_type: str = "cpu"
    heads: int | None = None
    kv_heads: int | None = None
    flop_per_byte: float = 2850.0
    """FLOP of attention in the time of a byte between ranks of a machine, for `auto`. Here Hopper
    with NVLink: 570 TFLOP/s, 200 GB/s.
    """
    axes: dict[int, Axes] = dataclasses.field(default_factory=dict, repr=False)
    """Process groups by ulysses degree. The ring's groups are its own, so that its messages do not
    queue behind other collectives.
    """

    measured: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict, repr=False)
    """What was fastest for a class of rows (`sp.measure`), for `auto`. The same on every rank of
    the group.
    """

    said: set[str] = dataclasses.field(default_factory=set, repr=False)
    """What `auto` has already given as its reason in the log."""

    @classmethod
    def create(
        cls,
        size: int = 1,
        mode: Mode = "zigzag-ring",
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        backend: str = "auto",
        heads: int | None = None,
        kv_heads: int | None = None,
        device_type: str | None = None,
        flop_per_byte: float = 2850.0,
        timeout: float | None = None,
    ) -> SequenceParallel:
        """Creates the process groups. Collective: every process of the world must call it with the
        same arguments.

        Args:
            size: number of processes that share one row. Must divide the world size.
            mode: the schedule. `usp` is ulysses inside a ring; `auto` chooses for each row.
            ulysses_degree, ring_degree: for `usp`; their product is `size`. Giving one is enough.
            backend: the attention kernel by one of its names (`kernel_names`), or `auto` (see
                `sp.backends`).
            heads, kv_heads: query and key heads of the model, for `auto` and for `usp` without a
                degree. See `set_heads`.
            device_type: device of the tensors; by default `cuda` if the process group uses NCCL.
            flop_per_byte: see the field.
            timeout: time limit of the groups' collectives in seconds; by default the backend's
                (NCCL: 10 minutes), independent of the world group's.

        Raises:
            ValueError: a size that does not divide the world size, an unknown mode or backend,
                degrees whose product is not `size`, or a group that spans machines although the
                network settings reach only the own machine.
        """
        if mode not in MODES:
            raise ValueError(
                f"Unknown sequence-parallel mode {mode!r}. Choose one of: {', '.join(MODES)}."
            )
        backend = canonical(backend)
        if backend != "auto" and backend not in KERNELS:
            raise ValueError(
                f"Unknown attention_backend {backend!r}. Choose one of: auto, {', '.join(KERNELS)}."
            )
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if size < 1 or world % size:
            raise ValueError(
                f"sequence_parallel_size {size} does not divide the {world} processes. Start a"
                f" multiple of {size}, or lower the size."
            )
        degree = _ulysses_degree(size, mode, ulysses_degree, ring_degree)
        if device_type is None:
            nccl = world > 1 and "nccl" in str(dist.get_backend())
            device_type = "cuda" if nccl or (world == 1 and torch.cuda.is_available()) else "cpu"
        me = dist.get_rank() if world > 1 else 0
        for warning in over_machines(size, degree, device_type):
            if me == 0:
                log.warning(warning)
        dp_rank, rank = divmod(me, size)
        ctx = cls(
            size,
            rank,
            None,
            world // size,
            dp_rank,
            None,
            mode,
            degree,
            backend,
            device_type,
            heads,
            kv_heads,
            flop_per_byte,
        )
        if world > 1:
            ctx.group = _group(
                [[d * size + r for r in range(size)] for d in range(world // size)], timeout
            )
            ctx.dp_group = _group(
                [[d * size + r for d in range(world // size)] for r in range(size)], timeout
            )
        # The model's heads, not known yet, decide how many ranks `ulysses` shares them among.
        every = degree is None or mode == "ulysses"
        degrees = [u for u in range(1, size + 1) if size % u == 0 and (every or u == degree)]
        for u in degrees:
            blocks = [d * size + p * u for d in range(world // size) for p in range(size // u)]
            inner = _group([[b + i for i in range(u)] for b in blocks], timeout)
            outer = _group(
                [
                    [d * size + p * u + i for p in range(size // u)]
                    for d in range(world // size)
                    for i in range(u)
                ],
                timeout,
            )
            ctx.axes[u] = Axes(inner, outer)
        return ctx

    def set_heads(self, heads: int, kv_heads: int | None = None) -> None:
        """Tells `auto` and `usp` the model's head counts. With several counts among the layers,
        their greatest common divisor.
        """
        self.heads, self.kv_heads = heads, kv_heads if kv_heads is not None else heads


def alignment(ctx: SequenceParallel) -> int:
    """A row's length must be a multiple of this.

    Two equal chunks for every rank. On GPUs a chunk is a multiple of 128 tokens: cuDNN builds its
    kernels for a shape, and the fewer shapes, the fewer builds.
    """
    unit = 128 if ctx.device_type == "cuda" else 1
    return unit if ctx.size == 1 else 2 * ctx.size * unit


def largest_ulysses_degree(size: int, heads: int) -> int:
    """The largest number of ranks, dividing `size`, that can share `heads` query heads evenly."""
    return math.gcd(size, heads)


def machine_size() -> int | None:
    """Processes on this machine, where the launcher says: torchrun and accelerate, or deepspeed."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(given) if given else None


def neighbours(size: int) -> int:
    """So many consecutive ranks of every sequence-parallel group share a machine. All of them where
    the launcher does not say.
    """
    return math.gcd(size, machine_size() or size)


def over_machines(size: int, ulysses: int | None, device_type: str) -> list[str]:
    """What is slow about groups that do not fit in a machine, in sentences. `ulysses`: the degree,
    where it is set.

    Raises:
        ValueError: the network settings leave each machine alone.
    """
    local, near = machine_size(), neighbours(size)
    if local is None or near == size:
        return []
    name = "NCCL_SOCKET_IFNAME" if device_type == "cuda" else "GLOO_SOCKET_IFNAME"
    interfaces = {i.strip().lstrip("=") for i in os.environ.get(name, "").split(",")}
    if interfaces == {"lo"}:
        raise ValueError(
            f"sequence_parallel_size {size} shards a row over several machines of {local} "
            f"processes, but {name}={os.environ[name]} reaches no other machine. Set it to the "
            f"network interface between machines, or lower the size to {near}."
        )
    out = []
    if near < min(size, local):
        out.append(
            f"sequence_parallel_size {size} neither divides the {local} processes of a machine "
            "nor is a multiple of them, so groups would straddle machines. Use a divisor or a "
            f"multiple of {local}."
        )
    if ulysses is not None and near % ulysses:
        degree = (
            f"usp with sequence_parallel_ulysses_degree: {near} (heads inside a machine, a ring"
            " between)"
        )
        out.append(
            f"Ulysses exchanges heads among {ulysses} ranks, of which {near} share a machine: every"
            " layer waits for the links between machines. Faster: sequence_parallel_mode:"
            f" {degree if near > 1 else 'zigzag-ring'}, or auto."
        )
    if device_type == "cuda" and os.environ.get("NCCL_IB_DISABLE") == "1":
        out.append(
            f"NCCL_IB_DISABLE=1: communication between the {size} ranks of a row uses TCP "
            "between machines."
        )
    return out


def _ulysses_degree(size: int, mode: str, ulysses: int | None, ring: int | None) -> int | None:
    if mode != "usp":
        fixed = {"zigzag-ring": 1, "llama3": 1, "ulysses": size}.get(mode)
        for name, given, must in (
            ("ulysses", ulysses, fixed),
            ("ring", ring, size // fixed if fixed else None),
        ):
            if given is not None and given != must:
                raise ValueError(
                    f"Mode {mode} has no {name} degree of {given}. Use sequence_parallel_mode: usp"
                    " to set degrees."
                )
        return fixed
    if ulysses is None and ring is None:
        return None
    if ring is not None and (ring < 1 or size % ring):
        raise ValueError(f"A ring degree of {ring} does not divide sequence_parallel_size {size}.")
    if ulysses is None and ring is not None:
        ulysses = size // ring
    assert ulysses is not None
    if ulysses < 1 or size % ulysses or (ring is not None and ulysses * ring != size):
        raise ValueError(
            f"ulysses degree {ulysses} x ring degree {ring or '?'} is not sequence_parallel_size"
            f" {size}."
        )
    return ulysses


def _group(partition: list[list[int]], timeout: float | None) -> dist.ProcessGroup | None:
    """The group of this process among `partition`, None where it is alone. All processes make all
    groups, in the same order.
    """
    if all(len(ranks) == 1 for ranks in partition):
        return None
    limit = None if timeout is None else datetime.timedelta(seconds=timeout)
    mine, _ = dist.new_subgroups_by_enumeration(partition, timeout=limit)
    return mine
