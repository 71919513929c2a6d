"""A run's model: the engine's attention in it, what is trained of it, its output layer; and the
kernels that attention will run on.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from longfactory import sp
from longfactory.config import RunConfig
from longfactory.config.adapter_facts import moves_base_weights, trains_adapters
from longfactory.errors import UserError
from longfactory.model import adapters, fp8, load, trained_parameters
from longfactory.model.liger import apply_liger
from longfactory.model.source import Source
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import FILE as VALUE_HEAD
from longfactory.model.value_head import TokenValues, load_value_head
from longfactory.shard import settings as shard
from longfactory.shard.buffers import send_buffers
from longfactory.sp import hf, vision
from longfactory.sp.backends import start
from longfactory.stages.base import Stage
from longfactory.train.memory_plan import Memory
from longfactory.train.ranks import or_all_fail

log = logging.getLogger("longfactory")


def build_model(
    cfg: RunConfig,
    model_config: Any,
    tokenizer: Any,
    ctx: sp.SequenceParallel,
    args: Seq2SeqTrainingArguments,
    stage: Stage,
    split: bool,
    *,
    images: bool = False,
) -> tuple[Any, TokenLogprobs | TokenValues, Source]:
    """The model with the engine's attention, what is trained of it, and its output layer taken
    over; and the files that it came from.

    Collective. Where one process fails (the one that reads the files for all, or one whose machine
    has others) all end with its sentence; but for DeepSpeed, whose loading communicates itself.

    Args:
        images: the run's rows have images, which pass through the model's tower.
    """
    dtype = computing_dtype(cfg, args, split)
    quantization = load.quantization_config(cfg.model, dtype, sharded=bool(args.fsdp))
    on_device = args.device if cfg.model.train_from_scratch else None
    # PiSSA and its kin compute with the weights before they are sent.
    receives = shard.receives_weights(args) and not (
        moves_base_weights(cfg.method)
        or adapters.start_from_weights(cfg.model.adapter_name_or_path)
    )
    read = functools.partial(
        load.load_model,
        cfg.model,
        model_config,
        dtype,
        attention=hf.ATTENTION,
        device=on_device,
        quantization=quantization,
        receives=receives,
    )
    make = functools.partial(
        _make_trainable, cfg, model_config, tokenizer, ctx, args, stage, split, images, receives
    )
    if args.deepspeed:
        return make(read())
    model = or_all_fail(read)
    if shard.loads_for_all(args):
        send_buffers(model, args.device)
    return or_all_fail(lambda: make(model))


def _make_trainable(
    cfg: RunConfig,
    model_config: Any,
    tokenizer: Any,
    ctx: sp.SequenceParallel,
    args: Seq2SeqTrainingArguments,
    stage: Stage,
    split: bool,
    images: bool,
    receives: bool,
    model: Any,
) -> tuple[Any, TokenLogprobs | TokenValues, Source]:
    """`build_model` once the weights are loaded; without communication, but for DeepSpeed's."""
    if cfg.model.quantization_bit:
        log.info(load.describe_quantised(model))
    elif load.widened(model_config) is not None:
        log.info(
            "The checkpoint's weights are stored in fewer bits; they are dequantised and "
            f"trained in {str(computing_dtype(cfg, args, split)).removeprefix('torch.')}."
        )
    source = load.source_of(model, cfg.model)
    if cfg.model.enable_liger_kernel:
        apply_liger(model, args.device)
    new_tokens = load.has_new_tokens(cfg.model, tokenizer)
    if new_tokens and not cfg.model.resize_vocab:
        log.info(
            f"{tokenizer.tokens_added} new tokens (add_tokens, add_special_tokens):"
            " resize_vocab is true."
        )
    if new_tokens and not getattr(model, "is_quantized", False):
        load.resize_vocabulary(model, tokenizer)
    if len(tokenizer) > load.embedding_rows(model):
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding"
            f" {load.embedding_rows(model)}. "
            + (
                "A quantised embedding cannot grow: resize the model first, or train it without"
                " quantization_bit."
                if getattr(model, "is_quantized", False)
                else "Set resize_vocab: true."
            )
        )
    try:
        hf.prepare(model, ctx)
        if images:
            vision.install(model)
    except ValueError as error:  # a model that cannot be exact
        raise UserError(str(error)) from error
    # An evaluation alone makes no adapter, unless a reference is the model with it switched off.
    compares = stage.needs_reference or "reference_kl" in stage.needs
    bare = not (args.do_train or cfg.model.adapter_name_or_path or compares)
    model = adapters.apply_finetuning(
        model,
        cfg.method,
        cfg.model,
        is_trainable=not (bare and trains_adapters(cfg.method)),
        new_tokens=new_tokens,
    )
    if args.fsdp:
        adapters.refuse_sharded_ties(model)
    if cfg.model.fp8:
        count, weights = fp8.install(model, args.device)
        log.info(
            f"fp8: {count} linear layers of the decoder, {weights:,} weights ({fp8.RECIPE})."
            f" {fp8.SPEED}"
        )
    if cfg.model.adapter_name_or_path and not receives:
        read = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        load.refuse_no_numbers(read, ", ".join(cfg.model.adapter_name_or_path))
    chunk = None if cfg.memory.logprob_chunk == "auto" else cfg.memory.logprob_chunk
    head: TokenValues | TokenLogprobs
    if stage.output == "values":
        head = TokenValues(model)
    else:
        head = TokenLogprobs(model, chunk, stage.needs)
    if isinstance(head, TokenValues):
        trained = (cfg.model.adapter_name_or_path or (cfg.model.model_name_or_path or "",))[-1]
        try:
            found = load_value_head(head, trained)
        except ValueError as error:
            raise UserError(str(error)) from error
        if not found and not args.do_train:
            raise UserError(
                f"{trained} has no {VALUE_HEAD}: it is not a reward model, and its values would be"
                " random. Train it first."
            )
    zero3 = (
        bool(args.deepspeed)
        and args.hf_deepspeed_config is not None
        and args.hf_deepspeed_config.is_zero3()
    )
    if not cfg.method.pure_bf16 and not zero3 and not split:
        adapters.cast_trainable(model, values=not receives)
    if zero3 and isinstance(head, TokenValues):
        # ZeRO-3 takes trained parameters of one type; its own copies of them are float32.
        trained_types = {
            p.dtype for n, p in model.named_parameters() if p.requires_grad and "v_head" not in n
        }
        head.value.to(next(iter(trained_types), torch.float32))
    for level, line in trained_parameters.describe_trained(model):
        log.log(level, line)
    return model, head, source


def computing_dtype(cfg: RunConfig, args: Seq2SeqTrainingArguments, split: bool) -> torch.dtype:
    """What layers compute in."""
    return torch.bfloat16 if cfg.method.pure_bf16 or split else load.compute_dtype(args)


def kernels(
    cfg: RunConfig,
    model_config: Any,
    ctx: sp.SequenceParallel,
    args: Seq2SeqTrainingArguments,
    memory: Memory,
) -> list[str]:
    """Chooses and self-tests the attention kernels before anything is loaded. What to say of them,
    a line or two.

    Raises:
        UserError: the kernel that `attention_backend` names cannot be used.
    """
    try:
        requests = hf.kernel_requests(model_config, ctx, computing_dtype(cfg, args, memory.split))
        return start.lines(ctx.backend, requests)
    except ValueError as error:
        raise UserError(str(error)) from error
