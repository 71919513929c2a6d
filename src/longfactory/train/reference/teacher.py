"""The most probable entries of a teacher at every trained token, computed once before the first
step by a pass under sequence parallelism, and kept on disk for later epochs and runs.

Each data-parallel group writes what it has seen into one safetensors file of a folder; every
process then reads the samples that it needs from all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory import progress, sp
from longfactory.config import RunConfig
from longfactory.data.module import cache_root
from longfactory.data.row import IGNORE, Row
from longfactory.data.store import private_folder, written
from longfactory.errors import UserError
from longfactory.model.token_logprobs import TokenLogprobs, top_candidates
from longfactory.train.ranks import everywhere
from longfactory.train.reference.attach import load_reference, reference_parts
from longfactory.train.reference.cache import document_check
from longfactory.train.reference.model import Reference
from longfactory.train.trainer import RowTrainer

log = logging.getLogger("longfactory")


class TeacherNumbers:
    """What `teach` has written for one data set. Picklable: files are opened where they are read.

    Args:
        files: one of each data-parallel group that wrote.
    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.places: dict[int, tuple[int, int, int, int]] = {}
        for number, file in enumerate(files):
            samples, counts, checks = (
                self._read(file, name).tolist() for name in ("samples", "counts", "checks")
            )
            start = 0
            for sample, count, check in zip(samples, counts, checks, strict=True):
                self.places[sample] = (number, start, count, check)
                start += count

    def _read(self, file: Path, name: str, rows: slice = slice(None)) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                return opened.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"The teacher's numbers in {file} cannot be read ({error}). Delete the folder; they"
                " are computed again."
            ) from error

    def attach(self, row: Row) -> Row:
        """The row (on the host) with teacher_ids and teacher_logp [T, K] at trained places.

        Raises:
            UserError: no numbers for a sample, or those of other tokens.
        """
        ids: Tensor | None = None
        logps: Tensor | None = None
        for i, d in enumerate(row.documents):
            if d.role == "pad" or not d.trained:
                continue
            place = self.places.get(d.sample)
            if place is None or place[2:] != (d.trained, document_check(row, i)):
                raise UserError(
                    f"The teacher's numbers of sample {d.sample} are missing or of other tokens:"
                    " the data changed since. Delete the cached ones and start again."
                )
            number, start, count, _ = place
            rows = slice(start, start + count)
            found = [self._read(self.files[number], name, rows) for name in ("ids", "logps")]
            if ids is None or logps is None:
                ids = torch.zeros(len(row), found[0].shape[1], dtype=torch.int64)
                logps = torch.zeros(len(row), found[1].shape[1])
            at = d.start + torch.nonzero(row.labels[d.start : d.stop] != IGNORE)[:, 0]
            ids[at], logps[at] = found[0].long(), found[1].float()
        if ids is None or logps is None:
            return row
        numbers = {**row.numbers, "teacher_ids": ids, "teacher_logp": logps}
        return dataclasses.replace(row, numbers=numbers)


def make_teacher(trainer: RowTrainer, cfg: RunConfig) -> Reference:
    """The teacher's numbers of the run's data, from the cache or by one pass. Collective.

    Raises:
        UserError: the data are a stream, the teacher cannot be loaded, or its vocabulary is not
            the student's.
    """
    datasets: list[tuple[Any, int]] = []
    if trainer.train_dataset is not None:
        datasets.append((trainer.train_dataset, trainer._train_batch_size))
    evaluation = trainer.eval_dataset or {}
    for d in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        datasets.append((d, trainer.args.eval_batch_size))
    if any(not hasattr(d, "__len__") for d, _ in datasets):
        raise UserError(
            "The teacher's numbers are computed before training, which a stream does not allow."
            " Set streaming: false."
        )
    named = dataclasses.replace(
        cfg,
        method=dataclasses.replace(
            cfg.method,
            ref_model=cfg.method.teacher_model,
            ref_model_adapters=(),
            ref_model_quantization_bit=None,
        ),
    )
    folder = cache_root().parent / "teacher"
    found = []
    loaded: list[tuple[nn.Module, TokenLogprobs]] = []
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        stack.callback(loaded.clear)
        for dataset, batch in datasets:
            parts = {**reference_parts(named, dataset), "top_k": cfg.method.distill_top_k}
            key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
            place = folder / key
            if not everywhere(bool(whole_files(place)), trainer.args.device):
                if not loaded:
                    loaded.append(load_reference(trainer, named, same_architecture=False))
                    check_vocabulary(trainer, loaded[0][0], cfg.method.distill_top_k)
                teach(trainer, *loaded[0], dataset, batch, cfg.method.distill_top_k, place)
            files = whole_files(place)
            if not everywhere(bool(files), trainer.args.device):
                raise UserError(
                    f"The teacher's numbers in {place} are not there on every machine. The folder"
                    " must be on a file system that all share: set LONGFACTORY_CACHE."
                )
            found.append((dataset, TeacherNumbers(files)))
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()
    return Reference(computed=tuple(found))


