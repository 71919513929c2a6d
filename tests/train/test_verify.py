"""`longfactory verify` passes an exact engine and finds a broken one, for every kind of row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.data.row import TokenizedDocument
from longfactory.testing import run_ranks
from longfactory.train.verify import Report, RowShape, measured, truncate

sys.path.insert(0, str(Path(__file__).parent))
from manual_runs import manual_run


def verified(keys: dict[str, Any], broken: str = "") -> tuple[bool, str, dict[str, float]]:
    """Body of a rank. `broken` scales the gradient of values in the engine, or lets documents see each other."""
    import os

    import cpu_sharding

    from longfactory import sp
    from longfactory.config import from_mapping
    from longfactory.sp import hf
    from longfactory.train import trainer as trainer_module
    from longfactory.train.verify import verify

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    cfg = from_mapping({k: v for k, v in keys.items() if k != "cache"})
    engine, plan = hf.engine, trainer_module.sp.plan

    def scaled(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return engine(q, k, v + 0.01 * (v - v.detach()), *args, **kwargs)

    try:
        if broken == "gradient":
            hf.engine = scaled
        if broken == "isolation":
            trainer_module.sp.plan = lambda length, segments, ctx: plan(length, (sp.Segment(0, length),), ctx)
        report = verify(cfg, rows=2, tokens=160)
    finally:
        hf.engine, trainer_module.sp.plan = engine, plan
    return report.exact, report.table(), {name: m.difference for name, m in report.parameters.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("verify")
    return manual_run(
        folder,
        max_samples=12,
        stage="sft",
        dataset="manual_sft",
        per_device_train_batch_size=2,
        sequence_parallel_size=2,
        output_dir=str(folder / "out"),
    )


CASES = {
    "sft": {},
    "ulysses, lora, hand-written layers off": {"sequence_parallel_mode": "ulysses", "finetuning_type": "lora"},
    "packed": {"packing": True},
    "dpo, shared prompt": {"stage": "dpo", "dataset": "manual_dpo", "pref_share_prompt": True},
    "rm": {"stage": "rm", "dataset": "manual_dpo"},
    "two data-parallel groups": {"sequence_parallel_size": 1},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", list(CASES))
def test_an_exact_engine_passes(case: str, base: dict[str, Any]) -> None:
    for exact, table, parameters in run_ranks(2, verified, {**base, **CASES[case]}, timeout=250):
        assert exact, table
        assert len(parameters) > 10
        assert "The same." in table and "grad_norm" in table
    assert not Path(base["output_dir"]).exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("broken", "memory"), [("gradient", {"disable_gradient_checkpointing": True}), ("isolation", {})])
def test_a_broken_engine_is_found(broken: str, memory: dict[str, Any], base: dict[str, Any]) -> None:
    for exact, table, parameters in run_ranks(2, verified, {**base, **memory}, broken, timeout=250):
        assert not exact and "NOT the same." in table, table
        assert max(parameters.values()) > 1e-3


def test_long_documents_keep_their_ends_in_proportion() -> None:
    samples = [[TokenizedDocument(list(range(n)), list(range(n)), sample=i) for n in (300, 100)] for i in range(2)]
    cut = truncate(samples, 200)
    assert [[len(d.input_ids) for d in s] for s in cut] == [[75, 25]] * 2
    assert cut[0][1].input_ids == list(range(75, 100)) == cut[0][1].labels
    assert truncate(samples, 800) == samples


def report(**changes: Any) -> Report:
    same = measured(1.0, 1.0, 1e-6, 0.0)
    given: dict[str, Any] = {"loss": same, "grad_norm": same, "logps": same, "parameters": {"a": same, "b": same}}
    rows = (RowShape(4, 1, 1),)
    return Report(**{"rows": rows, **given, "reasons": (), "notes": (), "dtype": torch.float32, "title": "", **changes})


def test_a_number_that_is_none_is_not_exact() -> None:
    assert report().exact and "The same." in report().table()
    assert not report(rows=()).exact and not report(parameters={}).exact
    nan = measured(float("nan"), 1.0, float("nan"), 0.0)
    for name in ("loss", "grad_norm", "logps"):
        assert not report(**{name: nan}).exact
    assert not report(parameters={"a": measured(1.0, 1.0, 0.0, 0.0), "b": nan}).exact
    assert (
        not report(reasons=("Something is wrong.",)).exact and "- Something is wrong." in report(reasons=("Something is wrong.",)).table()
    )
    off = measured(1.001, 1.0, 1e-3, 0.0)
    assert not report(loss=off).exact
    # As much as FACTOR times what transformers' own attention is off in this precision, and no more.
    assert report(loss=measured(1.001, 1.0, 1e-3, 4e-4), dtype=torch.bfloat16).exact
    assert not report(loss=measured(1.001, 1.0, 1e-3, 3e-4), dtype=torch.bfloat16).exact
    assert "bf16=false" in report(dtype=torch.bfloat16).table()


@pytest.mark.timeout(300)
def test_the_command(base: dict[str, Any]) -> None:
    import os
    import subprocess

    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {"LONGFACTORY_CACHE": base["cache"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in base.items() if k != "cache"]
    command = [sys.executable, "-m", "longfactory.cli", "verify", *words, "nproc_per_node=2"]
    done = subprocess.run([*command, "verify_rows=1", "--verify_tokens=120"], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The same.") == 1 and "row 2" not in done.stdout and "2 ranks, zigzag-ring" in done.stdout
    assert not Path(base["output_dir"]).exists()
    wrong = subprocess.run([*command, "verify_rows=none"], capture_output=True, text=True, env=env, timeout=100)
    assert wrong.returncode == 2 and "verify_rows=N with a whole number" in wrong.stderr
