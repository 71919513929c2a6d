"""A saved model has every tensor of the checkpoint that was loaded, under its names; what is
missing or wrong is found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from longfactory.errors import UserError
from longfactory.model import saved
from longfactory.model.source import in_words, read_source, stored_tensors, targets_of
from longfactory.model.value_head import TokenValues
from longfactory.sp import text_model
from longfactory.testing import tiny_model
from longfactory_dev.tiny_models import tiny_config

EXTRA = {
    "mtp.layers.0.proj.weight": torch.arange(12.0).view(3, 4),
    "mtp.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "model.layers.2.eh_proj.weight": torch.arange(5),
}


def write(
    folder: Path, state: dict[str, torch.Tensor], files: int = 1, metadata: bool = True
) -> None:
    """The weights of a folder as one file, or as several with an index."""
    kwargs: dict[str, Any] = {"metadata": {"format": "pt"}} if metadata else {}
    if files == 1:
        save_file(state, folder / "model.safetensors", **kwargs)
        return
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        names = sorted(state)[i::files]
        weight_map |= {name: f"model-{i + 1:05d}-of-{files:05d}.safetensors" for name in names}
        save_file(
            {name: state[name] for name in names},
            folder / f"model-{i + 1:05d}-of-{files:05d}.safetensors",
            **kwargs,
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def with_extra(folder: Path) -> None:
    write(folder, load_file(folder / "model.safetensors") | EXTRA)


def in_several_files(folder: Path) -> None:
    write(folder, load_file(folder / "model.safetensors") | EXTRA, files=2)


def without_metadata(folder: Path) -> None:
    write(folder, load_file(folder / "model.safetensors") | EXTRA, metadata=False)


def in_a_bin_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors") | EXTRA, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_prefix(folder: Path) -> None:
    """As gpt2's checkpoint: names of the model without its head; and a constant that old
    checkpoints held.
    """
    state = {
        name.removeprefix("model."): t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    write(folder, state | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})


def tied_twice(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    tiny_model("llama").save_pretrained(root / "plain")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(root / "tied")
    tiny_model("qwen3_moe").save_pretrained(root / "experts")
    return root


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("plain", with_extra),
        ("plain", in_several_files),
        ("plain", without_metadata),
        ("plain", in_a_bin_file),
        ("tied", without_prefix),
        ("tied", tied_twice),
        ("tied", in_several_files),
        ("experts", with_extra),
    ],
)
def test_every_tensor_is_back_under_its_name(
    base: str, change: Callable[[Path], None], bases: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(bases / base, folder)
    change(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    source = read_source(model, str(folder))
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    out = tmp_path / "out"
    model.save_pretrained(out)
    saved.check_saveable(model, source)
    saved.complete(out, source, model, max_bytes=60)
    assert saved.check_saved(out, model, source) == []
    before, after = stored_tensors(folder), stored_tensors(out)
    assert before.keys() == after.keys()
    assert all(tuple(before[name].shape) == tuple(after[name].shape) for name in before)
    held = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert held.keys() == after.keys(), "no file holds what the index does not name"
    for name in source.not_loaded:
        if name in EXTRA:
            assert torch.equal(held[name], EXTRA[name]) and held[name].dtype == EXTRA[name].dtype
    again = AutoModelForCausalLM.from_pretrained(out)
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (base == "tied")


def test_targets_know_which_tensors_the_model_has_taken(bases: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / "experts")
    names = [*stored_tensors(bases / "experts"), *EXTRA]
    targets = targets_of(names, model)
    assert [name for name, found in targets.items() if not found] == [*EXTRA]
    assert targets["model.layers.0.mlp.experts.1.up_proj.weight"] == (
        "model.layers.0.mlp.experts.gate_up_proj",
    )
    assert in_words(EXTRA) == "mtp.* (2), model.layers.2.* (1)"


def test_a_reward_model_is_trained_again(bases: Path, tmp_path: Path) -> None:
    """The folder of a reward model holds the value head among its weights, and the model that is
    loaded from it has none until it is given one.
    """

    def with_head() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        source = read_source(model, str(tmp_path / "first"))
        TokenValues(model)
        return model, source

    shutil.copytree(bases / "plain", tmp_path / "first")
    with_head()[0].save_pretrained(tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "first", dirs_exist_ok=True)
    model, source = with_head()
    assert {"v_head.weight", "v_head.bias"} <= source.tensors.keys()
    saved.check_saveable(model, source)
    model.save_pretrained(tmp_path / "again")
    saved.complete(tmp_path / "again", source, model)
    assert saved.check_saved(tmp_path / "again", model, source) == []


def test_a_whole_model_that_is_not_all_saved(bases: Path, tmp_path: Path) -> None:
    folder = bases / "plain"
    model = AutoModelForCausalLM.from_pretrained(folder)
    source = read_source(model, str(folder))
    frozen = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert saved.check_saved(tmp_path, model, source) == []
    state = load_file(tmp_path / "model.safetensors")
    last = "model.layers.1.self_attn.o_proj.weight"
    for change, expected in (
        ({last: None}, "1 of 21 tensors of the model are not in what was saved: " + last),
        ({last: torch.zeros(2, 2)}, "another shape in what was saved than in the model: " + last),
        ({last: state[last] + 1}, "other numbers in what was saved than in the model: " + last),
        (
            {frozen: state[frozen] + 1},
            "tensors that were not trained have other numbers than in " + str(folder),
        ),
    ):
        write(tmp_path, {name: t for name, t in {**state, **change}.items() if t is not None})
        problems = saved.check_saved(tmp_path, model, source)
        assert any(expected in problem for problem in problems), (expected, problems)


def test_an_adapter_that_is_not_saved(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        use_dora=True,
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model("llama"), config)
    saved.check_saveable(model, None)
    model.save_pretrained(tmp_path)
    assert saved.check_saved(tmp_path, model) == []
    state = load_file(tmp_path / saved.ADAPTER_FILE)
    trained = sum(p.requires_grad for p in model.parameters())
    for lost in [
        name
        for name in state
        if "layers.1" in name or "lm_head" in name or "lora_embedding" in name
    ]:
        save_file(
            {name: t for name, t in state.items() if name != lost}, tmp_path / saved.ADAPTER_FILE
        )
        problems = saved.check_saved(tmp_path, model)
        assert len(problems) == 1 and f"1 of {trained} tensors" in problems[0], (lost, problems)
    save_file(
        {name: torch.zeros_like(t) for name, t in state.items()}, tmp_path / saved.ADAPTER_FILE
    )
    assert "other numbers" in saved.check_saved(tmp_path, model)[0]
    (tmp_path / saved.ADAPTER_FILE).unlink()
    assert (
        f"{trained} of {trained} tensors of the model are not in what was saved"
        in saved.check_saved(tmp_path, model)[0]
    )


def test_names_that_peft_changes_as_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' pattern for Laguna's old name of the shared expert fits the new one too: PEFT
    left its adapters out.
    """
    from transformers import LagunaForCausalLM

    LagunaForCausalLM(tiny_config("laguna")).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(LagunaForCausalLM.from_pretrained(tmp_path / "base"), config)
    renamed = saved.names_for_peft(model)
    assert len(renamed) == 6 and all(
        re.search(r"mlp\.shared_expert\.down_proj", there) for there in renamed.values()
    )
    saved.check_saveable(model, None)
    out = tmp_path / "adapter"
    model.save_pretrained(out)
    assert saved.check_saved(out, model), "their names are not found"
    saved.rename_for_peft(out, model)
    assert saved.check_saved(out, model) == []
    again = PeftModel.from_pretrained(LagunaForCausalLM.from_pretrained(tmp_path / "base"), out)
    assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    # Where no old name leads to it, the run does not begin.
    monkeypatch.setattr(
        "transformers.core_model_loading.WeightRenaming.reverse_transform", lambda self: self
    )
    with pytest.raises(
        UserError,
        match=(
            r"6 tensors of the adapter are trained, but PEFT would not find them .*shared_experts"
        ),
    ):
        saved.check_saveable(model, None)
    assert (
        saved.names_for_peft(
            get_peft_model(tiny_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
        )
        == {}
    )


def test_what_cannot_be_saved_is_told_before(bases: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / "plain")
    source = read_source(model, str(bases / "plain"))
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        UserError, match="1 tensors have a dtype that safetensors does not know: odd"
    ):
        saved.check_saveable(model, source)
    del model.odd
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    # transformers' own words, which its save would end with
    with pytest.raises(RuntimeError, match="shared tensors"):
        saved.check_saveable(model, source)
    del model.model.layers[1]
    with pytest.raises(
        UserError, match=r"9 tensors stand in .* and would not be saved: model.layers.1"
    ):
        saved.check_saveable(model, source)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.model",
        "chat_template.json",
        "README.md",
        "notes.txt",
    ):
        (source / name).write_text(name)
    (source / "modeling_own.py").write_text("")
    assert saved.copy_side_files(source, out, whole=False) == ["tokenizer.model"]
    (out / "tokenizer.model").write_text("its own")
    (source / "config.json").write_text(
        '{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}'
    )
    assert saved.copy_side_files(source, out, whole=False) == [], (
        "an adapter's folder has no model's code"
    )
    copied = saved.copy_side_files(source, out, whole=True)
    assert copied == [
        "modeling_own.py",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
    ]
    assert (out / "tokenizer.model").read_text() == "its own"
    assert (
        saved.copy_side_files(source, source, whole=True)
        == saved.copy_side_files(None, out, whole=True)
        == []
    )


