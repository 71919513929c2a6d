"""Before training: two images in a row that is sharded, one of them over several ranks, against
transformers' own forward of the whole document.

What is compared is what the text decoder is given: embeddings with the images' features in them,
positions, and the features that are added behind its first layers. The layers themselves are
`guard`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compare, hf, text_model, vision
from ..collectives import gather
from ..context import SequenceParallel, alignment
from ..layout import Interval, Segment, with_blocks
from ..media import Part, Route, deal
from ..plan import RowPlan
from ..plan import plan as make_plan
from ..vision import Images, Media

TEXT = (8, 5, 11)
"""Tokens before, between and after the images, at least."""
ROUNDINGS = 16
"""By how many roundings of the run's precision features may differ: a tower of some thirty layers,
whose matrix products may have other shapes.
"""


@dataclasses.dataclass
class Given:
    """What the text decoder was called with: [L, h] embeddings, [3, L] positions or None, and [L,
    h] of each further level of features, 0 where there is no image.
    """

    embeddings: Tensor
    positions: Tensor | None
    deeper: list[Tensor]


def differences(
    model: nn.Module, inner: PreTrainedModel, ctx: SequenceParallel, device: torch.device
) -> str | None:
    """Why images cannot be trained on, or None. Collective; the model is in evaluation mode.

    Args:
        model: as it is wrapped.
        inner: the transformers model in it, with `vision.install`.
    """
    images = vision.two_images(inner.config)
    counts = [vision.tokens_of(inner.config, i.kind, i.grid, i.size) for i in images]
    blocks = vision.has_blocks(inner.config)
    ids, kinds, places = _document(inner, counts, text_lengths(counts, ctx, blocks))
    plan = _plan(len(ids), places, ctx, blocks)
    media = _media(inner, ctx, images, places, plan, device)
    padding = plan.length - len(ids)
    positions = torch.cat([torch.arange(len(ids)), torch.arange(padding)])
    rule = vision.position_rule(inner.config)
    if rule is not None:
        three = torch.cat(
            [rule(ids, kinds, [i.grid for i in images], []), positions[len(ids) :].expand(3, -1)],
            dim=1,
        )
        positions = torch.cat([positions[None], three])
    row = {
        "input_ids": torch.cat([ids, ids.new_zeros(padding)]).to(device),
        "position_ids": positions.to(device),
    }
    with torch.no_grad(), _captured(inner) as seen:
        model(**hf.inputs(row, plan), sp_media=media)
    found = _gathered(seen, plan, len(ids))
    own = hf.own_attention(inner), vision.own_tower(inner)
    with torch.no_grad(), own[0], own[1], _captured(inner) as seen:
        whole = vision.own_inputs(inner.config, ids, kinds, images)
        model(**{k: x.to(device) if isinstance(x, Tensor) else x for k, x in whole.items()})
    return _compared(found, _own(seen, kinds.to(device)), kinds.to(device))


def text_lengths(counts: list[int], ctx: SequenceParallel, blocks: bool) -> tuple[int, ...]:
    """Tokens before, between and after the images, by which several ranks hold a part of an image,
    where the layout of rows allows it: a document that fits one rank may be dealt to it whole.

    Args:
        counts: placeholders of each image.
        blocks: tokens of an image see each other.
    """
    least = sum(TEXT) + sum(counts)
    more = max(0, alignment(ctx) // ctx.size + 32 - least) if ctx.size > 1 else 0
    for before in range(more + 1):
        text = (TEXT[0] + before, TEXT[1], TEXT[2] + more - before)
        start = text[0]
        places = [(start, start + counts[0])]
        start += counts[0] + text[1]
        places.append((start, start + counts[1]))
        intervals = _plan(least + more, places, ctx, blocks).layout.intervals
        for first, end in places:
            if sum(any(a < end and b > first for a, b in held) for held in intervals) > 1:
                return text
    return TEXT


def _document(
    inner: PreTrainedModel, counts: list[int], texts: tuple[int, ...]
) -> tuple[Tensor, Tensor, list[Interval]]:
    """Token ids, kinds (1 of images) and the placeholders of each image."""
    vocabulary = inner.config.get_text_config().vocab_size
    token = vision.image_token(inner.config)
    draw = torch.Generator().manual_seed(0)
    ids, kinds, places, length = [], [], [], 0
    for number, text in enumerate(texts):
        ids.append(torch.randint(vocabulary // 8, vocabulary // 2, (text,), generator=draw))
        kinds.append(torch.zeros(text, dtype=torch.int64))
        length += text
        if number < len(counts):
            ids.append(torch.full((counts[number],), token))
            kinds.append(torch.ones(counts[number], dtype=torch.int64))
            places.append((length, length + counts[number]))
            length += counts[number]
    return torch.cat(ids), torch.cat(kinds), places


def _plan(length: int, places: list[Interval], ctx: SequenceParallel, blocks: bool) -> RowPlan:
    """Of a row that is one document and padding."""
    padding = -length % alignment(ctx)
    segments = [Segment(0, length)]
    if padding:
        segments.append(Segment(length, length + padding))
    if blocks:
        segments = list(with_blocks(segments, places))
    return make_plan(length + padding, segments, ctx)


def _media(
    inner: PreTrainedModel,
    ctx: SequenceParallel,
    images: list[Images],
    places: list[Interval],
    plan: RowPlan,
    device: torch.device,
) -> Media:
    """What this rank computes of the row's images: every rank as many."""
    owner = deal([float(stop - start) for start, stop in places], ctx.size)
    mine = [image for image, rank in zip(images, owner, strict=True) if rank == ctx.rank]
    route = Route.make([Part((place,)) for place in places], owner, plan).to(device)
    most = max(owner.count(rank) for rank in range(ctx.size))
    empty = (vision.empty_image(inner.config),) * (most - len(mine))
    return Media(route, tuple((image,) for image in mine), empty)


