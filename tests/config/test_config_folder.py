"""The output folder: begin, go on, or refuse to mix two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longfactory.config import RUN_FILE, ConfigError, RunConfig, from_mapping, last_checkpoint
from longfactory.config.folder import write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(out: Path, **keys: Any) -> RunConfig:
    return from_mapping(
        {"model_name_or_path": "m", "dataset": "a,b", "output_dir": str(out), **keys}
    )


def leave_checkpoints(out: Path, *steps: int) -> None:
    for step in steps:
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")


def test_an_absent_or_empty_folder_begins(out: Path) -> None:
    assert run(out).checkpoints == ()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run(out).checkpoints == ()


def test_the_last_checkpoint_goes_on(out: Path) -> None:
    leave_checkpoints(out, 9, 100, 20)
    (out / "checkpoint-900.tmp").mkdir()
    (out / "checkpoint-1000").write_text("a file")
    cfg = run(out)
    assert cfg.checkpoints[0] == str(out / "checkpoint-100") == str(last_checkpoint(out))
    assert any("Resuming from" in n for n in cfg.notes)


def test_an_incomplete_checkpoint_is_ignored(out: Path) -> None:
    leave_checkpoints(out, 5, 10)
    (out / "checkpoint-10" / "trainer_state.json").unlink()
    cfg = run(out)
    assert cfg.checkpoints[0] == str(out / "checkpoint-5")
    assert "checkpoint-10 is incomplete" in cfg.notes[0] and "will be ignored" in cfg.notes[0]
    assert f"Resuming from {out / 'checkpoint-5'}" in cfg.notes[1]
    assert run(out, resume_from_checkpoint=True).checkpoints[0] == str(out / "checkpoint-5")
    with pytest.raises(ConfigError, match=r"holds no trainer_state\.json"):
        run(out, resume_from_checkpoint=str(out / "checkpoint-10"))
    (out / "checkpoint-5" / "trainer_state.json").unlink()
    assert run(out).checkpoints == ()
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        run(out, resume_from_checkpoint=True)


def test_overwriting_begins_anew(out: Path) -> None:
    leave_checkpoints(out, 5)
    cfg = run(out, overwrite_output_dir=True)
    assert cfg.checkpoints == () and "still has checkpoints of an earlier run" in cfg.notes[0]
    assert run(out, resume_from_checkpoint=False).checkpoints == ()
    assert run(out, overwrite_output_dir=True, resume_from_checkpoint=True).checkpoints[0] == str(
        out / "checkpoint-5"
    )


def test_a_finished_run_without_checkpoints_is_not_written_over(out: Path) -> None:
    out.mkdir()
    (out / "adapter_model.safetensors").write_text("")
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(out)
    assert run(out, overwrite_output_dir=True).checkpoints == ()


def test_the_same_run_may_change_what_does_not_make_it_another(out: Path) -> None:
    write(run(out))
    leave_checkpoints(out, 5)
    cfg = run(
        out,
        num_train_epochs=9,
        sequence_parallel_size=2,
        learning_rate=1e-6,
        dataset="b,a",
        cutoff_len=4096,
    )
    assert cfg.checkpoints[0] == str(out / "checkpoint-5")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"stage": "dpo"}, "its stage is sft, this run's dpo"),
        ({"dataset": "c"}, "its dataset is a, b, this run's c"),
        ({"lora_rank": 16}, "its lora_rank is 8, this run's 16"),
        ({"finetuning_type": "full"}, "its finetuning_type is lora"),
        ({"model_name_or_path": "other"}, "its model_name_or_path is m, this run's other"),
    ],
)
def test_another_run_s_folder_is_refused(out: Path, keys: dict[str, Any], words: str) -> None:
    write(run(out))
    leave_checkpoints(out, 5)
    with pytest.raises(ConfigError) as e:
        run(out, **keys)
    assert words in str(e.value) and "overwrite_output_dir: true" in str(e.value)
    run(out, **keys, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="Leave resume_from_checkpoint out to overwrite it"):
        run(out, **keys, overwrite_output_dir=True, resume_from_checkpoint=True)


def test_a_run_that_never_saved_does_not_hold_its_folder(out: Path) -> None:
    write(run(out))
    assert (out / RUN_FILE).is_file()
    assert run(out, stage="kto").checkpoints == ()


def test_checkpoints_that_are_asked_for(out: Path) -> None:
    leave_checkpoints(out, 5)
    assert run(out, resume_from_checkpoint=str(out / "checkpoint-5")).checkpoints[0] == str(
        out / "checkpoint-5"
    )
    with pytest.raises(ConfigError, match="there is no folder"):
        run(out, resume_from_checkpoint=str(out / "checkpoint-6"))
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        run(out.parent / "empty", resume_from_checkpoint=True)


def test_a_file_in_the_folder_s_place(out: Path) -> None:
    out.write_text("")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        run(out)


def test_evaluation_alone_never_resumes(out: Path) -> None:
    leave_checkpoints(out, 5)
    assert run(out, do_eval=True, eval_dataset="a", dataset=None).checkpoints == ()


def test_an_adapter_is_not_written_beside_a_whole_model(out: Path) -> None:
    """transformers would load it onto that model."""
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert run(out, finetuning_type="lora", overwrite_output_dir=True).checkpoints == ()
    (out / "model.safetensors.index.json").write_text("{}")
    assert run(out, finetuning_type="full", overwrite_output_dir=True).checkpoints == ()
    with pytest.raises(ConfigError, match="holds a full model"):
        run(out, finetuning_type="lora", overwrite_output_dir=True)


@pytest.mark.parametrize("moved", [False, True])
def test_a_model_that_a_kill_left_beside_its_place_is_seen(out: Path, moved: bool) -> None:
    """The next run that trains there puts it in place, and would put an adapter beside it."""
    write(run(out, finetuning_type="full"))
    beside = out / "new-model-0123456789ab"
    beside.mkdir()
    (beside / "model.safetensors").touch()
    ((out if moved else beside) / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a full model .* in new-model-0123456789ab/"):
        run(out, finetuning_type="lora", overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="holds another run"):
        run(out, finetuning_type="full", stage="kto")
    run(out, finetuning_type="full", stage="kto", overwrite_output_dir=True)


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_that_a_kill_left_beside_its_place_is_seen(out: Path, moved: bool) -> None:
    write(run(out, finetuning_type="lora"))
    beside = out / "new-model-0123456789ab"
    beside.mkdir()
    (beside / "adapter_model.safetensors").touch()
    ((out if moved else beside) / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another run"):
        run(out, finetuning_type="full")
    with pytest.raises(ConfigError, match="holds an adapter, which this run"):
        run(out, finetuning_type="full", resume_from_checkpoint=False)
    run(out, finetuning_type="full", overwrite_output_dir=True)
    assert run(out, finetuning_type="lora", overwrite_output_dir=True).checkpoints == ()


def test_the_model_s_own_folder_is_refused_before_anything_is_read(out: Path) -> None:
    """However it is named. Evaluation writes no model."""
    out.mkdir()
    (out.parent / "link").symlink_to(out)
    for name in (out, out.parent / "link"):
        keys = {"model_name_or_path": str(name), "overwrite_output_dir": True}
        with pytest.raises(ConfigError, match="is the folder that the model is read from"):
            run(out, **keys)
        run(out.parent / "other", **keys)
        run(out, **keys, do_eval=True, eval_dataset="a", dataset=None)


def test_an_adapter_is_not_replaced_by_a_whole_model_unasked(out: Path) -> None:
    leave_checkpoints(out.parent / "other", 5)
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    begins: tuple[Any, ...] = (False, str(out.parent / "other" / "checkpoint-5"))
    for begin in begins:
        keys = {"finetuning_type": "full", "resume_from_checkpoint": begin}
        with pytest.raises(ConfigError, match="holds an adapter, which this run"):
            run(out, **keys)
        run(out, **keys, overwrite_output_dir=True)
        run(out, **{**keys, "finetuning_type": "lora"})
