"""Every contradiction has its sentence, and the sentence says what to do."""

from __future__ import annotations

import importlib.util
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping, load_config
from longfactory.config.arguments import GROUPS
from longfactory.config.other_keys import ELSEWHERE
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import KNOWN, OWN_KEYS

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)


def problem(world_size: int | None = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as e:
        from_mapping({**BASE, **keys}, world_size=world_size)
    return str(e.value)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model_name_or_path": None}, "model_name_or_path is missing"),
    ({"dataset": None}, "dataset is missing"),
    ({"output_dir": None}, "output_dir is missing"),
    ({"train_on_prompt": True, "mask_history": True}, "Keep one of them"),
    (
        {"stage": "dpo", "train_on_prompt": True},
        "train_on_prompt is for stage: sft; this run's stage is dpo",
    ),
    ({"stage": "kto", "mask_history": True}, "mask_history is for stage: sft"),
    ({"packing": False, "neat_packing": True}, "contradict"),
    ({"val_size": 0.1, "eval_dataset": "e"}, "eval_dataset and val_size were both given"),
    ({"eval_strategy": "steps"}, "Set eval_dataset, or val_size above 0"),
    ({"do_eval": True, "do_train": True}, "Set eval_dataset, or val_size above 0"),
    ({"eval_on_start": True}, "Set eval_dataset, or val_size above 0"),
    (
        {"train_from_scratch": True, "quantization_bit": 4, "finetuning_type": "lora"},
        "train_from_scratch loads none",
    ),
    ({"val_size": 2.5}, "whole number of samples"),
    ({"max_steps": 0}, "max_steps: 0 trains nothing"),
    (
        {"dataset": "a,b", "interleave_probs": "1,0", "mix_strategy": "interleave_over"},
        "Leave it out of dataset",
    ),
    ({"save_strategy": "best"}, "Set metric_for_best_model"),
    ({"optim_args": "a=1,b"}, "optim_args: b is not name=value"),
    ({"seed": -1}, "seed: got -1, expected >= 0"),
    ({"optim": "galore_adamw"}, "optim_target_modules"),
    ({"streaming": True}, "Set max_steps"),
    ({"streaming": True, "max_steps": 5, "max_samples": 3}, "max_samples and streaming"),
    ({"streaming": True, "max_steps": 5, "val_size": 0.1}, "val_size as a number of samples"),
    ({"streaming": True, "max_steps": 5, "save_strategy": "epoch"}, "Set save_strategy: steps"),
    ({"interleave_probs": "0.5,0.5"}, "mix_strategy: interleave_under"),
    (
        {"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_over"},
        "2 numbers for 1 data sets",
    ),
    (
        {"dataset": "a,b", "interleave_probs": "0.5,0.4", "mix_strategy": "interleave_over"},
        "sum to 0.9",
    ),
    (
        {"stage": "dpo", "pref_loss": "ipo", "dpo_label_smoothing": 0.1},
        "has no effect with pref_loss: ipo",
    ),
    ({"stage": "dpo", "pref_loss": "exo_pair"}, "Give one, for example 0.001"),
    ({"stage": "dpo", "pref_beta": 0}, "pref_beta must be above 0"),
    (
        {"stage": "dpo", "pref_loss": "orpo", "pref_bco_weight": 0.5},
        "compares with a reference, and pref_loss: orpo has none",
    ),
    (
        {"stage": "dpo", "pref_loss": "sft", "ld_alpha": 0.5},
        "ld_alpha has no effect with pref_loss: sft",
    ),
    ({"use_dft_loss": True, "use_asft_loss": True}, "A run has one loss"),
    (
        {"use_asft_loss": True, "precompute_ref_log_probs": True},
        "Leave precompute_ref_log_probs out",
    ),
    (
        {"use_asft_loss": True, "finetuning_type": "full", "train_from_scratch": True},
        "Name a ref_model, or use finetuning_type: lora",
    ),
    ({"report_to": "wandb,tenserboard"}, "report_to: tenserboard is not a choice"),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "early_stopping_steps": 2,
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a,b",
            "eval_on_each_dataset": True,
            "metric_for_best_model": "loss",
            "eval_strategy": "steps",
        },
        "Set metric_for_best_model: eval_a_loss",
    ),
    (
        {
            "eval_dataset": "a",
            "eval_on_each_dataset": True,
            "metric_for_best_model": "a_loss",
            "eval_strategy": "steps",
        },
        "no evaluation computes a_loss",
    ),
    *(
        ({"val_size": 2, "eval_strategy": "steps", "metric_for_best_model": name}, message)
        for name, message in (
            ("eval_rouge-l", "metric_for_best_model: eval_rouge-l measures generated answers"),
            ("accuracy", "metric_for_best_model: accuracy needs compute_accuracy: true"),
            ("eval_los", "metric_for_best_model: no evaluation computes eval_los"),
        )
    ),
    ({"stage": "rm", "load_best_model_at_end": True}, "not supported with stage: rm"),
    ({"early_stopping_steps": 2}, "Set eval_strategy"),
    ({"bf16": True, "fp16": True}, "Keep one of them"),
    ({"pure_bf16": True, "fp16": True}, "contradict"),
    ({"finetuning_type": "full", "adapter_name_or_path": "a"}, "longfactory export"),
    ({"finetuning_type": "full", "use_dora": True}, "use_dora is for finetuning_type: lora"),
    (
        {"finetuning_type": "freeze", "loraplus_lr_ratio": 16},
        "loraplus_lr_ratio is for finetuning_type: lora",
    ),
    ({"quantization_bit": 8, "sharding": "fsdp2"}, "cannot shard weights of 8 bits"),
    ({"finetuning_type": "full", "quantization_bit": 4}, "Use lora, or leave quantization_bit out"),
    ({"quantization_bit": 4, "pissa_init": True}, "pissa_init decomposes"),
    ({"quantization_bit": 4, "resize_vocab": True}, "resize_vocab cannot"),
    (
        {"quantization_bit": 4, "adapter_name_or_path": "a", "create_new_adapter": True},
        "Merge them first",
    ),
    ({"quantization_bit": 4, "adapter_name_or_path": "a,b"}, "takes one adapter"),
    (
        {
            "sequence_parallel_mode": "usp",
            "sequence_parallel_size": 8,
            "sequence_parallel_ulysses_degree": 2,
            "sequence_parallel_ring_degree": 2,
        },
        "2 x sequence_parallel_ring_degree 2 = 4, and sequence_parallel_size is 8",
    ),
    (
        {
            "sequence_parallel_mode": "usp",
            "sequence_parallel_size": 8,
            "sequence_parallel_ring_degree": 3,
        },
        "3 does not divide",
    ),
    (
        {"sequence_parallel_size": 8, "sequence_parallel_ulysses_degree": 4},
        "Set usp, or leave them out",
    ),
    (
        {"stage": "dpo", "pref_share_prompt": True, "neftune_noise_alpha": 5},
        "Leave pref_share_prompt out",
    ),
    ({"ddp_backend": "ncll"}, "ddp_backend: ncll is not a choice. Choose from nccl, gloo"),
    ({"ddp_backend": "nccl", "use_cpu": True}, "ddp_backend: nccl needs GPUs, and use_cpu"),
    ({"on_nan": "skip", "optimizer_overlap": True, "max_grad_norm": 0}, "on_nan: skip drops an"),
    (
        {"on_nan": "skip", "optim": "galore_adamw_layerwise", "optim_target_modules": "q"},
        "layerwise",
    ),
    ({"num_train_epochs": 0}, "num_train_epochs: 0 trains nothing"),
    ({"neftune_noise_alpha": -1}, "got -1.0, expected >= 0"),
    (
        {
            "do_train": False,
            "do_predict": True,
            "predict_with_generate": True,
            "eval_dataset": "e",
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
        "do_predict without training does not use DeepSpeed",
    ),
    (
        {
            "do_train": False,
            "do_eval": True,
            "eval_dataset": "e",
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
        "do_eval without training uses DeepSpeed only with ZeRO-3",
    ),
    ({"deepspeed": "absent.json"}, "there is no file absent.json"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2}}, "sharding": "fsdp2"},
        "deepspeed and sharding: fsdp2",
    ),
    (
        {
            "deepspeed": {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}
            },
            "pure_bf16": True,
        },
        "optimizer on the host keeps float32",
    ),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}, "quantization_bit": 4}, "ZeRO-2"),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}, "pissa_init": True}, "ZeRO-2"),
    ({"predict_with_generate": True, "stage": "dpo"}, "is for stage: sft"),
    ({"do_predict": True, "eval_dataset": "e"}, "Set predict_with_generate: true"),
    ({"predict_with_generate": True, "compute_accuracy": True}, "Keep one of them"),
    ({"predict_with_generate": True, "sequence_parallel_size": 2}, "Set sequence_parallel_size: 1"),
    ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, "contradict"),
    ({"gradient_checkpointing_kwargs": {"determinism_check": "none"}}, "LongFactory's own"),
    ({"fsdp": "full_shard offload"}, "optimizer_placement: host"),
    ({"fsdp": "sideways"}, "Use sharding: fsdp2"),
    ({"eval_strategy": "steps", "val_size": 5, "eval_steps": 0}, "eval_steps: 0"),
    (
        {"disable_gradient_checkpointing": True, "use_unsloth_gc": True},
        "offload_activations is a part of checkpointing",
    ),
    ({"cutoff_len": 0}, "cutoff_len: got 0, expected >= 1"),
    ({"stage": "ppo"}, "ppo is not supported; use stage: dpo or kto"),
    ({"finetuning_type": "oft", "oft_rank": 4}, "oft_rank and oft_block_size were both given"),
    ({"finetuning_type": "oft", "oft_block_size": 0}, "oft_rank and oft_block_size are both 0"),
    ({"finetuning_type": "oft", "use_dora": True}, "use_dora is for finetuning_type: lora"),
    ({"init_lora_weights": "eva"}, "looks at the layers' inputs on some data"),
    ({"init_lora_weights": "loftq"}, "use quantization_bit: 4"),
    ({"init_lora_weights": "lora_ga"}, "begins from the whole weights' gradients"),
    ({"pissa_convert": True}, "Set pissa_init: true"),
    ({"pissa_init": True, "init_lora_weights": "olora"}, "Keep one of them"),
    (
        {"pissa_init": True, "pissa_convert": True, "adapter_name_or_path": "x"},
        "continues from a trained one",
    ),
    ({"init_lora_weights": "olora", "quantization_bit": 4}, "olora decomposes the full weights"),
    ({"mixture_of_depths": "convert"}, "those that come later included"),
    ({"quantization_bit": 8, "quantization_method": "eetq"}, "use quantization_method: hqq"),
    ({"quantization_bit": 3, "finetuning_type": "lora"}, "got 3, expected 4 or 8 for"),
    (
        {"quantization_bit": 4, "quantization_method": "hqq", "sharding": "fsdp2"},
        "HQQ keeps a layer's scales separately from its weights",
    ),
    ({"label_smoothing_factor": 0.1, "use_dft_loss": True}, "A run has one loss"),
    ({"label_smoothing_factor": 1.0}, "expected >= 0 and < 1"),
    (
        {"train_sampling_strategy": "batch_rebalance"},
        "Choose from random, sequential, group_by_length",
    ),
]


