"""Every way of spreading a run's rows over its GPUs, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longfactory.memory.budget import MARGIN
from longfactory.memory.exchange import schedule
from longfactory.memory.products import document_flop
from longfactory.memory.search import HOST_SHARE
from longfactory.memory.seconds import seconds, starting_seconds
from longfactory.memory.shapes import Machine
from longfactory.plan.curve import number
from longfactory.train.auto import WORTH, Planned, Way, best, longest_row, way

GiB = 2**30
SHORT = 1e-3
"""Seconds of a layer, forward and backward, below which the plan says that it counts no starts of
kernels (where parameters are whole they have not been measured).
"""
HEADER = (
    f"    {'SP':>3} {'mode':<12}{'memory':<7}{'fits':<5}{'GPU GiB':>8}{'host GiB':>9}{'step s':>9}"
    f"{'tokens/s/GPU':>13}{'MFU':>6}  bound by"
)


def other_modes(own: Way) -> list[str]:
    """Modes that are other schedules than a way's, on its GPUs and the model's heads."""
    job = own.memory.plan.job
    if own.size == 1:
        return []
    seen = {schedule(job)} if job.mode != "auto" else set()
    found = []
    for mode in ("zigzag-ring", "llama3", "ulysses", "usp"):
        other = schedule(dataclasses.replace(job, mode=mode, ulysses_degree=None))
        if mode == "ulysses" and other.ulysses < own.size:
            continue  # its heads go round a ring as well, and it is usp
        if other not in seen:
            found.append(mode)
        seen.add(other)
    return found


@dataclasses.dataclass(frozen=True)
class Compared:
    """Ways for rows of one length.

    Attributes:
        ways: of each size the run's own mode, then others.
        own: as the run says.
        best: the fastest of all that fit; its size is what sequence_parallel_size: auto becomes.
    """

    ways: list[Way]
    own: Way
    best: Way | None


def compare(planned: Planned, tokens: int) -> Compared:
    """Ways for rows of `tokens`: each size and mode; and for the best of them each `memory`."""
    cfg = planned.cfg
    ways: list[Way] = []
    own: Way | None = None
    in_own_mode = []
    for size in sorted({*planned.sizes, cfg.sequence_parallel_size}):
        first = way(planned, tokens, size)
        in_own_mode.append(first)
        others = [way(planned, tokens, size, mode) for mode in other_modes(first)]
        ways.append(first)
        if any(each.fits for each in (first, *others)):
            ways += others
        if size == cfg.sequence_parallel_size:
            own = first
    assert own is not None
    found = best(in_own_mode)
    if found is not None:
        # as training chooses: the size by the run's own mode; then a mode that is faster there
        same = [each for each in ways if each.size == found.size and each.fits]
        fastest = max(same, key=lambda each: each.rate)
        found = fastest if found.rate < WORTH * fastest.rate else found
    if found is None:
        found = best(ways)
    return Compared(ways, own, found)


def with_other_memory(planned: Planned, tokens: int, found: Way) -> list[Way]:
    """The same way with the other values of `memory`."""
    own = planned.cfg.memory.memory
    return [
        way(planned, tokens, found.size, found.mode, memory=memory)
        for memory in ("fast", "auto", "long")
        if memory != own
    ]


def longest_ways(planned: Planned, found: Way | None) -> list[tuple[Way, str]]:
    """The longest rows, of the size that reaches furthest, and what is short for longer ones: in
    the run's own mode, and in the best one where that is another.
    """
    own = planned.cfg.parallel.sequence_parallel_mode
    reached = {size: longest_row(planned, size) for size in planned.sizes[-2:]}
    size = max(reached, key=lambda each: reached[each])
    lengths: dict[str, int] = {own: reached[size]}
    if found is not None and found.mode != own and size > 1:
        lengths[found.mode] = longest_row(planned, size, found.mode)
    ways = []
    for mode, tokens in lengths.items():
        if tokens:
            longer = short_of(way(planned, tokens + 8192, size, mode))
            ways.append((way(planned, tokens, size, mode), " and ".join(longer)))
    return ways


def row(each: Way, peak: float, memory: str, mark: str = "", bound: str = "") -> str:
    """A line of the table. `bound`: what binds; by default what the step would gain most from."""
    budget, job = each.memory.plan.budget, each.memory.plan.job
    mode = each.mode if each.size > 1 else "-"
    host = f"{budget.host_total / GiB:,.0f}" if budget.host_total else "-"
    line = (
        f" {mark:<2} {each.size:>3} {mode:<12}{memory:<7}{'yes' if each.fits else 'no':<5}"
        f"{budget.gpu_total / GiB:>8.1f}{host:>9}"
    )
    if not each.fits:
        return f"{line}{'-':>9}{'-':>13}{'-':>6}  {' and '.join(short_of(each))}"
    rate = each.rate / job.machine.gpus
    used = utilisation(each, peak)
    return f"{line}{number(each.step):>9}{rate:>13,.0f}{used:>6.0%}  {bound or bound_by(each)}"


def short_of(each: Way) -> list[str]:
    """What a way that does not fit has too little of."""
    plan = each.memory.plan
    machine = plan.job.machine
    short = []
    if plan.budget.gpu_total > MARGIN * machine.gpu_bytes:
        short.append("GPU memory")
    if plan.budget.host_total > HOST_SHARE * machine.host_bytes:
        short.append("host memory")
    return short or ["memory"]


def bound_by(each: Way) -> str:
    """What a step would gain most from, were it twice as fast."""
    plan = each.memory.plan
    job, settings = plan.job, plan.settings

    def gained(**faster: object) -> float:
        machine = dataclasses.replace(job.machine, **faster)  # type: ignore[arg-type]
        other = dataclasses.replace(job, machine=machine)
        return plan.budget.seconds - seconds(other, settings)

    m = job.machine
    between = "network between hosts" if m.gpus > m.gpus_per_host else "link between GPUs"
    gains = {
        "compute": gained(**_twice_the_rates(m)),
        "copies to the host": gained(copies=2 * m.copies),
        between: gained(
            links=2 * m.links,
            network=2 * m.network,
            latency=m.latency / 2,
            network_latency=m.network_latency / 2,
        ),
        "AdamW on the host": gained(host_memory=2 * m.host_memory),
        "starting kernels (short rows)": gained(layer_start=m.layer_start / 2),
    }
    return max(gains, key=lambda name: gains[name])


def _twice_the_rates(m: Machine) -> dict[str, object]:
    return {
        "gemm": 2 * m.gemm,
        "attention_forward": 2 * m.attention_forward,
        "attention_backward": 2 * m.attention_backward,
        "float32": tuple(2 * rate for rate in m.float32),
    }


def utilisation(each: Way, peak: float) -> float:
    """Model FLOP/s utilisation: products that a step needs, without what is computed again, of the
    data sheet's rate.
    """
    job = each.memory.plan.job
    rows = each.accumulation
    flop = document_flop(job.shape, job.tokens) / job.sp
    return rows * flop / each.step / peak


def too_short(each: Way) -> bool:
    """Whether a row takes so little that starting its kernels, which is not counted, is what it
    would wait for.
    """
    plan = each.memory.plan
    least = SHORT * plan.job.shape.layers
    return (
        each.fits and not starting_seconds(plan.job) and plan.budget.seconds - each.update < least
    )


def table(
    planned: Planned,
    compared: Compared,
    peak: float,
    more: Sequence[Way],
    far: Sequence[tuple[Way, str]],
) -> list[str]:
    """The lines: ways for the asked rows, `more` values of memory, and the longest rows."""
    own, found = compared.own, compared.best
    memory = planned.cfg.memory.memory
    job = own.memory.plan.job
    lines = [f"Rows of {job.tokens:,} tokens:", HEADER]
    for each in compared.ways:
        mark = (">" if each is found else "") + ("*" if each is own else "")
        lines.append(row(each, peak, memory, mark))
    for each, name in zip(more, [m for m in ("fast", "auto", "long") if m != memory], strict=False):
        lines.append(row(each, peak, name))
    lines.append(
        f" *  this run's settings   >  the best (differences below {1 - WORTH:.0%} are not "
        "significant); sequence_parallel_size: auto would choose its size"
    )
    if any(too_short(each) for each in (*compared.ways, *more)):
        lines.append(
            "Not counted: kernel launches where parameters are not sharded. Rows that take "
            f"less than {1000 * SHORT:.0f} ms per layer take longer than predicted."
        )
    lines.append("The longest rows that fit:" if far else "No rows fit, however short.")
    for each, short in far:
        tokens = each.memory.plan.job.tokens
        length = f": {tokens:,} tokens" + _of_cutoff(planned, tokens)
        lines.append(row(each, peak, memory, bound=short) + length)
    return lines


def _of_cutoff(planned: Planned, tokens: int) -> str:
    each = planned.documents
    return "" if each == 1 else f" (cutoff_len {tokens // each:,})"
