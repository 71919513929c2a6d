"""Whole weights from sharded ones, for saving as plain Hugging Face safetensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_state_dict(model: Any) -> dict[str, Tensor]:
    """The whole state dict of an FSDP2 model on rank 0's host memory, and an empty one elsewhere.
    Collective: every rank calls it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(
        get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    )


def cast_floats(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """fp32 master weights -> the dtype that the model is published in. Shared tensors stay
    shared.
    """
    done: dict[int, Tensor] = {}
    out = {}
    for name, t in state.items():
        if t.is_floating_point() and t.dtype != dtype:
            key = t.data_ptr()
            if key not in done or done[key].shape != t.shape:
                done[key] = t.to(dtype)
            out[name] = done[key]
        else:
            out[name] = t
    return out