@pytest.mark.parametrize(("keys", "words"), REFUSALS, ids=[" ".join(k) for k, _ in REFUSALS])
def test_refused(keys: dict[str, Any], words: str) -> None:
    assert words in problem(**keys)


@pytest.mark.parametrize(
    ("metric", "keys"),
    [
        ("eval_loss", {}),
        ("accuracy", {"compute_accuracy": True}),
        ("expert_entropy", {}),
        ("eval_rewards/accuracies", {"stage": "dpo"}),
        ("eval_math_hard_loss", {"eval_dataset": "math,math_hard", "eval_on_each_dataset": True}),
        ("eval_new_loss", {"eval_dataset": "a/old.json,a/new.json", "eval_on_each_dataset": True}),
    ],
)
def test_metrics_that_evaluations_compute(metric: str, keys: dict[str, Any]) -> None:
    if "eval_dataset" not in keys:
        keys = {**keys, "val_size": 2}
    from_mapping({**BASE, "eval_strategy": "steps", "metric_for_best_model": metric, **keys})


def test_each_problem_is_named_at_once() -> None:
    text = problem(stage="sftt", learning_rate="fast", logging_steps="often")
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "stage",
        "learning_rate",
        "logging_steps",
    ]


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


def test_steps_below_0_mean_what_they_mean_to_transformers() -> None:
    cfg = from_mapping({**BASE, "save_steps": -1})
    assert cfg.hf["save_steps"] == -1
    assert cfg.notes == ("save_steps: -1: one checkpoint is written, after the last step.",)
    cfg = from_mapping(
        {
            **BASE,
            "val_size": 5,
            "eval_strategy": "steps",
            "eval_steps": -1,
            "logging_steps": "-1",
            "save_strategy": "no",
        }
    )
    assert [n.partition(":")[0] for n in cfg.notes] == ["logging_steps", "eval_steps"]
    assert "-1 to log after the last step alone" in problem(logging_steps=0)


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


