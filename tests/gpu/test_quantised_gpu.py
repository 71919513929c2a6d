"""4-bit weights under FSDP2: every bit of what is stored survives being sharded and gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longfactory.model import load
from longfactory.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def changed_bits(storage: torch.dtype, param_dtype: torch.dtype | None) -> int:
    """Bytes that differ after one gathering, of all 65536 patterns of two bytes, twice over."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).repeat(2).cuda()
    module: Any = torch.nn.Module()
    module.bits = torch.nn.Parameter(patterns.view(storage)[:, None].clone(), requires_grad=False)
    module.adapter = torch.nn.Parameter(torch.zeros(64, device="cuda"))
    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
    module.unshard()
    gathered = module.bits.detach().contiguous().view(torch.uint8).flatten()
    if gathered.numel() != patterns.numel() * 2:
        return -1  # cast to another type
    return int((gathered != patterns.view(torch.uint8)).sum())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_storage_type_of_quantised_weights_survives_fsdp2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longfactory.config.arguments import ModelArguments

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: object())
    arguments = ModelArguments(model_name_or_path="x", quantization_bit=4)
    config = load.quantization_config(arguments, torch.bfloat16, sharded=True)
    assert run_ranks(
        2, changed_bits, config.bnb_4bit_quant_storage, None, process_group="nccl"
    ) == [0, 0]
    for dtype in (torch.bfloat16, torch.float16):  # what the fault was
        print(dtype, run_ranks(2, changed_bits, dtype, dtype, process_group="nccl"))
