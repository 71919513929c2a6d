"""Generated answers for an evaluation set (`do_predict` with `predict_with_generate`), on one
device or data-parallel.

For every conversation the model reads all up to the last answer and writes its own.
`generated_predictions.jsonl` holds prompt, prediction and label; `predict_results.json` holds
ROUGE-1, -2 and -L: F-measures in percent, of words (a character of Chinese, Japanese or Korean is a
word), averaged over the samples that have an answer to compare with.
"""

from __future__ import annotations

import collections
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from longfactory import progress
from longfactory.config import RunConfig
from longfactory.data.module import Datasets
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.errors import UserError
from longfactory.memory.gathered import give_up_weights
from longfactory.model.generate import attention_with_cache, generation_arguments, stop_tokens
from longfactory.train.output import save_metrics

FILE = "generated_predictions.jsonl"


def predict(trainer: Any, cfg: RunConfig, tokenizer: Any, datasets: Datasets) -> dict[str, float]:
    """Generates for every evaluation set and writes the files into the output folder. Collective.

    Raises:
        UserError: under sequence parallelism, or there is no evaluation data.
    """
    if trainer.ctx.size > 1:
        raise UserError(
            "Answers are generated on one device or data-parallel; a sequence cannot be "
            f"sharded over {trainer.ctx.size} processes. Set sequence_parallel_size: 1 for "
            "do_predict, or generate from the saved model."
        )
    if not datasets.eval:
        raise UserError("do_predict needs evaluation data. Set eval_dataset or val_size.")
    trainer.shard_model()
    metrics: dict[str, float] = {}
    for name, dataset in datasets.eval.items():
        prefix = "predict" if len(datasets.eval) == 1 else f"predict_{name}"
        metrics |= _one_set(trainer, cfg, tokenizer, dataset, prefix)
    trainer.log_metrics("predict", metrics)
    save_metrics(trainer, "predict", metrics)
    return metrics


