"""`auto` in sequence_parallel_size, cutoff_len and memory, and `plan --calibrate`, through the
command on GPUs.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

GiB = 2**30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def command(folder: Path, *words: str, limit: float = 120) -> tuple[str, float]:
    """What `longfactory` printed, and its seconds."""
    env = {**os.environ, "RECORD_VRAM": "1", "LONGFACTORY_CACHE": str(folder / "cache")}
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout, time.time() - begun


def test_rates_are_measured_in_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every rate, each within what such a machine can have; and a plan takes them."""
    from longfactory.plan import command as plan

    said, seconds = command(tmp_path, "plan", "--calibrate", str(tmp_path / "rates.json"))
    with capsys.disabled():
        print(f"plan --calibrate, {seconds:.1f} s:\n{said}", flush=True)
    rates = json.loads((tmp_path / "rates.json").read_text())
    gpus = torch.cuda.device_count()
    assert rates["gpu"] == torch.cuda.get_device_name(0)
    assert rates["gpus"] == (gpus if gpus > 1 else 0)
    highest = {"products": 3e15, "attention_forward": 3e15, "attention_backward": 3e15}
    highest |= {"copies": 1e12, "host_memory": 2e12, "wide_heads": 1.5}
    if gpus > 1:
        highest["links"] = 2e12
    for name, most in highest.items():
        assert most / 1000 < rates[name] < most, name
    words = ["--model", "7b", "--gpus", f"1x{rates['gpu']}", "--tokens", "16k"]
    assert plan.main(words) in (0, 1)
    usual = step_of(capsys.readouterr().out)
    assert plan.main([*words, "--calibrated", str(tmp_path / "rates.json")]) in (0, 1)
    measured = step_of(capsys.readouterr().out)
    with capsys.disabled():
        print(f"7b, 16k: usually {usual} s a row, with these rates {measured} s", flush=True)
    assert measured == pytest.approx(usual, rel=0.5) and measured != usual
    assert seconds < 60


def step_of(text: str) -> float:
    """Seconds of a row that a plan predicts."""
    found = re.search(r"predicted: ([0-9.]+) s (?:a|per) row", text)
    assert found, text
    return float(found[1])


def run_keys(folder: Path, name: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A run on samples of which the longest has so many tokens and a few more of its template."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from make_model import make_model
    from plan_accuracy import FURTHER

    model = folder / "model"
    if not model.exists():
        make_model("qwen2.5-7b", model)
        shape = {**FURTHER["qwen2.5-1.5b"], "num_hidden_layers": 8}
        (model / "config.json").write_text(json.dumps(shape))
    tokenizer = AutoTokenizer.from_pretrained(model)
    manual = "\n\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(manual)["input_ids"]
    ids = ids * (tokens // len(ids) + 1)
    data = folder / f"data-{name}"
    data.mkdir()
    rows = [
        {"instruction": "Print the manual.", "output": tokenizer.decode(ids[: tokens // part])}
        for part in (1, 3, 2, 5)
    ]
    (data / "answers.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text('{"answers": {"file_name": "answers.json"}}')
    return {
        "model_name_or_path": model,
        "train_from_scratch": "true",
        "stage": "sft",
        "finetuning_type": "full",
        "template": "chatml",
        "dataset": "answers",
        "dataset_dir": data,
        "cutoff_len": "auto",
        "sequence_parallel_size": "auto",
        "memory": "auto",
        "bf16": "true",
        "sharding": "fsdp2",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_final_model": "false",
        "report_to": "none",
        "preprocessing_num_workers": 1,
        "output_dir": folder / f"out-{name}",
        "nproc_per_node": 2,
        **more,
    }


def trained(folder: Path, keys: dict[str, Any]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """What a run said, the keys that its folder holds, and its log."""
    said, seconds = command(folder, "train", *(f"{k}={v}" for k, v in keys.items()), limit=150)
    lines = [line for line in said.splitlines() if "auto" in line]
    print(f"{keys['output_dir'].name}, {seconds:.1f} s:", *lines, sep="\n", flush=True)
    out = Path(keys["output_dir"])
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    return said, yaml.safe_load((out / "longfactory.yaml").read_text()), log


def check(
    said: str, ran: dict[str, Any], log: list[dict[str, Any]], tokens: int, size: int
) -> None:
    """The numbers in place of `auto`, steps with them, and a peak as it was planned."""
    assert tokens <= ran["cutoff_len"] < tokens + 100
    assert f"cutoff_len: auto is {ran['cutoff_len']:,}, the longest sample of the data." in said
    assert ran["sequence_parallel_size"] == size
    assert f"sequence_parallel_size: auto is {size}" in said
    assert "Memory plan (memory: auto)" in said and "cut to" not in said
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    total = re.search(r"^ +total +([0-9.]+) +of", said, re.MULTILINE)
    runtime = re.search(r"^ +runtime +([0-9.]+)$", said, re.MULTILINE)
    assert total and runtime
    planned = float(total[1]) - float(runtime[1])
    peak = max(line.get("vram_allocated", 0.0) for line in log)
    print(f"planned {planned:.1f} GiB, peak {peak:.1f} GiB, losses {losses}")
    assert peak == pytest.approx(planned, rel=0.2)


@two_gpus
def test_rows_that_fit_one_gpu_are_not_shared(tmp_path: Path) -> None:
    keys = run_keys(tmp_path, "short", 8192)
    check(*trained(tmp_path, keys), 8192, 1)


@two_gpus
def test_rows_that_fit_two_gpus_alone_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every activation stored, samples a third longer than what one GPU holds."""
    from longfactory.config import load_config
    from longfactory.train import auto

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    stored = {"disable_gradient_checkpointing": "true"}
    keys = run_keys(tmp_path, "probe", 64, **stored)
    cfg = load_config([f"{k}={v}" for k, v in keys.items()])
    planned = auto.planned_here(auto.with_length(cfg, 64), 2, True)
    tokens = 4 * auto.longest_row(planned, 1) // 3
    assert tokens > 8192
    keys = run_keys(tmp_path, "long", tokens, **stored)
    said, ran, log = trained(tmp_path, keys)
    assert "1: no room" in said
    check(said, ran, log, tokens, 2)