@contextmanager
def _captured(inner: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What the text decoder is called with inside the block, after `vision`'s own hook."""
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = text_model.decoder(inner).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _gathered(seen: dict[str, Any], plan: RowPlan, length: int) -> Given:
    """Of the whole document, on every rank."""
    embeddings = seen["inputs_embeds"][0]
    deeper = []
    for level in vision.deeper_of(plan)[1]:
        placed = torch.zeros_like(embeddings)
        placed[vision.deeper_of(plan)[0]] = level.to(placed.dtype)
        deeper.append(gather(placed, plan)[:length])
    positions = seen.get("position_ids")
    if positions is not None and positions.dim() == 3:
        positions = gather(positions[-3:, 0].t().contiguous(), plan)[:length].t()
    else:
        positions = None
    return Given(gather(embeddings.contiguous(), plan)[:length], positions, deeper)


def _own(seen: dict[str, Any], kinds: Tensor) -> Given:
    embeddings = seen["inputs_embeds"][0]
    deeper = []
    for level in seen.get("deepstack_visual_embeds") or ():
        placed = torch.zeros_like(embeddings)
        placed[kinds > 0] = level.to(placed.dtype)
        deeper.append(placed)
    positions = seen.get("position_ids")
    if positions is not None:
        positions = positions[-3:, 0] if positions.dim() == 3 else None
    return Given(embeddings, positions, deeper)


def _compared(found: Given, own: Given, kinds: Tensor) -> str | None:
    dtype = own.embeddings.dtype
    limit = ROUNDINGS * compare.rounding(dtype)
    if found.embeddings.is_cuda:
        limit = max(limit, 1e-2)  # products in float32 may be of TF32
    if own.positions is not None and (
        found.positions is None or not torch.equal(found.positions, own.positions)
    ):
        return "the positions of a row with images are not those of transformers' own forward"
    levels = [("features of images", found.embeddings, own.embeddings)]
    if len(found.deeper) != len(own.deeper):
        return (
            f"{len(found.deeper)} levels of features reach its first layers, and"
            f" {len(own.deeper)} in transformers' own forward"
        )
    levels += [
        (f"features of images that are added behind layer {i + 1}", a, b)
        for i, (a, b) in enumerate(zip(found.deeper, own.deeper, strict=True))
    ]
    for what, a, b in levels:
        error = (a - b).double()[kinds > 0].norm() / b.double()[kinds > 0].norm().clamp(min=1e-30)
        if not error <= limit:
            return (
                f"the {what}, as they are computed and sent between ranks, differ from those of"
                f" transformers' own forward by {error:.1e}, tolerated are {limit:.1e}"
            )
    error = (found.embeddings - own.embeddings).double()[kinds == 0].abs().max()
    if error > 0:
        return f"the embeddings of text next to images differ by {error:.1e}"
    return None
