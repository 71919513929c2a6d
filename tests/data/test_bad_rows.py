"""Bad rows are counted and named with file and row; `on_bad_row: error` stops at the first."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from data_arguments import make_args
from longfactory.data.module import load_datasets
from longfactory.data.templates import get_template
from longfactory.errors import DataError

GOOD = {"instruction": "Q", "input": "", "output": "A"}
CHAT = {"formatting": "sharegpt"}


def load(tokenizer: Any, folder: Any, stage: str = "sft", **options: Any) -> Any:
    args = make_args(dataset_dir=str(folder), dataset="d", **({"template": "chatml"} | options))
    return load_datasets(
        args, stage=stage, tokenizer=tokenizer, template=get_template(args, tokenizer), seed=0
    ).train


def turns(*roles: str, value: Any = "text") -> dict[str, Any]:
    return {"conversations": [{"from": r, "value": value} for r in roles]}


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


LINES: list[tuple[bytes, str]] = [
    (b'{"instruction": "Q", "output": ', "invalid JSON"),
    (b'{"instruction": "Q\xff\xfe", "input": "", "output": "A"}', "broken UTF-8"),
    (b'["Q", "A"]', "not a JSON object"),
    (b"null", "not a JSON object"),
    (line({"question": "Q", "output": "A"}), "missing column"),
    (line({"instruction": "Q", "input": ""}), "no answer"),
    (line({"instruction": "Q", "input": "", "output": ""}), "empty answer"),
    (line({"instruction": "Q", "input": "", "output": " \n"}), "empty answer"),
    (line({"instruction": "Q", "input": "", "output": 3}), "not text"),
    (line({"instruction": ["Q"], "input": "", "output": "A"}), "not text"),
    (b"[" * 100_000, "invalid JSON"),
    (line({"instruction": "Q", "input": "", "output": "\ud83d"}), "half of a character"),
    (line({"instruction": "\udc4d Q", "input": "", "output": "A"}), "half of a character"),
]


@pytest.mark.processes
@pytest.mark.parametrize("workers", [None, 2])
def test_every_kind_of_bad_line_is_counted_and_placed(
    workers: int | None, tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [x for bad, _ in LINES for x in (line(GOOD), bad)]
    lines.insert(5, b"")  # a blank line is no row, but counts as a line
    folder = write_data(d=({"file_name": "d.jsonl"}, b"\n".join(lines)))
    data = load(tokenizer, folder, preprocessing_num_workers=workers, preprocessing_batch_size=3)
    assert len(data) == len(LINES)
    assert data.report.rows_read == 2 * len(LINES) and data.report.bad == len(LINES)
    found = data.report.bad_rows["d"]["places"]
    expected = [f"d.jsonl:{lines.index(bad) + 1}" for bad, _ in LINES]
    assert [place for place, _ in found] == expected
    assert [reason.split(":")[0] for _, reason in found] == [reason for _, reason in LINES]
    assert f"{len(LINES)} bad rows" in caplog.text and "d.jsonl:2: invalid JSON" in caplog.text


def test_a_line_of_two_megabytes_is_a_row(tokenizer: Any, write_data: Any) -> None:
    long = GOOD | {"instruction": "word " * 400_000}
    folder = write_data(d=({"file_name": "d.jsonl"}, [GOOD, long, GOOD]))
    data = load(tokenizer, folder, cutoff_len=64)
    assert len(data) == 3 and data.report.bad == 0 and data.report.truncated == 1
    assert data.lengths[1] == 64 and data.report.lost_tokens > 100_000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns("gpt", "human"), "wrong role order: message 1 is from assistant"),
        (turns("human", "human", "gpt", "gpt"), "wrong role order: message 2 is from user"),
        (
            turns("human", "gpt", "human"),
            "wrong role order: the conversation must end with an answer",
        ),
        (turns("human", "bot"), "unknown role: 'bot' is not among 'human', 'gpt'"),
        (turns(), "no message"),
        (turns("system"), "no message"),
        (turns("human", "gpt", value=None), "not text: a message's 'value' is empty"),
        (turns("human", "gpt", value={"a": 1}), "not text: a message's 'value' is a dict"),
        ({"conversations": "human: hi"}, "not a list"),
        ({"conversations": ["hi", "ho"]}, "not a message"),
        (
            {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
            "missing column: a message has no 'value'",
        ),
        ({"messages": []}, "missing column: 'conversations' is not among"),
        (turns("human", "function_call"), "a tool call is not JSON"),
        (turns("human", "function_call", value="[]"), "a tool call is empty"),
        (
            turns("human", "function_call", value='{"name": "f"}'),
            "a tool call needs a name and arguments",
        ),
    ],
)
def test_bad_conversations(
    row: dict[str, Any], reason: str, tokenizer: Any, write_data: Any
) -> None:
    folder = write_data(d=(CHAT, [turns("human", "gpt"), row]))
    data = load(tokenizer, folder)
    ((place, found),) = data.report.bad_rows["d"]["places"]
    assert place == "d.json row 2" and found.startswith(reason), found
    with pytest.raises(DataError, match=r"Data set 'd', d\.json row 2: .*on_bad_row: skip"):
        load(tokenizer, folder, on_bad_row="error", overwrite_cache=True)
    load(tokenizer, folder)
    with pytest.raises(DataError, match=r"d\.json row 2"):
        load(tokenizer, folder, on_bad_row="error")


def test_a_role_without_a_tag_says_which_tag_to_add(tokenizer: Any, write_data: Any) -> None:
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    folder = write_data(
        d=(CHAT | {"tags": tags}, [turns("human", "gpt"), turns("system", "human", "gpt")])
    )
    assert (
        'add "system_tag": "system" to the tags'
        in load(tokenizer, folder).report.bad_rows["d"]["places"][0][1]
    )


def test_bad_pairs(tokenizer: Any, write_data: Any) -> None:
    def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
        return {"instruction": "Q", "input": "", "chosen": chosen, "rejected": rejected}

    columns = {
        "prompt": "instruction",
        "query": "input",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    rows = [
        pair("good", "bad"),
        pair("", "bad"),
        pair("good", " "),
        pair("same", "same"),
        pair("good", None),
        {"instruction": "Q"},
    ]
    folder = write_data(d=({"ranking": True, "columns": columns}, rows))
    data = load(tokenizer, folder, "dpo")
    assert len(data) == 1 and data.report.bad_rows["d"]["reasons"] == {
        "empty answer": 2,
        "equal pair": 1,
        "not text": 1,
        "missing column": 1,
    }


def test_equal_pairs_are_kept_where_the_loss_learns_of_them(
    tokenizer: Any, write_data: Any
) -> None:
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    rows = [
        {"instruction": "Q", "chosen": a, "rejected": b}
        for a, b in (("good", "bad"), ("same", "same"))
    ]
    folder = write_data(d=({"ranking": True, "columns": columns}, rows))
    dropped, kept = (load(tokenizer, folder, "dpo", equal_pairs=k) for k in (False, True))
    assert (
        len(dropped) == 1
        and dropped.report.bad_rows["d"]["reasons"] == {"equal pair": 1}
        and dropped.report.equal_pairs == 0
    )
    assert len(kept) == 2 and not kept.report.bad_rows and kept.report.equal_pairs == 1
    assert "in 1 pairs both answers are the same" in kept.report.describe()
    chosen, rejected = kept[1]
    assert list(chosen.input_ids) == list(rejected.input_ids) and list(chosen.labels) == list(
        rejected.labels
    )


def test_kto_with_one_label_or_none(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    info = {"columns": {"prompt": "q", "response": "a", "kto_tag": "t"}}
    rows = [
        {"q": "Q", "a": "A", "t": True},
        {"q": "Q", "a": "B", "t": True},
        {"q": "Q", "a": "C", "t": "maybe"},
        {"q": "Q", "a": "C"},
    ]
    data = load(tokenizer, write_data(d=(info, rows)), "kto")
    assert "All 2 KTO samples are desired" in caplog.text and data.report.bad_rows["d"][
        "reasons"
    ] == {"no label": 2}
    caplog.clear()
    load(tokenizer, write_data(d=(info, [*rows, {"q": "Q", "a": "D", "t": "False"}])), "kto")
    assert "All" not in caplog.text


def test_a_broken_json_array_names_the_row(tokenizer: Any, write_data: Any) -> None:
    whole = json.dumps([GOOD, GOOD, GOOD], indent=1).encode()
    for broken, message in (
        (whole[:-30], "d.json is broken at row 3: .* in line 1[0-9]"),
        (whole.replace(b"},", b"}", 1), r"d.json is broken after row 1 \(line"),
        (whole.replace(b'"A"', b"A", 1), "d.json is broken at row 1"),
    ):
        with pytest.raises(DataError, match=message):
            load(tokenizer, write_data(d=({}, broken)))
    spoiled = whole.replace(b'"A"', b'"A\xc3"', 1)
    data = load(tokenizer, write_data(d=({}, spoiled)))
    assert len(data) == 2 and data.report.bad_rows["d"]["places"][0][0] == "d.json row 1"


def test_csv_rows(tokenizer: Any, write_data: Any) -> None:
    text = 'instruction,input,output\nQ,,A\nQ,"two\nlines",A\nQ,,A,more\nQ,,\nQ,,"A\xff"\n'.encode(
        "latin-1"
    )
    data = load(tokenizer, write_data(d=({"file_name": "d.csv"}, text)))
    assert len(data) == 2
    assert [(p, r.split(":")[0]) for p, r in data.report.bad_rows["d"]["places"]] == [
        ("d.csv:5", "too many fields"),
        ("d.csv:6", "no answer"),
        ("d.csv:7", "broken UTF-8"),
    ]


def test_nothing_left_is_an_error_that_says_why(tokenizer: Any, write_data: Any) -> None:
    with pytest.raises(
        DataError, match=r"Of 2 rows 2 were bad\. First: d\.json row 1: empty answer"
    ):
        load(tokenizer, write_data(d=({}, [GOOD | {"output": ""}] * 2)))
    with pytest.raises(DataError, match="There are no rows in it"):
        load(tokenizer, write_data(d=({}, [])))
    with pytest.raises(DataError, match="of 1 rows 0 were bad and 1 dropped"):
        load(tokenizer, write_data(d=({}, [GOOD])), cutoff_len=2, cutoff_strategy="drop")


def test_images_are_named(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    info = {"columns": {"prompt": "instruction", "response": "output", "images": "images"}}
    data = load(tokenizer, write_data(d=(info, [GOOD, GOOD | {"images": ["a.png"]}])))
    assert data.report.bad_rows["d"]["reasons"] == {"media": 1}


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_an_error_in_a_worker_ends_the_run(tokenizer: Any, write_data: Any) -> None:
    """The reader, far ahead of the error, is not left waiting."""
    rows = [GOOD, GOOD | {"output": ""}, *[GOOD] * 200]
    folder = write_data(d=({"file_name": "d.jsonl"}, rows))
    with pytest.raises(DataError, match=r"d\.jsonl:2: empty answer"):
        load(
            tokenizer,
            folder,
            on_bad_row="error",
            preprocessing_num_workers=2,
            preprocessing_batch_size=1,
        )
    assert (
        len(load(tokenizer, folder, preprocessing_num_workers=2, preprocessing_batch_size=1)) == 201
    )
