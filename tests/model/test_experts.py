"""Adapters on routed experts: what is computed is what PEFT defines, and what is saved is PEFT's."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from families_here import is_made_here
from longfactory.config.arguments import FinetuningArguments, ModelArguments
from longfactory.errors import UserError
from longfactory.memory.expert_forms import gates_clamped, gates_plainly, of_interface
from longfactory.model import experts
from longfactory.model.adapters import apply_finetuning
from longfactory.model.trained_parameters import describe_trained
from longfactory_dev.tiny_models import tiny_model

IDS = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))
ATTENTION = {f"{name}_proj" for name in "qkvo"}


def lora(model: Any, *, b: float = 0.1, **keys: Any) -> Any:
    """LoRA as the keys say, with B that is not zero."""
    method = FinetuningArguments(finetuning_type="lora", lora_rank=3, **keys)
    model = apply_finetuning(model, method, ModelArguments())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_B" in name:
                p.copy_(b * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter that has one."""
    model.train()
    out = model(input_ids=IDS).logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **gradients}


def as_peft_computes(model: nn.Module) -> nn.Module:
    """The same model with PEFT's own forward in its wrappers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if experts.is_wrapper(module):
            vars(module).pop("forward", None)
    return model


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-12)
        assert float((found[name] - tensor).abs().max()) <= 1e-6 * scale, name


BY_INTERFACE = ("qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3")
OTHERS = ("mixtral", "qwen2_moe", "granitemoe", "ernie4_5_moe", "hunyuan_v1_moe")
BY_THEMSELVES = ("llama4_text", "jetmoe", "longcat_flash")
"""Families whose experts have a forward of their own."""


@pytest.mark.parametrize(
    "family",
    [
        *BY_INTERFACE,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (*OTHERS, *BY_THEMSELVES)),
    ],
)
def test_adapters_on_experts(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, torch.float64)
    model = lora(copy.deepcopy(base), use_rslora=family != "gpt_oss")
    inner = model.get_base_model()
    wrappers = [m for m in inner.modules() if experts.is_wrapper(m)]
    assert wrappers and any(m.num_experts > 1 for m in wrappers)
    assert not any("lora_" not in n for n, p in model.named_parameters() if p.requires_grad)

    found = outputs(model)
    assert float((found["logits"] - logits(base)).abs().max()) > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == found.keys() - {"logits"}
    assert all(float(found[n].abs().max()) > 0 for n in trained)
    assert_equal(found, outputs(as_peft_computes(model)))

    model.save_pretrained(tmp_path)
    from peft import PeftModel

    plain = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    expected = {"logits": logits(model)}
    assert_equal({"logits": logits(plain)}, expected)
    merged = model.merge_and_unload(safe_merge=True)  # as `longfactory export` does
    assert type(merged) is type(base)
    assert_equal({"logits": logits(merged)}, expected)


def test_names_in_the_adapter_are_those_that_vllm_reads(tmp_path: Path) -> None:
    """Of a layer's experts: `experts.base_layer` is gate_up_proj and `experts` is down_proj; A is
    [E r, in] and B [out, r E] with the expert's number running fastest. So its loader has it
    (vllm/lora/lora_model.py, model_manager.py): of a module inside experts it knows the whole name
    from `experts` on, of others the last part.
    """
    base = tiny_model("qwen3_moe", torch.float64)
    model = lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    at = "base_model.model.model.layers.0.mlp.experts"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ends = set()
    for name in tensors:
        found = re.fullmatch(
            r"base_model\.model\.(model\.layers\.\d+\..+)\.lora_[AB]\.weight", name
        )
        assert found is not None, name
        before, inside, _ = found[1].partition(".experts")
        ends.add(found[1][len(before) + 1 :] if inside else before.rpartition(".")[2])
    assert ends == {"experts", "experts.base_layer", "q_proj", "k_proj", "v_proj", "o_proj"}
    held = {name: tensor for name, tensor in tensors.items() if name.startswith(at)}
    assert {n.removeprefix(at): tuple(t.shape) for n, t in held.items()} == {
        ".base_layer.lora_A.weight": (4 * 3, 64),
        ".base_layer.lora_B.weight": (64, 3 * 4),
        ".lora_A.weight": (4 * 3, 32),
        ".lora_B.weight": (64, 3 * 4),
    }
    merged = model.merge_and_unload().get_submodule("model.layers.0.mlp.experts")
    own = base.get_submodule("model.layers.0.mlp.experts")
    for parameter, name in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = (held[f"{at}{name}.lora_{x}.weight"] for x in "AB")
        for e in range(4):
            change = b.view(64, 3, 4)[:, :, e] @ a.view(4, 3, -1)[e] * 2  # alpha / r = 2
            expected = getattr(own, parameter)[e] + change
            torch.testing.assert_close(getattr(merged, parameter)[e], expected)


def adapted(model: Any) -> set[str]:
    lines = [line for _, line in describe_trained(model)]
    line = next(line for line in lines if line.startswith("Adapters"))
    inside = line[line.index("(") + 1 : line.index(")")]
    return {item.split(" x ")[1] for item in inside.split(", ")}


EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("qwen3_moe", {}, ATTENTION | EXPERTS),
        ("qwen3_moe", {"lora_experts": False}, ATTENTION),
        # the names of each expert's linear maps in old checkpoints
        ("qwen3_moe", {"lora_target": ("q_proj", "gate_proj", "up_proj", "down_proj")},
         {"q_proj"} | EXPERTS),
        ("mixtral", {"lora_target": ("w1", "w2", "w3")}, EXPERTS),
        ("qwen3_moe", {"lora_target": ("experts",)}, EXPERTS),
        ("qwen3_moe", {"lora_target": ("experts.gate_up_proj",)}, {"experts.gate_up_proj"}),
        ("qwen3_moe", {"lora_target": ("q_proj", "mlp.gate")}, {"q_proj", "gate"}),
        ("llama4_text", {"lora_target": ("router",)}, {"router"}),
        # PEFT would take the shared experts and the dense layer for routed experts
        ("glm4_moe", {}, ATTENTION | SHARED | DENSE
         | {"experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("glm4_moe", {"lora_experts": False}, ATTENTION | SHARED | DENSE),
        ("glm4_moe", {"lora_target": ("shared_experts.down_proj",)},
         {"down_proj"}),
    ],
)  # fmt: skip
def test_what_a_target_means(family: str, keys: dict[str, Any], expected: set[str]) -> None:
    assert adapted(lora(tiny_model(family, torch.float32), **keys)) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, r"use_dora: PEFT has none for adapters on parameters \(mlp.experts"),
        ({"lora_dropout": 0.1, "pissa_init": True}, "lora_dropout and pissa_init: .* lora_experts"),
        ({"lora_target": ("gate_proj",)}, "is one parameter with up_proj .* Name both"),
        ({"lora_target": ("experts",), "lora_experts": False}, "experts names routed experts, and"),
        (
            {"lora_target": ("expert",)},
            "expert not found in the model. Linear layers: k_proj, .*"
            r" Routed experts: mlp.experts.down_proj, mlp.experts.gate_up_proj\.",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora(tiny_model("qwen3_moe", torch.float32), **keys)


def test_what_has_no_adapter_is_told() -> None:
    model = lora(tiny_model("qwen3_moe", torch.float32))
    (_, counts), (_, adapters), (_, bare) = describe_trained(model)
    own = {n: p.numel() for n, p in tiny_model("qwen3_moe").named_parameters()}
    with_adapter = sum(n for name, n in own.items() if "experts" in name or "_proj" in name)
    total = sum(own.values())
    assert f"on {with_adapter:,} of the model's {total:,} parameters" in adapters
    assert "No adapter on: 1 x lm_head, 4 x gate, 1 x embed_tokens" in bare
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of" in counts
    # weights of all experts in one matrix take no adapter: a warning
    if not is_made_here("dbrx"):
        return
    level, line = describe_trained(lora(tiny_model("dbrx", torch.float32)))[-1]
    assert level == logging.WARNING and "routed experts carry no adapter: 78 %" in line


def test_experts_without_a_token_and_with_all() -> None:
    """An expert that no token is sent to has zeros as gradients, under every rank a multiple of 8
    or not.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 7, 7, 9], dtype=torch.int32)
    y = experts.grouped_mm(x, weight, ends)
    torch.testing.assert_close(y, torch.cat([x[:7] @ weight[1], x[7:] @ weight[3]]))
    y.square().sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[0], torch.zeros(5, 3, dtype=torch.float64))
    assert float(weight.grad[1].abs().max()) > 0


