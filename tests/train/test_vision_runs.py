"""Whole runs on rows with images: sharded over two processes they take the steps of one, in every
stage, with the tower frozen, trained or under adapters; and what they save loads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import tiny_media
from longfactory import cli
from longfactory.data.media.images import steps_to_size
from longfactory.data.media.process import load_image_processor
from longfactory.testing import RankError
from small_runs import POOLS, keys, run_on_ranks, steps, train
from vision_runs import FAMILIES, TRAINED, of_run, write_data, write_model

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("as_a_command")]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("vision")
    for family in FAMILIES:
        write_model(home / family, family)
    write_data(home)
    yield home
    for pool in POOLS.values():
        pool.stop()


def run(home: Path, name: str, size: int, family: str = "qwen3_vl", **changes: Any) -> Any:
    return steps(train(home, name, size, **of_run(home, name, family, **changes)))


def same(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two) > 0
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=1e-6), key


KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "packed": {"packing": True, "per_device_train_batch_size": 1} | TRAINED,
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_share_prompt": True} | TRAINED,
    "dpo_unshared": {"stage": "dpo", "dataset": "pairs", "pref_share_prompt": False} | TRAINED,
    "dpo_ipo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "ipo"} | TRAINED,
    "orpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"} | TRAINED,
    "simpo": {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"} | TRAINED,
    "kto": {"stage": "kto", "dataset": "labels"} | TRAINED,
    "rm": {"stage": "rm", "dataset": "pairs"} | TRAINED,
    "pt": {"stage": "pt", "dataset": "texts"} | TRAINED,
    "projector": {"train_mm_proj_only": True},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 1e-2},
    "lora_tower": {"finetuning_type": "lora", "lora_rank": 4, "freeze_vision_tower": False},
    "text_too": {"dataset": "talks,words"} | TRAINED,
}


@pytest.mark.parametrize(
    "kind", ["packed", *(pytest.param(k, marks=slow) for k in KINDS if k != "packed")]
)
def test_vision_runs_sharded_are_those_of_one_process(home: Path, kind: str) -> None:
    changes = KINDS[kind]
    if kind.startswith("dpo") or kind == "kto":
        changes = changes | {"ref_model": home / "qwen3_vl"}
    one = run(home, f"{kind}1", 1, **changes)
    same(one, run(home, f"{kind}2", 2, **changes))
    if kind == "packed":
        check_saved(home, home / "packed2", ("",))
    if kind == "sft":
        check_saved(home, home / "sft2", ("language_model", "lm_head"))
    if kind == "projector":
        check_saved(home, home / "projector2", ("visual.merger.",))


def check_saved(home: Path, folder: Path, changed: tuple[str, ...]) -> None:
    """Every tensor of the checkpoint is there; those whose name has a part of `changed` have moved,
    no others.
    """
    before = load_file(home / "qwen3_vl" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    allowed = {n for n in before if any(part in n for part in changed)}
    assert moved and moved <= allowed
    assert any("visual" in n for n in moved) == any("visual" in n for n in allowed)


@slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_vision_runs_of_other_families(home: Path, family: str) -> None:
    one = run(home, f"{family}1", 1, family, **TRAINED)
    same(one, run(home, f"{family}2", 2, family, **TRAINED))


@slow
def test_vision_runs_resume_evaluate_and_go_on_with_another_size(home: Path) -> None:
    changes: dict[str, Any] = {
        **TRAINED,
        "max_steps": 4,
        "val_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = train_log(home, "whole", 1, **changes)
    train_log(home, "resumed", 2, **changes, save_strategy="steps", save_steps=2)
    checkpoint = home / "resumed" / "checkpoint-2"
    again = train_log(
        home, "resumed", 1, **changes, resume_from_checkpoint=checkpoint, overwrite_output_dir=False
    )
    for key in ("loss", "eval_loss"):
        expected = [h[key] for h in whole if key in h]
        found = [h[key] for h in again if key in h]
        assert found == pytest.approx(expected, rel=3e-5), key


def train_log(home: Path, name: str, size: int, **changes: Any) -> list[dict[str, float]]:
    given: dict[str, Any] = {
        "model_name_or_path": home / "qwen3_vl",
        "template": "qwen3_vl",
        "media_dir": home,
        "cutoff_len": 1024,
        "packing": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "image_max_pixels": 4096,
    }
    return train(home, name, size, **(given | changes))


def test_vision_runs_of_text_alone_do_not_touch_the_tower(home: Path) -> None:
    one = run(home, "words1", 1, dataset="words", **TRAINED)
    same(one, run(home, "words2", 2, dataset="words", **TRAINED))
    check_saved(home, home / "words2", ("language_model", "lm_head"))


def test_vision_runs_of_text_alone_need_no_processor_of_the_model(
    home: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(home / "qwen3_vl", tmp_path / "qwen3_vl")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if "patch_size" in (text := (model / name).read_text()):
            (model / name).write_text(text.replace('"patch_size": 16', '"patch_size": 14'))
    given = {"model_name_or_path": model, "max_steps": 1}
    assert run(home, "other_processor", 1, dataset="words", **given)
    with pytest.raises(RankError, match=r"has images or videos. The model's image processor has"):
        run(home, "other_processor_talks", 1, dataset="talks", **given)


def test_vision_runs_refuse_keys_that_leave_nothing_to_train(home: Path) -> None:
    given = keys(
        home,
        "nothing",
        model_name_or_path=home / "qwen3_vl",
        template="qwen3_vl",
        media_dir=home,
        freeze_language_model=True,
        cutoff_len=1024,
        packing=False,
    )
    with pytest.raises(RankError, match="leave nothing to train"):
        POOLS[1].run(run_on_ranks, [f"{k}={v}" for k, v in given.items()], str(home / "cache"))


def verified(argv: list[str], cache: str) -> tuple[bool, str]:
    """`longfactory verify` in this process: whether the run is exact, and its report."""
    import os

    os.environ["LONGFACTORY_CACHE"] = cache
    from longfactory.config import load_config
    from longfactory.train.verify import verify

    report = verify(load_config(argv), rows=2, tokens=400)
    return report.exact, report.table()


@slow
@pytest.mark.parametrize("kind", ["packed", "dpo"])
def test_vision_runs_verify(home: Path, kind: str) -> None:
    """Gradients of tower, projector and text against transformers' own model."""
    given = keys(
        home,
        f"verify_{kind}",
        sequence_parallel_size=2,
        model_name_or_path=home / "qwen3_vl",
        template="qwen3_vl",
        media_dir=home,
        cutoff_len=1024,
        image_max_pixels=4096,
        **(KINDS[kind] | {"ref_model": home / "qwen3_vl" if kind == "dpo" else None}),
    )
    words = [f"{k}={v}" for k, v in given.items()]
    for exact, report in POOLS[2].run(verified, words, str(home / "cache")):
        assert exact, report


