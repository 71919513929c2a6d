"""The constants of `longfactory.sp.layout.cost`, fitted to measured layouts of packed rows.

    python benchmarks/layout_cost.py benchmarks/results/many_gpus_packed_2xH200.json

Reads the times of layouts that `many_gpus.py --part packed` measured, and prints what a million pairs
of queries and keys, a thousand local tokens, a tile, a thousand rows of a rectangle's longer side, and
a fetch take (milliseconds, of the busiest rank), and the same in pairs. Needs no GPU.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from _attention_rows import MIXES, documents, segments_of
from longfactory.sp import layout as layouts
from longfactory.sp.layout import Layout, Segment, dealt, filled, whole, zigzag

LENGTH = 131072
NAMES = ("million pairs", "thousand local tokens", "tile", "thousand rows of a side", "fetch")
HUGE = 10**9


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    points = [point for row in rows if "layouts" in row for point in measured(row)]
    found = fitted(points)
    errors = torch.stack([(parts @ found).max() / ms for ms, parts in points]).log()
    print(
        f"{len(points)} layouts, root mean square error {float(errors.square().mean()) ** 0.5:.3f}"
    )
    for name, value in zip(NAMES, found.tolist(), strict=True):
        print(f"{name}: {value:.4f} ms, {value / float(found[0]):.2f} million pairs")


def measured(row: dict[str, str]) -> list[tuple[float, Tensor]]:
    """(milliseconds of the busiest rank, [ranks, 5] what each rank has) of a row's layouts."""
    about = re.match(r"(.*), 128k, row (\d+), (\d+) ranks", row["row"])
    assert about is not None, row["row"]
    mix, seed, n = about[1], int(about[2]), int(about[3])
    segments = segments_of(documents(LENGTH, *MIXES[mix], seed))
    told = re.findall(r"([a-z][a-z0-9., ]*?) (\d+\.\d+) \(\d+\.\d+\)", row["layouts"])
    return [(float(ms), parts(named(name, n, segments), segments)) for name, ms in told]


def named(name: str, n: int, segments: list[Segment]) -> Layout:
    """The layout that a row's text names."""
    number = name.split()[-1]
    if name.startswith("parts of"):
        return whole(LENGTH, n, segments, float(number))
    if name.startswith("uncut"):
        layout = filled(LENGTH, n, segments, int(number))
        assert layout is not None, name
        return layout
    if name == "whole":
        return whole(LENGTH, n, segments)
    return zigzag(LENGTH, n) if name == "zigzag" else dealt(LENGTH, n, segments, 512)


def parts(layout: Layout, segments: list[Segment]) -> Tensor:
    """[ranks, 5] of `NAMES`, as `layout.cost` counts them."""

    def counted(name: str) -> Tensor:
        sizes = {"TILE": 0, "SIDE": 0, "FETCH": 0} | ({name: HUGE} if name else {})
        with mock.patch.multiple(layouts, **sizes):
            return torch.tensor(layouts.cost(layout, segments), dtype=torch.float64)

    pairs = counted("")
    tiles, sides, fetches = ((counted(name) - pairs) / HUGE for name in ("TILE", "SIDE", "FETCH"))
    tokens = torch.full_like(pairs, layout.local_length / 1e3)
    return torch.stack([pairs / 1e6, tokens, tiles, sides / 1e3, fetches], 1)


def fitted(points: list[tuple[float, Tensor]]) -> Tensor:
    """Positive weights of the parts, such that the busiest rank's sum is near the time."""
    log_weights = torch.full((len(NAMES),), -3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_weights], lr=0.05)
    for _ in range(800):
        weights = log_weights.exp()
        errors = torch.stack([(parts @ weights).max() / ms for ms, parts in points]).log()
        optimizer.zero_grad()
        errors.square().mean().backward()
        optimizer.step()
    return log_weights.detach().exp()


if __name__ == "__main__":
    main()
