"""A short form of `benchmarks/survival.py --part data_files`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import _survival_data_files as part
from longfactory.data.readers import read_file
from longfactory.errors import DataError


@pytest.mark.usefixtures("as_a_command")
def test_part(tmp_path: Path) -> None:
    result = part.run_case({"kind": "files", "seed": 0, "number": 0}, tmp_path)
    assert result["ok"], result["end"]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_offsets_beyond_the_data_are_a_sentence(kind: str, tmp_path: Path) -> None:
    """pyarrow does not look at the offsets of an arrow file, and would read beyond its memory."""
    batch = pa.RecordBatch.from_pydict({"text": ["hello", "there"]})
    path = tmp_path / "d.arrow"
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(path, batch.schema) as writer:
        writer.write_batch(batch)
    data, offsets = path.read_bytes(), b"".join(n.to_bytes(4, "little") for n in (0, 5, 10))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:8] + (2**30).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"d\.arrow cannot be read after row 0"):
        list(read_file(path))
