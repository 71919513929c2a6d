"""Keys that people's YAML files carry and that are not arguments here: other names, keys with no
effect, and keys that are refused.

Every key that LLaMA-Factory 0.9.5, its 360 fork or transformers 4 knows is an argument, or stands
in one of these tables.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ALIASES: dict[str, str] = {
    "image_dir": "media_dir",
    "image_resolution": "image_max_pixels",
    "video_resolution": "video_max_pixels",
    "new_special_tokens": "add_special_tokens",
    "use_cache": "use_kv_cache",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "no_cuda": "use_cpu",
    "use_liger_kernel": "enable_liger_kernel",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "context_parallel_size": "sequence_parallel_size",
    "hyper_parallel_cp_size": "sequence_parallel_size",
    "cp_size": "sequence_parallel_size",
    "cp_mode": "sequence_parallel_mode",
    "eval_num_beams": "num_beams",
    "generation_num_beams": "num_beams",
    "dpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "kto_beta": "pref_beta",
    "kto_ftx": "pref_ftx",
    "orpo_beta": "pref_beta",
    "simpo_beta": "pref_beta",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
}
"""Other name -> name here. The value keeps its meaning, but for those in `translate.rename`."""


@dataclasses.dataclass(frozen=True)
class Other:
    """`harmless` values pass without a word, since people copy defaults. Anything else earns the
    sentence.
    """

    harmless: tuple[Any, ...]
    sentence: str


_RAY = "Ray starts the processes (USE_RAY=1), and output_dir is where they write"

NO_EFFECT: dict[str, Other] = {
    "flash_attn": Other(
        ("auto",),
        "attention always goes through LongFactory's own kernels; attention_backend chooses among them",
    ),
    "enable_jit_checkpoint": Other(
        (False,), "every signal that stops a run saves a checkpoint first (stop_signals)"
    ),
    "use_reentrant_gc": Other((True, False), "recomputation is done by LongFactory itself"),
    "use_v1_kernels": Other(
        (False, None), "kernels are chosen here; enable_liger_kernel: true has fused ones"
    ),
    "upcast_layernorm": Other(
        (False,), "norms are computed in float32 whatever the format of their weights"
    ),
    "low_cpu_mem_usage": Other((True,), "weights are always loaded without a second copy"),
    "use_kv_cache": Other((True,), "training never keeps keys and values, generation always does"),
    "print_param_status": Other(
        (False,), "the number of trained parameters is printed at the start"
    ),
    "ignore_pad_token_for_loss": Other((True,), "there are no padding tokens inside a row"),
    "data_shared_file_system": Other(
        (False,), "data are tokenised once and no process waits for them behind a barrier"
    ),
    "fsdp_transformer_layer_cls_to_wrap": Other(
        (None,), "the layers to shard are found from the model"
    ),
    "fsdp_min_num_params": Other((0,), "the layers to shard are found from the model"),
    "save_safetensors": Other((True,), "files are always written as safetensors"),
    "remove_unused_columns": Other((True, False), "columns are chosen by the data format"),
    "label_names": Other((None, "labels", ["labels"]), "labels are part of the row"),
    "prediction_loss_only": Other((True, False), "evaluation never keeps logits"),
    "eval_accumulation_steps": Other((None,), "evaluation never keeps logits"),
    "eval_use_gather_object": Other((False,), "evaluation never gathers logits"),
    "eval_do_concat_batches": Other((True,), "evaluation never gathers logits"),
    "dataloader_persistent_workers": Other((True, False), "loading processes always persist"),
    "dataloader_in_order": Other((True,), "rows always come in their order"),
    "logging_nan_inf_filter": Other(
        (False,), "the log shows what was computed; on_nan says what a NaN or Inf does to the run"
    ),
    "local_rank": Other((None,), "the launcher's environment tells each process its rank"),
    "fp8_enable_fsdp_float8_all_gather": Other(
        (False,), "weights have a scale for each row, and are gathered in the run's own precision"
    ),
    "ray_run_name": Other((None,), _RAY),
    "ray_storage_path": Other((None,), _RAY),
    "ray_scope": Other(("last",), _RAY),
    "badam_verbose": Other((0,), "the order of layers and their interval are logged at the start"),
    "visual_inputs": Other((False,), "whether a model takes images is read from its files"),
    "use_audio_in_video": Other((False,), "audio is not supported"),
    "audio_sampling_rate": Other((16000,), "audio is not supported"),
}
"""Keys whose value changes nothing here. A value that is not harmless is noted at the start of the
run.
"""

_SGLANG = "SGLang is not started from here; use infer_backend: vllm, or serve the exported model with SGLang itself"
_EXPORT_Q = "export writes full precision; quantise the exported folder with GPTQModel or llm-compressor (docs/methods.md has the calls)"
_KT = "KTransformers is not supported; use optimizer_placement: host or a DeepSpeed offload JSON"
_PPO = "ppo is not supported; use stage: dpo or kto, or stage: rm for a reward model alone; roll out with vLLM (TRL, verl) and learn from the rollouts with stage: rl"
_SWAN = "messages to Lark are not sent; register SwanLab's own Lark callback in a script"
_PROF = "modules are not annotated in the trace; profiler_with_stack: true shows the lines of each operation"
_MCA = "Megatron back ends are not supported; their files are read as runs of Hugging Face's model: leave it out"
_HUB = "use a local folder, or a model on the Hugging Face hub"

REFUSED: dict[str, Other] = {
    # model
    "adapter_folder": Other((None,), "write the adapter's own path in adapter_name_or_path"),
    "new_special_tokens_config": Other((None,), "list the tokens in add_special_tokens"),
    "init_special_tokens": Other(
        ("noise_init",),
        "new tokens start as the mean of the embedding with noise; edit the model beforehand",
    ),
    "shift_attn": Other(
        (False,), "S2-Attn approximates; use sequence_parallel_size, which is exact"
    ),
    "mixture_of_depths": Other(
        (None,),
        "tokens that skip a layer are chosen by their rank among all tokens of the row, those that come later included: a causal model of "
        "length T has no such choice under sequence parallelism or in generation; train the model as it is",
    ),
    "use_unsloth": Other(
        (False,), "Unsloth replaces the model's layers and cannot share a sequence; leave it out"
    ),
    "upcast_lmhead_output": Other(
        (False,), "log-probabilities are always computed in float32; leave it out"
    ),
    "offload_folder": Other(
        ("offload",),
        "weights are not offloaded to disk; use optimizer_placement: host or a DeepSpeed JSON",
    ),
    "ms_hub_token": Other((None,), _HUB),
    "om_hub_token": Other((None,), _HUB),
    "quantization_device_map": Other(
        (None,), "a quantised model is placed on one device by each process; leave it out"
    ),
    # export and serving
    "export_legacy_format": Other((False,), "export writes safetensors"),
    "export_quantization_bit": Other((None,), _EXPORT_Q),
    "export_quantization_dataset": Other((None,), _EXPORT_Q),
    "export_quantization_nsamples": Other((128,), _EXPORT_Q),
    "export_quantization_maxlen": Other((1024,), _EXPORT_Q),
    "sglang_maxlen": Other((4096,), _SGLANG),
    "sglang_mem_fraction": Other((0.7,), _SGLANG),
    "sglang_tp_size": Other((-1,), _SGLANG),
    "sglang_config": Other((None,), _SGLANG),
    "sglang_lora_backend": Other(("triton",), _SGLANG),
    # KTransformers
    "use_kt": Other((False,), _KT),
    "kt_config": Other((None,), _KT),
    "kt_cpu_activation": Other((None,), _KT),
    "kt_weight_path": Other((None,), _KT),
    "kt_non_expert_weight_path": Other((None,), _KT),
    "kt_expert_checkpoint_path": Other((None,), _KT),
    "kt_use_lora_experts": Other((None,), _KT),
    "kt_lora_expert_num": Other((None,), _KT),
    "kt_optimize_rule": Other((None,), _KT),
    "kt_maxlen": Other((4096,), _KT),
    "kt_use_cuda_graph": Other((True,), _KT),
    "kt_mode": Other(("normal",), _KT),
    "kt_force_think": Other((False,), _KT),
    "cpu_infer": Other((32,), _KT),
    "chunk_size": Other((8192,), _KT),
    "kt_lora_expert_intermediate_size": Other((None,), _KT),
    # reinforcement learning
    "ppo_buffer_size": Other((1,), _PPO),
    "ppo_epochs": Other((4,), _PPO),
    "ppo_score_norm": Other((False,), _PPO),
    "ppo_target": Other((6.0,), _PPO),
    "ppo_whiten_rewards": Other((False,), _PPO),
    "reward_model": Other((None,), _PPO),
    "reward_model_adapters": Other((None,), _PPO),
    "reward_model_quantization_bit": Other((None,), _PPO),
    "reward_model_type": Other(("lora",), _PPO),
    # optimizers
    # other systems
    "use_mca": Other((False,), _MCA),
    "use_megatron_bridge": Other((False,), _MCA),
    "use_hyper_parallel": Other((False,), _MCA),
    "hyper_parallel_args": Other((None,), _MCA),
    "master_addr": Other((None,), "set the environment variable MASTER_ADDR"),
    "master_port": Other((None,), "set the environment variable MASTER_PORT"),
    "fp8_backend": Other(
        ("auto", "torchao"),
        "Transformer Engine replaces whole layers, attention among them; use torchao",
    ),
    "badam_mask_mode": Other(
        ("adjacent",),
        "entries that are drawn one by one need an index each, four times the states' own memory; use adjacent",
    ),
    "profile_modules": Other((None,), _PROF),
    "swanlab_lark_webhook_url": Other((None,), _SWAN),
    "swanlab_lark_secret": Other((None,), _SWAN),
    # transformers' keys that fight with rows, sharding or the head
    "fsdp_config": Other(
        (None, "", {}),
        "FSDP2's settings are made here so that gradients stay exact; use sharding: fsdp2",
    ),
    "parallelism_config": Other((None,), "use sequence_parallel_size and sharding"),
    "accelerator_config": Other(
        (
            *(
                None,
                "",
                {},
                {"split_batches": False},
                {"dispatch_batches": False},
                {"dispatch_batches": None},
                {"even_batches": False},
            ),
            *(
                {"even_batches": True},
                {"use_seedable_sampler": True},
                {"use_seedable_sampler": False},
                {"non_blocking": True},
            ),
            *(
                {"non_blocking": False},
                {"gradient_accumulation_kwargs": None},
                {"use_configured_state": False},
            ),
        ),
        "loading and accumulation are LongFactory's own (each process reads its own rows, as dispatch_batches: false says); "
        "use the dataloader_* keys",
    ),
    "auto_find_batch_size": Other(
        (False,), "processes would disagree on the batch; set per_device_train_batch_size"
    ),
    "average_tokens_across_devices": Other(
        (True,), "the loss is always the mean over every token of the step, on all devices"
    ),
    "torch_compile": Other(
        (False,),
        "hand-written backward passes are not traced by torch.compile; enable_liger_kernel has fused kernels",
    ),
    "torch_compile_backend": Other(
        (None,), "hand-written backward passes are not traced by torch.compile; leave it out"
    ),
    "torch_compile_mode": Other(
        (None,), "hand-written backward passes are not traced by torch.compile; leave it out"
    ),
    "liger_kernel_config": Other((None,), "use enable_liger_kernel: true"),
    "include_for_metrics": Other(
        (None, "", []), "metrics are computed from log-probabilities; use compute_accuracy"
    ),
    "include_inputs_for_metrics": Other(
        (False,), "metrics are computed from log-probabilities; use compute_accuracy"
    ),
    "batch_eval_metrics": Other(
        (False,), "metrics are computed from log-probabilities; use compute_accuracy"
    ),
    "dataloader_multiprocessing_context": Other(
        (None,), "loading processes start in torch's own way; leave it out"
    ),
    "length_column_name": Other(
        ("length",), "lengths are those of the tokenised rows; leave it out"
    ),
    "generation_max_length": Other(
        (None,), "use max_new_tokens, or max_length with max_new_tokens: 0"
    ),
    "generation_config": Other(
        (None,), "use the generation keys (max_new_tokens, temperature, ...)"
    ),
    "sortish_sampler": Other((False,), "use train_sampling_strategy: group_by_length"),
    # transformers 4 alone
    "half_precision_backend": Other(
        ("auto",), "leave it out; bf16: true or fp16: true says it all"
    ),
    "fp16_backend": Other(("auto",), "leave it out; bf16: true or fp16: true says it all"),
    "fp16_opt_level": Other(("O1",), "apex is not supported; use bf16: true"),
    "past_index": Other((-1,), "leave it out"),
    "jit_mode_eval": Other((False,), "leave it out"),
    "use_ipex": Other((False,), "leave it out"),
    "use_mps_device": Other((False,), "leave it out; the device is found"),
    "tpu_num_cores": Other((None,), "TPUs are not supported"),
    "tpu_metrics_debug": Other((False,), "TPUs are not supported"),
    "mp_parameters": Other(
        ("",), "SageMaker's model parallelism is not supported; use sharding: fsdp2"
    ),
    "push_to_hub_organization": Other((None,), "write organisation/name in hub_model_id"),
    "dispatch_batches": Other((None, False), "loading is LongFactory's own; leave it out"),
    "split_batches": Other((None, False), "loading is LongFactory's own; leave it out"),
    "torchdynamo": Other((None,), "leave it out"),
    "use_legacy_prediction_loop": Other((False,), "leave it out"),
    # rewritten engine of LLaMA-Factory
    "dist_config": Other((None,), "use sharding: fsdp2, or deepspeed: with a JSON"),
    "micro_batch_size": Other((None,), "use per_device_train_batch_size instead"),
    "global_batch_size": Other(
        (None,), "use per_device_train_batch_size and gradient_accumulation_steps"
    ),
    "reserved_label_len": Other(
        (1,), "a sample is shortened by the rule of cutoff_strategy; leave it out"
    ),
    "batching_strategy": Other((None,), "use packing: true"),
}
"""Keys that are refused unless harmless, with what to use instead."""

_OTHER_QUANTISER = "bitsandbytes and hqq quantise while loading (quantization_method: bnb or hqq); a model that is already quantised needs no key"

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "stage": {
        "ppo": _PPO,
        **{name: f"use stage: dpo with pref_loss: {name}" for name in ("orpo", "simpo", "ipo")},
    },
    "init_lora_weights": {
        **dict.fromkeys(
            ("eva", "corda"),
            "it looks at the layers' inputs on some data before training, which runs do not collect; use pissa_init: true",
        ),
        **dict.fromkeys(
            ("lora_ga", "loraga"),
            "it begins from the whole weights' gradients on some data before training, which runs do not compute; use pissa_init: true",
        ),
        "loftq": "PEFT's LoftQ keeps the rounded weights in full precision, so that nothing is saved; use quantization_bit: 4 with plain LoRA",
        "pissa": "use pissa_init: true, with pissa_iter",
    },
    "infer_backend": {"sglang": _SGLANG, "ktransformers": _SGLANG},
    "quantization_method": {
        "eetq": "transformers 5 takes EETQ's kernels from the hub at run time, and runs use no network; use quantization_method: hqq with quantization_bit: 8",
        **dict.fromkeys(("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8"), _OTHER_QUANTISER),
    },
}
"""Values of our own keys that LLaMA-Factory knows and that are refused, with what to use instead.
"""

ELSEWHERE: dict[str, str] = {
    # length of a sample
    **dict.fromkeys(
        (
            "max_seq_length",
            "max_seq_len",
            "sequence_len",
            "sequence_length",
            "seq_length",
            "seq_len",
            "model_max_length",
            "block_size",
        ),
        "cutoff_len",
    ),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length", "max_source_length", "max_target_length"),
        "cutoff_len",
    ),
    # model and method
    **dict.fromkeys(
        (
            "base_model",
            "model",
            "model_id",
            "model_path",
            "model_name",
            "pretrained_model_name_or_path",
        ),
        "model_name_or_path",
    ),
    **dict.fromkeys(("load_in_4bit", "use_4bit"), "quantization_bit: 4"),
    **dict.fromkeys(("load_in_8bit", "use_8bit"), "quantization_bit: 8"),
    "bnb_4bit_quant_type": "quantization_type",
    **dict.fromkeys(("bnb_4bit_use_double_quant", "use_nested_quant"), "double_quantization"),
    **dict.fromkeys(
        ("use_peft", "use_lora", "adapter", "peft_type", "train_type", "tuner_type"),
        "finetuning_type",
    ),
    **dict.fromkeys(("lora_r", "lora_dim", "peft_lora_r"), "lora_rank"),
    **dict.fromkeys(
        ("lora_target_modules", "lora_modules", "target_modules", "lora_target_linear"),
        "lora_target",
    ),
    **dict.fromkeys(("lora_modules_to_save", "modules_to_save"), "additional_target"),
    **dict.fromkeys(
        ("lora_model_dir", "lora_adapter_path", "checkpoint_dir", "adapters", "peft_path"),
        "adapter_name_or_path",
    ),
    **dict.fromkeys(("rl", "rlhf_type", "training_type", "task_type"), "stage"),
    "loss_type": "pref_loss",
    **dict.fromkeys(("beta", "rl_beta"), "pref_beta"),
    "rpo_alpha": "pref_ftx",
    "label_smoothing": "dpo_label_smoothing",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
    "truncation_mode": "cutoff_strategy",
    "activation_offloading": "offload_activations",
    "tiled_mlp": "mlp_chunk",
    "ref_model_name_or_path": "ref_model",
    **dict.fromkeys(("torch_dtype", "dtype", "mixed_precision"), "bf16"),
    **dict.fromkeys(
        ("attn_implementation", "attn_impl", "flash_attention", "use_flash_attn"),
        "attention_backend",
    ),
    # data
    **dict.fromkeys(
        (
            "datasets",
            "dataset_name",
            "data_path",
            "train_file",
            "train_files",
            "train_data",
            "train_dataset",
        ),
        "dataset",
    ),
    **dict.fromkeys(
        ("test_datasets", "val_dataset", "validation_file", "val_data"), "eval_dataset"
    ),
    **dict.fromkeys(("val_set_size", "split_dataset_ratio", "eval_split_ratio"), "val_size"),
    **dict.fromkeys(("chat_template", "template_type", "prompt_template"), "template"),
    **dict.fromkeys(("sample_packing", "pack_to_max_length", "sft_packing"), "packing"),
    "train_on_inputs": "train_on_prompt",
    **dict.fromkeys(("dataset_num_proc", "dataset_processes"), "preprocessing_num_workers"),
    "dataset_prepared_path": "tokenized_path",
    # optimizer, length of the run, saving
    **dict.fromkeys(("num_epochs", "epochs", "n_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("lr", "max_lr"), "learning_rate"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_name"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimizer_name"), "optim"),
    **dict.fromkeys(("gradient_clipping", "max_gradient_norm", "clip_grad"), "max_grad_norm"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("grad_accum_steps", "accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("wandb_name", "wandb_run_id"), "run_name"),
    **dict.fromkeys(("neftune_alpha", "noise_alpha"), "neftune_noise_alpha"),
    "early_stopping_patience": "early_stopping_steps",
    # devices
    **dict.fromkeys(
        (
            *(
                "sequence_parallel",
                "sequence_parallel_degree",
                "context_parallel_degree",
                "ulysses_sequence_parallel_size",
            ),
            *("sp_size", "ulysses_degree", "ring_attn_size"),
        ),
        "sequence_parallel_size",
    ),
    **dict.fromkeys(("use_liger", "liger_kernel"), "enable_liger_kernel"),
    **dict.fromkeys(("deepspeed_config", "deepspeed_config_file"), "deepspeed"),
    "num_gpus": "nproc_per_node",
}
"""Names that TRL, Unsloth, axolotl, ms-swift, torchtune and older LLaMA-Factory give to what a key
here says -> that key. They are refused: values and defaults differ (`load_in_4bit: true` is
`quantization_bit: 4`)."""


@dataclasses.dataclass(frozen=True)
class OtherFile:
    """A file of keys that is no run of ours: recognised by `enough` of these keys."""

    keys: frozenset[str]
    enough: int
    sentence: str


_ACCELERATE = (
    "compute_environment distributed_type num_processes num_machines machine_rank main_training_function rdzv_backend same_network "
    "downcast_bf16 tpu_use_cluster deepspeed_config"
)
_DEEPSPEED = "zero_optimization train_micro_batch_size_per_gpu train_batch_size zero_allow_untested_optimizer wall_clock_breakdown"

OTHER_FILES: tuple[OtherFile, ...] = (
    OtherFile(
        frozenset(_ACCELERATE.split()),
        3,
        "accelerate's own configuration, not a run. Start it with the run's file: accelerate launch --config_file <this file> "
        "src/train.py run.yaml; or give `longfactory train`, which starts the processes by itself, the run's file with sharding: fsdp2",
    ),
    OtherFile(
        frozenset(_DEEPSPEED.split()),
        2,
        "DeepSpeed's own configuration, not a run. Name it in the run's file: deepspeed: <this file>",
    ),
    OtherFile(
        frozenset(("task", "task_dir", "lang", "n_shot")),
        2,
        "a file for LLaMA-Factory's own `eval` (MMLU, C-Eval, CMMLU), which is not here. Export the model and give the folder to "
        "lm-evaluation-harness: lm_eval --model hf --model_args pretrained=<folder> --tasks mmlu",
    ),
)