@pytest.mark.parametrize(("world", "size"), [(1, 1), (8, 8), (8, 2), (6, 3)])
def test_sequence_parallel_size_divides_the_processes(world: int, size: int) -> None:
    from_mapping({**BASE, "sequence_parallel_size": size}, world_size=world)


def test_sequence_parallel_size_that_does_not_divide() -> None:
    assert "needs 4 processes or a multiple, and 1 would start" in problem(
        1, sequence_parallel_size=4
    )
    assert "does not divide the 8 processes. Use 2, or 6 processes" in problem(
        8, sequence_parallel_size=3
    )


def test_the_launcher_s_environment_tells_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "does not divide the 3 processes" in problem(sequence_parallel_size=2)


def test_lengths_need_not_divide() -> None:
    """The row is padded at its end: any length goes with any size, packed or not."""
    from_mapping(
        {**BASE, "cutoff_len": 1001, "sequence_parallel_size": 8, "neat_packing": True},
        world_size=8,
    )


def test_deepspeed_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "is not valid JSON" in problem(deepspeed=str(bad))
    bad.write_text("[]")
    assert "is not a JSON object" in problem(deepspeed=str(bad))


@pytest.mark.parametrize("name", ["z0", "z2", "z2_offload", "z3", "z3_offload"])
def test_the_deepspeed_files_that_everyone_quotes(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "deepspeed" / f"ds_{name}_config.json"
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[1])
    assert ("offload_optimizer" in zero) == name.endswith("offload")
    # Left to DeepSpeed these mean clipping at 1.0 and sums in bf16.
    assert config["gradient_clipping"] == "auto" and config["communication_data_type"] == "fp32"
    assert name[1] != "3" or zero["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            'pip install "longfactory[deepspeed]"',
        ),
        ({"quantization_bit": 4}, 'pip install "longfactory[quantization]"'),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, 'install "longfactory[hqq]"'),
        ({"enable_liger_kernel": True}, 'pip install "longfactory[liger]"'),
        ({"attention_backend": "fa4"}, 'pip install "longfactory[fa4]"'),
        (
            {"attention_backend": "fa2"},
            "flash2 is not installed. Run: pip install flash-attn, or use attention_backend: auto",
        ),
        ({"attention_backend": "fa3"}, "Build FlashAttention 3"),
        ({"use_swanlab": True}, "pip install swanlab"),
        (
            {"report_to": "tensorboard"},
            "report_to: tensorboard is not installed. Run: pip install tensorboard",
        ),
        ({"report_to": ["wandb"]}, "pip install wandb"),
        ({"optim": "apollo_adamw", "optim_target_modules": "q_proj"}, "pip install apollo-torch"),
        ({"optim": "schedule_free_sgd"}, "pip install schedulefree"),
        ({"optim": "paged_adamw_32bit"}, "pip install bitsandbytes"),
    ],
)
def test_missing_packages(
    keys: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert words in problem(**keys)
    # A file can be looked at where the packages are not.
    assert any(words in note for note in from_mapping({**BASE, **keys, "dry_run": True}).notes)


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"flash_attn": "fa2"}, "flash_attn: fa2 has no effect"),
        ({"audio_sampling_rate": 8000}, "audio is not supported"),
        ({"pref_beta": 0.3}, "pref_beta has no effect: stage is sft"),
        ({"stage": "rm", "pref_beta": 0.3}, "pref_beta has no effect: stage is rm"),
        (
            {"finetuning_type": "full", "lora_rank": 16},
            "lora_rank has no effect: finetuning_type is full",
        ),
        (
            {"stage": "dpo", "pref_loss": "orpo", "ref_model": "r"},
            "ref_model has no effect: this run has no reference model",
        ),
        ({"stage": "dpo", "simpo_gamma": 1.0}, "simpo_gamma has no effect"),
        (
            {"use_dft_loss": True, "asft_alpha": 0.3},
            "asft_alpha has no effect: it is read by use_asft_loss alone",
        ),
        ({"eaft_alpha": 0.3}, "eaft_alpha has no effect: it is read by use_eaft_loss alone"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "warmup_ratio: 0.1 has no effect"),
        ({"fsdp": "hybrid_shard"}, "full sharding over all devices"),
        ({"buffer_size": 5}, "buffer_size has no effect: streaming is off"),
        (
            {"stage": "dpo", "ref_model_adapters": "a"},
            "ref_model_adapters has no effect: ref_model is not given",
        ),
        ({"create_new_adapter": True}, "adapter_name_or_path is not given"),
        ({"double_quantization": False}, "has no effect: quantization_bit is not given"),
        ({"pissa_iter": 4}, "pissa_iter has no effect: pissa_init is off"),
        ({"loraplus_lr_embedding": 1e-3}, "has no effect: loraplus_lr_ratio is not given"),
        ({"profiler_active_steps": 9}, "has no effect: enable_torch_profiler is off"),
        ({"stage": "pt", "default_system": "x"}, "whose texts go through no template"),
        ({"max_length": 4096}, "the length of training samples is cutoff_len (2048)"),
    ],
)
def test_what_has_no_effect_is_said(keys: dict[str, Any], note: str) -> None:
    assert any(note in n for n in from_mapping({**BASE, **keys}).notes)


