"""What is trained: everything, some layers, or adapters that begin where earlier ones ended."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import vision_models
from longfactory import sp
from longfactory.config.arguments import FinetuningArguments, ModelArguments
from longfactory.errors import UserError
from longfactory.model import pissa
from longfactory.model.adapter_targets import linear_names
from longfactory.model.adapters import (
    apply_finetuning,
    cast_trainable,
    load_adapter,
    merge_adapter,
    refuse_sharded_ties,
)
from longfactory.model.saved import adapter_name, check_saveable
from longfactory.model.trained_parameters import count_parameters, describe_trained
from longfactory.sp import hf, vision
from longfactory.sp.guard import guard
from longfactory.sp.text_model import decoder_layers
from longfactory.testing import tiny_model
from longfactory_dev.tiny_models import tiny_model as tiny_family

IDS = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def apply(
    model: Any,
    kind: str,
    adapters: tuple[str, ...] = (),
    *,
    new_tokens: bool = False,
    is_trainable: bool = True,
    **keys: Any,
) -> Any:
    method = FinetuningArguments(finetuning_type=kind, **keys)  # type: ignore[arg-type]
    return apply_finetuning(
        model,
        method,
        ModelArguments(adapter_name_or_path=adapters),
        new_tokens=new_tokens,
        is_trainable=is_trainable,
    )


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_full_trains_everything() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    assert trained(apply(model, "full")) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"freeze_trainable_layers": 2}, {4, 5}),
        ({"freeze_trainable_layers": -1}, {0}),
        ({"freeze_trainable_layers": 99}, set(range(6))),
        ({"freeze_trainable_layers": 2, "use_llama_pro": True}, {2, 5}),
    ],
)
def test_freeze_trains_whole_layers(keys: dict[str, Any], layers: set[int]) -> None:
    model = apply(tiny_model(num_hidden_layers=6), "freeze", **keys)
    want = {
        n
        for n, _ in model.named_parameters()
        if any(n.startswith(f"model.layers.{i}.") for i in layers)
    }
    assert trained(model) == want and want


def test_freeze_trains_named_modules_and_others_beside_the_layers() -> None:
    model = apply(
        tiny_model(tie_word_embeddings=False),
        "freeze",
        freeze_trainable_layers=1,
        freeze_trainable_modules=("mlp", "q_proj"),
        freeze_extra_modules=("embed_tokens", "norm"),
    )
    want = {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")} | {
        "model.layers.1.self_attn.q_proj.weight"
    }
    assert trained(model) == want | {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_name_beside_the_layers_does_not_reach_into_them() -> None:
    """A recurrent layer has a `norm` of its own, which the frozen layers keep as it is."""
    model = tiny_family("qwen3_next")
    assert "model.layers.0.linear_attn.norm.weight" in dict(model.named_parameters())
    apply(model, "freeze", freeze_trainable_layers=1, freeze_extra_modules=("norm",))
    prefix = f"model.layers.{model.config.num_hidden_layers - 1}."
    others = {name for name in trained(model) if not name.startswith(prefix)}
    assert others == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"freeze_trainable_modules": ("attn",)},
            r"freeze_trainable_modules: attn not found in a decoder layer. It has: .*self_attn",
        ),
        (
            {"freeze_extra_modules": ("head",)},
            (
                r"freeze_extra_modules: head not found outside the decoder layers. There are:"
                r" .*lm_head"
            ),
        ),
        (
            {"use_llama_pro": True, "freeze_trainable_layers": 4},
            "6 layers are not divisible by freeze_trainable_layers: 4",
        ),
    ],
)
def test_freeze_refuses_what_is_not_there(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(tiny_model(num_hidden_layers=6, tie_word_embeddings=False), "freeze", **keys)


def test_the_decoder_layers_are_found() -> None:
    name, layers = decoder_layers(tiny_model(num_hidden_layers=3))
    assert name == "model.layers" and len(layers) == 3
    with pytest.raises(UserError, match="has no list of decoder layers"):
        decoder_layers(nn.Linear(2, 2))


def test_lora_on_every_linear_layer_but_the_output() -> None:
    model = tiny_model(tie_word_embeddings=False)
    assert set(linear_names(model)) == LINEAR
    model = apply(model, "lora", lora_rank=4)
    names = trained(model)
    assert all("lora_" in n for n in names) and len(names) == 2 * 7 * 2
    assert not any("lm_head" in n for n in names)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
    # B begins at zero
    assert torch.equal(logits(model), logits(tiny_model(tie_word_embeddings=False)))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        # Blocks of an unnamed sequence: `0` would be the whole first decoder layer as well.
        ("ctrl", {"Wq", "Wk", "Wv", "dense", "ffn.0", "ffn.2"}),
        (
            "gemma3n_text",
            {
                "altup_projections.0",
                "altup_unembed_projections.2",
                "q_proj",
                "per_layer_projection",
            },
        ),
        # Their router is a linear layer that gives a tuple.
        ("llama4_text", LINEAR),
        ("phimoe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        # A gate that is a linear layer beside routers of the same name that are none.
        ("qwen2_moe", LINEAR | {"shared_expert_gate"}),
    ],
)
def test_names_for_lora_are_those_of_linear_layers_alone(family: str, names: set[str]) -> None:
    from longfactory.sp.text_model import model_class
    from longfactory_dev.tiny_models import tiny_config

    with torch.device("meta"):
        model = model_class(tiny_config(family)).from_config()
    found = set(linear_names(model))
    assert found >= names and not any(name[0].isdigit() for name in found)
    assert family == "gemma3n_text" or found == names
    linear = [
        m
        for name, m in model.named_modules()
        if type(m) is nn.Linear
        and m is not model.get_output_embeddings()
        # whose weights transformers reads without calling it
        and not name.endswith("altup.correction_coefs")
    ]
    wrapped = apply(model, "lora", lora_rank=2, lora_experts=False)
    assert {id(m.base_layer) for m in wrapped.modules() if hasattr(m, "base_layer")} == {
        id(m) for m in linear
    }


@pytest.mark.parametrize("target", [("all",), ("q_proj", "down_proj")])
def test_lora_of_expanded_layers_is_on_those_that_llamafactory_finds(
    target: tuple[str, ...],
) -> None:
    """Its `find_expanded_modules`, of the names that `all` means there."""
    model, added = tiny_model(num_hidden_layers=12), 3
    stride = 12 // added
    numbers = [f".{i}." for i in range(stride - 1, 12 + stride - 1, stride)]
    named = LINEAR if target == ("all",) else target
    want = {
        name
        for name, _ in model.named_modules()
        if any(t in name for t in named) and any(number in name for number in numbers)
    }
    model = apply(
        model, "lora", lora_target=target, use_llama_pro=True, freeze_trainable_layers=added
    )
    found = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in trained(model)}
    assert found == want and len(want) == added * len(named)


def test_lora_of_expanded_layers_has_their_experts() -> None:
    model = apply(
        tiny_model("qwen3_moe", num_hidden_layers=4),
        "lora",
        lora_target=("all",),
        use_llama_pro=True,
        freeze_trainable_layers=2,
    )
    names = trained(model)
    assert {n.split("layers.")[1].split(".")[0] for n in names} == {"1", "3"}
    assert any(".experts." in n for n in names)
    with pytest.raises(UserError, match="4 layers are not divisible by freeze_trainable_layers: 3"):
        apply(
            tiny_model(num_hidden_layers=4),
            "lora",
            lora_target=("all",),
            use_llama_pro=True,
            freeze_trainable_layers=3,
        )


def test_lora_keys_reach_peft() -> None:
    model = apply(
        tiny_model(), "lora", lora_target=("q_proj", "mlp.down_proj"), lora_alpha=5, lora_rank=3, lora_dropout=0.25,
        use_rslora=True, use_dora=True, additional_target=("embed_tokens",),
    )  # fmt: skip
    config = model.peft_config["default"]
    assert (
        config.lora_alpha,
        config.r,
        config.lora_dropout,
        config.use_rslora,
        config.use_dora,
    ) == (5, 3, 0.25, True, True)
    names = trained(model)
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in names if ".lora_" in n} == {
        "q_proj",
        "down_proj",
    }
    assert any("embed_tokens.modules_to_save" in n for n in names)


def test_pissa_begins_as_the_principal_part() -> None:
    model = apply(
        tiny_model(), "lora", lora_target=("q_proj",), lora_rank=4, pissa_init=True, pissa_iter=-1
    )
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 16])
def test_pissa_loads_as_it_was_trained(iterations: int, tmp_path: Path) -> None:
    """Wherever in a run of random numbers it is loaded, and without a trace in them."""
    torch.manual_seed(1)
    model = apply(
        tiny_model(),
        "lora",
        lora_target=("q_proj", "up_proj"),
        lora_rank=4,
        pissa_init=True,
        pissa_iter=iterations,
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if "lora_" in name else None
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    again = load_adapter(tiny_model(), str(tmp_path))
    after = torch.rand(3)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits(again.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-5
    )
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), after)


def test_a_grown_vocabulary_is_trained_and_saved() -> None:
    model = apply(tiny_model(tie_word_embeddings=False), "lora", new_tokens=True)
    assert set(model.peft_config["default"].modules_to_save) == {"embed_tokens", "lm_head"}
    assert any("lm_head.modules_to_save" in n for n in trained(model))
    model = tiny_model(tie_word_embeddings=False)
    # PEFT would save it too: its name ends in the same letters
    model.model.old_embed_tokens = nn.Identity()
    model = apply(model, "lora", new_tokens=True)
    assert set(model.peft_config["default"].modules_to_save) == {"model.embed_tokens", "lm_head"}
    assert not any(
        "old_embed_tokens" in n for n, _ in model.named_modules() if "modules_to_save" in n
    )


@pytest.mark.parametrize(
    ("kind", "key", "name", "there"),
    [
        ("lora", "lora_target", "q_prj", "Linear layers: down_proj, gate_proj"),
        ("oft", "oft_target", "q_prj", "Linear layers: down_proj, gate_proj"),
        ("lora", "additional_target", "embeddings", "Modules with weights: down_proj, embed_tok"),
    ],
)
def test_an_unknown_target_is_refused_with_those_that_there_are(
    kind: str, key: str, name: str, there: str
) -> None:
    with pytest.raises(UserError, match=f"{key}: {name} not found in the model. {there}"):
        apply(tiny_model(), kind, **{key: (name,)})


def test_an_adapter_needs_lora() -> None:
    with pytest.raises(
        UserError, match="adapter_name_or_path needs finetuning_type: lora or oft, not full"
    ):
        apply(tiny_model(), "full", ("somewhere",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters that change the model."""
    paths = []
    for i in range(2):
        model = apply(tiny_model(), "lora", lora_target=("q_proj", "up_proj"), lora_rank=2 + i)
        generator = torch.Generator().manual_seed(i)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = torch.randn(p.shape, generator=generator) * 0.1
        paths.append(str(tmp_path_factory.mktemp("adapter")))
        model.save_pretrained(paths[-1])
    return paths


