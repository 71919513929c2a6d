"""Bytes of one token in what comes after a layer's attention, while that is in its backward: by
reading the code (`memory/layer/mlp_half.py`, `model/experts.py`), held to it by a test that counts
tensors.

Letters: H width of the hidden states, I of one expert; numbers are of each pair of a token and an
expert.
"""

from __future__ import annotations

from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.shapes import TrainingJob


def temporary_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """Of the MLP, projections and norms of one layer."""
    return _around(job, kind) + _mlp(job, kind) + job.router_bytes(kind)


def beyond_saved_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """Of the same in a hand-written layer, but for what `keep_mlp` has saved of its experts: what
    autograd stores of them, what the mixture is given and makes, and what the output projection
    gives.
    """
    if not kind.one_kernel_gate:
        return temporary_bytes(job, kind)
    mixture = _mlp(job, kind) - _stored_mlp(job, kind)
    around = _around(job, kind) - 3 * job.hidden_bytes
    return around + mixture + job.router_bytes(kind)


def beyond_stored_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """Of the same in a layer whose activations are all stored: half, of experts in kernels of one
    gate all but what is stored.
    """
    if not kind.one_kernel_gate:
        return temporary_bytes(job, kind) / 2
    mixture = _mlp(job, kind) - _stored_mlp(job, kind)
    return (_around(job, kind) + job.router_bytes(kind)) / 2 + mixture


def _around(job: TrainingJob, kind: LayerKind) -> float:
    """Eight numbers of the width of hidden states, three more for each norm beyond two. In the
    hand-written layer, which holds no part of a norm, three, and two more where norms follow
    attention and the MLP; and what a mixture of experts makes.
    """
    around = 8 + 3 * max(0, kind.norms - 2)
    if job.written(kind):
        around = 3 + 2 * kind.norms_after + bool(kind.experts)
    return float(around * job.hidden_bytes)


def _mlp(job: TrainingJob, kind: LayerKind) -> float:
    """Six numbers of the MLP's width; two more with PEFT's adapters, which compute with wide copies
    of what they are given.

    Shared experts stand beside routed ones: while one of the two is in its backward, of the other
    there is what autograd stores, and what it makes, gated or not. What both make and their sum are
    two numbers more of the width of hidden states, five with what an adapter adds.
    """
    adapters, width = job.shape.adapters, job.shape.width
    inner = 8 if adapters and not job.written(kind) else 6
    if not kind.experts:
        return float(inner * width * kind.dense_width)
    most = _expert_bytes(job, kind)
    if not kind.one_kernel_gate:
        return inner * width * kind.dense_width + most
    if not kind.shared_width:
        return most
    outputs = (5 if adapters else 2) * job.hidden_bytes
    shared = inner * width * kind.shared_width + outputs + _routes(job, kind)
    beside = _stored_mlp(job, kind) - stored_expert_bytes(job, kind) + 2 * job.hidden_bytes
    return max(most + beside, stored_expert_bytes(job, kind) + shared)


def _stored_mlp(job: TrainingJob, kind: LayerKind) -> float:
    """What autograd stores of experts, routed and shared."""
    return stored_expert_bytes(job, kind) + 4.0 * job.shape.width * kind.shared_width


def _expert_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """That routed experts hold at most, what autograd stores of them included: H numbers of what
    goes in and comes out of each product, I of what is between them, and their gradients.

        trained  3 H + 3 I  the gradient of what they make is there
                 2 H + 4 I  that of the gate's product
                   H + 5 I  that of what the gate is given
        frozen   2 H + 2 I, H + 3 I, 5 I: without what only the weights' gradients read
        adapted  as trained: an adapter's product is added to the weight's in place
    """
    outer, inner = kind.used * kind.hidden, kind.expert_width
    if not kind.one_kernel_gate:
        return job.shape.width * (4.0 * outer + 7.0 * inner)
    if job.shape.adapters and not job.shape.adapted_experts:
        numbers = max(2 * outer + 2 * inner, outer + 3 * inner, 5 * inner)
    else:
        numbers = max(3 * outer + 3 * inner, 2 * outer + 4 * inner, outer + 5 * inner)
    return job.shape.width * (numbers + 2 * _adapter_ranks(job, kind)) + _routes(job, kind)


def stored_expert_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """That autograd stores of them: the input and the output of each expert, the output alone of a
    frozen one; what its gate is made of, and gives.
    """
    frozen = job.shape.adapters and not job.shape.adapted_experts
    sides, parts = (1, 2) if frozen else (2, 3)
    numbers = sides * kind.used * kind.hidden + parts * kind.expert_width
    return float(job.shape.width * numbers)


def _routes(job: TrainingJob, kind: LayerKind) -> float:
    """Of the order of pairs and the router; and, where biases of experts are trained, which expert
    each pair is sent to, as a matrix.
    """
    routes = 40.0 * kind.used + 8.0 * kind.experts
    if kind.expert_biases and not job.shape.adapters:
        routes += (1 + job.shape.width) * kind.experts * kind.used
    return routes


def _adapter_ranks(job: TrainingJob, kind: LayerKind) -> float:
    """Numbers between the two maps of an adapter, of all experts that a token passes: at most, as
    if nothing else had adapters.
    """
    if not job.shape.adapted_experts:
        return 0.0
    layers = sum(count for each, count in job.shape.layers_of_kinds if each.experts)
    expert = kind.expert_parameters / kind.experts / kind.hidden / 3
    of_a_rank = layers * kind.experts * (2 * kind.hidden + 3 * expert)
    return kind.used * job.shape.trainable / of_a_rank
