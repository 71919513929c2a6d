"""The table of ways, the best of them, and what stands beside it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from known_sizes import qwen_7b
from longfactory.config import from_mapping, load_config
from longfactory.errors import UserError
from longfactory.memory.products import document_flop
from longfactory.memory.seconds import seconds
from longfactory.memory.shapes import GPUS, machine
from longfactory.model import load
from longfactory.plan import facts
from longfactory.plan.command import DOES_NOT_FIT, FITS, NOT_ALL_PRICED, main
from longfactory.plan.curve import changed, falls, points
from longfactory.plan.sizes import SIZES, model_folder
from longfactory.plan.table import bound_by, compare, row, table, too_short, utilisation
from longfactory.train.auto import WORTH, Planned, decide_on, way
from longfactory.train.memory_plan import count_parameters

ROOT = Path(__file__).resolve().parents[2]
GiB = 2**30


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("7b")
    qwen_7b(architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return str(folder)


def planned(model: str, gpus: int = 2, gib: float = 80, **changes: object) -> Planned:
    given = {"model_name_or_path": model, "stage": "sft", "finetuning_type": "full", "bf16": True}
    given |= {"dataset": "d", "template": "qwen", "output_dir": "o", "dry_run": True}
    given |= {"per_device_train_batch_size": 1, "cutoff_len": 32768}
    cfg = from_mapping({**given, **changes})
    config = load.load_config(cfg.model, 0)
    where = machine("H100", gpus, 512 * GiB, gpu_bytes=gib * GiB)
    return Planned(cfg, config, count_parameters(cfg, config), "fsdp2", where)


def test_the_best_way_is_what_training_would_take(seven: str):
    for gib, tokens in ((80, 32768), (40, 131072)):
        run = planned(seven, 4, gib, sequence_parallel_size=4, cutoff_len=tokens)
        found = compare(run, tokens)
        assert found.best is not None and found.best.fits
        assert all(found.best.rate >= WORTH * each.rate for each in found.ways if each.fits)
        keys = dataclasses.replace(run.cfg.parallel, sequence_parallel_size="auto")
        auto = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, parallel=keys))
        assert decide_on(auto, None).sequence_parallel_size == found.best.size
        # and its numbers are those of the run that it says
        same = way(run, tokens, found.best.size, found.best.mode)
        assert same.memory.plan.table == found.best.memory.plan.table
        assert {each.size for each in found.ways} == {1, 2, 4}
        modes = {each.mode for each in found.ways if each.size == 4 and each.fits}
        assert modes == {"zigzag-ring", "llama3", "ulysses"}


def test_accumulation_counts_the_update_once(seven: str):
    run = planned(seven, sequence_parallel_size=2, gradient_accumulation_steps=4)
    found = way(run, 32768, 2)
    alone = found.memory.plan.budget.seconds
    assert 0 < found.update < alone and found.step == pytest.approx(4 * alone - 3 * found.update)
    assert found.tokens == 4 * 32768 and found.rate == found.tokens / found.step


def test_rows_too_short_for_what_is_counted(tmp_path: Path):
    """Where parameters are whole, starts of kernels are not counted, and that is said."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    qwen_7b(architectures=["Qwen2ForCausalLM"], **sizes).save_pretrained(tmp_path)
    narrow = planned(str(tmp_path), 1)

    def lines(tokens: int) -> str:
        run = dataclasses.replace(narrow, sharding="ddp")
        return "\n".join(table(run, compare(run, tokens), 989e12, [], []))

    said = "Not counted: kernel launches where parameters are not sharded."
    assert said in lines(2048) and said not in lines(2**20)
    two = planned(str(tmp_path), 2, sequence_parallel_size=2)
    assert not too_short(way(two, 2048, 2)), "FSDP2's starts are counted"


