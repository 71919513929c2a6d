"""Models whose layers are not all softmax attention."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .context import SequenceParallel

LAYERS: frozenset[str] = frozenset()


def prepare(model: nn.Module, ctx: SequenceParallel) -> None:
    pass


def unsupported(model: PreTrainedModel) -> str | None:
    return None
