"""`make test-fast` leaves out what starts processes: such tests have the marker `processes`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
STARTS = {"run_ranks", "RankPool", "POOLS", "on_ranks_of_their_own", "subprocess", "Popen"}
"""Names by which a test, or a function that it calls in its own file, starts processes."""


def names_of(node: ast.AST) -> set[str]:
    """Every name and attribute that stands in a piece of code."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def unmarked(source: str) -> list[str]:
    """Tests of a file that start processes and have neither marker."""
    body = ast.parse(source).body
    module_marks: set[str] = set()
    functions: dict[str, ast.FunctionDef] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        if isinstance(node, ast.Assign) and "pytestmark" in names_of(node):
            module_marks |= names_of(node.value)
    starts = {name for name, function in functions.items() if names_of(function) & STARTS}
    while True:
        # a test also starts what the functions of its file start
        more = {n for n, function in functions.items() if names_of(function) & starts} - starts
        if not more:
            break
        starts |= more
    marked = {"processes", "slow", "gpu"}
    return [
        name
        for name in sorted(starts)
        if name.startswith("test_")
        and not marked & module_marks
        and not any(marked & names_of(mark) for mark in functions[name].decorator_list)
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_what_starts_processes_is_marked(path: Path) -> None:
    assert unmarked(path.read_text()) == [], "add @pytest.mark.processes"


def test_a_test_without_the_marker_is_found() -> None:
    source = "def start():\n    subprocess.run([])\ndef test_a():\n    start()\n"
    assert unmarked(source) == ["test_a"]
    assert unmarked("pytestmark = pytest.mark.processes\n" + source) == []
    assert unmarked(source.replace("def test_a", "@pytest.mark.slow\ndef test_a")) == []
    assert unmarked("def test_b():\n    assert add(1, 2) == 3\n") == []
