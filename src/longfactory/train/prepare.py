"""What is known of a run before a process group is open: its processes, the model's configuration,
the stage, tokenised data, the memory plan.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch

from longfactory import hub, startup
from longfactory.config import RunConfig, parallel_checks
from longfactory.config.adapter_facts import trains_adapters
from longfactory.data import module as data
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.templates import get_template
from longfactory.errors import UserError
from longfactory.model import load, rope
from longfactory.stages.base import Stage
from longfactory.stages.make import make_stage
from longfactory.train.memory_plan import (
    Counts,
    Memory,
    choose_sharding,
    count_parameters,
    plan_memory,
)
from longfactory.train.reference.attach import check_ref_model

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
    for name in parallel_checks.backends(asked) if asked else ():
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
    tell_positions(cfg, model_config)
    load.refuse_damaged(cfg.model)
    if not cfg.model.train_from_scratch:
        load.trainable_kernels(model_config)  # names packages that are missing
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
    check_evaluation(cfg, datasets)
    if isinstance(datasets.train, TokenizedDataset):
        words = beyond_positions(model_config, datasets.train.longest_document())
        if words is not None:
            log.warning(words)
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
            "There are no training data, which do_train and verify need. Set dataset: to names "
            "from dataset_info.json."
        )
    return Prepared(model_config, counts, sharding, stage, tokenizer, datasets, memory)


def check_evaluation(cfg: RunConfig, datasets: data.Datasets) -> None:
    """Raises UserError where saved data lack what the run evaluates on: the keys alone do not tell,
    and without it a run would end at its first evaluation, or never make one.
    """
    trainer = cfg.trainer
    asked = ["do_predict"] if trainer.do_predict else []
    if trainer.eval_strategy != "no":
        asked.append(f"eval_strategy: {trainer.eval_strategy}")
    elif trainer.do_eval:
        asked.append("do_eval")
    if asked and not datasets.eval:
        raise UserError(
            f"The data at tokenized_path ({cfg.data.tokenized_path}) were saved without samples to"
            f" evaluate on, and the run has {', '.join(asked)}. Save them in another folder with"
            " val_size or eval_dataset, or leave the evaluation out."
        )


def tell_positions(cfg: RunConfig, model_config: Any) -> None:
    """Logs what rope_scaling does, and adapters that were trained with other positions.

    Args:
        model_config: with the run's rope_scaling.
    """
    kind = cfg.model.rope_scaling
    if kind is not None:
        before = load.load_config(dataclasses.replace(cfg.model, rope_scaling=None), 0)
        words, warns = rope.in_words(before, model_config, kind, cfg.cutoff_len)
        log.log(logging.WARNING if warns else logging.INFO, words)
    for adapter in cfg.model.adapter_name_or_path:
        trained = rope.of_adapter(adapter)
        if trained is None:
            continue
        settings = dataclasses.replace(cfg.model, rope_scaling=trained.rope_scaling)
        if rope.differ(load.load_config(settings, trained.cutoff_len), model_config):
            log.warning(
                "%s was trained with rope_scaling: %s and cutoff_len: %d, so with other positions"
                " than this run's.",
                *(adapter, trained.rope_scaling or "null", trained.cutoff_len),
            )


def beyond_positions(model_config: Any, longest: int) -> str | None:
    """What to say where the longest document has more tokens than the model has positions; None
    where it has not.

    Args:
        model_config: with the run's rope_scaling.
    """
    text = model_config.get_text_config()
    far = rope.reach(model_config)
    if far is None or longest <= far[0]:
        return None
    (reach, most), own = far, text.max_position_embeddings
    why = "max_position_embeddings" + (" and rope_parameters" if reach > own else "")
    perhaps = f"; {most:,} if that does not count rope_parameters" if most > reach else ""
    says = (
        f"The longest training sample has {longest:,} tokens, and the model was made for {reach:,}"
        f" ({why} in its config.json{perhaps}):"
    )
    if getattr(text, "rope_parameters", None):
        return (
            f"{says} it has not seen later positions. Set rope_scaling: yarn, or lower cutoff_len."
        )
    return (
        f"{says} if it has a table of positions, as GPT-2 and OPT, the run ends with an index that"
        f" is out of range. Set cutoff_len: {own}, or take another model."
    )


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
