"""Makes accelerate honour FSDP2 and DeepSpeed on a CPU over gloo. Without this a Trainer on CPU
silently trains copies (DDP).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from longfactory.testing import RankPool


def on_ranks_of_their_own(
    size: int, timeout: float, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """`RankPool.run` on processes that end with it: what makes sharding work on a CPU changes a
    process for good.
    """
    pool = RankPool(size, keep_groups=True)
    try:
        return pool.run(function, *args, timeout=timeout)
    finally:
        pool.stop()


def start(sharding: str) -> None:
    """What `sharding` needs on a CPU, in a rank: "fsdp2", "zero" and a stage, or another name for
    copies (DDP).
    """
    if sharding.startswith("zero"):
        install_deepspeed()
    if sharding == "fsdp2":
        install_fsdp()


def training_arguments(sharding: str, output_dir: str, **given: Any) -> Any:
    """transformers' TrainingArguments of a run on CPUs with parameters sharded so; nothing is
    saved or reported unless `given` says so. DeepSpeed's configuration is `given`.
    """
    import transformers

    from longfactory.shard import settings

    keys: dict[str, Any] = {
        "accelerator_config": settings.accelerator_arguments(),
        "ddp_find_unused_parameters": False,
        "label_names": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
        "remove_unused_columns": False,
        "use_cpu": "deepspeed" not in given,
    }
    if sharding == "fsdp2":
        keys |= settings.fsdp2_arguments(efficient_loading=False)
    # DeepSpeed on a CPU is not `use_cpu`, without which transformers looks for a GPU that has bf16
    has_bf16 = "transformers.training_args.is_torch_bf16_gpu_available"
    with mock.patch(has_bf16, return_value=True):
        args = transformers.TrainingArguments(output_dir=output_dir, **keys | given)
    args.device  # noqa: B018
    return args


def install_fsdp() -> None:
    import accelerate.state as state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        first = not self._shared_state.get("_fsdp_on_cpu", False)
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and first and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            self._fsdp_on_cpu = True
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = init


def init_deepspeed() -> None:
    """DeepSpeed's process group on CPUs. Its own collectives over shared memory are left out: they
    are for inference, and would be compiled, for minutes.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    its_groups: Any = sys.modules["deepspeed.comm.torch"]  # deepspeed.comm.torch is torch itself
    assert its_groups.build_shm_op
    its_groups.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")


def install_deepspeed() -> None:
    import accelerate.state as state
    from accelerate.utils import DistributedType

    init_deepspeed()
    original = state.PartialState._prepare_backend

    def prepare(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        backend, kind = original(self, cpu, *args, **kwargs)
        if backend is None and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    state.PartialState._prepare_backend = prepare


def reset() -> None:
    """Forgets accelerate's singletons, so that one process can hold several trainers one after the
    other.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the next model is made already partitioned
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
