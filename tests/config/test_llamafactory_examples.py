"""Every YAML file in the examples of LLaMA-Factory (its repository in August 2026): it resolves, or is
refused for the reason that is known.

`llamafactory_examples.json` has their keys, the command that they are for, and the verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "llamafactory_examples.json").read_text(encoding="utf-8")
)
REASONS = {
    "v1": r"this is a file for LLaMA-Factory's rewritten engine \(v1\)",
    "accelerate": "this is accelerate's own configuration, not a run",
    "megatron": "this is a file for LLaMA-Factory's Megatron back ends",
    "ktransformers": "KTransformers is not supported; use optimizer_placement: host",
    "fp8": "fp8 training is not supported; use bf16: true",
    "mixture of depths": "mixture_of_depths: convert is refused: tokens that skip a layer",
    "quantised export": "export writes full precision; quantise the exported folder",
    "no run": r"There is no key <\|START_OF_SVG\|>",
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's files are named by their path from the repository's root."""
    monkeypatch.chdir(Path(__file__).parents[2])
    for name in ("LOCAL_RANK", "WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "ALLOW_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_resolves_or_is_refused_for_its_reason(name: str) -> None:
    example = EXAMPLES[name]
    keys = dict(example["keys"])
    if example["command"] == "train":
        keys["dry_run"] = True
    if example["verdict"] == "resolves":
        from_mapping(keys, command=example["command"])
        return
    with pytest.raises(ConfigError, match=REASONS[example["verdict"]]):
        from_mapping(keys, command=example["command"])


def test_how_many_resolve() -> None:
    """Of the 95, 32 are no runs with LLaMA-Factory's usual keys: files of accelerate, of its
    rewritten engine and its Megatron back ends, and a list of tokens.
    """
    counts = Counter(example["verdict"] for example in EXAMPLES.values())
    assert counts == {
        "resolves": 53,
        "v1": 17,
        "accelerate": 11,
        "ktransformers": 6,
        "megatron": 3,
        "fp8": 2,
        "mixture of depths": 1,
        "quantised export": 1,
        "no run": 1,
    }
