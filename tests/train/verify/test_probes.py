"""What is watched in a step, on rows made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from longfactory.data.row import Row, TokenizedDocument, make_row
from longfactory.train.verify import probes
from longfactory.train.verify.alone import texts_of
from longfactory.train.verify.probes import (
    Leak,
    TrainedPlaces,
    cut_of,
    layer_reason,
    leak_check,
    leaves,
    mask_reason,
)

PAIR = [
    TokenizedDocument([5, 6, 7], [-100] * 3, "prompt", 0),
    TokenizedDocument([8, 9, 2], [-100, 9, 2], "chosen", 0, parent=0),
    TokenizedDocument([8, 4, 3, 2], [-100, 4, 3, 2], "rejected", 0, parent=0),
    TokenizedDocument([1, 2, 3, 4, 5, 6], [-100, -100, 3, 4, 5, 6], "text", 1),
]


def test_layers_that_compute_another_share_are_named() -> None:
    assert layer_reason({0: {80}, 1: {80}}, 160, 2, 1) is None
    reason = layer_reason({0: {80}, 3: {160}, 4: {80, 160}}, 160, 2, 2)
    assert reason is not None and reason.startswith("Layer 4 computed 160 of the 160 tokens of row")
    assert "(2 layers did not compute 80); with sequence_parallel_size: 2 it is 80." in reason


def test_every_call_of_a_layer_is_counted() -> None:
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    counts: dict[int, set[int]] = {}
    with probes.counted_layers(model, counts):
        model.layers[0](torch.zeros(1, 6, 4))
        model.layers[1](torch.zeros(1, 6, 4))
        model.layers[1](torch.zeros(1, 3, 4))
    model.layers[0](torch.zeros(1, 9, 4))
    assert counts == {0: {6}, 1: {3, 6}}


def test_a_gradient_from_a_token_that_is_not_trained_is_named() -> None:
    row, texts = make_row(PAIR).padded(8, 0), texts_of(PAIR)
    right = [3, 4, 6, 7, 8, 11, 12, 13, 14]
    assert [t for t, label in enumerate(row.labels.tolist()) if label != -100] == right
    assert mask_reason(TrainedPlaces(right, right[:4]), row, texts, 1, False) is None
    for found, sentence in (
        (
            TrainedPlaces([*right, 10]),
            "the log-probability of 1 tokens of row 1 whose label is -100",
        ),
        (TrainedPlaces(right, [10]), "last hidden state of 1 tokens"),
        (TrainedPlaces([10]), "the first of them token 1 of document 4: they are trained."),
    ):
        reason = mask_reason(found, row, texts, 1, False)
        assert reason is not None and sentence in reason
    padded = make_row(PAIR[:3]).padded(8, 0)
    assert len(padded) == 16
    reason = mask_reason(TrainedPlaces([12]), padded, texts_of(PAIR[:3]), 2, False)
    assert reason is not None and "token 13 of the row, which is padding" in reason
    # Values are read at the last token of a document.
    assert mask_reason(TrainedPlaces([5, 9]), row, texts, 1, True) is None
    assert mask_reason(TrainedPlaces([4]), row, texts, 1, True) is not None


def test_gradients_of_outputs_and_hidden_states_are_noted() -> None:
    head, found = nn.Linear(2, 1), TrainedPlaces()
    hidden = torch.ones(1, 3, 2, requires_grad=True)
    index = torch.tensor([0, 1, 5])
    with probes.watched_hidden(head, index, found):
        logps = head(hidden)[0, :, 0]
    probes.watch_outputs(logps, found)
    (logps * torch.tensor([0.0, 1.0, 2.0])).sum().backward()
    assert found == TrainedPlaces([1, 2], [1, 5])


def test_leaves_and_cuts() -> None:
    row = make_row(PAIR).padded(8, 0)
    assert leaves(row) == [1, 2, 3]
    text = row.documents[3]
    assert (text.start, text.stop) == (10, 16)
    assert cut_of(text, []) == 13 and cut_of(text, [8, 12, 16]) == 12


def scored(leak: str) -> Any:
    """A trainer whose score of a token is the sum of the tokens that it sees."""

    def token_outputs(model: Any, row: Row) -> Any:
        ids, out = row.input_ids.double(), torch.zeros(len(row), dtype=torch.float64)
        for i, d in enumerate(row.documents):
            chain = [i]
            while row.documents[chain[0]].parent >= 0:
                chain.insert(0, row.documents[chain[0]].parent)
            past = sum(
                ids[p.start : p.stop].sum() for p in map(row.documents.__getitem__, chain[:-1])
            )
            own = ids[d.start : d.stop]
            out[d.start : d.stop] = past + own.cumsum(0)
            if leak == "future":
                out[d.start : d.stop] = past + own.sum()
            if leak == "documents" and i:
                out[d.start : d.stop] += ids[: d.start].sum()
        return SimpleNamespace(logps=out)

    import contextlib

    return SimpleNamespace(
        token_outputs=token_outputs,
        model_wrapped=None,
        compute_loss_context_manager=contextlib.nullcontext,
    )


@pytest.mark.parametrize("leak", ["", "documents", "future"])
def test_what_log_probabilities_depend_on(leak: str) -> None:
    documents = [TokenizedDocument(range(3 * i + 1, 3 * i + 9), [-100] * 8) for i in range(3)]
    for row in (make_row(PAIR).padded(8, 0), make_row(documents)):
        check, reasons = leak_check([(1, *probes.leaks(scored(leak), row, []))])
        assert check.state == ("failed" if leak else "passed"), check
        names = {"documents": "Documents see each other", "future": "Later tokens are seen"}
        assert not reasons if not leak else any(names[leak] in reason for reason in reasons)
    single = make_row(documents[:1])
    documents_leak, future = probes.leaks(scored(leak), single, [])
    assert documents_leak is None and future.found == (leak == "future")


def test_a_probe_that_moves_nothing_is_not_exercised() -> None:
    still = Leak(0.0, 0.0, "", "", 0.0)
    assert leak_check([(1, None, still)])[0].state == "not exercised"
    # As much as two passes over the same tokens differ.
    assert not Leak(1.0, 3e-3, "", "", 1e-3).found and Leak(1.0, 5e-3, "", "", 1e-3).found
