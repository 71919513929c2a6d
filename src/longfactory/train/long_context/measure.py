"""Runs texts through a model under sequence parallelism and reads the log-probabilities of what is
to be answered: a million tokens need one forward, and nothing is generated.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longfactory import progress
from longfactory.config import RunConfig
from longfactory.data import readers
from longfactory.data.row import IGNORE, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.model import load
from longfactory.train.long_context.tasks import TASKS, Text, make_text
from longfactory.train.run import assemble
from longfactory.train.survival.start import meet
from longfactory.train.survival.watch import Watch

BINS = 24
"""Points of the curve of a long text's loss by position, evenly spaced in the logarithm."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of the texts of one task, length and depth: the share whose answer is the most probable one
    at every token, and the mean log-probability of an answer token.
    """

    task: str
    length: int
    depth: float
    found: float
    logp: float
    texts: int


@dataclasses.dataclass(frozen=True)
class Point:
    """Of long texts, tokens [start, stop): mean loss in nats, and how many tokens."""

    start: int
    stop: int
    loss: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class LongContext:
    """What was measured."""

    model: str
    cells: tuple[Cell, ...]
    curve: tuple[Point, ...]


def evaluate(
    cfg: RunConfig,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    tasks: Sequence[str],
    samples: int,
    documents: Sequence[str] = (),
    watch: Watch | None = None,
) -> LongContext:
    """Measures a run's model (with its adapters). Collective.

    Args:
        cfg: the run: model, precision, sharding, sequence parallelism.
        lengths: tokens of the texts.
        depths: shares of a text before what is to be found.
        tasks: names of `TASKS`.
        samples: texts of each task, length and depth.
        documents: files of long texts (a text, or rows with text or input_ids) for the loss by
            position, each up to the longest of `lengths`.
        watch: over this process, where there is one.
    Raises:
        UserError: a length is too short for a task, a file holds no text, or as `assemble`.
    """
    store, _ = meet(cfg, watch, writes=False)
    tokenizer = load.load_tokenizer(cfg.model)
    texts = make_texts(tokenizer, lengths, depths, tasks, samples)
    long = read_documents(documents, tokenizer, max(lengths))
    longest = max(max(lengths), *(len(ids) for ids in long), 1)
    with tempfile.TemporaryDirectory() as scratch:
        assembled = assemble(_evaluation_of(cfg, longest, scratch), store=store)
        trainer = assembled.trainer
        trainer.shard_model()
        model = trainer.model_wrapped
        model.eval()
        results = [_answered(trainer, model, text) for text in _share(trainer, texts)]
        curve = _losses(trainer, model, long, longest)
    cells = _cells(trainer, texts, results)
    return LongContext(str(cfg.model.model_name_or_path), cells, curve)


def make_texts(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    tasks: Sequence[str],
    samples: int,
) -> list[Text]:
    """Every text that is asked for. A task without depth is made at the first one alone.

    Raises:
        UserError: a length is too short.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    adds = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None
    begin = [tokenizer.bos_token_id] if adds else []
    try:
        return [
            make_text(task, length, depth, seed, encode, begin)
            for task in tasks
            for length in lengths
            for depth in (depths if task != "common" else depths[:1])
            for seed in range(samples)
        ]
    except ValueError as error:
        raise UserError(f"lengths: {error} Give longer ones, or leave the task out.") from error


