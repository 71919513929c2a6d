"""Rows with images under DDP and FSDP2: dealt, loaded and merged as the trainer does it, every
gradient equal to that of one process, with tower, projector and text trained or frozen.
"""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vision_models as tiny
from longfactory import sp
from longfactory.data.media.units import Dealt, LoadedMedia, MediaReference, MediaUnit
from longfactory.data.row import Row, TokenizedDocument, make_row
from longfactory.model.vision import Dealing, RowImages, Work, steps_of
from longfactory.sp import hf, media, vision
from longfactory.sp.guard import guard
from longfactory.testing import largest_difference, run_ranks

pytestmark = pytest.mark.processes
slow = pytest.mark.slow


def units(doc: tiny.Document) -> tuple[MediaUnit, ...]:
    """The images of a document as its tokens carry them."""
    out, places = [], iter(doc.places)
    seconds = iter(doc.seconds)
    for number, image in enumerate(doc.images):
        whole = bool(image.size)
        parts = 1 if whole else image.grid[0]
        spans = tuple((a, b - a) for _ in range(parts) for a, b in next(places))
        joined: list[tuple[int, int]] = []
        for start, count in spans:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + count)
            else:
                joined.append((start, count))
        out.append(
            MediaUnit(
                image.kind,
                MediaReference(path=f"{id(doc)}-{number}"),
                image.grid,
                tuple(joined),
                steps=image.grid[0],
                even=not whole,
                sizes=image.size,
                seconds_per_step=next(seconds) if image.kind == "video" else None,
            )
        )
    return tuple(out)


def row_of(documents: list[tiny.Document], ctx: sp.SequenceParallel) -> Row:
    row = make_row(
        [
            TokenizedDocument(d.ids.tolist(), d.ids.tolist(), sample=i, media=units(d))
            for i, d in enumerate(documents)
        ]
    )
    return row.padded(sp.alignment(ctx), 0)


def load(row: Row, documents: list[tiny.Document], dealt: list[Dealt]) -> Row:
    images = [image for d in documents for image in d.images]
    pixels = tuple(
        LoadedMedia(d, {"pixel_values": images[d.unit].parts(d.first, d.last).pixels})
        for d in dealt
    )
    return dataclasses.replace(row, pixels=pixels)


FREEZES = {
    "all": (),
    "tower": (".visual.", ".vision_tower."),
    "text": (".language_model.", "lm_head"),
}


def freeze(model: Any, what: str) -> None:
    for name, p in model.named_parameters():
        if any(part in f".{name}" for part in FREEZES[what]):
            p.requires_grad_(False)


def loss_weights(row: Row) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    out = torch.randn(len(row), 256, generator=draw, dtype=torch.float64) / row.real_tokens
    out[row.real_tokens :] = 0
    return out


def alone(family: str, steps: list[list[tiny.Document]], frozen: str) -> dict[str, Tensor]:
    model = tiny.model(family)
    freeze(model, frozen)
    ctx = sp.SequenceParallel.create(1)
    for documents in steps:
        row = row_of(documents, ctx)
        of_loss, start = loss_weights(row), 0
        for doc in documents:
            logits = model(**tiny.whole_inputs(family, doc)).logits[0]
            (logits * of_loss[start : start + len(doc.ids)]).sum().backward()
            start += len(doc.ids)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return {"grad_norm": norm, **grads}


def on_rank(family: str, names: list[str], wrap: str, size: int, frozen: str) -> dict[str, Any]:
    """One rank of data-parallel groups of `size`; every group has the same rows, so that the mean
    over groups is the gradient of one.
    """
    world = dist.get_world_size()
    ctx = sp.SequenceParallel.create(size, mode="zigzag-ring")
    model = tiny.model(family, attention="sdpa")
    hf.prepare(model, ctx)
    vision.install(model)
    freeze(model, frozen)
    images = RowImages(model, ctx)
    steps = [rows(family)[name] for name in names]
    device = torch.device("cpu")
    wrapped: Any = model
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for documents in steps:
        row = row_of(documents, ctx)
        row = load(row, documents, pickle.loads(pickle.dumps(images.dealing))(row))
        plan = sp.plan(len(row), images.segments(row), ctx)
        inputs = hf.inputs(
            {"input_ids": row.input_ids, "position_ids": images.positions(row)}, plan
        )
        logits = wrapped(**inputs, sp_media=images.media(row, plan, device)).logits[0]
        loss = (logits * loss_weights(row)[plan.index]).sum() * ctx.size
        loss.backward()
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            g: Any = p.grad
            found[name] = g.full_tensor() if hasattr(g, "full_tensor") else g
        elif p.requires_grad:
            found[name] = torch.zeros(0)
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    found["grad_norm"] = norm
    vision.release(model)
    hf.release(model)
    expected = alone(family, steps, frozen)
    for name, x in found.items():
        expected.setdefault(name, torch.zeros_like(x))
    return dataclasses.asdict(largest_difference(found, expected))


