"""Keys that go to transformers' Seq2SeqTrainingArguments, with their types and defaults: shipped,
so that reading a YAML imports no torch.

A test compares them with the installed transformers, so that a new release shows what is
missing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from longfactory.config.fields import arg, keys_of

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
_Level = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerKeys:
    """Values of transformers' keys: as they were given, else their defaults."""

    # output and phases
    output_dir: str | None = arg(None, "", path=True)
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    predict_with_generate: bool = False
    resume_from_checkpoint: bool | str | None = arg(None, "", path=True)
    # batch, length of the run
    per_device_train_batch_size: int = arg(8, "", low=1, high=10**6)
    per_device_eval_batch_size: int = arg(8, "", low=1, high=10**6)
    gradient_accumulation_steps: int = arg(1, "", low=1, high=10**6)
    num_train_epochs: float = arg(3.0, "", low=0, high=10**6)
    max_steps: int = arg(-1, "", low=-1, high=10**9)
    # optimizer and schedule
    learning_rate: float = arg(5e-5, "", low=0, high=100)
    lr_scheduler_type: _Schedule = "linear"
    lr_scheduler_kwargs: dict | str | None = None
    warmup_steps: float = arg(0.0, "", low=0, high=10**9)
    optim: _Optimizer = "adamw_torch_fused"
    optim_args: str | None = None
    optim_target_modules: tuple[str, ...] | None = None
    weight_decay: float = arg(0.0, "", low=0, high=100)
    adam_beta1: float = arg(0.9, "", low=0, below=1)
    adam_beta2: float = arg(0.999, "", low=0, below=1)
    adam_epsilon: float = arg(1e-8, "", above=0, high=1)
    max_grad_norm: float = arg(1.0, "", low=0, high=10**12)
    neftune_noise_alpha: float | None = arg(None, "", low=0, high=10**4)
    # numbers and devices
    bf16: bool = False
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    tf32: bool | None = None
    use_cpu: bool = False
    seed: int = arg(42, "", low=0, high=2**32 - 1)
    data_seed: int | None = arg(None, "", low=0, high=2**32 - 1)
    full_determinism: bool = False
    torch_empty_cache_steps: int | None = arg(None, "", low=1, high=10**9)
    # logging
    logging_strategy: _Interval = "steps"
    logging_steps: float = arg(500.0, "", low=-(10**9), high=10**9)
    logging_first_step: bool = False
    log_on_each_node: bool = True
    include_num_input_tokens_seen: bool | Literal["all", "non_padding", "no"] = "no"
    log_level: _Level = "passive"
    log_level_replica: _Level = "warning"
    disable_tqdm: bool | None = None
    report_to: tuple[str, ...] | None = arg("none", "")
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: bool | str | None = None
    debug: str = ""
    skip_memory_metrics: bool = True
    # evaluation
    eval_strategy: _Interval = "no"
    eval_steps: float | None = arg(None, "", low=-(10**9), high=10**9)
    eval_delay: float = arg(0.0, "", low=0, high=10**9)
    eval_on_start: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    # saving
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = arg(500.0, "", low=-(10**9), high=10**9)
    save_total_limit: int | None = arg(None, "", low=-1, high=10**6)
    save_only_model: bool = False
    save_on_each_node: bool = False
    restore_callback_states_from_checkpoint: bool = False
    ignore_data_skip: bool = False
    push_to_hub: bool = False
    hub_token: str | None = arg(None, "", secret=True)
    hub_private_repo: bool | None = None
    hub_model_id: str | None = None
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "every_save"
    hub_always_push: bool = False
    hub_revision: str | None = None
    # loading
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = arg(0, "", low=0, high=1024)
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = arg(None, "", low=1, high=10**4)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    # processes
    ddp_timeout: int = arg(1800, "", low=1, high=10**9)
    ddp_backend: str | None = None
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = arg(None, "", low=1, high=10**6)
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    deepspeed: dict | str | None = arg(None, "", path=True)  # noqa: RUF009  ruff trusts `str | None` alone


TRAINER_KEYS = keys_of(TrainerKeys)
