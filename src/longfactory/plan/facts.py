"""What a plan says beside its table: the model's own context, the disk, an epoch of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfactory.config import RunConfig
from longfactory.config.adapter_facts import trains_adapters
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.module import Datasets
from longfactory.data.rollouts import RolloutDataset
from longfactory.errors import UserError
from longfactory.memory.seconds import seconds
from longfactory.model import load
from longfactory.train.auto import Planned, Way

GiB = 2**30
ORDERS = 3  # random orders of the data whose mean an epoch's time is


def stretching(cfg: RunConfig, model_config: Any) -> str | None:
    """A kind of rope_scaling that the model can have for the run's cutoff_len; None for none."""
    if not getattr(model_config.get_text_config(), "rope_parameters", None):
        return None
    for kind in ("yarn", "linear"):
        try:
            load.load_config(dataclasses.replace(cfg.model, rope_scaling=kind), cfg.cutoff_len)
        except UserError:
            continue
        return kind
    return None


def context(cfg: RunConfig, model_config: Any) -> str:
    """cutoff_len beside the positions that the model was trained for.

    Args:
        model_config: without the run's rope_scaling.
    """
    text = model_config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if not own:
        return "context: the model's configuration sets no maximum length."
    cutoff = cfg.cutoff_len
    if cutoff <= own:
        return f"context: the model supports {own:,} tokens."
    factor = -(-cutoff // own)
    if cfg.model.rope_scaling is not None:
        return (
            f"context: the model supports {own:,} tokens; rope_scaling: "
            f"{cfg.model.rope_scaling} stretches its positions {factor} times."
        )
    kind = stretching(cfg, model_config)
    remedy = f"Set rope_scaling: {kind} (factor {factor})."
    if kind is None:
        remedy = "rope_scaling cannot stretch them: lower cutoff_len, or edit its config.json."
    return (
        f"context: the model's is {own:,} tokens, and cutoff_len is {cutoff:,}: it has not "
        f"been trained on later positions. {remedy}"
    )


def checkpoint_bytes(planned: Planned, found: Way) -> tuple[float, float]:
    """Bytes of a checkpoint, and of the model that the run ends with."""
    cfg, job, memory = planned.cfg, found.memory.plan.job, found.memory
    shape = job.shape
    held = 2 if memory.split else 4  # of a trained weight
    if cfg.method.pure_bf16 or memory.deepspeed:  # whose fp32 copies are among its states
        held = shape.width
    adapters = trains_adapters(cfg.method)
    frozen = 0 if adapters else shape.width * (shape.parameters - shape.trainable)
    model = held * shape.trainable + frozen
    if cfg.trainer.save_only_model:
        return model, model
    states = (10 if memory.split else job.state_bytes) * shape.trainable
    shards = held * shape.trainable + frozen if planned.sharding == "fsdp2" else 0
    return model + states + shards, model


def disk(planned: Planned, found: Way, tokens: int | None) -> str:
    """Room that the run needs where it writes.

    Args:
        tokens: of all data, where they were read.
    """
    cfg = planned.cfg
    one, model = checkpoint_bytes(planned, found)
    cache = "" if tokens is None else f"; tokenised data {4 * tokens / GiB:,.2f} GiB"
    if cfg.trainer.save_strategy == "no":
        return f"disk: the model {model / GiB:,.1f} GiB, no checkpoints{cache}."
    limit = cfg.trainer.save_total_limit
    if not limit:
        return (
            f"disk: {one / GiB:,.1f} GiB per checkpoint, all of which are kept (set "
            f"save_total_limit to keep fewer), and the model {model / GiB:,.1f} GiB{cache}."
        )
    # a new one is whole before the oldest goes
    total = (limit + 1) * one + model
    return (
        f"disk: {total / GiB:,.1f} GiB: {limit} checkpoints (save_total_limit) and the one being"
        f" written, {one / GiB:,.1f} GiB each, and the model {model / GiB:,.1f} GiB{cache}."
    )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of a run's training data: tokens of each item, and of the documents in it."""

    rows: np.ndarray
    squares: np.ndarray
    """Sum of squares of the lengths of each row's documents: what attention's time grows with."""
    said: str
    """What became of the data, in words."""

    @property
    def tokens(self) -> int:
        return int(self.rows.sum())


def lengths_of(datasets: Datasets, documents: int) -> Lengths | None:
    """Of tokenised training data; None for streamed ones.

    Args:
        documents: of a sample: both answers of a pair.
    """
    train = datasets.train
    if train is None or not hasattr(train, "lengths"):
        return None
    rows = np.asarray(train.lengths, dtype=np.float64)
    squares = rows**2 / documents
    bins = getattr(train, "bins", None)
    if bins is not None and isinstance(train, RolloutDataset):
        each = np.asarray(train.sizes, dtype=np.float64) ** 2
        squares = np.array([each[members].sum() for members in bins])
    elif bins is not None and isinstance(train, TokenizedDataset):
        if train.entries.shape[1] == 4:  # ranges of texts
            sizes = train.entries[:, 3] - train.entries[:, 2]
        else:
            sizes = train.kind.lengths(train.stores, train.entries, train.rules).after
        each = np.asarray(sizes, dtype=np.float64) ** 2
        squares = np.array([each[members].sum() for members in bins])
    return Lengths(rows, squares, train.report.describe())


def epoch(planned: Planned, found: Way, data: Lengths | None) -> str:
    """Steps and time of an epoch, and of the run, of the data that were read."""
    if data is None:
        return (
            "epoch: the data were not read (--read-data reads and tokenises them as training does)."
        )
    trainer = planned.cfg.trainer
    batch, steps_of = int(trainer.per_device_train_batch_size), found.accumulation
    groups = planned.machine.gpus // found.size
    each_step = batch * steps_of * groups
    steps = max(1, -(-len(data.rows) // each_step))
    taken = epoch_seconds(found, data, batch, groups) + steps * found.update
    whole = trainer.max_steps if trainer.max_steps > 0 else steps * trainer.num_train_epochs
    longest = int(data.rows.max())
    run = duration(taken / steps * whole)
    return (
        f"epoch: {len(data.rows):,} rows, {data.tokens:,} tokens, longest row {longest:,}; "
        f"{steps:,} steps, {duration(taken)}; the run's {whole:,.0f} steps: {run}."
    )


def epoch_seconds(found: Way, data: Lengths, batch: int, groups: int) -> float:
    """Seconds of all forward and backward passes of an epoch: of groups that wait for the slowest
    of them at each micro-batch.
    """
    plan = found.memory.plan
    longest = max(int(data.rows.max()) * batch, 2)

    def passes(tokens: int) -> float:
        job = dataclasses.replace(plan.job, tokens=tokens)
        return max(seconds(job, plan.settings) - found.update, 0.0)

    # seconds of a row of one document: linear tokens + attention tokens^2
    whole, half = passes(longest), passes(longest // 2)
    attention = max(2 * (whole - 2 * half), 0.0) / longest**2
    linear = whole / longest - attention * longest
    of_rows = linear * data.rows + attention * data.squares
    total = 0.0
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(of_rows)
        padded = np.zeros(-(-len(order) // (batch * groups)) * batch * groups)
        padded[: len(order)] = order
        total += float(padded.reshape(-1, groups, batch).sum(2).max(1).sum())
    return total / ORDERS


def duration(taken: float) -> str:
    """Seconds in words."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if taken >= 2 * unit:
            return f"{taken / unit:.1f} {name}"
    return f"{taken:.3g} s"


def host(found: Way) -> str:
    """Memory of the host that the run's settings pin or use."""
    budget, machine = found.memory.plan.budget, found.memory.plan.job.machine
    if not budget.host_total:
        return ""
    what: Sequence[str] = [f"{name} {value / GiB:,.1f}" for name, value in budget.host.items()]
    return (
        f"host memory: {budget.host_total / GiB:,.1f} of {machine.host_bytes / GiB:,.0f} GiB"
        f" ({', '.join(what)})."
    )
