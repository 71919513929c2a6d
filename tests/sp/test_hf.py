"""The attention registry: what is refused, and that the plan finds its way through wrappers and
recomputation.
"""

import copy
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import vision_models
from longfactory import sp
from longfactory.sp import hf
from longfactory.sp.guard import guard
from longfactory.sp.text_model import model_class
from longfactory.testing import run_ranks
from longfactory_dev import families
from longfactory_dev.tiny_models import tiny_config, tiny_model

ONE = sp.SequenceParallel.create(1)


def row(lengths: list[int], seed: int = 0) -> tuple[dict[str, Tensor], list[sp.Segment]]:
    ids = torch.randint(3, 200, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [sp.Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
    }, segments


def call(**changed: object) -> object:
    """The attention function on four tokens of one document, with one argument changed."""
    module = nn.Module()
    module.is_causal = True
    q = torch.randn(1, 2, 4, 8)
    arguments: dict = dict(
        module=module,
        query=q,
        key=q,
        value=q,
        attention_mask=None,
        scaling=None,
        dropout=0.0,
        sp_plan=sp.plan(4, None, ONE),
    )
    return hf.attention(**{**arguments, **changed})


def test_shapes_and_arguments_without_effect() -> None:
    out, weights = call(
        position_ids=torch.arange(4)[None],
        use_cache=False,
        output_attentions=False,
        cu_seq_lens_q=None,
    )
    assert out.shape == (1, 4, 2, 8) and weights is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "mask would be lost"),
        ({"is_causal": False}, "later tokens"),
        ({"dropout": 0.1}, "attention_dropout: 0"),
        ({"use_cache": True}, "cache"),
        ({"past_key_values": object()}, "cache"),
        ({"key": torch.randn(1, 2, 5, 8)}, "5 keys, the plan has 4"),
        ({"query": torch.randn(2, 2, 4, 8)}, "a batch of 2 rows"),
        ({"sp_plan": None}, "hf.inputs"),
    ],
)
def test_refuses_what_it_does_not_compute(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_dropout_does_not_matter_outside_training() -> None:
    module = nn.Module().eval()
    call(module=module, dropout=0.1)


def test_masks_are_inspected() -> None:
    config = tiny_config("llama")
    config._attn_implementation_internal = hf.ATTENTION
    x = torch.zeros(1, 8, 64)
    arguments = dict(config=config, inputs_embeds=x, past_key_values=None)
    jumping = torch.tensor([[0, 1, 2, 3, 12, 13, 14, 15]])
    assert create_causal_mask(**arguments, attention_mask=None, position_ids=jumping) is None
    assert create_causal_mask(**arguments, attention_mask=torch.ones(1, 8)) is None
    padding = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="padding mask would be lost"):
        create_causal_mask(**arguments, attention_mask=padding)
    with pytest.raises(ValueError, match="blocks of tokens"):
        create_causal_mask(
            **arguments,
            attention_mask=None,
            block_sequence_ids=torch.zeros(1, 8, dtype=torch.int64),
        )
    with pytest.raises(ValueError, match="blocks of tokens"):
        create_causal_mask(
            **arguments, attention_mask=None, or_mask_function=lambda b, h, q, k: q >= k
        )
    with pytest.raises(ValueError, match="of its own"):
        create_causal_mask(
            **arguments, attention_mask=None, and_mask_function=lambda b, h, q, k: q >= k
        )
    with pytest.raises(ValueError, match="bidirectional"):
        create_bidirectional_mask(**arguments, attention_mask=None)


