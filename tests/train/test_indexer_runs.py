"""Runs of models that choose keys by an indexer: two processes that share rows, and one."""

from pathlib import Path
from typing import Any

import pytest
from test_verify import ZERO, sharded, verified

from longfactory.testing import RankPool, run_ranks
from longfactory_dev.tiny_models import tiny_config
from make_model import make_model


def with_family(sft_keys: dict[str, Any], family: str) -> dict[str, Any]:
    """With a tiny model's configuration and a tokenizer."""
    folder = Path(sft_keys["output_dir"]).parent / family
    if not folder.exists():
        make_model("tiny", folder, vocabulary=600)
        tiny_config(
            family,
            vocab_size=1024,
            max_position_embeddings=4096,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            # Many heads, so that few scores are equal: among equal ones `topk` may choose by the
            # length of the document, and a shared prompt belongs to two.
            **({} if "minimax" in family else {"index_n_heads": 16}),
        ).save_pretrained(folder)
    return {**sft_keys, "model_name_or_path": str(folder)}


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
