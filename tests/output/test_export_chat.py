"""What is exported is the model that was trained, as plain Hugging Face files; and it can be talked
to.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from longfactory import cli
from longfactory.config import load_config
from longfactory.errors import UserError
from longfactory.model.generate import attention_with_cache
from longfactory.output.chat import chat
from longfactory.output.export import export
from longfactory.output.load import load, load_tokenizer, refuse_stretched, with_positions
from longfactory_dev.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("as_a_command")

WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "user",
    "assistant",
    "system",
    "hello",
    "world",
    "be",
    "short",
    "again",
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt"
    " %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    made.chat_template = TEMPLATE
    return made


def tiny(hidden: int = 16, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), hidden_size=hidden, max_position_embeddings=64, **sizes)
    )


def adapt(
    model: Any, path: Path, seed: int, targets: Sequence[str] = ("q_proj", "down_proj")
) -> None:
    torch.manual_seed(seed)
    get_peft_model(
        model, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    adapt(tiny(), root / "a", 1)
    adapt(tiny(), root / "b", 2, ("v_proj", "down_proj"))
    adapt(tiny(hidden=32), root / "wider", 3)
    return root


def words(folder: Path, **keys: Any) -> list[str]:
    return [f"model_name_or_path={folder / 'base'}", *(f"{k}={v}" for k, v in keys.items())]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(len(WORDS))[None]).logits


def test_exported_weights_are_the_merged_ones(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "export",
                *words(
                    folder, adapter_name_or_path=f"{folder / 'a'},{folder / 'b'}", export_dir=out
                ),
            ]
        )
        == 0
    )
    want = PeftModel.from_pretrained(tiny(), folder / "a").merge_and_unload()
    want = PeftModel.from_pretrained(want, folder / "b")
    got = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits(got), logits(want), atol=1e-6)
    assert not torch.allclose(logits(got), logits(tiny()), atol=1e-3)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(
    ("place", "keys"),
    [
        ("adapter", {}),
        ("adapter/checkpoint-3", {}),
        ("adapter", {"rope_scaling": "yarn"}),
        ("adapter", {"rope_scaling": "yarn", "cutoff_len": 250}),
    ],
)
def test_an_adapter_is_merged_into_the_positions_that_it_was_trained_with(
    place: str, keys: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Its files do not say them; the run's keys, which lie beside it, do."""
    adapter = tmp_path / place
    adapt(tiny(), adapter, 1)
    (tmp_path / "adapter" / "longfactory.yaml").write_text("rope_scaling: yarn\ncutoff_len: 250\n")
    out = export(
        load_config(
            words(folder, adapter_name_or_path=adapter, export_dir=tmp_path / "out", **keys),
            command="export",
        )
    )
    stretched = AutoModelForCausalLM.from_pretrained(out)
    assert stretched.config.rope_parameters["factor"] == 4.0
    config = tiny().config
    config.rope_parameters |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    want = LlamaForCausalLM(config)
    want.load_state_dict(tiny().state_dict())
    want = PeftModel.from_pretrained(want, adapter)
    assert torch.allclose(logits(stretched), logits(want), atol=1e-6)
    assert not torch.allclose(logits(stretched), logits(PeftModel.from_pretrained(tiny(), adapter)))


def test_an_adapter_is_used_where_its_own_run_stretched_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(tiny(), tmp_path / "adapter", 1)
    (tmp_path / "adapter" / "longfactory.yaml").write_text("rope_scaling: yarn\ncutoff_len: 64\n")
    run = load_config(words(folder, adapter_name_or_path=tmp_path / "adapter"), command="chat")
    loaded, _ = load(run, torch.device("cpu"))
    want = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(want), rtol=0, atol=1e-5)
    assert "rope_scaling: yarn has no effect" in caplog.text


def test_another_template_than_that_of_the_training_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(tiny(), tmp_path, 1)
    (tmp_path / "longfactory.yaml").write_text("template: qwen\n")
    for template, told in (("qwen", 0), ("chatml", 1)):
        load_tokenizer(
            load_config(
                words(folder, adapter_name_or_path=tmp_path, template=template), command="chat"
            )
        )
        assert caplog.text.count("was trained with qwen: its answers may not end") == told


