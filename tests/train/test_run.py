"""Whole runs, as the command line makes them, on a tiny model: every stage with and without
sequence parallelism, resume, saved files.
"""

from __future__ import annotations

import json
import shutil
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.errors import UserError
from longfactory.testing import RankError, run_ranks
from longfactory.train.output import write_model_card

ROOT = Path(__file__).resolve().parents[2]
from manual_runs import manual_run  # noqa: E402

pytestmark = pytest.mark.processes

DATA = {
    "sft": "manual_sft",
    "pt": "manual_pt",
    "dpo": "manual_dpo",
    "rm": "manual_dpo",
    "kto": "manual_kto",
}


def train(keys: dict[str, Any]) -> list[dict[str, float]]:
    """Body of a rank: one run; the lines of the trainer's log."""
    import os

    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.train import run as module

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    torch.manual_seed(0)
    seen: list[Any] = []
    make = module.make_trainer
    module.make_trainer = lambda *a, **k: seen.append(make(*a, **k)) or seen[-1]
    try:
        module.run(from_mapping({k: v for k, v in keys.items() if k != "cache"}))
    finally:
        module.make_trainer = make
    return seen[0].state.log_history


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return manual_run(
        folder,
        max_samples=24,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        overwrite_output_dir=True,
    )


def losses(log: list[dict[str, float]]) -> list[float]:
    return [h["loss"] for h in log if "loss" in h]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", list(DATA))
