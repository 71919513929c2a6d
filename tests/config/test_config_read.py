"""Files, overrides and flags become one mapping; what stands further right wins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from longfactory.config.load import load_config
from longfactory.config.read import read, read_file
from longfactory.config.translate import is_switch
from longfactory.errors import ConfigError


def written(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_then_overrides_then_flags(tmp_path: Path) -> None:
    path = written(
        tmp_path, "learning_rate: 1e-4\nstage: sft\nlr_scheduler_kwargs: {min_lr: 1e-6, power: 2}\n"
    )
    values = read(
        [path, "stage=dpo", "lr_scheduler_kwargs.min_lr=1e-7", "--bf16", "--dataset", "a,b"],
        is_switch,
    )
    assert values == {
        "learning_rate": 1e-4,
        "stage": "dpo",
        "lr_scheduler_kwargs": {"min_lr": 1e-7, "power": 2},
        "bf16": True,
        "dataset": "a,b",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--do_train", "--stage", "sft"], {"do_train": True, "stage": "sft"}),
        (["--do_train", "True"], {"do_train": "True"}),
        (["--learning-rate=1e-5"], {"learning_rate": "1e-5"}),
        (["--no_use_fast_tokenizer"], {"use_fast_tokenizer": False}),
        (["--lora_target", "q_proj", "v_proj"], {"lora_target": ["q_proj", "v_proj"]}),
        (["--dry_run", "seed=1"], {"dry_run": True, "seed": 1}),
        (["--output_dir", "a=b"], {"output_dir": "a=b"}),
        (["--seed=1", "--local_rank=0"], {"seed": "1", "local_rank": "0"}),
        (["lora_target=[q,v]"], {"lora_target": ["q", "v"]}),
        (["report_to=none"], {"report_to": "none"}),
        (["max_samples=null"], {"max_samples": None}),
        (["model_name_or_path=/a/b=c"], {"model_name_or_path": "/a/b=c"}),
    ],
)
def test_words(words: list[str], expected: dict[str, Any]) -> None:
    assert read(words, is_switch) == expected


def test_deepspeed_s_launcher_writes_before_the_file(tmp_path: Path) -> None:
    assert read(["--local_rank=3", written(tmp_path, "seed: 2\n"), "stage=pt"], is_switch) == {
        "seed": 2,
        "stage": "pt",
    }


def test_json_file(tmp_path: Path) -> None:
    assert read([written(tmp_path, '{"seed": 3}', "run.json")], is_switch) == {"seed": 3}


def test_a_file_whose_name_has_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1e-4.yaml", str(tmp_path / "lora_rank=8.json"), "sft, a = 1.yml"):
        written(tmp_path, '{"stage": "dpo"}', Path(name).name)
        assert read([name], is_switch) == {"stage": "dpo"}
    assert read(["deepspeed=zero3.json"], is_switch) == {"deepspeed": "zero3.json"}
    assert read(["deepspeed=/else/zero3.json"], is_switch) == {"deepspeed": "/else/zero3.json"}


def test_environment_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVES", "/data")
    assert read_file(Path(written(tmp_path, "output_dir: ${oc.env:SAVES}/run\n"))) == {
        "output_dir": "/data/run"
    }


def test_a_key_twice(tmp_path: Path) -> None:
    assert read_file(Path(written(tmp_path, "template: qwen\ntemplate: qwen\n"))) == {
        "template": "qwen"
    }
    with pytest.raises(
        ConfigError, match=r"line 2: duplicate key template, with the values 'qwen' and 'llama3'"
    ):
        read_file(Path(written(tmp_path, "template: qwen\ntemplate: llama3\n")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- a\n- b\n", "holds no keys"),
        ("1: a\n", "the key 1 is not text"),
        ("a: ${nowhere}\n", "cannot be read"),
        ("a: 1\n  b: 2\n", "line 2"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        read([written(tmp_path, text)], is_switch)
    assert words in str(e.value)


def test_bad_words(tmp_path: Path) -> None:
    for words, expected in (
        (["absent.yaml"], "There is no file absent.yaml. `longfactory init sft"),
        (["absent/run.yaml"], "There is no file absent/run.yaml. There is no folder absent either"),
        (["learning_rate"], "'learning_rate' is not understood"),
        (["--learning_rate"], "--learning_rate needs a value"),
        (["a=[1"], "a=[1 cannot be read"),
    ):
        with pytest.raises(ConfigError) as e:
            read(words, is_switch)
        assert expected in str(e.value)


def test_a_file_of_a_similar_name_is_named(tmp_path: Path) -> None:
    """By its whole path, however long."""
    tmp_path = tmp_path / ("folder" * 20)
    tmp_path.mkdir()
    written(tmp_path, "a: 1")
    (there,) = tmp_path.iterdir()
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {there}?")):
        read_file(tmp_path / f"x{there.name}")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(path)


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "values, with what its anchors repeat; expected at most 100000"),
        ("a: &a [*a]\n", "recursive"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deep"),
        ("x" * 100000 + ": 1\n" + "y: [", "not valid YAML"),
        ("a: " + "9" * 5000, "cannot be read"),
    ],
    ids=["repeated", "itself", "nested", "long", "digits"],
)
def test_files_that_are_too_much(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        read([written(tmp_path, text)], is_switch)
    assert words in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: TOKEN\nhub_token: TOKEN2\n",
        "push_to_hub_token: TOKEN\nhub_token: TOKEN2\n",
        "hub_token: TOKEN: x\n",
        "hub_token: {TOKEN: [TOKEN]}\n",
        "hub_token: 'TOKEN\n",
        "hub_token: ${TOKEN\n",
        "ms_hub_token: TOKEN\n",
        "hf_hub_token: [TOKEN, 1]\n",
        "swanlab_api_key: {a: TOKEN}\n",
    ],
)
def test_secrets_are_in_no_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_config([written(tmp_path, text)])
    assert "TOKEN" not in str(e.value)


@pytest.mark.parametrize(
    "words", [["--hub_token", "a b", "TOKEN"], ["hub_token=a", "TOKEN"], ["hub_token=[TOKEN"]]
)
def test_secrets_are_in_no_message_of_words(words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        load_config(words)
    assert "TOKEN" not in str(e.value)


def test_names_of_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        read_file(tmp_path / ("x" * 300 + ".yaml"))
    with pytest.raises(ConfigError, match="There is no file"):
        read_file(tmp_path / "a\0b.yaml")
