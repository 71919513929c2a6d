"""A checkpoint's manifest: every kind of damage to every file is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longfactory.config.folder import MANIFEST
from longfactory.train.checkpoint import manifest as manifests

FILES = {"model.safetensors": 1000, "optimizer.pt": 3000, "shards/0.distcp": 10, "empty.json": 0}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for i, (name, size) in enumerate(FILES.items()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes((i * 31 + k) % 251 for k in range(size)))
    files = manifests.measure(tmp_path, manifests.list_files(tmp_path), sync=True)
    manifests.write(tmp_path, {"run": "a", "step": 4}, files)
    return tmp_path


def problems(checkpoint: Path) -> list[str]:
    found, wrong = manifests.read(checkpoint)
    if found is None:
        return [wrong or "there is none"]
    return manifests.problems_of(checkpoint, found["files"], found["files"])


def test_what_was_written_is_whole(checkpoint: Path) -> None:
    found, wrong = manifests.read(checkpoint)
    assert wrong is None and found is not None
    assert {n: f["size"] for n, f in found["files"].items()} == FILES
    assert found["step"] == 4 and problems(checkpoint) == []
    (checkpoint / "notes.txt").write_text("the user's own")
    assert problems(checkpoint) == []
    assert not list(checkpoint.glob("*.part")) and not list(checkpoint.glob(".*"))


@pytest.mark.parametrize("name", FILES)
def test_damage_to_a_file_is_named(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    good = path.read_bytes()
    path.unlink()
    assert problems(checkpoint) == [f"{name} is missing"]
    path.write_bytes(good + b"x")
    assert problems(checkpoint) == [f"{name} has {len(good) + 1} bytes, expected {len(good)}"]
    if good:
        path.write_bytes(good[: len(good) // 2])
        assert f"expected {len(good)}" in problems(checkpoint)[0]
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        path.write_bytes(flipped)
        assert f"{name} has the checksum" in problems(checkpoint)[0]


@pytest.mark.parametrize(
    ("old", "new"), [('"step": 4', '"step": 5'), ('"run": "a"', '"run": "b"'), ("}", ""), ("{", "")]
)
def test_damage_to_the_manifest_itself_is_named(old: str, new: str, checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    path.write_text(path.read_text().replace(old, new, 1))
    assert MANIFEST in problems(checkpoint)[0]


def test_another_format_is_told(checkpoint: Path) -> None:
    facts = json.loads((checkpoint / MANIFEST).read_text())
    facts["manifest"]["format"] = 99
    facts["xxh3"] = manifests._checksum_of(facts["manifest"])
    (checkpoint / MANIFEST).write_text(json.dumps(facts))
    assert "has format 99, this LongFactory reads 1" in problems(checkpoint)[0]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_files_are_shared_out_once_and_evenly(parts: int) -> None:
    sizes = {f"{i}": s for i, s in enumerate([500, 400, 300, 300, 200, 100, 1, 0])}
    shares = [manifests.share(sizes, parts, part) for part in range(parts)]
    assert sorted(n for s in shares for n in s) == sorted(sizes)
    loads = [sum(sizes[n] for n in s) for s in shares]
    assert max(loads) <= max(500, 2 * sum(loads) / parts)
