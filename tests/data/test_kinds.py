"""Each kind of sample by itself: its lengths, documents and prompt places agree with each other."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from longfactory.data.assemble import Rules
from longfactory.data.errors import BadRows
from longfactory.data.kinds import KINDS, SavedKind
from longfactory.data.report import Report
from longfactory.data.row import IGNORE
from longfactory.data.store import (
    DESIRED,
    LACKS_THOUGHT,
    SECOND_LACKS_THOUGHT,
    Chunk,
    MemoryStore,
)

PARTS = {"pt": 1, "sft": 6, "pair": 3, "kto": 2}
FLAGS = {
    "pt": [0],
    "sft": [0],
    "pair": [0, LACKS_THOUGHT, SECOND_LACKS_THOUGHT, LACKS_THOUGHT | SECOND_LACKS_THOUGHT],
    "kto": [0, DESIRED, LACKS_THOUGHT, DESIRED | LACKS_THOUGHT],
}


def samples(name: str, count: int, seed: int) -> MemoryStore:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30 if name == "pt" else 9, count * PARTS[name])
    chunk = Chunk(
        rng.integers(1, 50, lengths.sum()).astype(np.int32),
        lengths.astype(np.int64),
        np.full(count, PARTS[name], np.int64),
        rng.choice(FLAGS[name], count).astype(np.uint8),
        np.arange(count),
        BadRows(),
    )
    return MemoryStore(chunk, "d")


RULES = [
    Rules(12),
    Rules(12, eos=0),
    Rules(100, eos=0, share_prompt=True),
    Rules(9, share_prompt=True, thought=(51, 52)),
    Rules(9, thought=(51, 52), thought_trained=False),
    Rules(12, "keep_tail", prefix=1),
]


@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("name", PARTS)
def test_lengths_are_those_of_the_documents(name: str, rules: Rules) -> None:
    kind, report = KINDS[name], Report()
    stores = [samples(name, 30, 1), samples(name, 20, 2)]
    entries = np.array([(s, i) for s in (1, 0) for i in range(len(stores[s]))])
    kept, after = kind.fit(stores, entries, rules, False, report)
    documents = [kind.documents(stores, e, rules, i) for i, e in enumerate(kept)]
    assert after.tolist() == [sum(len(d.input_ids) for d in ds) for ds in documents]
    assert len(kept) == 50 and (report.truncated > 0) == (rules.cutoff < 100)


@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("name", ["sft", "pair", "kto"])
def test_nothing_is_trained_in_prompt_places(name: str, rules: Rules) -> None:
    kind, stores = KINDS[name], [samples(name, 40, 3)]
    entries = np.array([(0, i) for i in range(40)])
    kept, _ = kind.fit(stores, entries, rules, False, Report())
    told = 0
    for i, e in enumerate(kept):
        for d in kind.documents(stores, e, rules, i):
            places = kind.prompt_places(stores[0].lengths(i), rules, d.role)
            if places is None or d.parent >= 0 or d.role in ("prompt", "kl"):
                continue
            length, prompt = places
            labels = np.asarray(d.labels)
            trained = set(np.flatnonzero(labels != IGNORE).tolist())
            assert length == len(labels) and not trained & prompt
            told += len(prompt)
    # Lengths do not tell whether an answer has a thought.
    assert (told == 0) == (name != "sft" and bool(rules.thought))


def test_names_are_those_of_caches_and_saved_folders() -> None:
    """A cache or a tokenized_path that was written once goes on being read."""
    assert list(KINDS) == ["pt", "sft", "pair", "kto"]
    assert SavedKind(KINDS["pair"]).name == "made"


@pytest.mark.parametrize("name", PARTS)
def test_kinds_travel_to_other_processes(name: str) -> None:
    there = pickle.loads(pickle.dumps(KINDS[name]))
    assert there == KINDS[name] and there != SavedKind(KINDS[name])
