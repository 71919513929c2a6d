"""`--write`, `--picture` and `--read-data`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from known_sizes import qwen_7b
from longfactory.config import load_config
from longfactory.config.read import read_file
from longfactory.errors import UserError
from longfactory.plan.command import DOES_NOT_FIT, FITS, main
from longfactory.plan.write import changed, write
from make_model import make_model
from small_runs import POOLS, home, keys, run_on_ranks  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    qwen_7b(architectures=["Qwen2ForCausalLM"]).save_pretrained(model)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"# my run\nmodel_name_or_path: {model}\nstage: sft\nfinetuning_type: full\n\ndataset: d\n"
        "template: qwen\noutput_dir: o\ncutoff_len: 65536\nbf16: true\n"
        "per_device_train_batch_size: 1\nsequence_parallel_size: 1  # not enough\n"
    )
    return path


def marked(out: str) -> list[str]:
    """The numbers of the run as it is, and of the best way."""
    found = re.search(r"^ (?:>\*| \*|\*) .*$", out, re.MULTILINE)
    best = re.search(r"^ >\*? .*$", out, re.MULTILINE)
    assert found is not None and best is not None
    return [line[0].lstrip(" >*") for line in (found, best)]


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "2xH100"],
        ["--gpus", "2xH100", "--host-gib", "512", "--gpu-gib", "40", "memory=long"],
        pytest.param(
            ["--gpus", "2xH100", "--gpu-gib", "32", "finetuning_type=lora", "lora_rank=8"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "offloaded", "lora"],
)
def test_the_written_file_plans_to_the_same_numbers(run: Path, words: list[str], capsys):
    target = run.with_name("out.yaml")
    assert main([str(run), *words, "--write", str(target)]) in (FITS, DOES_NOT_FIT)
    first = capsys.readouterr().out
    assert f"{target} is written" in first
    text = target.read_text()
    assert text.startswith("# my run\nmodel_name_or_path:") and "# not enough" in text
    options = [w for w in words if "=" not in w]
    assert main([str(target), *options]) == FITS
    again = capsys.readouterr().out
    own, best = marked(again)
    assert own == marked(first)[1] and best == own, again
    keys = read_file(target)
    assert keys["sequence_parallel_size"] in (1, 2) and keys["cutoff_len"] == 65536
    load_config([str(target), "--dry_run"])  # all keys are known


@pytest.mark.slow
@pytest.mark.processes
def test_the_written_file_trains(home: Path, capsys):  # noqa: F811
    source, target = home / "run.yaml", home / "chosen.yaml"
    words = keys(home, "chosen", packing=False, max_steps=2, cutoff_len=200)
    source.write_text(yaml.safe_dump(words))
    assert main([str(source), "--gpus", "2xL4", "memory=long", "--write", str(target)]) == FITS
    size = yaml.safe_load(target.read_text())["sequence_parallel_size"]
    POOLS[2].run(run_on_ranks, [str(target)], str(home / "cache"))
    trained = yaml.safe_load((home / "chosen" / "longfactory.yaml").read_text())
    written = yaml.safe_load(target.read_text())
    assert trained["sequence_parallel_size"] == size
    chosen = ["memory", "keep_attention", "offload_activations", "mlp_chunk", "segment_layers"]
    if written.get("disable_gradient_checkpointing"):
        chosen = ["memory", "disable_gradient_checkpointing"]
    assert {k: trained[k] for k in chosen} == {k: written[k] for k in chosen}
    state = json.loads((home / "chosen" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_lines_stay_where_they_are():
    text = 'a: 1 # one\n"memory": long\nlist:\n- x\n- y\n# end\nkeep_attention:\n  0.5\nb: 2\n'
    keys = {"memory": "auto", "list": [1, 2], "keep_attention": 1.0, "new": False}
    out = changed(text, keys, "longfactory plan x.yaml")
    assert out == (
        "a: 1 # one\nmemory: auto\nlist: [1, 2]\n# end\nkeep_attention: 1.0\nb: 2\n\n"
        "# chosen by: longfactory plan x.yaml\nnew: false\n"
    )
    assert yaml.safe_load(out) == {"a": 1, "b": 2, **keys}


def test_what_cannot_be_written_is_refused_at_once(run: Path):
    for words, sentence in (
        (["--picture", "x.bmp"], "ends in .png, .svg, .pdf"),
        (["--picture", "nowhere/x.svg"], "no folder nowhere"),
        (["--write", "nowhere/x.yaml"], "no folder nowhere"),
    ):
        with pytest.raises(UserError, match=sentence):
            main([str(run), *words])
    with pytest.raises(UserError, match="completes a run's file"):
        main(["7b", "--write", "x.yaml"])
    with pytest.raises(UserError, match="two formats"):
        write(run, run.with_suffix(".json"), {}, "")


def test_data_are_read_and_a_picture_is_drawn(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("LONGFACTORY_CACHE", str(tmp_path / "cache"))
    model = make_model("tiny", tmp_path / "model", vocabulary=600)
    picture = tmp_path / "plan.svg"
    words = [
        str(ROOT / "examples" / "sft_full.yaml"),
        f"model_name_or_path={model}",
        f"dataset_dir={ROOT / 'data'}",
        "max_samples=12",
        "cutoff_len=auto",
        "sequence_parallel_size=auto",
        *("--gpus", "2xL4"),
    ]
    assert main([*words, "--read-data", "--picture", str(picture)]) == FITS
    out = capsys.readouterr().out
    longest = re.search(r"cutoff_len: auto is ([0-9,]+), the longest sample of the data", out)
    rows = re.search(r"epoch: 12 rows, [0-9,]+ tokens, longest row ([0-9,]+); (\d+) steps", out)
    assert longest is not None and rows is not None and longest[1] == rows[1]
    assert "sequence_parallel_size: auto is 1" in out and rows[2] == str(-(-12 // 8))
    assert picture.read_text().lstrip().startswith("<?xml")
    assert main(words) == FITS
    assert "data not read (--read-data), the longest that fits" in capsys.readouterr().out


def test_json_stays_json(run: Path):
    source, target = run.with_suffix(".json"), run.with_name("out.json")
    source.write_text(json.dumps(yaml.safe_load(run.read_text())))
    write(source, target, {"cutoff_len": 4096}, "")
    assert json.loads(target.read_text()) == {**yaml.safe_load(run.read_text()), "cutoff_len": 4096}
