"""`enable_liger_kernel`: Liger's Triton kernels for norms, rotary embedding and MLP. The loss stays
our own.
"""

from __future__ import annotations

import inspect
from typing import Any

from longfactory.errors import UserError

# Liger's fused losses need the whole sequence on one device, and they would take the output layer
# away from `token_logprobs`.
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def apply_liger(model: Any) -> None:
    """Replaces the kernels of a loaded model, in place. Attention and the output layer are not
    touched.

    Raises:
        UserError: Liger is not installed, or does not know this architecture.
    """
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
