"""The wheel's metadata names the repository that it is built from."""

from __future__ import annotations

import os
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("address", "page"),
    [
        (
            "https://user:secret@example.org/team/longfactory.git",
            "https://example.org/team/longfactory",
        ),
        ("git@example.org:team/longfactory.git", "https://example.org/team/longfactory"),
        ("/some/folder", None),
    ],
)
def test_addresses(address: str, page: str | None, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks for
    code = (
        "import sys; from setuptools import build_meta;"
        "print(build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))"
    )
    # the metadata alone: of a copy, so that the build leaves nothing in the repository
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "src" / "longfactory").mkdir(parents=True)
    (tmp_path / "src" / "longfactory" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "LONGFACTORY_URL": address},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / done.stdout.splitlines()[-1]
    found = Parser().parsestr((folder / "METADATA").read_text())
    urls = dict(line.split(", ") for line in found.get_all("Project-URL") or [])
    assert urls.get("Homepage") == page and "secret" not in str(found.get_all("Project-URL"))
    if page is not None:
        assert urls["Issues"] == f"{page}/issues"
