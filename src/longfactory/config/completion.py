"""`longfactory completion bash | zsh | fish`: a script that completes commands, keys and files."""

from __future__ import annotations

from collections.abc import Sequence

from longfactory.config.schema import schema

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# longfactory completion bash >> ~/.bash_completion
_longfactory() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
    init) COMPREPLY=($(compgen -W "{stages} --model --data --lora --out" -- "$word")) ;;
    completion) COMPREPLY=($(compgen -W "{shells}" -- "$word")) ;;
    {with_keys})
      case "$word" in
        *=*|*/*) ;;
        *) COMPREPLY=($(compgen -S = -W "{keys}" -- "$word")); compopt -o nospace 2>/dev/null ;;
      esac ;;
  esac
  COMPREPLY+=($(compgen -f -- "${{word#*=}}"))
}}
complete -o filenames -F _longfactory longfactory
"""
_ZSH = """\
# longfactory completion zsh >> ~/.zshrc
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""
_FISH = """\
# longfactory completion fish > ~/.config/fish/completions/longfactory.fish
complete -c longfactory -n __fish_use_subcommand -a "{commands}"
complete -c longfactory -n "__fish_seen_subcommand_from init" -a "{stages}"
complete -c longfactory -n "__fish_seen_subcommand_from completion" -a "{shells}"
complete -c longfactory -n "__fish_seen_subcommand_from {with_keys}" -a "{equals}"
"""
WITH_KEYS = ("train", "verify", "plan", "teach", "eval", "export", "chat")


def script(shell: str, commands: Sequence[str], stages: Sequence[str]) -> str:
    """The script.

    Args:
        shell: one of `SHELLS`.
        commands: of longfactory.
        stages: what `longfactory init` takes.
    """
    keys = list(schema()["properties"])
    with_keys = [name for name in WITH_KEYS if name in commands]
    words = {
        "commands": " ".join(commands),
        "stages": " ".join(stages),
        "shells": " ".join(SHELLS),
        "keys": " ".join(keys),
        "equals": " ".join(f"{name}=" for name in keys),
    }
    if shell == "fish":
        return _FISH.format(with_keys=" ".join(with_keys), **words)
    bash = _BASH.format(with_keys="|".join(with_keys), **words)
    return bash if shell == "bash" else _ZSH + bash
