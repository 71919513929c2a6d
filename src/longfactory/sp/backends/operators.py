"""PyTorch's private operators, called by the names of their arguments.

Their schemas change between releases. Those that the backends were written for stand here, and an
operator is compared with its own before its first call, the backward together with the forward: a
backward that has changed is found before anything is computed. A backend whose operator differs is
not used, and the log says why.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Signature:
    """What an operator takes and gives, in the words of PyTorch's schemas."""

    arguments: str
    results: str


OPERATORS: dict[str, tuple[Signature, Signature]] = {
    "_flash_attention": (
        Signature(
            "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k,"
            " SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask,"
            " float? scale, SymInt? window_size_left, SymInt? window_size_right,"
            " Tensor? seqused_k, Tensor? alibi_slopes",
            "Tensor, Tensor, Tensor, Tensor, Tensor",
        ),
        Signature(
            "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
            " Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k,"
            " float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, float? scale,"
            " SymInt? window_size_left, SymInt? window_size_right",
            "Tensor, Tensor, Tensor",
        ),
    ),
    "_efficient_attention": (
        Signature(
            "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q,"
            " Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p,"
            " int custom_mask_type, bool compute_log_sumexp, float? scale, Tensor? seqlen_k,"
            " int? window_size",
            "Tensor, Tensor, Tensor, Tensor, SymInt, SymInt",
        ),
        Signature(
            "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out,"
            " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q,"
            " SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, Tensor philox_seed,"
            " Tensor philox_offset, int custom_mask_type, bool bias_requires_grad, float? scale,"
            " int? num_splits_key, int? window_size, bool shared_storage_dqdkdv",
            "Tensor, Tensor, Tensor, Tensor",
        ),
    ),
    "_scaled_dot_product_cudnn_attention": (
        Signature(
            "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp,"
            " float dropout_p, bool is_causal, bool return_debug_mask, float? scale",
            "Tensor, Tensor, Tensor, Tensor, SymInt, SymInt, Tensor, Tensor, Tensor",
        ),
        Signature(
            "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
            " Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, Tensor attn_bias,"
            " Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p,"
            " bool is_causal, float? scale",
            "Tensor, Tensor, Tensor",
        ),
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        Signature(
            "Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal,"
            " Tensor? attn_mask, float? scale",
            "Tensor, Tensor",
        ),
        Signature(
            "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,"
            " Tensor logsumexp, float dropout_p, bool is_causal, Tensor? attn_mask, float? scale",
            "Tensor, Tensor, Tensor",
        ),
    ),
}
"""Every private operator that is called: its forward and its backward, in PyTorch 2.11 to 2.13."""


def forward(operator: str, **arguments: Any) -> Any:
    """The forward operator, `torch.ops.aten.<operator>` (of two it is `<operator>_forward`).

    Args:
        operator: a key of `OPERATORS`.
        arguments: by name.
    Raises:
        RuntimeError: this PyTorch has no such operator, or it or its backward is another one.
    """
    return _checked(operator)[0](**arguments)


def backward(operator: str, **arguments: Any) -> Any:
    """The backward of the operator, `torch.ops.aten.<operator>_backward`; see `forward`."""
    return _checked(operator)[1](**arguments)


def names(operator: str) -> tuple[str, str]:
    """The names in `torch.ops.aten` of a forward and its backward."""
    scaled = operator.startswith("_scaled_dot_product")
    return operator if scaled else f"{operator}_forward", f"{operator}_backward"


def schema(name: str) -> str | None:
    """`(arguments) -> (results)` of an operator of this PyTorch, None where it has none."""
    operator = getattr(torch.ops.aten, name, None)
    return None if operator is None else str(operator.default._schema).removeprefix(f"aten::{name}")


def difference(name: str, expected: Signature) -> str | None:
    """How an operator of this PyTorch differs from what is called, None where it does not.

    An argument that was added behind the known ones, with a default, is no difference.
    """
    found = schema(name)
    if found is None:
        return f"PyTorch {torch.__version__} has no operator {name}"
    arguments, results = found.removeprefix("(").removesuffix(")").split(") -> (")
    taken = [a for a in arguments.split(", ") if a != "*"]
    plain = [argument.partition("=")[0] for argument in taken]
    known = expected.arguments.split(", ")
    added = [a for a, name_of in zip(taken, plain, strict=True) if name_of not in known]
    given = [result.split(" ")[0] for result in results.split(", ")]
    problems = [f"it has no '{a}'" for a in known if a not in plain]
    problems += [f"it also needs '{a}'" for a in added if "=" not in a]
    if not problems and [a for a in plain if a in known] != known:
        problems.append(f"got them in the order {', '.join(plain)}")
    if not problems and given != expected.results.split(", "):
        problems.append(f"it gives ({', '.join(given)}), expected ({expected.results})")
    if not problems:
        return None
    return (
        f"the operator {name} of PyTorch {torch.__version__} has another schema than expected:"
        f" {', '.join(problems)}"
    )


@functools.cache
def _found(operator: str) -> tuple[tuple[Any, Any] | None, str | None]:
    """The forward and the backward, or what is wrong with them."""
    both = names(operator)
    for name, expected in zip(both, OPERATORS[operator], strict=True):
        problem = difference(name, expected)
        if problem is not None:
            return None, problem
    found = [getattr(torch.ops.aten, name).default for name in both]
    return (found[0], found[1]), None


def _checked(operator: str) -> tuple[Any, Any]:
    found, problem = _found(operator)
    if found is None:
        raise RuntimeError(problem)
    return found