def read_documents(files: Sequence[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """Token ids of the texts in these files, the first `longest` of each.

    Raises:
        UserError: a file is missing or holds no text of two tokens.
    """
    found: list[list[int]] = []
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"documents: there is no file {path}.")
        before = len(found)
        if path.suffix in (".txt", ".md"):
            rows: list[Any] = [{"text": path.read_text(encoding="utf-8")}]
        else:
            raw = (row for _, row in readers.read_file(path))
            rows = [readers.parse_line(r) if isinstance(r, bytes) else r for r in raw]
        for row in rows:
            ids = row.get("input_ids") if isinstance(row, dict) else None
            if ids is None and isinstance(row, dict) and isinstance(row.get("text"), str):
                ids = tokenizer.encode(row["text"], add_special_tokens=False)
            if ids is not None and len(ids) > 1:
                found.append([int(i) for i in ids[:longest]])
        if len(found) == before:
            raise UserError(
                f"documents: {path} holds no text: give a .txt file, or rows with text or"
                " input_ids."
            )
    return found


def _evaluation_of(cfg: RunConfig, longest: int, scratch: str) -> RunConfig:
    """The run as an evaluation of rollouts, for which one that is never looked at stands."""
    path = Path(scratch) / "one.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 1], "mask": [0, 1]}) + "\n")
    hf = {
        **cfg.hf,
        "do_train": False,
        "do_eval": True,
        "do_predict": False,
        "predict_with_generate": False,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "output_dir": scratch,
        "report_to": "none",
        "per_device_train_batch_size": 1,
    }
    data = dataclasses.replace(
        cfg.data,
        dataset=(),
        eval_dataset=(str(path),),
        val_size=0.0,
        cutoff_len=longest,
        tokenized_path=None,
        streaming=False,
        packing=None,
        neat_packing=False,
        train_on_prompt=False,
        mask_history=False,
    )
    method = dataclasses.replace(cfg.method, stage="rl", loss_path=None, compute_accuracy=False)
    return dataclasses.replace(cfg, hf=hf, data=data, method=method)


def _share(trainer: Any, texts: Sequence[Text]) -> Sequence[Text | None]:
    """The texts of this data-parallel group; None where others have one more."""
    ctx = trainer.ctx
    mine: list[Text | None] = list(texts[ctx.dp_rank :: ctx.dp_size])
    return mine + [None] * (-(-len(texts) // ctx.dp_size) - len(mine))


@torch.no_grad()
def _outputs(trainer: Any, model: Any, ids: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """([n] log-probabilities, [n] whether it was the most probable) of the tokens from `first`."""
    from longfactory import sp

    progress.moved("evaluating long texts")
    labels = np.array(ids, dtype=np.int64)
    labels[:first] = IGNORE
    row = make_row([TokenizedDocument(list(ids), labels)])
    row = row.padded(sp.alignment(trainer.ctx), trainer.pad_id)
    with trainer.compute_loss_context_manager():
        out = trainer.token_outputs(model, row)
    at = torch.nonzero(row.labels != IGNORE)[:, 0].to(out.logps.device)
    return out.logps[at].double().cpu(), out.top1[at].cpu()


def _answered(trainer: Any, model: Any, text: Text | None) -> tuple[float, float]:
    """(whether the answer would be given, its mean log-probability a token); of no text (0, 0)."""
    ids = [1, 1] if text is None else text.ids
    logps, top1 = _outputs(trainer, model, ids, len(ids) - (1 if text is None else text.answer))
    return (0.0, 0.0) if text is None else (float(top1.all()), float(logps.mean()))


def _cells(
    trainer: Any, texts: Sequence[Text], mine: list[tuple[float, float]]
) -> tuple[Cell, ...]:
    """The results of all groups, by task, length and depth."""
    ctx = trainer.ctx
    values = torch.zeros(len(texts), 2, dtype=torch.float64)
    own = range(ctx.dp_rank, len(texts), ctx.dp_size)
    for number, result in zip(own, mine, strict=False):
        values[number] = torch.tensor(result, dtype=torch.float64)
    values = trainer._sum_over_groups(values.to(trainer.args.device)).cpu()
    places: dict[tuple[str, int, float], list[int]] = {}
    for number, text in enumerate(texts):
        places.setdefault((text.task, text.length, text.depth), []).append(number)
    cells = []
    for (task, length, depth), numbers in places.items():
        found, logp = values[numbers].mean(0).tolist()
        cells.append(Cell(task, length, depth, found, logp, len(numbers)))
    return tuple(cells)


def _losses(
    trainer: Any, model: Any, documents: Sequence[list[int]], longest: int
) -> tuple[Point, ...]:
    """The curve of the loss by position over all documents."""
    if not documents:
        return ()
    ctx = trainer.ctx
    edges = sorted({round(math.exp(x)) for x in np.linspace(0, math.log(longest), BINS + 1)})
    sums = torch.zeros(len(edges) - 1, 2, dtype=torch.float64)
    for number in range(-(-len(documents) // ctx.dp_size)):
        place = number * ctx.dp_size + ctx.dp_rank
        ids = documents[place] if place < len(documents) else [1, 1]
        logps, _ = _outputs(trainer, model, ids, 1)
        if place < len(documents):
            for i, (a, b) in enumerate(itertools.pairwise(edges)):
                part = logps[a - 1 : b - 1]  # the first token is not predicted
                sums[i] += torch.tensor([-float(part.sum()), len(part)], dtype=torch.float64)
    sums = trainer._sum_over_groups(sums.to(trainer.args.device)).cpu()
    return tuple(
        Point(a, b, float(total / count), int(count))
        for a, b, (total, count) in zip(edges[:-1], edges[1:], sums, strict=True)
        if count
    )


def checked_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each one of `TASKS`.

    Raises:
        UserError: one is not.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise UserError(
            f"tasks: got {', '.join(unknown) or 'none'}, expected some of {', '.join(TASKS)}."
        )
    return tuple(names)