def layers(model: Any) -> Any:
    from longfactory.sp.text_model import decoder_layers

    return decoder_layers(model)[1]


def rows(family: str) -> dict[str, list[tiny.Document]]:
    if family in ("gemma3", "internvl"):
        return {
            "images": [
                tiny.document(family, [2, "image", 5, "image", 3]),
                tiny.document(family, [7], 1),
            ],
            "text": [tiny.document(family, [30], 2)],
            "one": [tiny.document(family, [4, "image", 21], 3)],
        }
    return {
        "images": [
            tiny.document(family, [4, (3, 3), 5, (3, 2, 2), 6]),
            tiny.document(family, [9, (2, 2), 3], 1),
        ],
        "text": [tiny.document(family, [30], 2)],
        # longer than three of four ranks' tokens
        "long": [tiny.document(family, [1, (8, 11), 3], 3)],
    }


CASES = [
    ("qwen3_vl", ["images", "text", "long"], "ddp", 4, "all"),
    ("qwen3_vl", ["images", "text", "long"], "fsdp2", 2, "all"),
    pytest.param("qwen3_vl", ["images"], "fsdp2", 4, "tower", marks=slow),
    pytest.param("qwen2_5_vl", ["long", "images"], "ddp", 2, "text", marks=slow),
    pytest.param("gemma3", ["images", "text", "one"], "fsdp2", 4, "all", marks=slow),
    pytest.param("internvl", ["one", "images"], "ddp", 4, "tower", marks=slow),
]


@pytest.mark.parametrize(("family", "names", "wrap", "size", "frozen"), CASES)
def test_vision_gradients_when_wrapped(
    family: str, names: list[str], wrap: str, size: int, frozen: str
) -> None:
    for found in run_ranks(4, on_rank, family, names, wrap, size, frozen):
        assert found["value"] < 1e-6, found


def pixels_under_fsdp2() -> list[bool]:
    """Whether the tower gets the very pixels that the loader gave, where FSDP2 casts to bf16."""
    ctx = sp.SequenceParallel.create(2, mode="zigzag-ring")
    model = tiny.model("qwen3_vl", torch.float32, attention="sdpa")
    hf.prepare(model, ctx)
    vision.install(model)
    images = RowImages(model, ctx)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    documents = rows("qwen3_vl")["long"]
    row = row_of(documents, ctx)
    row = load(row, documents, images.dealing(row))
    plan = sp.plan(len(row), images.segments(row), ctx)
    inputs = hf.inputs({"input_ids": row.input_ids, "position_ids": images.positions(row)}, plan)
    given = images.media(row, plan, torch.device("cpu"))
    assert given is not None
    seen: list[Tensor] = []
    features_of = vision.features_of

    def seeing(model: Any, batch: Any, device: torch.device) -> Tensor:
        seen.extend(image.pixels for image in batch)
        return features_of(model, batch, device)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(vision.installed, "features_of", seeing)
        model(**inputs, sp_media=given)
    vision.release(model)
    hf.release(model)
    asked = [i.pixels for batch in (*given.batches, given.empty) for i in batch]
    return [a is b for a, b in zip(asked, seen, strict=True)]


def test_vision_fsdp2_leaves_pixels_on_the_host_as_they_are() -> None:
    for same in run_ranks(2, pixels_under_fsdp2):
        assert same and all(same)


def test_vision_dealing_names_every_step_once() -> None:
    documents = rows("qwen3_vl")["images"]
    ctx = sp.SequenceParallel.create(1)
    row = row_of(documents, ctx)
    work = Work.of(tiny.config("qwen3_vl"))
    dealt = [d for rank in range(3) for d in Dealing(work, 3, rank)(row)]
    covered = sorted((d.unit, i) for d in dealt for i in range(d.first, d.last))
    assert covered == [(s.index, s.first) for s in steps_of(row)]


def test_vision_an_image_of_two_documents_is_computed_once() -> None:
    doc = tiny.document("qwen3_vl", [4, (3, 3), 5])
    row = make_row(
        [TokenizedDocument(doc.ids.tolist(), doc.ids.tolist(), media=units(doc)) for _ in range(2)]
    )
    (step,) = steps_of(row)
    assert step.places == ((4, 13),) and step.copies == (((22, 31),),)


