"""Images on a sharded row: the tower's parts are dealt, features travel, and loss and every gradient
are those of transformers' own forward in one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vision_models as tiny
from longfactory import sp
from longfactory.sp import hf, media, vision
from longfactory.sp.layout import with_blocks
from longfactory.testing import largest_difference, run_ranks

pytestmark = pytest.mark.processes
slow = pytest.mark.slow


EXACT = 1e-9
"""Of a model that computes in float64 everywhere (`all_in_float64`)."""


@contextlib.contextmanager
def all_in_float64() -> Iterator[None]:
    """What transformers computes in float32 in a model of any type of numbers (norms, rotary angles,
    softmax) is computed in float64: then only the order of sums may differ.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def tolerance(family: str) -> float:
    """In float64 too: transformers' norms, rotary embeddings and softmax compute in float32, whose
    rounding is what remains. That of gated delta nets is enlarged by random weights (text alone
    differs as much), and GLM's tower adds positions in float32.
    """
    wider = {"qwen3_5": 1e-5, "qwen3_5_moe": 1e-5, "glm4v": 1e-5, "glm4v_moe": 1e-5}
    return (wider | {"llava_onevision": 2e-6}).get(family, 1e-6)


def weights(tokens: int, seed: int = 5) -> Tensor:
    """[T, vocabulary] of the loss: every logit of every token counts."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 256, generator=draw, dtype=torch.float64) / tokens


def alone(family: str, documents: list[tiny.Document], dtype: torch.dtype) -> dict[str, Tensor]:
    """One process: transformers' own forward of each document by itself."""
    model = tiny.model(family, dtype)
    ends = torch.tensor([len(d.ids) for d in documents]).cumsum(0).tolist()
    of_loss = weights(ends[-1]).to(dtype)
    loss = torch.zeros((), dtype=dtype)
    for doc, end in zip(documents, ends, strict=True):
        logits = model(**tiny.whole_inputs(family, doc)).logits[0]
        loss = loss + (logits * of_loss[end - len(doc.ids) : end]).sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def sharded(
    family: str,
    documents: list[tiny.Document],
    size: int,
    mode: str,
    dtype: torch.dtype,
    **changes: Any,
) -> dict[str, Tensor]:
    """One rank of several: gradients summed over the group."""
    ctx = sp.SequenceParallel.create(size, mode=mode)
    model = tiny.model(family, dtype, attention="sdpa")
    hf.prepare(model, ctx)
    vision.install(model)
    rule = vision.position_rule(model.config)
    lengths = [len(d.ids) for d in documents]
    padding = -sum(lengths) % sp.alignment(ctx)
    lengths = [n for n in (*lengths, padding) if n]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [sp.Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    ids = torch.cat([*(d.ids for d in documents), torch.zeros(padding, dtype=torch.int64)])
    text = torch.cat([torch.arange(n) for n in lengths])
    positions = text
    if rule is not None:
        three = [
            rule(
                d.ids,
                d.kinds,
                [i.grid for i in d.images if i.kind == "image"],
                [i.grid for i in d.images if i.kind == "video"],
                d.seconds,
            )
            if d.images
            else torch.arange(len(d.ids)).expand(3, -1)
            for d in documents
        ]
        if padding:
            three.append(torch.arange(padding).expand(3, -1))
        positions = torch.cat([text[None], torch.cat(three, 1)])
    parts, images, start = [], [], 0
    for d in documents:
        for places in d.places:
            parts.append(media.Part(tuple((start + a, start + b) for a, b in places), len(places)))
        for image in d.images:
            whole = family == "llava_onevision" and image.kind == "image"
            images += [image] if whole else [image.parts(i, i + 1) for i in range(image.grid[0])]
        start += len(d.ids)
    if vision.has_blocks(model.config):
        segments = with_blocks(segments, [p.places[0] for p in parts])
    plan = sp.plan(ends[-1], segments, ctx)
    owner = changes.get("owner") or media.deal([p.tokens for p in parts], size)
    mine = [i for i, rank in zip(images, owner, strict=True) if rank == ctx.rank]
    given = vision.Media(
        media.Route.make(parts, owner, plan),
        vision.batches_of(mine, changes.get("limit", 40), whole=family == "llava_onevision"),
        () if mine else (vision.empty_image(model.config),),
    )
    logits = model(
        **hf.inputs({"input_ids": ids, "position_ids": positions}, plan), sp_media=given
    ).logits[0]
    of_loss = torch.zeros(ends[-1], 256, dtype=dtype)
    of_loss[: ends[-1] - padding] = weights(ends[-1] - padding).to(dtype)
    loss = (logits * of_loss[plan.index]).sum()
    loss.backward()
    out = {"loss": loss.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            out[name] = p.grad
    for x in out.values():
        if size > 1:
            torch.distributed.all_reduce(x)
    hf.release(model)
    vision.release(model)
    return out


DENSE = [5, (3, 4), 7, (4, 2, 2), 9]
PACKED = ([3, (2, 3), 4], [11], [(2, 2), 6, (3, 2, 3), 2, (5, 4)])
TILES = [3, "image", 2, "image", 9, "image", 5]


def rows(family: str) -> dict[str, list[tiny.Document]]:
    if family == "llava_onevision":
        pieces = ([3, "tiles", 4, "frames", 2], [6, "tiles", 1], [8])
        documents = [tiny.document(family, p, seed) for seed, p in enumerate(pieces)]
        return {"dense": documents[:1], "packed": documents}
    if family.startswith("glm4v"):
        pieces = ([3, (2, 3), 4, (4, 2), 2], [6, (3, 3), 1], [8])
        documents = [tiny.document(family, p, seed) for seed, p in enumerate(pieces)]
        return {"dense": documents[:1], "packed": documents}
    if family in ("gemma3", "internvl"):
        return {
            "dense": [tiny.document(family, TILES)],
            "packed": [
                tiny.document(family, pieces, seed)
                for seed, pieces in enumerate(([2, "image", 6], [9], ["image", 3, "image", 4]))
            ],
        }
    return {
        "dense": [tiny.document(family, DENSE)],
        "packed": [tiny.document(family, pieces, seed) for seed, pieces in enumerate(PACKED)],
    }


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("row", [pytest.param("dense", marks=slow), "packed"])
def test_vision_of_one_process(family: str, row: str) -> None:
    documents = rows(family)[row]
    expected = alone(family, documents, torch.float64)
    found = sharded(family, documents, 1, "zigzag-ring", torch.float64)
    difference = largest_difference(found, expected)
    assert difference.value < tolerance(family), difference


def on_rank(family: str, row: str, mode: str, owner: list[int] | None) -> dict[str, Tensor]:
    size = torch.distributed.get_world_size()
    documents = rows(family)[row]
    with all_in_float64():
        found = sharded(family, documents, size, mode, torch.float64, owner=owner)
        expected = alone(family, documents, torch.float64)
    # A parameter that only other ranks' images would train has no gradient in one process.
    for name, x in found.items():
        expected.setdefault(name, torch.zeros_like(x))
    difference = largest_difference(found, expected)
    return {"difference": torch.tensor(difference.value), "where": difference.name}  # type: ignore


CASES = [
    pytest.param("qwen3_vl", "dense", "zigzag-ring", None, marks=slow),
    ("qwen3_vl", "packed", "llama3", None),
    ("qwen2_5_vl", "dense", "ulysses", None),
    pytest.param("qwen2_5_vl", "packed", "zigzag-ring", None, marks=slow),
    pytest.param("qwen2_vl", "dense", "llama3", None, marks=slow),
    pytest.param("qwen3_vl_moe", "packed", "usp", None, marks=slow),
    pytest.param("qwen3_5", "dense", "ulysses", None, marks=slow),
    ("gemma3", "dense", "zigzag-ring", None),
    pytest.param("gemma3", "packed", "llama3", None, marks=slow),
    pytest.param("gemma3", "dense", "ulysses", None, marks=slow),
    pytest.param("internvl", "packed", "usp", None, marks=slow),
    pytest.param("llava_onevision", "packed", "ulysses", None, marks=slow),
    pytest.param("glm4v", "packed", "zigzag-ring", None, marks=slow),
    pytest.param("qwen2_vl", "packed", "zigzag-ring", None, marks=slow),
    pytest.param("qwen3_vl_moe", "dense", "zigzag-ring", None, marks=slow),
    pytest.param("qwen3_5", "packed", "zigzag-ring", None, marks=slow),
    pytest.param("internvl", "dense", "zigzag-ring", None, marks=slow),
    pytest.param("llava_onevision", "dense", "llama3", None, marks=slow),
    pytest.param("glm4v", "dense", "ulysses", None, marks=slow),
    pytest.param("qwen3_5_moe", "packed", "usp", None, marks=slow),
    pytest.param("qwen3_5_moe", "dense", "zigzag-ring", None, marks=slow),
    pytest.param("glm4v_moe", "packed", "ulysses", None, marks=slow),
    pytest.param("glm4v_moe", "dense", "llama3", None, marks=slow),
    # All images on one rank: the others have none of their own.
    ("qwen3_vl", "dense", "zigzag-ring", [1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("family", "row", "mode", "owner"), CASES)
def test_vision_on_four_ranks(family: str, row: str, mode: str, owner: list[int] | None) -> None:
    for found in run_ranks(4, on_rank, family, row, mode, owner):
        assert found["difference"] < EXACT, found


class Rows(TorchDispatchMode):
    """The most rows of any tensor as wide as the text model, or as the features of all levels."""

    widths = (64, 3 * 64)
    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] in self.widths:
                self.most = max(self.most, x.numel() // x.shape[-1])
        return out


def most_rows() -> tuple[int, int, int]:
    """Tokens of a row, features of all its images, and `Rows.most` of one forward and backward."""
    size = torch.distributed.get_world_size()
    document = tiny.document("qwen3_vl", [40, (16, 16), 20, (4, 6, 6), 30])
    with Rows() as found:
        sharded("qwen3_vl", [document], size, "zigzag-ring", torch.float64)
    return len(document.ids), int((document.kinds > 0).sum()), found.most


def test_vision_no_rank_holds_the_whole_row_or_all_features() -> None:
    for tokens, features, most in run_ranks(4, most_rows):
        # 256 rows has the embedding, and the largest image, which one rank computes
        assert most == 256 < features < tokens
    ((tokens, features, most),) = run_ranks(1, most_rows)
    assert most >= tokens > features


@pytest.mark.parametrize("placeholders", [5, 7])
def test_vision_more_or_fewer_features_than_placeholders(placeholders: int) -> None:
    """Those of the next image would stand in the wrong places."""
    document = tiny.document("qwen2_5_vl", [3, (2, 3), 9])
    ((start, _),) = document.places[0]
    document.places[0] = [(start, start + placeholders)]
    with pytest.raises(ValueError, match=f"gave 6 features for {placeholders} placeholders"):
        sharded("qwen2_5_vl", [document], 1, "zigzag-ring", torch.float64)


def test_vision_text_alone_in_a_row_that_trains_the_tower() -> None:
    for found in run_ranks(2, text_alone):
        assert found == []


def text_alone() -> list[str]:
    """Names of tower parameters whose gradient is absent or not 0."""
    documents = [tiny.document("qwen3_vl", [24])]
    found = sharded("qwen3_vl", documents, 2, "zigzag-ring", torch.float64)
    tower = [n for n, _ in tiny.model("qwen3_vl").named_parameters() if ".visual." in n]
    return [n for n in tower if n not in found or found[n].abs().max() > 0]


def test_vision_frames_of_a_video_are_images_to_internvl() -> None:
    """Its own forward, which answers and `verify` call, takes both in one tensor."""
    model = tiny.model("internvl")
    document = tiny.document("internvl", [3, "image", 2, "image", 4])
    first, second = document.images
    ids, kinds = document.ids, document.kinds
    images = [dataclasses.replace(first, kind="video"), second]
    found = vision.own_inputs(model.config, ids, kinds, images)
    with torch.no_grad():
        want = model(**tiny.whole_inputs("internvl", document)).logits
        assert torch.equal(model(**found).logits, want)


def test_vision_dealing_is_balanced() -> None:
    equal = media.deal([1.0] * 512, 8)
    assert equal == sorted(equal) and media.balance([1.0] * 512, equal, 8) == 1.0
    unequal = [100, 1, 90, 7, 60, 60, 30, 2, 45, 45, 3, 20]
    assert media.balance(unequal, media.deal(unequal, 4), 4) >= 0.9
    assert media.deal([], 4) == []
    assert media.deal([5.0], 4)[0] in range(4)
