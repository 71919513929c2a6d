"""Rows of files, one after the other, each with its place. A row that cannot be read is handed on
as a `BadRow`, never dropped.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from longfactory import hub
from longfactory.config.data_names import FILE_TYPES
from longfactory.data.errors import BadRow
from longfactory.data.sources import DataSource
from longfactory.errors import DataError

# A raw row: a parsed row, a line of JSON that a worker parses, or a row that could not be read.
Raw = dict[str, Any] | bytes | BadRow
_WHITE = re.compile(r"[ \t\n\r]*")


def read(source: DataSource, token: str | None = None) -> Iterator[tuple[str, Raw]]:
    """(place, raw row) of every row of a data set. Places count from 1: "file.jsonl:17", "file.json
    row 17".
    """
    if source.load_from == "file":
        for path in source.files():
            yield from read_file(path)
    elif source.load_from == "hub":
        yield from _read_hub(source, token)
    else:
        yield from _read_cloud(source)


def read_file(path: Path) -> Iterator[tuple[str, Raw]]:
    """Rows of one local file, by its ending."""
    kind = FILE_TYPES.get(path.suffix[1:].lower())
    match kind:
        case "json":
            with path.open("rb") as f:
                first = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            yield from _read_array(path) if first == b"[" else _read_lines(path)
        case "csv":
            yield from _read_csv(path)
        case "text":
            yield from _read_text(path)
        case _:
            yield from _read_arrow(path, parquet=kind == "parquet")


def first_rows(source: DataSource, count: int = 20) -> list[dict[str, Any]]:
    """The first rows of a data set that can be read, to learn their form from.

    Raises:
        DataError: there is none.
    """
    rows: list[dict[str, Any]] = []
    why = ""
    for place, raw in islice(read(source), 10 * count):
        try:
            if isinstance(raw, BadRow):
                raise raw
            rows.append(parse_line(raw) if isinstance(raw, bytes) else raw)
        except BadRow as e:
            why = why or f" First: {place}: {e}."
        if len(rows) == count:
            break
    if not rows:
        raise DataError(f"{source.name} holds no row that can be read.{why}")
    return rows


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of a JSON Lines file.

    Raises:
        BadRow: broken UTF-8, invalid JSON, or a line that is not an object.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadRow(f"broken UTF-8: byte {e.start + 1} of the line") from None
    except json.JSONDecodeError as e:
        raise BadRow(f"invalid JSON: {e.msg} at character {e.pos + 1} of the line") from None
    except RecursionError:
        raise BadRow("invalid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise BadRow(f"not a JSON object: the line holds a {type(row).__name__}")
    return row


def _read_lines(path: Path) -> Iterator[tuple[str, Raw]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path.name}:{number}", line


def _read_array(path: Path) -> Iterator[tuple[str, Raw]]:
    """A JSON array of objects, parsed object by object. Bytes that are not UTF-8 spoil their row
    only.
    """
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    decode = json.JSONDecoder().raw_decode
    at = _white(text, text.index("[") + 1)
    number = 0
    while text[at : at + 1] != "]":
        number += 1
        try:
            row, end = decode(text, at)
        except json.JSONDecodeError as e:
            raise DataError(
                f"{path.name} is broken at row {number}: {e.msg} in line {e.lineno}. Nothing "
                "after it can be read: repair the file, or convert it to JSON Lines, where a "
                "bad line costs only one row."
            ) from None
        if not isinstance(row, dict):
            yield (
                f"{path.name} row {number}",
                BadRow(f"not a JSON object: the row is a {type(row).__name__}"),
            )
        elif text.isascii() or _clean(text[at:end]):
            yield f"{path.name} row {number}", row
        else:
            yield (
                f"{path.name} row {number}",
                BadRow("broken UTF-8: the row holds bytes that are not UTF-8"),
            )
        at = _white(text, end)
        if text[at : at + 1] == ",":
            at = _white(text, at + 1)
        elif text[at : at + 1] != "]":
            line = text.count("\n", 0, at) + 1
            raise DataError(
                f"{path.name} is broken after row {number} (line {line}): a comma or the closing"
                " bracket is missing."
            )


def _white(text: str, at: int) -> int:
    found = _WHITE.match(text, at)
    return found.end() if found else at


def _clean(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path) -> Iterator[tuple[str, Raw]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
        reader = csv.DictReader(f, restkey=None)
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row:
                yield place, BadRow("too many fields: the line has more fields than the header")
            elif not all(v is None or _clean(v) for v in row.values()):
                yield place, BadRow("broken UTF-8: the row holds bytes that are not UTF-8")
            else:
                yield place, {k: v if v != "" else None for k, v in row.items()}


def _read_text(path: Path) -> Iterator[tuple[str, Raw]]:
    """Each line is a text, in the column "text". Blank lines are no rows."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\n")
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            yield (
                place,
                (
                    {"text": line}
                    if _clean(line)
                    else BadRow("broken UTF-8: the line holds bytes that are not UTF-8")
                ),
            )


def _read_arrow(path: Path, parquet: bool) -> Iterator[tuple[str, Raw]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if parquet:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            batches = file.iter_batches(batch_size=1000)
        else:
            try:
                batches = iter(pa.ipc.open_stream(path))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(path)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in batches:
            # Offsets beyond the data, which a damaged file may hold, would end the process.
            batch.validate(full=True)
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                number += 1
                yield f"{path.name} row {number}", row
    # what a damaged file raises depends on where the damage is
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = next(
            (line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__
        )
        raise DataError(
            f"{path.name} cannot be read after row {number}: {reason}. Write the file again from"
            " its source."
        ) from None


def _read_hub(source: DataSource, token: str | None) -> Iterator[tuple[str, Raw]]:
    import datasets

    number = 0
    try:
        away = (
            None
            if Path(source.location).exists()
            or _prepared(source.location, datasets.config.HF_DATASETS_CACHE)
            else hub.unreachable()
        )
        if away:
            raise ConnectionError(f"the hub cannot be reached: {away}")
        rows = datasets.load_dataset(
            source.location,
            name=source.subset,
            data_dir=source.folder,
            split=source.split,
            token=token,
            streaming=True,
        )
        for row in rows:
            number += 1
            yield f"{source.location} row {number}", row
    # the hub, datasets and huggingface_hub raise these and what inherits from them
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(_elsewhere(source, "read from the Hugging Face hub", number, e)) from e


def _prepared(name: str, cache: str | Path) -> bool:
    """Whether the cache of `datasets` may hold this data set (a folder owner___data_set), which it
    then reads without the hub.
    """
    return next(Path(cache).expanduser().glob(f"{name.split('/')[0]}*"), None) is not None


def _elsewhere(source: DataSource, what: str, number: int, error: Exception) -> str:
    reason = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return (
        f"Data set {source.name!r}: {source.location} could not be"
        f" {what}{f' after row {number}' if number else ''} ({reason}). Check its name, the network"
        " and hf_hub_token; or download it and give its file_name in dataset_info.json."
    )


def _read_cloud(source: DataSource) -> Iterator[tuple[str, Raw]]:
    import tempfile

    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        try:
            files = fsspec.open_files(source.location, "rb")
        except (OSError, ValueError, ImportError) as e:
            raise DataError(_elsewhere(source, "opened", 0, e)) from e
        for file in files:
            local = Path(folder, Path(file.path).name)
            try:
                with file as remote, local.open("wb") as copy:
                    shutil.copyfileobj(remote, copy, 1 << 24)
            except OSError as e:
                raise DataError(_elsewhere(source, "copied", 0, e)) from e
            yield from read_file(local)
            local.unlink()
