"""Every YAML file in the examples of LLaMA-Factory (its repository in August 2026): it resolves, or is
refused for the reason that is known.

`llamafactory_examples.json` has their keys, the command that they are for, and the verdict.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from longfactory.config import ConfigError, accelerate_launch, from_mapping

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "llamafactory_examples.json").read_text(encoding="utf-8")
)
REASONS = {
    "accelerate": "this is accelerate's own configuration, not a run",
    "ktransformers": "KTransformers is not supported; use optimizer_placement: host",
    "mixture of depths": "mixture_of_depths: convert is refused: tokens that skip a layer",
    "quantised export": "export writes full precision; quantise the exported folder",
    "no run": r"There is no key <\|START_OF_SVG\|>",
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's files are named by their path from the repository's root."""
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_resolves_or_is_refused_for_its_reason(name: str) -> None:
    example = EXAMPLES[name]
    keys = {**example["keys"], **example.get("words", {})}
    if example["command"] == "train":
        keys["dry_run"] = True
    if example["verdict"] == "resolves":
        from_mapping(keys, command=example["command"])
        return
    with pytest.raises(ConfigError, match=REASONS[example["verdict"]]):
        from_mapping(keys, command=example["command"])


ACCELERATE = [name for name, example in EXAMPLES.items() if example["verdict"] == "accelerate"]


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_s_file_reaches_a_run_that_accelerate_launches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate's own parser makes of the file, as the processes that it starts find it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(EXAMPLES[name]["keys"]))
    words = launch_command_parser().parse_args(["--config_file", str(file), "src/train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(words)[0])
    for key, value in environment.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    run = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "dry_run": True}
    cfg = from_mapping(run)
    assert cfg.parallel.sharding == "fsdp2" and cfg.trainer.bf16
    offloads = EXAMPLES[name]["keys"]["fsdp_config"]["fsdp_offload_params"]
    assert cfg.memory.optimizer_placement == ("host" if offloads else "auto")
    assert any(note.startswith("accelerate launch asks for sharding: fsdp2") for note in cfg.notes)
    # what the run says itself stays
    own = from_mapping({**run, "sharding": "ddp", "fp16": True})
    assert own.parallel.sharding == "ddp" and own.trainer.fp16 and not own.trainer.bf16
    accelerate_launch.forget(os.environ)
    assert from_mapping(run).parallel.sharding == "auto"


def test_how_many_resolve() -> None:
    """Of the 95, 75 are runs (17 of them with the keys of its rewritten engine, 3 with those of its
    Megatron back ends), 11 are accelerate's own files, which `accelerate launch` gives to a run: 86.
    One is no file of a program.
    """
    counts = Counter(example["verdict"] for example in EXAMPLES.values())
    assert counts == {
        "resolves": 75,
        "accelerate": 11,
        "ktransformers": 6,
        "mixture of depths": 1,
        "quantised export": 1,
        "no run": 1,
    }
