"""Truncation, labels and pairs, as arithmetic on arrays."""

from __future__ import annotations

from itertools import pairwise

import lf_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longfactory.data import assemble
from longfactory.data.assemble import Rules, cut_pair, cut_turns
from longfactory.data.collate import collate
from longfactory.data.row import IGNORE

LENGTH = st.integers(0, 5000)


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Parts whose tokens are all different, so that each can be told where it came from."""
    bounds = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.int32) for a, b in pairwise(bounds)]


@settings(max_examples=400, deadline=None)
@given(LENGTH, LENGTH, st.integers(1, 6000))
def test_cut_pair_is_the_rule_of_the_wheel(source: int, target: int, cutoff: int) -> None:
    if source + target:
        assert cut_pair(source, target, cutoff) == lf_oracle.load().utils.infer_seqlen(
            source, target, cutoff
        )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(LENGTH, LENGTH), max_size=30), st.integers(1, 6000))
def test_cut_pairs_is_cut_pair(lengths: list[tuple[int, int]], cutoff: int) -> None:
    source, target = assemble.cut_pairs(*np.array(lengths, np.int64).reshape(-1, 2).T, cutoff)
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == [
        cut_pair(s, t, cutoff) if s + t else (0, 0) for s, t in lengths
    ]


def test_cut_pair_at_every_border() -> None:
    theirs = lf_oracle.load().utils.infer_seqlen
    for source in range(15):
        for target in range(1, 15):
            for cutoff in range(1, 30):
                assert cut_pair(source, target, cutoff) == theirs(source, target, cutoff), (
                    source,
                    target,
                    cutoff,
                )


@pytest.mark.parametrize(
    ("source", "target", "cutoff", "expected"),
    [
        (3000, 2000, 1000, (600, 400)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
        (600, 499, 1000, (501, 499)),
    ],
)
def test_cut_pair_by_hand(source: int, target: int, cutoff: int, expected: tuple[int, int]) -> None:
    assert cut_pair(source, target, cutoff) == expected


TURNS = st.lists(st.integers(1, 40), min_size=2, max_size=10).map(lambda x: x[: len(x) // 2 * 2])


@settings(max_examples=200, deadline=None)
@given(
    TURNS,
    st.integers(1, 200),
    st.sampled_from(["llamafactory", "keep_tail"]),
    st.booleans(),
    st.booleans(),
)
def test_sft_keeps_within_the_cutoff_and_keeps_order(
    lengths: list[int], cutoff: int, strategy: str, history: bool, eos: bool
) -> None:
    rules = Rules(cutoff, strategy, mask_history=history, eos=7777 if eos else None)  # type: ignore[arg-type]
    document = assemble.sft(numbered(lengths), rules, 3)
    ids, labels = list(document.input_ids), list(document.labels)
    assert len(ids) == len(labels) <= max(cutoff, 1)
    body = ids[:-1] if eos else ids
    assert body == sorted(set(body))  # nothing twice, nothing out of order
    if sum(lengths) + eos <= cutoff:
        assert body == list(range(sum(lengths)))  # what fits is whole
    for token, label in zip(body, labels, strict=False):
        assert label in (IGNORE, token) or (eos and label == 7777)
    sources = {t for i, p in enumerate(numbered(lengths)) if i % 2 == 0 for t in p.tolist()}
    assert not any(label in sources for label in labels if label != IGNORE)


def test_keep_tail_keeps_the_question_and_the_beginning() -> None:
    """A long document with the question at its end: the rule of LLaMA-Factory loses the question,
    keep_tail the document's middle.
    """
    parts = numbered([100, 10])
    head = assemble.sft(parts, Rules(50), 0)
    tail = assemble.sft(parts, Rules(50, "keep_tail", prefix=2), 0)
    assert list(head.input_ids) == [*range(40), *range(100, 110)]
    assert list(tail.input_ids) == [0, 1, *range(62, 100), *range(100, 110)]
    # Of several turns the last ones stay.
    assert cut_turns([40, 5, 40, 5], Rules(45, "keep_tail")) == [(1, 40, 5)]
    assert cut_turns([40, 5, 40, 5], Rules(45)) == [(0, 40, 5)]


def test_train_on_prompt_and_mask_history() -> None:
    parts = numbered([2, 2, 2, 2])
    assert list(assemble.sft(parts, Rules(99, train_on_prompt=True), 0).labels) == list(range(8))
    assert list(assemble.sft(parts, Rules(99, mask_history=True), 0).labels) == [IGNORE] * 6 + [
        6,
        7,
    ]
    assert list(assemble.sft(parts, Rules(99), 0, last_only=True).labels) == [IGNORE] * 6 + [6, 7]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(2, 150), st.booleans()
)
def test_a_shared_prompt_is_the_same_pair(
    prompt: int, chosen: int, rejected: int, cutoff: int, eos: bool
) -> None:
    """Prompt and branches, laid out, train the same tokens after the same histories as two whole
    documents.
    """
    parts = numbered([prompt, chosen, rejected])
    plain = assemble.pair(parts, Rules(cutoff, eos=9999 if eos else None), 5)
    shared = assemble.pair(parts, Rules(cutoff, eos=9999 if eos else None, share_prompt=True), 5)
    if len(shared) == 2:
        assert [list(d.input_ids) for d in shared] == [list(d.input_ids) for d in plain]
        return
    head, *branches = shared
    assert head.role == "prompt" and all(label == IGNORE for label in head.labels)
    for whole, branch in zip(plain, branches, strict=True):
        assert (
            branch.role == whole.role and branch.parent == 0 and branch.sample == whole.sample == 5
        )
        assert [*head.input_ids, *branch.input_ids] == list(whole.input_ids)
        assert [*head.labels, *branch.labels] == list(whole.labels)
    row = collate([shared], 1, 0)
    start, stop = row.documents[1].start, row.documents[1].stop
    assert row.position_ids[start:stop].tolist() == list(
        range(len(head.input_ids), len(plain[0].input_ids))
    )


def test_collate_keeps_sample_numbers_and_moves_parents() -> None:
    rules = Rules(99, share_prompt=True)
    samples = [assemble.pair(numbered([3, 2, 2]), rules, s) for s in (40, 7)]
    row = collate(samples, 9, 255)
    assert [d.sample for d in row.documents] == [40, 40, 40, 7, 7, 7, -1][: len(row.documents)]
    assert [d.parent for d in row.documents] == [-1, 0, 0, -1, 3, 3, -1]
    assert len(row) % 9 == 0 and row.input_ids[-1] == 255
    assert row.trained_tokens == 8
    packed = collate(
        [
            [
                *assemble.pair(numbered([3, 2, 2]), Rules(99), 4),
                *assemble.pair(numbered([3, 2, 2]), Rules(99), 9),
            ]
        ],
        1,
        0,
    )
    assert [d.sample for d in packed.documents] == [4, 4, 9, 9]


def test_labels_do_not_cross_documents() -> None:
    """With every token trained, the last token of each document predicts nothing and no first token
    is a label.
    """
    row = collate(
        [
            [
                assemble.plain(np.arange(5, dtype=np.int32), 0),
                assemble.plain(np.arange(10, 14, dtype=np.int32), 1),
            ]
        ],
        1,
        0,
    )
    assert row.labels.tolist() == [1, 2, 3, 4, IGNORE, 11, 12, 13, IGNORE]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
