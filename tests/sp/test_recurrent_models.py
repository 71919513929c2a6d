"""Models with recurrent layers: branches, documents, what their layers are made of."""

import copy
import functools
import importlib
import inspect
from typing import Any

import pytest
import torch

from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.guard import guard
from longfactory.sp.recurrent import functions, layers
from longfactory.testing import run_ranks
from longfactory_dev.families import check_on_rank
from longfactory_dev.tiny_models import tiny_model


def branches(size: int, family: str, fields: dict[str, int]) -> tuple[float, float]:
    """A shared prompt with two branches, and a document beside it: the error of the logits and of
    the gradients.
    """
    ctx = sp.SequenceParallel.create(size)
    model = tiny_model(family, **fields)
    plain = copy.deepcopy(model)
    layers.as_reference(plain)
    hf.prepare(model, ctx)
    ids = torch.randint(3, 200, (64,), generator=torch.Generator().manual_seed(5))
    segments = [sp.Segment(0, 19), sp.Segment(19, 33, 0), sp.Segment(33, 50, 0), sp.Segment(50, 64)]
    positions = torch.cat(
        [torch.arange(19), torch.arange(19, 33), torch.arange(19, 36), torch.arange(14)]
    )
    plan = sp.plan(64, segments, ctx)
    logits = model(**hf.inputs({"input_ids": ids, "position_ids": positions}, plan)).logits[0]
    whole = sp.gather(logits, plan)
    (whole.pow(2).sum() / size).backward()
    prompt, a, b, other = ids[:19], ids[19:33], ids[33:50], ids[50:]

    def alone(x: torch.Tensor) -> torch.Tensor:
        return plain(input_ids=x[None], use_cache=False).logits[0]

    reference = torch.cat(
        [
            alone(prompt),
            alone(torch.cat([prompt, a]))[19:],
            alone(torch.cat([prompt, b]))[19:],
            alone(other),
        ]
    )
    reference.pow(2).sum().backward()
    scale = max(p.grad.abs().max() for p in plain.parameters())
    worst = 0.0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        grad = p.grad.clone()
        if size > 1:
            torch.distributed.all_reduce(grad)
        worst = max(worst, ((grad - q.grad).abs().max() / scale).item())
    return ((whole - reference).abs().max() / reference.abs().max()).item(), worst


ODD = {
    "qwen3_5_text": {"linear_num_key_heads": 3, "linear_num_value_heads": 6},
    "nemotron_h": {},
    "kimi_linear": {},
    "lfm2": {},
}
"""Families, and fields that make their heads divide by no number of ranks."""


@pytest.mark.processes
@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "lfm2"])
def test_branches_start_from_their_parents_state(family: str) -> None:
    for logits, gradients in run_ranks(2, branches, 2, family, ODD[family]):
        assert logits < 1e-5 and gradients < 1e-4


def accumulated(size: int, family: str, fields: dict[str, int]) -> float:
    """The error of gradients of two rows with recomputed layers: documents of one token, and one
    that lies on all ranks.
    """
    ctx = sp.SequenceParallel.create(size)
    model = tiny_model(family, **fields)
    plain = copy.deepcopy(model)
    layers.as_reference(plain)
    hf.prepare(model, ctx)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    draw = torch.Generator().manual_seed(7)
    for lengths in ([1, 1, 2, 60], [3, 57, 1, 3]):
        documents = [torch.randint(3, 200, (n,), generator=draw) for n in lengths]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [sp.Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        row = {
            "input_ids": torch.cat(documents),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        }
        logits = model(**hf.inputs(row, sp.plan(ends[-1], segments, ctx))).logits
        logits.pow(2).sum().backward()
        for ids in documents:
            plain(input_ids=ids[None], use_cache=False).logits.pow(2).sum().backward()
    scale = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    worst = 0.0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            continue
        grad = p.grad.clone()
        torch.distributed.all_reduce(grad)
        worst = max(worst, ((grad - q.grad).abs().max() / scale).item())
    return worst


@pytest.mark.processes
def test_recurrent_rows_accumulate_with_recomputed_layers() -> None:
    for error in run_ranks(2, accumulated, 2, "qwen3_5_text", ODD["qwen3_5_text"]):
        assert error < 1e-4


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ODD)
def test_recurrent_rows_accumulate_in_every_kind(family: str, size: int) -> None:
    for error in run_ranks(size, accumulated, size, family, ODD[family]):
        assert error < 1e-4


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("family", ODD)
def test_branches_start_from_their_parents_state_over_four_ranks(family: str) -> None:
    for logits, gradients in run_ranks(4, branches, 4, family, ODD[family]):
        assert logits < 1e-5 and gradients < 1e-4


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(layers.MODELS))
def test_recurrent_family_is_exact(family: str, size: int) -> None:
    for result in run_ranks(size, check_on_rank, family, size):
        assert result.verdict == "exact", result


