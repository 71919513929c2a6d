"""The local files of a run's data sets, found without reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longfactory.config.data_arguments import names
from longfactory.data.sources import read_sources
from longfactory.errors import UserError


def data_files(args: Any) -> list[tuple[str, Path]]:
    """(data set, file) of all training and evaluation data that lie in files of this machine.

    Nothing where a data set cannot be found: whoever loads it says so.

    Args:
        args: the data settings of a run (`RunConfig.data_options`).
    """
    wanted = [*names(args.dataset), *names(args.eval_dataset)]
    if not wanted or args.dataset_dir == "ONLINE" or args.dataset_dir.startswith("REMOTE:"):
        return []
    try:
        sources = read_sources(wanted, args.dataset_dir, lambda text: None)
        return [(s.name, p) for s in sources if s.load_from == "file" for p in s.files()]
    except (UserError, OSError, ValueError):
        return []
