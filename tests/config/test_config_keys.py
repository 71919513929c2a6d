"""No key is unknown that people's files carry, and no key is silently ignored."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

import longfactory
from longfactory.config import ConfigError, from_mapping
from longfactory.config.arguments import GROUPS
from longfactory.config.fields import keys_of
from longfactory.config.other_keys import ALIASES, NO_EFFECT, REFUSED, REFUSED_VALUES
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import KNOWN, OWN_KEYS, TURNED
from smallest_run import BASE

SOURCE = Path(longfactory.__file__).parent

# Fields that transformers adds to TrainingArguments for itself, and that no YAML sets.
NOT_FOR_USERS: set[str] = set()


def test_each_key_stands_in_one_table() -> None:
    tables = {
        "own": OWN_KEYS,
        "trainer": TRAINER_KEYS,
        "turned": TURNED,
        "alias": ALIASES,
        "no effect": NO_EFFECT,
        "refused": REFUSED,
    }
    for a in tables:
        for b in tables:
            assert a >= b or not set(tables[a]) & set(tables[b]), (a, b)
    names = [name for cls in GROUPS.values() for name in keys_of(cls)]
    assert len(names) == len(set(names))


def test_aliases_lead_to_keys() -> None:
    assert set(ALIASES.values()) <= KNOWN - set(ALIASES)


def test_every_key_of_ours_has_help_and_a_default_of_its_type() -> None:
    for key in OWN_KEYS.values():
        assert key.help.endswith((".", "!")), key.name
        assert key.parse(key.default) == key.default, key.name


def test_every_key_of_transformers_is_known() -> None:
    """A release that adds a key shows up here: it is passed on, turned into another, or refused, by
    decision.
    """
    from transformers import Seq2SeqTrainingArguments

    fields = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert fields - KNOWN - NOT_FOR_USERS == set()
    assert set(TRAINER_KEYS) - fields == set()


def test_types_and_defaults_of_transformers() -> None:
    from transformers import Seq2SeqTrainingArguments

    for f in dataclasses.fields(Seq2SeqTrainingArguments):
        if f.name in TRAINER_KEYS and f.default is not dataclasses.MISSING:
            key = TRAINER_KEYS[f.name]
            theirs = getattr(f.default, "value", f.default)
            assert key.default == theirs, f.name
            if f.type in (int, bool):
                assert key.kind is f.type, f.name


def test_choices_of_transformers() -> None:
    import typing

    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    for name, theirs in (
        ("optim", OptimizerNames),
        ("lr_scheduler_type", SchedulerType),
        ("eval_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
    ):
        assert set(typing.get_args(TRAINER_KEYS[name].kind)) == {x.value for x in theirs}, name


def llamafactory_source() -> Path:
    """Where the installed package lies, found without importing it (other tests put stand-ins of
    its modules into sys.modules).
    """
    try:
        return Path(
            str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory"))
        )
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llamafactory is not installed")


def test_every_key_of_llamafactory_is_known_with_its_default() -> None:
    """Read from the installed package's source, without importing it."""
    source = llamafactory_source()
    found: dict[str, Any] = {}
    for path in (source / "hparams").glob("*_args.py"):
        if path.stem == "evaluation_args":
            continue
        for cls in ast.parse(path.read_text()).body:
            if isinstance(cls, ast.ClassDef):
                found |= _fields(cls)
    assert len(found) > 200
    assert set(found) - KNOWN == set()
    for name, default in found.items():
        if default is not _UNKNOWN:
            # Whoever copies a default is neither refused nor told anything.
            cfg = from_mapping({**BASE, name: default} if name not in BASE else BASE)
            assert cfg.notes == (), name


_UNKNOWN = object()


def _fields(cls: ast.ClassDef) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in cls.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        value: Any = item.value
        if isinstance(value, ast.Call):
            given = {k.arg: k.value for k in value.keywords}
            if "init" in given:
                continue
            value = given.get("default")
        try:
            out[item.target.id] = eval(
                compile(ast.Expression(value), "", "eval"), {"__builtins__": {}}
            )
        except Exception:
            out[item.target.id] = _UNKNOWN
    return out


@pytest.mark.parametrize("name", sorted({*REFUSED, *NO_EFFECT}))
def test_what_is_not_supported_says_so(name: str) -> None:
    """Any value beside the harmless ones is refused, or earns a note: none passes in silence."""
    other = REFUSED.get(name) or NO_EFFECT[name]
    for harmless in other.harmless:
        assert from_mapping({**BASE, name: harmless}).notes == ()
    unusual = {"strange": 1}
    if name in REFUSED:
        with pytest.raises(ConfigError, match=f"^{name}: .* is refused: "):
            from_mapping({**BASE, name: unusual})
    else:
        assert from_mapping({**BASE, name: unusual}).notes[0].startswith(f"{name}: ")
    assert len(other.sentence.split()) >= 3


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in REFUSED_VALUES.items() for v in values]
)
def test_values_that_are_refused_say_what_to_use(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: {value} is refused: "):
        from_mapping({**BASE, name: value})


def test_the_migration_page_has_the_tables() -> None:
    """`python -m longfactory.config.help` prints what belongs at the end of docs/migrating.md."""
    from longfactory.config.help import tables

    page = (SOURCE.parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert page.endswith(tables())


def test_every_new_key_is_on_the_migration_page() -> None:
    """Keys of ours that LLaMA-Factory does not know."""
    source = llamafactory_source()
    theirs = "".join(p.read_text() for p in (source / "hparams").glob("*_args.py"))
    page = (SOURCE.parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
    fork = {"sequence_parallel_ulysses_degree", "sequence_parallel_ring_degree"}
    new = [k for k in OWN_KEYS if f"    {k}: " not in theirs and k not in fork]
    assert [k for k in new if f"`{k}`" not in page] == []


def _mentioned() -> set[str]:
    """Names that the program reads anywhere outside the declarations: attributes, and strings for
    getattr.
    """
    names: set[str] = set()
    readers = ("run.py", "load.py", "data_arguments.py", "loss_facts.py")
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "config" and path.name not in readers:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                # f"use_{name}_loss"
                parts = [v.value if isinstance(v, ast.Constant) else "*" for v in node.values]
                names.add("".join(str(p) for p in parts))
    return names


def test_every_key_of_ours_is_read_by_the_program() -> None:
    import fnmatch

    names = _mentioned()
    patterns = [n for n in names if "*" in n and len(n.replace("*", "")) >= 5]
    unread = [
        k
        for k in OWN_KEYS
        if k not in names and not any(fnmatch.fnmatchcase(k, p) for p in patterns)
    ]
    assert unread == []
