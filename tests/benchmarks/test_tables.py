"""What starts the rows of the throughput and length tables: results that are merged, and processes
that are gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
import _log  # noqa: E402
import _table  # noqa: E402
import layers  # noqa: E402
from length import length_table  # noqa: E402
from throughput import system  # noqa: E402


def fact(row: str, tokens: int, **keys: Any) -> dict[str, Any]:
    return {"row": row, "kernel": "auto", "tokens": tokens, "gpus": 2, **keys}


def test_layers_with_experts_take_all_tokens_at_once() -> None:
    with_experts = [name for name, (_, keys) in layers.LAYERS.items() if layers.has_experts(keys)]
    for part in ("GLM-4.5", "DeepSeek-V2", "Qwen3-30B", "Qwen3-Next", "gpt-oss"):
        with_part = [name for name in layers.LAYERS if name.startswith(part)]
        assert with_part and set(with_part) <= set(with_experts), part
    assert "Qwen2.5-7B" not in with_experts


def test_a_measurement_replaces_and_an_error_does_not() -> None:
    old = [
        fact("ours", 100, seconds=1.0),
        fact("ours", 200, error="out of memory"),
        fact("alst", 100, seconds=3.0),
    ]
    new = [
        fact("ours", 100, error="stopped"),  # was measured
        fact("ours", 200, seconds=5.0),  # was not
        fact("ours", 50, seconds=0.5),
        fact("alst", 100, seconds=2.0),
        fact("alst", 200, error="out of memory"),
        fact("hf", 100, error="out of memory"),
    ]
    found = [
        (r["row"], r["tokens"], r.get("seconds", r.get("error"))) for r in _table.merge(old, new)
    ]
    assert found == [
        ("ours", 50, 0.5),
        ("ours", 100, 1.0),
        ("ours", 200, 5.0),
        ("alst", 100, 2.0),
        ("alst", 200, "out of memory"),
        ("hf", 100, "out of memory"),
    ]
    again = _table.merge(_table.merge(old, new), [fact("hf", 100, error="stopped")])
    assert [r["error"] for r in again if r["row"] == "hf"] == ["stopped"]


@pytest.mark.parametrize(
    "other",
    [
        {"layers": 4},
        {"kernel": "flash"},
        {"gpus": 4},
        {"memory": "long"},
        {"mode": "ulysses"},
        {"name": "x"},
    ],
)
def test_another_job_is_another_result(other: dict[str, Any]) -> None:
    first, second = fact("ours", 100, seconds=1.0), fact("ours", 100, seconds=2.0) | other
    assert _table.merge([first], [second]) == [first, second]


def test_written_files_keep_what_is_not_measured_again(tmp_path: Path) -> None:
    def render(results: list[dict[str, Any]]) -> str:
        return "\n".join(
            f"{r['row']} {r['tokens']} {r.get('seconds', r.get('error'))}" for r in results
        )

    first = [
        fact("ours", 100, seconds=1.0, command="first", date="2026-01-01"),
        fact("alst", 100, error="stopped"),
    ]
    _table.write(tmp_path, "t", "# T", render, first, {"machine": "m"})
    stored = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(stored | {"notes": ["A sentence."]}))
    second = [
        fact("alst", 100, seconds=2.0, command="second", date="2026-01-02", versions={"torch": "9"})
    ]
    table = _table.write(tmp_path, "t", "# T", render, second, {"machine": "m"})
    assert table == "ours 100 1.0\nalst 100 2.0"
    stored = json.loads((tmp_path / "t.json").read_text())
    assert [r["command"] for r in stored["results"]] == ["first", "second"] and stored["notes"] == [
        "A sentence."
    ]
    assert (
        (tmp_path / "t.md").read_text()
        == "# T\n\nours 100 1.0\nalst 100 2.0\n\nA sentence.\n\n`first` (2026-01-01)\n\n`second` (2026-01-02, torch 9)\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md"]


def test_the_command_does_not_say_where_results_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "/somewhere/benchmarks/length.py",
            "--gpus",
            "2",
            "--out",
            "/here",
            "--rows",
            "ours",
            "--out=/there",
        ],
    )
    assert _table.command_line() == "python benchmarks/length.py --gpus 2 --rows ours"


def test_a_system_is_named_with_its_kernels() -> None:
    assert system(fact("alst", 1, kernels=["cudnn"])) == "DeepSpeed ALST (cuDNN)"
    assert system(fact("alst", 1) | {"kernel": "flash"}) == "DeepSpeed ALST (FlashAttention 2)"
    assert (
        system(fact("ours", 1, kernels=["cudnn", "flash"], mode="ulysses"))
        == "LongFactory (cuDNN, FlashAttention 2, ulysses)"
    )
    assert system(fact("ours", 1)) == "LongFactory"


def test_errors_and_pairs_fill_every_column_of_the_length_table() -> None:
    measured = {"seconds": 2.0, "peak": 2**30, "locked": 2**31, "used": 2**30}
    for results in (
        [fact("ours", 2**20, **measured), fact("ours", 2**21, error="out of memory")],
        [
            fact("dpo", 2**20, computed=2**20, as_two_rows=2**21, **measured),
            fact("dpo", 2**21, error="out of memory"),
        ],
    ):
        lines = length_table(results, 2).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert "4.0 (2.0)" in lines[2] and "4,096 (2,048)" in lines[2]


# -- ends ------------------------------------------------------------------------------------------

# A row that reports one length, starts a process in a session of its own that will not be asked to
# end, and then hangs.
HANGING = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
                         start_new_session=True)
job = json.loads(sys.argv[1])
if os.environ.get("RANK", "0") == "0":
    fact = {"row": "hang", "kernel": "auto", "tokens": job["tokens"][0], "gpus": 2, "seconds": 1.0, "peak": 0, "loss": 0.0}
    print("RESULT " + json.dumps(fact), flush=True)
with open(job["pids"], "a") as f:
    f.write(f"{os.getpid()} {child.pid} ")
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(pids: Path, count: int) -> list[int]:
    until = time.time() + 100
    while time.time() < until:
        found = pids.read_text().split() if pids.exists() else []
        if len(found) == count:
            return [int(p) for p in found]
        time.sleep(0.1)
    raise AssertionError(f"{count} processes did not start")


@pytest.mark.processes
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_no_process_and_loses_no_result(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """Two workers under torchrun, which puts each into a session of its own."""
    script, pids, out = tmp_path / "hanging.py", tmp_path / "pids", tmp_path / "found.json"
    script.write_text(HANGING)
    job = {"row": "hang", "tokens": [100, 200], "pids": str(pids)}
    parent = textwrap.dedent(f"""
        import json, sys
        from pathlib import Path
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import _table
        from _table import Clock, run_row
        _table.GRACE = 0.5
        clock, log, script = Clock(150), Path({str(tmp_path / "log")!r}), Path({str(script)!r})
        found = run_row({job!r}, 2, clock, log, script) + run_row({job!r}, 2, clock, log, script)
        Path({str(out)!r}).write_text(json.dumps(found))
        sys.exit(clock.exit_code(False))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    started: list[int] = []
    try:
        started = wait_for(pids, 4)
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        assert [pid for pid in started if alive(pid)] == []
        found = json.loads(out.read_text())
        assert [(r["tokens"], r.get("seconds", r.get("error"))) for r in found] == [
            (100, 1.0),
            (200, f"stopped: {signum.name} ended this command"),
            (100, f"not started: {signum.name} ended this command"),
        ]
    finally:
        process.kill()
        for pid in started:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.processes