def merged(paths: list[str]) -> Any:
    from peft import PeftModel

    model: Any = tiny_model()
    for path in paths:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model


def test_the_last_adapter_is_trained_on_and_those_before_it_are_merged(saved: list[str]) -> None:
    one = apply(tiny_model(), "lora", (saved[0],))
    assert (
        one.peft_config["default"].r == 2
        and all("lora_" in n for n in trained(one))
        and trained(one)
    )
    torch.testing.assert_close(logits(one), logits(merged(saved[:1])), rtol=1e-4, atol=1e-5)
    both = apply(tiny_model(), "lora", tuple(saved))
    assert both.peft_config["default"].r == 3 and trained(both)
    torch.testing.assert_close(logits(both), logits(merged(saved)), rtol=1e-4, atol=1e-5)
    assert (logits(both) - logits(one)).abs().max() > 1e-3


def test_an_adapter_that_is_not_there_is_a_letter(
    saved: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    cases = [
        (str(tmp_path / "empty"), "holds no adapter_config.json"),
        (str(tmp_path / "absent"), "there is no folder .*absent, and the hub gave no adapter"),
        ("saves/absent", "there is no folder saves/absent, and the hub gave no adapter"),
    ]
    for path, expected in cases:
        for paths in ((path,), (path, saved[0])):
            with pytest.raises(UserError, match=expected):
                apply(tiny_model(), "lora", paths)
    with pytest.raises(UserError, match="does not fit"):
        apply(tiny_model(hidden_size=32), "lora", (saved[0],))


def test_an_adapter_that_lacks_tensors_is_refused(saved: list[str], tmp_path: Path) -> None:
    """PEFT makes them up, and warns."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved[0], tmp_path / "part")
    file = tmp_path / "part" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[-1]
    save_file({name: t for name, t in tensors.items() if name != lost}, file)
    with pytest.raises(
        UserError,
        match=r"adapter_name_or_path: .*part lacks 1 tensors that its adapter_config.json asks for",
    ):
        load_adapter(tiny_model(), str(file.parent))


def test_create_new_adapter_merges_all_and_begins_anew(saved: list[str]) -> None:
    model = apply(
        tiny_model(),
        "lora",
        tuple(saved),
        create_new_adapter=True,
        lora_rank=5,
        lora_target=("v_proj",),
    )
    assert model.peft_config["default"].r == 5
    assert all("v_proj.lora_" in n for n in trained(model)) and trained(model)
    torch.testing.assert_close(logits(model), logits(merged(saved)), rtol=1e-4, atol=1e-5)


def test_adapters_of_a_model_that_is_not_trained_are_merged(saved: list[str]) -> None:
    model = apply(tiny_model(), "lora", tuple(saved), is_trainable=False)
    assert not any("lora_" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), logits(merged(saved)), rtol=1e-4, atol=1e-5)


def test_trained_weights_become_fp32_and_frozen_ones_stay() -> None:
    model = apply(tiny_model(dtype=torch.bfloat16), "lora", lora_target=("q_proj",))
    cast_trainable(model)
    for p in model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    tied = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    cast_trainable(tied)
    assert (
        tied.lm_head.weight is tied.get_input_embeddings().weight
        and tied.lm_head.weight.dtype == torch.float32
    )


def test_counts() -> None:
    model = apply(tiny_model(), "lora", lora_target=("q_proj",), lora_rank=2)
    base = sum(p.numel() for p in tiny_model().parameters())
    assert count_parameters(model) == (2 * 2 * (64 + 64), base + 2 * 2 * (64 + 64))


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """A tiny model with a vision tower. Its attention layers have the same leaf names in the tower
    and in the decoder.
    """
    from longfactory_dev.tiny_models import tiny_model as tiny

    return tiny("gemma3", torch.float32)


def in_tower(names: Any) -> set[str]:
    return {n for n in names if "vision_tower" in n or "multi_modal_projector" in n}


@pytest.mark.parametrize(
    "keys",
    [{"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_trainable_layers": 99}],
)
def test_a_tower_is_frozen(gemma3: Any, keys: dict[str, Any]) -> None:
    model = copy.deepcopy(gemma3)
    found = trained(apply(model, keys.pop("finetuning_type"), **keys))
    assert found and not in_tower(found)
    assert in_tower(n for n, _ in model.named_parameters())
    assert decoder_layers(model)[0] == "model.language_model.layers"
    lines = [line for _, line in describe_trained(model)]
    idle = sum(p.numel() for n, p in model.named_parameters() if in_tower([n]))
    assert (
        f"model.vision_tower, model.multi_modal_projector: {idle:,} parameters are frozen"
        in lines[1]
    )


def test_freeze_trains_a_projector_that_is_not_frozen() -> None:
    """Its own layers are counted; the keys of the other parts are not ignored beside them."""
    model = vision_models.model("qwen2_5_vl", torch.float32)
    vision.let_in(model)
    keys: dict[str, Any] = {"freeze_trainable_layers": 1, "freeze_multi_modal_projector": False}
    names = trained(apply(model, "freeze", **keys))
    layer = {n for n in names if "language_model.layers.3." in n}
    assert layer and names - layer == {
        n for n, _ in model.named_parameters() if n.startswith("model.visual.merger.")
    }
    with pytest.raises(UserError, match=r"nothing of the tower \(model.visual\) would be trained"):
        apply(model, "freeze", **keys, freeze_vision_tower=False)
    keys |= {"freeze_vision_tower": False, "freeze_extra_modules": ("patch_embed",)}
    assert "model.visual.patch_embed.proj.weight" in trained(apply(model, "freeze", **keys))


@pytest.mark.parametrize("target", [("all",), ("q_proj", "v_proj")])
def test_lora_stays_out_of_a_tower(gemma3: Any, target: tuple[str, ...]) -> None:
    model = apply(copy.deepcopy(gemma3), "lora", lora_target=target)
    found = trained(model)
    assert found and not in_tower(found)
    assert ("4 x q_proj" in describe_trained(model)[2][1]) and (
        ("o_proj" in describe_trained(model)[2][1]) == (target == ("all",))
    )
    saved = apply(
        copy.deepcopy(gemma3), "lora", lora_target=("q_proj",), additional_target=("v_proj",)
    )
    assert any(
        n.endswith("modules_to_save.default.weight") for n in trained(saved)
    ) and not in_tower(trained(saved))


def test_what_text_does_not_pass_through_is_refused_by_name(gemma3: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"lora_target.*: out_proj cannot be trained on text: it lies in model.vision_tower",
    ):
        apply(copy.deepcopy(gemma3), "lora", lora_target=("q_proj", "out_proj"))
    with pytest.raises(
        UserError, match=r"freeze_extra_modules: multi_modal_projector cannot be trained on text"
    ):
        apply(copy.deepcopy(gemma3), "freeze", freeze_extra_modules=("multi_modal_projector",))


def test_routed_experts_without_an_adapter_are_told() -> None:
    model = tiny_model("qwen3_moe")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = 100 * experts / sum(p.numel() for p in model.parameters())
    level, line = describe_trained(apply(model, "lora", lora_experts=False))[-1]
    assert level == logging.WARNING and f"no adapter: {share:.0f} % of the parameters" in line
    told = str(describe_trained(apply(tiny_model(), "lora", lora_target=("all",))))
    assert "routed experts" not in told
    with pytest.raises(
        UserError, match=r"lora_target: mlp cannot all take an adapter.*Linear layers: .*q_proj"
    ):
        apply(tiny_model("qwen3_moe"), "lora", lora_target=("mlp",))


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_a_pissa_adapter_becomes_an_ordinary_one(keys: dict[str, Any], tmp_path: Path) -> None:
    """Of the untouched base weights, with the same outputs."""
    keys = {"lora_target": ("q_proj", "up_proj"), "lora_rank": 4, "pissa_init": True, **keys}
    model = apply(tiny_model(), "lora", **keys)
    start = pissa.start_of(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if "lora_" in name else None
    model.save_pretrained(tmp_path)
    folder = pissa.convert(tmp_path, start)
    plain = load_adapter(tiny_model(), str(folder))
    assert plain.peft_config["default"].r == 8
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(plain.unload()), logits(tiny_model()), rtol=0, atol=0)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "olora"])
def test_other_beginnings_of_lora_change_nothing_at_first(start: str, tmp_path: Path) -> None:
    """And an adapter that is saved loads as it was, whatever it took out of the base weights."""
    keys = {"lora_target": ("q_proj",), "lora_rank": 4, "init_lora_weights": start}
    model = apply(tiny_model(), "lora", **keys)
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if "lora_" in name else None
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny_model(), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_oft_turns_the_inputs_of_linear_layers(tmp_path: Path) -> None:
    """It begins as the model, is saved under PEFT's names and can be merged."""
    model = apply(tiny_model(), "oft", oft_block_size=8)
    names = {n.split(".")[-4] for n in trained(model)}
    assert names == LINEAR and all(".oft_R.default." in n for n in trained(model))
    torch.testing.assert_close(logits(model), logits(tiny_model()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if "oft_R" in name else None
    moved = logits(model)
    assert float((moved - logits(tiny_model())).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {adapter_name(n) for n in trained(model)}
    again = load_adapter(tiny_model(), str(tmp_path))
    torch.testing.assert_close(logits(again), moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(again.merge_and_unload()), moved, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("copied", [("embed_tokens",), ("embed_tokens", "lm_head"), ()])
def test_a_trained_copy_of_a_tied_embedding_stays_apart(copied: tuple[str, ...]) -> None:
    """And LoRA on one of the two: accelerate ties weights again while it shards for FSDP2."""
    model = apply(
        tiny_model(tie_word_embeddings=True),
        "lora",
        lora_target=("q_proj",) if copied else ("lm_head",),
        additional_target=copied,
    )
    refuse_sharded_ties(model)
    before = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    model.tie_weights()
    after = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    assert before.keys() == after.keys()
    assert all(p is after[n] for n, p in before.items())


def test_modules_that_are_trained_whole_are_counted_once() -> None:
    """PEFT keeps their originals beside them, which are no part of the model."""
    model = tiny_model(tie_word_embeddings=True)
    numbers = sum(p.numel() for p in model.parameters())
    adapted = apply(
        model, "lora", lora_target=("q_proj",), additional_target=("embed_tokens", "lm_head")
    )
    _, (_, with_adapter), (_, bare) = describe_trained(adapted)
    assert f"of the model's {numbers:,} parameters" in with_adapter
    assert "original_module" not in bare and "embed_tokens" not in bare


def test_oft_takes_layers_and_not_stacked_experts() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(UserError, match="OFT has no adapters for parameters"):
        apply(model, "oft", oft_target=("experts.down_proj",))
    adapted = apply(tiny_model("qwen3_moe"), "oft", oft_block_size=8)
    assert not any("experts" in n for n in trained(adapted))
    said = [line for _, line in describe_trained(adapted)]
    assert any("routed experts carry no adapter" in line for line in said)


def written_adapter(folder: Path, **keys: Any) -> Any:
    """An adapter that PEFT saved, of random numbers, on a model with tied embeddings."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **keys)
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]]
)
def test_lora_on_one_of_two_tied_weights_is_merged_into_that_one(
    targets: list[str], keep: bool, tmp_path: Path
) -> None:
    """PEFT adds it to both. The merged model is saved and loads with two weights, or with one
    where the adapter keeps them equal.
    """
    adapted = written_adapter(
        tmp_path / "adapter", target_modules=targets, ensure_weight_tying=keep
    )
    merged = merge_adapter(
        tiny_model(tie_word_embeddings=True), str(tmp_path / "adapter"), safe_merge=True
    )
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == keep
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings == keep
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-5, atol=1e-6)


def test_an_adapter_that_trains_single_tokens_goes_on(tmp_path: Path) -> None:
    """PEFT's `trainable_token_indices`."""
    adapted = written_adapter(
        tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[5, 6]
    )
    model = apply(
        tiny_model(tie_word_embeddings=True, attn=hf.ATTENTION),
        "lora",
        (str(tmp_path / "adapter"),),
    )
    check_saveable(model, None)
    with pytest.raises(UserError, match=r"trainable_token_indices trains .* Use sharding: ddp"):
        refuse_sharded_ties(model)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    guard(model, ctx)
    model.save_pretrained(tmp_path / "again")
    merged = merge_adapter(tiny_model(tie_word_embeddings=True), str(tmp_path / "again"))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)