def test_a_stage_gives_the_same_curves_with_and_without_sequence_parallelism(
    stage: str, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    keys = {**base, "stage": stage, "dataset": DATA[stage], "output_dir": str(out)}
    # of an earlier run, which would be loaded with the model of this one
    left = {"adapter_config.json", "adapter_model.safetensors"}
    left |= set() if stage == "rm" else {"value_head.safetensors"}
    out.mkdir()
    for name in left:
        (out / name).write_text("{}")
    split = run_ranks(
        2,
        train,
        {**keys, "sequence_parallel_size": 2, "gradient_accumulation_steps": 2},
        timeout=300,
    )[0]
    assert (out / "model.safetensors").is_file()
    assert not left & {file.name for file in out.iterdir()}
    # A cache of its own: reference log-probabilities of another sequence_parallel_size agree up to
    # rounding, these to the last bit.
    keys["cache"] += "1"
    whole = run_ranks(
        2,
        train,
        {**keys, "sequence_parallel_size": 1, "gradient_accumulation_steps": 1},
        timeout=300,
    )[0]
    assert len(losses(split)) == 3
    for a, b in zip(split, whole, strict=True):
        for name in a:
            # The KL term of kto is a mean over the micro-batch, which accumulation makes another
            # one.
            if (
                name.startswith(("loss", "grad_norm", "rewards", "logps", "accuracy"))
                and stage != "kto"
            ):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    if stage in ("dpo",):
        assert (
            losses(split)[0]
            == losses(whole)[0]
            == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
        )
    assert split[0]["grad_norm"] > 0


def compiled_for(keys: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Body of a rank: one run; the numbers of tokens for which functions would be compiled, while
    parameters without a gradient are looked for, and otherwise.
    """
    from unittest import mock

    from longfactory.memory import compiled
    from longfactory.train import run as module

    tried: set[int] = set()
    others: set[int] = set()
    lengths = others
    own = module.refuse_unused

    def copy_for(fn: Any, arguments: tuple[Any, ...]) -> Any:
        lengths.add(len(arguments[0]))
        return types.SimpleNamespace(run=fn, checked=True, any_length=False)

    def refuse_unused(trainer: Any) -> None:
        nonlocal lengths
        lengths = tried
        own(trainer)
        lengths = others

    with (
        mock.patch.object(compiled, "compiles", lambda x: True),
        mock.patch.object(compiled, "_copy_for", copy_for),
        mock.patch.object(module, "refuse_unused", refuse_unused),
    ):
        train(keys)
    return tried, others


def test_nothing_is_compiled_before_the_first_row(base: dict[str, Any], tmp_path: Path) -> None:
    """Under DDP a row of other tokens is tried before it."""
    keys = {**base, "dataset": DATA["sft"], "output_dir": str(tmp_path / "run"), "max_steps": 1}
    for tried, others in run_ranks(2, compiled_for, {**keys, "sequence_parallel_size": 2}):
        assert not tried
        assert others


@pytest.mark.timeout(600)
# with the same size: test_optimizer_states.py, by default
@pytest.mark.parametrize("resumed_size", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_resume_goes_on_at_the_exact_sample(
    resumed_size: int, base: dict[str, Any], tmp_path: Path
) -> None:
    # 24 samples, 4 a step: an epoch has 6 steps. The checkpoint lies in its middle, the run ends in
    # the next one.
    keys = {
        **base,
        "stage": "sft",
        "dataset": "manual_sft",
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "packing": False,
    }
    through = {
        **keys,
        "output_dir": str(tmp_path / "a"),
        "sequence_parallel_size": 2,
        "gradient_accumulation_steps": 4,
    }
    log = run_ranks(2, train, through, timeout=300)[0]
    checkpoint = tmp_path / "b" / "checkpoint-4"
    shutil.copytree(tmp_path / "a" / "checkpoint-4", checkpoint)
    resumed = {
        **keys,
        "output_dir": str(tmp_path / "b"),
        "resume_from_checkpoint": str(checkpoint),
        "sequence_parallel_size": resumed_size,
        "gradient_accumulation_steps": 4 * resumed_size // 2,
    }
    again = run_ranks(2, train, resumed, timeout=300)[0]
    tolerance = {"abs": 0, "rel": 0} if resumed_size == 2 else {"abs": 1e-6, "rel": 1e-5}
    assert losses(again) == pytest.approx(losses(log), **tolerance)
    assert [h["epoch"] for h in again if "loss" in h] == [h["epoch"] for h in log if "loss" in h]


def weights(base: dict[str, Any], folder: Path) -> Path:
    """The tiny model with weights: what an adapter belongs to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base["model_name_or_path"], folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32
    ).save_pretrained(folder)
    return folder


def test_a_reward_model_keeps_its_head(base: dict[str, Any], tmp_path: Path) -> None:
    keys = {
        **base,
        "stage": "rm",
        "dataset": "manual_dpo",
        "finetuning_type": "lora",
        "max_steps": 4,
        "learning_rate": 0.05,
    }
    keys |= {
        "train_from_scratch": False,
        "model_name_or_path": str(weights(base, tmp_path / "model")),
    }
    keys |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": "manual_dpo",
        "do_train": True,
        "do_eval": True,
    }
    through = {**keys, "output_dir": str(tmp_path / "a")}
    log = run_ranks(1, train, through, timeout=300)[0]
    checkpoint = tmp_path / "b" / "checkpoint-2"
    shutil.copytree(tmp_path / "a" / "checkpoint-2", checkpoint)
    again = run_ranks(
        1,
        train,
        {**keys, "output_dir": str(tmp_path / "b"), "resume_from_checkpoint": str(checkpoint)},
        timeout=300,
    )[0]
    assert losses(again) == losses(log)

    # Evaluated by itself it is the same reward model; without its head it is none.
    alone = {
        **keys,
        "do_train": False,
        "adapter_name_or_path": str(tmp_path / "a"),
        "output_dir": str(tmp_path / "c"),
    }
    assert run_ranks(1, train, alone, timeout=300)[0][-1]["eval_loss"] == pytest.approx(
        log[-1]["eval_loss"], rel=1e-6
    )
    (tmp_path / "a" / "value_head.safetensors").unlink()
    with pytest.raises(
        RankError, match=r"has no value_head\.safetensors: it is not a reward model"
    ):
        run_ranks(1, train, alone, timeout=300)


