"""Keys that contradict each other, or ask for what is not there. Each problem is one sentence with
its remedy.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from longfactory.config import adapter_facts, optimizer_facts
from longfactory.config.data_names import short_names
from longfactory.config.fields import plain
from longfactory.config.run import RunConfig
from longfactory.config.stage_facts import STAGE_KEYS, STAGES
from longfactory.config.translate import OWN_KEYS
from longfactory.kernel_names import not_installed
from longfactory.memory.settings import PARTS_OF_CHECKPOINTING

TRACKERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What report_to can name, and the packages of which transformers needs one."""


def training(cfg: RunConfig, world_size: int | None) -> Iterator[str]:
    """The problems of a training run; without any, it can start as far as its keys go."""
    yield from _needed(cfg)
    yield from _data(cfg)
    yield from _method(cfg)
    yield from optimizer_facts.problems(cfg)
    yield from adapters(cfg)
    yield from _parallel(cfg)
    yield from _memory(cfg)
    if world_size is not None:
        yield from processes(cfg, world_size)


def inference(cfg: RunConfig, command: str) -> Iterator[str]:
    """The problems of an export or a chat."""
    if cfg.model.model_name_or_path is None:
        yield "model_name_or_path is missing: a folder, or a model's name on the hub."
    if cfg.data.cutoff_len == "auto" and cfg.model.rope_scaling is not None:
        yield (
            "cutoff_len: auto is decided when a run starts, and rope_scaling follows from it. Give"
            " the number: the run's longfactory.yaml has it."
        )
    if command == "chat" and cfg.model.infer_backend == "vllm":
        yield "infer_backend: vllm is for longfactory api and do_predict; chat is transformers'."
    if command == "export":
        if cfg.output.export_dir is None:
            yield "export_dir is missing: the folder to write the merged model to."
        if cfg.model.quantization_bit is not None and cfg.model.adapter_name_or_path:
            yield (
                "Adapters cannot be merged into quantised weights. Leave quantization_bit out: they"
                " are merged into the full weights."
            )
    yield from adapters(cfg)


def _needed(cfg: RunConfig) -> Iterator[str]:
    if cfg.model.model_name_or_path is None:
        yield "model_name_or_path is missing: a folder, or a model's name on the hub."
    if cfg.trainer.output_dir is None:
        yield "output_dir is missing: the folder for checkpoints and results."
    if cfg.trainer.do_train and not cfg.data.dataset and cfg.data.tokenized_path is None:
        yield (
            "dataset is missing: one or more names from dataset_info.json, paths of files, or"
            " tokenized_path."
        )
    unknown = [name for name in _trackers(cfg) if name not in (*TRACKERS, "all", "none")]
    if unknown:
        yield (
            f"report_to: {plain(', '.join(unknown))} is not a choice. Choose from"
            f" {', '.join(TRACKERS)}, all, none."
        )


