"""What is written to the terminal: lines that leave a progress bar whole, and what other packages
say, each thing once and without what is known to mean nothing here.

Nothing of the level of an error is ever left out. `LONGFACTORY_DEBUG=1` leaves out nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

FORMAT, TIME = "[%(asctime)s] %(message)s", "%H:%M:%S"

OTHERS = ("transformers", "accelerate", "datasets", "peft", "torchao", "py.warnings")
"""Loggers of other packages; of Python's warnings the last. DeepSpeed's puts its own handler in
place when it is imported (`set_up`).
"""

NOISE = re.compile(
    "|".join(
        (
            r"Setting accelerator to CPU",  # DeepSpeed, imported by others where it is not used
            r"barrier\(\): using the device under current context",  # torch
            r"Guessing device ID based on global rank",
            r"This DataLoader will create \d+ worker processes",
            r"The tokenizer has new PAD/BOS/EOS tokens",  # transformers: it makes them agree
            r"`use_cache=True` is incompatible with gradient checkpointing",
            r"`is_gradient_checkpointing` is deprecated",  # asked for by PEFT
            r"Token indices sequence length is longer than",
            r"Failed to load .*torchao",  # kernels for other devices than this machine's
            # transformers, resuming: a tied output layer is in the file once, as the embedding;
            # what a checkpoint holds has been compared with its manifest
            r"missing keys in the checkpoint model loaded: \['lm_head\.weight'\]",
            # PEFT, of a layer that is trained and saved on purpose
            r"Setting `save_embedding_layers` to `True`",
        )
    )
)
"""What other packages say of their own inside, and no user can act on."""


def interactive() -> bool:
    """Whether a person watches: stderr is a terminal that can redraw a line."""
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)
    return bool(is_terminal()) and os.environ.get("TERM") != "dumb"


def slow_bars() -> None:
    """Progress bars of all packages: by the first process alone, and where no one watches a line in
    half a minute, not ten a second. Before tqdm is imported, which reads it then; what the user has
    set stays.
    """
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not interactive():
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, "30")


@contextlib.contextmanager
def beside_bars(stream: TextIO) -> Iterator[None]:
    """Takes progress bars off the screen for a moment, so that lines can be written above them."""
    bars: Any = sys.modules.get("tqdm")
    if bars is None or not getattr(bars.tqdm, "_instances", None):
        yield
        return
    with bars.tqdm.external_write_mode(file=stream):
        yield


def close_bars() -> None:
    """Leaves every progress bar as it is: what is written next comes below it."""
    bars: Any = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(bars, "tqdm", None), "_instances", None) or ()):
        with contextlib.suppress(Exception):
            bar.close()


def say(text: str) -> None:
    """A line on stderr."""
    with beside_bars(sys.stderr):
        print(text, file=sys.stderr, flush=True)


class Handler(logging.StreamHandler):
    """A log on stderr whose lines leave progress bars whole. stderr is looked up at each line, so
    that one that was replaced (by a test, by a notebook) gets them.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter(FORMAT, TIME))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        with beside_bars(self.stream):
            super().emit(record)


class OfOthers(logging.Filter):
    """Lets pass what another package says once, in one line; errors as they are. How much it says
    is for its own level (`log_level`).

    Args:
        main: of the process that speaks; the others keep to errors, where `log_level_replica` or
            TRANSFORMERS_VERBOSITY has not asked transformers for more than warnings.
    """

    def __init__(self, main: bool = True) -> None:
        super().__init__()
        self.main = main
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        asked = 0 < logging.getLogger("transformers").level < logging.WARNING
        if not self.main and not asked:
            return False
        text = record.getMessage()
        if NOISE.search(text) or text in self._said:
            return False
        self._said.add(text)
        if record.name == "py.warnings":
            record.msg, record.args = _without_source(text), ()
        return True


def _without_source(text: str) -> str:
    """A warning of Python's without the line of code that follows it: `file:line: Category:
    message`.
    """
    return "\n".join(line for line in text.splitlines() if not line.startswith("  ")).strip()


def set_up(main: bool) -> None:
    """This process's log: ours, and what other packages say. Called again, it changes only whether
    the process speaks.

    Args:
        main: one process speaks; the others keep to errors.
    """
    own = logging.getLogger("longfactory")
    own.setLevel(logging.INFO if main else logging.ERROR)
    if not own.handlers:
        own.addHandler(Handler())
        own.propagate = False
    if os.environ.get("LONGFACTORY_DEBUG", "0").strip().lower() in ("1", "true", "y", "yes", "on"):
        return
    logging.captureWarnings(True)
    for name in OTHERS:
        quiet(logging.getLogger(name), main)
    deepspeed = logging.getLogger("DeepSpeed")
    if not any(isinstance(f, OfOthers) for f in deepspeed.filters):
        deepspeed.addFilter(OfOthers(main))


def quiet(logger: logging.Logger, main: bool) -> None:
    """Another package's log through our handler and filter, in place of its own handlers on the
    terminal; files that it writes stay.
    """
    if any(isinstance(handler, Handler) for handler in logger.handlers):
        return
    for handler in list(logger.handlers):
        if type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
    ours = Handler()
    ours.addFilter(OfOthers(main))
    logger.addHandler(ours)
    logger.propagate = False
