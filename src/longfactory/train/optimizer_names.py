"""What the optimizers of `optim` keep: AdamW with exact fp32 states, or with narrower ones, which
are the user's explicit choice.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from longfactory.config import RunConfig
from longfactory.errors import UserError

# AdamW with fp32 states, as SplitAdamW computes it too.
EXACT = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")


@dataclasses.dataclass(frozen=True)
class Narrow:
    """AdamW whose states are narrower than fp32. `bytes`: of both moments of a parameter.
    `package`: that makes it, None for torch.

    bitsandbytes keeps those of embeddings in fp32, as transformers asks it to, and does not know
    FSDP2's shards.
    """

    width: str
    bytes: float
    package: str | None


NARROW = {
    "adamw_torch_8bit": Narrow("8 bit", 2, "torchao"),
    "adamw_torch_4bit": Narrow("4 bit", 1, "torchao"),
    "adamw_bnb_8bit": Narrow("8 bit", 2, "bitsandbytes"),
    "adamw_8bit": Narrow("8 bit", 2, "bitsandbytes"),
    "paged_adamw_8bit": Narrow("8 bit", 2, "bitsandbytes"),
}


def narrow_states(cfg: RunConfig, sharding: str) -> Narrow | None:
    """What AdamW keeps on the GPU, where that is less than fp32; None where it is not, or the
    optimizer is not AdamW.

    Raises:
        UserError: the package is not installed, or cannot train what `sharding` makes.
    """
    name = str(cfg.trainer.optim)
    narrow = NARROW.get(name)
    if narrow is None:
        return Narrow("bf16", 4, None) if cfg.method.pure_bf16 and name in EXACT else None
    if narrow.package is not None and importlib.util.find_spec(narrow.package) is None:
        raise UserError(
            f"optim: {name} needs {narrow.package}. Run: pip install {narrow.package}; or use"
            " optim: adamw_torch_fused."
        )
    if narrow.package == "bitsandbytes" and sharding == "fsdp2":
        raise UserError(
            f"optim: {name} (bitsandbytes) cannot train the shards of FSDP2. Use optim:"
            " adamw_torch_8bit (torchao), or sharding: ddp."
        )
    return narrow
