"""Keys that go to transformers' Seq2SeqTrainingArguments, with their types and defaults: shipped,
so that reading a YAML imports no torch.

A test compares this table with the installed transformers, so that a new release shows what is
missing.
"""

from __future__ import annotations

from typing import Any, Literal

from longfactory.config.fields import Key

_Interval = Literal["no", "steps", "epoch"]
_Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip
_Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit",
    "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
    "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
]  # fmt: skip
_OptStr = str | None
_OptInt = int | None
_OptFloat = float | None
_OptBool = bool | None
_OptDict = dict | str | None

_TABLE: dict[str, tuple[Any, Any]] = {
    # output and phases
    "output_dir": (_OptStr, None),
    "do_train": (bool, False),
    "do_eval": (bool, False),
    "do_predict": (bool, False),
    "predict_with_generate": (bool, False),
    "resume_from_checkpoint": (bool | str | None, None),
    # batch, length of the run
    "per_device_train_batch_size": (int, 8),
    "per_device_eval_batch_size": (int, 8),
    "gradient_accumulation_steps": (int, 1),
    "num_train_epochs": (float, 3.0),
    "max_steps": (int, -1),
    # optimizer and schedule
    "learning_rate": (float, 5e-5),
    "lr_scheduler_type": (_Schedule, "linear"),
    "lr_scheduler_kwargs": (_OptDict, None),
    "warmup_steps": (float, 0.0),
    "optim": (_Optimizer, "adamw_torch_fused"),
    "optim_args": (_OptStr, None),
    "optim_target_modules": (tuple[str, ...] | None, None),
    "weight_decay": (float, 0.0),
    "adam_beta1": (float, 0.9),
    "adam_beta2": (float, 0.999),
    "adam_epsilon": (float, 1e-8),
    "max_grad_norm": (float, 1.0),
    "neftune_noise_alpha": (_OptFloat, None),
    # numbers and devices
    "bf16": (bool, False),
    "fp16": (bool, False),
    "bf16_full_eval": (bool, False),
    "fp16_full_eval": (bool, False),
    "tf32": (_OptBool, None),
    "use_cpu": (bool, False),
    "seed": (int, 42),
    "data_seed": (_OptInt, None),
    "full_determinism": (bool, False),
    "torch_empty_cache_steps": (_OptInt, None),
    # logging
    "logging_strategy": (_Interval, "steps"),
    "logging_steps": (float, 500.0),
    "logging_first_step": (bool, False),
    "log_on_each_node": (bool, True),
    "logging_nan_inf_filter": (bool, True),
    "include_num_input_tokens_seen": (bool | Literal["all", "non_padding", "no"], "no"),
    "log_level": (
        Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
        "passive",
    ),
    "log_level_replica": (
        Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
        "warning",
    ),
    "disable_tqdm": (_OptBool, None),
    "report_to": (tuple[str, ...] | None, "none"),
    "run_name": (_OptStr, None),
    "project": (str, "huggingface"),
    "trackio_space_id": (_OptStr, None),
    "trackio_bucket_id": (_OptStr, None),
    "trackio_static_space_id": (bool | str | None, None),
    "debug": (str, ""),
    "skip_memory_metrics": (bool, True),
    # evaluation
    "eval_strategy": (_Interval, "no"),
    "eval_steps": (_OptFloat, None),
    "eval_delay": (float, 0.0),
    "eval_on_start": (bool, False),
    "load_best_model_at_end": (bool, False),
    "metric_for_best_model": (_OptStr, None),
    "greater_is_better": (_OptBool, None),
    # saving
    "save_strategy": (Literal["no", "steps", "epoch", "best"], "steps"),
    "save_steps": (float, 500.0),
    "save_total_limit": (_OptInt, None),
    "save_only_model": (bool, False),
    "save_on_each_node": (bool, False),
    "enable_jit_checkpoint": (bool, False),
    "restore_callback_states_from_checkpoint": (bool, False),
    "ignore_data_skip": (bool, False),
    "push_to_hub": (bool, False),
    "hub_token": (_OptStr, None),
    "hub_private_repo": (_OptBool, None),
    "hub_model_id": (_OptStr, None),
    "hub_strategy": (Literal["end", "every_save", "checkpoint", "all_checkpoints"], "every_save"),
    "hub_always_push": (bool, False),
    "hub_revision": (_OptStr, None),
    # loading
    "dataloader_drop_last": (bool, False),
    "dataloader_num_workers": (int, 0),
    "dataloader_pin_memory": (bool, True),
    "dataloader_prefetch_factor": (_OptInt, None),
    "train_sampling_strategy": (Literal["random", "sequential", "group_by_length"], "random"),
    # processes
    "ddp_timeout": (int, 1800),
    "ddp_backend": (_OptStr, None),
    "ddp_find_unused_parameters": (_OptBool, None),
    "ddp_bucket_cap_mb": (_OptInt, None),
    "ddp_broadcast_buffers": (_OptBool, None),
    "ddp_static_graph": (_OptBool, None),
    "deepspeed": (_OptDict, None),
}

_RANGES: dict[str, tuple[float | None, float | None]] = {
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "num_train_epochs": (0, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "max_steps": (-1, None),
    "learning_rate": (0, None),
    "warmup_steps": (0, None),
    "weight_decay": (0, None),
    "max_grad_norm": (0, None),
    "neftune_noise_alpha": (0, None),
    "dataloader_num_workers": (0, None),
    "ddp_timeout": (1, None),
}

TRAINER_KEYS: dict[str, Key] = {
    name: Key(name, kind, default, "", *_RANGES.get(name, (None, None)))
    for name, (kind, default) in _TABLE.items()
}