@pytest.mark.parametrize("family", ["mamba2", pytest.param("jamba", marks=pytest.mark.slow)])
def test_recomputed_layers_keep_the_plan_of_their_own_row(family: str) -> None:
    """Of models that lose the plan on its way: two rows forward, then both backward."""
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    layers.as_reference(plain)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    apply_memory(model.train(), MemorySettings())
    loss = torch.zeros(())
    for seed, lengths in enumerate(([5, 19], [20, 4])):
        draw = torch.Generator().manual_seed(seed)
        documents = [torch.randint(3, 200, (n,), generator=draw) for n in lengths]
        segments = [sp.Segment(0, lengths[0]), sp.Segment(lengths[0], 24)]
        row = {
            "input_ids": torch.cat(documents),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        }
        loss = loss + model(**hf.inputs(row, sp.plan(24, segments, ctx))).logits.pow(2).sum()
        for ids in documents:
            plain(input_ids=ids[None], use_cache=False).logits.pow(2).sum().backward()
    loss.backward()
    scale = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert ((p.grad - q.grad).abs().max() / scale).item() < 1e-5


def test_a_plan_that_recomputation_would_lose_is_refused() -> None:
    model = tiny_model("mamba2")
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row = {"input_ids": torch.arange(24) + 3, "position_ids": torch.arange(24)}
    logits = model(**hf.inputs(row, sp.plan(24, None, ctx))).logits
    # The second by torch, where transformers computes again without the module's hooks.
    with pytest.raises(RuntimeError, match=r"LongFactory's memory keys|Recomputed values"):
        logits.sum().backward()


def test_packages_in_place_of_transformers_functions_are_no_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As flash-linear-attention is, which refuses some GPUs in its backward pass."""
    code = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    plain = inspect.unwrap(code.torch_chunk_gated_delta_rule)

    @functools.wraps(plain)
    def package(*args: object, **kwargs: object) -> object:
        raise RuntimeError("not on this GPU")

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", package)
    model = tiny_model("qwen3_next")
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    guard(model, ctx)


def test_guard_counts_linear_layers() -> None:
    model = tiny_model("qwen3_next")
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    guard(model, ctx)
    layer = next(m for m in model.modules() if type(m).__name__ == "Qwen3NextGatedDeltaNet")
    del layer.forward  # that of its class again
    with pytest.raises(ValueError, match="1 of its 2 recurrent layers"):
        guard(model, ctx)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "olmo_hybrid"])
def test_recurrences_are_given_the_key_heads_as_they_are(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of transformers repeat them for all heads that share them."""
    model = tiny_model(family, linear_num_key_heads=2, linear_num_value_heads=4)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    given: list[tuple[int, int]] = []
    own = functions.over_ranks

    def over_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        given.extend([(q.shape[1], v.shape[1]), (k.shape[1], v.shape[1])])
        return own(q, k, v, *rest)

    monkeypatch.setattr(functions, "over_ranks", over_ranks)
    row = {"input_ids": torch.arange(16) + 3, "position_ids": torch.arange(16)}
    model(**hf.inputs(row, sp.plan(16, None, ctx)))
    assert set(given) == {(2, 4)}
