"""Direct preference optimisation in a training loop of your own: PyTorch and longfactory.sp.

    python examples/dpo_loop.py
    torchrun --nproc_per_node 2 examples/dpo_loop.py --mode llama3

A row holds preference pairs, each as two documents: the prompt with the chosen answer, and with
the rejected one. Rows are sharded over all processes, and the loss (`PreferenceStage`) is that of
one device, made from the gathered log-probabilities. `longfactory train` with `stage: dpo` gives
the same losses and gradient norms on the same rows; a test compares them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sft_loop import DATA, arguments, conversation, load, token_logprobs, update

from longfactory import sp
from longfactory.data.row import Row, make_row
from longfactory.model.outputs import TokenOutputs
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.losses import LossOptions
from longfactory.stages.preference import PreferenceStage


def read_pairs(path: Path, tokenizer: Any, per_row: int, multiple: int) -> Iterator[Row]:
    """Rows of `per_row` pairs, in the order of the file, again and again. Each has a multiple of
    `multiple` tokens.
    """
    pairs = []
    for i, sample in enumerate(json.loads(path.read_text())):
        (question,) = sample["messages"]
        for role in ("chosen", "rejected"):
            texts = question["content"], sample[role]["content"]
            pairs.append(conversation(tokenizer, *texts, role=role, sample=i))
    while True:
        for i in range(0, len(pairs), 2 * per_row):
            yield make_row(pairs[i : i + 2 * per_row]).padded(multiple, tokenizer.pad_token_id)


def train(
    model: Any, rows: Iterator[Row], ctx: sp.SequenceParallel, steps: int, rows_a_step: int = 2
) -> list[tuple[float, float]]:
    """Trains `model` in place; its reference is the model as it comes. Returns the loss and the
    gradient norm of each step.
    """
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for each in (model, reference):
        hf.prepare(each, ctx)
    head, reference_head = TokenLogprobs(model), TokenLogprobs(reference)
    stage = PreferenceStage("sigmoid", LossOptions(beta=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    results = []
    for _ in range(steps):
        step_rows = [next(rows) for _ in range(rows_a_step)]
        pairs = sum(stage.count_items(row) for row in step_rows)  # of the whole step
        loss, margin = 0.0, 0.0
        for row in step_rows:
            with torch.no_grad():
                reference_logps = token_logprobs(reference, reference_head, row, ctx)
            logps = token_logprobs(model, head, row, ctx)
            outputs = TokenOutputs(logps=logps, reference=reference_logps)  # [T] each
            loss_sum, metrics = stage.loss_sum(outputs, row)
            row_loss = loss_sum / pairs
            row_loss.backward()
            loss += row_loss.item()
            margin += metrics["rewards/margins"][0].item() / pairs
        results.append((loss, update(model, optimizer, ctx)))
        if ctx.rank == 0:
            norm = results[-1][1]
            print(f"loss {loss:.6f}, gradient norm {norm:.6f}, reward margin {margin:+.6f}")
    return results


if __name__ == "__main__":
    args, ctx = arguments(__doc__, DATA / "manual_dpo.json")
    model, tokenizer = load(args.model)
    train(model, read_pairs(args.data, tokenizer, args.per_row, sp.alignment(ctx)), ctx, args.steps)