def test_a_row_that_is_out_of_time_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_table, "LEAST", 0.0)
    monkeypatch.setattr(_table, "GRACE", 0.5)
    script, pids = tmp_path / "hanging.py", tmp_path / "pids"
    script.write_text(HANGING)
    job = {"row": "hang", "tokens": [100, 200], "pids": str(pids)}
    before = signal.getsignal(signal.SIGTERM)
    found = _table.run_row(job, 1, _table.Clock(3.0), tmp_path / "log", script)
    started = wait_for(pids, 2)
    assert [pid for pid in started if alive(pid)] == []
    assert [(r["tokens"], r.get("seconds", r.get("error"))) for r in found] == [
        (100, 1.0),
        (200, "stopped: the time of this command is up"),
    ]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.processes
def test_what_a_row_leaves_behind_is_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_table, "GRACE", 0.5)
    script, pids = tmp_path / "leaving.py", tmp_path / "pids"
    script.write_text(HANGING.rpartition("time.sleep(600)")[0])
    job = {"row": "hang", "tokens": [100], "pids": str(pids)}
    begun = time.time()
    found = _table.run_row(job, 1, _table.Clock(60.0), tmp_path / "log", script)
    assert [r["tokens"] for r in found] == [100] and time.time() - begun < 50
    assert [pid for pid in wait_for(pids, 2) if alive(pid)] == []


def test_speeds_are_by_the_clock_between_rows_of_the_log() -> None:
    """A step of the log's own seconds ends before its row is written."""
    rates = {"tokens_per_second_per_gpu": 1000.0, "seconds_per_step": 1.0, "loss": 2.0}
    lines = [{**rates, "elapsed_seconds": at} for at in (30.0, 31.0, 32.25)]
    lines.insert(2, {"eval_loss": 2.0, "elapsed_seconds": 31.5})
    assert _log.step_seconds(lines) == [1.0, 1.25]
    assert _log.step_speeds(lines) == [1000.0, 800.0]


@pytest.mark.processes
def test_help_describes_a_benchmark_in_whole_sentences() -> None:
    """Some docstrings go on after their first line."""
    cut = "description=__doc__.splitlines()"
    assert [f.name for f in BENCHMARKS.glob("*.py") if cut in f.read_text()] == []
    words = [sys.executable, str(BENCHMARKS / "throughput.py"), "--help"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "on the GPUs of one machine." in " ".join(told.split())
