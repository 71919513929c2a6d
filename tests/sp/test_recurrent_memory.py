"""What is allocated around a recurrence's kernels, and how they are launched where the GPU has less
shared memory than those they were tuned on. Nothing is computed.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.live_tensors import Peak
from helpers.no_kernels import OutOfResources, recurrent_kernels
from longfactory.sp import shared_memory
from longfactory.sp.recurrent import computed
from longfactory.sp.recurrent.fragments import Chunks, Fragment, Fragments
from longfactory.sp.recurrent.heads import head_bytes
from longfactory.sp.recurrent.rule import CHUNK, Rule

TOKENS, HEADS = 1024, 8
CPU = torch.device("cpu")
Launches = list[tuple[str, tuple[int, ...], dict[str, Any]]]


@pytest.fixture
def launches() -> Iterator[Launches]:
    found: Launches = []
    with computes_nothing(lambda *launch: found.append(launch)):
        yield found


@contextlib.contextmanager
def computes_nothing(launched: Callable[..., None]) -> Iterator[None]:
    with recurrent_kernels(launched) as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(computed, "_kernels", lambda: kernels)
        patch.setattr(shared_memory, "_refused", collections.Counter())
        yield


def drawn(
    kind: Any, key_heads: int, key_dim: int, value_dim: int, per_channel: bool
) -> tuple[list[Tensor], Rule, Chunks, list[Tensor]]:
    """Inputs, the rule, chunks, and what `computed.gradients` is given besides."""
    low = {"dtype": torch.bfloat16}
    decays = (TOKENS, HEADS, key_dim) if per_channel else (TOKENS, HEADS)
    q, k = torch.zeros(2, TOKENS, key_heads, key_dim, **low)  # type: ignore[call-overload]
    v, slope = torch.zeros(2, TOKENS, HEADS, value_dim, **low)  # type: ignore[call-overload]
    inputs = [q, k, v, torch.zeros(decays), torch.zeros(TOKENS, HEADS)]
    rule = Rule(kind, key_dim**-0.5, True) if kind == "delta" else Rule(kind, 1.0)
    chunks = Fragments((Fragment(0, 0, TOKENS, 0, -1),), 0, 1, TOKENS).chunks(CHUNK, CPU)
    first, after = torch.zeros(2, 1, HEADS, key_dim, value_dim)
    return inputs, rule, chunks, [first, slope, after]


@pytest.mark.parametrize(
    "shape",
    [
        ("delta", 4, 128, 128, False),
        ("delta", 8, 128, 128, True),
        ("delta", 2, 256, 256, False),
        ("delta", 8, 64, 64, False),
        ("plain", 1, 128, 64, False),
        ("plain", 1, 256, 256, False),
        ("plain", 1, 16, 1, True),
    ],
)
def test_planned_memory_of_a_recurrence_is_what_is_allocated(
    shape: tuple[Any, ...], launches: Launches
) -> None:
    """Of one backward pass, of a token and a head; `reverse` holds three states of each chunk."""
    kind, key_heads, key_dim, value_dim, per_channel = shape
    inputs, rule, chunks, given = drawn(*shape)
    with Peak() as live:
        job = computed.make(inputs, rule, chunks, True)
        computed.gradients(inputs, rule, chunks, *given, job, None, None)
    assert {"chunk_scan", "chunk_reverse"} <= {name for name, _, _ in launches}
    share = HEADS // key_heads
    one = head_bytes(kind, key_dim, value_dim, per_channel, share, kernels=True)
    # And the states before and after the row, and a number of each token and head.
    counted = (live.peak - 4 * given[0].numel()) / (TOKENS * HEADS) - 8
    assert counted == pytest.approx(one, rel=0.04), (counted, one)


def test_where_a_gpu_has_no_room_fewer_columns_are_taken() -> None:
    """Settings that are refused are not launched again, and the grid is that of those taken."""
    launches: Launches = []
    inputs, rule, chunks, given = drawn("delta", 4, 128, 128, False)
    refused: list[str] = []

    def small(name: str, grid: tuple[int, ...], options: dict[str, Any]) -> None:
        if options.get("BV", 0) > 16 and name in ("chunk_reverse", "chunk_outputs"):
            refused.append(name)
            raise OutOfResources
        launches.append((name, grid, options))

    with computes_nothing(small):
        for _ in range(2):
            job = computed.make(inputs, rule, chunks, True)
            computed.forward(job, chunks, given[0], torch.empty_like(inputs[2]), inputs[2], None)
            computed.gradients(inputs, rule, chunks, *given, job, None, None)
    assert refused == ["chunk_outputs", "chunk_reverse"]
    taken = {name: (grid, options["BV"]) for name, grid, options in launches if "BV" in options}
    assert taken["chunk_reverse"] == ((1, HEADS, 8), 16)
    assert taken["chunk_scan"] == ((1, HEADS, 4), 32)
    assert taken["chunk_outputs"][1] == 16


def test_each_form_of_a_kernel_keeps_the_columns_that_were_compared() -> None:
    """On an RTX 4090 `reverse` of Mamba 2 has no room for 32 columns where it keeps the states
    between, and has it where it does not: what was refused to one is not taken from the other,
    whose smaller form nothing has compared.
    """
    inputs, rule, chunks, given = drawn("plain", 1, 256, 64, False)
    taken: list[set[tuple[bool, int]]] = []

    def small(name: str, grid: tuple[int, ...], options: dict[str, Any]) -> None:
        if name == "chunk_reverse":
            if options["KEEP"] and options["BV"] > 16:
                raise OutOfResources
            taken[-1].add((options["KEEP"], options["BV"]))

    with computes_nothing(small):
        for _ in range(2):
            taken.append(set())
            job = computed.make(inputs, rule, chunks, True)
            own = computed.slopes(job, chunks, given[1])
            computed.first_gradients(job, chunks, *own)
            computed.gradients(inputs, rule, chunks, *given, job, own, None)
    assert taken == [{(False, 32), (True, 16)}] * 2
