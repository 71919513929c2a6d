"""Names of keys: unknown ones, those of other tools, one under two names."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping
from longfactory.config.arguments import GROUPS
from longfactory.config.other_keys import ELSEWHERE
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import KNOWN, OWN_KEYS
from smallest_run import BASE, problem


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("lerning_rate", "learning_rate"),
        ("sequence_paralel_size", "sequence_parallel_size"),
        ("lora_ranks", "lora_rank"),
        ("LoRA_rank", "lora_rank"),
        ("Per-Device-Train-Batch-Size", "per_device_train_batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(written: str, near: str) -> None:
    assert problem(**{written: 1}) == f"There is no key {written}. Did you mean {near}?"


@pytest.mark.parametrize(
    ("written", "here"),
    [
        ("max_seq_length", "cutoff_len"),
        ("sequence_len", "cutoff_len"),
        ("model_max_length", "cutoff_len"),
        ("load_in_4bit", "quantization_bit: 4"),
        ("load_in_8bit", "quantization_bit: 8"),
        ("use_peft", "finetuning_type"),
        ("lora_r", "lora_rank"),
        ("lora_target_modules", "lora_target"),
        ("modules_to_save", "additional_target"),
        ("datasets", "dataset"),
        ("num_epochs", "num_train_epochs"),
        ("attn_implementation", "attention_backend"),
        ("ulysses_sequence_parallel_size", "sequence_parallel_size"),
    ],
)
def test_names_of_other_tools_lead_to_ours(written: str, here: str) -> None:
    assert problem(**{written: 1}) == f"There is no key {written}. Use {here}."


def test_every_name_of_another_tool_leads_to_a_key() -> None:
    assert {here.partition(":")[0] for here in ELSEWHERE.values()} <= set(OWN_KEYS) | set(
        TRAINER_KEYS
    )
    assert not set(ELSEWHERE) & KNOWN


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "FSDP",
                "num_processes": 2,
            },
            "accelerate's own configuration",
        ),
        (
            {"train_batch_size": "auto", "zero_optimization": {"stage": 2}},
            "DeepSpeed's own configuration",
        ),
        ({"task": "mmlu_test", "lang": "en", "n_shot": 5}, "LLaMA-Factory's own `eval`"),
    ],
)
def test_files_of_other_programs_are_recognised(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        from_mapping(keys)
    (line,) = str(e.value).splitlines()
    assert line.startswith(", ".join(k for k in keys if k not in BASE)) and words in line


def test_unknown_keys_pass_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    cfg = from_mapping({**BASE, "something_else": 1})
    assert cfg.notes == ("There is no key something_else. It is left out (ALLOW_EXTRA_ARGS).",)


def test_unknown_and_refused_keys_are_told_together() -> None:
    told = problem(lerning_rate=1, use_kt=True, use_mca=True, report_to="neptune").splitlines()
    assert told[0] == "There is no key lerning_rate. Did you mean learning_rate?"
    assert [line.split(" is refused")[0] for line in told[1:]] == [
        "use_kt: true",
        "use_mca: true",
    ]
    # What else a key says is not hidden either.
    assert (
        problem(lerning_rate=1, eval_strategy="steps", evaluation_strategy="epoch").count("\n") == 1
    )


def test_one_key_under_two_names() -> None:
    cfg = from_mapping(
        {
            **BASE,
            "stage": "dpo",
            "pref_beta": None,
            "dpo_beta": 0.2,
            "pref_ftx": "0.50",
            "kto_ftx": 0.5,
        }
    )
    assert (cfg.method.pref_beta, cfg.method.pref_ftx) == (0.2, 0.5)
    assert "are the same key with different values" in problem(
        eval_strategy="steps", evaluation_strategy="epoch"
    )
    assert (
        from_mapping(
            {**BASE, "val_size": 5, "eval_strategy": "steps", "evaluation_strategy": "steps"}
        ).trainer.eval_strategy
        == "steps"
    )


def test_accelerator_config_may_say_what_happens_anyway() -> None:
    same = {
        "dispatch_batches": False,
        "split_batches": False,
        "even_batches": True,
        "use_seedable_sampler": True,
        "non_blocking": False,
    }
    for value in (same, json.dumps(same), {"dispatch_batches": None}):
        assert from_mapping({**BASE, "accelerator_config": value}).notes == ()
    assert from_mapping({**BASE, "dispatch_batches": False}).notes == ()
    assert "{'split_batches': True} is refused" in problem(
        accelerator_config={**same, "split_batches": True}
    )
    assert "is refused" in problem(
        accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}}
    )


def test_a_null_is_the_default_where_it_has_no_meaning_of_its_own() -> None:
    keys = [
        k
        for k in (*OWN_KEYS.values(), *TRAINER_KEYS.values())
        if k.name not in BASE and "None" not in str(k.kind)
    ]
    keys = [k for k in keys if typing.get_origin(k.kind) is not tuple]  # no names
    assert len(keys) > 100
    on = [k.name for k in keys if k.kind is bool and k.default]
    cfg, plain = (
        from_mapping({**BASE, **{k.name: None for k in keys if k.name not in on}}),
        from_mapping(BASE),
    )
    for key in keys:
        if key.name in TRAINER_KEYS:
            assert getattr(cfg.trainer, key.name) == getattr(plain.trainer, key.name), key.name
    assert all(getattr(cfg, group) == getattr(plain, group) for group in GROUPS)
    for name in on:
        assert f"{name}: got None, expected true or false." == problem(**{name: None})