def test_vision_positions_go_on_in_a_branch() -> None:
    """A shared prompt and two answers are placed as two whole conversations."""
    doc = tiny.document("qwen2_5_vl", [4, (3, 3), 5, (2, 2, 3), 6])
    answers = [torch.arange(3, 3 + n) for n in (5, 8)]
    model = tiny.model("qwen2_5_vl")
    images = images_of(model)
    row = make_row(
        [
            TokenizedDocument(doc.ids[:-1].tolist(), doc.ids[:-1].tolist(), media=units(doc)),
            *(
                TokenizedDocument([int(doc.ids[-1]), *a.tolist()], [-100] * (len(a) + 1), parent=0)
                for a in answers
            ),
        ]
    )
    found = images.positions(row)
    assert found.shape == (4, len(row)) and torch.equal(found[0], row.position_ids)
    given = {k: v for k, v in tiny.whole_inputs("qwen2_5_vl", doc).items() if "pixel" not in k}
    given.pop("use_cache")
    for document, answer in zip(row.documents[1:], answers, strict=True):
        given["input_ids"] = torch.cat([doc.ids, answer])[None]
        given["mm_token_type_ids"] = torch.cat([doc.kinds, torch.zeros_like(answer)])[None]
        whole = model.model.get_rope_index(**given)[0][:, 0]
        prompt = len(doc.ids) - 1
        assert torch.equal(found[1:, :prompt], whole[:, :prompt])
        assert torch.equal(found[1:, document.start : document.stop], whole[:, prompt:])


def images_of(model: Any) -> RowImages:
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    vision.install(model)
    return RowImages(model, ctx)


def guarded(family: str, fault: str) -> str:
    """What the guard says of a model with images on this rank; `fault` is planted first."""
    ctx = sp.SequenceParallel.create(dist.get_world_size(), mode="zigzag-ring")
    model = tiny.model(family, dtype=torch.float32, attention="sdpa")
    hf.prepare(model, ctx)
    vision.install(model)
    made = media.Route.make
    if fault == "places":  # the first two placeholders of every part change places

        def wrong(parts: Any, owner: Any, plan: Any) -> media.Route:
            route = made(parts, owner, plan)
            route.places[:2] = route.places[:2].flip(0)
            return route

        media.Route.make = wrong  # type: ignore[method-assign]
    if fault == "deeper":
        held = vision.deeper_of
        vision.deeper_of = lambda plan: (held(plan)[0], held(plan)[1][::-1])
    try:
        guard(model, ctx)
    except ValueError as error:
        return str(error)
    finally:
        media.Route.make = made  # type: ignore[method-assign]
        if fault == "deeper":
            vision.deeper_of = held
    return ""


@pytest.mark.parametrize(
    "family",
    ["qwen3_vl", *(pytest.param(f, marks=slow) for f in ("qwen2_5_vl", "gemma3", "internvl"))],
)
def test_vision_guard_accepts(family: str) -> None:
    assert run_ranks(4, guarded, family, "") == [""] * 4


@pytest.mark.parametrize("fault", ["places", "deeper"])
def test_vision_guard_refuses(fault: str) -> None:
    for message in run_ranks(2, guarded, "qwen3_vl", fault):
        assert "images" in message


def refused(family: str) -> str:
    """What a rank says of a row with an image of two tokens too many, which the last rank
    computes.
    """
    ctx = sp.SequenceParallel.create(dist.get_world_size(), mode="zigzag-ring")
    model = tiny.model(family, torch.float32, attention="sdpa")
    hf.prepare(model, ctx)
    vision.install(model)
    images = RowImages(model, ctx)
    documents = [
        tiny.document(family, [4, (3, 3), 5, (3, 3), 6], dtype=torch.float32)
        if family == "qwen3_vl"
        else tiny.document(family, [4, "tiles", 5, "tiles", 6], dtype=torch.float32)
    ]
    row = row_of(documents, ctx)
    *first, last = row.media
    start, count = last.spans[0]
    row = dataclasses.replace(
        row, media=(*first, dataclasses.replace(last, spans=((start, count + 2),)))
    )
    row = load(row, documents, images.dealing(row))
    plan = sp.plan(len(row), images.segments(row), ctx)
    try:
        inputs = {"input_ids": row.input_ids, "position_ids": images.positions(row)}
        given = images.media(row, plan, torch.device("cpu"))
        model(**hf.inputs(inputs, plan), sp_media=given)
    except ValueError as error:
        return str(error).partition(" has ")[2]
    finally:
        vision.release(model)
        hf.release(model)
    return ""


@pytest.mark.parametrize(("family", "made"), [("qwen3_vl", 9), ("llava_onevision", 44)])
def test_vision_every_rank_says_that_a_tower_makes_other_features(family: str, made: int) -> None:
    said = run_ranks(2, refused, family)
    assert said[0] == said[1]
    assert f"{made + 2} placeholder tokens, and the model makes {made} features" in said[0]
