"""Attention inside the images of a tower that takes patches: images of one size in one call.

transformers' own call of `scaled_dot_product_attention` is one for each image, or for each window
of one (Qwen2.5-VL: 64 patches), in each layer: of a batch of 16,384 patches 256 calls a layer. An
implementation whose name has "flash" in it is called once, with the boundaries of all of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

ATTENTION = "longfactory_flash_tower"
OWN = "sdpa"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, patches, width] -> [1, patches, heads, width].

    Args:
        dropout: of attention's weights.
        cu_seq_lens_q: boundaries of the images or windows, on the host; None of one.
    Raises:
        ValueError: a mask is given. The boundaries say all.
    """
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__}: a tower's attention got a mask, expected boundaries alone."
        )
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    # [patches, heads, width]
    out = in_groups([x[0].transpose(0, 1) for x in (query, key, value)], lengths, scaling, dropout)
    return out[None], None


def in_groups(
    parts: Sequence[Tensor],
    lengths: Sequence[int],
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside stretches of these lengths, those of one length together.

    Args:
        parts: query, key and value, [patches, heads, width].
    """
    if len(set(lengths)) == 1:
        stacked = [x.unflatten(0, (len(lengths), lengths[0])) for x in parts]
        return _of_stack(stacked, scaling, dropout).flatten(0, 1)
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    cut = [x.split(list(lengths)) for x in parts]
    out: list[Tensor] = [parts[0]] * len(lengths)
    for chosen in places.values():
        found = _of_stack([torch.stack([x[i] for i in chosen]) for x in cut], scaling, dropout)
        for place, one in zip(chosen, found.unbind(), strict=True):
            out[place] = one
    return torch.cat(out)


def _of_stack(parts: Sequence[Tensor], scaling: float | None, dropout: float) -> Tensor:
    """[stretches, patches, heads, width] of query, key and value -> the same of the output."""
    query, key, value = (x.transpose(1, 2) for x in parts)
    out = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2)


AttentionInterface.register(ATTENTION, attention)


def install(config: PreTrainedConfig) -> None:
    """Of a tower's configuration: lets it use `attention` where it would use `OWN`."""
    if config._attn_implementation == OWN:
        config._attn_implementation = ATTENTION


def release(config: PreTrainedConfig) -> None:
    """Takes back what `install` has done."""
    if config._attn_implementation == ATTENTION:
        config._attn_implementation = OWN


@contextlib.contextmanager
def released(config: PreTrainedConfig) -> Iterator[None]:
    """transformers' own calls inside the block."""
    before = config._attn_implementation
    release(config)
    try:
        yield
    finally:
        config._attn_implementation = before
