"""Adapters on routed experts, four-bit experts and router losses on a GPU: grouped kernels in bf16
against PEFT's own form, and whole runs through the command.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from known_sizes import of_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

FAMILIES = ("qwen3_moe", "gpt_oss", "glm4_moe")
SIZES: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256}


def built(family: str, folder: Path) -> Path:
    from longfactory_dev.tiny_models import tiny_model
    from small_runs import write_tokenizer

    vocabulary = write_tokenizer(folder)
    known = {"gpt_oss": {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}}
    model = tiny_model(
        family, torch.float32, vocab_size=vocabulary + -vocabulary % 64, **known.get(family, SIZES)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_low_rank_products(rank: int, dtype: torch.dtype) -> None:
    """Against each expert's own product in float64; one expert has no token, one has one."""
    from types import SimpleNamespace

    from longfactory.model import experts

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator) / shape[-1] ** 0.5

    count, wide, out = 4, 64, 96
    a, b = (t.requires_grad_() for t in (draw(count * rank, wide), draw(out, rank * count)))
    wrapper = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        num_experts=count,
        scaling={"default": 2.0},
    )
    ends = torch.tensor([0, 1, 40, 77], dtype=torch.int32, device="cuda")
    x = draw(77, wide).to(dtype).requires_grad_()
    y = experts.low_rank(wrapper, "default", x, ends)
    dy = draw(77, out).to(dtype)
    found = torch.autograd.grad(y, (x, a, b), dy)

    x2, a2, b2 = (t.detach().double().requires_grad_() for t in (x, a, b))
    first = a2.view(count, rank, wide)
    second = b2.view(out, rank, count)
    starts = [0, *ends.tolist()[:-1]]
    parts = [
        x2[i:j] @ first[e].T @ second[:, :, e].T * 2
        for e, (i, j) in enumerate(zip(starts, ends.tolist(), strict=True))
    ]
    expected = torch.autograd.grad(torch.cat(parts), (x2, a2, b2), dy.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3  # of tf32 at most
    for one, other in zip((y, *found), (torch.cat(parts), *expected), strict=True):
        assert float((one.double() - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
@pytest.mark.parametrize("masters", [True, False])
def test_grouped_experts_in_bf16(family: str, masters: bool) -> None:
    """Forward and every gradient of a layer's experts, one of which has one token and one none:
    with fp32 masters under autocast and with bf16 weights, as near to float32 as the model's own
    loop in bf16 (RMS, median of five seeds). An expert without a token has zeros as gradients.
    """
    import statistics

    from longfactory.model import experts
    from longfactory_dev.tiny_models import tiny_model

    sizes = {k: v for k, v in SIZES.items() if family != "gpt_oss" or k != "moe_intermediate_size"}
    ratios: dict[str, list[float]] = {}
    for seed in range(5):
        model = tiny_model(family, torch.float32, seed, **sizes).cuda()
        model.set_experts_implementation("grouped_mm")
        experts.install_grouped(model)
        block = next(m for m in model.modules() if experts.of_interface(m))
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(p.bfloat16())
        tokens = torch.randn(300, 256, device="cuda", generator=generator).bfloat16()
        chosen = torch.tensor([[2, 3]], device="cuda").repeat(300, 1)
        chosen[7, 1] = 0
        shares = torch.rand(300, 2, device="cuda", generator=generator).bfloat16()
        dy = torch.randn(300, 256, device="cuda", generator=generator)

        def run(
            block: Any, dtype: torch.dtype, autocast: bool, kind: str
        ) -> dict[str, torch.Tensor]:
            block.config._experts_implementation = kind
            x, w = (t.to(dtype).requires_grad_() for t in (tokens, shares))  # noqa: B023
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                y = block(x, chosen, w)  # noqa: B023
            names = [n for n, _ in block.named_parameters()]
            found = torch.autograd.grad(y, [x, w, *block.parameters()], dy.to(y.dtype))  # noqa: B023
            return {"out": y, **dict(zip(("x", "shares", *names), found, strict=True))}

        exact = run(block, torch.float32, False, "eager")
        half = copy.deepcopy(block).bfloat16()
        own = run(half, torch.bfloat16, False, "eager")
        if masters:
            ours = run(block, torch.float32, True, "grouped_mm")
        else:
            ours = run(half, torch.bfloat16, False, "grouped_mm")
        for name, tensor in exact.items():
            if name in dict(block.named_parameters()):
                assert not ours[name][1].any() and ours[name][0].any(), name
                assert ours[name].dtype == (torch.float32 if masters else torch.bfloat16)
            errors = [float((r[name].float() - tensor).norm()) for r in (ours, own)]
            ratios.setdefault(name, []).append(errors[0] / errors[1])
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    print(family, masters, medians)
    assert all(median <= 1.2 for median in medians.values()), medians


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_computes_what_peft_defines(family: str, tmp_path: Path) -> None:
    """bf16: as near to float32 as PEFT's own form, which rounds the sum of weight and adapter."""
    from longfactory.config.arguments import FinetuningArguments, ModelArguments
    from longfactory.model import experts
    from longfactory.model.adapters import apply_finetuning
    from longfactory_dev.tiny_models import tiny_model

    known = {"gpt_oss": {k: v for k, v in SIZES.items() if k != "moe_intermediate_size"}}
    wide = tiny_model(family, torch.float32, **known.get(family, SIZES)).cuda()
    method = FinetuningArguments(finetuning_type="lora", lora_rank=8)
    wide = apply_finetuning(wide, method, ModelArguments())
    with torch.no_grad():
        for name, p in wide.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
            p.copy_(p.bfloat16())
    block = next(n for n, m in wide.named_modules() if n.endswith(".experts"))
    tokens = torch.randn(200, 256, device="cuda").bfloat16().float()
    chosen = torch.randint(0, 4, (200, 2), device="cuda")
    shares = torch.rand(200, 2, device="cuda")

    def run(model: Any, dtype: torch.dtype) -> torch.Tensor:
        return model.get_submodule(block)(tokens.to(dtype), chosen, shares.to(dtype)).float()

    expected = run(wide, torch.float32)
    half = copy.deepcopy(wide).bfloat16()
    ours = run(half, torch.bfloat16)
    for module in half.modules():
        if experts.is_wrapper(module):
            vars(module).pop("forward", None)
    theirs = run(half, torch.bfloat16)
    errors = [float((y - expected).norm() / expected.norm()) for y in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1] and errors[0] < 2e-2, errors


def talks(home: Path) -> None:
    random.seed(0)
    words = "abcdefgh "
    data = [
        {
            "instruction": "".join(random.choice(words) for _ in range(200)),
            "output": "".join(random.choice(words) for _ in range(300)),
        }
        for _ in range(16)
    ]
    (home / "talks.json").write_text(json.dumps(data))
    info = {"talks": {"file_name": "talks.json"}}
    (home / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_through_the_command(family: str, bits: int | None, tmp_path: Path) -> None:
    """LoRA on every linear map in bf16, experts included, with the routers' loss where there is
    one: the loss falls, experts have adapters that moved, nothing is left in 16 bits.
    """
    if bits:
        pytest.importorskip("bitsandbytes")
    talks(tmp_path)
    built(family, tmp_path / "model")
    keys: dict[str, Any] = {
        "model_name_or_path": tmp_path / "model", "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8, "dataset": "talks",
        "dataset_dir": tmp_path, "template": "chatml", "cutoff_len": 1024, "packing": True,
        "output_dir": tmp_path / "out", "max_steps": 12, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "logging_steps": 1, "bf16": True,
        "save_strategy": "no", "report_to": "none", "lr_scheduler_type": "constant",
        "preprocessing_num_workers": 1,
    }  # fmt: skip
    if bits:
        keys["quantization_bit"] = bits
    if family != "glm4_moe":
        keys["moe_aux_loss_coef"] = 0.01
    command = [sys.executable, "-m", "longfactory.cli", "train"]
    done = subprocess.run(
        [*command, *(f"{k}={v}" for k, v in keys.items())],
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "experts.gate_up_proj" in output and "not quantised" not in output
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [h["loss"] for h in log if "loss" in h]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1, losses
    assert all(h["expert_max_load"] >= 1 for h in log if "loss" in h)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = [float(t.abs().max()) for n, t in adapter.items() if "experts.lora_B" in n]
    assert moved and all(m > 0 for m in moved)
    if bits:
        numbers = re.search(r"Quantised: ([\d,]+) parameters; ([\d,]+) in", output)
        assert numbers is not None
        four, rest = (int(n.replace(",", "")) for n in numbers.groups())
        assert four > 4 * rest
    print(family, bits, losses, [line for line in output.splitlines() if "Quantised" in line])


def test_thirty_billion_parameters_in_four_bits(tmp_path: Path) -> None:
    """The shape of Qwen3-30B-A3B with 4 of its 48 layers: bytes of a layer, and no peak in 16 bits
    while it is loaded.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from longfactory.config.arguments import ModelArguments
    from longfactory.model import load

    config = of_size("qwen3-30b-a3b", num_hidden_layers=4, vocab_size=32000)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    args = ModelArguments(model_name_or_path=str(tmp_path), quantization_bit=4)
    four = load.load_model(
        args,
        load.load_config(args, 128),
        torch.bfloat16,
        attention="sdpa",
        quantization=load.quantization_config(args, torch.bfloat16),
    )
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    print(load.describe_quantised(four), held / 2**30, peak / 2**30)
    embeddings = 2 * 32000 * 2048 * 2
    layer = (held - embeddings) / 4
    assert layer * 48 + 2 * 151936 * 2048 * 2 < 20 * 2**30
    # at most the experts of two layers and a few parameters on their way
    assert peak - held < 3 * 128 * 3 * 2048 * 768 * 2


def test_time_and_memory_of_a_layer() -> None:
    """The experts of a layer of Qwen3-30B-A3B on 16,384 tokens, forward and backward: seconds and
    peak bytes without an adapter, with ours, and with PEFT's own form.
    """
    import time

    from transformers import AutoModelForCausalLM

    from longfactory.config.arguments import FinetuningArguments, ModelArguments
    from longfactory.model import experts
    from longfactory.model.adapters import apply_finetuning

    config = of_size("qwen3-30b-a3b", num_hidden_layers=1, vocab_size=1024)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    tokens = 16384
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.rand(tokens, 128, device="cuda").topk(8).indices
    shares = torch.rand(tokens, 8, device="cuda", dtype=torch.bfloat16)

    def measured(block: Any) -> tuple[float, float]:
        times = []
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            block(x, chosen, shares).sum().backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            model.zero_grad()
            x.grad = None
        return sorted(times)[1], (torch.cuda.max_memory_allocated() - before) / 2**30

    found = {"frozen": measured(model.model.layers[0].mlp.experts)}
    method = FinetuningArguments(finetuning_type="lora", lora_rank=8, lora_target=("experts",))
    model = apply_finetuning(model, method, ModelArguments())
    block = model.get_base_model().model.layers[0].mlp.experts
    found["ours"] = measured(block)
    for module in model.modules():
        if experts.is_wrapper(module):
            vars(module).pop("forward", None)
    found["PEFT's"] = measured(block)
    for name, (seconds, peak) in found.items():
        print(f"{name}: {1e3 * seconds:.1f} ms, {peak:.2f} GiB")
    assert found["ours"][0] < found["PEFT's"][0]
    assert found["ours"][1] < found["PEFT's"][1]
