"""Whole runs of the preference stages, from a configuration to saved files: one process against
two, cached references, resuming.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from longfactory.testing import RankError
from small_runs import POOLS, STEPS, run_keys, steps, text, write_model

pytestmark = pytest.mark.processes

LOG2 = torch.tensor(math.log(2)).item()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model with a tokenizer, another one to refer to, and data for every stage."""
    home = tmp_path_factory.mktemp("runs")
    for name, seed in (("model", 0), ("other", 1)):
        write_model(home / name, seed)
    random.seed(0)
    pairs = [
        {"prompt": text(12 + i), "chosen": text(6 + 3 * i), "rejected": text(20 - i)}
        for i in range(12)
    ]
    ktos = [{"prompt": text(9), "answer": text(5 + i), "label": i % 3 != 0} for i in range(12)]
    (home / "pairs.json").write_text(json.dumps(pairs))
    (home / "kto.json").write_text(json.dumps(ktos))
    info = {
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
        "kto": {
            "file_name": "kto.json",
            "columns": {"prompt": "prompt", "response": "answer", "kto_tag": "label"},
        },
    }
    (home / "dataset_info.json").write_text(json.dumps(info))
    yield home
    for pool in POOLS.values():
        pool.stop()


PAIRS: dict[str, Any] = {
    "stage": "dpo",
    "dataset": "pairs",
    "packing": None,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "precompute_ref_log_probs": True,
    "optim": "sgd",
    "adam_epsilon": None,
}


def train(home: Path, name: str, size: int, **changes: Any) -> list[dict[str, float]]:
    """The log of a run's steps; its output folder is `home / name`."""
    return steps(small_runs.train(home, name, size, **PAIRS | changes))


def losses_of(log: list[dict[str, float]]) -> list[float]:
    return [h["loss"] for h in log]


def test_reference_numbers_are_computed_once_for_all_sizes(home: Path) -> None:
    cache = home / "cache_once"
    one = train(home, "one", 1, cache=cache)
    (file,) = (cache / "reference").iterdir()
    before = file.stat().st_mtime_ns
    two = train(home, "two", 2, cache=cache)
    own = train(home, "own", 2, cache=home / "cache_own")
    assert list((cache / "reference").iterdir()) == [file] and file.stat().st_mtime_ns == before
    assert one[0]["loss"] == LOG2 and own[0]["loss"] == LOG2  # to the last bit
    # numbers made by one process, read by two: up to rounding
    assert two[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert one[0]["rewards/margins"] == 0.0
    for other in (two, own):
        assert losses_of(other) == pytest.approx(losses_of(one), rel=2e-5)
        assert [h["grad_norm"] for h in other] == pytest.approx(
            [h["grad_norm"] for h in one], rel=1e-4
        )
        assert [h["rewards/margins"] for h in other] == pytest.approx(
            [h["rewards/margins"] for h in one], abs=1e-4
        )
    assert losses_of(one)[-1] != LOG2


LORA = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "learning_rate": 0.1}


@pytest.mark.parametrize("size", [1, 2])
def test_adapter_off_needs_no_second_pass_over_the_data(home: Path, size: int) -> None:
    off = train(
        home,
        f"off{size}",
        size,
        **LORA,
        precompute_ref_log_probs=False,
        cache=home / f"cache_off{size}",
    )
    kept = train(home, f"kept{size}", size, **LORA, cache=home / f"cache_kept{size}")
    assert off[0]["loss"] == LOG2 and kept[0]["loss"] == LOG2
    assert losses_of(off) == pytest.approx(losses_of(kept), rel=1e-6)
    assert losses_of(off)[-1] != LOG2
    assert not (home / f"cache_off{size}" / "reference").exists()


def test_pissa_starts_from_its_reference(home: Path) -> None:
    """Its base weights are not the model's: the reference is the model with the adapter, before the
    first step.
    """
    log = train(
        home,
        "pissa",
        1,
        **LORA,
        pissa_init=True,
        precompute_ref_log_probs=None,
        cache=home / "cache_pissa",
    )
    assert log[0]["loss"] == LOG2 and log[-1]["loss"] != LOG2


def test_another_reference_model(home: Path) -> None:
    other = [train(home, f"other{size}", size, ref_model=home / "other") for size in (1, 2)]
    assert abs(other[0][0]["loss"] - LOG2) > 1e-4
    assert losses_of(other[0]) == pytest.approx(losses_of(other[1]), rel=2e-5)


