"""A process of its own: the first samples of a run's data as training sees them, as JSON.

`python -m longfactory.webui.preview RUN.yaml FOLDER...` reads data from these folders alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longfactory.errors import USER_ERROR, UserError
from longfactory.webui.folders import Folders

if TYPE_CHECKING:
    from longfactory.config import RunConfig
    from longfactory.data.samples import DecodedDocument

ROWS = 64
"""Of each data set that are read."""
CHARACTERS = 6_000
"""Of a document that are shown at its head, and as many at its tail."""


def preview(cfg: RunConfig, folders: Folders) -> dict[str, Any]:
    """The first, the longest and a random one of the first `ROWS` samples, and what became of the
    rows.

    Raises:
        UserError: data that cannot be used, or that lie outside of the chosen folders.
    """
    from longfactory.data.module import kind_of
    from longfactory.data.samples import decoded_samples
    from longfactory.data.sources import read_sources
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    if cfg.known_cutoff_len == 0:
        raise UserError("cutoff_len: auto: the preview needs a number.")
    if cfg.data.tokenized_path is not None:
        raise UserError("tokenized_path: what is saved there is not shown on this page.")
    for source in read_sources([*cfg.data.dataset], cfg.data.dataset_dir, lambda told: None):
        kind_of(cfg.method.stage).check_source(source, cfg.method.stage)
        for file in source.files() if source.load_from == "file" else ():
            folders.inside(file, f"dataset {source.name}")
    few = min(ROWS, cfg.data.max_samples or ROWS)
    data = dataclasses.replace(
        cfg.data,
        max_samples=few,
        streaming=False,
        val_size=0.0,
        eval_dataset=(),
        preprocessing_num_workers=None,
        on_bad_row="skip",
    )
    tokenizer = load.load_tokenizer(cfg.model)
    # Not into the cache of token files: these are of a few rows.
    with tempfile.TemporaryDirectory(prefix="longfactory-preview-") as cache:
        os.environ["LONGFACTORY_CACHE"] = cache
        found = load_data(dataclasses.replace(cfg, data=data), tokenizer, quiet=True).train
        samples = decoded_samples(found, tokenizer, cfg.trainer.seed)
        report = found.report.describe() if found is not None and hasattr(found, "report") else ""
    return {
        "report": f"The first {few} rows of each data set: {report}",
        "samples": [
            {
                "which": sample.which,
                "number": sample.number,
                "tokens": sample.tokens,
                "trained": sample.trained,
                "documents": [
                    {"role": document.role, "parts": list(_shortened(document))}
                    for document in sample.documents
                ],
            }
            for sample in samples
        ],
    }


def _shortened(document: DecodedDocument) -> Iterator[dict[str, Any]]:
    """The head and the tail of a document; what is left out is a part without a mask."""
    total = sum(len(part.text) for part in document.parts)
    at, told = 0, False
    for part in document.parts:
        head = part.text[: max(0, CHARACTERS - at)]
        tail = part.text[max(len(head), total - CHARACTERS - at) :]
        at += len(part.text)
        if head:
            yield {"text": head, "trained": part.trained}
        if len(head) + len(tail) < len(part.text) and not told:
            told = True
            yield {"text": f"... {total - 2 * CHARACTERS} characters ...", "trained": None}
        if tail:
            yield {"text": tail, "trained": part.trained}


def main(argv: Sequence[str]) -> int:
    """Prints the samples, or a sentence on the error's stream. Returns the exit status."""
    from longfactory.config import load_config

    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries may print
            found = preview(load_config([argv[0], "--dry_run"]), Folders(argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    print(json.dumps(found, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
