"""A run in named steps, top to bottom: data and memory plan (`prepare`), process group
(`init_distributed`), `build_model`, memory techniques, trainer with its optimizer (`make_trainer`),
`parallelize`; then `prepare_training`, and `run` trains, evaluates and writes the results.
`verify` takes the same steps up to the trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging as transformers_logging

from longfactory import progress, sp, startup, terminal
from longfactory.config import RunConfig, folder
from longfactory.config.loss_facts import split_loss_path
from longfactory.data import module as data
from longfactory.errors import UserError
from longfactory.memory import compiled, gathered
from longfactory.memory.apply import apply_memory
from longfactory.memory.choose import explain_out_of_memory
from longfactory.memory.offload import Activations
from longfactory.model import load, pissa
from longfactory.model.experts import beside_messages
from longfactory.shard import settings as shard
from longfactory.shard.buffers import keep_buffers_apart
from longfactory.sp import hf
from longfactory.sp.measure import Measure
from longfactory.stages.user_loss import digest_of
from longfactory.train import auto, output
from longfactory.train.callbacks import AtStart, objects_frozen
from longfactory.train.checkpoint.choose import Start, choose_start
from longfactory.train.checkpoint.place import check_place
from longfactory.train.checkpoint.prune import remove_leftovers
from longfactory.train.gradients import ReportUnused, explain_unreduced, refuse_unused
from longfactory.train.groups import init_distributed
from longfactory.train.make import make_trainer
from longfactory.train.memory_plan import FitMemory, Memory
from longfactory.train.model import build_model, computing_dtype, kernels
from longfactory.train.prepare import load_data, prepare, read_processes
from longfactory.train.prove import prove_exact
from longfactory.train.ranks import from_all
from longfactory.train.reference.attach import attach_reference
from longfactory.train.survival.callback import Survive
from longfactory.train.survival.start import meet
from longfactory.train.trainer import RowTrainer

if TYPE_CHECKING:
    from longfactory.train.survival.watch import Watch

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A run before its first step."""

    trainer: RowTrainer
    tokenizer: Any
    datasets: data.Datasets
    memory: Memory
    sharding: str
    activations: Activations
    """What `memory.apply` installed on the model's layers."""
    start: Start | None
    """The checkpoint to go on from, or none; None where nothing is trained."""
    pissa_start: dict[str, torch.Tensor] | None = None
    """`pissa_convert`: the adapter as PiSSA began."""


