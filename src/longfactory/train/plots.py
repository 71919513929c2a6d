"""Pictures of a run's curves, from the trainer's log history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average with a weight that grows with the number of points: few points stay as
    they are.
    """
    if not values:
        return []
    import math

    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    out, last = [], values[0]
    for v in values:
        last = last * weight + (1 - weight) * v
        out.append(last)
    return out


def plot_history(
    history: Sequence[dict[str, Any]],
    folder: str | Path,
    keys: Sequence[str] = ("loss", "eval_loss"),
) -> list[Path]:
    """One `training_<key>.png` for each key that was logged. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for key in keys:
        points = [(h["step"], h[key]) for h in history if key in h]
        if not points:
            continue
        steps, values = [p[0] for p in points], [p[1] for p in points]
        figure, axes = plt.subplots(figsize=(7, 4))
        axes.plot(steps, values, color="#1f77b4", alpha=0.4, label="original")
        axes.plot(steps, smooth(values), color="#1f77b4", label="smoothed")
        axes.set_xlabel("step")
        axes.set_ylabel(key)
        axes.legend()
        path = Path(folder) / f"training_{key.replace('/', '_')}.png"
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, dpi=100, bbox_inches="tight", format="png")
        plt.close(figure)
        part.replace(path)
        files.append(path)
    return files


def overlay(
    curves: dict[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    ylabel: str = "loss",
) -> None:
    """Several curves on the same axes: name -> points (step, value). The first is drawn wide, the
    others thin on top of it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for i, (name, points) in enumerate(curves.items()):
        x, y = [p[0] for p in points], [p[1] for p in points]
        if i == 0:
            axes.plot(x, y, color="#f5b041", linewidth=6, alpha=0.7, label=name)
        else:
            axes.plot(
                x,
                y,
                color="#1b2631",
                linewidth=1.2,
                linestyle="--" if i > 1 else "-",
                marker="o",
                markersize=3,
                label=name,
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
