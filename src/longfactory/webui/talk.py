"""A process of its own: a model that answers. `python -m longfactory.webui.talk RUN.yaml`.

A line of JSON in is a message, {"text": ...}, or {"clear": true}; lines out are {"ready": true},
{"part": ...} as an answer comes, {"answer": ...} at its end, {"error": ...} where there is none.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from longfactory.errors import USER_ERROR, UserError
from longfactory.processes import die_with_parent


class PrintedText(io.TextIOBase):
    """What is printed, as messages."""

    def __init__(self, out: TextIO):
        self.out = out

    def write(self, text: str) -> int:
        """One message for a text that is not empty."""
        if text:
            say(self.out, {"part": text})
        return len(text)


def say(out: TextIO, message: dict[str, Any]) -> None:
    """Writes one line."""
    out.write(json.dumps(message, ensure_ascii=False) + "\n")
    out.flush()


def main(argv: Sequence[str]) -> int:
    """Loads the model and answers until the input ends. Returns the exit status."""
    die_with_parent()
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from longfactory.config import load_config

            cfg = load_config(argv, command="chat")
            import torch

            from longfactory.output.chat import answer, prompt
            from longfactory.output.load import load

            present = torch.accelerator.is_available()
            device = torch.accelerator.current_accelerator() if present else None
            model, tokenizer = load(cfg, device or torch.device("cpu"))
            system = cfg.data.default_system
            start = [{"role": "system", "content": system}] if system else []
            prompt(cfg, tokenizer, [*start, {"role": "user", "content": "."}])
        except UserError as error:
            say(out, {"error": str(error)})
            return USER_ERROR
    say(out, {"ready": True})
    messages = list(start)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("clear"):
            messages = list(start)
            continue
        messages.append({"role": "user", "content": asked["text"]})
        try:
            with contextlib.redirect_stdout(PrintedText(out)):
                text = answer(cfg, model, tokenizer, messages)
        except Exception as error:  # whatever a model, its template or its device says
            messages.pop()
            say(out, {"error": str(error) or type(error).__name__})
            continue
        messages.append({"role": "assistant", "content": text})
        say(out, {"answer": text})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
