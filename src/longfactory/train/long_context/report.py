"""What `longfactory eval` shows: a table, a picture, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from longfactory.train.long_context.measure import Cell, LongContext


def as_json(report: LongContext) -> str:
    """Everything that was measured."""
    return json.dumps(dataclasses.asdict(report), indent=1) + "\n"


def table(report: LongContext) -> str:
    """For each task a row a length: the share of answers found at each depth (and the mean
    log-probability of an answer token); then the loss by position.
    """
    lines = []
    for task in dict.fromkeys(cell.task for cell in report.cells):
        cells = [cell for cell in report.cells if cell.task == task]
        depths = sorted({cell.depth for cell in cells})
        head = "any depth" if task == "common" else None
        heads = [head or f"depth {depth:.0%}" for depth in depths]
        lines.append(f"{task:>9} |" + "".join(f"{h:>16}" for h in heads))
        for length in sorted({cell.length for cell in cells}):
            row = [_cell(cells, length, depth) for depth in depths]
            shown = [f"{c.found:>7.0%} ({c.logp:6.2f})" if c else "" for c in row]
            lines.append(f"{length:>9} |" + "".join(f"{text:>16}" for text in shown))
    if report.curve:
        lines.append("positions             loss  perplexity    tokens")
        for p in report.curve:
            lines.append(
                f"{p.start:>9}-{p.stop - 1:<9} {p.loss:>6.3f} {math.exp(min(p.loss, 700)):>11.2f}"
                f" {p.tokens:>9}"
            )
    return "\n".join(lines)


def _cell(cells: list[Cell], length: int, depth: float) -> Cell | None:
    return next((c for c in cells if (c.length, c.depth) == (length, depth)), None)


def draw(report: LongContext, path: str | Path) -> None:
    """One picture: for each task depth x length, the share of answers found; and the loss by
    position.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(cell.task for cell in report.cells))
    count = len(tasks) + bool(report.curve)
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=False):
        cells = [cell for cell in report.cells if cell.task == task]
        lengths = sorted({cell.length for cell in cells})
        depths = sorted({cell.depth for cell in cells})
        grid: list[list[Any]] = [
            [c.found if (c := _cell(cells, n, d)) else math.nan for n in lengths] for d in depths
        ]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_title(task)
        axis.set_xlabel("tokens")
        axis.set_ylabel("depth")
    if report.curve:
        axis = axes[0][-1]
        axis.plot([(p.start + p.stop) / 2 for p in report.curve], [p.loss for p in report.curve])
        axis.set_xscale("log")
        axis.set_title("loss by position")
        axis.set_xlabel("position")
        axis.set_ylabel("nats")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
