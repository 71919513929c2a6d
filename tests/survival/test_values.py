"""A short form of `benchmarks/survival.py --part values`, and secrets that no file holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import _survival_values as part
from small_runs import LORA, POOLS, home, keys, run_on_ranks  # noqa: F401


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "key", "key": "learning_rate"},
        {"kind": "key", "key": "output_dir"},
        {"kind": "key", "key": "hub_token"},
        {"kind": "random", "seed": 0, "number": 1},
    ],
    ids=lambda case: str(case.get("key", "random")),
)
def test_in_process(case: dict, tmp_path: Path) -> None:
    result = part.run_case(case, tmp_path)
    assert result["ok"], result["end"]
    assert result["trials"] >= 40


def test_nonsense_that_is_read_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its range a key would take 1e30, and the part says so."""
    import dataclasses

    from longfactory.config.translate import OWN_KEYS

    key = OWN_KEYS["pref_ftx"]
    monkeypatch.setattr(
        "longfactory.config.load.keys_of", lambda cls: _without_range(cls, key.name)
    )
    result = part.run_case({"kind": "key", "key": "pref_ftx"}, tmp_path)
    assert not result["ok"] and "pref_ftx was read" in result["end"]
    assert dataclasses.replace(key, high=None).parse(1e30) == 1e30


def _without_range(cls: type, name: str) -> dict:
    import dataclasses

    from longfactory.config.fields import keys_of

    return {
        k: dataclasses.replace(key, low=None, high=None) if k == name else key
        for k, key in keys_of(cls).items()
    }


@pytest.mark.processes
def test_no_file_holds_a_secret(home: Path) -> None:  # noqa: F811
    """Checkpoints with training_args.bin, the run's own YAML, the model card, logs, the cache."""
    token = "hf_NobodyMayReadThis"
    secrets = dict.fromkeys(("hub_token", "hf_hub_token", "swanlab_api_key"), token)
    given = keys(home, "secret", save_strategy="steps", save_steps=2, **LORA, **secrets)
    words = [f"{k}={v}" for k, v in given.items()]
    POOLS[1].run(run_on_ranks, words, str(home / "secret_cache"))
    files = [p for p in home.rglob("*") if p.is_file()]
    assert any(p.name == "training_args.bin" for p in files)
    assert any(p.name == "README.md" for p in files)
    assert [str(p) for p in files if token.encode() in p.read_bytes()] == []
