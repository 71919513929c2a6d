"""`longfactory verify` passes an exact engine and finds a broken one, for every kind of row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.data.row import TokenizedDocument
from longfactory.testing import run_ranks
from longfactory.train.verify import Difference, Report, truncate

sys.path.insert(0, str(Path(__file__).parent))
from manual_runs import manual_run


def verified(keys: dict[str, Any], broken: str = "") -> tuple[bool, str, list[dict[str, float]]]:
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
    return report.exact, report.table(), [r.parameters for r in report.rows]


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
        assert len(parameters) == 2 and all(len(p) > 10 for p in parameters)
        assert "The same." in table and "grad_norm" in table
    assert not Path(base["output_dir"]).exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("broken", "memory"), [("gradient", {"disable_gradient_checkpointing": True}), ("isolation", {})])
def test_a_broken_engine_is_found(broken: str, memory: dict[str, Any], base: dict[str, Any]) -> None:
    for exact, table, parameters in run_ranks(2, verified, {**base, **memory}, broken, timeout=250):
        assert not exact and "NOT the same." in table, table
        assert max(max(p.values()) for p in parameters) > 1e-3


def test_long_documents_keep_their_ends_in_proportion() -> None:
    samples = [[TokenizedDocument(list(range(n)), list(range(n)), sample=i) for n in (300, 100)] for i in range(2)]
    cut = truncate(samples, 200)
    assert [[len(d.input_ids) for d in s] for s in cut] == [[75, 25]] * 2
    assert cut[0][1].input_ids == list(range(75, 100)) == cut[0][1].labels
    assert truncate(samples, 800) == samples


def test_a_number_that_is_none_is_not_exact() -> None:
    row = Difference(4, 1, (1.0, 1.0), (1.0, 1.0), {"a": 1e-6})
    assert Report((row,), torch.float32, "").exact
    assert not Report((), torch.float32, "").exact
    nan = float("nan")
    assert not Report((Difference(4, 1, (nan, nan), (1.0, 1.0), {"a": 0.0}),), torch.float32, "").exact
    assert not Report((Difference(4, 1, (1.0, 1.0), (1.0, 1.0), {"a": 0.0, "b": nan}),), torch.float32, "").exact
    assert not Report((Difference(4, 1, (1.0, 1.001), (1.0, 1.0), {"a": 0.0}),), torch.float32, "").exact
    half = Report((Difference(4, 1, (1.0, 1.001), (1.0, 1.0), {"a": 0.05}),), torch.bfloat16, "")
    assert half.exact and "bf16=false" in half.table()


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
