"""What layers of each family compute, against counts of a pass through a model: FLOP of its products
by torch's counter, heads and windows by what reaches the attention engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from families_here import is_made_here
from longfactory import sp
from longfactory.memory import layer_kinds, norms
from longfactory.memory.apply import apply_memory
from longfactory.memory.budget import bare_layer
from longfactory.memory.checkpointed import stored_of_a_token
from longfactory.memory.decoder_layer import DecoderLayer, _group_bytes, _mlp_of_a_token
from longfactory.memory.layer import passes
from longfactory.memory.layer_kinds import LayerKind, kinds_of
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import CHOSEN, ModelShape, TrainingJob, machine
from longfactory.memory.traffic import moved_bytes
from longfactory.model import experts
from longfactory.sp import hf
from longfactory.sp.layout import Segment
from longfactory.sp.recurrent.layers import mixer_of
from longfactory.sp.text_model import decoder_layers
from longfactory_dev.tiny_models import tiny_config, tiny_model

TOKENS = 64
# Each has something that the others have not: windows of all layers and of some, two dims of heads,
# latent attention with dense layers first, shared experts, chunks and experts that all compute,
# biases of experts, maps in one, gated delta nets, no gate, blocks of one mixer.
FAMILIES = (
    "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_next", "lfm2", "nemotron_h",
)  # fmt: skip
MORE = (
    "mistral",
    "gemma4_text",
    "qwen2_moe",
    "glm4_moe",
    "llama4_text",
    "phi3",
    "gpt2",
    "hunyuan_v1_moe",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "qwen3_5_text",
    "olmo_hybrid",
)


def one_row(model: Any) -> dict[str, Any]:
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(hf.unwrap(model), ctx)
    plan = sp.plan(TOKENS, [Segment(0, TOKENS)], ctx)
    row = {"input_ids": torch.arange(TOKENS) + 3, "position_ids": torch.arange(TOKENS)}
    return hf.inputs(row, plan)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_kinds_are_what_a_pass_computes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(family)
    model = tiny_model(family, torch.float32)
    model.set_attn_implementation(hf.ATTENTION)
    inputs = one_row(model)
    asked: list[list[tuple[int, ...]]] = []
    counter = FlopCounterMode(display=False)
    marks: list[int] = []

    def engine(q: Any, k: Any, v: Any, plan: Any, **how: Any) -> Any:
        reach = how["window"] or how["chunk"] or 0
        heads = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
        asked[-1].append((*heads, reach, int(bool(how["chunk"]))))
        return q.new_zeros(TOKENS, q.shape[1], v.shape[2])

    def begins(*_: Any) -> None:
        asked.append([])
        marks.append(counter.get_total_flops())

    def ends(*_: Any) -> None:
        marks[-1] = counter.get_total_flops() - marks[-1]

    monkeypatch.setattr(hf, "engine", engine)
    for layer in decoder_layers(model)[1]:
        layer.register_forward_pre_hook(begins)
        layer.register_forward_hook(ends)
    with counter:
        model(**inputs)
    kinds = kinds_of(model, config)
    assert len(kinds) == len(marks) == 4
    for kind, flop, calls in zip(kinds, marks, asked, strict=True):
        maps = 2 * (kind.mixer_parameters + kind.mlp_parameters)
        assert maps + kind.recurrent_flop == pytest.approx(flop / TOKENS, rel=0.02)
        heads = (kind.heads, kind.kv_heads, kind.head_dim, kind.value_dim)
        assert calls == ([(*heads, kind.reach, int(kind.within_chunk))] if kind.heads else [])
    # all but what stands outside of the layers
    inside = sum(p.numel() for p in decoder_layers(model)[1].parameters())
    assert sum(kind.parameters for kind in kinds) == inside


def plain(**changes: Any) -> LayerKind:
    fields = {"heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "hidden": 64}
    counts = {"mixer_parameters": 1, "dense_parameters": 1, "parameters": 2}
    return LayerKind(**{**fields, **counts, **changes})


@pytest.mark.parametrize("reach", [0, 64, 256, 4096])
@pytest.mark.parametrize("within_chunk", [False, True])
def test_keys_that_a_query_sees(reach: int, within_chunk: bool) -> None:
    """By the mask itself; a window's kernel computes half a tile more at either end."""
    tokens = 1024
    kind = plain(reach=reach, within_chunk=within_chunk)
    q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    mask = k <= q
    if reach:
        mask &= (q // reach == k // reach) if within_chunk else (q - k < reach)
    seen = float(mask.sum()) / tokens - 0.5  # the diagonal is counted by half
    found = kind.keys_seen(tokens)
    if 0 < reach < tokens and not within_chunk:
        assert found == pytest.approx(min(seen + 128, tokens / 2), abs=1)
    else:
        assert found == pytest.approx(seen, abs=0.5)
    assert kind.attention_flop(tokens) == 2 * found * 4 * 32


def stored(config: Any, mode: str) -> float:
    """Bytes that autograd stores of a token in the last layer, but for the layer's weights."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=hf.ATTENTION)
    if hasattr(config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
        experts.install_grouped(model)
    model = model.to(torch.float32 if mode == "autocast" else torch.bfloat16)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if not hasattr(config, "num_experts"):
            targets += ["gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    model.train()
    inputs = one_row(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {
        torch.Size(reversed(p.shape)) for p in model.parameters()
    }
    # one expert's matrix, as the product for CPUs takes it
    shapes |= {p[0].t().shape for p in model.parameters() if p.dim() == 3}
    held: dict[int, Any] = {}
    inside = [False]

    def pack(t: Any) -> Any:
        if inside[0] and t.untyped_storage().data_ptr() not in weights and t.shape not in shapes:
            held[t.untyped_storage().data_ptr()] = t
        return t

    layer = decoder_layers(hf.unwrap(model))[1][-1]
    layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mode != "bf16"):
        hf.unwrap(model).model(**inputs)
    return sum(t.untyped_storage().nbytes() for t in held.values()) / TOKENS


SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 128,
}
EXPERTS = {
    "moe_intermediate_size": 80,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 0,
    "topk_group": 1,
    "n_group": 1,
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *itertools.product(("qwen2", "qwen3", "qwen3_moe"), ("bf16", "autocast", "lora")),
        *itertools.product(("glm4_moe",), ("bf16", "autocast")),
    ],
)
def test_what_autograd_stores(family: str, mode: str) -> None:
    """Of a layer that is not recomputed. Adapters of rank 2 store 4 bytes each besides."""
    config = AutoConfig.for_model(family, **SIZES, **(EXPERTS if "moe" in family else {}))
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.of(config, lora=mode == "lora", layers=kinds_of(model, config))
    job = TrainingJob(
        shape,
        machine("H100", 1, 2**40),
        TOKENS,
        sharded=False,
        master=2 if mode == "bf16" else 4,
    )
    assert job.autocast == (mode == "autocast")
    found = stored(config, mode)
    assert stored_of_a_token(job, shape.kinds[0]) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_what_a_saved_mixture_holds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hand-written layer whose products are saved: what autograd stores of its experts, what
    they are given and make, and what the output projection gives. GLM's router has a copy of its
    input in fp32.
    """
    config = AutoConfig.for_model(family, **SIZES, **EXPERTS)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.set_experts_implementation("grouped_mm")
    experts.install_grouped(model)
    inputs = one_row(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # one expert's matrix, as the product for CPUs takes it
    shapes = {p[0].t().shape for p in model.parameters() if p.dim() == 3}
    held: dict[int, Any] = {}

    def hold(t: Any) -> Any:
        if t.untyped_storage().data_ptr() not in weights and t.shape not in shapes:
            held[t.untyped_storage().data_ptr()] = t
        return t

    def run_mlp(self: DecoderLayer, n: Any, start: int) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            return hold(own(self, hold(n), start))

    apply_memory(model, MemorySettings(keep_mlp=1.0))
    model.model(**inputs)  # the first call compares the layers with their own code
    own = DecoderLayer._run_mlp
    monkeypatch.setattr(DecoderLayer, "_run_mlp", run_mlp)
    model.model(**inputs)
    shape = ModelShape.of(config, layers=kinds_of(model, config))
    job = TrainingJob(shape, machine("H100", 1, 2**40), TOKENS, sharded=False, master=2)
    (kind,) = set(shape.kinds)
    found = sum(t.untyped_storage().nbytes() for t in held.values()) / TOKENS / shape.layers
    projected = job.shape.width * kind.hidden
    assert _mlp_of_a_token(job, kind) == pytest.approx(found + projected, rel=0.02)


def test_a_router_whose_code_is_in_no_file_is_planned_as_one_that_casts() -> None:
    code = """class ARouter(nn.Module):
    def forward(self, hidden_states):
        return hidden_states @ self.weight
"""
    space: dict[str, Any] = {"nn": torch.nn}
    exec(code, space)
    router = space["ARouter"]()
    router.weight = torch.nn.Parameter(torch.ones(4, 4))
    assert layer_kinds._wide_router(torch.nn.Sequential(router))


@pytest.mark.parametrize("family", ["qwen3_next", "laguna", "glm4_moe"])
def test_the_gradient_of_attention_s_gate(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the queries (Qwen3-Next), by a linear of its own (Laguna), none (GLM): the plan has the
    numbers of it that the hand-written layer holds while attention's backward runs.
    """
    config = tiny_config(family)
    model: Any = tiny_model(family, torch.float32).train()
    model.set_attn_implementation(hf.ATTENTION)
    inputs = one_row(model)
    apply_memory(model, MemorySettings())
    held: list[int] = []

    def attention_backward(*given: Any) -> Any:
        found = real(*given)
        held.append(0 if found[2] is None else found[2].numel() // TOKENS)
        return found

    real = passes.attention_backward
    monkeypatch.setattr(passes, "attention_backward", attention_backward)
    model(**inputs).logits.sum().backward()
    kinds = [kind for kind in kinds_of(model, config) if kind.written]
    assert held[-len(kinds) :] == [kind.gates for kind in reversed(kinds)]
    assert any(held) == (family != "glm4_moe")
    shape = ModelShape.of(config, layers=kinds)
    job = TrainingJob(shape, machine("H100", 1, 2**40), TOKENS, sharded=False, master=2)
    bare = tuple(dataclasses.replace(kind, gates=0) for kind in shape.kinds)
    without = dataclasses.replace(job, shape=dataclasses.replace(shape, kinds=bare))
    settings = MemorySettings(attention_groups=2)
    found, less = (_group_bytes(j, settings).layer.attention for j in (job, without))
    assert found - less == 2 * TOKENS * max(held)


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_what_autograd_stores_of_a_recurrent_layer(family: str) -> None:
    """At other sizes than those that its terms were fitted to."""
    sizes = {"linear_num_key_heads": 6, "linear_num_value_heads": 12}
    sizes |= {"linear_key_head_dim": 24, "linear_value_head_dim": 40}
    if family == "nemotron_h":
        sizes = {"mamba_num_heads": 12, "mamba_head_dim": 20, "ssm_state_size": 24}
    config = tiny_config(family, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=hf.ATTENTION)
    model = model.to(torch.bfloat16).train()
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    norms.install(model)
    tokens = 128
    plan = sp.plan(tokens, [Segment(0, tokens)], ctx)
    row = {"input_ids": torch.arange(tokens) + 3, "position_ids": torch.arange(tokens)}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}
    inside = [False]

    def pack(t: Any) -> Any:
        if inside[0] and t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t
        return t

    number, net = next(
        (i, m)
        for i, layer in enumerate(decoder_layers(model)[1])
        for m in layer.modules()
        if mixer_of(layer) and "forward" in vars(m) and not norms.is_fused(m)
    )
    net.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    net.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.model(**hf.inputs(row, plan))
    found = sum(t.untyped_storage().nbytes() for t in held.values()) / tokens
    assert kinds_of(model, config)[number].recurrent_bytes == pytest.approx(found, rel=0.08)


def test_what_norms_in_one_kernel_move() -> None:
    """In models with recurrent layers a norm reads its input and writes its output; beside an fp32
    embedding both are fp32, and what each of six linear maps is given is cast.
    """
    config = tiny_config("qwen3_next")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = kinds_of(model, config)
    recurrent = next(kind for kind in layers if kind.recurrent_flop)
    job = TrainingJob(
        ModelShape.of(config, layers=layers), machine("H100", 1, 2**40), 64, sharded=False
    )
    stored = MemorySettings(checkpoint="none")
    found = {m: moved_bytes(dataclasses.replace(job, master=m), stored, recurrent) for m in (2, 4)}
    assert recurrent.norms == 2
    more = [wide - narrow for wide, narrow in zip(found[4], found[2], strict=True)]
    assert more == [recurrent.hidden * (8 + 36 + 8), recurrent.hidden * (2 * (8 + 36) + 8)]
    other = dataclasses.replace(recurrent, recurrent_flop=0.0)
    plain = dataclasses.replace(job, master=2, shape=ModelShape.of(config, layers=(other,)))
    norms_in_parts = moved_bytes(plain, stored, other)[0] - found[2][0]
    assert norms_in_parts == recurrent.hidden * 2 * (36 - 4)


def test_indexer_layers_are_counted() -> None:
    """What an indexer scores is counted where it leaves keys out, and those keys are not needed."""
    config = tiny_config("glm_moe_dsa")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    full, shared, *_ = kinds_of(model, config)
    per_key = 2.0 * config.index_n_heads * (config.index_head_dim + 1)
    assert (full.chosen, full.scored) == (config.index_topk, per_key)
    assert (shared.chosen, shared.scored) == (config.index_topk, 0.0)
    assert full.scoring_flop(8) == 0 and full.needed_flop(8) == full.attention_flop(8)
    assert full.scoring_flop(64) == 64 * per_key
    # queries 1 to 8 see all, 8 on average 4; the others 8 of them
    assert full.needed_flop(64) == pytest.approx(full.attention_flop(64) * 7.5 / 32)
    where = machine("H100", 1, 2**37)
    shape = ModelShape.of(config, layers=kinds_of(model, config))
    short, long = (TrainingJob(shape, where, n, sharded=False) for n in (8, 1 << 20))
    assert sum(k.chosen for k in shape.kinds)
    assert where.attention_share(full, 1 << 20) == CHOSEN < where.attention_share(full, 8)
    blind = tuple(dataclasses.replace(k, chosen=0, scored=0.0) for k in shape.kinds)
    plain = dataclasses.replace(shape, kinds=blind)
    for job, more in ((short, False), (long, True)):
        without = dataclasses.replace(job, shape=plain)
        settings = MemorySettings()
        assert (seconds(job, settings) > seconds(without, settings)) == more
        assert (bare_layer(job).attention > bare_layer(without).attention) == more


@pytest.mark.skipif(not is_made_here("dots3_note_text"), reason="not in this transformers")
def test_saved_attention_outputs_are_those_of_the_widest_layer() -> None:
    """Layers of dots3.note differ in their heads: their configuration names no number for all."""
    model = tiny_model("dots3_note_text", torch.bfloat16)
    configs = hf.layer_configs(model.config)
    assert len({config.num_attention_heads for config in configs}) > 1
    store = apply_memory(model, MemorySettings(), "cpu")
    widths = [config.num_attention_heads * (config.v_head_dim + 2) for config in configs]
    assert store.attention_share == max(widths) / model.config.hidden_size