STAGES: dict[str, dict[str, Any]] = {
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "ipo": {"pref_loss": "ipo", "pref_ftx": 0.1},
    "aot": {"pref_loss": "aot"},
    "kto": {"stage": "kto", "dataset": "kto"},
    "rm": {"stage": "rm", "precompute_ref_log_probs": None},
}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_two_processes_train_what_one_trains(home: Path, name: str) -> None:
    """Losses, norms and metrics; in training and in evaluation on held-out pairs."""
    changes = {
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "per_device_eval_batch_size": 2,
        **STAGES[name],
    }
    # References of their own: a log-ratio of 0 against one of 1e-7 would be another reward
    # accuracy.
    one, two = (
        train(home, f"{name}{n}", n, **changes, cache=home / f"cache_{name}{n}") for n in (1, 2)
    )
    assert len(one) == STEPS and one[0].keys() == two[0].keys()
    assert ("logits/chosen" in one[0]) == (name != "rm")
    for a, b in zip(one, two, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
    evaluated = [
        [
            h
            for h in json.loads((home / f"{name}{n}" / "trainer_state.json").read_text())[
                "log_history"
            ]
            if "eval_loss" in h
        ][-1]
        for n in (1, 2)
    ]
    own = {"rm": "eval_accuracy", "kto": "eval_kl"}
    wanted = own.get(name, "eval_rewards/accuracies")
    for key in ("eval_loss", wanted):
        assert evaluated[0][key] == pytest.approx(evaluated[1][key], rel=1e-3, abs=1e-4)
    if name == "rm":
        assert (home / "rm2" / "value_head.safetensors").is_file()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"precompute_ref_log_probs": None, "finetuning_type": "lora"}],
    ids=["full", "lora"],
)
def test_an_evaluation_without_training_has_its_reference(
    home: Path, size: int, changes: dict[str, Any]
) -> None:
    """The model is its own reference."""
    keys = {
        "model_name_or_path": home / "model",
        "stage": "dpo",
        "do_eval": True,
        "finetuning_type": "full",
        "eval_dataset": "pairs",
    }
    keys |= {
        "dataset_dir": home,
        "template": "chatml",
        "cutoff_len": 128,
        "output_dir": home / f"eval{size}{len(changes)}",
        "use_cpu": True,
    }
    keys |= {
        "report_to": "none",
        "sequence_parallel_size": size,
        "precompute_ref_log_probs": True,
        "per_device_eval_batch_size": 2,
    } | changes
    run_keys(keys, size, home / "cache_eval")
    results = json.loads((Path(str(keys["output_dir"])) / "eval_results.json").read_text())
    # The second size reads the numbers of the first.
    assert results["eval_loss"] == pytest.approx(LOG2, abs=1e-6) and results[
        "eval_rewards/margins"
    ] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("cutoff", [128, 40], ids=["whole", "cut"])
@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_a_shared_prompt_changes_nothing(home: Path, stage: str, cutoff: int) -> None:
    """The same losses and norms from rows in which the prompt stands once; `cut`: answers are cut
    too, and not always alike.
    """
    keys = {
        "stage": stage,
        "dataset": "kto" if stage == "kto" else "pairs",
        "cutoff_len": cutoff,
        "include_num_input_tokens_seen": True,
    }
    keys |= {"precompute_ref_log_probs": None}
    logs = [
        train(
            home, f"{stage}{share}", 1, **keys, pref_share_prompt=share, cache=home / "cache_share"
        )
        for share in (False, True)
    ]
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in logs[1]] == pytest.approx(
            [h[key] for h in logs[0]], rel=1e-4, abs=1e-6
        )
    assert logs[1][-1]["num_input_tokens_seen"] < logs[0][-1]["num_input_tokens_seen"]


def test_a_run_goes_on_at_another_size(home: Path) -> None:
    """Two steps on one process, then two on two: the steps of an unbroken run, with the stored
    reference and the running mean of bco.
    """
    cache, bco = (
        home / "cache_resume",
        {
            "pref_bco_weight": 0.5,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    )
    whole = train(home, "whole", 1, cache=cache, **bco)
    shutil.rmtree(home / "whole" / f"checkpoint-{STEPS}")
    resumed = {
        "overwrite_output_dir": None,
        "resume_from_checkpoint": home / "whole" / "checkpoint-2",
    }
    rest = train(home, "rest", 2, cache=cache, **bco, **resumed)
    # the log of a resumed run holds the steps before it
    assert losses_of(rest) == pytest.approx(losses_of(whole), rel=2e-5)
    state = json.loads(
        (home / "rest" / f"checkpoint-{STEPS}" / "longfactory_state.json").read_text()
    )
    # rewards of all pairs seen, not only of those since
    assert state["stage"]["rewards"][1] == 2 * 3 * STEPS
    with pytest.raises(
        RankError, match="the reference log-probabilities of the initial model are not in the cache"
    ):
        train(home, "late", 1, cache=home / "cache_gone", **bco, **resumed)


def test_other_weights_at_the_same_path_are_noticed(home: Path) -> None:
    """The reference numbers of an adapter are not used for one that was trained again into the same
    folder.
    """
    cache, adapter = home / "cache_adapter", home / "adapter"
    for learning_rate in (0.1, 0.2):
        train(
            home,
            "adapter",
            1,
            **LORA | {"learning_rate": learning_rate},
            precompute_ref_log_probs=False,
        )
        log = train(
            home,
            "after",
            1,
            finetuning_type="full",
            ref_model=home / "model",
            ref_model_adapters=adapter,
            cache=cache,
        )
        assert abs(log[0]["loss"] - LOG2) > 1e-4
    assert len(list((cache / "reference").iterdir())) == 2


def test_lengths_are_those_of_the_documents(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What batches are planned by is what the rows will hold, whichever prompts can be shared after
    truncation.
    """
    from longfactory.config import load_config
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    monkeypatch.setenv("LONGFACTORY_CACHE", str(home / "cache_lengths"))
    shared = 0
    for cutoff in (128, 44, 40, 36, 20):
        argv = [
            "stage=kto",
            "do_train=true",
            "dataset=kto",
            "template=chatml",
            "use_cpu=true",
            f"cutoff_len={cutoff}",
            "finetuning_type=full",
        ]
        cfg = load_config(
            [
                *argv,
                f"model_name_or_path={home / 'model'}",
                f"dataset_dir={home}",
                f"output_dir={home / 'none'}",
            ]
        )
        data = load_data(cfg, load.load_tokenizer(cfg.model)).train
        assert data is not None
        for i in range(len(data)):
            assert int(data.lengths[i]) == sum(len(d.input_ids) for d in data[i])
            shared += len(data[i]) == 3
    assert shared > 20
