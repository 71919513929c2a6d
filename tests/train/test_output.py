"""The last lines of a run: what they name exists, and the command that they give is one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from longfactory.config import folder, from_mapping, load_config
from longfactory.init import main as init
from longfactory.train.output import closing_lines, next_command


@pytest.mark.parametrize(
    ("stage", "kind", "starts"),
    [
        ("sft", "full", "longfactory chat model_name_or_path=out template=qwen"),
        ("dpo", "lora", "longfactory chat model_name_or_path=base adapter_name_or_path=out"),
        ("rm", "full", "longfactory train out/longfactory.yaml model_name_or_path=out"),
        ("rm", "lora", "longfactory export model_name_or_path=base adapter_name_or_path=out"),
        ("sft", "oft", "longfactory chat model_name_or_path=base adapter_name_or_path=out"),
        ("pt", "full", "longfactory init sft --model out"),
        ("pt", "lora", "longfactory export model_name_or_path=base adapter_name_or_path=out"),
    ],
)
def test_the_next_command_is_one(
    stage: str, kind: str, starts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"model_name_or_path": "base", "dataset": "d", "output_dir": "out", "plot_loss": True}
    keys |= {"stage": stage, "finetuning_type": kind} | (
        {} if stage == "pt" else {"template": "qwen"}
    )
    cfg = from_mapping(keys)
    (tmp_path / "out").mkdir()
    folder.write(cfg)
    (tmp_path / "out" / "training_loss.png").touch()

    lines = closing_lines(cfg)
    what = "model" if kind == "full" else "adapter"
    assert lines == [
        f"The {what} is in out.",
        "Plots: out/training_loss.png.",
        f"Next: {next_command(cfg)}",
    ]
    command = next_command(cfg)
    assert command.startswith(starts)
    _, name, *words = shlex.split(command)
    if name == "init":
        assert init(words) == 0
    elif name == "train":
        again = load_config(words)
        assert again.trainer.do_eval and not again.trainer.do_train
        assert again.data.eval_dataset == ("d",) and again.output_dir == Path("out_eval")
    else:
        load_config(words, command=name)  # type: ignore[arg-type]


def test_nothing_is_said_of_what_is_not_there() -> None:
    keys = {"model_name_or_path": "base", "dataset": "d", "output_dir": "nowhere/out"}
    assert closing_lines(from_mapping({**keys, "save_final_model": False})) == []
    assert len(closing_lines(from_mapping({**keys, "plot_loss": True}))) == 2


def test_no_command_is_given_for_an_adapter_of_random_weights() -> None:
    keys = {"model_name_or_path": "base", "dataset": "d", "output_dir": "nowhere/out"}
    keys |= {"train_from_scratch": True}
    assert closing_lines(from_mapping({**keys, "finetuning_type": "full"}))[-1].startswith("Next: ")
    (made, said) = closing_lines(from_mapping({**keys, "finetuning_type": "lora"}))
    assert made == "The adapter is in nowhere/out." and "not saved" in said


def test_what_makes_a_model_of_shards_comes_before_a_chat_with_it(tmp_path: Path) -> None:
    keys = {"model_name_or_path": "base", "dataset": "d", "output_dir": str(tmp_path)}
    cfg = from_mapping({**keys, "finetuning_type": "full"})
    (tmp_path / "zero_to_fp32.py").touch()
    assert closing_lines(cfg)[-1].startswith(f"Next: python {tmp_path}/zero_to_fp32.py {tmp_path} ")
    (tmp_path / "model.safetensors").touch()
    assert closing_lines(cfg)[-1].startswith("Next: longfactory ")