def test_what_binds(seven: str):
    run = planned(seven, 2, sequence_parallel_size=2)
    assert bound_by(way(run, 32768, 2)) == "compute"
    on_host = planned(seven, 2, sequence_parallel_size=2, optimizer_placement="host")
    assert bound_by(way(on_host, 4096, 2)) == "AdamW on the host"
    slow = dataclasses.replace(run, machine=dataclasses.replace(run.machine, links=1e9))
    assert bound_by(way(slow, 8192, 2)) == "link between GPUs"
    small = planned(seven, 2, 24, sequence_parallel_size=2)
    line = row(way(small, 2**22, 2), 989e12, "auto")
    assert " no " in line and line.endswith(("GPU memory", "host memory"))


def test_utilisation_is_of_the_products_that_a_step_needs(seven: str):
    run = planned(seven, 2, sequence_parallel_size=2)
    found = way(run, 131072, 2)
    job = found.memory.plan.job
    linear = 6 * (28 * (2 * 3584 * 128 * 32 + 3 * 3584 * 18944) + 152064 * 3584)
    attention = 6 * 131072 * 28 * 128 * 28
    each = document_flop(job.shape, 131072) / 131072
    assert each == pytest.approx(linear + attention, rel=0.02)
    share = utilisation(found, GPUS["H100"].bf16)
    assert share == pytest.approx(65536 * each / found.step / 989e12) and share < 0.6


def test_a_peak_that_falls_is_explained(seven: str):
    run = planned(seven, 2, sequence_parallel_size=2)
    ways = points(run, way(run, 32768, 2))
    peaks = [each.memory.plan.budget.gpu_total for each in ways]
    lines = falls(ways)
    fallen = [i for i in range(1, len(peaks)) if peaks[i] < 0.99 * peaks[i - 1]]
    assert len(lines) == len(fallen) > 0 and any("the host" in line for line in lines)
    assert all(each.fits for each in ways) and changed(ways[0], ways[0]) == ""


def test_context_and_disk(seven: str):
    run = planned(seven, sequence_parallel_size=2, save_total_limit=2)
    found = way(run, 32768, 2)
    text = facts.context(run.cfg, run.model_config)
    assert text == "context: the model supports 32,768 tokens."
    longer = planned(seven, cutoff_len=100000)
    assert "rope_scaling: yarn (factor 4)" in facts.context(longer.cfg, longer.model_config)
    with model_folder("gemma-3-12b") as folder:
        layered = planned(folder, cutoff_len=200000)
        text = facts.context(layered.cfg, layered.model_config)
    assert "rope_scaling: " in text and "200,000" in text
    scaled = planned(seven, cutoff_len=100000, rope_scaling="yarn")
    own = load.load_config(dataclasses.replace(scaled.cfg.model, rope_scaling=None), 0)
    assert "stretches its positions 4 times" in facts.context(scaled.cfg, own)
    # weights, AdamW's states (of split masters, remainders too), and each process's shards of the
    # weights
    for split, bytes_of_all in ((False, 4 + 8 + 4), (True, 2 + 10 + 2)):
        memory = dataclasses.replace(found.memory, split=split)
        one, model = facts.checkpoint_bytes(run, dataclasses.replace(found, memory=memory))
        assert (one, model) == (bytes_of_all * 7615616512, (2 if split else 4) * 7615616512)
    one, model = facts.checkpoint_bytes(run, found)
    assert f"{(3 * one + model) / GiB:,.1f} GiB: 2 checkpoints" in facts.disk(run, found, None)
    assert "tokenised data 4.00 GiB" in facts.disk(run, found, GiB)
    lora = planned(seven, finetuning_type="lora", lora_rank=8, sequence_parallel_size=2)
    assert facts.checkpoint_bytes(lora, way(lora, 32768, 2))[0] < GiB


