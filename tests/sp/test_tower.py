"""Attention inside a tower's images: those of one size in one call, with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vision_models as tiny
from longfactory import sp
from longfactory.sp import hf, tower, vision


def each_alone(parts: list[Tensor], lengths: list[int], scaling: float) -> Tensor:
    out = []
    for cut in zip(*(x.split(lengths) for x in parts), strict=True):
        q, k, v = (x.transpose(0, 1) for x in cut)
        weights = (q @ k.transpose(1, 2) * scaling).softmax(-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[6], [5, 5, 5], [4, 9, 4, 4, 9, 1], [3, 1, 2]])
def test_vision_attention_in_groups(lengths: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (sum(lengths), 2, 8)
    parts = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3)]
    parts = [x.requires_grad_() for x in parts]
    weights = torch.randn(shape, generator=draw, dtype=torch.float64)
    expected = each_alone(parts, lengths, 0.3)
    wanted = torch.autograd.grad((expected * weights).sum(), parts)
    found = tower.in_groups(parts, lengths, 0.3)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), parts), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_vision_attention_of_a_tower_drops_weights_and_refuses_masks() -> None:
    module, x = torch.nn.Identity(), torch.ones(1, 2, 6, 8)
    ends = torch.tensor([0, 4, 6])
    kept, _ = tower.attention(module, x, x, x, cu_seq_lens_q=ends)
    dropped, _ = tower.attention(module, x, x, x, dropout=1.0, cu_seq_lens_q=ends)
    assert (kept == 1).all() and (dropped == 0).all()
    with pytest.raises(ValueError, match="got a mask"):
        tower.attention(module, x, x, x, torch.ones(1, 1, 6, 6))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_vision_tower_calls_attention_once_for_images_of_one_size(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kernel = tower.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(query))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(tower, "scaled_dot_product_attention", counted)
    model = tiny.model(family, torch.float64, attention="sdpa")
    hf.prepare(model, sp.SequenceParallel.create(1))
    vision.install(model)
    document = tiny.document(family, [3, (4, 4), 2, (4, 4), 1])
    device = torch.device("cpu")
    found = vision.features_of(model, document.images, device)
    layers = len(calls)
    with vision.own_tower(model):
        expected = vision.features_of(model, document.images, device)
    assert len(calls) == layers and sum(calls) >= 2 * layers
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    vision.release(model)
    assert model.config.vision_config._attn_implementation == "sdpa"
    hf.release(model)


@pytest.mark.parametrize(("family", "layer"), [("llava_onevision", -1), ("llava_onevision", -2)])
def test_what_no_feature_passes_through(family: str, layer: int) -> None:
    """Under DDP such parameters would leave others unsummed, so they are not trained."""
    model = tiny.model(family)
    model.config.vision_feature_layer = layer
    (image,) = tiny.document(family, ["tiles"]).images
    model.get_image_features(
        image.pixels, torch.tensor([image.size]), return_dict=True
    ).pooler_output[0].sum().backward()
    towers = vision.modules_of(model)["tower"]
    without = {id(p) for t in towers for p in t.parameters() if p.grad is None}
    assert {id(p) for p in vision.unused_parameters(model)} == without != set()
