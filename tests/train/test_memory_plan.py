"""The plan of a run: what is counted as trained, and when weights are split and the optimizer
leaves the GPU.
"""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from known_sizes import qwen_7b
from longfactory.config import from_mapping
from longfactory.data.module import Datasets
from longfactory.errors import UserError
from longfactory.memory import host_jobs, optimizer
from longfactory.memory.budget import budget, moments
from longfactory.memory.optimizer_techniques import LEAVING
from longfactory.memory.search import choose, longest
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, machine
from longfactory.model import adapters
from longfactory.train import memory_plan, optimizer_names
from longfactory.train.memory_plan import Counts, Memory, count_parameters, plan_memory
from longfactory_dev.tiny_models import tiny_config

ROOT = Path(__file__).resolve().parents[2]
from make_model import make_model  # noqa: E402

GiB = 2**30
ZERO3 = ROOT / "examples" / "deepspeed" / "ds_z3_config.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model("tiny", tmp_path_factory.mktemp("plan") / "model", vocabulary=600))


def configured(model: str, **keys: Any) -> Any:
    base = {
        "model_name_or_path": model,
        "stage": "sft",
        "dataset": "manual_sft",
        "dataset_dir": str(ROOT / "data"),
        "template": "chatml",
    }
    return from_mapping(
        {**base, "output_dir": "unused", "finetuning_type": "full", "use_cpu": True, **keys}
    )


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze, some modules": {
        "finetuning_type": "freeze",
        "freeze_trainable_modules": ["mlp"],
        "freeze_extra_modules": ["norm"],
    },
    "freeze and the head": {
        "finetuning_type": "freeze",
        "freeze_extra_modules": ["embed_tokens", "lm_head"],
    },
    "lora": {"finetuning_type": "lora", "lora_rank": 3},
    "lora, some modules": {
        "finetuning_type": "lora",
        "lora_target": ["q_proj", "v_proj"],
        "additional_target": ["embed_tokens"],
    },
    "pissa": {"finetuning_type": "lora", "pissa_init": True},
}


@pytest.mark.parametrize("name", list(KINDS))
def test_counts_are_those_of_the_model_that_is_trained(name: str, model: str) -> None:
    cfg = configured(model, **KINDS[name])
    config = AutoConfig.from_pretrained(model)
    counts = count_parameters(cfg, config)
    real = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in real.parameters())
    real = adapters.apply_finetuning(real, cfg.method, cfg.model)
    assert (counts.total, counts.trained) == (
        total,
        sum(p.numel() for p in real.parameters() if p.requires_grad),
    )
    assert counts.head == (
        name == "full"
        or "head" in name
        or ("additional_target" in KINDS[name] and bool(config.tie_word_embeddings))
    )


