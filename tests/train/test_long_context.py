"""`longfactory eval`: texts have their length and what is to be found in its place; two processes
that share each text measure what one measures.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from longfactory.errors import UserError
from longfactory.train.long_context.measure import (
    Cell,
    LongContext,
    Point,
    checked_tasks,
    make_texts,
)
from longfactory.train.long_context.report import as_json, draw, table
from longfactory.train.long_context.tasks import TASKS, make_text
from small_runs import POOLS, home, keys

__all__ = ["home"]  # a fixture


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_text_has_its_length_and_its_answer(task: str, depth: float) -> None:
    text = make_text(task, 1500, depth, 3, encode, [1])
    assert len(text.ids) == 1500 and text.ids[0] == 1
    whole = bytes(text.ids[1:]).decode()
    answer = bytes(text.ids[-text.answer :]).decode()
    body, _, question = whole.rpartition("\nQuestion:")
    assert question.endswith(answer) and body.count(answer) >= 1
    if task == "needle":
        at = body.index(f"is{answer}.") / len(body)
        assert abs(at - depth) < 0.08
    if task == "common":
        assert body.count(answer) == 9
    again = make_text(task, 1500, depth, 3, encode, [1])
    assert again == text and make_text(task, 1500, depth, 4, encode) != text


def test_a_length_that_is_too_short_is_a_sentence() -> None:
    tokenizer: Any = type("T", (), {"encode": lambda self, t, add_special_tokens: encode(t)})()
    with pytest.raises(UserError, match=r"needles needs [0-9]+ tokens, and the length is 60"):
        make_texts(tokenizer, [60], [0.5], ["needles"], 1)
    with pytest.raises(UserError, match="expected some of needle, needles, chain, common"):
        checked_tasks(["haystack"])


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    report = LongContext(
        "model",
        (
            Cell("needle", 100, 0.0, 1.0, -0.1, 2),
            Cell("needle", 100, 1.0, 0.5, -1.5, 2),
            Cell("needle", 200, 0.0, 0.0, -9.0, 2),
            Cell("common", 100, 0.0, 1.0, -0.2, 2),
        ),
        (Point(1, 10, 2.0, 9), Point(10, 100, 1.0, 90)),
    )
    lines = table(report).splitlines()
    assert "depth 0%" in lines[0] and "100% ( -0.10)" in lines[1] and "50% ( -1.50)" in lines[1]
    assert "7.39" in table(report) and json.loads(as_json(report))["cells"][1]["found"] == 0.5
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def measured(argv: list[str], tasks: list[str], documents: list[str], cache: str) -> dict[str, Any]:
    """On a rank: a whole evaluation."""
    import dataclasses
    import os

    import peft
    import torch.distributed as dist

    from longfactory.config import load_config
    from longfactory.train.long_context import evaluate

    made = peft.get_peft_model

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        assert next(model.parameters()).is_meta, "an adapter was made that nobody named"
        return made(model, *args, **kwargs)

    os.environ["LONGFACTORY_CACHE"] = cache
    peft.get_peft_model = counted
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    report = evaluate(
        load_config(argv),
        lengths=[700, 901],
        depths=[0.0, 0.7],
        tasks=tasks,
        samples=2,
        documents=documents,
    )
    peft.get_peft_model = made
    return dataclasses.asdict(report)


@pytest.mark.processes
def test_two_processes_measure_what_one_measures(home: Path) -> None:
    draw_ = random.Random(1)
    path = home / "long.jsonl"
    rows = [{"input_ids": [draw_.randrange(3, 250) for _ in range(n)]} for n in (880, 300, 500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {}
    for name, size, sp in (("one", 1, 1), ("shared", 2, 2), ("apart", 2, 1)):
        given = keys(home, "eval", sequence_parallel_size=sp, dataset="unused", packing=None)
        if name == "apart":
            given["finetuning_type"] = "lora"  # the default: the model alone is measured
        argv = [f"{k}={v}" for k, v in given.items()]
        results[name] = POOLS[size].run(
            measured, argv, ["needle", "common"], [str(path)], str(home / "cache")
        )[0]
    one = results["one"]
    assert (
        len(one["cells"]) == 2 * 2 + 2 and sum(p["tokens"] for p in one["curve"]) == 880 + 800 - 3
    )
    for other in (results["shared"], results["apart"]):
        for part in ("cells", "curve"):
            for a, b in zip(one[part], other[part], strict=True):
                assert a.keys() == b.keys()
                for key, value in a.items():
                    expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
                    assert b[key] == expected, key


@pytest.mark.slow
@pytest.mark.processes
def test_stretched_positions_are_measured_as_they_are_trained(home: Path) -> None:
    """`rope_scaling: yarn` is that of a run whose rows are as long as the longest text, on one
    process and on two.
    """
    draw_ = random.Random(1)
    path = home / "long.jsonl"
    row = {"input_ids": [draw_.randrange(3, 250) for _ in range(900)]}
    path.write_text(json.dumps(row) + "\n")
    config = json.loads((home / "model" / "config.json").read_text())
    short = home / "short positions"
    shutil.copytree(home / "model", short, dirs_exist_ok=True)
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    curves = {}
    for name, size in (("none", 1), ("yarn", 1), ("yarn, shared", 2)):
        given = keys(home, "eval", sequence_parallel_size=size, dataset="unused", packing=None)
        given |= {"model_name_or_path": short}
        given |= {} if name == "none" else {"rope_scaling": "yarn"}
        argv = [f"{k}={v}" for k, v in given.items()]
        found = POOLS[size].run(measured, argv, ["needle"], [str(path)], str(home / "cache"))[0]
        curves[name] = [point["loss"] for point in found["curve"]]
    one, two, none = (curves[name][-1] for name in ("yarn", "yarn, shared", "none"))
    assert abs(one - none) > 3e-6, "a random model's loss hardly depends on positions, but it does"
    assert abs(two - one) < 0.2 * abs(one - none)
