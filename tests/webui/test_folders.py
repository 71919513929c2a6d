"""Only chosen folders are read and written, whatever links and dots say."""

from __future__ import annotations

from pathlib import Path

import pytest

from longfactory.errors import UserError
from longfactory.webui.folders import Folders, OutsideError


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    for name in ("chosen/inner/deep", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other" / "secret.yaml").write_text("model_name_or_path: m")
    return Folders([tmp_path / "chosen"])


def test_links_and_dots_do_not_lead_outside(folders: Folders, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    (chosen / "link").symlink_to(tmp_path / "other")
    (chosen / "file").symlink_to(tmp_path / "other" / "secret.yaml")
    (chosen / "loop").symlink_to(chosen / "loop")
    assert folders.inside(chosen / "inner" / ".." / "new") == chosen / "new"
    for path in ("link", "link/secret.yaml", "file", "../other", "inner/../../other", "loop/x"):
        with pytest.raises(OutsideError, match="--folder"):
            folders.inside(chosen / path, "output_dir")
    assert not folders.holds("/") and not folders.holds("a\0b") and not folders.holds("~nobody/x")
    assert not folders.holds(f"{chosen}more")


def test_a_chosen_folder_that_is_a_link_is_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    linked = Folders([tmp_path / "link", tmp_path / "real"])
    assert linked.roots == (tmp_path / "real",)
    assert linked.holds(tmp_path / "link" / "x")


def test_walks_neither_through_links_nor_into_checkpoints(folders: Folders, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    (chosen / "link").symlink_to(tmp_path / "other")
    (chosen / "inner" / "up").symlink_to(chosen)
    for name in ("checkpoint-5", ".git", "node_modules", "longfactory_webui"):
        (chosen / name).mkdir()
    found = [str(folder.relative_to(chosen)) for folder, _ in folders.walk()]
    assert found == [".", "inner", "inner/deep"]


def test_folders_that_are_missing() -> None:
    with pytest.raises(UserError, match="no such folder"):
        Folders(["/no/such/folder"])
    with pytest.raises(UserError, match="expected at least one"):
        Folders([])
