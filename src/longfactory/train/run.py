"""A run in named steps, top to bottom: data and memory plan (`prepare`), process group
(`init_distributed`), `build_model`, memory techniques, trainer with its optimizer (`make_trainer`),
`parallelize`; then `prepare_training`, and `run` trains, evaluates and writes the results.
`verify` takes the same steps up to the trainer.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from longfactory import hub, progress, sp, startup, terminal
from longfactory.config import RunConfig, checks, folder
from longfactory.config.adapter_facts import trains_adapters
from longfactory.config.loss_facts import split_loss_path
from longfactory.config.show import settings as settings_of
from longfactory.data import module as data
from longfactory.data.fingerprint import data_fingerprint
from longfactory.data.templates import get_template
from longfactory.errors import UserError
from longfactory.memory import gathered
from longfactory.memory.apply import apply_memory
from longfactory.memory.choose import explain_out_of_memory
from longfactory.memory.offload import Activations
from longfactory.model import adapters, fp8, load, pissa, trained_parameters
from longfactory.model.liger import apply_liger
from longfactory.model.routing import Routing, router_loss_coefficient
from longfactory.model.source import Source
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import FILE as VALUE_HEAD
from longfactory.model.value_head import TokenValues, load_value_head
from longfactory.model.vision import RowImages
from longfactory.shard import settings as shard
from longfactory.sp import hf, vision
from longfactory.sp.backends import start
from longfactory.sp.measure import Measure
from longfactory.stages.base import Stage
from longfactory.stages.make import make_stage
from longfactory.stages.user_loss import digest_of
from longfactory.train import auto, output
from longfactory.train.callbacks import AtStart, LogFile, ToldStartup, report_failures
from longfactory.train.checkpoint.choose import Start, choose_start
from longfactory.train.checkpoint.facts import RunFacts
from longfactory.train.checkpoint.place import check_place
from longfactory.train.checkpoint.prune import remove_leftovers
from longfactory.train.display import Measured, ProgressLine
from longfactory.train.gradients import ReportUnused, refuse_unused
from longfactory.train.loader import media_workers
from longfactory.train.memory_plan import (
    Counts,
    FitMemory,
    Memory,
    choose_sharding,
    count_parameters,
    plan_memory,
    zero_stage,
)
from longfactory.train.meter import Meter, peak_rate
from longfactory.train.optimizers import optimizer_factory
from longfactory.train.profiler import Profiler
from longfactory.train.prove import prove_exact
from longfactory.train.ranks import from_all, from_main
from longfactory.train.reference.attach import attach_reference, check_ref_model
from longfactory.train.survival.callback import Survive
from longfactory.train.survival.start import meet
from longfactory.train.trainer import RowTrainer

if TYPE_CHECKING:
    from longfactory.train.survival.watch import Watch

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class Processes:
    """What the launcher started, read from the environment before a process group is open."""

    world: int
    main: bool
    """Whether this process speaks and writes for all."""
    cuda: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of a run before a process group is open."""

    model_config: Any
    """transformers' configuration of the model."""
    counts: Counts
    sharding: str
    """none, ddp, fsdp2 or deepspeed."""
    stage: Stage
    tokenizer: Any
    datasets: data.Datasets
    memory: Memory


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


