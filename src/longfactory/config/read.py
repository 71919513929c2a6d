"""From the command line to one flat mapping of keys: a YAML or JSON file with `key=value` behind
it, or `--key value` flags.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longfactory.config.fields import HIDDEN, is_secret, plain, shown, told, whole_path
from longfactory.errors import ConfigError

FILES = (".yaml", ".yml", ".json")
EXPONENT = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+")
"""Numbers like 1e-4, which YAML 1.1 takes for text."""
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
MOST_VALUES = 100_000
"""Values in a file, with what its anchors repeat."""


def read(argv: Sequence[str], is_switch: Callable[[str], bool]) -> dict[str, Any]:
    """Keys and values as written; what stands further right wins.

    Args:
        argv: what follows the command's name.
        is_switch: whether a key is a boolean, so that `--key` alone means true.

    Raises:
        ConfigError: a file that is missing or cannot be read, or a word that is neither a file,
            `key=value` nor a flag.
    """
    words = list(argv)
    values: dict[str, Any] = {}
    # DeepSpeed's launcher puts this before what the user wrote; the environment says the same.
    if words and words[0].startswith("--local_rank="):
        words.pop(0)
    if words and _is_file(words[0]):
        values = read_file(Path(words.pop(0)))
    while words:
        word = words.pop(0)
        if word.startswith("--") and len(word) > 2:
            values |= _flag(word[2:], words, is_switch)
        elif OVERRIDE.match(word):
            _deep_update(values, _override(word))
        else:
            # What stands here may be the value of a secret's key.
            secret = any(is_secret(name) for name in values)
            raise ConfigError(
                f"{'A word' if secret else shown(word)} is not understood: expected a YAML "
                "file as the first argument, then key=value or --key value."
            )
    return values


def _is_file(word: str) -> bool:
    """Whether the first word names a file. `key=value.json` does, too, where that is one."""
    if not word.lower().endswith(FILES) or word.startswith("-"):
        return False
    return "=" not in word or not OVERRIDE.match(word) or Path(word).is_file()


def _flag(name: str, words: list[str], is_switch: Callable[[str], bool]) -> dict[str, Any]:
    """One `--key value`, `--key=value`, `--key value value`, `--switch` or `--no_switch`; takes its
    values off the front of `words`.
    """
    name, equals, value = name.partition("=")
    key = name.replace("-", "_")
    if equals:
        return {key: value}
    if key.startswith("no_") and is_switch(key[3:]) and not is_switch(key):
        return {key[3:]: False}
    taken: list[str] = []
    while words and not words[0].startswith("--"):
        if OVERRIDE.match(words[0]) and (taken or is_switch(key)):
            break
        if taken and is_switch(key):
            break
        taken.append(words.pop(0))
    if not taken:
        if is_switch(key):
            return {key: True}
        raise ConfigError(f"--{name} needs a value.")
    return {key: taken[0] if len(taken) == 1 else taken}


def _instead_of(path: Path) -> str:
    """What the user may have meant by a file that is not there."""
    try:
        there = [f.name for f in path.parent.iterdir() if f.name.lower().endswith(FILES)]
    except OSError:
        return f" There is no folder {whole_path(path.parent)} either."
    close = difflib.get_close_matches(path.name, there, n=3)
    if close:
        return f" Did you mean {' or '.join(whole_path(path.parent / name) for name in close)}?"
    return " `longfactory init sft --data FILE` writes one."


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. `${oc.env:NAME}` and the like are resolved as OmegaConf
    does.

    Raises:
        ConfigError: the file is missing, is not valid, or gives a key twice with different values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content: Any = None
    try:
        if not path.is_file():
            raise ConfigError(f"There is no file {whole_path(path)}.{_instead_of(path)}")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else _yaml(text, path)
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds no keys; a mapping of keys to values is needed.")
        bad = [k for k in content if not isinstance(k, str)]
        if bad:
            raise ConfigError(f"{path}: the key {shown(bad[0])} is not text.")
        _check_size(content, path)
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except ConfigError:
        raise
    except RecursionError as e:
        raise ConfigError(
            f"{path} cannot be read: its lists or mappings are nested too deep."
        ) from e
    except OSError as e:
        name = whole_path(path)
        raise ConfigError(f"{name} cannot be read: {e.strerror or e}.") from e
    except (OmegaConfBaseException, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {_one_line(e, content)}") from None
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def _check_size(content: Any, path: Path) -> None:
    """Refuses a file whose anchors repeat so much that no copy of it can be made.

    Raises:
        ConfigError: with the number of values.
    """
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) not in sizes:
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(x) for x in inner)
        return sizes[id(value)]

    if (count := size(content)) > MOST_VALUES:
        raise ConfigError(
            f"{path} holds {count:.4g} values, with what its anchors repeat; expected at most"
            f" {MOST_VALUES}."
        )


def _one_line(error: Exception, content: Any = None) -> str:
    """The first line of what another library says, without the secrets of `content`; further lines
    quote the file.
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, str) and value and is_secret(str(name)):
            text = text.replace(value, HIDDEN)
    return text


def _yaml(text: str, path: Path) -> Any:
    """YAML with 1e-4 as a number. A key may stand twice if it says the same thing."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key, value = (
                    self.construct_object(key_node, deep=True),
                    self.construct_object(value_node, deep=True),
                )
                if not isinstance(key, (str, int, float, bool, type(None))):
                    raise ConfigError(
                        f"{path}, line {key_node.start_mark.line + 1}: got the key {shown(key)},"
                        " expected text."
                    )
                if key in seen and seen[key] != value:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(
                        f"{path}, line {line}: duplicate key {plain(str(key))}, with the values"
                        f" {told(str(key), seen[key])} and {told(str(key), value)}. Keep one."
                    )
                seen[key] = value
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as e:
        # Without the lines that it quotes: they may hold secrets.
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (e.context, e.problem) if part)
        raise ConfigError(f"{path} is not valid YAML: {where}{what}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(e)}") from e


def _override(word: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as e:
        name, _, value = word.partition("=")
        if is_secret(name):
            raise ConfigError(f"{name}={HIDDEN} cannot be read. Put it in quotes.") from None
        raise ConfigError(f"{name}={plain(value)} cannot be read: {_one_line(e)}") from e
    assert isinstance(content, dict)
    return {str(k): v for k, v in content.items()}


def _deep_update(base: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _deep_update(base[key], value)
        else:
            base[key] = value
