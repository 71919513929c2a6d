"""Whether kernels of Triton are right on a device: a small example of theirs beside float64."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longfactory.sp.distance import worst

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Of an example's results, from float64: the norm of the error over that of the result."""


def are_right(
    what: str,
    kernels: Callable[[], list[Tensor]],
    expected: Callable[[], list[Tensor]],
    dtype: torch.dtype,
    names: Sequence[str] = (),
) -> bool:
    """Runs an example by kernels and as it should be, and compares. What is wrong is logged. What
    the example saves for its gradients is its own: the call may be within a checkpointed layer,
    which counts what its forward saves, and is not called again in the recomputation.

    Args:
        what: runs in PyTorch where the kernels are not right, in the words of a log line.
        dtype: of the example.
        names: of the results, for the log line; there may be more than there are results.
    """
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            pairs = zip(kernels(), expected(), strict=True)
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        far = worst(errors)
        wrong = [
            f"{name} {error:.1e}"
            for name, error in zip(names, errors, strict=False)
            if not error <= TOLERANCE[dtype]
        ]
        where = f" ({', '.join(wrong)})" if wrong else ""
        reason = "" if far <= TOLERANCE[dtype] else f"is {far:.1e} from float64{where}"
    except Exception as error:  # a version of Triton or a GPU on which they cannot be made
        reason = f"fails with {type(error).__name__}: {str(error)[:200]}"
    if reason:
        log.warning(
            "%s in PyTorch, slowly: LongFactory's Triton kernel %s on this device.", what, reason
        )
    return not reason