def test_an_epoch_is_the_sum_of_its_rows(seven: str):
    run = planned(seven, 2, sequence_parallel_size=2)
    found = way(run, 32768, 2)
    alike = facts.Lengths(np.full(10, 32768.0), np.full(10, 32768.0**2), "")
    passes = found.memory.plan.budget.seconds - found.update
    assert facts.epoch_seconds(found, alike, 1, 1) == pytest.approx(10 * passes, rel=1e-6)
    assert "10 rows, 327,680 tokens, longest row 32,768; 10 steps" in facts.epoch(run, found, alike)
    # shorter ones, and many documents in a row, take less
    short = facts.Lengths(np.full(10, 8192.0), np.full(10, 8192.0**2), "")
    plan = found.memory.plan
    job = dataclasses.replace(plan.job, tokens=8192)
    alone = 10 * (seconds(job, plan.settings) - found.update)
    assert facts.epoch_seconds(found, short, 1, 1) == pytest.approx(alone, rel=0.1)
    packed = facts.Lengths(alike.rows, alike.squares / 16, "")
    assert facts.epoch_seconds(found, packed, 1, 1) < facts.epoch_seconds(found, alike, 1, 1)
    # two groups wait for the slower of them
    mixed = facts.Lengths(np.r_[alike.rows, short.rows], np.r_[alike.squares, short.squares], "")
    both = facts.epoch_seconds(found, mixed, 1, 1)
    assert both / 2 < facts.epoch_seconds(found, mixed, 1, 2) < both
    assert "data were not read" in facts.epoch(run, found, None)


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_are_the_models_that_they_say(name: str):
    billions = {"qwen3-30b-a3b": 30.5, "gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8, "8b": 8.03}
    billions |= {"gemma-3-12b": 11.8, "gemma-3-27b": 27.0, "deepseek-v3": 671, "72b": 72.7}
    billions |= {"0.5b": 0.494, "1.5b": 1.54, "3b": 3.09, "7b": 7.62, "14b": 14.8, "32b": 32.8}
    with model_folder(name) as folder:
        run = planned(folder)
    assert run.counts.total / 1e9 == pytest.approx(billions[name], rel=0.01)


def test_a_config_json_is_a_model(seven: str, tmp_path: Path, capsys):
    words = ["--gpus", "1", "--tokens", "4k", "memory=fast"]
    assert main([f"{seven}/config.json", *words]) == DOES_NOT_FIT
    assert "7.62 B parameters" in capsys.readouterr().out
    with model_folder(seven) as folder:
        assert folder == seven
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="has no model_type"):
        main(["--model", str(tmp_path / "config.json")])
    with pytest.raises(UserError, match="two models"):
        main([seven, "--model", "7b"])
    with pytest.raises(UserError, match=r"a run's file, model_name_or_path=..., or --model"):
        main(["--gpus", "8"])


EXAMPLES = sorted(ROOT.glob("examples/*.yaml")) + sorted(ROOT.glob("examples/long/*.yaml"))
QUICK = ("quickstart", "dpo_full", "chat", "export", "sft_7b_128k_zero3", "sft_7b_qlora")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
        for path in EXAMPLES
    ],
)
def test_every_example_is_planned(path: Path, capsys, monkeypatch):
    """By the command; the long ones with a shape in place of the hub's model."""
    monkeypatch.chdir(ROOT)
    words = [str(path), "--gpus", "16xH100" if "usp" in path.stem else "2xH100"]
    if path.stem == "dpo_full":
        words[2] = "1xH100"
    if path.parent.name == "long":
        words += ["--model", "7b"]
        if "zero3" in path.stem:
            pytest.importorskip("deepspeed")
        if "usp" not in path.stem:
            words += ["--sequence-parallel-size", "2"]
    elif path.stem in ("chat", "export"):
        with pytest.raises(UserError, match="output_dir is missing"):
            main(words)
        return
    else:
        # the shape of the embedded model, whose own file takes seconds to read
        words += ["--model", "0.5b"]
    status = main(words)
    out = capsys.readouterr().out
    assert status == (NOT_ALL_PRICED if "zero3" in path.stem else FITS), out
    found = re.findall(r"^ (?:>\*|>) +(\d+) (\S+) +(\w+) +yes +([0-9.]+)", out, re.MULTILINE)
    assert len(found) == 1 and 0.5 < float(found[0][3]) < 0.92 * 74.6
    assert len(re.findall(r"^ >?\* ", out, re.MULTILINE)) == 1 + 1  # and the legend's
    used = [int(x) for x in re.findall(r" (\d+)%  ", out)]
    assert used and all(5 <= each <= 66 for each in used), out
    rows = load_config([str(path), "--dry_run"]).longest_row
    assert f"Rows of {rows:,} tokens:" in out
