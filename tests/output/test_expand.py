"""Block expansion: the expanded model computes what the model did, and the layers that were added
are those that `use_llama_pro` trains.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from longfactory import cli
from longfactory.config.arguments import FinetuningArguments, ModelArguments
from longfactory.errors import UserError
from longfactory.model.adapters import apply_finetuning
from longfactory.output.expand import expand
from longfactory.testing import tiny_model

IDS = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_the_expanded_model_is_the_model(family: str, tmp_path: Path) -> None:
    """In shards of any size; per-layer lists of the configuration grow too."""
    model = tiny_model(family, num_hidden_layers=4).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert expand(tmp_path / "model", tmp_path / "grown", 2, shard_bytes=20_000) == 6
    assert (tmp_path / "grown" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "grown").glob("model-*.safetensors"))) > 2
    grown = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grown", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            grown(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-6, atol=1e-6
        )
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert len(config.get("layer_types") or range(6)) == 6

    method = FinetuningArguments(
        finetuning_type="freeze", use_llama_pro=True, freeze_trainable_layers=2
    )
    apply_finetuning(grown, method, ModelArguments())
    trained = {
        n.split("layers.")[1].split(".")[0] for n, p in grown.named_parameters() if p.requires_grad
    }
    assert trained == {"2", "5"}
    zero = [n for n, p in grown.named_parameters() if p.ndim > 1 and not p.any()]
    assert zero and {n.split("layers.")[1].split(".")[0] for n in zero} == {"2", "5"}


@pytest.mark.usefixtures("as_a_command")
def test_the_command_says_how_the_layers_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    keys = {"model_name_or_path": tmp_path / "model", "export_dir": tmp_path / "grown"}
    assert cli.expand([f"{k}={v}" for k, v in keys.items()] + ["num_expand=1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("A model of 3 layers is in ")
    assert "use_llama_pro: true, freeze_trainable_layers: 1" in err


def test_what_cannot_be_expanded_is_a_sentence(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"num_expand: 3 does not divide the 4 layers .* 1, 2, 4"):
        expand(tmp_path / "model", tmp_path / "grown", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "gguf").mkdir()  # as of a model in one GGUF file
    with pytest.raises(UserError, match=r"no config.json, expected .*: longfactory export"):
        expand(tmp_path / "gguf", tmp_path / "grown", 2)
    with pytest.raises(UserError, match=r"expand: got num_expand=2 use_cpu=true, expected"):
        cli.expand(["num_expand=2", "use_cpu=true"])
    with pytest.raises(UserError, match="exists and is not empty"):
        expand(tmp_path / "model", tmp_path / "full", 2)
    tiny_model("gpt2", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"cannot be expanded"):
        expand(tmp_path / "other", tmp_path / "grown", 2)