def families() -> list[str]:
    """The model types that docs/models.md says are trained exactly."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    return re.findall(
        r"^\| ([\w-]+) \|", text.partition("## Exact")[2].partition("## Refused")[0], re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_is_saved_under_the_names_that_it_was_loaded_from(
    family: str, tmp_path: Path
) -> None:
    """Also those whose files hold other tensors than the model: experts one by one, fused queries,
    keys and values, other prefixes.
    """
    try:
        kind = text_model.model_class(tiny_config(family))
        torch.manual_seed(0)
        made = kind.from_config(dtype=torch.float32)
    except (KeyError, ImportError) as error:
        pytest.skip(f"this transformers cannot make it: {error}")
    source_folder, out = tmp_path / "source", tmp_path / "out"
    made.save_pretrained(source_folder)
    # Of experts and of fused weights: transformers renames these too, and then finds no place for
    # them.
    extra = {
        f"mtp.layers.0.{name}.weight": torch.ones(3)
        for name in ("mlp.experts.0.gate_proj", "self_attn.qkv_proj", "norm")
    }
    extra |= {"model.layers.97.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}
    write(source_folder, load_file(source_folder / "model.safetensors") | extra)
    model = kind.from_pretrained(str(source_folder), dtype=torch.float32)
    source = read_source(model, str(source_folder))
    assert set(source.not_loaded) == set(extra)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1 if p.requires_grad else 0)
    saved.check_saveable(model, source)
    model.save_pretrained(out)
    changes = saved.complete(out, source, model)
    assert not changes.elsewhere and not changes.missing
    assert saved.check_saved(out, model, source) == []
    assert stored_tensors(out).keys() == stored_tensors(source_folder).keys()


def test_a_new_save_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    """Of an adapter, of one file and of parts, which would all be read with the new weights or in
    place of them.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from longfactory.testing import tiny_model as text_model

    before = get_peft_model(
        text_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    before.save_pretrained(tmp_path)
    text_model().save_pretrained(tmp_path)
    text_model().save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    parts = {path.name for path in (tmp_path / "parts").glob("model-*")}
    for name in parts:
        (tmp_path / name.replace("-of-0", "-of-9")).touch()
    (tmp_path / "value_head.safetensors").touch()
    (tmp_path / "README.md").write_text("by hand")
    (tmp_path / "parts" / "README.md").write_text("by a program")
    saved.put_in_place(tmp_path / "parts", tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        *parts,
    }
    assert (tmp_path / "README.md").read_text() == "by hand"
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters()}
    assert names == {name for name, _ in text_model().named_parameters()}


