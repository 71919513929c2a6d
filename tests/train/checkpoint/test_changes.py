"""What a run that goes on may change, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import from_mapping
from longfactory.config.show import settings
from longfactory.errors import UserError
from longfactory.train.checkpoint.changes import changed_keys, in_words, refuse_other_states


def keys(**changes: Any) -> dict[str, Any]:
    given = {"model_name_or_path": "m", "dataset": "a", "output_dir": "o", **changes}
    return settings(from_mapping(given))


def test_a_run_s_keys_are_plain_and_without_secrets() -> None:
    found = keys(learning_rate=3e-4, hub_token="secret", hf_hub_token="secret")
    assert found["learning_rate"] == 3e-4 and found["lora_rank"] == 8 and found["bf16"] is False
    assert "secret" not in str(found)
    assert changed_keys(found, found) == {}
    told = changed_keys(found, keys(learning_rate=1e-4, max_steps=7, output_dir="p"))
    assert in_words(told) == "learning_rate: 0.0003 -> 0.0001, max_steps: -1 -> 7"


REFUSED = [
    ({}, {"lora_rank": 16}, "something different from this run: lora_rank: 8 -> 16"),
    ({}, {"lora_alpha": 64}, "lora_alpha: "),
    ({}, {"finetuning_type": "full"}, "finetuning_type: lora -> full"),
    ({}, {"optim": "adafactor"}, "optim: adamw_torch_fused -> adafactor"),
    (
        {"lr_scheduler_type": "greedy"},
        {"lr_scheduler_type": "greedy", "learning_rate": 1.0},
        "learning_rate: ",
    ),
    ({}, {"lr_scheduler_type": "greedy"}, "lr_scheduler_type: linear -> greedy"),
]


@pytest.mark.parametrize(("then", "now", "message"), REFUSED)
def test_what_the_states_cannot_be_loaded_into_is_refused(
    then: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    old, new = keys(**then), keys(**now)
    with pytest.raises(UserError) as e:
        refuse_other_states("checkpoint-4", changed_keys(old, new), new)
    assert message in str(e.value) and "checkpoint-4" in str(e.value)
    assert "name_or_path" in str(e.value)


@pytest.mark.parametrize(
    "now",
    [
        {"optim": "adamw_torch"},
        {"learning_rate": 1.0, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"weight_decay": 0.3, "save_steps": 3, "bf16": True, "max_steps": 9},
        {"sequence_parallel_size": 2, "gradient_accumulation_steps": 4},
    ],
)
def test_what_a_user_may_want_is_applied(now: dict[str, Any]) -> None:
    old, new = keys(), keys(**now)
    refuse_other_states("c", changed_keys(old, new), new, sharding=("none", "ddp"))


def test_states_of_another_sharding_are_refused() -> None:
    refuse_other_states("c", {}, keys(), sharding=("fsdp2", "ddp"))
    for pair in (("deepspeed", "ddp"), ("fsdp2", "deepspeed")):
        with pytest.raises(UserError, match=f"Set sharding: {pair[0]}"):
            refuse_other_states("c", {}, keys(), sharding=pair)
