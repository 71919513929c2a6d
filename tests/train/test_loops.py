"""The loops of `examples/` are the oracles of the trainer: the same losses and gradient norms on
the same rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dpo_loop
import pytest
import sft_loop

from longfactory import sp
from small_runs import POOLS, home, steps, text, train

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture

STEPS = 3
SAME_ROWS: dict[str, Any] = {
    "max_steps": STEPS,
    "packing": None,
    "disable_shuffling": True,
    "per_device_train_batch_size": 2,
    "adam_epsilon": 1e-8,
}


def loop(stage: str, model: Path, data: Path, size: int, mode: str) -> list[tuple[float, float]]:
    """The example's loop on every rank of a pool. Returns losses and gradient norms."""
    ctx = sp.SequenceParallel.create(size, mode=mode)
    loaded, tokenizer = sft_loop.load(str(model))
    if stage == "sft":
        rows = sft_loop.read_rows(data, tokenizer, 2, sp.alignment(ctx))
        return sft_loop.train(loaded, rows, ctx, STEPS)
    rows = dpo_loop.read_pairs(data, tokenizer, 2, sp.alignment(ctx))
    return dpo_loop.train(loaded, rows, ctx, STEPS)


def write_pairs(folder: Path) -> None:
    """Preference pairs in the form of `data/manual_dpo.json`, and their entry."""
    pairs = [
        {
            "messages": [{"role": "user", "content": text(12 + i)}],
            "chosen": {"role": "assistant", "content": text(6 + 3 * i)},
            "rejected": {"role": "assistant", "content": text(20 - i)},
        }
        for i in range(12)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    info = json.loads((Path(sft_loop.DATA) / "dataset_info.json").read_text())["manual_dpo"]
    known = json.loads((folder / "dataset_info.json").read_text())
    known["pairs"] = {**info, "file_name": "pairs.json"}
    (folder / "dataset_info.json").write_text(json.dumps(known))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_trainer_computes_what_a_plain_loop_computes(home: Path, stage: str) -> None:
    changes = dict(SAME_ROWS)
    data = home / "talks.json"
    if stage == "dpo":
        write_pairs(home)
        data = home / "pairs.json"
        changes |= {"stage": "dpo", "dataset": "pairs", "precompute_ref_log_probs": True}
    plain = POOLS[1].run(loop, stage, home / "model", data, 1, "zigzag-ring")[0]
    parallel = POOLS[2].run(loop, stage, home / "model", data, 2, "ulysses")
    trainer = steps(train(home, f"loop_{stage}", 2, **changes))
    assert len(plain) == len(trainer) == STEPS
    for losses_and_norms in (
        *parallel,
        [(step["loss"], step["grad_norm"]) for step in trainer],
    ):
        for (loss, norm), (expected_loss, expected_norm) in zip(
            losses_and_norms, plain, strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=2e-5)
            assert norm == pytest.approx(expected_norm, rel=2e-4)
    assert plain[0] != plain[-1]


@pytest.mark.slow
def test_an_example_starts_as_its_first_lines_say() -> None:
    """Two processes by torchrun on the project's data: rank 0 prints the steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", dpo_loop.__file__, "--steps", "1", "--per_row", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith("loss 0.693147, gradient norm ")
