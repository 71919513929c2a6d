"""Every contradiction has its sentence, and the sentence says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import ConfigError, load_config
from smallest_run import problem

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
        {"stage": "dpo", "pref_share_prompt": True, "neftune_noise_alpha": 5},
        "Leave pref_share_prompt out",
    ),
    ({"on_nan": "skip", "optimizer_overlap": True, "max_grad_norm": 0}, "on_nan: skip drops an"),
    (
        {"on_nan": "skip", "optim": "galore_adamw_layerwise", "optim_target_modules": "q"},
        "layerwise",
    ),
    ({"num_train_epochs": 0}, "num_train_epochs: 0 trains nothing"),
    ({"neftune_noise_alpha": -1}, "got -1.0, expected >= 0"),
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


def test_each_problem_is_named_at_once() -> None:
    text = problem(stage="sftt", learning_rate="fast", logging_steps="often")
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "stage",
        "learning_rate",
        "logging_steps",
    ]


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
