"""Keys that contradict each other, or ask for what is not there. Each problem is one sentence with
its remedy.
"""

from __future__ import annotations

from collections.abc import Iterator

from longfactory.config import (
    adapter_facts,
    evaluation_checks,
    optimizer_facts,
    packages,
    parallel_checks,
)
from longfactory.config.fields import plain
from longfactory.config.run import RunConfig
from longfactory.config.stage_facts import STAGES
from longfactory.memory.settings import PARTS_OF_CHECKPOINTING


def training(cfg: RunConfig, world_size: int | None) -> Iterator[str]:
    """The problems of a training run; without any, it can start as far as its keys go."""
    yield from _needed(cfg)
    yield from _data(cfg)
    yield from _method(cfg)
    yield from optimizer_facts.problems(cfg)
    yield from adapters(cfg)
    yield from parallel_checks.parallel(cfg)
    yield from _memory(cfg)
    if world_size is not None:
        yield from parallel_checks.processes(cfg, world_size)


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
    trackers = (*packages.TRACKERS, "all", "none")
    unknown = [name for name in packages.trackers(cfg) if name not in trackers]
    if unknown:
        yield (
            f"report_to: {plain(', '.join(unknown))} is not a choice. Choose from"
            f" {', '.join(trackers)}."
        )


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
    yield from evaluation_checks.predicting(cfg)
    yield from evaluation_checks.best_checkpoint(cfg)
    yield from _steps(cfg)
    yield from _optim_words(cfg)
    if cfg.trainer.bf16 and cfg.trainer.fp16:
        yield "bf16 and fp16 were both given. Keep one of them."
    if m.pure_bf16 and cfg.trainer.fp16:
        yield "pure_bf16 and fp16 contradict each other. Keep one of them."


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
