"""Parameters of a model's shape, and kinds of GPU by their names."""

from __future__ import annotations

import pytest

from longfactory.memory.shapes import ModelShape, kind_of
from planned_jobs import SHAPE


def test_parameters_of_the_shape():
    assert SHAPE.parameters == pytest.approx(7.6153e9, rel=1e-4)
    assert SHAPE.layer_parameters == 3584 * 128 * 2 * 32 + 3 * 3584 * 18944


def test_layers_of_different_heads_are_planned_by_the_widest() -> None:
    """Gemma 4: its configuration names no head dim for all layers, and reading one raises."""
    import torch

    from longfactory.memory.apply import _attention_share
    from longfactory.sp.hf import head_dims, values_of_layers
    from longfactory_dev.tiny_models import tiny_config

    config = tiny_config("gemma4").get_text_config()
    assert sorted(values_of_layers(config, "head_dim")) == [16, 512]
    assert ModelShape.of(config).head_dim == 512
    assert head_dims(config) == {(16, 16), (512, 512)}
    assert _attention_share(config, torch.bfloat16) == 4 * (512 + 2) / 64
    assert len(values_of_layers(tiny_config("llama"), "head_dim")) == 1


def test_layers_of_different_widths_are_planned_by_the_widest() -> None:
    """Gemma 3n: its configuration lists a width for each layer."""
    from longfactory_dev.tiny_models import tiny_config

    shape = ModelShape.of(tiny_config("gemma3n_text", intermediate_size=[96, 96, 192, 96]))
    assert shape.ffn == 192
    assert shape.layer_parameters == shape.kinds[0].mixer_parameters + 3 * 192 * 64


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h200", "H200"),
        ("NVIDIA L400", None),
        ("GeForce GT 710", None),
    ],
)
def test_kinds_of_gpu_by_their_names(name: str, kind: str | None):
    assert kind_of(name) == kind