@pytest.mark.parametrize("kind", ["full", "oft"])
def test_expanded_layers_are_trained_by_freeze_and_lora(kind: str) -> None:
    given = {**BASE, "finetuning_type": kind, "use_llama_pro": True}
    with pytest.raises(ConfigError, match=f"adapters on them, with lora; this run's is {kind}"):
        from_mapping(given)
    keys = {**BASE, "finetuning_type": "lora", "freeze_trainable_layers": 1}
    assert any("freeze_trainable_layers has no effect" in n for n in from_mapping(keys).notes)
    notes = from_mapping({**keys, "use_llama_pro": True}).notes
    assert not any("freeze_trainable_layers" in n for n in notes)


def test_defaults_pass_without_a_word() -> None:
    copied = {
        "use_galore": False,
        "flash_attn": "auto",
        "vllm_maxlen": "4096",
        "swanlab_project": "llamafactory",
        "export_quantization_bit": None,
        "freeze_vision_tower": False,  # of every finetuning_type
        "freeze_multi_modal_projector": False,
    }
    assert (
        from_mapping(
            {**BASE, **copied, "label_smoothing_factor": 0, "pref_beta": 0.1, "reward_model": None}
        ).notes
        == ()
    )


def test_export_and_chat_ask_for_what_they_need() -> None:
    with pytest.raises(ConfigError, match="export_dir is missing"):
        load_config(["model_name_or_path=m"], command="export")
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        load_config(
            [
                "model_name_or_path=m",
                "adapter_name_or_path=a",
                "export_dir=e",
                "quantization_bit=4",
            ],
            command="export",
        )
    assert load_config(["model_name_or_path=m"], command="chat").generating.top_p == 0.7
