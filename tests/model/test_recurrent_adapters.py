"""LoRA on models with recurrent layers, and on others whose linear layers are not all called."""

import types

import pytest

from longfactory.model.adapter_targets import lora_targets
from longfactory.sp.text_model import idle
from longfactory_dev.tiny_models import tiny_model

EXPECTED = {
    "qwen3_5_text": {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"},
    "kimi_linear": {"f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "o_proj"},
    "granitemoehybrid": {"in_proj", "out_proj", "q_proj"},
    "nemotron_h": {"in_proj", "q_proj"},  # PEFT refuses out_proj
    "lfm2": {"in_proj", "q_proj"},
    "jamba": {"in_proj", "x_proj", "out_proj"},
    "gemma3n_text": {"prediction_coefs", "q_proj"},
}
DEAD = {"nemotron_h": "out_proj", "jamba": "dt_proj", "gemma3n_text": "correction_coefs"}
"""PEFT refuses the first; of the others transformers reads the weights without calling the layer,
and an adapter would have no gradient.
"""


@pytest.mark.parametrize("family", EXPECTED)
def test_layers_that_are_called_get_adapters(family: str) -> None:
    model = tiny_model(family)
    method = types.SimpleNamespace(lora_target="all", lora_experts=False)
    targets = lora_targets(model, method, idle(model)).modules
    ends = {target.rpartition(".")[2] for target in targets}
    assert EXPECTED[family] <= ends, ends
    assert DEAD.get(family) not in ends