@pytest.mark.parametrize(
    ("family", "dims"),
    [
        *(("llama", 1), ("qwen3_5_text", 1), ("qwen3_vl", 1)),
        *(("qwen2_5_vl", 4), ("qwen3_vl", 4), ("glm4v_moe", 4)),
    ],
)
def test_documents_are_not_searched_in_positions_that_carry_a_plan(
    family: str, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search waits for the device. Models with positions of images pass on those of text, a
    view; what a model of other attention is given is searched, of the same row too.
    """
    images = family in vision_models.MODELS
    model = vision_models.model(family, attention="sdpa") if images else tiny_model(family)
    hf.prepare(model, ONE)
    r, segments = row([9, 15])
    whole = r["position_ids"]
    if dims == 4:
        r["position_ids"] = whole.expand(4, -1)
    plan = sp.plan(24, segments, ONE)
    searched: list[Tensor] = []
    diff = torch.diff

    def search(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        searched.append(x)
        return diff(x, *args, **kwargs)

    monkeypatch.setattr(torch, "diff", search)
    logits = model(**hf.inputs(r, plan)).logits
    assert not searched
    found = masking_utils.find_packed_sequence_indices(whole[None])
    assert len(searched) == 1 and found.tolist() == [[0] * 9 + [1] * 15]
    with monkeypatch.context() as patch:
        find = masking_utils.find_packed_sequence_indices
        patch.setattr(masking_utils, "find_packed_sequence_indices", find.__wrapped__)
        assert torch.equal(model(**hf.inputs(r, plan)).logits, logits)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"": "longfactory"}),
        ("phi4_multimodal", {"": "longfactory"}),
        ("gemma3", {"": "longfactory", "text_config": "longfactory"}),
    ],
)
def test_towers_keep_their_attention(family: str, expected: dict) -> None:
    config = tiny_config(family)
    assert hf.of_text(config) == expected
    config._attn_implementation = hf.of_text(config)
    assert config.get_text_config()._attn_implementation == hf.ATTENTION
    assert getattr(getattr(config, "vision_config", None), "_attn_implementation", None) is None


def test_a_tower_that_knows_two_kinds_of_attention_is_made_and_prepared() -> None:
    """Of DeepSeek-VL: SAM's layers are chosen by the name of the attention."""
    config = tiny_config("deepseek_vl_hybrid")
    with torch.device("meta"):
        model = model_class(config).from_config(attn_implementation=hf.of_text(config))
    hf.prepare(model, ONE)
    assert model.config.get_text_config()._attn_implementation == hf.ATTENTION
    assert model.config.high_res_vision_config._attn_implementation == "sdpa"


def test_prepare_refuses() -> None:
    with pytest.raises(
        ValueError,
        match=r"llama: .* attention_dropout is 0.1. Load the model with attention_dropout=0",
    ):
        hf.prepare(tiny_model("llama", attention_dropout=0.1), ONE)
    with pytest.raises(ValueError, match=r"Models of type bloom .* registry"):
        hf.prepare(tiny_model("bloom"), ONE)
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "full_attention", "full_attention", "telepathy"]
    with pytest.raises(ValueError, match="layers of type telepathy are unknown"):
        hf.prepare(model, ONE)
    bidirectional = tiny_model("llama")
    bidirectional.config.is_causal = False
    with pytest.raises(ValueError, match="later tokens"):
        hf.prepare(bidirectional, ONE)


@pytest.mark.parametrize("family", ["llama", "stablelm", "llama4_text", "qwen3_next", "nemotron_h"])
def test_a_layer_computed_again_has_the_plan_of_its_own_forward(family: str) -> None:
    """Two forward passes with different documents, then their backward passes, with every layer
    checkpointed.
    """
    model = tiny_model(family)
    hf.prepare(model, ONE)
    rows = [row([9, 15], 1), row([14, 10], 2)]

    def gradients(checkpointed: bool, order: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            model.gradient_checkpointing_disable()
        losses = [model(**hf.inputs(r, sp.plan(24, s, ONE))).logits.pow(2).sum() for r, s in rows]
        for i in order:
            losses[i].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False, [0, 1]), gradients(True, [0, 1])
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-6, atol=1e-6 * expected[name].abs().max().item()
        )


@pytest.mark.parametrize("family", ["stablelm", "phi3 with longrope"])
def test_inputs_that_were_copied_on_the_way_still_carry_the_plan(family: str) -> None:
    family, _, fields = families.VARIANTS.get(family, (family, None, {}))
    model = tiny_model(family, **fields)
    hf.prepare(model, ONE)
    r, segments = row([9, 40])
    given = hf.inputs(r, sp.plan(49, segments, ONE))
    copied = {**given, "position_ids": given["position_ids"].clone()}
    assert not hasattr(copied["position_ids"], "sp_plan")
    with torch.no_grad():
        assert torch.equal(model(**copied).logits, model(**given).logits)


