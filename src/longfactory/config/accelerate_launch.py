"""`accelerate launch --config_file fsdp.yaml src/train.py run.yaml`: accelerate tells the processes
that it starts what its file says by environment variables, and they are read as keys of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
SHARDINGS = {
    **dict.fromkeys(("FULL_SHARD", "1", "SHARD_GRAD_OP", "2"), "fsdp2"),
    **dict.fromkeys(("HYBRID_SHARD", "4", "HYBRID_SHARD_ZERO2", "5"), "fsdp2"),
    **dict.fromkeys(("NO_SHARD", "3"), "ddp"),
}
"""accelerate's sharding strategies, by name and number, and `sharding` here."""


def keys_of(environment: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that accelerate's variables stand for, of those that the run does not give itself.

    Args:
        environment: of this process.
        values: the run's keys.
    """
    found: dict[str, Any] = {}
    if _on(environment, FSDP):
        strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        found["sharding"] = SHARDINGS.get(strategy, "fsdp2")
        if _on(environment, "FSDP_OFFLOAD_PARAMS"):
            # What it is for, memory of the GPU, the optimizer's states take most of.
            found["optimizer_placement"] = "host"
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if _on(environment, DEEPSPEED) and file.lower() != "none":
        found["deepspeed"] = file
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if found and precision in ("bf16", "fp16"):
        formats = [values.get(name) for name in ("bf16", "fp16", "pure_bf16")]
        if all(given is None for given in formats):
            found[precision] = True
    return {name: value for name, value in found.items() if values.get(name) is None}


def forget(environment: MutableMapping[str, str]) -> None:
    """Takes accelerate's variables out: the run's keys say it all, and accelerate would set up
    sharding of its own beside it.
    """
    for name in [n for n in environment if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del environment[name]


def _on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes")