def test_positions_that_an_adapter_was_trained_with_are_not_lost(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(**keys: Any) -> Any:
        given = words(folder, adapter_name_or_path=folder / "a", export_dir=tmp_path / "o", **keys)
        return load_config(given, command="export")

    with pytest.raises(UserError, match=r"yarn has no effect.* that of the run that trained"):
        export(run(rope_scaling="yarn", cutoff_len=64))
    with pytest.raises(UserError, match=r"vLLM's server reads the model's own positions, without"):
        refuse_stretched(run(rope_scaling="yarn", cutoff_len=128), "vLLM's server")
    refuse_stretched(run(), "vLLM's server")
    refuse_stretched(run(rope_scaling="yarn", cutoff_len=64), "vLLM's server")
    adapt(tiny(), tmp_path / "adapter", 1)
    (tmp_path / "adapter" / "longfactory.yaml").write_text("rope_scaling: yarn\ncutoff_len: 250\n")
    other = with_positions(
        load_config(
            words(folder, adapter_name_or_path=tmp_path / "adapter", rope_scaling="linear"),
            command="chat",
        )
    )
    assert other.model.rope_scaling == "linear"
    assert "rope_scaling: linear, but" in caplog.text and "trained with yarn" in caplog.text


def test_format_and_template(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    out = export(
        load_config(
            words(folder, export_dir=tmp_path / "out", infer_dtype="bfloat16", template="chatml"),
            command="export",
        )
    )
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    saved = AutoTokenizer.from_pretrained(out)
    assert (
        saved.eos_token == "<|im_end|>"
        and "<|im_start|>" in saved.chat_template
        and saved.padding_side == "left"
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [
        2,
        saved.eos_token_id,
    ]


def test_value_head_goes_along(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapt(tiny(), adapter, 1)
    save_file({"v_head.summary.weight": torch.ones(1, 16)}, adapter / "value_head.safetensors")
    out = export(
        load_config(
            words(folder, adapter_name_or_path=adapter, export_dir=tmp_path / "out"),
            command="export",
        )
    )
    assert (out / "value_head.safetensors").is_file()


def test_a_generation_config_that_transformers_would_not_save(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    tokenizer().save_pretrained(base)
    (base / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    )
    out = export(
        load_config(
            [f"model_name_or_path={base}", f"export_dir={tmp_path / 'out'}"], command="export"
        )
    )
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_all_of_the_checkpoint_is_exported_and_the_folder_is_what_is_pushed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    tokenizer().save_pretrained(base)
    extra = {
        "mtp.norm.weight": torch.ones(3, dtype=torch.bfloat16),
        "model.layers.2.eh_proj.weight": torch.arange(4.0),
    }
    save_file(
        load_file(base / "model.safetensors") | extra,
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    (base / "preprocessor_config.json").write_text("{}")
    pushed: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, name: str, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            pushed.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = tmp_path / "out"
    keys = [
        f"model_name_or_path={base}",
        f"adapter_name_or_path={folder / 'a'}",
        f"export_dir={out}",
        "export_hub_model_id=it",
    ]
    with pytest.raises(UserError, match=r"me/it could not be pushed \(no route\). The model is in"):
        export(load_config(keys, command="export"))
    held = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert held.keys() == load_file(base / "model.safetensors").keys()
    assert all(
        torch.equal(held[name], t) and held[name].dtype == t.dtype for name, t in extra.items()
    )
    assert (
        pushed == [("me/it", sorted(p.name for p in out.iterdir()))]
        and "preprocessor_config.json" in pushed[0][1]
    )


def test_refused(folder: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "something").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"export_dir": folder / "base"}, "is the folder that the model is read from"),
        ({"export_dir": used}, "exists and is not empty"),
        (
            {"export_dir": tmp_path / "o", "adapter_name_or_path": folder / "base"},
            "holds no adapter_config.json",
        ),
        ({"export_dir": tmp_path / "o", "adapter_name_or_path": folder / "wider"}, "does not fit"),
        ({"export_dir": tmp_path / "o", "adapter_name_or_path": folder / "absent" / "x"}, "x"),
        (
            {
                "export_dir": tmp_path / "o",
                "adapter_name_or_path": folder / "wider",
                "train_from_scratch": True,
            },
            "creates new random weights",
        ),
    ]
    for keys, expected in cases:
        with pytest.raises(UserError) as e:
            export(load_config(words(folder, **keys), command="export"))
        assert expected in str(e.value)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.part").exists()


def test_nothing_is_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError):
        export(load_config(words(folder, export_dir=tmp_path / "out"), command="export"))
    assert list(tmp_path.iterdir()) == []


def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], **keys: Any) -> None:
    said: Iterator[str] = iter(lines)

    def line(prompt: str = "") -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", line)
    chat(
        load_config(
            words(folder, **{"max_new_tokens": 4, "do_sample": "false", **keys}), command="chat"
        )
    )