@pytest.mark.parametrize("kind", ["lora", "full", "freeze"])
@pytest.mark.parametrize("wanted", [True, False])
def test_routers_are_trained_or_frozen(kind: str, wanted: bool, tmp_path: Path) -> None:
    method = FinetuningArguments(
        finetuning_type=kind,  # type: ignore[arg-type]
        train_routers=wanted,
        lora_target=("q_proj", "experts"),
        freeze_trainable_layers=1,
    )
    base = tiny_model("qwen3_moe", torch.float64)
    model = apply_finetuning(copy.deepcopy(base), method, ModelArguments())
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "mlp.gate" in n}
    assert len(trained) == (4 if wanted else 0)
    assert any(p.requires_grad for n, p in model.named_parameters() if "experts" in n)
    if kind == "lora" and wanted:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in trained:
                    p.mul_(-1)
        model.save_pretrained(tmp_path)
        from peft import PeftModel

        plain = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        assert torch.equal(logits(plain), logits(model))
        assert not torch.equal(logits(plain), logits(base))


def test_routers_that_are_not_there_are_told() -> None:
    with pytest.raises(UserError, match="train_routers: llama has no routers"):
        lora(tiny_model("llama", torch.float32), train_routers=True)


# ---- under autocast ------------------------------------------------------------------------------


