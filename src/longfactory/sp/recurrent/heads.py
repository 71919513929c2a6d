"""Parts of a recurrence's heads that are computed at once, so that their chunks fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from .fragments import Chunks
from .rule import CHUNK, Kind, Rule
from .within import BLOCK

WORKSPACE = 8 << 30
"""Bytes that the chunks of the heads computed at once may take."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads [start, stop) of the values, and their key heads."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    def inputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """q, k, v, g and beta of all heads -> views of these heads'."""
        q, k, *others = inputs
        keys, heads = slice(self.key_start, self.key_stop), slice(self.start, self.stop)
        return [q[:, keys], k[:, keys], *(x[:, heads] for x in others)]


def parts(heads: int, key_heads: int, at_once: int) -> Iterator[Heads]:
    """All heads, in parts of at most `at_once` (or 1): whole groups of one key head, or parts of
    one group.
    """
    share = heads // key_heads
    if at_once >= share:
        keys = at_once // share
        for start in range(0, key_heads, keys):
            stop = min(start + keys, key_heads)
            yield Heads(start * share, stop * share, start, stop)
        return
    size = max(d for d in range(1, share + 1) if share % d == 0 and d <= max(at_once, 1))
    for start in range(0, heads, size):
        yield Heads(start, start + size, start // share, start // share + 1)


def head_bytes(
    kind: Kind,
    key_dim: int,
    value_dim: int,
    per_channel: bool,
    share: int,
    kernels: bool,
    backward: bool = True,
) -> float:
    """That a pass takes of a token and a head while it computes them.

    Args:
        share: heads that one of the keys has.
        kernels: whether Triton computes it, which stores no more than it must.
    """
    states = key_dim * value_dim / CHUNK
    if not kernels:
        numbers = 14 * key_dim + 10 * value_dim + 12 * CHUNK + 4 * states
        return 4.0 * (numbers + 8 * BLOCK * key_dim if per_channel else numbers)
    delta = kind == "delta"
    numbers = states
    if delta:  # of queries and keys copies in fp32, over their lengths
        numbers += 2 * key_dim / share + key_dim + 2 * value_dim + CHUNK
    if per_channel:
        numbers += key_dim + CHUNK
    if backward:
        # Gradients of what the outputs read, and of the states and values by all that follows
        # (those of a delta rule's values take the place of other tensors); then the latter, and
        # gradients of the inputs and of the products of a chunk's tokens.
        after = states if delta else states + value_dim
        read = states + value_dim
        inputs = (3 if per_channel else 2) * key_dim + value_dim / 2
        numbers += after + max(read, inputs + (2 * CHUNK if delta else CHUNK))
    return 4.0 * numbers


def parts_of(
    inputs: list[Tensor], rule: Rule, chunks: Chunks, kernels: bool, backward: bool
) -> Iterator[Heads]:
    """All heads, in equal parts whose chunks fit in the workspace."""
    _, k, v, g, _ = inputs
    heads = v.shape[1]
    share = heads // k.shape[1]
    one = head_bytes(rule.kind, k.shape[2], v.shape[2], g.dim() == 3, share, kernels, backward)
    most = max(1, int(WORKSPACE / (chunks.count * chunks.size * one)))
    count = -(-heads // most)
    return parts(heads, k.shape[1], -(-heads // count))