def test_a_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(
        folder,
        monkeypatch,
        ["hello", "", "world", "\ud83d", "clear", "hello", "exit", "never said"],
        adapter_name_or_path=folder / "a",
    )
    out = capsys.readouterr().out
    answers = [part.split("\n")[0] for part in out.split("Assistant: ")[1:]]
    assert len(answers) == 4 and "forgotten" in out
    assert answers.pop(2).startswith("(not answered: half of a character")
    # After `clear` the first question has its first answer again, and that is the merged model's
    # own.
    assert answers[0] == answers[2]
    model = PeftModel.from_pretrained(tiny(), folder / "a").merge_and_unload()
    ids = tokenizer().apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert (
        answers[0].strip()
        == tokenizer().decode(want[0, ids.shape[1] :], skip_special_tokens=True).strip()
    )


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_families_that_pytorch_s_attention_cannot_compute(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sinks and soft-caps: the model's own attention answers, and exporting loads it too. For
    Gemma 2 transformers before 5.21 takes PyTorch's, which leaves the soft-cap out.
    """
    model = tiny_model(family, dtype=torch.float32)
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    with attention_with_cache(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation(before)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "a", 1, ("q_proj", "o_proj"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    trained = PeftModel.from_pretrained(base, tmp_path / "a")
    named = words(tmp_path, adapter_name_or_path=tmp_path / "a")
    loaded, _ = load(load_config(named, command="chat"), torch.device("cpu"))
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=1e-5)
    assert cli.main(["export", *named, f"export_dir={tmp_path / 'out'}"]) == 0
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(logits(got), logits(trained), rtol=0, atol=1e-5)
    talk(tmp_path, monkeypatch, ["hello"], adapter_name_or_path=tmp_path / "a")
    assert "Assistant: " in capsys.readouterr().out


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> dict[str, Any]:
    """What the model is given to answer "hello"."""
    seen: list[dict[str, Any]] = []

    def generate(self: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return torch.cat([kwargs["input_ids"], torch.tensor([[9]])], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    talk(folder, monkeypatch, ["hello"], **keys)
    return seen[0]


def test_a_template_that_was_named_is_the_one_that_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asked(folder, monkeypatch)
    assert (
        own["input_ids"].tolist()
        == tokenizer()("user hello assistant", return_tensors="pt")["input_ids"].tolist()
    )
    # the tokenizer's, and that of the model's generation settings
    assert own["eos_token_id"] == [1, 2]
    chatml = asked(folder, monkeypatch, template="chatml", default_system="be short")
    text = (
        "<|im_start|>system\nbe"
        " short<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    with_tokens = tokenizer()
    with_tokens.add_special_tokens(
        {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    )
    assert chatml["input_ids"].tolist() == [with_tokens.encode(text, add_special_tokens=False)]
    assert chatml["eos_token_id"] == [2, WORDS.index("<|im_start|>"), WORDS.index("<|im_end|>")]


def test_beams_system_and_end_of_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(folder, monkeypatch, ["hello"], num_beams=2, default_system="be short", template="chatml")
    assert capsys.readouterr().out.count("Assistant: ") == 1


def test_no_room_for_an_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        talk(folder, monkeypatch, ["hello world hello world"], max_length=3, max_new_tokens=0)
