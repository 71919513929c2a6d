"""What a comparison may cost: how long the rows of `longfactory verify` are, and when the
specification computes layers again or leaves a check out.
"""

from __future__ import annotations

from typing import Any

import torch

from longfactory.sp import hf
from longfactory.train.trainer import RowTrainer
from longfactory.train.verify import zero

TOKENS, FEWEST = 2048, 128
"""The longest row: at least `FEWEST` tokens where a CPU would take minutes."""
KEPT_BYTES = 2**31
"""What a pass may keep for its backward pass before layers are computed again."""
CPU_OPERATIONS, GPU_OPERATIONS = 6 * 10**11, 6 * 10**14
"""What the specification may cost: about a minute of two cores in float64, or of a GPU."""


def operations(trainer: RowTrainer, tokens: int) -> int:
    """Of the specification of one document of so many tokens: two computations, each a pass to
    read and one for the gradient, in which layers are computed again.
    """
    config: Any = hf.unwrap(trainer.model).config.get_text_config()
    heads, layers, dim = _shape(config)
    parameters = sum(map(zero.count, trainer.model.parameters()))
    return 2 * 5 * (2 * parameters * tokens + 4 * layers * heads * dim * tokens * tokens)


def kept_bytes(trainer: RowTrainer, tokens: int) -> int:
    """About what a pass of the specification over so many tokens keeps for its backward pass, in
    float64.
    """
    config: Any = hf.unwrap(trainer.model).config.get_text_config()
    heads, layers, _ = _shape(config)
    hidden = getattr(config, "hidden_size", None) or 1
    return 8 * layers * tokens * (3 * heads * tokens + 24 * hidden)


def longest_row(trainer: RowTrainer, rows: int) -> int:
    """How long rows are by default."""
    tokens = TOKENS
    while (
        trainer.args.device.type == "cpu"
        and tokens > FEWEST
        and rows * operations(trainer, tokens) > CPU_OPERATIONS
    ):
        tokens //= 2
    return tokens


def affordable(trainer: RowTrainer, tokens: int) -> bool:
    """Whether transformers' own attention of a document of so many tokens, in a wider precision,
    fits beside the run and takes no more than a minute or so.
    """
    heads, _, _ = _shape(hf.unwrap(trainer.model).config.get_text_config())
    scores = 5 * 8 * heads * tokens * tokens  # float64: scores, weights and their gradients
    if trainer.args.device.type == "cuda":
        free = torch.cuda.mem_get_info(trainer.args.device)[0]
        return scores < free / 2 and operations(trainer, tokens) < GPU_OPERATIONS
    return scores < 2 * 2**30 and operations(trainer, tokens) < CPU_OPERATIONS


def _shape(config: Any) -> tuple[int, int, int]:
    """(query heads, layers, head dim): the most of any layer."""
    heads = max(given or 1 for given in hf.values_of_layers(config, "num_attention_heads"))
    hidden = getattr(config, "hidden_size", None) or heads
    dim = max(given or hidden // heads for given in hf.values_of_layers(config, "head_dim"))
    return heads, getattr(config, "num_hidden_layers", None) or 1, dim