def vocabulary(trainer: RowTrainer) -> int:
    """Entries of the student's output layer."""
    config = trainer.accelerator.unwrap_model(trainer.model_wrapped).config
    return int(config.get_text_config().vocab_size)


def check_vocabulary(trainer: RowTrainer, teacher: nn.Module, top_k: int) -> None:
    """Output layers may be padded to different sizes, but both have every token of the tokenizer.

    Raises:
        UserError: the teacher's has not, or more entries are asked for than there are.
    """
    size = int(teacher.config.get_text_config().vocab_size)  # type: ignore[union-attr]
    tokens = len(trainer.processing_class)  # type: ignore[arg-type]
    if size < tokens:
        raise UserError(
            f"The teacher's vocabulary has {size} entries, the tokenizer {tokens}: the teacher must"
            " know the student's tokens."
        )
    if top_k > min(size, vocabulary(trainer)):
        raise UserError(
            f"distill_top_k: {top_k} is more than the vocabulary has"
            f" ({min(size, vocabulary(trainer))})."
        )


def whole_files(place: Path) -> list[Path]:
    """The files of a folder where every group's is there; none where one is missing."""
    files = sorted(place.glob("part-*-of-*.safetensors"))
    counts = {int(f.stem.rpartition("-")[2]) for f in files}
    for count in counts:
        wanted = [place / part_name(group, count) for group in range(count)]
        if all(f in files for f in wanted):
            return wanted
    return []


def part_name(group: int, groups: int) -> str:
    """The file of one data-parallel group."""
    return f"part-{group:05d}-of-{groups:05d}.safetensors"


def teach(
    trainer: RowTrainer,
    model: nn.Module,
    head: TokenLogprobs,
    dataset: Any,
    batch: int,
    top_k: int,
    place: Path,
) -> None:
    """One pass of the teacher over a data set, into a folder. Collective.

    Args:
        top_k: entries of the vocabulary that are kept of each trained token.
    """
    ctx = trainer.ctx
    seen: dict[int, tuple[int, Tensor, Tensor]] = {}
    for row in _rows(trainer, dataset, batch):
        ids, logps = row_candidates(trainer, model, head, row, top_k)
        for i, d in enumerate(row.documents):
            if d.role == "pad" or not d.trained:
                continue
            at = d.start + torch.nonzero(row.labels[d.start : d.stop] != IGNORE)[:, 0]
            seen[d.sample] = (document_check(row, i), ids[at].int(), logps[at].float())
    if ctx.rank == 0:
        private_folder(place)
        file = place / part_name(ctx.dp_rank, ctx.dp_size)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        order = sorted(seen)
        tensors = {
            "samples": torch.tensor(order, dtype=torch.int64),
            "counts": torch.tensor([len(seen[s][1]) for s in order], dtype=torch.int64),
            "checks": torch.tensor([seen[s][0] for s in order], dtype=torch.int64),
            "ids": torch.cat([*(seen[s][1] for s in order), torch.zeros(0, top_k).int()]),
            "logps": torch.cat([*(seen[s][2] for s in order), torch.zeros(0, top_k)]),
        }
        from safetensors.torch import save_file

        with written(place):
            save_file(tensors, beside)
            os.replace(beside, file)
    if dist.is_initialized():
        dist.barrier()


def _rows(trainer: RowTrainer, dataset: Any, batch: int) -> Iterator[Row]:
    from tqdm import tqdm

    loader = trainer.loader(dataset, batch, False)
    for item in tqdm(loader, desc="Teacher", disable=not trainer.is_world_process_zero()):
        progress.moved("computing the teacher's most probable tokens")
        yield item["row"]


@torch.no_grad()
def row_candidates(
    trainer: RowTrainer, model: nn.Module, head: TokenLogprobs, row: Row, top_k: int
) -> tuple[Tensor, Tensor]:
    """([T, K] ids, [T, K] log-probabilities) of the teacher at a row's trained places, on the
    host; 0 elsewhere. The same on every rank of the group.
    """
    plan = sp.plan(len(row), row.segments, trainer.ctx)
    labels = row.labels[plan.index]
    with trainer.compute_loss_context_manager():
        hidden = trainer.reference_hidden(model, head, row)
        ids, logps = top_candidates(hidden, top_k, vocabulary(trainer))
    here = torch.nonzero(labels >= 0)[:, 0].to(ids.device)
    count = len(here)  # one row of `hidden` stands for none
    local_ids = torch.zeros(len(labels), top_k, dtype=torch.float64, device=ids.device)
    local_ids[here] = ids[:count].double()
    local = logps.new_zeros(len(labels), top_k)
    local[here] = logps[:count]
    return sp.gather(local_ids, plan).long().cpu(), sp.gather(local, plan).float().cpu()


__all__ = ["TeacherNumbers", "make_teacher", "row_candidates", "teach", "whole_files"]
