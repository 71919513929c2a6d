"""States of fragments over ranks: from how all open fragments change a state to the states from
which a rank's own start, and the way back for gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import raw_all_gather
from .fragments import Fragments
from .states import Changes, applied


def gathered(mine: Changes, fragments: Fragments, group: dist.ProcessGroup | None) -> Changes:
    """[F of this rank] -> of all open fragments, in the order of `Fragments.place`."""
    if group is None:
        return mine
    out = []
    for x in (mine.state, mine.matrix):
        filled = x.new_zeros(fragments.width, *x.shape[1:])
        filled[: len(x)] = x
        out.append(raw_all_gather(filled, group))
    return Changes(*out)


def first_states(every: Changes, fragments: Fragments) -> Tensor:
    """[F, H, Dk, Dv]: the states from which this rank's fragments start, in local order."""
    after: dict[int, Tensor] = {}
    for i in _needed(fragments):
        before = fragments.every[i].previous
        place = fragments.place[i]
        after[i] = every.state[place]
        if before >= 0:
            after[i] = after[i] + applied(every.matrix[place], after[before])
    zero = every.state.new_zeros(every.state.shape[1:])
    previous = [fragments.every[i].previous for i in fragments.local]
    return torch.stack([after[i] if i >= 0 else zero for i in previous])


def last_gradients(
    d_first: Tensor, matrix: Tensor, fragments: Fragments, group: dist.ProcessGroup | None
) -> Tensor:
    """Gradients of the states after this rank's open fragments, [F, H, Dk, Dv] in the order of
    `open_local`.

    Args:
        d_first: [F, H, Dk, Dv] gradients of the states from which its fragments start, by what the
            fragments themselves give out, in local order.
        matrix: of all open fragments.
    """
    number = {i: at for at, i in enumerate(fragments.open)}
    total = d_first.new_zeros(len(number), *d_first.shape[1:])
    for at, i in enumerate(fragments.local):
        if fragments.every[i].previous >= 0:
            total[number[fragments.every[i].previous]] += d_first[at]
    if group is not None:
        dist.all_reduce(total, group=group)
    for i in reversed(fragments.open):
        before = fragments.every[i].previous
        if before >= 0:
            total[number[before]] += applied(
                matrix[fragments.place[i]], total[number[i]], transposed=True
            )
    mine = [total[number[i]] for i in fragments.open_local]
    return torch.stack(mine) if mine else total[:0]


def _needed(fragments: Fragments) -> list[int]:
    """Open fragments before this rank's, the earliest first."""
    found: set[int] = set()
    for i in fragments.local:
        at = fragments.every[i].previous
        while at >= 0 and at not in found:
            found.add(at)
            at = fragments.every[at].previous
    return sorted(found)