def block_of(family: str, seed: int) -> Any:
    """The experts of one layer with fp32 weights, by grouped products."""
    model = tiny_model(family, torch.float32)
    model.set_experts_implementation("grouped_mm")
    experts.install_grouped(model)
    experts.install_grouped(model)
    block = next(m for m in model.modules() if of_interface(m))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return block


def routed(seed: int, hidden: int = 64, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts and shares: expert 0 has one token, expert 1 none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor([[2, 3]]).repeat(tokens, 1)
    chosen[7, 1] = 0
    shares = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, hidden, generator=generator), chosen, shares


def run_block(
    block: Any, seed: int, low: torch.dtype | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Its output and the gradients of the tokens, shares and weights; under autocast where `low` is
    given.
    """
    x, chosen, shares = routed(seed)
    x, shares = (t.to(dtype).requires_grad_() for t in (x, shares))
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        y = block(x, chosen, shares)
    names = [n for n, _ in block.named_parameters()]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1))
    wanted = [x, shares, *block.parameters()]
    gradients = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    return {"out": y.detach(), **dict(zip(("x", "shares", *names), gradients, strict=True))}


@pytest.mark.parametrize("family", BY_INTERFACE)
def test_experts_compute_as_autocast_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made in half precision, masters and their gradients stay fp32, and the error
    against float32 is that of the model's own loop over experts under autocast. gpt-oss' grouped
    form adds biases in half precision: there it is that of the loop of a model in half precision.
    """
    types: set[torch.dtype] = set()
    grouped = experts.grouped_mm

    def noted(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        types.add(weight.dtype)
        return grouped(x, weight, offsets)

    monkeypatch.setattr(experts, "grouped_mm", noted)
    ratios: dict[str, list[float]] = {}
    for seed in range(5):
        block = block_of(family, seed)
        exact = run_block(block, seed)
        assert types == {torch.float32}
        types.clear()
        ours = run_block(block, seed, torch.bfloat16)
        assert types == {torch.bfloat16}
        types.clear()
        block.config._experts_implementation = "eager"
        own = run_block(block, seed, torch.bfloat16)
        for name, tensor in ours.items():
            assert tensor.dtype == own[name].dtype, name
        if family == "gpt_oss":
            half = copy.deepcopy(block).bfloat16()
            own = run_block(half, seed, dtype=torch.bfloat16)
        assert not types
        assert all(p.dtype == torch.float32 for p in block.parameters())
        for name, tensor in exact.items():
            errors = [float((r[name] - tensor).norm()) for r in (ours, own)]
            if name in dict(block.named_parameters()):
                # of experts without a token it is zero; of the one with a token it is not
                assert not ours[name][1].any() and ours[name][0].any(), name
            ratios.setdefault(name, []).append(errors[0] / errors[1])
    medians = {name: sorted(found)[2] for name, found in ratios.items()}
    assert all(median <= 1.2 for median in medians.values()), medians


def test_nothing_is_cast_without_autocast_or_in_float64() -> None:
    weight = torch.zeros(2, 3, 4)
    assert experts.in_autocast(weight) is weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert experts.in_autocast(weight).dtype == torch.bfloat16
        half, double = weight.bfloat16(), weight.double()
        assert experts.in_autocast(half) is half and experts.in_autocast(double) is double


@pytest.mark.parametrize("family", (*BY_INTERFACE, "mixtral", "granitemoe"))
def test_grouped_experts_are_those_of_the_model(family: str) -> None:
    """In float64, with an expert of one token and one of none: output and every gradient are those
    of the model's own loop, which other implementations than grouped products still run.
    """
    block = block_of(family, 0).double()
    found = run_block(block, 0, dtype=torch.float64)
    block.config._experts_implementation = "eager"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_experts", None)
        expected = run_block(block, 0, dtype=torch.float64)
    assert_equal(found, expected)
    assert all(float(t.abs().max()) > 0 for t in found.values())


def test_products_beside_messages_leave_processors_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backward pass, those of the last map: until the gradient of what it is given is there.
    Values are the same; a pass without gradients changes nothing.
    """
    events: list[Any] = []
    monkeypatch.setattr(
        torch._C, "_set_sm_carveout_experimental", lambda n: events.append(n), raising=False
    )
    block = block_of("qwen3_moe", 0).double()
    expected = run_block(block, 0, dtype=torch.float64)
    assert events == []
    experts.beside_messages(block)
    held = next(m for m in block.modules() if of_interface(m))
    for name, p in held.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(name))
    assert_equal(run_block(block, 0, dtype=torch.float64), expected)
    assert events == [experts.PROCESSORS, None]
    events.clear()
    x, chosen, shares = routed(0)
    block(x.double().requires_grad_(), chosen, shares.double()).sum().backward()
    assert events == [experts.PROCESSORS, "down_proj", None, "gate_up_proj"]
    with torch.no_grad():
        block(x.double(), chosen, shares.double())
    assert len(events) == 4


def test_a_run_trains_through_the_grouped_experts() -> None:
    """The model that a run loads has them, from scratch as well as from files."""
    model = tiny_model("qwen3_moe", torch.float32)
    assert not any("forward" in vars(m) for m in model.modules())
    from longfactory.model import load

    config = model.config
    args = ModelArguments(model_name_or_path="unused", train_from_scratch=True)
    made = load.load_model(args, config, torch.float32, attention="sdpa")
    held = [m for m in made.modules() if of_interface(m)]
    assert held and all("forward" in vars(m) for m in held)


@pytest.mark.parametrize("biased", [True, False])
def test_the_gate_of_gpt_oss_is_its_own(biased: bool) -> None:
    """Values and gradients, inside and beyond the limits, against the module's own gate."""
    model = tiny_model("gpt_oss")
    base: Any = next(m for m in model.modules() if of_interface(m))
    assert gates_clamped(base) and not gates_plainly(base)
    x = 6 * torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, :4] = torch.tensor([base.limit, -base.limit, -base.limit, base.limit])
    assert (x.abs() > base.limit).any()
    dy = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expert = torch.arange(40) // 15  # three experts, and a fourth without tokens
    bias = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bias[0] = 0.0
    results = []
    for own in (True, False):
        given, added = (t.clone().requires_grad_() for t in (x, bias))
        if own:
            y = base._apply_gate(given + added[expert] if biased else given)
        else:
            limits = float(base.alpha), float(base.limit)
            y = experts._Clamped.apply(given, added if biased else None, expert, *limits)
        leaves = [given, added] if biased else [given]
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
