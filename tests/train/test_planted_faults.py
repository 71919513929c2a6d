"""Each fault that a long-sequence trainer can have in silence is found by `verify`, with the
sentence that tells which it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.testing import run_ranks
from planted import FOUND, FURTHER, LORA, WINDOW, verified_with, with_keys

pytestmark = pytest.mark.processes

FAST = (
    "sequence parallelism silently off",
    "loss scaled by SP",
    "labels shifted twice",
    "prompt tokens trained",
    "a long window dropped",
    "documents leak",
    "gradients divided by SP",
    "a module left out of the reduction",
    "a mean of means over micro-batches",
    "padding trained",
    "the next token is seen",
)
FOLLOWS = {
    "a dead exchange": "follows sequence parallelism: it is gone without it.",
    "documents leak": "follows packing: it is gone without it.",
    "a window longer by one": "follows the window: it is gone without it.",
    "the hand-written layer's window dropped": "the window and memory techniques: it is gone without either.",
    "a mean of means over micro-batches": "follows accumulation: it is gone without it.",
    "an adapter that is not saved": "follows LoRA: it is gone without it.",
    "references of the answers swapped": "The difference remains without each of sequence",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FOUND]
)
def test_a_planted_fault_is_found_and_named(fault: str, sft_keys: dict[str, Any]) -> None:
    sentence, changes = FOUND[fault]
    traced, keys = sentence.startswith("The difference follows"), with_keys(sft_keys, changes)
    for exact, said in run_ranks(2, verified_with, keys, fault, traced, timeout=250):
        assert not exact and sentence in said, said


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", FOLLOWS)
def test_what_a_failure_follows_is_said(fault: str, sft_keys: dict[str, Any]) -> None:
    keys = with_keys(sft_keys, FOUND[fault][1])
    for exact, said in run_ranks(2, verified_with, keys, fault, True, timeout=350):
        assert not exact and FOLLOWS[fault] in said, said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_window_that_no_row_reaches_gets_a_row(sft_keys: dict[str, Any]) -> None:
    keys = with_keys(sft_keys, {**WINDOW, "window": 400, "verify_tokens": 160})
    made = "window 400: trained tokens have keys that it hides (sliding_window); row 2 was"
    for exact, said in run_ranks(2, verified_with, keys, "", timeout=250):
        assert exact and made in said, said
    for exact, said in run_ranks(2, verified_with, keys, "a long window dropped", timeout=250):
        assert not exact and "(its sliding window is 400)" in said, said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_window_that_would_take_too_long_is_said_not_to_be_exercised(
    sft_keys: dict[str, Any],
) -> None:
    keys = with_keys(sft_keys, {**WINDOW, "window": 100_000, "verify_tokens": 160})
    words = "not exercised window 100000: sliding_window; rows have 160 tokens, and one of 125016"
    for exact, said in run_ranks(2, verified_with, keys, "", timeout=250):
        assert exact and words in said, said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "changes", [{}, WINDOW, LORA, {"tower": True}], ids=["plain", "window", "lora", "tower"]
)
def test_without_a_fault_the_same_runs_pass(
    changes: dict[str, Any], sft_keys: dict[str, Any]
) -> None:
    for exact, said in run_ranks(2, verified_with, with_keys(sft_keys, changes), "", timeout=250):
        assert exact, said


def test_the_committed_table_is_of_these_faults() -> None:
    """`benchmarks/verify_faults.py` wrote it; healthy runs gave no alarm."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "verify_faults.json"
    rows = json.loads(path.read_text())
    assert [row["fault"] for row in rows if row["fault"]] == list(FOUND)
    assert len(FOUND) - len(FURTHER) >= 12 and len(FURTHER) >= 10
    assert all(row["named"] and not row["exact"] for row in rows if row["fault"])
    good = [row for row in rows if not row["fault"]]
    assert len(good) >= 30 and all(row["exact"] for row in good)
