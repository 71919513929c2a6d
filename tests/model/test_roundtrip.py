"""Load, train a step, save, and reload in plain transformers (and PEFT): every tensor of the
checkpoint's files is back, as the same class.

Whole runs in this process, one for each architecture of docs/models.md, with the start-up
comparison left out (tests/sp has it).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longfactory.sp.text_model import idle
from longfactory_dev.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
import cpu_sharding  # noqa: E402

pytestmark = pytest.mark.processes

SHORT = ["gemma3", "qwen3_5"]
UNLOADED = "mtp.fc.weight"
"""A tensor of the file that transformers' classes have no place for, as the next-token layers of
DeepSeek, GLM and Qwen are.
"""
# Their tiny checkpoints do not come back from plain transformers' own save and load (tested below),
# so a run's cannot either.
NOT_THEIR_OWN: set[str] = set()


def exact_families() -> list[str]:
    page = (ROOT / "docs" / "models.md").read_text().split("## Refused")[0]
    return [
        name
        for name in re.findall(r"^\| (\S+) \|", page, re.MULTILINE)
        if name not in ("model", "---")
    ]


def write_tokenizer(folder: Path) -> None:
    """A token for each printable letter: fewer than the tiny models' 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(chr(i) for i in range(33, 127)),
        "Ġ",
        "Ċ",
    ]
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    raw.add_special_tokens(letters[:3])
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=letters[0], pad_token=letters[0]
    )
    made.save_pretrained(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("roundtrip")
    rows = [{"instruction": "abc def " * n, "output": "g h i " * n} for n in (2, 3)]
    (home / "talks.json").write_text(json.dumps(rows))
    (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
    return home


def checkpoint(home: Path, family: str) -> tuple[Path, type]:
    """A tiny checkpoint as transformers saves it, with one more tensor in its file; and its class."""
    folder = home / family
    if not (folder / "config.json").exists():
        model = tiny_model(family, torch.float32)
        model.save_pretrained(folder)
        write_tokenizer(folder)
        (file,) = folder.glob("*.safetensors")
        save_file({**load_file(file), UNLOADED: torch.randn(3, 5)}, file, metadata={"format": "pt"})
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return folder, getattr(transformers, named)


def train(home: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """One step of a run. Returns the trained model and the output folder."""
    from longfactory.config import from_mapping
    from longfactory.train import run as module

    monkeypatch.setenv("LONGFACTORY_CACHE", str(home / "cache"))
    monkeypatch.setattr(module, "prove_exact", lambda trainer: None)
    monkeypatch.setattr(module, "_set_up_log", lambda main: None)
    cpu_sharding.reset()
    seen: list[Any] = []
    make = module.make_trainer
    monkeypatch.setattr(
        module, "make_trainer", lambda *a, **k: seen.append(make(*a, **k)) or seen[-1]
    )
    out = home / f"{family}_{kind}"
    given: dict[str, Any] = {
        "model_name_or_path": str(home / family),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": kind,
        "dataset": "talks",
        "dataset_dir": str(home),
        "template": "chatml",
        "cutoff_len": 96,
        "output_dir": str(out),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "overwrite_output_dir": True,
        "optim": "adamw_torch",
        **({"lora_rank": 2, "lora_target": "all"} if kind == "lora" else {}),
    }
    module.run(from_mapping(given))
    return seen[0].accelerator.unwrap_model(seen[0].model), out


def logits(model: Any) -> Tensor:
    """With the model's own attention. Outside its labels the output layer is the model's own too."""
    from longfactory.sp import hf

    inner = hf.unwrap(model).eval()
    inner.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits[0].float()


def reloaded(cls: Any, folder: Path) -> Any:
    model, found = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert set(found["unexpected_keys"]) <= {UNLOADED}
    return model


def check_full(home: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cls = checkpoint(home, family)
    trained, out = train(home, family, "full", monkeypatch)
    before, after = tensors(folder), tensors(out)
    assert after.keys() == before.keys()
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert torch.equal(after[UNLOADED], before[UNLOADED])
    assert json.loads((out / "config.json").read_text())["architectures"] == [cls.__name__]
    model = reloaded(cls, out)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)
    first = reloaded(cls, folder)
    assert not torch.allclose(logits(first), logits(model), atol=1e-4), "a step changes the model"
    frozen = idle(model).parameters
    old, new = dict(first.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(old[n], new[n]) for n in frozen if n in old)
    same = [n for n in old if n not in frozen and torch.equal(old[n], new[n])]
    assert len(same) < len(old) - len(frozen)
    tied = [first.get_output_embeddings().weight is first.get_input_embeddings().weight]
    assert tied == [model.get_output_embeddings().weight is model.get_input_embeddings().weight]


def check_lora(home: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    folder, cls = checkpoint(home, family)
    trained, out = train(home, family, "lora", monkeypatch)
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    base = reloaded(cls, folder)
    plain = logits(base)
    model = PeftModel.from_pretrained(base, out)
    assert sum("lora_" in n for n, _ in model.named_parameters()) == len(saved) > 0
    frozen = idle(base)
    assert not [n for n, _ in base.named_modules() if "lora_" in n and n in frozen]
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, logits(model), atol=1e-6)


CHECKS = {"full": check_full, "lora": check_lora}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("family", SHORT)
def test_roundtrip(home: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[kind](home, family, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("family", [f for f in exact_families() if f not in SHORT])
def test_roundtrip_of_every_family(
    home: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHECKS[kind](home, family, monkeypatch)