def _trackers(cfg: RunConfig) -> tuple[str, ...]:
    names = cfg.hf.get("report_to") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _data(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    if data.streaming and data.cutoff_len == "auto":
        yield (
            "cutoff_len: auto needs the length of every sample, which streaming does not know. Give"
            " a number."
        )
    if data.train_on_prompt and data.mask_history:
        yield (
            "train_on_prompt trains on every token, mask_history on the last answer only. Keep "
            "one of them."
        )
    for name in ("train_on_prompt", "mask_history"):
        if getattr(data, name) and name not in STAGES[cfg.method.stage].keys:
            yield f"{name} is for stage: sft; this run's stage is {cfg.method.stage}. Leave it out."
    if data.packing is False and data.neat_packing:
        yield (
            "packing: false and neat_packing: true contradict each other. Keep packing: true;"
            " packed documents are always isolated."
        )
    if data.eval_dataset and data.val_size > 0:
        yield (
            "eval_dataset and val_size were both given. Keep one: other data, or a part of the"
            " training data."
        )
    trainer = cfg.trainer
    wants_eval = trainer.do_eval or trainer.eval_strategy != "no" or trainer.do_predict
    if wants_eval and not data.eval_dataset and data.val_size == 0 and data.tokenized_path is None:
        yield (
            "do_eval, do_predict, eval_strategy or eval_on_start is set, but there are no "
            "evaluation data. Set eval_dataset, or val_size above 0."
        )
    if data.val_size > 1 and data.val_size != int(data.val_size):
        yield (
            f"val_size: {data.val_size} is neither a fraction below 1 nor a whole number of "
            "samples."
        )
    if cfg.trainer.max_steps == 0:
        yield "max_steps: 0 trains nothing. Give a number above 0, or -1 for num_train_epochs."
    if cfg.trainer.num_train_epochs == 0 and cfg.trainer.max_steps < 0 and cfg.trainer.do_train:
        yield "num_train_epochs: 0 trains nothing. Give a number above 0, or max_steps."
    if data.streaming:
        if cfg.trainer.max_steps <= 0:
            yield "With streaming the length of the data is unknown. Set max_steps."
        if data.max_samples is not None:
            yield (
                "max_samples and streaming cannot be used together. Leave max_samples out;"
                " max_steps ends the run."
            )
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            if getattr(cfg.trainer, name) == "epoch":
                yield (
                    f"{name}: epoch has no meaning with streaming: a stream is repeated until "
                    f"max_steps. Set {name}: steps."
                )
        if 0 < data.val_size < 1:
            yield (
                "streaming needs val_size as a number of samples, since the length of the data is"
                " unknown."
            )
    if data.interleave_probs:
        if data.mix_strategy == "concat":
            yield (
                "interleave_probs is for mixing. Set mix_strategy: interleave_under (or _over,"
                " _once), or leave it out."
            )
        elif len(data.interleave_probs) != len(data.dataset):
            yield (
                f"interleave_probs has {len(data.interleave_probs)} numbers for {len(data.dataset)}"
                " data sets. Give one for each."
            )
        elif min(data.interleave_probs) <= 0:
            yield (
                "interleave_probs holds a 0: such a data set is never read. Leave it out of"
                " dataset."
            )
        elif abs(sum(data.interleave_probs) - 1) > 1e-6:
            yield (
                f"interleave_probs sum to {sum(data.interleave_probs):g}. They are probabilities:"
                " make them sum to 1."
            )


def _method(cfg: RunConfig) -> Iterator[str]:
    m = cfg.method
    facts = STAGES[m.stage]
    yield from facts.problems(m, cfg.model.train_from_scratch)
    if cfg.model.train_from_scratch and cfg.model.quantization_bit is not None:
        yield (
            "quantization_bit quantises weights as they are loaded, and train_from_scratch "
            "loads none. Leave out one of them."
        )
    if cfg.trainer.neftune_noise_alpha and m.pref_share_prompt is True and facts.shares_prompts:
        yield (
            "neftune_noise_alpha adds different noise to each answer's sequence, and "
            "pref_share_prompt: true computes the prompt once for both. Leave "
            "pref_share_prompt out."
        )
    yield from _predicting(cfg)
    yield from _best_checkpoint(cfg)
    yield from _steps(cfg)
    yield from _optim_words(cfg)
    if cfg.trainer.bf16 and cfg.trainer.fp16:
        yield "bf16 and fp16 were both given. Keep one of them."
    if m.pure_bf16 and cfg.trainer.fp16:
        yield "pure_bf16 and fp16 contradict each other. Keep one of them."


def _predicting(cfg: RunConfig) -> Iterator[str]:
    """Generated answers: do_predict, predict_with_generate, infer_backend."""
    m, trainer = cfg.method, cfg.trainer
    predicts = trainer.predict_with_generate
    if predicts and not STAGES[m.stage].predicts:
        yield (
            f"predict_with_generate is for stage: sft; this run's stage is {m.stage}. Leave it out."
        )
    if cfg.model.infer_backend == "vllm" and (
        not trainer.do_predict or trainer.do_train or trainer.do_eval
    ):
        yield (
            "infer_backend: vllm generates with a saved model: use do_predict: true with "
            "do_train: false and do_eval: false. Leave it out of a training run."
        )
    if trainer.do_predict and not predicts:
        yield "do_predict writes generated answers. Set predict_with_generate: true."
    if predicts and m.compute_accuracy:
        yield (
            "predict_with_generate and compute_accuracy cannot be used together. Keep one of them."
        )
    if predicts and cfg.parallel.sequence_parallel_size not in (1, "auto"):
        yield (
            "predict_with_generate generates on one device. Set sequence_parallel_size: 1, or"
            " generate from the exported model."
        )


def _best_checkpoint(cfg: RunConfig) -> Iterator[str]:
    """By what the best checkpoint is chosen, and when a run stops for want of a better one."""
    m, trainer = cfg.method, cfg.trainer
    if not STAGES[m.stage].reloads_best and trainer.load_best_model_at_end:
        yield (
            f"load_best_model_at_end is not supported with stage: {m.stage}. Leave it out and"
            " choose the checkpoint by its evaluation."
        )
    if m.early_stopping_steps is not None and trainer.eval_strategy == "no":
        yield "early_stopping_steps counts evaluations. Set eval_strategy and eval_steps."
    judged = (
        trainer.load_best_model_at_end
        or trainer.save_strategy == "best"
        or m.early_stopping_steps is not None
    )
    compared = trainer.metric_for_best_model and trainer.eval_strategy != "no"
    each = _evaluated_alone(cfg)
    if each and (judged or compared):
        metric = str(trainer.metric_for_best_model or "loss").removeprefix("eval_")
        if not any(metric.startswith(f"{name}_") for name in each):
            yield (
                "With eval_on_each_dataset each data set has its own loss, and the best "
                "checkpoint is chosen by one of them. Set metric_for_best_model: "
                f"eval_{each[0]}_loss (or another's)."
            )
    if trainer.metric_for_best_model and trainer.eval_strategy != "no":
        yield from _metric(cfg, trainer.metric_for_best_model)
    if trainer.save_strategy == "best" and not trainer.metric_for_best_model:
        yield (
            "save_strategy: best compares evaluations. Set metric_for_best_model, for example loss."
        )


def _evaluated_alone(cfg: RunConfig) -> list[str]:
    """The data sets that have metrics of their own, by the names in these; none where one
    evaluation is of all.
    """
    several = cfg.data.eval_on_each_dataset and len(cfg.data.eval_dataset) > 1
    return short_names(cfg.data.eval_dataset) if several else []


OF_TOKENS = (
    *("loss", "accuracy", "kl"),
    *("router_aux_loss", "expert_max_load", "expert_entropy", "expert_dead"),
)
"""What evaluations of pt and sft may compute."""


def _metric(cfg: RunConfig, given: str) -> Iterator[str]:
    """A metric that no evaluation computes would end the run after its first one."""
    name = given.removeprefix("eval_")
    each = _evaluated_alone(cfg)
    # one data set's name may begin with another's
    names = [name.removeprefix(f"{of}_") for of in each if name.startswith(f"{of}_")]
    if each and not names:
        return  # it is told that each has its own
    names = names or [name]
    if all(n.startswith(("rouge-", "bleu-")) for n in names):
        yield (
            f"metric_for_best_model: {given} measures generated answers, and evaluation during "
            "training generates none. Set loss, or compare saved checkpoints with do_predict "
            "and predict_with_generate."
        )
    elif cfg.method.stage in ("pt", "sft"):
        computed = [n for n in names if n in OF_TOKENS]
        if computed == ["accuracy"] and not cfg.method.compute_accuracy:
            yield f"metric_for_best_model: {given} needs compute_accuracy: true."
        elif not computed:
            yield (
                f"metric_for_best_model: no evaluation computes {given}. Choose loss, or accuracy"
                " with compute_accuracy: true."
            )


def _steps(cfg: RunConfig) -> Iterator[str]:
    """After how many steps something is done: not after none."""
    for strategy, key, words in (
        (cfg.trainer.logging_strategy, "logging_steps", "log"),
        (cfg.trainer.eval_strategy, "eval_steps", "evaluate"),
    ):
        if strategy == "steps" and getattr(cfg.trainer, key) == 0:
            yield (
                f"{key}: 0 was given. Give a number above 0, or -1 to {words} after the last step"
                " alone."
            )


def _optim_words(cfg: RunConfig) -> Iterator[str]:
    """transformers' own optimizers: optim, optim_args, optim_target_modules."""
    given = str(cfg.trainer.optim_args or "").split(",")
    odd = [item for item in given if item and "=" not in item]
    if odd:
        yield (
            f"optim_args: {plain(', '.join(odd))} is not name=value. Write them so, with commas"
            " between them."
        )
    optim = str(cfg.trainer.optim)
    if optim.startswith(("galore_", "apollo_")) and not cfg.trainer.optim_target_modules:
        yield (
            f"optim: {optim} works on the modules that optim_target_modules names. Give them, for"
            " example q_proj,v_proj."
        )


def _updates_in_backward(cfg: RunConfig) -> str | None:
    """The key by which weights are updated before the whole gradient is known, or None."""
    optim = str(cfg.trainer.optim)
    if cfg.trainer.deepspeed is not None:
        return "deepspeed"
    if cfg.memory.optimizer_overlap:
        return "optimizer_overlap"
    if (layerwise := optimizer_facts.in_backward(cfg)) is not None:
        return layerwise
    return f"optim: {optim}" if optim.endswith(("layerwise", "lomo")) else None


def _memory(cfg: RunConfig) -> Iterator[str]:
    m = cfg.memory
    if cfg.method.on_nan == "skip" and (key := _updates_in_backward(cfg)) is not None:
        yield (
            f"on_nan: skip drops an update, but {key} updates weights before the whole "
            "gradient is known. Use on_nan: stop, or leave the other key out."
        )
    if not m.disable_gradient_checkpointing:
        return
    for name, off in PARTS_OF_CHECKPOINTING.items():
        if getattr(m, name) not in ("auto", off):
            yield (
                f"{name} is a part of checkpointing, and disable_gradient_checkpointing: true turns"
                " that off. Leave one of them out."
            )


def adapters(cfg: RunConfig) -> Iterator[str]:
    """Contradictions about LoRA and quantised weights."""
    model, m = cfg.model, cfg.method
    lora = adapter_facts.trains_adapters(m)
    if model.adapter_name_or_path and not lora:
        yield (
            "adapter_name_or_path is for finetuning_type: lora or oft; this run's is"
            f" {m.finetuning_type}. Merge it first (longfactory export)."
        )
    yield from adapter_facts.problems(m)
    if m.pissa_convert and model.adapter_name_or_path and not m.create_new_adapter:
        yield (
            "pissa_convert needs the initial PiSSA adapter, and adapter_name_or_path continues "
            "from a trained one. Leave one of them out."
        )
    if model.fp8 and not (cfg.trainer.bf16 or m.pure_bf16):
        yield "fp8: true needs a bf16 run. Set bf16: true or pure_bf16: true."
    if model.fp8 and model.quantization_bit is not None:
        yield "fp8 and quantization_bit are two formats of the same weights. Leave one of them out."
    if model.quantization_bit is None:
        return
    yield from _quantisation(cfg)
    if not lora:
        yield (
            f"quantization_bit is for finetuning_type: lora or oft; this run's is"
            f" {m.finetuning_type}. Use lora, or leave quantization_bit out."
        )
    if adapter_facts.moves_base_weights(m):
        key = "pissa_init" if m.pissa_init else "init_lora_weights: olora"
        yield (
            f"{key} decomposes the full weights and cannot read quantised ones. Leave one of"
            " the two out."
        )
    if model.resize_vocab:
        yield (
            "resize_vocab cannot enlarge a quantised embedding. Resize the model first, or leave"
            " quantization_bit out."
        )
    if model.adapter_name_or_path and m.create_new_adapter:
        yield (
            "create_new_adapter merges the given adapters, which quantised weights do not allow."
            " Merge them first (longfactory export)."
        )
    if len(model.adapter_name_or_path) > 1:
        yield "A quantised model takes one adapter. Merge the others first (longfactory export)."


def _quantisation(cfg: RunConfig) -> Iterator[str]:
    """Contradictions between a package that quantises, its bits and the sharding."""
    model, sharded = cfg.model, cfg.parallel.sharding == "fsdp2"
    if model.quantization_method == "hqq":
        if sharded:
            yield (
                "HQQ keeps a layer's scales separately from its weights, and FSDP2 does not "
                "shard them. Use sharding: ddp, or quantization_method: bnb with "
                "quantization_bit: 4."
            )
    elif model.quantization_bit not in (4, 8):
        yield (
            f"quantization_bit: got {model.quantization_bit}, expected 4 or 8 for"
            " quantization_method: bnb. Use one of them, or quantization_method: hqq."
        )
    elif model.quantization_bit == 8 and sharded:
        yield "FSDP2 cannot shard weights of 8 bits. Use quantization_bit: 4, or sharding: ddp."


BACKENDS = ("nccl", "gloo", "mpi", "ucc", "xccl", "ccl", "hccl", "cncl", "mccl")
"""What a process group can talk through; which of them a machine has, torch knows."""


def backends(ddp_backend: str) -> list[str]:
    """The names in `ddp_backend`: nccl, or cuda:nccl,cpu:gloo."""
    return [part.rpartition(":")[2].strip().lower() for part in ddp_backend.split(",")]


def _parallel(cfg: RunConfig) -> Iterator[str]:
    p = cfg.parallel
    wanted = backends(cfg.trainer.ddp_backend or "gloo")
    if unknown := [name for name in wanted if name not in BACKENDS]:
        yield (
            f"ddp_backend: {plain(', '.join(unknown))} is not a choice. Choose from"
            f" {', '.join(BACKENDS)}; or leave it out."
        )
    elif cfg.trainer.use_cpu and "nccl" in wanted and "gloo" not in wanted:
        yield (
            "ddp_backend: nccl needs GPUs, and use_cpu: true uses none. Use gloo, or leave it out."
        )
    ulysses, ring = p.sequence_parallel_ulysses_degree, p.sequence_parallel_ring_degree
    size = p.sequence_parallel_size
    if size == "auto":
        for name, degree in (("ulysses", ulysses), ("ring", ring)):
            if degree is not None:
                yield (
                    f"sequence_parallel_{name}_degree: {degree} needs a fixed "
                    "sequence_parallel_size, and this run's is auto. Give the size, or leave "
                    "the degree out."
                )
    elif p.sequence_parallel_mode == "usp":
        if ulysses is not None and ring is not None and ulysses * ring != size:
            yield (
                f"usp: sequence_parallel_ulysses_degree {ulysses} x sequence_parallel_ring_degree"
                f" {ring} = {ulysses * ring}, and sequence_parallel_size is"
                f" {size}. Make them equal, or give one degree alone."
            )
        for name, degree in (("ulysses", ulysses), ("ring", ring)):
            if degree is not None and size % degree:
                yield (
                    f"sequence_parallel_{name}_degree: {degree} does not divide"
                    f" sequence_parallel_size: {size}."
                )
    elif (ulysses or 1) > 1 or (ring or 1) > 1:
        yield (
            "sequence_parallel_ulysses_degree and sequence_parallel_ring_degree are for"
            f" sequence_parallel_mode: usp; this run's is {p.sequence_parallel_mode}. Set usp, or"
            " leave them out."
        )
    deepspeed = cfg.trainer.deepspeed
    if deepspeed is not None:
        if p.sharding != "auto":
            yield f"deepspeed and sharding: {p.sharding} were both given. Keep one of them."
        yield from _deepspeed(deepspeed, cfg)


def _deepspeed(given: str | dict, cfg: RunConfig) -> Iterator[str]:
    config = given
    if isinstance(given, str):
        path = Path(given)
        if not path.is_file():
            yield (
                f"deepspeed: there is no file {path}. Ready-made ones are in LongFactory's"
                " repository, in examples/deepspeed/."
            )
            return
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            yield f"deepspeed: {path} cannot be read: {e.strerror or e}."
            return
        except (ValueError, RecursionError) as e:
            yield f"deepspeed: {path} is not valid JSON ({e})."
            return
    if not isinstance(config, dict):
        yield f"deepspeed: {given} is not a JSON object; expected a DeepSpeed configuration."
        return
    if cfg.trainer.do_predict and not cfg.trainer.do_train:
        yield "do_predict without training does not use DeepSpeed. Leave deepspeed out."
    zero = config.get("zero_optimization")
    if (
        cfg.trainer.do_eval
        and not cfg.trainer.do_train
        and not (isinstance(zero, dict) and zero.get("stage") == 3)
    ):
        yield ("do_eval without training uses DeepSpeed only with ZeRO-3. Leave deepspeed out.")
    if isinstance(zero, dict) and zero.get("stage") == 3:
        if cfg.trainer.predict_with_generate:
            yield (
                "predict_with_generate cannot run under ZeRO-3. Use a ZeRO-2 JSON, or generate from"
                " the exported model."
            )
        if cfg.model.quantization_bit is not None:
            yield (
                "ZeRO-3 cannot shard quantised weights. Use a ZeRO-2 JSON, or leave"
                " quantization_bit out."
            )
        if cfg.method.pure_bf16 and zero.get("offload_optimizer"):
            yield (
                "pure_bf16 and offload_optimizer: DeepSpeed's optimizer on the host keeps float32"
                " states. Use bf16: true, or leave offload_optimizer out."
            )
        if cfg.method.pissa_init:
            yield (
                "pissa_init needs unsharded weights, which ZeRO-3 never has. Use a ZeRO-2 JSON "
                "or sharding: fsdp2."
            )


def processes(cfg: RunConfig, world_size: int) -> Iterator[str]:
    """Whether the run fits so many processes."""
    size = cfg.parallel.sequence_parallel_size
    if size == "auto" or world_size % size == 0:
        return
    if world_size < size:
        yield (
            f"sequence_parallel_size: {size} needs {size} processes or a multiple, and "
            f"{world_size} would start. Set sequence_parallel_size: {world_size}, or "
            f"nproc_per_node: {size} (on a machine without GPUs)."
        )
    else:
        fit = max(d for d in range(1, size + 1) if world_size % d == 0)
        near = world_size - world_size % size
        yield (
            f"sequence_parallel_size: {size} does not divide the {world_size} processes. Use {fit},"
            f" or {near} processes."
        )


def extras(cfg: RunConfig) -> Iterator[str]:
    """Packages that the run needs and that are not installed."""

    def missing(module: str) -> bool:
        return importlib.util.find_spec(module) is None

    if cfg.trainer.deepspeed is not None and missing("deepspeed"):
        yield 'deepspeed: the package is not installed. Run: pip install "longfactory[deepspeed]"'
    by_hqq = cfg.model.quantization_method == "hqq"
    if cfg.model.quantization_bit is not None and not by_hqq and missing("bitsandbytes"):
        yield (
            "quantization_bit: bitsandbytes is not installed. Run: pip install"
            ' "longfactory[quantization]"'
        )
    if cfg.model.quantization_bit is not None and by_hqq and missing("hqq"):
        yield 'quantization_method: hqq is not installed. Run: pip install "longfactory[hqq]"'
    if cfg.model.infer_backend == "vllm" and missing("vllm"):
        yield "infer_backend: vllm is not installed. Run: pip install vllm"
    if cfg.model.fp8 and missing("torchao"):
        yield 'fp8: torchao is not installed. Run: pip install "longfactory[fp8]"'
    if cfg.model.enable_liger_kernel and missing("liger_kernel"):
        yield (
            "enable_liger_kernel: liger-kernel is not installed. Run: pip install"
            ' "longfactory[liger]"'
        )
    yield from _optimizer(cfg)
    for name in _trackers(cfg):
        packages = TRACKERS.get(name, ())
        if packages and all(missing(package) for package in packages):
            yield f"report_to: {name} is not installed. Run: pip install {packages[0]}"
    backend = cfg.parallel.attention_backend
    remedy = not_installed(backend)
    if remedy is not None:
        yield (
            f"attention_backend: {backend} is not installed. {remedy}, or use "
            "attention_backend: auto, which needs only torch."
        )


_BNB = ("bitsandbytes", "bitsandbytes")
OPTIMIZERS = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    **dict.fromkeys(
        ("lion_", "paged_lion_", "ademamix", "paged_ademamix", "paged_adamw_32bit", "rmsprop_bnb"),
        _BNB,
    ),
}
"""How names of optimizers begin -> the module that makes them, and its package. AdamW in 8 and 4
bit is asked for with its memory.
"""


