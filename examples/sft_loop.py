"""Supervised fine-tuning in a training loop of your own: PyTorch and longfactory.sp, no Trainer.

    python examples/sft_loop.py
    torchrun --nproc_per_node 2 examples/sft_loop.py
    torchrun --nproc_per_node 2 examples/sft_loop.py --mode ulysses --model path/to/a/model

Each row of packed conversations is sharded over all processes, and the numbers that are printed
do not depend on how many there are. Without --model a tiny random model reads bytes. `longfactory
train` gives the same losses and gradient norms on the same rows; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longfactory import sp
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.tokens import TokenStage

DATA = Path(__file__).parents[1] / "data"


def conversation(tokenizer: Any, question: str, answer: str, **document: Any) -> TokenizedDocument:
    """A question and its answer in ChatML; the answer's tokens are trained."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(f"{answer}<|im_end|>\n", add_special_tokens=False)
    labels = [IGNORE] * len(prompt_ids) + answer_ids
    return TokenizedDocument(prompt_ids + answer_ids, labels, **document)


def read_rows(path: Path, tokenizer: Any, per_row: int, multiple: int) -> Iterator[Row]:
    """Rows of `per_row` conversations, in the order of the file, again and again. Each has a
    multiple of `multiple` tokens.
    """
    samples = json.loads(path.read_text())
    documents = [conversation(tokenizer, s["instruction"], s["output"]) for s in samples]
    while True:
        for i in range(0, len(documents), per_row):
            yield make_row(documents[i : i + per_row]).padded(multiple, tokenizer.pad_token_id)


def token_logprobs(
    model: torch.nn.Module, head: TokenLogprobs, row: Row, ctx: sp.SequenceParallel
) -> Tensor:
    """[T] log-probabilities of the row's labels in natural order, the same on every rank. Each
    rank computes [T/n] of them.
    """
    plan = sp.plan(len(row), row.segments, ctx)
    tensors = {"input_ids": row.input_ids, "position_ids": row.position_ids}
    with head.labels(row.labels[plan.index]):
        model(**hf.inputs(tensors, plan))  # the attention alone talks to other ranks
        local = head.outputs().logps
    return sp.gather(local, plan)  # [T/n] -> [T]


def update(model: torch.nn.Module, optimizer: Any, ctx: sp.SequenceParallel) -> float:
    """An optimizer step from the gradients of all ranks. Returns their norm before clipping.

    Every rank has differentiated the loss of whole rows, through the exact adjoint of each
    collective: the mean over ranks is the gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if ctx.group is not None:
        for p in parameters:
            dist.all_reduce(p.grad, group=ctx.group)
            p.grad /= ctx.size
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def train(
    model: Any, rows: Iterator[Row], ctx: sp.SequenceParallel, steps: int, rows_a_step: int = 2
) -> list[tuple[float, float]]:
    """Trains `model` in place. Returns the loss and the gradient norm of each step."""
    hf.prepare(model, ctx)
    head, stage = TokenLogprobs(model), TokenStage()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    results = []
    for _ in range(steps):
        step_rows = [next(rows) for _ in range(rows_a_step)]
        # Divided by the trained tokens of the whole step: the exact mean, however they are spread.
        trained_tokens = sum(stage.count_items(row) for row in step_rows)
        loss = 0.0
        for row in step_rows:
            loss_sum, _ = stage.loss_sum(token_logprobs(model, head, row, ctx), row)
            row_loss = loss_sum / trained_tokens
            row_loss.backward()
            loss += row_loss.item()
        results.append((loss, update(model, optimizer, ctx)))
        if ctx.rank == 0:
            print(f"loss {loss:.6f}, gradient norm {results[-1][1]:.6f}, {trained_tokens} tokens")
    return results


def load(folder: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer; without a folder a tiny random model and a tokenizer of bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

    from longfactory.testing import tiny_model

    if folder is None:
        tokenizer = ByT5Tokenizer()
        return tiny_model("llama", vocab_size=len(tokenizer)), tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def arguments(description: str | None, data: Path) -> tuple[argparse.Namespace, Any]:
    """The command line, and the sequence-parallel group of all processes (gloo, on CPUs)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--model", help="a folder with a causal language model")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--mode", default="zigzag-ring", choices=sp.MODES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--per_row", type=int, default=2, help="samples packed into a row")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    size = dist.get_world_size() if dist.is_initialized() else 1
    return args, sp.SequenceParallel.create(size, mode=args.mode)


if __name__ == "__main__":
    args, ctx = arguments(__doc__, DATA / "manual_sft.json")
    model, tokenizer = load(args.model)
    train(model, read_rows(args.data, tokenizer, args.per_row, sp.alignment(ctx)), ctx, args.steps)
