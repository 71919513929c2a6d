"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while training, by
`neftune_noise_alpha`.

The noise of a document of L tokens lies within alpha / sqrt(L * d), d the size of an embedding. L
is the document's own length: neither packing nor the batch size changes the noise, as a padded
batch would. What is drawn for a token is a function of the seed, the step, the document and the
token's place in it, and of nothing else: the layout of the row, sequence_parallel_size and the kind
of device do not change it, and a pass that is repeated draws the same.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.data.row import Row
from longfactory.sp.pinned import copied

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of the splitmix64 generator
_ELEMENTS_AT_ONCE = 1 << 22


def token_scales(row: Row, alpha: float) -> Tensor:
    """[T] float32: alpha / sqrt(L) of each token's document; 0 in padding, which has no noise."""
    scales = []
    for d in row.documents:
        length = d.stop - d.start
        scales.append(torch.full((length,), 0.0 if d.role == "pad" else alpha / math.sqrt(length)))
    return torch.cat(scales)


def token_keys(row: Row, seed: int, step: int) -> Tensor:
    """[T] int64: a number for each token of a row, from which its noise is drawn."""
    seen: collections.Counter[tuple[int, str]] = collections.Counter()
    keys = []
    for d in row.documents:
        name = (d.sample, d.role)
        words = f"{seed} {step} {d.sample} {d.role} {seen[name]}"
        seen[name] += 1
        start = int.from_bytes(
            hashlib.blake2b(words.encode(), digest_size=8).digest(), "little", signed=True
        )
        keys.append(_mix(torch.arange(1, d.stop - d.start + 1) * _signed(_GOLDEN) + start))
    return torch.cat(keys)


def uniform(keys: Tensor, dim: int) -> Tensor:
    """[t] keys -> [t, dim] float32 numbers that are uniform in (-1, 1), the same on every
    device.
    """
    channels = torch.arange(1, dim + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _shifted(_mix(keys[:, None] + channels), 40)  # 24 of 64 bits: what float32 holds exactly
    return (2 * bits + 1 - (1 << 24)).to(torch.float32) / (1 << 24)


@contextlib.contextmanager
def noisy_embeddings(embedding: nn.Module, keys: Tensor, scales: Tensor) -> Iterator[None]:
    """While open, one pass through `embedding` adds noise to its output [1, t, d]: uniform in
    +-scale / sqrt(d).

    Args:
        keys, scales: [t], of the tokens that pass (`token_keys`, `token_scales`).
    Raises:
        RuntimeError: not exactly one pass went through, or it had another number of tokens: noise
            would be missing or misplaced.
    """
    passes = 0

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if output.dim() != 3 or output.shape[:2] != (1, len(keys)):
            raise RuntimeError(
                f"NEFTune expected embeddings of shape [1, {len(keys)}, d], found"
                f" {list(output.shape)}."
            )
        noise = torch.empty_like(output)
        dim = output.shape[-1]
        size = max(1, _ELEMENTS_AT_ONCE // dim)
        bounds = copied(scales, output.device) / math.sqrt(dim)
        parts = noise[0].split(size), copied(keys, output.device).split(size), bounds.split(size)
        for out, k, b in zip(*parts, strict=True):
            out.copy_(uniform(k, dim) * b[:, None])
        return output + noise

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if passes != 1:
        raise RuntimeError(
            f"NEFTune expected one pass through the input embeddings, found {passes}: this model's"
            " are elsewhere."
        )


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: every bit of the result depends on every bit of `x`. Products
    wrap around.
    """
    for bits, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, bits)) * _signed(multiplier)
    return x ^ _shifted(x, 31)
