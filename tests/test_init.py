"""`longfactory init`, `schema` and `completion`: what they write is what the run's reader takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from longfactory import cli, resources
from longfactory.config import load_config
from longfactory.config.arguments import GROUPS
from longfactory.config.fields import keys_of
from longfactory.config.schema import schema
from longfactory.errors import UserError
from longfactory.init import DEMO_MODEL, STAGES, most_tokens

pytestmark = pytest.mark.usefixtures("as_a_command")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("more", [[], ["--lora"]])
def test_what_init_writes_is_a_run(stage: str, more: list[str], tmp_path: Path) -> None:
    assert cli.main(["init", stage, *more]) == 0
    cfg = load_config([f"{stage}.yaml"])
    assert cfg.method.stage == stage and cfg.notes == ()
    assert cfg.method.finetuning_type == ("lora" if more else "full")
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    (name,) = cfg.data.dataset
    assert cfg.model.model_name_or_path == DEMO_MODEL and name.startswith("manual_")
    assert (tmp_path / "data" / info[name]["file_name"]).is_file()
    text = (tmp_path / f"{stage}.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 110 and text.count("#") > 10
    # nothing that is there is overwritten
    assert cli.main(["init", stage]) == 2
    assert cli.main(["init", stage, "--force"]) == 0


def test_init_for_a_file_of_ones_own(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Why? " * 40}]} for _ in range(3)]
    for row in rows:
        row["conversations"].append({"from": "gpt", "value": "So."})
    rows[1]["conversations"][0]["value"] *= 300  # one long document
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["init", "sft", "--model", "org/model", "--data", "mine/chats.jsonl", "--out", "a.yaml"]
    assert cli.main(words) == 0
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert info == {
        "chats": {
            "file_name": "../mine/chats.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations"},
        }
    }
    cfg = load_config(["a.yaml"])
    assert cfg.model.model_name_or_path == "org/model" and cfg.data.dataset == ("chats",)
    assert cfg.data.cutoff_strategy == "keep_tail"
    # 60,000 characters: as many tokens fit as they can be
    assert 60_000 / 3 < cfg.cutoff_len < 60_000 / 2 and cfg.cutoff_len % 1024 == 0
    # by the name that dataset_info.json has
    assert cli.main(["init", "sft", "--data", "chats", "--out", "b.yaml"]) == 0
    # other data of that name
    (tmp_path / "chats.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    assert cli.main(["init", "sft", "--data", "chats.jsonl", "--out", "c.yaml"]) == 2
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # as SmolLM2's tokenizer counts them
        ("Record 7: box 7 stands in room 91 and weighs 49 kg.\n" * 100, 2100),
        ("机器学习是人工智能的一个分支。" * 50, 1150),
        (
            "Die Donaudampfschifffahrtsgesellschaft hat größere Veränderungen angekündigt. " * 30,
            961,
        ),
        ("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG; SEE SECTION IX. " * 40, 1041),
        ("What is a list? It is a sequence of things in their order. " * 40, 601),
    ],
)
def test_tokens_of_a_text_are_estimated_from_above(text: str, tokens: int) -> None:
    assert tokens <= most_tokens(text) < 2.5 * tokens


@pytest.mark.parametrize(
    ("stage", "rows", "words"),
    [
        ("dpo", [{"instruction": "a", "output": "b"}], "Stage dpo needs pairs"),
        ("sft", [{"prompt": "a", "chosen": "b", "rejected": "c"}], "`longfactory init dpo`"),
        ("pt", [{"instruction": "a", "output": "b"}], "Stage pt needs texts"),
        ("sft", [{"x": 1}], "the format of its rows was not recognised (columns: x)"),
        ("sft", None, "there is no such file, and no data set of this name"),
    ],
)
def test_data_of_another_kind_are_refused(
    stage: str, rows: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["init", stage, "--data", "d.jsonl"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / f"{stage}.yaml").exists() and not (tmp_path / "data").exists()


def test_the_examples_come_with_the_package(tmp_path: Path) -> None:
    assert cli.main(["init", "examples"]) == 0
    for name in ("examples/deepspeed/ds_z3_config.json", "examples/quickstart.yaml"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert (tmp_path / "data" / "manual_sft.json").is_file()
    (tmp_path / "examples" / "sft_full.yaml").write_text("mine")
    assert resources.copy_all(tmp_path) == ([], [tmp_path / "examples" / "sft_full.yaml"])
    assert (tmp_path / "examples" / "sft_full.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="no folder nothing"):
        resources.folder("nothing")


def test_the_quickstart_finds_its_data_where_others_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """dataset_info.json is there: of `longfactory init sft`, and with data of one's own."""
    (tmp_path / "mine.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    assert cli.main(["init", "sft", "--data", "mine.jsonl", "--out", "mine.yaml"]) == 0
    assert cli.main(["init", "sft"]) == 0
    listed = tmp_path / "data" / "dataset_info.json"
    before = json.loads(listed.read_text()) | {"manual_dpo": {"file_name": "another.json"}}
    listed.write_text(json.dumps(before))
    capsys.readouterr()
    assert cli.main(["init", "examples"]) == 0
    said = capsys.readouterr().out
    after, ours = json.loads(listed.read_text()), resources.data_sets()
    assert after == ours | before and set(before) == {"mine", "manual_sft", "manual_dpo"}
    assert "Added to data/dataset_info.json: manual_sft_eval, manual_sft_eval_2" in said
    assert "the names of the demo data, which are kept: manual_dpo." in said
    cfg = load_config(["examples/quickstart.yaml"])
    assert {*cfg.data.dataset, *cfg.data.eval_dataset} <= set(after)
    assert cli.main(["init", "examples"]) == 0
    assert "Added" not in capsys.readouterr().out and json.loads(listed.read_text()) == after


def accepts(rule: dict[str, Any], value: Any) -> bool:
    """The part of JSON schema that ours uses."""
    kinds = {
        "boolean": bool,
        "string": str,
        "null": type(None),
        "object": dict,
        "array": list,
        "number": (int, float),
    }
    if "anyOf" in rule:
        return any(accepts(part, value) for part in rule["anyOf"])
    if "enum" in rule:
        return any(value == choice and type(value) is type(choice) for choice in rule["enum"])
    names = rule.get("type", list(kinds))
    names = [names] if isinstance(names, str) else names
    if isinstance(value, bool):
        return "boolean" in names
    if not any(isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, list):
        return all(accepts(rule.get("items", {}), item) for item in value)
    if isinstance(value, (int, float)):
        return (
            value >= rule.get("minimum", value)
            and value <= rule.get("maximum", value)
            and ("exclusiveMinimum" not in rule or value > rule["exclusiveMinimum"])
            and ("exclusiveMaximum" not in rule or value < rule["exclusiveMaximum"])
            and ("multipleOf" not in rule or value % rule["multipleOf"] == 0)
        )
    return True


def test_every_example_is_what_the_schema_says() -> None:
    rules = schema()["properties"]
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        if path.parent.name == "cluster":  # of Kubernetes and SkyPilot
            continue
        for name, value in yaml.safe_load(path.read_text()).items():
            # PyYAML reads 1.0e-5 as a number and 1e-5 as text, as editors do not
            value = float(value) if isinstance(value, str) and value[:1].isdigit() else value
            assert accepts(rules[name], value), f"{path.name}: {name}: {value!r}"
    for cls in GROUPS.values():
        for name, key in keys_of(cls).items():
            default = list(key.default) if isinstance(key.default, tuple) else key.default
            assert accepts(rules[name], default) or default is None, name
    assert not accepts(rules["cutoff_len"], 0) and not accepts(rules["cutoff_len"], 1.5)
    assert not accepts(rules["stage"], "sf") and not accepts(rules["bf16"], "maybe")
    assert not accepts(rules["lora_dropout"], 1.0) and accepts(rules["lora_target"], "all")
    assert "hub_token" not in json.dumps(schema()) or "default" not in rules["hub_token"]


@pytest.mark.processes
def test_completion_completes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        line = script + (
            f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _longfactory"
            '; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("longfactory", "tr") == ["train"]
    assert completed("longfactory", "init", "d") == ["dpo"]
    assert "sequence_parallel_size=" in completed("longfactory", "train", "sequence_par")
    Path("run.yaml").touch()
    assert "run.yaml" in completed("longfactory", "train", "run")
    for shell in ("zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        assert "sequence_parallel_size" in capsys.readouterr().out
    assert cli.main(["completion", "tcsh"]) == 2


def test_the_command_is_shown_again_without_secrets() -> None:
    words = ["train", "a b.yaml", "hf_hub_token=x", "--hub_token", "y", "--bf16"]
    assert cli.command_line(words) == "train 'a b.yaml' hf_hub_token=... --hub_token ... --bf16"


def test_a_name_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "sft", "--data", "someone/chats"]) == 0
    assert "were not inspected" in capsys.readouterr().out
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert info == {"chats": {"hf_hub_url": "someone/chats"}}
    assert load_config(["sft.yaml"]).cutoff_len == 8192
