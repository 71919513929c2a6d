"""Samples without an answer: questions for do_predict."""

from __future__ import annotations

from typing import Any

import pytest

from loaded_data import ALPACA, load
from longfactory.data.row import IGNORE
from longfactory.errors import DataError


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"from": r, "value": f"{r} {i}"} for i, r in enumerate(roles)]


QUESTIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": (
        {},
        [
            {"instruction": "Q", "output": "A"},
            {"instruction": "Q"},
            {"instruction": "Q", "output": ""},
        ],
    ),
    "sharegpt": (
        {"formatting": "sharegpt"},
        [
            {"conversations": c}
            for c in (
                chat("human", "gpt"),
                chat("human", "gpt", "human"),
                [*chat("human"), {"from": "gpt", "value": ""}],
            )
        ],
    ),
}


@pytest.mark.parametrize("template", ["chatml", "mistral", "qwen3", "deepseekr1"])
@pytest.mark.parametrize("form", list(QUESTIONS))
def test_questions_are_for_do_predict(
    form: str, template: str, tokenizer: Any, write_data: Any
) -> None:
    """A conversation without its last answer is the prompt that the same conversation with an
    answer has.
    """
    info, rows = QUESTIONS[form]
    folder = write_data(d=(info, rows), t=({}, ALPACA))
    for thinking in (True, False):
        options = {
            "dataset": None,
            "eval_dataset": "d",
            "template": template,
            "enable_thinking": thinking,
        }
        data = load(tokenizer, folder, do_predict=True, **options).eval["eval"]
        assert len(data) == 3 and data.report.unanswered == 2 and not data.report.bad_rows
        assert "2 samples have no answer and are for do_predict alone" in data.report.describe()
        (answered,), *questions = (data[i] for i in range(3))
        assert answered.role == "text"
        prompt = list(
            answered.input_ids[
                : next(i for i, label in enumerate(answered.labels) if label != IGNORE)
            ]
        )
        for (question,) in questions:
            assert question.role == "prompt" and set(question.labels) == {IGNORE}
        assert list(questions[1][0].input_ids) == prompt
        assert data.lengths.tolist() == [len(data[i][0].input_ids) for i in range(3)]
        if form == "alpaca":
            assert list(questions[0][0].input_ids) == prompt
        # an evaluation has no use for them
        assert len(load(tokenizer, folder, **options).eval["eval"]) == 1


def test_questions_alone_cannot_be_evaluated(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, [{"instruction": "Q"}]))
    options = {"dataset": None, "eval_dataset": "d"}
    assert len(load(tokenizer, folder, do_predict=True, **options).eval["eval"]) == 1
    with pytest.raises(
        DataError, match=r"None of the 1 evaluation samples has an answer.*Leave out do_eval"
    ):
        load(tokenizer, folder, do_predict=True, do_eval=True, **options)


def test_a_question_is_cut_as_a_prompt(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({}, [{"instruction": "long " * 50}]))
    data = load(
        tokenizer, folder, dataset=None, eval_dataset="d", do_predict=True, cutoff_len=40
    ).eval["eval"]
    assert len(data[0][0].input_ids) == 40 == data.lengths[0] and data.report.truncated == 1