@slow
def test_vision_runs_from_a_stream_and_from_saved_data(home: Path) -> None:
    """They take the steps of the data set itself; other sizes of images are refused."""
    given: dict[str, Any] = {"disable_shuffling": True, "preprocessing_batch_size": 8, **TRAINED}
    one = run(home, "own", 1, **given)
    saved = given | {"tokenized_path": home / "tokenised"}
    same(one, run(home, "saving", 1, **saved))
    same(one, run(home, "saved", 2, **saved | {"dataset": None}))
    same(one, run(home, "streamed", 2, streaming=True, **given))
    with pytest.raises(RankError, match=r"other settings of images and videos: image_max_pixels"):
        run(home, "other", 1, **saved | {"image_max_pixels": 8192})


@slow
def test_vision_verify_of_rows_without_images(home: Path) -> None:
    """A run that trains the tower, of which verify chooses rows of text."""
    rows = json.loads((home / "words.json").read_text())
    long = [{**row, "output": row["output"] * 12} for row in rows]
    talks = json.loads((home / "talks.json").read_text())
    last = next(row for row in talks if row["images"])
    (home / "few.json").write_text(json.dumps([*({"images": [], **r} for r in long), last]))
    info = json.loads((home / "dataset_info.json").read_text())
    info["few"] = {"file_name": "few.json", "columns": info["talks"]["columns"]}
    (home / "dataset_info.json").write_text(json.dumps(info))
    given = keys(home, "verify_few", sequence_parallel_size=2, **of_run(home, "few", **TRAINED))
    words = [f"{k}={v}" for k, v in (given | {"dataset": "few"}).items()]
    for exact, report in POOLS[2].run(verified, words, str(home / "cache")):
        assert exact, report


