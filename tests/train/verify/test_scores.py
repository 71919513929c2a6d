"""What the loss was given of each document, beside the specification's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longfactory.data.row import Document, Row
from longfactory.sp import routers
from longfactory.train.verify.alone import Step, Text
from longfactory.train.verify.scores import compare_scores, loss_deviation, scores_of
from longfactory.train.verify.watch import row_choices

TEXTS = (
    Text((5, 6, 7, 8), (-100, 7, 8, -100), 0, "chosen", 0),
    Text((5, 6, 9), (-100, 9, -100), 0, "rejected", 0),
)


def a_row(*lengths: int, padding: int = 2) -> Row:
    tokens = [token for text in TEXTS for token in text.tokens] + [0] * padding
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    documents = [Document(e - n, e, "chosen") for n, e in zip(lengths, stops, strict=True)]
    documents.append(Document(stops[-1], stops[-1] + padding, "pad"))
    ids = torch.tensor(tokens)
    return Row(ids, ids, ids, ids, tuple(documents))


def a_step(*logps: list[float], loss: float = 1.0) -> Step:
    """One micro-batch for each group of texts."""
    every = [[torch.tensor(of_text) for of_text in logps]]
    slopes = [[torch.ones(len(of_text)) for of_text in logps]]
    return Step(loss, {}, every, slopes, {}, {}, {})


def test_scores_are_those_of_the_trained_places_of_each_document() -> None:
    outputs = torch.arange(9.0)
    found = scores_of(a_row(4, 3), outputs, TEXTS, values=False)
    assert found is not None and [x.tolist() for x in found] == [[1.0, 2.0], [5.0]]
    found = scores_of(a_row(4, 3), outputs, TEXTS, values=True)
    assert found is not None and [x.tolist() for x in found] == [[3.0], [6.0]]
    assert scores_of(a_row(3, 4), outputs, TEXTS, values=False) is None


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (None, "Log-probabilities differ in document 1 of row 1 from token 3 of 4 on; 1 before"),
        (2, "token 3 of 4 on (its sliding window is 2); 1 before it agree."),
    ],
)
def test_the_first_token_that_differs_is_named(window: int | None, words: str) -> None:
    spec, own = a_step([-1.0, -2.0], [-3.0]), a_step([-1.0001, -2.0], [-3.0])

    def compared(*given: list[float]) -> Any:
        outputs = {0: [torch.tensor(x) for x in given]}
        return compare_scores(outputs, [TEXTS], 1, spec, own, values=False, window=window)

    measure, reasons, distances = compared([-1.0, -2.5], [-3.0])
    assert not measure.exact and len(reasons) == 1 and words in reasons[0]
    assert len(distances) == 2
    measure, reasons, _ = compared([-1.0, -2.0], [-3.0])
    assert measure.exact and reasons == []


def test_rows_that_were_not_those_expected_are_not_scored() -> None:
    step = a_step([-1.0, -2.0], [-3.0])
    measure, reasons, distances = compare_scores(
        {0: None}, [TEXTS], 1, step, step, values=False, window=None
    )
    assert not measure.exact and (reasons, distances) == ([], [])


def test_the_loss_may_be_as_far_off_as_its_scores() -> None:
    spec = a_step([-1.0, -2.0], [-3.0], loss=2.0)
    own = a_step([-1.1, -1.9], [-3.0], loss=2.0)
    assert loss_deviation(2.1, spec, own).exact
    assert not loss_deviation(3.0, spec, own).exact


def test_choices_of_a_row_are_those_of_its_documents_in_its_order() -> None:
    picks = {text: torch.arange(len(text.tokens))[:, None] for text in TEXTS}
    choices = {text: routers.Choices({"router": [x]}) for text, x in picks.items()}
    found = row_choices(a_row(4, 3), choices)
    assert found.of["router"][0][:7, 0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert row_choices(a_row(4, 3), {}).tokens is None
