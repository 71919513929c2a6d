"""Rows with images: which rank computes what of them, their positions, and what the model is given.

A unit of a row (`data.media.units.MediaUnit`) is an image or a video; its steps are the parts that
a tower may compute apart. `Dealing` says which steps each rank computes, in a loader's worker, so
that a rank decodes only those; `RowImages` makes of the loaded row what the model is called with.
Both know the whole row and come to the same answer on every rank.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longfactory import sp
from longfactory.data.media.load import load_unit
from longfactory.data.media.units import Dealt, MediaUnit
from longfactory.data.row import Row, TokenizedDocument
from longfactory.errors import DataError
from longfactory.sp import hf, vision
from longfactory.sp.layout import Interval, with_blocks
from longfactory.sp.media import Part, Route, deal


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part of p patches costs a tower: p * (linear + attention * p)."""

    linear: float
    attention: float

    @classmethod
    def of(cls, config: Any) -> Work:
        """Of a model's tower: 8 h^2 + 4 h f products a patch and layer in its linear maps against 4
        h p in attention, which some towers confine to windows in most layers.
        """
        tower = config.vision_config
        hidden, inner, depth = vision.tower_sizes(tower)
        whole = getattr(tower, "fullatt_block_indexes", None)
        share = len(whole) / depth if whole else 1.0
        return cls(2.0 * hidden + inner, share)

    def cost(self, patches: int) -> float:
        """Of a part in which all patches see each other."""
        return patches * (self.linear + self.attention * patches)


@dataclasses.dataclass(frozen=True)
class Dealing:
    """Row -> the steps of its units that this rank computes. Picklable; host only.

    Args:
        work: of the tower.
        size, rank: of the sequence-parallel group.
    """

    work: Work
    size: int = 1
    rank: int = 0

    def __call__(self, row: Row) -> list[Dealt]:
        steps = steps_of(row)
        owner = self.owners(steps)
        mine = [s for s, rank in zip(steps, owner, strict=True) if rank == self.rank]
        return _joined(mine)

    def owners(self, steps: Sequence[Step]) -> list[int]:
        """The rank that computes each step of a row."""
        return deal([self.cost(step) for step in steps], self.size)

    def cost(self, step: Step) -> float:
        """Of one step, or of all tiles of an image that is dealt whole."""
        tiles = step.unit.grid[0] / step.unit.steps * (step.last - step.first)
        return tiles * self.work.cost(step.unit.grid[1] * step.unit.grid[2])


@dataclasses.dataclass(frozen=True)
class Step:
    """Steps [first, last) of a unit, which stands at `index` in the row's media: one of them, or
    all of a unit that is dealt whole. Their placeholders there, and those of the same image
    elsewhere in the row.
    """

    unit: MediaUnit
    index: int
    first: int
    last: int
    places: tuple[Interval, ...]
    copies: tuple[tuple[Interval, ...], ...] = ()


def steps_of(row: Row) -> list[Step]:
    """The steps of all different images of a row, in its order. An image that stands in several
    documents (an unshared prompt) is computed once.
    """
    same: dict[str, list[int]] = {}
    for index, unit in enumerate(row.media):
        same.setdefault(unit.key, []).append(index)
    out = []
    for at, *others in same.values():
        unit = row.media[at]
        numbers = range(unit.steps + 1) if unit.even else (0, unit.steps)
        held = [_Placeholders(row.media[i].spans) for i in (at, *others)]
        for first, last in itertools.pairwise(numbers):
            places, *copies = (rows.rows(*unit.features(first, last)) for rows in held)
            out.append(Step(unit, at, first, last, places, tuple(copies)))
    return out