def _optimizer(cfg: RunConfig) -> Iterator[str]:
    facts = optimizer_facts.chosen(cfg)
    if facts is not None and facts.module and importlib.util.find_spec(facts.module) is None:
        yield (
            f"{facts.name} needs {facts.package}, which is not installed. Run: pip install"
            f" {facts.package}; or leave {facts.name} out."
        )
    name = str(cfg.trainer.optim)
    for start, (module, package) in OPTIMIZERS.items():
        if name.startswith(start) and importlib.util.find_spec(module) is None:
            yield (
                f"optim: {name} needs {package}, which is not installed. Run: pip install"
                f" {package}; or use optim: adamw_torch_fused."
            )


def negative_steps(cfg: RunConfig) -> list[str]:
    """What transformers makes of a number below 0 in place of steps, in a sentence each."""
    what = {
        "logging": "the log has one line",
        "eval": "the run is evaluated once",
        "save": "one checkpoint is written",
    }
    found = []
    for name, words in what.items():
        steps = getattr(cfg.trainer, f"{name}_steps") or 0
        if getattr(cfg.trainer, f"{name}_strategy") == "steps" and steps < 0:
            found.append(f"{name}_steps: {steps:g}: {words}, after the last step.")
    return found


FREEZE_PARTS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
"""Of a model with images, in every finetuning_type."""
RAY_KEYS = ("ray_num_workers", "resources_per_worker", "placement_strategy", "ray_init_kwargs")


