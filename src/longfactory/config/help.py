"""The keys in words, for `longfactory train --help`."""

from __future__ import annotations

import textwrap

from longfactory.config.arguments import GROUPS
from longfactory.config.fields import Key, describe, keys_of
from longfactory.config.other_keys import ALIASES, ELSEWHERE, NO_EFFECT, REFUSED, REFUSED_VALUES
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import TURNED

TRAINER_TITLE = (
    "Training (transformers' own keys; see the documentation of Seq2SeqTrainingArguments)"
)


def help_text(word: str | None = None) -> str:
    """Every key with its type, default and meaning; with `word`, those whose name or meaning has
    it.
    """
    sections = [
        (cls.__doc__.splitlines()[0].rstrip("."), list(keys_of(cls).values()))
        for cls in GROUPS.values()
    ]
    sections.append((TRAINER_TITLE, [*TRAINER_KEYS.values(), *TURNED.values()]))
    out: list[str] = []
    for title, keys in sections:
        lines = [
            _line(k) for k in keys if word is None or word.lower() in f"{k.name} {k.help}".lower()
        ]
        if lines:
            out += [title, *lines, ""]
    if word is not None:
        for name, new in ALIASES.items():
            if word.lower() in name:
                out.append(f"{name} is another name of {new}.")
        for name, other in (*NO_EFFECT.items(), *REFUSED.items()):
            if word.lower() in name:
                out.append(
                    f"{name} {'has no effect' if name in NO_EFFECT else 'is refused'}:"
                    f" {other.sentence}."
                )
        out += [
            f"{name} is no key here: use {here}."
            for name, here in ELSEWHERE.items()
            if word.lower() in name
        ]
        if not out:
            out.append(f"No key has {word!r} in its name or meaning.")
    return "\n".join(out).rstrip() + "\n"


def tables() -> str:
    """The tables of docs/migrating.md: other names, keys without effect, refused keys. `python -m
    longfactory.config.help` prints them.
    """
    parts = ["### Other names", "", "| written | read as |", "|---|---|"]
    parts += [f"| `{name}` | `{new}` |" for name, new in ALIASES.items()]
    parts += [f"| `{key.name}` | {key.help.rstrip('.')} |" for key in TURNED.values()]
    for title, table in (("Keys without effect", NO_EFFECT), ("Keys that are refused", REFUSED)):
        by_sentence: dict[str, list[str]] = {}
        for name, other in table.items():
            by_sentence.setdefault(other.sentence, []).append(f"`{name}`")
        parts += [
            "",
            f"### {title}",
            "",
            "| key | " + ("why" if table is NO_EFFECT else "instead") + " |",
            "|---|---|",
        ]
        parts += [f"| {' '.join(names)} | {sentence} |" for sentence, names in by_sentence.items()]
    for name, values in REFUSED_VALUES.items():
        for sentence in dict.fromkeys(values.values()):
            same = "`, `".join(value for value, words in values.items() if words == sentence)
            parts.append(f"| `{name}: {same}` | {sentence} |")
    return "\n".join(parts) + "\n"


def _line(key: Key) -> str:
    default = key.default
    if default is None or default == ():
        shown = ""
    elif isinstance(default, tuple):
        shown = ", ".join(str(d) for d in default)
    else:
        shown = str(default).lower() if isinstance(default, bool) else str(default)
    kind = describe(key.kind)
    head = f"  {key.name}: {shown}".rstrip() if shown else f"  {key.name}"
    text = (
        f"{key.help} [{kind}]"
        if len(kind) < 60 or not key.help
        else f"{key.help}\n{' ' * 6}[{kind}]"
    )
    body = "\n".join(
        textwrap.fill(part.strip(), width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for part in text.strip().splitlines()
    )
    return f"{head}\n{body}"


if __name__ == "__main__":
    print(tables(), end="")
