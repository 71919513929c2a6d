"""The rows of the throughput and length tables, on a tiny model: what they measure is what they
say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
import _peer_ours  # noqa: E402
from _peer_bench import SHAPES, Bench, Job  # noqa: E402
from _table import Clock, job, run_row  # noqa: E402
from longfactory.data.row import IGNORE  # noqa: E402
from longfactory.memory import choose as auto  # noqa: E402

KEYS: dict[str, Any] = {"shape": "tiny", "kernel": "cpu", "steps": 1, "warm": False}


@pytest.mark.processes
def test_processes_of_deepspeed_import_nothing_of_the_engine() -> None:
    look = "import sys, _peers, _peer_deepspeed; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name for name in done.stdout.split() if name.startswith("longfactory.")}
    assert found == {"longfactory.errors"}


def test_a_pair_is_prompt_chosen_rejected_of_as_many_tokens_as_asked() -> None:
    for tokens, multiple in ((512, 4), (1000, 16)):
        row = _peer_ours.preference_row(tokens, 512, multiple)
        prompt, chosen, rejected, *rest = row.documents
        assert len(row) == -(-tokens // multiple) * multiple and [d.role for d in rest] in (
            [],
            ["pad"],
        )
        assert rejected.stop == tokens and prompt.stop / tokens == pytest.approx(0.95, abs=0.005)
        assert [d.role for d in (prompt, chosen, rejected)] == ["prompt", "chosen", "rejected"]
        assert (chosen.parent, rejected.parent, chosen.sample, rejected.sample) == (0, 0, 0, 0)
        for d in (chosen, rejected):
            assert d.trained == tokens // 40 and d.reference_logp == -d.trained * math.log(512)
            assert row.position_ids[d.start : d.stop].tolist() == list(
                range(prompt.stop, prompt.stop + d.stop - d.start)
            )
        assert bool((row.labels[: prompt.stop] == IGNORE).all())


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(200)
def test_a_pair_over_two_processes_is_the_pair_in_one(tmp_path: Path) -> None:
    one, two = (run_row(job("dpo", [256], **KEYS), n, Clock(180), tmp_path / "log") for n in (1, 2))
    assert [r.get("error") for r in (*one, *two)] == [None, None]
    assert (
        one[0]["loss"] == pytest.approx(two[0]["loss"], abs=2e-3)
        and abs(one[0]["loss"] - math.log(2)) > 0.01
    )
    for r in (*one, *two):
        assert (r["tokens"], r["computed"], r["as_two_rows"], r["kernels"]) == (
            256,
            256,
            2 * (243 + 6),
            ["cpu"],
        )
        assert r["seconds"] > 0 and r["parts"]["update"] > 0


@pytest.mark.usefixtures("as_a_command")
@pytest.mark.parametrize(
    ("row", "offload"),
    [("ours", "inputs"), ("ours", "inputs+attention"), ("dpo", "inputs+attention")],
)
def test_host_bytes_are_those_of_this_length(
    row: str, offload: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two lengths in one process: what the first has locked is not counted for the second."""
    settings = auto.MemorySettings(
        keep_attention=1.0, offload=offload, pool_bytes=2**30, last_layers_on_gpu=1
    )  # type: ignore[arg-type]
    real = _peer_ours.choose_memory
    monkeypatch.setattr(
        _peer_ours,
        "choose_memory",
        lambda *a, **k: dataclasses.replace(real(*a, **k), settings=settings),
    )
    torch.manual_seed(0)
    bench = Bench(Job(row, [1024, 512], **KEYS))
    _peer_ours.ours(bench)
    results = [
        json.loads(line[7:])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("RESULT ")
    ]
    assert [r["tokens"] for r in results] == [1024, 512]
    shape = SHAPES["tiny"]
    inputs = 2 * shape["hidden_size"]
    attention = 2 * shape["hidden_size"] + 4 * shape["num_attention_heads"]
    for r in results:
        away = shape["num_hidden_layers"] - 1
        used = away * r["tokens"] * (inputs + (attention if offload == "inputs+attention" else 0))
        assert r["used"] == pytest.approx(used, rel=0.01)
        slots = away * (2 if offload == "inputs+attention" else 1)
        slot = r["tokens"] * (attention if offload == "inputs+attention" else inputs)
        assert slots * slot <= r["locked"] <= slots * (slot + 2 * 4096)