def test_vision_plan_counts_the_tower(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = keys(home, "planned", **of_run(home, "planned"))
    words = [f"{k}={v}" for k, v in given.items()]
    assert cli.main(["plan", *words, "--gpus", "2xH100", "--host-gib", "64"]) == 0
    out = capsys.readouterr().out
    assert "vision tower   " in out and "every token of a row is taken to be of an image" in out
    words = [f"{k}={v}" for k, v in (given | {"dataset": "words"}).items()]
    assert cli.main(["plan", *words, "--gpus", "2xH100", "--host-gib", "64"]) == 0
    assert "vision tower" not in capsys.readouterr().out


@slow
def test_vision_a_file_that_vanishes_ends_every_rank(home: Path, tmp_path: Path) -> None:
    """The rank that is dealt it says so; the others do not wait."""
    for name in ("dataset_info.json", "talks.json", *(f"{i}.png" for i in range(6))):
        shutil.copy(home / name, tmp_path / name)
    given = of_run(home, "vanished", **TRAINED) | {"media_dir": tmp_path, "max_steps": 1}
    given = keys(home, "vanished", sequence_parallel_size=2, **given)
    given |= {"dataset_dir": str(tmp_path), "nproc_per_node": 2, "dataloader_num_workers": 1}
    done = []
    for more in ({"max_steps": 1}, {"max_steps": 8}):
        words = [f"{k}={v}" for k, v in (given | more).items()]
        command = [sys.executable, "-m", "longfactory.cli", "train", *words]
        env = {**os.environ, "LONGFACTORY_CACHE": str(tmp_path / "cache")}
        done.append(subprocess.run(command, capture_output=True, text=True, env=env, timeout=120))
        (tmp_path / "3.png").unlink(missing_ok=True)
    assert done[0].returncode == 0, done[0].stderr[-2000:]
    assert done[1].returncode == 2
    assert "3.png (talks.json row" in done[1].stderr and "overwrite_cache" in done[1].stderr
    assert "Traceback" not in done[1].stderr


@slow
def test_vision_adapters_of_tower_and_text_are_exported(home: Path) -> None:
    """transformers loads the folder, with its image processor; both adapters are in the weights."""
    changes = KINDS["lora_tower"]
    run(home, "adapters", 2, **changes)
    folder = home / "exported"
    given = {
        "model_name_or_path": home / "qwen3_vl",
        "adapter_name_or_path": home / "adapters",
        "template": "qwen3_vl",
        "finetuning_type": "lora",
        "export_dir": folder,
    }
    assert cli.main(["export", *(f"{k}={v}" for k, v in given.items())]) == 0
    before = load_file(home / "qwen3_vl" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("visual.blocks" in name for name in moved)
    assert any("language_model.layers" in name for name in moved)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert all(torch.equal(after[n], x) for n, x in model.state_dict().items() if n in after)
    processor = load_image_processor(str(folder))
    assert processor.to_dict() == load_image_processor(str(home / "qwen3_vl")).to_dict()


@slow
def test_vision_runs_predict(home: Path) -> None:
    run(
        home,
        "predicted",
        1,
        do_predict=True,
        predict_with_generate=True,
        eval_dataset="talks",
        max_new_tokens=4,
    )
    lines = (home / "predicted" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert any("<|image_pad|>" in json.loads(line)["prompt"] for line in lines)


def test_vision_chat_with_an_image(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's answer to an image is that of transformers' own `generate` to its processor's
    tensors; a file that cannot be read takes its message back.
    """
    from transformers import AutoTokenizer

    from longfactory.config import load_config
    from longfactory.output import chat

    lines = iter([f"<image:{home}/1.png>What? <video:no.mp4>", f"<image:{home}/1.png>What?"])

    def line(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    seen: list[dict[str, Any]] = []
    generate = transformers.GenerationMixin.generate

    def noting(self: Any, **given: Any) -> Any:
        seen.append(given | {"made": generate(self, **given)})
        return seen[-1]["made"]

    monkeypatch.setattr(transformers.GenerationMixin, "generate", noting)
    folder = home / "qwen3_vl"
    given = {"template": "qwen3_vl_nothink", "max_new_tokens": 4, "do_sample": "false"}
    words = [f"{k}={v}" for k, v in {"model_name_or_path": folder, **given}.items()]
    chat.chat(load_config([*words, "image_max_pixels=4096"], command="chat"))
    out = capsys.readouterr().out
    assert chat.WITH_MEDIA in out
    assert "not answered: missing media: no.mp4" in out and len(seen) == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    picture = Image.open(home / "1.png").convert("RGB")
    picture = picture.resize(steps_to_size(picture.size, 4096, 1024, True)[-1])
    processed = tiny_media.image_processor("qwen3_vl")(images=[picture], return_tensors="pt")
    count = int(processed["image_grid_thw"].prod()) // 4
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>What?<|im_end|>"
        "\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(seen[0]["input_ids"][0]) == text
    assert torch.equal(seen[0]["pixel_values"], processed["pixel_values"])
    assert torch.equal(seen[0]["image_grid_thw"], processed["image_grid_thw"])
    assert seen[0]["made"].shape[1] == seen[0]["input_ids"].shape[1] + 4


@slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_vision_examples_run(tmp_path: Path, name: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "longfactory.cli", "train"),
            root / "examples" / "vision" / f"{name}.yaml",
            *(f"output_dir={tmp_path}", "max_steps=2"),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "LONGFACTORY_CACHE": str(tmp_path / "cache")},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert len(steps(log)) == 2