class _Placeholders:
    """The rows of a unit's placeholders, by their place among them."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = spans
        self.before = list(itertools.accumulate((count for _, count in spans), initial=0))

    def rows(self, first: int, last: int) -> tuple[Interval, ...]:
        """Of the placeholders [first, last)."""
        out = []
        at = bisect.bisect_right(self.before, first) - 1
        while at < len(self.spans) and self.before[at] < last:
            start, before = self.spans[at][0], self.before[at]
            a, b = max(first, before), min(last, self.before[at + 1])
            if a < b:
                out.append((start + a - before, start + b - before))
            at += 1
        return tuple(out)


def _joined(steps: Sequence[Step]) -> list[Dealt]:
    """Steps of one unit that follow each other as one."""
    out: list[Dealt] = []
    for step in steps:
        if out and out[-1].unit == step.index and out[-1].last == step.first:
            out[-1] = dataclasses.replace(out[-1], last=step.last)
        else:
            out.append(Dealt(step.index, step.first, step.last))
    return out


def document_inputs(
    config: Any,
    ids: Sequence[int],
    media: Sequence[MediaUnit],
    load: Callable[[MediaUnit], dict[str, Tensor]],
    device: torch.device | str,
) -> dict[str, Any]:
    """What transformers' own forward, or `generate`, is given for one document with its images.

    Args:
        config: of the model.
        ids: tokens of the document.
        media: of the document, with spans from its first token.
        load: a unit -> its tensors (`data.media.load.load_unit`).
    """
    tokens = torch.tensor(list(ids))
    if not media:
        return {"input_ids": tokens[None].to(device), "use_cache": False}
    kinds, images = torch.zeros_like(tokens), []
    for unit in media:
        for start, count in unit.spans:
            kinds[start : start + count] = 1 if unit.kind == "image" else 2
        pixels = load(unit)["pixel_values"]
        images.append(vision.Images(unit.kind, unit.grid, pixels, unit.sizes))
    seconds = [u.seconds_per_step for u in media if u.kind == "video"]
    found = vision.own_inputs(config, tokens, kinds, images, [s for s in seconds if s is not None])
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in found.items()}


class RowImages:
    """What a model with images is called with, beside token ids.

    Args:
        model: with `vision.install`, wrapped or not.
        ctx: the place in the sequence-parallel group.
        equal_calls: every rank of the world must run the tower as often (ZeRO-3 gathers weights in
            each call).
        processing: what makes tensors of the images that the data name; None where rows come with
            their pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        ctx: sp.SequenceParallel,
        *,
        equal_calls: bool = False,
        processing: Any = None,
    ) -> None:
        self.processing = processing
        config = hf.unwrap(model).config
        self.model, self.ctx = hf.unwrap(model), ctx
        self.dealing = Dealing(Work.of(config), ctx.size, ctx.rank)
        self.rule = vision.position_rule(config)
        self.empty = vision.empty_image(config)
        self.blocks = vision.has_blocks(config)
        family = vision.family_of(config)
        self.whole = family is not None and family.whole
        self.equal_calls = equal_calls

    def segments(self, row: Row) -> tuple[sp.Segment, ...]:
        """The row's documents, cut at the images whose tokens see each other."""
        if not self.blocks or not row.media:
            return row.segments
        spans = sorted((a, a + number) for unit in row.media for a, number in unit.spans)
        return with_blocks(row.segments, spans)

    def positions(self, row: Row) -> Tensor:
        """[T], or [4, T] with those of text first, where images have three dimensions.

        Raises:
            DataError: the model makes another number of features of an image than it has
                placeholders. On every rank of the group, before the tower runs: a rank that found
                it in its own tower would leave the others waiting in the exchange.
        """
        self._check_tokens(row)
        if self.rule is None or not row.media:
            return row.position_ids
        return torch.cat([row.position_ids[None], self._three(row)])

    def _three(self, row: Row) -> Tensor:
        """[3, T] by the model's own rule, document by document; a branch goes on where its parent
        ends.
        """
        assert self.rule is not None
        out = row.position_ids.expand(3, -1).clone()
        media: dict[int, list[MediaUnit]] = {}
        for unit in row.media:
            media.setdefault(unit.document, []).append(unit)
        for index, document in enumerate(row.documents):
            chain = [index]
            while row.documents[chain[0]].parent >= 0:
                chain.insert(0, row.documents[chain[0]].parent)
            if not any(i in media for i in chain):
                continue
            pieces = [row.documents[i] for i in chain]
            ids = torch.cat([row.input_ids[d.start : d.stop] for d in pieces])
            kinds = torch.zeros_like(ids)
            units: list[MediaUnit] = []
            before = 0
            for i, d in zip(chain, pieces, strict=True):
                for unit in media.get(i, ()):
                    units.append(unit)
                    for start, number in unit.spans:
                        at = before + start - d.start
                        kinds[at : at + number] = 1 if unit.kind == "image" else 2
                before += d.stop - d.start
            places = self.rule(
                ids,
                kinds,
                [u.grid for u in units if u.kind == "image"],
                [u.grid for u in units if u.kind == "video"],
                [u.seconds_per_step for u in units if u.seconds_per_step is not None],
            )
            out[:, document.start : document.stop] = places[:, -(document.stop - document.start) :]
        return out

    def media(self, row: Row, plan: sp.RowPlan, device: torch.device) -> vision.Media | None:
        """What this rank computes of a row's images, and where its features go. None where no rank
        has anything to do.

        Collective with `equal_calls`.
        """
        steps = steps_of(row)
        if not steps:
            return self.none(plan, device)
        owner = self.dealing.owners(steps)
        loaded = {(p.dealt.unit, p.dealt.first): p for p in row.pixels}
        mine = _joined([s for s, rank in zip(steps, owner, strict=True) if rank == self.ctx.rank])
        images = [self._image(row, loaded, part) for part in mine]
        limit = vision.TRAINED_BATCH if vision.is_trained(self.model) else vision.BATCH
        batches = vision.batches_of(images, limit, whole=self.whole)
        parts = [Part(s.places, self.dealing.cost(s), s.copies) for s in steps]
        route = Route.make(parts, owner, plan).to(device)
        return vision.Media(route, batches, self._empty(len(batches), device))

    def _check_tokens(self, row: Row) -> None:
        for unit in row.media:
            made = vision.tokens_of(self.model.config, unit.kind, unit.grid, unit.sizes)
            if made != unit.tokens:
                where = f" ({unit.place})" if unit.place else ""
                raise DataError(
                    f"{unit.reference.describe()}{where} has {unit.tokens} placeholder tokens, and"
                    f" the model makes {made} features of it. The files of its processor belong to"
                    " another model: copy those that belong to it, and set overwrite_cache: true."
                )

    def none(self, plan: sp.RowPlan, device: torch.device) -> vision.Media | None:
        """Of a row without images: nothing, or where the tower or the projector is trained an empty
        image, so that every parameter has a gradient on every rank.
        """
        empty = self._empty(0, device)
        if not empty:
            return None
        return vision.Media(Route.make((), (), plan).to(device), (), empty)

    def _empty(self, batches: int, device: torch.device) -> tuple[vision.Images, ...]:
        """What this rank runs beside its own batches."""
        calls = batches
        if self.equal_calls:
            calls = max(1, self._most(batches, device))
        elif vision.is_trained(self.model):
            calls = max(1, batches)
        return (self.empty,) * (calls - batches)

    def _image(self, row: Row, loaded: dict[tuple[int, int], Any], part: Dealt) -> vision.Images:
        found = loaded.get((part.unit, part.first))
        unit = row.media[part.unit]
        if found is None or found.dealt.last < part.last:
            raise RuntimeError(
                f"{unit.place}: steps {part.first} to {part.last} were not loaded on this rank."
            )
        pixels = found.tensors["pixel_values"]
        each = len(pixels) // (found.dealt.last - found.dealt.first)
        number = part.last - part.first
        tiles = unit.grid[0] // unit.steps
        grid = (number * tiles, unit.grid[1], unit.grid[2])
        ends = part.last == unit.steps
        return vision.Images(unit.kind, grid, pixels[: number * each], unit.sizes, ends)

    def _most(self, calls: int, device: torch.device) -> int:
        most = torch.tensor(calls, device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most)

    def of_prompt(self, prompt: Sequence[int], document: TokenizedDocument) -> dict[str, Any]:
        """Further arguments of `generate` for the first tokens of a document: their images."""
        media = [u for u in document.media if u.spans[-1][0] < len(prompt)]
        if not media:
            return {}
        device = next(self.model.parameters()).device
        found = document_inputs(
            self.model.config, prompt, media, lambda u: load_unit(u, self.processing), device
        )
        return {k: x for k, x in found.items() if k not in ("input_ids", "use_cache")}