def test_a_run_that_is_over_makes_no_further_step(base: dict[str, Any], tmp_path: Path) -> None:
    # 24 samples, 4 a step: the last of 2 steps lies in the middle of the epoch.
    keys = {
        **base,
        "stage": "sft",
        "dataset": "manual_sft",
        "max_steps": 2,
        "gradient_accumulation_steps": 4,
        "packing": False,
    }
    keys |= {
        "output_dir": str(tmp_path),
        "save_strategy": "steps",
        "save_steps": 2,
        "overwrite_output_dir": False,
    }
    run_ranks(1, train, keys, timeout=300)
    names = ("train_results.json", "trainer_state.json", "trainer_log.jsonl", "model.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert json.loads(before["train_results.json"])["train_loss"] > 1
    (tmp_path / "model.safetensors").unlink()  # as if the run had ended before it wrote it
    log = run_ranks(1, train, keys, timeout=300)[0]
    assert (
        losses(log)[-1] == losses(json.loads(before["trainer_state.json"])["log_history"])[-1]
        and len(losses(log)) == 2
    )
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_what_an_adapter_s_run_leaves_behind(base: dict[str, Any], tmp_path: Path) -> None:
    keys = {
        **base,
        "stage": "kto",
        "dataset": "manual_kto",
        "finetuning_type": "lora",
        "max_steps": 2,
        "plot_loss": True,
    }
    keys |= {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    keys |= {
        "eval_dataset": "manual_kto,again",
        "eval_on_each_dataset": True,
        "dataset_dir": str(tmp_path / "data"),
    }
    shutil.copytree(ROOT / "data", tmp_path / "data")
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({**info, "again": info["manual_kto"]})
    )
    run_ranks(1, train, keys, timeout=300)
    card = (tmp_path / "README.md").read_text()
    assert (
        "trained by LongFactory: stage kto, lora, data manual_kto." in card
        and "More Information Needed" not in card
    )
    assert {"training_rewards_chosen.png", "training_eval_again_loss.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_again_loss"] > 0

    # A run that evaluates alone says nothing of training; a card of one's own stays.
    alone = {
        **keys,
        "do_train": False,
        "do_eval": True,
        "eval_strategy": "no",
        "output_dir": str(tmp_path / "alone"),
    }
    run_ranks(1, train, alone, timeout=300)
    assert not (tmp_path / "alone" / "README.md").exists()
    (tmp_path / "README.md").write_text("My own words.")
    cfg = types.SimpleNamespace()
    write_model_card(cfg, str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "My own words."


def test_resume_with_another_batch_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    keys = {
        **base,
        "stage": "sft",
        "dataset": "manual_sft",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    keys |= {"output_dir": str(tmp_path / "a"), "sequence_parallel_size": 2}
    run_ranks(2, train, keys, timeout=300)
    keys |= {
        "resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-1"),
        "gradient_accumulation_steps": 3,
    }
    with pytest.raises(RankError, match=r"made with 1 samples an optimizer step; this run takes 3"):
        run_ranks(2, train, keys, timeout=300)


def test_the_saved_folder_is_a_plain_checkpoint(base: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = {
        **base,
        "stage": "sft",
        "dataset": "manual_sft",
        "eval_dataset": "manual_sft_eval",
        "output_dir": str(tmp_path / "out"),
    }
    keys |= {
        "sequence_parallel_size": 2,
        "do_train": True,
        "do_eval": True,
        "plot_loss": True,
        "include_num_input_tokens_seen": True,
    }
    run_ranks(2, train, keys, timeout=300)
    out = tmp_path / "out"
    expected = {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "train_results.json",
        "eval_results.json",
        "all_results.json",
    }
    expected |= {
        "trainer_log.jsonl",
        "trainer_state.json",
        "training_loss.png",
        "README.md",
        "longfactory.yaml",
    }
    assert expected <= {p.name for p in out.iterdir()}
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    fields = {
        "current_steps",
        "total_steps",
        "loss",
        "lr",
        "epoch",
        "percentage",
        "elapsed_time",
        "remaining_time",
        "total_tokens",
    }
    assert fields <= set(lines[0])
    # A row's own steps: tokens of both processes, and seconds that are not those of start-up.
    rows = [line for line in lines if "loss" in line]
    counted = [r["tokens_per_second_per_gpu"] * 2 * r["seconds_per_step"] for r in rows]
    totals = [0, *(r["total_tokens"] for r in rows)]
    assert counted == pytest.approx([b - a for a, b in pairwise(totals)], rel=2e-3)
    assert sum(r["seconds_per_step"] for r in rows) < rows[-1]["elapsed_seconds"]
    assert all(0 <= r["padding"] < 0.2 and 0 < r["data_wait"] < 1 for r in rows)
    assert all(0.1 < r["peak_memory_gib"] < 100 for r in rows) and "mfu" not in rows[0]
    # What a checkpoint keeps of the log does not hold times.
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert not {"seconds_per_step", "data_wait"} & {name for row in history for name in row}

    # The evaluation under sequence parallelism is the token mean that plain transformers computes.
    from longfactory.config import from_mapping
    from longfactory.train.prepare import load_data

    cfg = from_mapping({k: v for k, v in keys.items() if k != "cache"})
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    data = load_data(cfg, tokenizer).eval["eval"]
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(data)):
            for d in data[i]:
                ids, labels = torch.tensor(list(d.input_ids)), torch.tensor(list(d.labels))
                logp = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)
                keep = labels[1:] >= 0
                total -= logp.gather(1, labels[1:].clamp(min=0)[:, None])[:, 0][keep].sum().item()
                count += int(keep.sum())
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] == pytest.approx(
        total / count, rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": "./no/such/folder"}, "does not exist"),
        ({"dataset": "nothing"}, "nothing"),
        ({"max_samples": 1, "cutoff_len": 4, "cutoff_strategy": "drop"}, "empty"),
        (
            {"max_samples": 2, "cutoff_len": 1},
            "None of the 2 training samples has a trained token left",
        ),
        ({"attention_dropout": 0.1}, "dropout of attention weights is not computed"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "trains nothing"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -1, "use_llama_pro": True},
            "use_llama_pro trains every",
        ),
        (
            {"max_samples": 3, "per_device_train_batch_size": 4, "dataloader_drop_last": True},
            "dataloader_drop_last leaves no step: 3 samples",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: cosine_with_min_lr cannot be made.*min_lr",
        ),
    ],
)
def test_a_wrong_input_is_one_clear_message(
    change: dict[str, Any], message: str, base: dict[str, Any], tmp_path: Path
) -> None:
    keys = {
        **base,
        "stage": "sft",
        "dataset": "manual_sft",
        "output_dir": str(tmp_path / "out"),
        **change,
        "train_from_scratch": False,
    }
    if "model_name_or_path" not in change:
        keys["train_from_scratch"] = True
    with pytest.raises(RankError, match=message) as error:
        run_ranks(1, train, keys, timeout=100)
    assert UserError.__name__ in str(error.value) or "DataError" in str(error.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_environment_is_written_where_processes_start_alone() -> None:
    """Of what a run imports: the step that opens the process group, and the starts of processes."""
    import ast

    import longfactory

    writers = set()
    source = Path(longfactory.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr=name)):
                    written = name in ("update", "pop", "setdefault", "clear")
                case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=context):
                    written = not isinstance(context, ast.Load)
                case _:
                    written = False
            if written:
                writers.add(str(path.relative_to(source)))
    assert writers == {
        "launch.py",
        "terminal.py",  # how often the bars of other packages write
        "testing.py",
        "data/prepare.py",
        "data/stream.py",
        "shard/settings.py",
        "train/groups.py",
        "webui/preview.py",  # a process of its own
    }