WHOLE = ("config.json", "generation_config.json", "model.safetensors")
PARTS = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")
PARTS = (*PARTS, "model-00002-of-00002.safetensors", "tokenizer.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors")
READ_FIRST = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("before", "new"),
    [(WHOLE, WHOLE), (PARTS, PARTS), (WHOLE, PARTS), (PARTS, WHOLE), (ADAPTER, ADAPTER)],
)
def test_a_kill_while_a_save_takes_its_place_mixes_nothing(
    before: tuple[str, ...], new: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between every two changes of the disk: no weights load that are of two saves, and the same
    call finishes what was left.
    """
    steps_left = 0
    replace, unlink = os.replace, Path.unlink

    def counted(change: Any) -> Any:
        def changes(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps_left
            if not steps_left:
                raise KeyboardInterrupt
            steps_left -= 1
            return change(*args, **kwargs)

        return changes

    for steps in range(40):
        folder = tmp_path / str(steps)
        beside = folder / "beside"
        beside.mkdir(parents=True)
        for place, names, content in ((folder, before, "before"), (beside, new, "new")):
            for name in names:
                (place / name).write_text(content)
        steps_left, ended = steps, True
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(replace))
            patched.setattr(Path, "unlink", counted(unlink))
            try:
                saved.put_in_place(beside, folder)
            except KeyboardInterrupt:
                ended = False
        contents = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        if set(READ_FIRST) & contents.keys():
            assert len({contents[name] for name in contents.keys() & set(new)}) == 1, contents
        if not ended:
            saved.put_in_place(beside, folder)
        assert all((folder / name).read_text() == "new" for name in new)
        weights = {path.name for path in folder.glob("*.safetensors*")}
        assert weights == {name for name in new if "safetensors" in name} and not beside.exists()
        if ended:
            return
    raise AssertionError("it did not end")


@pytest.mark.parametrize("before", [WHOLE, PARTS, ADAPTER])
def test_a_kill_while_room_is_made_leaves_nothing_that_loads(
    before: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, left = Path.unlink, [0]

    def counted(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(path, missing_ok)

    for steps in range(1, 40):
        folder = tmp_path / str(steps)
        folder.mkdir()
        for name in before:
            (folder / name).write_text("before")
        left[0], ended = steps, True
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", counted)
            try:
                saved.make_room(folder, adapter=before is ADAPTER)
            except KeyboardInterrupt:
                ended = False
        names = {path.name for path in folder.iterdir()}
        assert before[0] not in names, "the settings, without which no weights load, go first"
        if ended:
            assert not names & {*READ_FIRST, "value_head.safetensors"}
            return
    raise AssertionError("it did not end")


def test_an_adapter_leaves_what_it_was_trained_on(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in (tmp_path / "model.safetensors", tmp_path / "adapter_model.bin"):
        path.touch()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (beside / name).touch()
    saved.put_in_place(beside, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    ]
