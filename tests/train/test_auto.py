"""`sequence_parallel_size: auto` and `cutoff_len: auto`: what they become, and by what."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from known_sizes import qwen_7b
from longfactory.config import RunConfig, from_mapping
from longfactory.config.folder import MANIFEST, configuration_digest
from longfactory.errors import ConfigError, UserError
from longfactory.memory.shapes import machine
from longfactory.model import load
from longfactory.train import auto
from longfactory.train.auto import Decision, Planned, decide_on, longest_row, of_checkpoint, way
from longfactory.train.memory_plan import count_parameters
from longfactory.train.prepare import load_data
from small_runs import home, keys, run_keys  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
GiB = 2**30


def configured(model: Path, **changes: Any) -> RunConfig:
    given = {"model_name_or_path": str(model), "stage": "sft", "finetuning_type": "full"}
    given |= {"dataset": "d", "template": "chatml", "output_dir": "nowhere", "bf16": True}
    given |= {"per_device_train_batch_size": 1, "dry_run": True}
    return from_mapping({**given, **changes})


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("7b")
    qwen_7b(architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return folder


def planned(seven: Path, gpus: int = 4, gib: float = 80, **changes: Any) -> Planned:
    cfg = configured(seven, **changes)
    config = load.load_config(cfg.model, 0)
    counts = count_parameters(cfg, config)
    where = machine("H100", gpus, 256 * GiB, gpu_bytes=gib * GiB)
    return Planned(cfg, config, counts, "fsdp2" if gpus > 1 else "none", where)


def test_the_size_is_the_fastest_that_fits(seven: Path):
    run = planned(seven, 4, 40, sequence_parallel_size="auto", cutoff_len=65536)
    found = decide_on(run, None)
    ways = [way(run, 65536, n) for n in (1, 2, 4)]
    assert [w.size for w in ways if w.fits] == [1, 2, 4]
    fastest = max(w.rate for w in ways)
    chosen = next(w for w in ways if w.size == found.sequence_parallel_size)
    assert chosen.fits and chosen.rate >= auto.WORTH * fastest
    assert found.cutoff_len is None and "tokens/s per GPU, by size" in found.lines[0]
    # One GPU cannot hold such a row, several can.
    far = longest_row(run, 1) + 8192
    assert not way(run, far, 1).fits
    longer = dataclasses.replace(run, cfg=auto.with_length(run.cfg, far))
    size = decide_on(longer, None).sequence_parallel_size
    assert size is not None and size > 1 and way(run, far, size).fits


def test_the_best_of_several_ways():
    """The fastest that fits; of those that are as fast, one that needs nothing of the host."""

    def made(name: str, rate: float, host: float = 0, fits: bool = True) -> Any:
        budget = types.SimpleNamespace(host_total=host)
        memory = types.SimpleNamespace(plan=types.SimpleNamespace(budget=budget))
        return types.SimpleNamespace(name=name, rate=rate, fits=fits, memory=memory)

    for ways, expected in (
        ([("slow", 90), ("fast", 100)], "fast"),
        ([("as fast", 98), ("fast", 100)], "as fast"),
        ([("on the host", 100, 1), ("as fast", 98), ("also", 99)], "as fast"),
        ([("on the host", 100, 1), ("slow", 90)], "on the host"),
        ([("too large", 200, 0, False), ("fits", 10)], "fits"),
    ):
        found = auto.best([made(*each) for each in ways])
        assert found is not None and found.name == expected  # type: ignore[attr-defined]
    assert auto.best([made("too large", 200, 0, False)]) is None


def test_the_length_is_that_of_the_longest_sample_or_what_fits(seven: Path):
    run = planned(seven, 2, 40, sequence_parallel_size=2, cutoff_len="auto", stage="dpo")
    most = longest_row(run, 2) // 2  # two answers of a pair
    assert most > 10000
    short, long = decide_on(run, 5000), decide_on(run, 10 * most)
    assert (short.cutoff_len, long.cutoff_len) == (5000, most)
    assert f"longest sample has {10 * most:,}" in long.lines[0]
    assert way(run, 2 * most, 2).fits and not way(run, 2 * most + 8192, 2).fits
    applied = long.applied(run.cfg)
    assert applied.longest_row == 2 * most and applied.decided == ("cutoff_len",)
    tight = dataclasses.replace(run, machine=machine("H100", 2, 2 * GiB, gpu_bytes=4 * GiB))
    with pytest.raises(UserError, match="rows of 256 tokens do not fit"):
        decide_on(tight, 5000)


def test_the_digest_of_a_command_is_that_of_what_was_written(seven: Path):
    cfg = configured(seven, sequence_parallel_size="auto", cutoff_len="auto")
    applied = Decision(4, 8192).applied(cfg)
    assert applied.sequence_parallel_size == 4 and applied.cutoff_len == 8192
    assert configuration_digest(applied) == configuration_digest(cfg)
    numbers = configured(seven, sequence_parallel_size=4, cutoff_len=8192)
    assert configuration_digest(numbers) != configuration_digest(cfg)


def test_a_checkpoint_says_what_may_be(seven: Path, tmp_path: Path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    then = {"cutoff_len": 4096, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    world = {"processes": 8, "sequence_parallel_size": 4}
    manifest = {"configuration": then, "world": world}
    (checkpoint / MANIFEST).write_text(json.dumps({"manifest": manifest}))
    cfg = configured(
        seven, sequence_parallel_size="auto", cutoff_len="auto", gradient_accumulation_steps=2
    )
    cfg = dataclasses.replace(cfg, checkpoints=(str(checkpoint),))
    # two groups then: on 8 processes 4 each, on 16 8 each, and on 1 none
    assert of_checkpoint(cfg, 8).sequence_parallel_size == 4
    assert of_checkpoint(cfg, 16).sequence_parallel_size == 8
    alone = of_checkpoint(cfg, 1)
    assert alone.sequence_parallel_size is None and "cannot make steps of 4" in alone.lines[1]
    assert alone.cutoff_len == 4096
    assert of_checkpoint(dataclasses.replace(cfg, checkpoints=()), 8) == Decision()


def test_what_cannot_be_auto_is_refused(seven: Path):
    for changes, sentence in (
        ({"cutoff_len": "auto", "streaming": True, "max_steps": 3}, "which streaming does not"),
        (
            {
                "sequence_parallel_size": "auto",
                "sequence_parallel_mode": "usp",
                "sequence_parallel_ulysses_degree": 2,
            },
            "this run's is auto",
        ),
        ({"cutoff_len": "automatic"}, "got 'automatic', expected"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            configured(seven, **changes)


@pytest.mark.parametrize(("stage", "data"), [("sft", "sft"), ("dpo", "dpo"), ("pt", "pt")])
def test_the_longest_sample_is_cut_by_a_token_less(stage: str, data: str, home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LONGFACTORY_CACHE", str(home / "cache"))
    cfg = configured(
        home / "model",
        stage=stage,
        dataset=f"manual_{data}",
        dataset_dir=str(ROOT / "data"),
        cutoff_len="auto",
        max_samples=20,
        packing=True if stage == "sft" else None,
    )
    tokenizer = load.load_tokenizer(cfg.model)
    longest = auto.longest_sample(load_data(auto.uncut(cfg), tokenizer, quiet=True))
    # a text that is packed is not cut but divided
    plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=False))
    for cutoff, cut in ((longest, 0), (longest - 1, 1)):
        report = load_data(auto.with_length(plain, cutoff), tokenizer, quiet=True).train.report
        assert (report.truncated > 0) == bool(cut), (cutoff, report)


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch):
    """Before the group is open: through the store by which the processes have met."""
    store = torch.distributed.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    mine = [Decision(2, 4096, ("because",)), Decision(1, 8192, ("here is less memory",))]
    found = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        found.append(auto.share(mine[rank], store))
    assert found == [mine[0], mine[0]]
    assert auto.share(mine[1], None) == mine[1]


@pytest.mark.processes
def test_a_run_decides_and_resumes_with_what_it_had(home: Path):  # noqa: F811
    """Two processes: on a machine without GPUs nothing binds, so each has its own rows; a run that
    goes on from a checkpoint takes the checkpoint's groups.
    """
    both: dict[str, Any] = {"sequence_parallel_size": "auto", "cutoff_len": "auto"}
    plain = {"packing": False, "max_steps": 2, "overwrite_output_dir": None}
    run_keys(keys(home, "auto", **both, **plain), 2, home / "cache")
    written = yaml.safe_load((home / "auto" / "longfactory.yaml").read_text())
    talks = json.loads((home / "talks.json").read_text())
    assert written["sequence_parallel_size"] == 1
    assert isinstance(written["cutoff_len"], int)
    assert written["cutoff_len"] > max(len(t["instruction"] + t["output"]) for t in talks)

    saved = {**plain, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    first = {**both, "sequence_parallel_size": 2, "cutoff_len": 40}
    run_keys(keys(home, "resumed", **saved, **first), 2, home / "cache")
    run_keys(keys(home, "resumed", **{**saved, "max_steps": 3}, **both), 2, home / "cache")
    written = yaml.safe_load((home / "resumed" / "longfactory.yaml").read_text())
    assert (written["sequence_parallel_size"], written["cutoff_len"]) == (2, 40)
    state = json.loads((home / "resumed" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert all(math.isfinite(h["loss"]) for h in state["log_history"] if "loss" in h)
