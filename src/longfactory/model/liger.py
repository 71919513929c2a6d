"""`enable_liger_kernel`: Liger's Triton kernels for norms, rotary embedding and MLP. The loss stays
our own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from longfactory.errors import UserError

# Liger's fused losses need the whole sequence on one device, and they would take the output layer
# away from `token_logprobs`.
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def apply_liger(model: Any, device: torch.device) -> None:
    """Replaces the kernels of a loaded model, in place. Attention and the output layer are not
    touched.

    Raises:
        UserError: the run is on the CPU, or Liger is not installed, or it does not know this
            architecture.
    """
    if device.type == "cpu":
        raise UserError(
            "enable_liger_kernel: Liger's kernels need a GPU, and this run is on the CPU. Leave the"
            " key out."
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(
            f"enable_liger_kernel: Liger cannot be imported ({error}). Run: pip install"
            ' "longfactory[liger]"'
        ) from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"enable_liger_kernel: Liger has no kernels for {kind}. Leave the key out.")
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    accepted = inspect.signature(patch).parameters
    patch(model=model, **{name: False for name in LOSSES if name in accepted})
