"""A run's trainer, with its loaders, optimizer and callbacks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainingArguments

from longfactory import sp
from longfactory.config import RunConfig
from longfactory.config.show import settings as settings_of
from longfactory.data import module as data
from longfactory.data.fingerprint import data_fingerprint
from longfactory.model.routing import Routing, router_loss_coefficient
from longfactory.model.source import Source
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import TokenValues
from longfactory.model.vision import RowImages
from longfactory.sp import hf
from longfactory.stages.base import Stage
from longfactory.train.callbacks import LogFile, ToldStartup, report_failures
from longfactory.train.checkpoint.choose import Start
from longfactory.train.checkpoint.facts import RunFacts
from longfactory.train.display import Measured, ProgressLine
from longfactory.train.memory_plan import Memory
from longfactory.train.meter import Meter, peak_rate
from longfactory.train.optimizers import optimizer_factory
from longfactory.train.profiler import Profiler
from longfactory.train.ranks import from_main
from longfactory.train.trainer import RowTrainer

log = logging.getLogger("longfactory")


def make_trainer(
    cfg: RunConfig,
    args: Seq2SeqTrainingArguments,
    ctx: sp.SequenceParallel,
    stage: Stage,
    model: Any,
    head: TokenLogprobs | TokenValues,
    source: Source,
    tokenizer: Any,
    datasets: data.Datasets,
    memory: Memory,
    start: Start | None,
    sharding: str,
) -> RowTrainer:
    """The Trainer of a run, with its loaders, optimizer and callbacks. Collective."""
    pad_id = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    eval_sets: Any = datasets.eval or None
    if eval_sets is not None and len(eval_sets) == 1:
        eval_sets = next(iter(eval_sets.values()))
    coefficient = router_loss_coefficient(cfg.method.moe_aux_loss_coef, hf.unwrap(model).config)
    if coefficient:
        log.info(
            f"Routers: {coefficient:g} x the auxiliary loss of each row is added to the loss, "
            "with rows weighted as in the loss."
        )
    meter = run_meter(cfg, args, memory, datasets)
    told = ToldStartup()
    trainer = RowTrainer(
        model,
        args,
        ctx=ctx,
        stage=stage,
        head=head,
        collate=data.collate,
        pad_id=pad_id,
        shuffle=not cfg.method.disable_shuffling,
        make_optimizer=optimizer_factory(cfg, memory),
        log_tokens=cfg.log_tokens,
        source=source,
        on_nan=cfg.method.on_nan,
        facts=None if start is None else run_facts(cfg, start, sharding, datasets),
        routing=Routing(model, ctx, coefficient),
        images=row_images(model, ctx, args, datasets),
        train_dataset=datasets.train,
        eval_dataset=eval_sets,
        processing_class=tokenizer,
        meter=meter,
        callbacks=[told, LogFile(args.output_dir, meter.remaining, told.row)],
    )
    if cfg.output.enable_torch_profiler:
        trainer.add_callback(Profiler.of_run(cfg))
    report_failures(trainer.callback_handler)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.callback_handler.callbacks.insert(0, Measured(meter))
    trainer.add_callback(
        ProgressLine(meter, bar=not args.disable_tqdm, gpus=args.device.type == "cuda")
    )
    if cfg.method.early_stopping_steps is not None:
        from transformers import EarlyStoppingCallback

        trainer.add_callback(
            EarlyStoppingCallback(early_stopping_patience=cfg.method.early_stopping_steps)
        )
    return trainer


def run_meter(
    cfg: RunConfig, args: Seq2SeqTrainingArguments, memory: Memory, datasets: data.Datasets
) -> Meter:
    """Counts what the steps of a run cost."""
    shape = memory.plan.job.shape
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
    peak = peak_rate(gpu, shape.width, bool(cfg.trainer.tf32))
    packed = getattr(datasets.train, "packed", False) or getattr(datasets.train, "bins", None)
    return Meter(args.world_size, shape, peak, cfg.cutoff_len if packed else None)


def row_images(
    model: Any, ctx: sp.SequenceParallel, args: Seq2SeqTrainingArguments, datasets: data.Datasets
) -> RowImages | None:
    """What rows with images need; None where no data set of the run has any."""
    if datasets.processing is None:
        return None
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    zero3 = deepspeed is not None and deepspeed.is_zero3()
    return RowImages(model, ctx, equal_calls=zero3, processing=datasets.processing)


def run_facts(cfg: RunConfig, start: Start, sharding: str, datasets: data.Datasets) -> RunFacts:
    """What the run's checkpoints say of it. Collective: the first process reads the data."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    digest = from_main(data_fingerprint(datasets.train) if main else None)
    return RunFacts(start.record, settings_of(cfg), sharding, digest)