def prepare_training(assembled: Assembled, cfg: RunConfig, watch: Watch | None = None) -> None:
    """The last step before training, which `verify` leaves out: what is measured, proved and
    computed before the first step, and the run's own file in the output folder. Collective.

    Raises:
        UserError: the run could not save its model.
    """
    trainer, memory = assembled.trainer, assembled.memory
    args, ctx = trainer.args, trainer.ctx
    dims = max(hf.head_dims(hf.unwrap(trainer.model).config), default=None)
    if ctx.mode == "auto" and ctx.size > 1 and args.device.type == "cuda" and dims is not None:
        trainer.measure = Measure(
            ctx, *dims, dtype=computing_dtype(cfg, args, memory.split), device=args.device
        )
    trainer.add_callback(
        AtStart(
            lambda: gathered.begin(trainer.model_wrapped, memory.plan.settings),
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
        watch: over this process (`survival.start.begin`); None: signals and time limits are not
            this run's.
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
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        except torch.OutOfMemoryError as error:
            raise UserError(explain_out_of_memory(assembled.memory.plan, error)) from error
        if trainer.finished:
            log.info(f"{checkpoint} has made the last step of this run: nothing was left to train.")
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


def read_processes(cfg: RunConfig) -> Processes:
    """What the launcher's environment says of the run's processes.

    Raises:
        UserError: sequence_parallel_size does not divide them.
    """
    world, size = int(os.environ.get("WORLD_SIZE", "1")), cfg.sequence_parallel_size
    if world % size:
        raise UserError(
            f"sequence_parallel_size: {size} does not divide the {world} processes. Start a"
            f" multiple of {size} processes, or lower it."
        )
    cuda = torch.cuda.is_available() and not cfg.trainer.use_cpu
    asked = cfg.trainer.ddp_backend
    for name in checks.backends(asked) if asked else ():
        if not torch.distributed.is_backend_available(name) or (name == "nccl" and not cuda):
            raise UserError(
                f"ddp_backend: {name} is not on this machine (torch {torch.__version__},"
                f" {torch.cuda.device_count()} GPUs). Leave it out."
            )
    return Processes(world, os.environ.get("RANK", "0") == "0", cuda)


def prepare(cfg: RunConfig, processes: Processes, *, wide_weights: bool) -> Prepared:
    """The model's configuration, the stage, the tokenised data, and the memory plan that follows
    from them.

    Raises:
        UserError: something of them cannot be used, or the run would end in an upload that cannot
            be made.
    """
    if cfg.trainer.push_to_hub and (away := hub.unreachable()):
        raise UserError(
            f"push_to_hub: the Hugging Face hub cannot be reached ({away}), and the run would end"
            " by uploading to it. Set push_to_hub: false; `longfactory export` with"
            " export_hub_model_id uploads the model later."
        )
    world, cuda = processes.world, processes.cuda
    model_config = load.load_config(cfg.model, cfg.cutoff_len)
    if cfg.trainer.do_train and not trains_adapters(cfg.method):
        load.refuse_training_packed(model_config)
    check_ref_model(cfg, model_config)
    counts = count_parameters(cfg, model_config)
    sharding = choose_sharding(cfg, counts.total, world, cuda)
    tokenizer = load.load_tokenizer(cfg.model)
    try:
        stage = make_stage(cfg.method.stage, cfg.method, getattr(torch, cfg.precision))
    except ValueError as error:
        raise UserError(str(error)) from error
    datasets = load_data(cfg, tokenizer)
    startup.done("data")
    if datasets.processing is not None:
        counts = count_parameters(cfg, model_config, images=True)
    memory = plan_memory(cfg, model_config, counts, datasets, sharding, world, cuda)
    if wide_weights:
        memory = dataclasses.replace(memory, split=False)
    else:
        log.info(memory.plan.table)
    if cfg.trainer.do_train and datasets.train is None:
        raise UserError(
            "There are no training data, which do_train and verify need. Set dataset: to names in"
            " dataset_info.json."
        )
    return Prepared(model_config, counts, sharding, stage, tokenizer, datasets, memory)


def init_distributed(
    cfg: RunConfig, prepared: Prepared, store: Any = None
) -> tuple[Seq2SeqTrainingArguments, sp.SequenceParallel]:
    """Opens the process group, and in it the sequence-parallel groups. The one place of a run that
    writes to the environment.

    Args:
        cfg: the run.
        prepared: what is known of it.
        store: where the processes meet; None: transformers opens the group by itself.

    Returns:
        transformers' TrainingArguments, and this process's place in the groups.
    Raises:
        UserError: the groups cannot be made.
    """
    if prepared.sharding == "none":
        shard.forget_launcher()
    os.environ.update(cfg.reporting_environment())
    if store is not None and prepared.sharding != "none":
        open_process_group(cfg, store)  # else transformers does so, when the arguments are made
    args = training_arguments(
        cfg, prepared.sharding, prepared.memory, buffers=prepared.counts.buffers
    )
    device = args.device
    decode_beside(cfg, args, prepared)
    shard.train_as_one_device(args)
    set_seed(args.seed)  # adapters and value heads begin the same on every rank
    size = cfg.sequence_parallel_size
    try:
        ctx = sp.SequenceParallel.create(
            size,
            mode=cfg.parallel.sequence_parallel_mode,
            ulysses_degree=cfg.parallel.sequence_parallel_ulysses_degree,
            ring_degree=cfg.parallel.sequence_parallel_ring_degree,
            backend=cfg.parallel.attention_backend,
            device_type=device.type,
            flop_per_byte=prepared.memory.plan.job.machine.flop_per_byte,
            timeout=group_timeout(cfg),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if ctx.size != size:
        raise UserError(
            f"Sequence parallelism is off: sequence_parallel_size is {size}, and the group that was"
            f" made has {ctx.size} processes. Each would compute a whole row. Something has"
            " replaced a part of longfactory; install it anew."
        )
    return args, ctx


def decode_beside(cfg: RunConfig, args: Seq2SeqTrainingArguments, prepared: Prepared) -> None:
    """Has images decoded by loader processes, beside the steps on a GPU, where the run's keys say
    nothing of them.
    """
    train, tower = prepared.datasets.train, prepared.memory.plan.job.tower
    if "dataloader_num_workers" in cfg.hf or tower is None or not hasattr(train, "image_patches"):
        return
    if args.device.type != "cuda":
        return  # the processor trains
    smallest = vision.empty_image(prepared.model_config)
    of_a_patch = 4 * smallest.pixels.numel() / smallest.patches
    pixels = prepared.memory.plan.job.local * tower.patches * of_a_patch
    size = f"{pixels / 2**30:.2g} GiB of pixels"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    args.dataloader_num_workers = media_workers(pixels, ranks)
    if args.dataloader_num_workers:
        if args.dataloader_prefetch_factor is None:
            args.dataloader_prefetch_factor = 1
        log.info(
            f"Images are decoded by {args.dataloader_num_workers} loader processes of each rank"
            f" (dataloader_num_workers): {size} in a rank's part of the longest row."
        )
    else:
        log.warning(
            f"Images are decoded between steps: a rank's part of the longest row has {size}, and"
            " there are too few cores or too little shared memory (/dev/shm) for loader processes."
            " Enlarge /dev/shm (docker run --shm-size), or set dataloader_num_workers."
        )


def group_timeout(cfg: RunConfig) -> float:
    """Seconds that a collective may take: `ddp_timeout`, and longer than any phase may, since the
    others wait in one while a rank saves. The watch ends a run that does not move before that.
    """
    return max(cfg.trainer.ddp_timeout, cfg.longest_timeout + 60.0)


def open_process_group(cfg: RunConfig, store: Any) -> None:
    """The process group as accelerate would open it, at the run's own store and with the run's own
    time limit, which accelerate drops on CPU.
    """
    cuda = torch.cuda.is_available() and not cfg.trainer.use_cpu
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(
        cfg.trainer.ddp_backend or ("nccl" if cuda else "gloo"),
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=group_timeout(cfg)),
    )


def parallelize(trainer: RowTrainer, sharding: str, world: int, *, split: bool) -> None:
    """How accelerate shards the model when training starts: checked against what was chosen, and
    FSDP2's settings made those that keep gradients exact.

    Raises:
        UserError: accelerate chose another sharding.
    """
    shard.check_sharding(trainer.accelerator, sharding, world)
    if sharding == "fsdp2":
        shard.fix_fsdp2_plugin(trainer.accelerator, trainer.model, split=split, world=world)


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


def load_data(cfg: RunConfig, tokenizer: Any, *, quiet: bool = False) -> data.Datasets:
    """The tokenised data of the run. `quiet`: what became of the rows is not logged."""
    options = cfg.data_options()
    said = log.getChild("quiet") if quiet else log
    if quiet:
        said.setLevel(logging.ERROR)
    # In pre-training a template gives the token that ends a text; without its name there is none to
    # give. Rollouts of token ids need none.
    unneeded = cfg.method.stage == "pt" or (
        cfg.method.stage == "rl" and not getattr(tokenizer, "chat_template", None)
    )
    template = (
        None if unneeded and cfg.data.template is None else get_template(options, tokenizer, said)
    )
    return data.load_datasets(
        options,
        stage=cfg.method.stage,
        tokenizer=tokenizer,
        template=template,
        seed=cfg.trainer.seed,
        log=said,
        media=load.load_media(cfg.model, options, tokenizer),
    )


def training_arguments(
    cfg: RunConfig, sharding: str, memory: Memory, *, buffers: bool = False
) -> Seq2SeqTrainingArguments:
    """transformers' TrainingArguments with the settings that keep gradients exact.

    Args:
        buffers: the model's checkpoints hold buffers. accelerate's loading by the first process
            alone takes every entry for a sharded parameter: then each process reads the files.
    """
    extra: dict[str, Any] = {
        "accelerator_config": shard.accelerator_arguments(),
        "ddp_find_unused_parameters": bool(cfg.trainer.ddp_find_unused_parameters),
        # the Trainer would count a row once for each rank that holds a part of it
        "include_num_input_tokens_seen": "no",
    }
    if memory.split:
        # the weights themselves are bf16: nothing is cast, and no fp32 copy is made of them
        extra["bf16"] = False
    if sharding == "fsdp2":
        extra |= shard.fsdp2_arguments(
            # Random weights are made on each device; loading them by rank 0 alone would only send
            # them round.
            efficient_loading=not (
                cfg.model.train_from_scratch or cfg.model.quantization_bit or buffers
            ),
        )
    if sharding == "deepspeed":
        assert cfg.trainer.deepspeed is not None  # by choose_sharding
        pure = cfg.method.pure_bf16 and zero_stage(cfg)[0] == 3
        bf16 = cfg.trainer.bf16 or pure
        extra["deepspeed"] = shard.deepspeed_config(cfg.trainer.deepspeed, bf16=bf16, pure=pure)
        extra["bf16"] = bf16
    if not torch.cuda.is_available() and sharding != "deepspeed":
        # without it accelerate opens no process group on a machine without GPUs, and every process
        # trains alone
        extra["use_cpu"] = True
    return cfg.training_arguments(**extra)


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

    Args:
        images: the run's rows have images, which pass through the model's tower.
    """
    dtype = computing_dtype(cfg, args, split)
    quantization = load.quantization_config(cfg.model, dtype, sharded=bool(args.fsdp))
    on_device = args.device if cfg.model.train_from_scratch else None
    model = load.load_model(
        cfg.model,
        model_config,
        dtype,
        attention=hf.ATTENTION,
        device=on_device,
        quantization=quantization,
    )
    if quantization is not None:
        log.info(load.describe_quantised(model))
    elif load.widened(model_config) is not None:
        log.info(
            "The checkpoint's weights are stored in fewer bits; they are read, and trained, as"
            f" {str(dtype).removeprefix('torch.')}."
        )
    source = load.source_of(model, cfg.model)
    if cfg.model.enable_liger_kernel:
        apply_liger(model)
    grew = load.resize_vocabulary(model, tokenizer) if cfg.model.resize_vocab else False
    if len(tokenizer) > load.embedding_rows(model):
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding"
            f" {load.embedding_rows(model)}. Set resize_vocab: true."
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
        resized=grew,
    )
    if cfg.model.fp8:
        count, weights = fp8.install(model, args.device)
        log.info(
            f"fp8: {count} linear layers of the decoder, {weights:,} weights ({fp8.RECIPE})."
            f" {fp8.SPEED}"
        )
    if cfg.model.adapter_name_or_path:
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
        adapters.cast_trainable(model)
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
            f"Routers: {coefficient:g} x the auxiliary loss of each row is added to the loss, rows"
            " weighted as their losses are."
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
            f"Processes: {ctx.size} (sequence) x {ctx.dp_size} (data) = {ctx.size * ctx.dp_size};"
            f" parameters: {shard.in_words(sharding)}; sequence parallel:"
            f" {cfg.parallel.sequence_parallel_mode if ctx.size > 1 else 'off'}"
        ),
        (
            f"Samples in an optimizer step: {b} (micro-batch) x {ga} (accumulation) x {ctx.dp_size}"
            f" (data) = {b * ga * ctx.dp_size}"
        ),
    ]
    if datasets.train is not None and hasattr(datasets.train, "__len__"):
        lengths = datasets.train.lengths
        longest = int(max(lengths)) if len(lengths) else 0
        lines.append(
            f"Training data: {len(datasets.train)} rows, {int(sum(lengths)):,} tokens, longest"
            f" {longest:,} ({-(-longest // ctx.size):,} a device)"
        )
    return lines