def idle(cfg: RunConfig, given: set[str]) -> list[str]:
    """Keys that were given and that this stage or method never reads, in a sentence each."""
    facts, kind = STAGES[cfg.method.stage], cfg.method.finetuning_type
    methods = optimizer_facts.METHOD_OPTIMIZERS.values()
    switched = [(f.name, f.prefix) for f in methods if f.prefix]
    rules: list[tuple[Callable[[str], bool], bool, str]] = [
        (
            lambda k: k.startswith(("lora_", "pissa_", "loraplus_")),
            kind == "lora",
            f"finetuning_type is {kind}",
        ),
        (
            lambda k: k == "additional_target",
            kind in adapter_facts.ADAPTERS,
            f"finetuning_type is {kind}",
        ),
        (lambda k: k.startswith("oft_"), kind == "oft", f"finetuning_type is {kind}"),
        (lambda k: k == "module_dropout", kind == "oft", f"finetuning_type is {kind}"),
        (
            lambda k: (
                k.startswith("freeze_")
                and k not in FREEZE_PARTS
                and not (k == "freeze_trainable_layers" and cfg.method.use_llama_pro)
            ),
            kind == "freeze",
            f"finetuning_type is {kind}",
        ),
        (
            lambda k: k in RAY_KEYS,
            os.environ.get("USE_RAY", "0").lower() in ("1", "true"),
            "USE_RAY=1 is not set, and Ray starts nothing",
        ),
        *(
            (
                (lambda k, start=prefix: k.startswith(start)),
                getattr(cfg.method, name),
                f"{name} is off",
            )
            for name, prefix in switched
        ),
        (lambda k: k == "buffer_size", cfg.data.streaming, "streaming is off"),
        (
            lambda k: k in ("quantization_method", "quantization_type", "double_quantization"),
            bool(cfg.model.quantization_bit or cfg.method.ref_model_quantization_bit),
            "quantization_bit is not given",
        ),
        (
            lambda k: k == "create_new_adapter",
            bool(cfg.model.adapter_name_or_path),
            "adapter_name_or_path is not given",
        ),
        (lambda k: k == "pissa_iter", cfg.method.pissa_init, "pissa_init is off"),
        (
            lambda k: k == "loraplus_lr_embedding",
            cfg.method.loraplus_lr_ratio is not None,
            "loraplus_lr_ratio is not given",
        ),
        (
            lambda k: k.startswith("profiler_"),
            cfg.output.enable_torch_profiler,
            "enable_torch_profiler is off",
        ),
        (
            lambda k: (
                k in ("default_system", "tool_format", "enable_thinking", "preserve_thinking")
            ),
            STAGES[cfg.method.stage].samples != "pt",
            f"stage is {cfg.method.stage}, whose texts go through no template",
        ),
        (
            lambda k: k == "max_length",
            cfg.trainer.do_predict,
            (
                "it is the length of generated answers, and the length of training samples is"
                f" cutoff_len ({cfg.data.cutoff_len})"
            ),
        ),
    ]
    found = []
    for name in sorted(given):
        reasons = [why for applies, read, why in rules if applies(name) and not read]
        if name in STAGE_KEYS and (reason := facts.unread(name, cfg.method)) is not None:
            reasons.append(reason)
        if reasons and not _is_default(cfg, name):
            found += [f"{name} has no effect: {why}." for why in reasons]
    return found


def _is_default(cfg: RunConfig, name: str) -> bool:
    groups = (cfg.model, cfg.data, cfg.method, cfg.parallel, cfg.generating, cfg.output)
    return (
        next((getattr(g, name) for g in groups if hasattr(g, name)), None) == OWN_KEYS[name].default
    )
