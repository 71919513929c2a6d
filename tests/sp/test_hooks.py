"""What is put on a model is put there once, and comes off."""

from __future__ import annotations

import pytest
import torch

from longfactory import sp
from longfactory.sp import hf
from longfactory.testing import tiny_model

ONE = sp.SequenceParallel.create(1)
MODELS = {
    "qwen2": {},
    "qwen3_next": {},
    "phi3": {
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    },
    "llama4_text": {"floor_scale": 4, "no_rope_layers": [0, 0], "attention_chunk_size": 8},
}


def hooks(model) -> list[tuple[int, int, bool]]:
    return [
        (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
        for m in model.modules()
    ]


@pytest.mark.parametrize("family", MODELS)
def test_prepare_twice_is_prepare_once_and_release_takes_everything_off(family):
    model = tiny_model(family, **MODELS[family])
    model.set_attn_implementation("sdpa")
    row = torch.randint(0, 64, (1, 24))
    with torch.no_grad():
        before = model(input_ids=row, use_cache=False).logits
    plain, attributes = hooks(model), [set(vars(m)) for m in model.modules()]
    hf.prepare(model, ONE)
    once = hooks(model)
    assert once != plain
    hf.prepare(model, ONE)
    assert hooks(model) == once
    hf.release(model)
    assert hooks(model) == plain
    assert [set(vars(m)) for m in model.modules()] == attributes
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(model(input_ids=row, use_cache=False).logits, before)