def test_guard_refuses_a_layer_outside_the_registry() -> None:
    model = tiny_model("llama")
    hf.prepare(model, ONE)
    attention = model.model.layers[2].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation_internal = "eager"
    with pytest.raises(
        ValueError, match=r"type llama .* 1 of its attention layers .*model\.layers\.2\.self_attn"
    ):
        guard(model, ONE)


def reads_the_index() -> str:
    """What the guard says of a model that takes a token's place in the tensor for its position."""
    ctx = sp.SequenceParallel.create(2)
    model = tiny_model("llama")
    hf.prepare(model, ctx)
    guard(model, ctx)
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None])
    try:
        guard(model, ctx)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.processes
def test_guard_refuses_what_reads_the_index_instead_of_the_position() -> None:
    for message in run_ranks(2, reads_the_index):
        assert (
            "of layer 0 (LlamaDecoderLayer), as it is trained, is" in message
            and "type llama" in message
        )


def test_guard_refuses_a_window_that_its_mask_does_not_have() -> None:
    model = tiny_model("mistral")
    hf.prepare(model, ONE)
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
        layer.self_attn.config.sliding_window = 500
    with pytest.raises(
        ValueError, match="sliding window of 500 tokens that its own mask does not have"
    ):
        guard(model, ONE)


def test_guard_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    hf.prepare(model, ONE)
    guard(model, ONE)
    assert model.training and model.config._attn_implementation == hf.ATTENTION
    assert all(p.grad is None for p in model.parameters())


def test_guard_of_a_model_without_a_language_head() -> None:
    model = tiny_model("llama")
    model.set_output_embeddings(None)
    model.lm_head = nn.Linear(64, 1, bias=False).double()
    model.get_output_embeddings = types.MethodType(lambda self: None, model)
    hf.prepare(model, ONE)
    guard(model, ONE)


# Wrappers, on two ranks


def wrapped(kind: str) -> tuple[float, float]:
    """(error of the loss, error of the gradients) of a wrapped, checkpointed model, over the
    unsharded one's largest value.
    """
    ctx = sp.SequenceParallel.create(2)
    model = tiny_model("gemma2")
    plain = copy.deepcopy(model)
    if kind == "peft":
        model, plain = (lora(m) for m in (model, plain))
    hf.prepare(model, ctx)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    outer: nn.Module = model
    if kind == "ddp":
        outer = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    outer.train()
    guard(outer, ctx)
    r, segments = row([21, 38, 5])
    plan = sp.plan(64, segments, ctx)
    weights = torch.linspace(0, 1, 200, dtype=torch.float64)
    # Half of it on each rank: DDP and FSDP2 average over the ranks.
    loss = (outer(**hf.inputs(r, plan)).logits[..., :200] * weights).sum() * (
        2 if kind in ("ddp", "fsdp2") else 1
    )
    loss.backward()
    documents = [r["input_ids"][s.start : s.stop][None] for s in segments]
    reference = sum(
        (plain(input_ids=d, use_cache=False).logits[..., :200] * weights).sum() for d in documents
    )
    reference.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in expected.values())
    worst = 0.0
    for n, p in model.named_parameters():
        if p.grad is None:
            assert n not in expected
            continue
        g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        if kind == "peft":
            dist.all_reduce(g)
        worst = max(worst, ((g - expected[n]).abs().max() / scale).item())
    total = loss.detach().clone()
    dist.all_reduce(total)
    total /= 2 if kind in ("ddp", "fsdp2") else 1
    return abs((total - reference).item() / reference.item()), worst


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    out = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    return out.double()


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "peft"])
def test_wrapped_and_checkpointed(kind: str) -> None:
    for loss, gradients in run_ranks(2, wrapped, kind):
        assert loss < 1e-6 and gradients < 1e-5


def test_features_of_the_sweep_are_those_of_the_model() -> None:
    assert families._features(tiny_model("gpt_oss")) == "sliding window, sinks, experts"
