"""What runs leave behind: all that the loaded checkpoint has, also of a sharded run; and nothing
that fails keeps it from being saved.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longfactory.errors import UserError
from longfactory.model.source import stored_tensors
from longfactory.train import output, saved_model

HERE = Path(__file__).parent
from cpu_sharding import on_ranks_of_their_own  # noqa: E402
from saving_worker import save_and_go_on  # noqa: E402
from small_runs import LORA, keys, run_on_ranks, text, write_model  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("as_a_command")]

MTP = {
    "mtp.layers.0.proj.weight": torch.arange(12.0).view(3, 4),
    "mtp.norm.weight": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all that once kept a run from saving it, or was lost; and a few
    conversations.
    """
    home = tmp_path_factory.mktemp("saving")
    model = home / "model"
    write_model(model, 0)
    save_file(
        load_file(model / "model.safetensors") | MTP,
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "length_penalty": 2.0})
    )
    (model / "preprocessor_config.json").write_text("{}")
    random.seed(0)
    (home / "talks.json").write_text(
        json.dumps([{"instruction": text(12), "output": text(25)} for _ in range(4)])
    )
    (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
    return home


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logger = logging.getLogger("longfactory")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def run(home: Path, output_dir: Path, **changes: Any) -> None:
    """One step in this process."""
    given = keys(home, "", **{"output_dir": output_dir, "max_steps": 1, **changes})
    run_on_ranks([f"{k}={v}" for k, v in given.items()], str(home / "cache"))


def test_a_run_saves_all_that_it_has_loaded(
    home: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run(home, out, save_strategy="steps", save_steps=1)
    for folder in (out, out / "checkpoint-1"):
        held = {
            name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
        }
        assert held.keys() == stored_tensors(folder).keys() == stored_tensors(home / "model").keys()
        assert all(torch.equal(held[name], t) for name, t in MTP.items())
        generation = json.loads((folder / "generation_config.json").read_text())
        assert (
            generation["do_sample"]
            and generation["temperature"] == 0.6
            and "length_penalty" not in generation
        )
        assert (folder / "preprocessor_config.json").is_file()
    lines = {
        record
        for record in told.records
        if "2 tensors of the checkpoint that transformers does not load" in record.getMessage()
    }
    assert len(lines) == 1 and "are saved as they were: mtp.* (2)" in lines.pop().getMessage()
    assert "do_sample: False beside temperature: 0.6 became do_sample: true" in told.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the scratch folder is gone"


@pytest.mark.slow
def test_a_checkpoint_with_the_names_of_its_source_resumes_exactly(
    home: Path, tmp_path: Path
) -> None:
    """Names without the model's prefix, as gpt2's files have them, and tensors that no model has."""
    base = tmp_path / "base"
    write_model(base, 0, tie_word_embeddings=True)
    state = {
        name.removeprefix("model."): t for name, t in load_file(base / "model.safetensors").items()
    }
    save_file(state | MTP, base / "model.safetensors", metadata={"format": "pt"})
    keys = {"model_name_or_path": base, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(home, tmp_path / "whole", **keys)
    checkpoint = tmp_path / "again" / "checkpoint-1"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", checkpoint)
    assert stored_tensors(checkpoint).keys() == stored_tensors(base).keys()
    run(
        home,
        tmp_path / "again",
        **keys,
        resume_from_checkpoint=checkpoint,
        overwrite_output_dir=False,
    )
    whole, again, first = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (tmp_path / "whole", tmp_path / "again", checkpoint)
    )
    assert whole.keys() == again.keys() == state.keys() | MTP.keys()
    assert all(torch.equal(again[name], t) for name, t in whole.items())
    assert any(not torch.equal(first[name], t) for name, t in whole.items())


def test_what_fails_after_the_save_loses_nothing(
    home: Path, tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("longfactory.train.output.plot_history", fails)
    monkeypatch.setattr("longfactory.train.output.write_model_card", fails)
    run(home, tmp_path / "out", plot_loss=True, **LORA)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and (
        tmp_path / "out" / "trainer_state.json"
    ).is_file()
    assert "plot_loss: curves could not be written or sent (RuntimeError: no fonts)" in told.text
    assert "the model card, could not be written or sent" in told.text


def test_a_save_that_fails_leaves_the_model_of_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was written of the new one is removed."""

    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    before = {"model.safetensors": b"weights of before", "config.json": b"{}"}
    for name, content in before.items():
        (out / name).write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr(saved_model, "finish_save", fails)
        with pytest.raises(UserError, match=r"could not be saved .*No space left"):
            run(home, out)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob("tmp-*"))
    run(home, out)
    assert stored_tensors(out).keys() == stored_tensors(home / "model").keys()


def test_where_one_model_has_room_the_earlier_one_goes_first(
    home: Path, tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `overwrite_output_dir` allows. It is said at the start."""
    out = tmp_path / "out"
    run(home, out)

    def weights() -> dict[str, torch.Tensor]:
        return {name: t for p in out.glob("*.safetensors") for name, t in load_file(p).items()}

    before = weights()
    room = sum(p.stat().st_size for p in out.glob("*.safetensors")) * 3 // 2

    def usage(path: Any) -> Any:
        used = sum(p.stat().st_size for p in out.glob("**/*.safetensors"))
        return types.SimpleNamespace(total=room, used=used, free=room - used)

    monkeypatch.setattr("longfactory.model.saved.shutil.disk_usage", usage)
    there = []

    def seen(trainer: Any, folder: str) -> None:
        there.append(sorted(p.name for p in out.glob("*") if p.name.startswith(("model", "conf"))))
        finish_save(trainer, folder)

    finish_save = saved_model.finish_save
    monkeypatch.setattr("longfactory.train.saved_model.finish_save", seen)
    run(home, out, overwrite_output_dir=False, resume_from_checkpoint=False, learning_rate=0.1)
    assert "config.json" in there[0] and len(there[0]) > 1 and "only without" not in told.text
    run(home, out, learning_rate=0.2)
    assert there[1] == [] and "removes that one before this run's is written" in told.text
    after = weights()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_model_that_was_not_put_in_its_place_is_not_lost(
    home: Path, tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk refuses after the model was written, a later start finishes it."""
    from longfactory.train.checkpoint.prune import remove_leftovers

    replace, out = os.replace, tmp_path / "out"

    def fails(source: Any, target: Any) -> None:
        if Path(target).parent == out and Path(target).name.startswith("model"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("longfactory.model.saved.os.replace", fails)
        with pytest.raises(UserError, match=r"could not be saved .*Input/output error"):
            run(home, out)
    assert not list(out.glob("model*"))
    remove_leftovers(out)
    assert "is a trained model, complete" in told.text
    assert stored_tensors(out).keys() == stored_tensors(home / "model").keys()
    assert not [path for path in out.iterdir() if path.name.startswith(("tmp-", "new-"))]


def test_an_upload_that_fails_is_told_when_all_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("longfactory.hub.unreachable", lambda: None)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", fails)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", fails)
    keys = {
        "push_to_hub": True,
        "do_eval": True,
        "val_size": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    with pytest.raises(
        UserError,
        match=r"could not be uploaded \(ConnectionError: no route\). The trained model is complete",
    ):
        run(home, tmp_path / "out", **LORA, **keys)
    for name in (
        "adapter_model.safetensors",
        "train_results.json",
        "eval_results.json",
        "README.md",
        "checkpoint-1",
    ):
        assert (tmp_path / "out" / name).exists(), name


def test_the_hub_s_folder_of_the_model_is_not_written(tmp_path: Path) -> None:
    """Which is known when the model is loaded; of a folder the configuration tells."""
    source = types.SimpleNamespace(folder=tmp_path)
    for out, refused in ((tmp_path, True), (tmp_path / "out", False)):
        said = output._not_writable(types.SimpleNamespace(output_dir=str(out)), source)
        assert (said is not None and "is read from" in said) == refused


@pytest.mark.parametrize("case", ["tokenizer", "below a file"])
def test_a_run_that_could_not_save_does_not_begin(
    case: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, expected = tmp_path / "out", "The tokenizer cannot be saved (TypeError): it holds a tensor"
    if case == "tokenizer":

        def refuses(*args: Any, **kwargs: Any) -> None:
            raise TypeError("it holds a tensor")

        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuses)
    else:
        (tmp_path / "file").write_text("")
        out, expected = tmp_path / "file" / "out", "cannot be written: Not a directory"
    before = sorted(path.name for path in (home / "model").iterdir())
    with pytest.raises(
        UserError,
        match="This run would not be able to save its model, so training was not started:",
    ) as error:
        run(home, out)
    assert expected in str(error.value)
    assert sorted(path.name for path in (home / "model").iterdir()) == before
    assert not out.exists()
    assert not list(tmp_path.glob(".longfactory*"))


@pytest.mark.parametrize("writes", [True, False])
def test_a_rank_without_the_gathered_weights_writes_nothing(
    writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks wrote one file, and the last one's was empty."""
    saved: list[dict] = []
    rank = types.SimpleNamespace(
        args=types.SimpleNamespace(should_save=writes),
        model=types.SimpleNamespace(peft_config={}),
        is_fsdp_enabled=True,
        stage=types.SimpleNamespace(output="logps"),
        _save=lambda folder, state_dict: saved.append(state_dict),
    )
    state = {"weight": torch.ones(1)} if writes else {}
    monkeypatch.setattr(saved_model.export, "full_state_dict", lambda model: state)
    monkeypatch.setattr(saved_model, "finish_save", lambda *_: None)
    saved_model._write_model(rank, str(tmp_path))  # type: ignore[arg-type]
    assert saved == ([state] if writes else [])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_a_sharded_run_saves_whole_weights_and_resumes_with_another_size(
    sharding: str, tmp_path: Path
) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    on_ranks_of_their_own(2, 350, save_and_go_on, sharding, str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (
        result["kind"].endswith("FSDP" if sharding == "fsdp2" else "DEEPSPEED")
        and result["sharded"]
    )

    from transformers import AutoModelForCausalLM

    from invariance_worker import tiny

    trained = torch.load(tmp_path / "trained.pt")
    before = dict(tiny("llama").named_parameters())
    # Both the final folder, and the one written at the last step, as a person loads them.
    folders = [tmp_path / "out"] + (
        [tmp_path / "out" / "checkpoint-2"] if sharding == "fsdp2" else []
    )
    for folder in folders:
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        assert loaded.keys() == trained.keys() == before.keys()
        for name, p in loaded.items():
            assert torch.equal(p, trained[name]), name
        assert max((loaded[n] - before[n]).abs().max().item() for n in loaded) > 1e-2
        held = {
            name: t
            for file in folder.glob("*.safetensors")
            for name, t in load_file(file).items()
            if "optimizer" not in file.name
        }
        base = load_file(tmp_path / "base" / "model.safetensors")
        assert held.keys() == base.keys() == stored_tensors(folder).keys()
        assert all(torch.equal(held[name], base[name]) for name in base if name.startswith("mtp."))
    assert not list((tmp_path / "out").glob("*.part"))

    whole, resumed = result["losses"]
    assert len(whole) == 2 and resumed == pytest.approx(whole, abs=1e-5)
    assert result["resumed"] < 2e-4, (
        "the second step, made from the checkpoint with size 1, is another one"
    )


def test_an_adapter_that_was_not_loaded_whole_ends_the_resume(tmp_path: Path) -> None:
    """PEFT leaves out tensors that it does not find, and says nothing of them when a run goes on."""
    from peft import LoraConfig, get_peft_model
    from transformers import LagunaForCausalLM

    from longfactory.model import saved
    from longfactory.train.trainer import RowTrainer
    from longfactory_dev.tiny_models import tiny_config

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(LagunaForCausalLM(tiny_config("laguna")), config)
    trainer: Any = types.SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=False, model=model
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"was not loaded as it was saved: 6 of 16 tensors of the model are not in"
    ):
        RowTrainer._load_renamed(trainer, str(tmp_path))
    saved.rename_for_peft(tmp_path, model)
    RowTrainer._load_renamed(trainer, str(tmp_path))
    RowTrainer.refuse_renamed_adapter(trainer)
    trainer.is_fsdp_enabled = True  # its own files have today's names
    with pytest.raises(UserError, match=r"PEFT does not find 6 tensors .*adapter_name_or_path"):
        RowTrainer.refuse_renamed_adapter(trainer)


def test_a_checkpoint_of_another_program_is_of_the_run_s_kind(home: Path, tmp_path: Path) -> None:
    """Without a manifest its files alone say whether it is an adapter or a model."""
    kinds: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
    for kind, given in kinds.items():
        run(home, tmp_path / kind, **given, save_strategy="steps", save_steps=1)
        for path in (tmp_path / kind / "checkpoint-1").glob("longfactory_*"):
            path.unlink()
    for kind, other in (("full", "lora"), ("lora", "full")):
        checkpoint = tmp_path / other / "checkpoint-1"
        holds = "an adapter" if other == "lora" else "a whole model"
        with pytest.raises(UserError, match=f"holds {holds}, and this run trains"):
            run(
                home,
                tmp_path / "again",
                **kinds[kind],
                max_steps=2,
                resume_from_checkpoint=checkpoint,
            )
        assert not (tmp_path / "again" / "model.safetensors").exists()
