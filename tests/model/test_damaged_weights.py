"""Files of weights that are not whole are told by name, before the data are read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longfactory.config import load_config
from longfactory.errors import UserError
from longfactory.model import damaged
from longfactory.train.prepare import Processes, prepare

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


def shards(folder: Path, suffix: str = "safetensors") -> list[Path]:
    """Two files and their index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [folder / f"{stem}-{i:05d}-of-00002.{suffix}" for i in (1, 2)]
    for name, file in zip("ab", files, strict=True):
        tensors = {name: torch.arange(6.0)}
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    places = {name: file.name for name, file in zip("ab", files, strict=True)}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return files


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_whole_files(suffix: str, tmp_path: Path) -> None:
    files = shards(tmp_path, suffix)
    assert damaged.found(tmp_path) is None
    files[1].write_text(POINTER)
    assert f"{files[1]} is not the file itself but Git LFS's pointer" in str(
        damaged.found(tmp_path)
    )
    files[1].unlink()
    assert f"lacks {files[1].name}" in str(damaged.found(tmp_path))
    next(tmp_path.glob("*.index.json")).unlink()
    assert f"holds parts ({files[0].name}) and lacks the index" in str(damaged.found(tmp_path))
    files[0].unlink()
    assert "holds no weights" in str(damaged.found(tmp_path))
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert damaged.found(tmp_path) is None


def test_an_old_bin_file_and_one_of_another_program(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert damaged.found(tmp_path) is None
    file.write_bytes(b"<html>not found</html>")
    assert "is no file that torch saved" in str(damaged.found(tmp_path))


@pytest.mark.parametrize("end", ["00002.safetensors", ".index.json"])
def test_files_that_may_not_be_read(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **keys: Any) -> Any:
        if self.name.endswith(end):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **keys)

    monkeypatch.setattr(Path, "open", refuse)
    assert f"{end} cannot be read: Permission denied." in str(damaged.found(tmp_path))


def test_safetensors_that_are_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100), "none": torch.ones(0)}, file, metadata={"format": "pt"})
    data = file.read_bytes()
    assert damaged.found(tmp_path) is None
    file.write_bytes(data[:-1])
    assert f"is cut short: {len(data) - 1:,} of {len(data):,} bytes" in str(damaged.found(tmp_path))
    for content in (b"", data[:5], data[:40], b"\xff" * 999, data[:8] + b"[" * 999):
        file.write_bytes(content)
        assert "is cut short or no safetensors file" in str(damaged.found(tmp_path))


def test_a_length_that_no_header_has_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file of many gigabytes may begin with any number."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    monkeypatch.setattr(damaged, "LONGEST_HEADER", 10)
    assert "is cut short or no safetensors file" in str(damaged.found(tmp_path))


@pytest.mark.parametrize("what", ["a pointer", "a package"])
def test_a_run_says_so_before_it_reads_its_data(what: str, tmp_path: Path) -> None:
    from longfactory.testing import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    if what == "a pointer":
        (tmp_path / "model.safetensors").write_text(POINTER)
        message = r"model_name_or_path: .*Git LFS's pointer"
    else:
        if importlib.util.find_spec("gptqmodel") is not None:
            pytest.skip("GPTQModel is installed")
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = r"quantised \(gptq\), and gptqmodel"
    keys = {"model_name_or_path": tmp_path, "output_dir": tmp_path / "out", "template": "empty"}
    argv = [f"{k}={v}" for k, v in keys.items()]
    cfg = load_config([*argv, "dataset=absent", "do_train=true", "finetuning_type=lora"])
    with pytest.raises(UserError, match=message):
        prepare(cfg, Processes(1, True, False), wide_weights=False)
