"""Whole runs of methods that are switched on by a key: one process against two that share each
sequence, from a configuration to saved files.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from longfactory.testing import RankError
from small_runs import POOLS, STEPS, assert_same_log, home, keys, steps, train

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture


def write_rollouts(folder: Path) -> Path:
    """Twelve groups of two or three rollouts of one prompt, with advantages of tokens or rollouts
    and with log-probabilities of a policy near the model (which knows about a hundred tokens).
    """
    draw = random.Random(3)
    rows = []
    for group in range(12):
        prompt = [draw.randrange(3, 90) for _ in range(draw.randrange(2, 14))]
        for _ in range(2 + group % 2):
            n = draw.randrange(3, 20)
            rows.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": [draw.randrange(3, 90) for _ in range(n)],
                    "completion_mask": [1, *(int(draw.random() < 0.8) for _ in range(n - 1))],
                    "advantages": [draw.gauss(0, 1) for _ in range(n)],
                    "logprobs": [draw.gauss(-5.5, 0.4) for _ in range(n)],
                    "ref_logprobs": [draw.gauss(-5.5, 0.2) for _ in range(n)],
                    "group": group,
                }
            )
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RL: dict[str, dict[str, Any]] = {
    "dapo": {"rl_clip_high": 0.28, "packing": True},
    "grpo": {
        "rl_normalization": "sequence",
        "rl_kl_beta": 0.1,
        "sequence_parallel_mode": "ulysses",
        "gradient_accumulation_steps": 2,
    },
    "gspo": {"rl_ratio": "sequence", "rl_normalization": "sequence", "rl_share_prompt": False},
}
SLOW = {
    "cispo": {"rl_loss": "reinforce", "rl_is_cap": 1.3},
    "nll": {"rl_loss": "nll", "rl_normalization": "constant", "rl_constant_length": 20},
}


@pytest.mark.parametrize("name", [*RL, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_two_processes_learn_from_rollouts_what_one_learns(home: Path, name: str) -> None:
    changes = {
        "stage": "rl",
        "dataset": write_rollouts(home),
        "val_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **{**RL, **SLOW}[name],
    }
    one, two = (train(home, f"rl {name}{n}", n, **changes) for n in (1, 2))
    assert_same_log(one, two)
    assert {"advantage", "staleness", "ratio", "kl"} <= steps(one)[0].keys()
    assert steps(one)[0]["grad_norm"] > 1e-3


def test_a_shared_prompt_changes_nothing(home: Path) -> None:
    changes = {"stage": "rl", "dataset": write_rollouts(home), "packing": False}
    changes |= {"rl_normalization": "sequence"}
    # one group a step either way: as many rollouts as it has
    changes |= {"disable_shuffling": True, "per_device_train_batch_size": 5}
    together = train(home, "rl shared", 1, **{**changes, "per_device_train_batch_size": 2})
    apart = train(home, "rl apart", 1, rl_share_prompt=False, **changes)
    for a, b in zip(steps(together), steps(apart), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


METHODS: dict[str, dict[str, Any]] = {
    "oft": {"finetuning_type": "oft", "oft_block_size": 8, "learning_rate": 1e-2},
    "muon": {"use_muon": True, "learning_rate": 1e-3},
    "smoothing": {"label_smoothing_factor": 0.2},
    "pissa": {
        "finetuning_type": "lora",
        "pissa_init": True,
        "pissa_convert": True,
        "learning_rate": 1e-2,
    },
}


@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_train_what_one_trains(home: Path, name: str) -> None:
    one, two = (train(home, f"{name}{n}", n, **METHODS[name]) for n in (1, 2))
    assert len(steps(one)) == STEPS
    for a, b in zip(steps(one), steps(two), strict=True):
        for key in ("loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), key
    assert steps(one)[0]["loss"] != steps(one)[-1]["loss"]
    if name == "pissa":
        saved = home / "pissa2" / "pissa_converted"
        assert json.loads((saved / "adapter_config.json").read_text())["r"] == 16


DISTILL: dict[str, dict[str, Any]] = {
    "forward": {"distill_top_k": 8, "val_size": 3, "eval_strategy": "steps", "eval_steps": 2},
    "js": {
        "distill_top_k": 259,
        "distill_loss": "js",
        "distill_alpha": 0.5,
        "sequence_parallel_mode": "ulysses",
    },
}


@pytest.mark.parametrize("name", ["forward", pytest.param("js", marks=pytest.mark.slow)])
def test_two_processes_learn_from_a_teacher_what_one_learns(home: Path, name: str) -> None:
    """The teacher's numbers are made by each run's own pass (caches are apart), and read again."""
    changes = {"stage": "distill", "teacher_model": home / "other", **DISTILL[name]}
    one, two = (
        train(home, f"distill {name}{n}", n, home / f"cache {name}{n}", **changes) for n in (1, 2)
    )
    assert_same_log(one, two)
    first, last = steps(one)[0], steps(one)[-1]
    assert first["divergence"] > 1e-3 and last["divergence"] < first["divergence"]
    files = list((home / f"cache {name}2").rglob("part-*.safetensors"))
    assert len(files) == (2 if "val_size" in changes else 1)
    written = files[0].stat().st_mtime_ns
    again = train(home, f"distill {name}2", 2, home / f"cache {name}2", **changes)
    assert steps(again)[-1]["loss"] == steps(two)[-1]["loss"]
    assert files[0].stat().st_mtime_ns == written


def teach_on_ranks(argv: list[str], cache: str) -> None:
    """`longfactory teach` in a process of a pool."""
    os.environ["LONGFACTORY_CACHE"] = cache
    from longfactory.config import load_config
    from longfactory.train.run import teach

    teach(load_config(argv))


def test_a_run_finds_what_teach_has_computed(home: Path) -> None:
    """On two processes that share each sequence; the run makes no pass of its own."""
    cache, changes = home / "cache taught", {"stage": "distill", "teacher_model": home / "other"}
    given = keys(home, "taught", sequence_parallel_size=2, **changes, **DISTILL["forward"])
    words = [f"{k}={v}" for k, v in given.items()]
    POOLS[2].run(teach_on_ranks, words, str(cache))
    assert not (home / "taught").exists()
    files = sorted(cache.rglob("part-*.safetensors"))
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    found = train(home, "taught", 2, cache, **changes, **DISTILL["forward"])
    assert sorted(cache.rglob("part-*.safetensors")) == files
    assert [file.stat().st_mtime_ns for file in files] == times
    own = train(home, "own pass", 2, home / "cache own", **changes, **DISTILL["forward"])
    assert [h["loss"] for h in steps(found)] == [h["loss"] for h in steps(own)]
    with pytest.raises(RankError, match="This run keeps neither"):
        POOLS[2].run(
            teach_on_ranks, [f"{k}={v}" for k, v in keys(home, "none").items()], str(cache)
        )