@pytest.mark.parametrize("keys", [{"resize_vocab": True}, {"add_tokens": ["<new>"]}])
def test_embeddings_that_new_tokens_train_beside_an_adapter_are_counted(
    keys: dict[str, Any], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of what such a run trains."""
    lora = {"finetuning_type": "lora", "lora_rank": 3}
    plain, cfg = configured(model, **lora), configured(model, **lora, **keys)
    config = AutoConfig.from_pretrained(model)
    counts, before = count_parameters(cfg, config), count_parameters(plain, config)
    real = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in real.parameters())
    real = adapters.apply_finetuning(real, cfg.method, cfg.model, new_tokens=True)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert (counts.total, counts.trained, counts.head) == (total, trained, True)
    assert counts.trained > before.trained + 600 * config.hidden_size and not before.head
    more, less = (planned(run, monkeypatch).plan.job for run in (cfg, plain))
    copies = more.shape.trainable - less.shape.trainable
    assert copies == 2 * more.shape.head_parameters, "the embedding and the output layer of 7B"
    assert more.weight_bytes - less.weight_bytes == 4 * copies, "in float32, beside the frozen ones"
    assert more.gradient_bytes - less.gradient_bytes == 4 * copies


def test_an_adapter_that_goes_on_is_estimated(model: str, tmp_path: Path) -> None:
    cfg = configured(model, finetuning_type="lora", adapter_name_or_path=str(tmp_path))
    counts = count_parameters(cfg, AutoConfig.from_pretrained(model))
    assert counts.trained is None and counts.total > 0
    again = configured(
        model, finetuning_type="lora", adapter_name_or_path=str(tmp_path), create_new_adapter=True
    )
    assert count_parameters(again, AutoConfig.from_pretrained(model)).trained


def test_kinds_of_lora_that_experts_cannot_have_are_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    cfg = configured(str(tmp_path), finetuning_type="lora", use_dora=True)
    with pytest.raises(UserError, match="use_dora: PEFT has none for adapters on parameters"):
        count_parameters(cfg, AutoConfig.from_pretrained(tmp_path))


def test_unknown_modules_are_named_before_anything_is_loaded(model: str) -> None:
    with pytest.raises(UserError, match="nothing_such"):
        count_parameters(
            configured(model, finetuning_type="lora", lora_target=["nothing_such"]),
            AutoConfig.from_pretrained(model),
        )


COUNTED: dict[str, Counts] = {}


def counted(cfg: Any) -> Counts:
    """Of Qwen2.5-7B with its 28 layers; once for runs that differ in neither of what counts."""
    given = repr((cfg.model, cfg.method, cfg.trainer))
    if given not in COUNTED:
        COUNTED[given] = count_parameters(cfg, qwen_7b())
    return COUNTED[given]


def planned(
    cfg: Any,
    monkeypatch: pytest.MonkeyPatch,
    sharding: str = "none",
    world: int = 1,
    gib: int = 80,
    cuda: bool = True,
) -> Memory:
    """The plan for Qwen2.5-7B and rows of 8192 tokens on H100s, with 512 GiB of host memory."""
    properties = types.SimpleNamespace(total_memory=gib * GiB, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(memory_plan, "host_memory", lambda: 512 * GiB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    data = Datasets(types.SimpleNamespace(lengths=[8192]), {})  # type: ignore[arg-type]
    return plan_memory(cfg, qwen_7b(), counted(cfg), data, sharding, world, cuda)


def test_frozen_layers_have_no_gradients_and_states(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"bf16": True, "optimizer_placement": "gpu"}
    full = planned(configured(model, **keys), monkeypatch)
    two = planned(
        configured(model, **keys, finetuning_type="freeze", freeze_trainable_layers=2), monkeypatch
    )
    layer = full.plan.job.shape.layer_parameters
    assert two.plan.job.shape.parameters == full.plan.job.shape.parameters
    # norms and biases are not in the shape
    assert two.plan.job.shape.trainable == pytest.approx(2 * layer, rel=1e-3)
    assert two.plan.budget.gpu["optimizer"] == pytest.approx(8 * 2 * layer, rel=1e-3)
    assert two.plan.budget.gpu["weights"] < 1.2 * 2 * full.plan.job.shape.parameters
    assert two.plan.fits and not two.split
    lora = planned(configured(model, **keys, finetuning_type="lora", lora_rank=8), monkeypatch)
    assert (
        lora.plan.budget.gpu["optimizer"]
        == 8 * counted(configured(model, finetuning_type="lora")).trained
    )  # type: ignore[operator]
    assert two.plan.budget.gpu_total < full.plan.budget.gpu_total


@pytest.mark.parametrize(
    ("keys", "sharding", "split", "place"),
    [
        # 8 bytes a parameter, weights and gradients in fp32, do not fit in 48 GiB
        ({}, "none", True, "host"),
        ({"gradient_accumulation_steps": 8}, "none", True, "host"),
        ({"optimizer_placement": "host", "gradient_accumulation_steps": 8}, "none", True, "host"),
        ({"optimizer_placement": "host"}, "fsdp2", True, "host"),
        # DDP would reduce bf16 gradients in bf16
        ({"optimizer_placement": "host"}, "ddp", False, "host"),
        ({"optimizer_placement": "host", "bf16": False}, "none", False, "host"),
        ({"optimizer_placement": "host", "pure_bf16": True, "bf16": False}, "none", False, "host"),
        ({"optimizer_placement": "host", "finetuning_type": "lora"}, "none", False, "host"),
        ({"finetuning_type": "freeze"}, "none", False, "gpu"),
    ],
)
def test_when_weights_are_split(
    keys: dict[str, Any],
    sharding: str,
    split: bool,
    place: str,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = configured(model, **{"bf16": True, **keys})
    memory = planned(cfg, monkeypatch, sharding, world=1 if sharding == "none" else 2, gib=48)
    assert memory.split == split and memory.plan.settings.optimizer == place


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 4),
        ({"tf32": True}, 4),
        ({"bf16": True}, 2),
        ({"fp16": True}, 2),
        ({"pure_bf16": True, "bf16": True}, 2),
    ],
)
def test_the_plan_is_for_the_precision_of_the_run(
    keys: dict[str, Any], width: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(configured(model, **keys, use_cpu=False), monkeypatch).plan
    assert plan.job.shape.width == width
    assert ("Set bf16: true" in plan.table) == (width == 4)
    assert (plan.job.machine.float32[0] > 100e12) == bool(keys.get("tf32"))


def test_sums_of_micro_batches_are_in_the_plan(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"bf16": True, "optimizer_placement": "host"}
    one, eight = (
        planned(
            configured(model, **keys, gradient_accumulation_steps=n), monkeypatch
        ).plan.budget.host["optimizer"]
        for n in (1, 8)
    )
    assert eight - one == 4 * counted(configured(model)).total


def test_without_a_gpu_the_user_still_chooses_the_optimizer(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = planned(
        configured(model, bf16=True, optimizer_placement="host"), monkeypatch, cuda=False
    )
    assert memory.split and memory.plan.settings.optimizer == "host"
    assert not planned(configured(model, bf16=True), monkeypatch, cuda=False).split


# ---- updates during backward ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sharding", "refused"),
    [
        ({}, "none", None),
        ({"gradient_accumulation_steps": 2}, "fsdp2", None),
        ({"optimizer_overlap": False, "max_grad_norm": 1.0}, "none", None),
        ({"max_grad_norm": 1.0}, "none", "Set max_grad_norm: 0"),
        ({}, "ddp", "sharding: ddp"),  # gradients come before they are averaged
        ({}, "deepspeed", "sharding: deepspeed"),
        ({"bf16": False, "fp16": True}, "none", "Use bf16"),  # gradients come scaled
    ],
)
@pytest.mark.parametrize("cuda", [True, False])
def test_when_updates_are_made_during_backward(
    keys: dict[str, Any],
    sharding: str,
    refused: str | None,
    cuda: bool,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = {
        "bf16": True,
        "optimizer_placement": "host",
        "optimizer_overlap": True,
        "max_grad_norm": 0,
    }
    cfg = configured(model, **{**base, **keys})
    if refused is not None:
        with pytest.raises(UserError, match=refused):
            planned(cfg, monkeypatch, sharding, world=1 if sharding == "none" else 2, cuda=cuda)
        return
    found = planned(cfg, monkeypatch, sharding, world=1 if sharding == "none" else 2, cuda=cuda)
    assert (
        found.plan.job.overlaps == keys.get("optimizer_overlap", True)
        and found.plan.settings.optimizer == "host"
    )


@pytest.mark.parametrize(
    ("sharding", "keys", "refused"),
    [
        ("none", {}, None),
        ("fsdp2", {}, None),
        ("ddp", {}, "ddp"),
        ("deepspeed", {}, "deepspeed"),
        ("none", {"bf16": False, "fp16": True}, "bf16"),
    ],
)
def test_gradients_leave_where_they_are_final(
    sharding: str,
    keys: dict[str, Any],
    refused: str | None,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = 1 if sharding == "none" else 2
    asked = {"bf16": True, "optimizer_placement": "host", "offload_gradients": True, **keys}
    if refused is not None:
        with pytest.raises(UserError, match=f"offload_gradients .*{refused}"):
            planned(configured(model, **asked), monkeypatch, sharding, world=world)
        asked.pop("offload_gradients")
        if sharding == "deepspeed":
            with pytest.raises(UserError, match="DeepSpeed holds the optimizer's states"):
                planned(
                    configured(model, **asked, deepspeed=str(ZERO3)), monkeypatch, sharding, world
                )
            asked |= {"optimizer_placement": "auto", "deepspeed": str(ZERO3)}
        found = planned(configured(model, **asked), monkeypatch, sharding, world=world).plan
        assert not found.job.leavable and found.settings.gradients == "gpu"
        return
    for cuda in (True, False):
        assert (
            planned(
                configured(model, **asked), monkeypatch, sharding, world=world, cuda=cuda
            ).plan.settings.gradients
            == "host"
        )


def test_gradients_leave_where_room_is_short(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves only where that makes a row fit; they take host memory, unless sums of
    micro-batches hold them.
    """
    job = planned(configured(model, bf16=True, optimizer_placement="host"), monkeypatch).plan.job
    job = dataclasses.replace(job, machine=dataclasses.replace(job.machine, host_bytes=10**13))
    assert job.leavable and choose(dataclasses.replace(job, tokens=32768))[0].gradients == "gpu"
    stays, goes = (longest(j, "long") for j in (dataclasses.replace(job, leavable=False), job))
    assert goes > 1.04 * stays
    chosen, needs, fits = choose(dataclasses.replace(job, tokens=goes), "long")
    assert fits and (chosen.optimizer, chosen.gradients) == ("host", "host")
    assert needs.host["gradients"] == 2 * job.shape.trainable
    assert "gradients" not in budget(dataclasses.replace(job, accumulates=True), chosen).host
    more, less = (
        moments(job, dataclasses.replace(chosen, gradients=g))[2]["gradients"]
        for g in ("gpu", "host")
    )
    assert more == made(job.shape) and less == 2 * (LEAVING + job.shape.head_parameters)


def test_the_plan_hides_updates_and_lets_gradients_go(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LEAVING == host_jobs.AHEAD * optimizer.BLOCK
    keys = {"bf16": True, "optimizer_placement": "host"}
    after = planned(configured(model, **keys), monkeypatch).plan.job
    during = planned(
        configured(model, **keys, max_grad_norm=0, optimizer_overlap=True), monkeypatch
    ).plan.job
    assert dataclasses.replace(during, overlaps=False) == after
    gpu = MemorySettings(keep_attention=1.0)
    host = dataclasses.replace(gpu, optimizer="host")
    gradients = [moments(job, host)[2]["gradients"] for job in (after, during)]
    assert gradients[0] == made(after.shape)
    assert gradients[1] == 2 * (LEAVING + after.shape.head_parameters) < 0.3 * gradients[0]
    assert moments(during, gpu) == moments(after, gpu) and seconds(during, gpu) == seconds(
        after, gpu
    )
    # fp32 gradients are summed where they are
    early = dataclasses.replace(during, master=4, accumulates=True)
    assert moments(early, host)[2]["gradients"] == 4 * after.shape.trainable

    longer = dataclasses.replace(after, tokens=262144), dataclasses.replace(during, tokens=262144)
    whole = seconds(longer[0], host) - seconds(
        dataclasses.replace(longer[0], machine=endless(after.machine)), host
    )
    saved = seconds(longer[0], host) - seconds(longer[1], host)
    assert 0.9 * whole < saved < whole, "all but the last gradient's"
    short = [seconds(dataclasses.replace(job, tokens=512), host) for job in (after, during)]
    assert 0 < short[0] - short[1] < 0.5 * whole, "a short backward hides no more than it takes"


def made(shape: ModelShape) -> float:
    """Bytes of gradients in the backward of the last layer, whose own and the embedding's are not
    there yet.
    """
    return pytest.approx(
        2 * (shape.trainable - shape.layer_parameters - shape.head_parameters), rel=1e-9
    )


def endless(machine: Any) -> Any:
    """Whose host computes an update at once."""
    return dataclasses.replace(machine, host_memory=1e30, copies=1e30)


# ---- states in 4, 8 and 16 bit -------------------------------------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = types.SimpleNamespace(find_spec=lambda name: object() if name in names else None)
    monkeypatch.setattr(optimizer_names.importlib, "util", found)


@pytest.mark.parametrize(
    ("optim", "package", "width", "size"),
    [
        ("adamw_torch_8bit", "torchao", "8 bit", 2),
        ("adamw_torch_4bit", "torchao", "4 bit", 1),
        ("adamw_bnb_8bit", "bitsandbytes", "8 bit", 2),
        ("adamw_8bit", "bitsandbytes", "8 bit", 2),
        ("paged_adamw_8bit", "bitsandbytes", "8 bit", 2),
    ],
)
def test_narrow_states_are_counted_as_they_are(
    optim: str, package: str, width: str, size: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configured(model, bf16=True, optim=optim)
    installed(monkeypatch)
    with pytest.raises(
        UserError, match=f"optim: {optim} needs {package}. Run: pip install {package}"
    ):
        planned(cfg, monkeypatch)
    installed(monkeypatch, package)
    found = planned(cfg, monkeypatch, gib=48)  # where fp32 states would go to the host
    assert found.plan.settings.optimizer == "gpu" and not found.split
    assert found.narrow is not None and (found.narrow.width, found.narrow.package) == (
        width,
        package,
    )
    shape = found.plan.job.shape
    # whose states stay fp32
    embedding = shape.head_parameters * (6 if package == "bitsandbytes" else 0)
    assert found.plan.budget.gpu["optimizer"] == pytest.approx(
        size * shape.trainable + embedding, rel=1e-3
    )
    lora = planned(configured(model, bf16=True, optim=optim, finetuning_type="lora"), monkeypatch)
    assert lora.plan.budget.gpu["optimizer"] == size * lora.plan.job.shape.trainable
    if package == "bitsandbytes":
        with pytest.raises(UserError, match="cannot train the shards of FSDP2"):
            planned(cfg, monkeypatch, "fsdp2", world=2)
    else:
        assert planned(cfg, monkeypatch, "fsdp2", world=2).narrow == found.narrow


def test_states_of_pure_bf16_are_bf16(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(configured(model, pure_bf16=True, optimizer_placement="gpu"), monkeypatch)
    assert found.narrow is not None and (found.narrow.width, found.narrow.package) == ("bf16", None)
    assert found.plan.budget.gpu["optimizer"] == 4 * found.plan.job.shape.trainable
    assert found.plan.budget.gpu["weights"] == 2 * found.plan.job.shape.parameters
    assert found.plan.job.gradient_bytes == 2 * found.plan.job.shape.trainable
    assert found.plan.job.written_layer
    assert (
        planned(configured(model, bf16=True, optimizer_placement="gpu"), monkeypatch).narrow is None
    )


def test_other_optimizers_are_not_sent_to_the_host(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(configured(model, bf16=True, optim="adafactor"), monkeypatch, gib=48)
    assert found.plan.settings.optimizer == "gpu" and not found.split and found.narrow is None


def test_experts_are_counted_as_they_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four bits where weights are not sharded; adapters on them are seen."""
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    lora = {"finetuning_type": "lora", "bf16": True}
    cfg = configured(str(tmp_path), **lora)
    counts = count_parameters(cfg, config)
    assert counts.routed == 4 * 4 * 3 * 64 * 32, "layers, experts, maps"
    assert counts.adapted_experts
    assert not count_parameters(
        configured(str(tmp_path), **lora, lora_experts=False), config
    ).adapted_experts
    four, eight = (
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, quantization_bit=bits))
        for bits in (4, 8)
    )
    found = [memory_plan.quantized_parameters(four, counts, s) for s in ("none", "ddp", "fsdp2")]
    assert found == [counts.linear + counts.routed] * 2 + [counts.linear]
    assert memory_plan.quantized_parameters(eight, counts, "none") == counts.linear
    assert memory_plan.quantized_parameters(cfg, counts, "none") == 0


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        ({"stage": "sft"}, 0),
        ({"stage": "dpo", "dataset": "manual_dpo"}, 1),
        ({"stage": "dpo", "dataset": "manual_dpo", "precompute_ref_log_probs": True}, 0),
        ({"stage": "dpo", "dataset": "manual_dpo", "pref_loss": "simpo"}, 0),
        ({"stage": "dpo", "dataset": "manual_dpo", "finetuning_type": "full"}, 0),
    ],
)
def test_passes_of_the_reference_take_time(keys: dict[str, Any], passes: int, model: str) -> None:
    """With the adapter off, in every step; a full run's are before training."""
    cfg = configured(model, **{"finetuning_type": "lora", "bf16": True, **keys})
    config = qwen_7b()
    counts = count_parameters(cfg, config)
    job = memory_plan.plan_run(
        cfg, config, counts, 16384, "none", machine("H100", 1, 512 * GiB)
    ).plan.job
    assert job.reference_passes == passes
    settings = MemorySettings(keep_attention=1.0)
    more = seconds(job, settings) / seconds(dataclasses.replace(job, reference_passes=0), settings)
    assert more == 1 if not passes else 1.2 < more < 1.4


@pytest.mark.parametrize(
    ("keys", "bits", "sharding", "written"),
    [
        ({"finetuning_type": "lora"}, None, "none", True),
        ({"finetuning_type": "lora"}, 4, "none", True),
        ({"finetuning_type": "lora"}, 4, "ddp", True),
        ({"finetuning_type": "lora"}, 4, "fsdp2", False),
        ({"finetuning_type": "lora"}, 8, "none", False),
        ({"finetuning_type": "lora", "use_dora": True}, None, "none", True),
        ({"finetuning_type": "lora", "lora_dropout": 0.1}, None, "none", False),
        ({"finetuning_type": "full", "sharding": "fsdp2"}, None, "fsdp2", True),
        ({"finetuning_type": "full", "sharding": "ddp"}, None, "ddp", False),  # autocast
    ],
)
def test_when_the_hand_written_layer_is_planned(
    keys: dict[str, Any], bits: int | None, sharding: str, written: bool, model: str
) -> None:
    cfg = configured(model, bf16=True, **keys)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, quantization_bit=bits))
    config, where = qwen_7b(), machine("H100", 1 if sharding == "none" else 2, 512 * GiB)
    plain = configured(model, bf16=True, **{**keys, "use_dora": False})
    counts = count_parameters(plain, config)
    job = memory_plan.plan_run(cfg, config, counts, 8192, sharding, where).plan.job
    assert job.written_layer == written
