"""Rows of growing length: peak and seconds, in the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from longfactory.errors import UserError
from longfactory.memory.budget import MARGIN
from longfactory.memory.technique import techniques
from longfactory.train.auto import Planned, Way, longest_row, way

GiB = 2**30
WIDTH = 30
FORMATS = (".png", ".svg", ".pdf")


def points(planned: Planned, found: Way) -> list[Way]:
    """The way for rows of powers of two, up to the longest that fits, which is the last; none where
    nothing fits.
    """
    tokens, lengths = 4096, []
    longest = longest_row(planned, found.size, found.mode)
    if not longest:
        return []
    while tokens < longest:
        lengths.append(tokens)
        tokens *= 2
    return [way(planned, n, found.size, found.mode) for n in [*lengths[-11:], longest]]


def chart(ways: Sequence[Way]) -> list[str]:
    """A line a length: peak of one GPU as a bar of its memory, seconds, and what is done from there
    on, where that is another.
    """
    machine = ways[0].memory.plan.job.machine
    lines = [f"    {'tokens':>11} {'GPU GiB':>8} {'':<{WIDTH}} {'s per row':>9}"]
    before: Way | None = None
    for each in ways:
        plan = each.memory.plan
        peak = plan.budget.gpu_total
        filled = min(WIDTH, round(WIDTH * peak / machine.gpu_bytes))
        bar = "#" * filled + "." * (WIDTH - filled)
        change = "" if before is None else changed(before, each)
        lines.append(
            f"    {plan.job.tokens:>11,} {peak / GiB:>8.1f} {bar} {number(plan.budget.seconds):>9}"
            + (f"  {change}" if change else "")
        )
        before = each
    lines.append(
        f"    {'':>11} {'':>8} bars: share of {machine.gpu_bytes / GiB:.1f} GiB; the plan may "
        f"use {MARGIN:.0%}"
    )
    return lines


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def changed(before: Way, after: Way) -> str:
    """What is done for a longer row that was not for the one before, in words."""
    old, new = before.memory.plan.settings, after.memory.plan.settings
    said = []
    for technique in techniques():
        if technique.words is None:
            continue
        was, now = technique.words(old), technique.words(new)
        if was != now:
            said.append(f"without {was}" if now is None else now)
    if before.memory.split != after.memory.split:
        said.append("split masters" if after.memory.split else "fp32 masters")
    return "from here: " + "; ".join(said) if said else ""


def falls(ways: Sequence[Way]) -> list[str]:
    """A line for each length whose peak is below that of a shorter one, with the reason."""
    lines = []
    for before, after in pairwise(ways):
        peaks = [each.memory.plan.budget.gpu_total / GiB for each in (before, after)]
        if peaks[1] < 0.99 * peaks[0]:
            tokens = [each.memory.plan.job.tokens for each in (before, after)]
            why = changed(before, after).removeprefix("from here: ")
            lines.append(
                f"  The peak falls from {peaks[0]:.1f} GiB at {tokens[0]:,} tokens to"
                f" {peaks[1]:.1f} at {tokens[1]:,}: {why}."
            )
    return lines


def check_picture(path: Path) -> None:
    """Refuses a picture that cannot be written.

    Raises:
        UserError: another format, or no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"--picture: got {path}, expected a name that ends in {', '.join(FORMATS)}."
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture: there is no folder {path.parent}.")


def picture(ways: Sequence[Way], path: Path, title: str) -> None:
    """Peak and seconds over tokens, with the settings that change marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plans = [each.memory.plan for each in ways]
    tokens = [plan.job.tokens for plan in plans]
    machine = plans[0].job.machine
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    top.plot(tokens, [plan.budget.gpu_total / GiB for plan in plans], marker="o", label="one GPU")
    if any(plan.budget.host for plan in plans):
        top.plot(
            tokens,
            [plan.budget.host_total / GiB for plan in plans],
            marker="s",
            linestyle="--",
            label=f"host of {machine.on_host} GPUs",
        )
    top.axhline(MARGIN * machine.gpu_bytes / GiB, color="grey", linewidth=1)
    top.set_ylabel("predicted peak, GiB")
    top.set_ylim(bottom=0)
    top.legend()
    top.set_title(title, fontsize=10)
    bottom.plot(tokens, [plan.budget.seconds for plan in plans], marker="o", color="#d62728")
    bottom.set_yscale("log")
    bottom.set_xscale("log", base=2)
    bottom.set_xlabel("tokens of a row")
    bottom.set_ylabel("predicted seconds per row")
    for before, after in pairwise(ways):
        if changed(before, after):
            for axes in (top, bottom):
                axes.axvline(after.memory.plan.job.tokens, color="grey", linewidth=0.6, alpha=0.5)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