def assemble(cfg: RunConfig, *, wide_weights: bool = False, store: Any = None) -> Assembled:
    """The steps of a run up to its trainer. Every process calls it; nothing is written.

    Data and the memory plan come before the process group: tokenising may take longer than the
    group waits, and the plan decides what the group is opened for.

    Args:
        cfg: the run.
        wide_weights: weights are as wide as the run's precision allows, whatever the memory plan
            says (`verify`, which leaves the optimizer out).
        store: where the process group meets (`survival.start.meet`); None: torch's default.
    Raises:
        UserError: something that the user can put right.
    """
    processes = read_processes(cfg)
    _set_up_log(processes.main)
    if processes.cuda:
        startup.watch_compilers()
        compiled.start_workers()
    prepared = prepare(cfg, processes, wide_weights=wide_weights)
    memory, sharding = prepared.memory, prepared.sharding
    startup.done("memory plan")

    args, ctx = init_distributed(cfg, prepared, store)
    start = choose_start(cfg) if args.do_train and not wide_weights else None
    model_config, stage, tokenizer = prepared.model_config, prepared.stage, prepared.tokenizer
    startup.done("process group")
    for line in describe(cfg, ctx, args, sharding, prepared.datasets):
        log.info(line)
    for line in kernels(cfg, model_config, ctx, args, memory):
        log.info(line)
    startup.done("attention kernels")
    images = prepared.datasets.processing is not None
    model, head, source = build_model(
        cfg, model_config, tokenizer, ctx, args, stage, memory.split, images=images
    )
    transformers_logging.disable_progress_bar()  # of saves our log tells, beside the progress line
    aligned = -(-memory.plan.job.tokens // sp.alignment(ctx)) * sp.alignment(ctx)
    pissa_start = pissa.start_of(model) if cfg.method.pissa_convert else None
    activations = apply_memory(
        model, memory.plan.settings, args.device, longest=aligned // ctx.size
    )
    startup.done("model")
    if args.do_train:
        output.prove_writable(args, source)
    trainer = make_trainer(
        cfg,
        args,
        ctx,
        stage,
        model,
        head,
        source,
        tokenizer,
        prepared.datasets,
        memory,
        start,
        sharding,
    )
    parallelize(trainer, sharding, processes.world, split=memory.split)
    return Assembled(
        trainer, tokenizer, prepared.datasets, memory, sharding, activations, start, pissa_start
    )


def begin_experts(trainer: RowTrainer) -> None:
    """Where gradients are summed over GPUs beside the backward pass."""
    if trainer.args.world_size > 1 and trainer.args.device.type == "cuda":
        beside_messages(trainer.model_wrapped)


def prepare_training(assembled: Assembled, cfg: RunConfig, watch: Watch | None = None) -> None:
    """The last step before training, which `verify` leaves out: what is measured, proved and
    computed before the first step, and the run's own file in the output folder. Collective.

    Raises:
        UserError: the run could not save its model.
    """
    trainer, memory = assembled.trainer, assembled.memory
    args, ctx = trainer.args, trainer.ctx
    if hasattr(trainer.train_dataset, "lengths"):
        lengths = np.asarray(trainer.train_dataset.lengths)
        compiled.expect((-(-lengths // sp.alignment(ctx))).tolist())
    dims = max(hf.head_dims(hf.unwrap(trainer.model).config), default=None)
    if ctx.mode == "auto" and ctx.size > 1 and args.device.type == "cuda" and dims is not None:
        trainer.measure = Measure(
            ctx, *dims, dtype=computing_dtype(cfg, args, memory.split), device=args.device
        )
    trainer.add_callback(
        AtStart(
            lambda: gathered.begin(
                trainer.model_wrapped, memory.plan.settings, trainer._split_adamw()
            ),
            lambda: begin_experts(trainer),
            lambda: startup.done("optimizer and sharding"),
            lambda: prove_exact(trainer),
            lambda: startup.done("guard"),
            lambda: refuse_unused(trainer),
            lambda: attach_reference(trainer, cfg),
            lambda: startup.done("reference"),
        )
    )
    trainer.add_callback(ReportUnused(trainer))
    trainer.add_callback(FitMemory(memory.plan, assembled.activations))
    trainer.add_callback(Survive(trainer, watch))
    if args.do_train:
        saves = args.save_strategy != "no" and not args.save_only_model
        check_place(args, sharded=assembled.sharding in ("fsdp2", "deepspeed"), saves=saves)
        output.prove_saveable(trainer)
    # not before all that can be refused: a run that never began leaves no folder
    if trainer.is_world_process_zero():
        folder.write(cfg)
    if assembled.start is not None and args.should_save:
        remove_leftovers(Path(args.output_dir))
        folder.write_record(Path(args.output_dir), assembled.start.record)


def run(cfg: RunConfig, watch: Watch | None = None) -> dict[str, float]:
    """The whole of `longfactory train`. Every process calls it. Returns the metrics that were
    written.

    Args:
        cfg: the run.
        watch: over this process (`survival.start.begin`); None: signals, time limits and the
            garbage collector are not this run's.
    Raises:
        UserError: something that the user can put right; nothing half-written is left behind.
        Stopped: a signal asked for a stop, and a checkpoint is saved.
    """
    startup.done("imports")
    store, lock = meet(cfg, watch, writes=True)
    startup.done("meeting")
    try:
        return _run(decided(cfg, store), watch, store)
    finally:
        if lock is not None:
            lock.release()


def _run(cfg: RunConfig, watch: Watch | None, store: Any) -> dict[str, float]:
    assembled = assemble(cfg, store=store)
    prepare_training(assembled, cfg, watch)
    trainer, tokenizer, datasets = assembled.trainer, assembled.tokenizer, assembled.datasets
    args = trainer.args
    metrics: dict[str, float] = {}
    if args.do_train:
        assert assembled.start is not None  # of every run that trains
        checkpoint = assembled.start.checkpoint
        if cfg.method.loss_path is not None:
            same_loss_on_every_rank(cfg.method.loss_path)
        if checkpoint:
            trainer.check_resume(checkpoint, assembled.start.manifest)
        own_process = contextlib.nullcontext() if watch is None else objects_frozen(trainer)
        try:
            with own_process:
                result = trainer.train(resume_from_checkpoint=checkpoint)
        except torch.OutOfMemoryError as error:
            raise UserError(explain_out_of_memory(assembled.memory.plan, error)) from error
        except RuntimeError as error:
            said = explain_unreduced(error, trainer.model_wrapped)
            if said is None:
                raise
            raise UserError(said) from error
        if trainer.finished:
            log.info(f"{checkpoint} is of this run's last step: there is nothing left to train.")
        metrics.update(result.metrics)
        over = trainer.finished and assembled.start.was_finished
        with progress.within("save", "saving the trained model"):
            output.save_trained(trainer, cfg, tokenizer, result, results=not over)
            if assembled.pissa_start is not None and cfg.output.save_final_model:
                output.convert_pissa(trainer, assembled.pissa_start)
    progress.enter("evaluation", "what follows the training")
    if args.do_eval and datasets.eval:
        if not args.do_train:
            trainer.shard_model()
            attach_reference(trainer, cfg)
        metrics.update(output.evaluate(trainer, cfg, datasets))
    if args.do_predict:
        from longfactory.train.predict import predict

        metrics.update(predict(trainer, cfg, tokenizer, datasets))
    if args.do_train:
        from_all(None)  # every process has written its results
        if args.should_save:
            record = dataclasses.replace(trainer.facts.record, finished=True)
            folder.write_record(Path(args.output_dir), record)
        output.push(trainer)
        for line in output.closing_lines(cfg):
            log.info(line)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return metrics


def teach(cfg: RunConfig, watch: Watch | None = None) -> None:
    """What a run's teacher or reference says of its data, computed and kept on disk
    (`LONGFACTORY_CACHE`); the training finds it there. Every process calls it; nothing is written
    into output_dir.

    Args:
        cfg: the run.
        watch: over this process, where there is one.
    Raises:
        UserError: the run keeps nothing of that kind, or as `assemble`.
    """
    if cfg.method.stage != "distill" and not cfg.method.precompute_ref_log_probs:
        raise UserError(
            "longfactory teach computes what is kept before training: of a teacher (stage: distill,"
            " teacher_model) or of a reference (precompute_ref_log_probs: true). This run keeps"
            " neither."
        )
    store, _ = meet(cfg, watch, writes=False)
    with tempfile.TemporaryDirectory() as scratch:
        cfg = decided(cfg, store)
        apart = {
            **cfg.hf,
            "output_dir": scratch,
            "report_to": "none",
            "resume_from_checkpoint": None,
        }
        trainer = assemble(dataclasses.replace(cfg, hf=apart), store=store).trainer
        trainer.shard_model()
        attach_reference(trainer, cfg)
    from_all(None)


def same_loss_on_every_rank(loss_path: str) -> None:
    """Refuses a run whose machines have different files for its loss.

    Raises:
        UserError: on every rank.
    """
    path = split_loss_path(loss_path)[0]
    digests = from_all(digest_of(path.read_bytes()))
    if len(set(digests)) > 1:
        raise UserError(
            f"loss_path: the machines have different files {path} (sha256"
            f" {', '.join(sorted(set(digests)))}). Copy one of them to all."
        )


def _set_up_log(main: bool) -> None:
    """One process speaks; the others keep to errors."""
    terminal.set_up(main)
    if not main or not terminal.interactive():
        transformers_logging.disable_progress_bar()


def parallelize(trainer: RowTrainer, sharding: str, world: int, *, split: bool) -> None:
    """How accelerate shards the model when training starts: checked against what was chosen, and
    FSDP2's settings made those that keep gradients exact.

    Raises:
        UserError: accelerate chose another sharding.
    """
    shard.check_sharding(trainer.accelerator, sharding, world)
    if sharding == "fsdp2":
        shard.fix_fsdp2_plugin(trainer.accelerator, trainer.model, split=split, world=world)
        if shard.loads_for_all(trainer.args):
            keep_buffers_apart(trainer.accelerator)


def decided(cfg: RunConfig, store: Any) -> RunConfig:
    """The run with numbers in place of `auto` in sequence_parallel_size and cutoff_len: those of
    the checkpoint that it goes on from, else by the plan of this machine. The first process's count
    for all. Collective; the process group need not be open.

    Args:
        cfg: the run.
        store: where its processes meet; None where there is one, or the group is open.
    Raises:
        UserError: nothing fits; or as `prepare`.
    """
    if not cfg.undecided:
        return cfg
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and not cfg.trainer.use_cpu
    _set_up_log(os.environ.get("RANK", "0") == "0")
    longest = None
    if "cutoff_len" in cfg.undecided and auto.of_checkpoint(cfg, world).cutoff_len is None:
        tokenizer = load.load_tokenizer(cfg.model)
        longest = auto.longest_sample(load_data(auto.uncut(cfg), tokenizer, quiet=True))
    found = auto.share(auto.decide(cfg, world, cuda, longest), store)
    for line in found.lines:
        log.info(line)
    return found.applied(cfg)


def describe(
    cfg: RunConfig,
    ctx: sp.SequenceParallel,
    args: Seq2SeqTrainingArguments,
    sharding: str,
    datasets: data.Datasets,
) -> list[str]:
    """What a person checks before leaving a run alone, as arithmetic."""
    b, ga = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lines = [
        (
            f"World size: {ctx.size} (sequence parallel) x {ctx.dp_size} (data parallel) = "
            f"{ctx.size * ctx.dp_size}; parameters: {shard.in_words(sharding)}; sequence "
            f"parallel: {cfg.parallel.sequence_parallel_mode if ctx.size > 1 else 'off'}"
        ),
        (
            f"Samples per optimizer step: {b} (micro-batch) x {ga} (gradient accumulation) x "
            f"{ctx.dp_size} (data parallel) = {b * ga * ctx.dp_size}"
        ),
    ]
    if datasets.train is not None and hasattr(datasets.train, "__len__"):
        lengths = datasets.train.lengths
        longest = int(max(lengths)) if len(lengths) else 0
        lines.append(
            f"Training data: {len(datasets.train)} rows, {int(sum(lengths)):,} tokens, longest "
            f"row {longest:,} tokens ({-(-longest // ctx.size):,} per device)"
        )
    return lines
