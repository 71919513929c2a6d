"""Products of a step in floating-point operations: of the linear layers, the logits and causal
attention. A token's linear layers take 2 FLOP a parameter forward and 4 backward.
"""

from __future__ import annotations

from longfactory.memory.shapes import ModelShape, TrainingJob


def backward_products(shape: ModelShape) -> float:
    """Products of a linear layer's backward, in those of its forward: one for the input and one for
    the weight where it is trained.
    """
    return 1.0 if shape.adapters else 1.0 + shape.trainable / shape.parameters


def head_flop(job: TrainingJob) -> float:
    """Of one token's logits: made twice, and differentiated."""
    return 2.0 * job.shape.head_parameters * (2 + (2.0 if job.shape.head_trained else 1.0))


def document_flop(
    shape: ModelShape, tokens: int, before: int = 0, heads: float | None = None
) -> float:
    """What the model needs for a document, forward and backward: products of causal attention by
    each kind of layer, without what is computed again and without a reference's pass.

    Args:
        tokens: of the document.
        before: tokens that all of them see besides: a shared prompt's.
        heads: tokens whose logits are made, the trained ones; by default all.
    """
    back = backward_products(shape)
    flop = 2.0 * (1 + back) * shape.head_parameters * (tokens if heads is None else heads)
    end = before + tokens
    for kind, count in shape.layers_of_kinds:
        maps = 2.0 * (1 + back) * (kind.mixer_parameters + kind.mlp_parameters)
        attention = end * kind.needed_flop(end)
        scoring = end * kind.scoring_flop(end) / 2  # causal, and without a backward pass
        if before:
            attention -= before * kind.needed_flop(before)
            scoring -= before * kind.scoring_flop(before) / 2
        flop += count * (tokens * (maps + 3 * kind.recurrent_flop) + 3 * attention + scoring)
    return flop
