"""Every kind of adapter, and freezing: sharded runs change the weights as one process does, and a
resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_sharding import on_ranks_of_their_own
from longfactory import sp
from optimizer_worker import made, model, nudge_whole, on_a_rank, run_config, train

pytestmark = pytest.mark.processes

LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "rslora": {**LORA, "use_rslora": True},
    "loraplus": {**LORA, "loraplus_lr_ratio": 4.0},
    "pissa": {**LORA, "pissa_init": True},
    "pissa, randomised": {**LORA, "pissa_init": True, "pissa_iter": 4},
    "olora": {**LORA, "init_lora_weights": "olora"},
    # A's and B's gradients cancel to nothing in places, where a step of Adam would be a sign
    "orthogonal": {**LORA, "init_lora_weights": "orthogonal", "adam_epsilon": 1e-5},
    "gaussian": {**LORA, "init_lora_weights": "gaussian"},
    "more modules": {**LORA, "lora_target": "q_proj", "additional_target": "norm,lm_head"},
    "oft": {"finetuning_type": "oft", "oft_block_size": 2, "oft_target": "all"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "llama pro": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "use_llama_pro": True,
    },
    "llama pro, adapters": {
        **LORA,
        "freeze_trainable_layers": 1,
        "use_llama_pro": True,
    },
}
"""Three steps at a learning rate of 0.02, that of `run_config`."""


def begun(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters that a run trains, before its first step."""
    trained = made(run_config(keys), sp.SequenceParallel.create(1), model())
    return {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}


def of_names(state: dict[str, torch.Tensor], names: Any) -> dict[str, torch.Tensor]:
    """Whole states name the adapters that act, as the model does."""
    assert set(names) <= set(state), sorted(set(names) - set(state))[:3]
    return {name: state[name] for name in names}


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[n] - b[n]).flatten().double() for n in a]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_change_the_weights_as_one_process(sharding: str) -> None:
    runs = [{"keys": keys} for keys in KINDS.values()]
    shared = on_ranks_of_their_own(2, 350, on_a_rank, sharding, runs)[0]
    for (name, keys), state in zip(KINDS.items(), shared, strict=True):
        before = begun(keys)
        alone = of_names(train(keys, 1, "none"), before)
        change = far(alone, before)
        distance = far(of_names(state, before), alone) / change
        assert max(float((alone[n] - before[n]).abs().max()) for n in before) > 1e-2, name
        response = 0.0
        if distance > 1e-4:  # Adam's first steps are signs: where a gradient is near nothing, noise
            for seed in range(4):
                nudge = functools.partial(nudge_whole, seed=seed)
                nudged = of_names(train(keys, 1, "none", watch=nudge), before)
                response = max(response, far(nudged, alone) / change)
        print(f"{sharding} {name}: {distance:.1e}; a nudge of 1e-7: {response:.1e}")
        assert distance <= max(1e-4, 2 * response), name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_a_resumed_run_is_the_same(name: str, tmp_path: Path) -> None:
    whole = train(KINDS[name], 1, "none", folder=str(tmp_path))
    again = train(KINDS[name], 1, "none", folder=str(tmp_path), resume=True)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
