"""Runs of models that choose keys by an indexer: two processes that share rows, and one."""

from pathlib import Path
from typing import Any

import pytest

from longfactory.testing import RankPool, run_ranks
from tiny_folders import with_tiny
from verify_ranks import ZERO, sharded, verified


def with_family(sft_keys: dict[str, Any], family: str) -> dict[str, Any]:
    """Many heads, so that few scores are equal: among equal ones `topk` may choose by the length of
    the document, and a shared prompt belongs to two.
    """
    heads = {} if "minimax" in family else {"index_n_heads": 16}
    return with_tiny(sft_keys, family, **heads)


CASES = {
    "packed": {"packing": True},
    "lora": {"finetuning_type": "lora"},
    "dpo, shared prompt": {"stage": "dpo", "dataset": "manual_dpo", "pref_share_prompt": True},
}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"])
@pytest.mark.parametrize("case", list(CASES))
def test_indexer_runs_as_in_one_process(case: str, family: str, sft_keys: dict[str, Any]) -> None:
    keys = {**with_family(sft_keys, family), **CASES[case]}
    for exact, table, parameters in run_ranks(2, verified, keys, timeout=500):
        assert exact, table
        assert not [name for name in parameters if "indexer" in name]
    assert not Path(sft_keys["output_dir"]).exists()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sharding", ["fsdp2", "deepspeed"])
def test_indexer_runs_with_sharded_parameters(sharding: str, sft_keys: dict[str, Any]) -> None:
    """Frozen indexers, a part of which stays in fp32, beside parameters in bf16."""
    pool = RankPool(2, keep_groups=sharding == "deepspeed")
    cases: list[dict[str, Any]] = [{}, {"bf16": True}, {"bf16": True, "pure_bf16": True}]
    if sharding == "deepspeed":
        cases = [{"deepspeed": ZERO[3]}]
    keys = with_family(sft_keys, "glm_moe_dsa")
    try:
        for exact, table in pool.run(sharded, keys, cases, sharding, timeout=800)[0]:
            assert exact, table
    finally:
        pool.stop()
