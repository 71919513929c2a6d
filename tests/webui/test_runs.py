"""Logs as they grow, break and vanish; what the board makes of them; the file that it exports."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from longfactory.errors import UserError
from longfactory.webui import command, runs
from longfactory.webui.board import as_html
from longfactory.webui.folders import Folders
from longfactory.webui.runs import Board, Log, curves, thinned


def line(step: int, **values: Any) -> str:
    return json.dumps({"current_steps": step, "total_steps": 9, **values}) + "\n"


def write_run(folder: Path, losses: list[float], **keys: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [line(i + 1, loss=x, lr=1e-4, elapsed_seconds=float(i)) for i, x in enumerate(losses)]
    (folder / "trainer_log.jsonl").write_text("".join(lines))
    (folder / "longfactory.yaml").write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
    return folder


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    log = Log(path)
    log.refresh()
    assert log.gone and log.rows == []
    path.write_text(line(1, loss=2.0) + line(2, loss=1.5)[:10])
    log.refresh()
    assert not log.gone and [row["loss"] for row in log.rows] == [2.0]
    with path.open("a") as file:
        file.write(line(2, loss=1.5)[10:] + line(3, loss=1.0))
    log.refresh()
    assert [row["loss"] for row in log.rows] == [2.0, 1.5, 1.0] and log.malformed == 0


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"null",
        b"[1]",
        b'{"loss": 1}',
        b'{"current_steps": NaN}',
        b'{"current_steps": true}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"current_steps": 1' + b"0" * 5000 + b"}",
        b"x" * (runs.LONGEST_LINE + 5),
    ],
)
def test_a_malformed_line_is_counted_and_the_next_one_read(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "trainer_log.jsonl"
    path.write_bytes(line(1, loss=2.0).encode() + bad + b"\n\n" + line(2, loss=1.0).encode())
    log = Log(path)
    log.refresh()
    assert [row["loss"] for row in log.rows] == [2.0, 1.0]
    assert log.malformed == 1


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    path.write_text(line(1, loss=float("nan"), lr="x", grad_norm=float("inf"), reward=0.5, ok=True))
    log = Log(path)
    log.refresh()
    assert log.rows == [{"current_steps": 1.0, "total_steps": 9.0, "reward": 0.5}]


def test_a_log_that_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    path.write_text(line(1, loss=2.0) + line(2, loss=1.0))
    log = Log(path)
    log.refresh()
    first = log.generation
    # Rewritten in the same file, and longer than before.
    path.write_text(line(1, loss=9.0) + line(2, loss=8.0) + line(3, loss=7.0) + line(4, loss=6.0))
    log.refresh()
    assert [row["loss"] for row in log.rows] == [9.0, 8.0, 7.0, 6.0] and log.generation > first
    new = tmp_path / "new"
    new.write_text(line(1, loss=9.0))
    os.replace(new, path)
    log.refresh()
    assert [row["loss"] for row in log.rows] == [9.0]
    path.unlink()
    log.refresh()
    assert log.gone and [row["loss"] for row in log.rows] == [9.0]


def test_llama_factorys_times_are_seconds() -> None:
    for text, seconds in (("0:01:05", 65), ("1 day, 1:00:00", 90000), ("2 days, 0:00:01", 172801)):
        row = runs.numbers_of(line(1, elapsed_time=text).encode())
        assert row is not None and row["elapsed_seconds"] == seconds
    for text in ("soon", "1:2", "-1 day, x:0:0", ", ::"):
        row = runs.numbers_of(line(1, elapsed_time=text).encode())
        assert row is not None and "elapsed_seconds" not in row


def test_long_curves_keep_their_peaks() -> None:
    values = [1.0] * 50_000
    values[31_417], values[8_001] = 77.0, -5.0
    kept = thinned(values, 1000)
    assert len(kept) <= 2002 and {0, 49_999, 31_417, 8_001} <= set(kept)
    assert kept == sorted(kept)
    found = curves([{"current_steps": float(i), "loss": v} for i, v in enumerate(values)])["loss"]
    assert max(found[1]) == 77.0 and found[0][found[1].index(77.0)] == 31_417


def test_the_board_reads_runs_with_keys_results_and_verify(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "one", [2.0, 1.0], learning_rate=1e-4, hf_hub_token="secret")
    two = write_run(tmp_path / "two", [2.0, 1.5], learning_rate=2e-4, stage="sft")
    (one / "all_results.json").write_text('{"train_loss": 1.5, "x": "text"}')
    (one / "verify.json").write_text(
        json.dumps({"exact": True, "title": "t", "loss": {"split": 1.0}, "parameters": {"a": {}}})
    )
    (two / "all_results.json").write_text("{")
    (two / "verify.json").write_text('{"exact": "yes"}')
    board = Board(Folders([tmp_path]))
    assert set(board.find()) == {one, two}
    first, second = board.run(one), board.run(two)
    assert first["name"] == "a/one" and first["step"] == 2 and first["steps"] == 9
    assert first["curves"]["loss"][1] == [2.0, 1.0]
    assert first["keys"] == {"learning_rate": 1e-4}
    assert first["results"] == {"train_loss": 1.5} and second["results"] == {}
    assert first["verify"]["exact"] and first["verify"]["parameters"] == 1
    assert second["verify"] is None
    assert runs.differences([first, second]) == [
        {"key": "learning_rate", "values": [1e-4, 2e-4]},
        {"key": "stage", "values": [None, "sft"]},
    ]


def test_a_run_that_vanishes_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", [2.0]), write_run(tmp_path / "two", [3.0])
    board = Board(Folders([tmp_path]))
    assert not board.run(one)["gone"]
    shutil.rmtree(one)
    assert set(board.find(at_once=True)) == {one, two}
    gone = board.run(one)
    assert gone["gone"] and gone["curves"]["loss"][1] == [2.0] and gone["keys"] == {}
    assert not board.run(two)["gone"]


def test_files_outside_of_the_folders_are_not_read(tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside", [2.0], stage="sft")
    chosen = tmp_path / "chosen"
    (chosen / "run").mkdir(parents=True)
    (chosen / "run" / "trainer_log.jsonl").symlink_to(outside / "trainer_log.jsonl")
    (chosen / "linked").symlink_to(outside)
    real = write_run(chosen / "real", [1.0])
    (real / "longfactory.yaml").unlink()
    (real / "longfactory.yaml").symlink_to(outside / "longfactory.yaml")
    board = Board(Folders([chosen]))
    assert board.find() == [real]
    assert board.run(real)["keys"] == {}


def test_rewards_of_pairs_are_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "dpo", [])
    log = run / "trainer_log.jsonl"
    log.write_text(line(1, loss=0.7, reward=0.1, **{"rewards/margins": 0.2}))
    assert set(Board(Folders([tmp_path])).run(run)["curves"]) == {
        *("loss", "reward", "rewards/margins"),
    }


def test_the_exported_board_needs_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "</script><script>alert(1)</script>"
    write_run(tmp_path / "one", [2.0, 1.0], run_name=json.dumps(evil))
    write_run(tmp_path / "two", [2.0, 1.5], run_name="x")
    target = tmp_path / "board.html"
    assert command.main(["--folder", str(tmp_path), "--export", str(target)]) == 0
    assert "2 runs" in capsys.readouterr().out
    text = target.read_text()
    assert evil not in text and text.count("</script>") == 2
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    urls = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\"' ]*", text))
    assert urls == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(?:src|href)=|@import|url\(", text)
    data = re.search(r'id="data">(.*?)</script>', text)
    assert data is not None
    found = json.loads(data[1])
    assert {run["name"] for run in found["runs"]} == {"one", "two"}
    assert {d["key"]: d["values"] for d in found["differences"]}["run_name"].count(evil) == 1
    board = Board(Folders([tmp_path]))
    assert "one" in as_html(board, [tmp_path / "one"])
    with pytest.raises(UserError, match="no run was found"):
        command.main(["--folder", str(Path(__file__).parent), "--export", str(target)])
    with pytest.raises(UserError, match="there is no folder"):
        command.main(["--folder", str(tmp_path), "--export", str(tmp_path / "no" / "x.html")])