def _one_set(
    trainer: Any, cfg: RunConfig, tokenizer: Any, dataset: Any, prefix: str
) -> dict[str, float]:
    started = time.time()
    rank, groups = trainer.ctx.dp_rank, trainer.ctx.dp_size
    documents = [d for i in range(len(dataset)) for d in dataset[i]]
    asked = [split_last_answer(d) for d in documents]
    # Images of several prompts have no common shape: each prompt is answered by itself.
    batch = trainer.args.eval_batch_size if trainer.images is None else 1
    # Every rank makes the same number of calls, as sharded parameters need; what is too many
    # repeats the first question and is dropped.
    rounds = -(-len(asked) // (batch * groups))
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    stops = stop_tokens(model, tokenizer, cfg.data.template)
    mine: list[tuple[int, str]] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager(), attention_with_cache(model):
            for j in range(rounds):
                progress.moved("generating")
                places = [(j * groups + rank) * batch + k for k in range(batch)]
                places = [p for p in places if p < len(asked)] or [0]
                prompts = [asked[p][0] for p in places]
                images = {}
                if trainer.images is not None:
                    images = trainer.images.of_prompt(*prompts, documents[places[0]])
                answers = generate(
                    model,
                    tokenizer,
                    prompts,
                    cfg.generating,
                    trainer.args.device,
                    groups > 1,
                    stops,
                    images,
                )
                mine += zip(places, answers, strict=True)
    finally:
        model.train(training)
        give_up_weights(model)
    everyone: list[Any] = [mine]
    if groups > 1:
        everyone = [None] * groups
        dist.all_gather_object(everyone, mine)
    answers_of = {place: text for part in reversed(everyone) for place, text in part}
    skip = cfg.generating.skip_special_tokens
    labels = [tokenizer.decode(label, skip_special_tokens=skip) for _, label in asked]
    predictions = [answers_of[i] for i in range(len(asked))]
    if trainer.is_world_process_zero():
        os.makedirs(trainer.args.output_dir, exist_ok=True)
        path = os.path.join(trainer.args.output_dir, answers_file(prefix))
        with open(path, "w", encoding="utf-8") as f:
            f.write(written(tokenizer, asked, predictions, labels))
    return scores_of(prefix, asked, predictions, labels, time.time() - started)


Asked = Sequence[tuple[list[int], list[int]]]
"""(prompt, answer) of each conversation, as token ids."""


def answers_file(prefix: str) -> str:
    """The file of the answers to a set; `prefix` is that of its metrics."""
    return FILE if prefix == "predict" else f"{prefix}_{FILE}"


def written(tokenizer: Any, asked: Asked, predictions: Sequence[str], labels: Sequence[str]) -> str:
    """The lines of that file: prompt, prediction and label of each conversation."""
    lines = []
    for (prompt, _), text, label in zip(asked, predictions, labels, strict=True):
        asked_text = tokenizer.decode(prompt, skip_special_tokens=False)
        line = {"prompt": asked_text, "predict": text, "label": label}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def scores_of(
    prefix: str,
    asked: Asked,
    predictions: Sequence[str],
    labels: Sequence[str],
    seconds: float,
) -> dict[str, float]:
    """The metrics of a set: ROUGE over the conversations that have an answer, how many there are,
    and the seconds they took.
    """
    scores = [
        rouge(p, label)
        for p, label, (_, answer) in zip(predictions, labels, asked, strict=True)
        if answer
    ]
    out = (
        {f"{prefix}_{k}": round(sum(s[k] for s in scores) / len(scores), 4) for k in scores[0]}
        if scores
        else {}
    )
    return out | {f"{prefix}_samples": len(asked), f"{prefix}_runtime": round(seconds, 4)}


def split_last_answer(document: TokenizedDocument) -> tuple[list[int], list[int]]:
    """A conversation -> (all before its last answer, its last answer): the last stretch of trained
    tokens. Of a question: (all of it, []).

    Raises:
        UserError: nothing, or the very first token, is trained: there is no prompt to answer.
    """
    if document.role == "prompt":
        return [int(x) for x in document.input_ids], []
    labels = [int(x) for x in document.labels]
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORE:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORE:
        start -= 1
    if stop == 0 or start == 0:
        raise UserError(
            f"Sample {document.sample} has no prompt and answer to tell apart. do_predict needs"
            " conversations, and train_on_prompt: false."
        )
    ids = [int(x) for x in document.input_ids]
    return ids[:start], labels[start:stop]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    generating: Any,
    device: Any,
    together: bool,
    stops: Sequence[int],
    images: Mapping[str, Any] | None = None,
) -> list[str]:
    """Answers to a batch of prompts, padded on the left, up to one of the `stops`.

    `together`: other ranks generate too and parameters may be sharded. `images`: further arguments,
    of a single prompt's images.
    """
    length = max(map(len, prompts))
    options = generation_arguments(generating, tokenizer, length, stops)
    ids = torch.full((len(prompts), length), options["pad_token_id"] or 0)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        ids[i, length - len(p) :] = torch.tensor(p)
        mask[i, length - len(p) :] = 1
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=True,
        synced_gpus=together,
        **(images or {}),
        **options,
    )
    return tokenizer.batch_decode(
        out[:, length:], skip_special_tokens=generating.skip_special_tokens
    )


_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


def rouge(prediction: str, label: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin, 2004): F-measures in percent; 0 where either text has no words."""
    a, b = (_WORD.findall(text.lower()) for text in (prediction, label))

    def f(common: int, n: int, m: int) -> float:
        return 200.0 * common / (n + m) if common else 0.0

    def grams(words: list[str], n: int) -> collections.Counter[tuple[str, ...]]:
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    out = {}
    for n in (1, 2):
        x, y = grams(a, n), grams(b, n)
        out[f"rouge-{n}"] = f((x & y).total(), x.total(), y.total())
    # Longest common subsequence, a row of the table at a time.
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    out["rouge-l"] = f(row[-1], len(a), len(b))
    return out
