"""The pages of docs/: commands, keys and messages that they name are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from longfactory.cli import COMMANDS
from longfactory.config import other_keys
from longfactory.config.schema import schema
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.init import data_set

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def source() -> str:
    """All code, with strings that go on in the next line as one."""
    text = "\n".join(p.read_text() for p in sorted((ROOT / "src" / "longfactory").rglob("*.py")))
    return re.sub(r'"\s*\n\s*(?:f|rf)?"', "", text)


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    code, found = source(), 0
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("| `") else ""
        for message in re.findall(r"`([^`]+)`", cell):
            parts = re.split(r"\.\.\.|'x'|\b[NMx]\b|\b(?:sft|dpo|nan)\b|\d+|: ", message)
            parts = [part.strip(" ,.'") for part in parts]
            longest = max(parts, key=len)
            assert longest in code, f"{message!r}: no code says {longest!r}"
            found += 1
    assert found > 25


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_keys_of_a_page_exist(page: Path) -> None:
    keys = schema()["properties"]
    for block in [*blocks(page, "console"), *blocks(page, "bash")]:
        for line in block.splitlines():
            match = re.search(r"(?:^|\s)longfactory ([a-z_]+)([^#`;|&]*)", line)
            if match is None or line.lstrip().startswith(("#", "docker", "[")):
                continue
            command, rest = match.groups()
            if "pip install" in line or "git clone" in line:
                continue
            assert command in COMMANDS, line
            for word in shlex.split(rest, posix=False):
                name, sign, _ = word.lstrip("-").partition("=")
                if sign and not word.startswith("--") and command in ("train", "chat", "export"):
                    assert name in keys or name.isupper(), f"{page.name}: {line}: {name}"
    for block in blocks(page, "yaml"):
        if any(word in block for word in ("containers:", "python/object", "${")):
            continue
        found = yaml.safe_load(block)
        if isinstance(found, dict):
            assert set(map(str, found)) <= set(keys), f"{page.name}: {set(found) - set(keys)}"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


OF_OTHERS = {"quant_method"}
"""Keys of other programs' files that pages name."""
ROOMS = (ROOT, ROOT / "src" / "longfactory")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_keys_that_a_sentence_names_exist(page: Path) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    of_llamafactory = (other_keys.ALIASES, other_keys.NO_EFFECT, other_keys.REFUSED)
    keys = {*schema()["properties"], *TRAINER_KEYS, *OF_OTHERS}.union(*of_llamafactory)
    for code in re.findall(r"`([^`\n]+)`", text):
        path = re.fullmatch(r"\w+/[\w./-]+\.(?:py|md|yaml|sh)", code)
        if path is not None and any((room / code.split("/")[0]).exists() for room in ROOMS):
            assert any((room / code).exists() for room in ROOMS), f"{code} is no file"
        key = re.match(r"([a-z]+(?:_[a-z0-9]+)+)(?:: |=)", code)
        known = key is None or key[1] in keys or page.name == "migrating_others.md"
        assert known, f"{code}: {key and key[1]} is no key"


def test_the_technique_that_a_page_adds_is_the_tree_s() -> None:
    """Its diff is of what the tree has, so what it adds stands there."""
    (diff,) = blocks(ROOT / "docs" / "adding_a_technique.md", "diff")
    for part in diff.split("--- a/")[1:]:
        code = (ROOT / part.splitlines()[0]).read_text()
        for hunk in re.split(r"^@@.*\n", part, flags=re.MULTILINE)[1:]:
            after = [line[1:] for line in hunk.splitlines() if not line.startswith("-")]
            assert "\n".join(after) in code, f"{part.splitlines()[0]} has other lines:\n{hunk}"


def test_pages_of_the_navigation_exist() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"[\w]+\.md", str(nav))
    assert len(named) == len(set(named)) > 20
    assert set(named) <= {page.name for page in (ROOT / "docs").glob("*.md")}


def test_every_form_of_your_data_is_recognised(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "your_data.md").read_text().split("## The forms")[1]
    forms = re.findall(r"^\*\*.*?\(`init (\w+)`.*?$(.*?)^```json\n(.*?)^```", text, re.M | re.S)
    checked = 0
    for stage, _, block in forms:
        for number, line in enumerate(block.splitlines()):
            folder = tmp_path / f"{stage}-{number}-{checked}"
            folder.mkdir()
            (folder / "rows.jsonl").write_text(line + "\n")
            name, longest, rows = data_set(stage, str(folder / "rows.jsonl"), folder)
            assert (name, rows) == ("rows", 1) and 8 < longest < len(line)
            checked += 1
    assert checked == 7


def changes(page: str) -> list[tuple[str, list[str]]]:
    """(file, lines of its diff) of each file that the diffs of a page change."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(ROOT / "docs" / page, "diff"):
        for line in block.splitlines():
            if line.startswith("+++ b/"):
                found.append((line.removeprefix("+++ b/"), []))
            elif found and not line.startswith(("---", "@@")):
                found[-1][1].append(line)
    return found


def test_what_adding_a_loss_changes_is_in_the_code() -> None:
    """Lines that the page's diffs leave or take away stand in these files; its loss is a formula
    of names that the module has.
    """
    for file, lines in changes("adding_a_loss.md"):
        if not (ROOT / file).exists():
            continue  # the page's new file
        code = (ROOT / file).read_text().splitlines()
        kept = [line[1:] for line in lines if line[:1] in " -"]
        assert all(line in code for line in kept), (file, kept)
    from longfactory.stages import losses

    [(_, lines), *_] = changes("adding_a_loss.md")
    names = dict(vars(losses))
    exec("\n".join(line[1:] for line in lines), names)
    one = torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    pair = SimpleNamespace(margin=one[0])
    options = SimpleNamespace(beta=2.0)
    assert torch.equal(names["exponential"](pair, options, None), torch.exp(-2.0 * one[0]))
