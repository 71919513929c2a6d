"""Reference log-probabilities that are computed once and kept on disk.

What a preference loss needs of the reference is one number a document. Computed before training,
the reference costs one forward over the data and no memory afterwards; the numbers do not depend on
the sequence-parallel size, and are reused by later runs. The file is safetensors (no pickle),
written beside its place and renamed, and every number carries a checksum of the tokens that it
belongs to: a number of another text is refused, never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row
from longfactory.data.store import private_folder, written
from longfactory.errors import UserError
from longfactory.stages.pairs import document_logps

log = logging.getLogger("longfactory")

ROLES = ("chosen", "rejected", "kl")
ABANDONED = 3600
"""Seconds after which a file that is still being written, of kilobytes, has no writer any more."""


# -- fingerprints ----------------------------------------------------------------------------------


def weights_fingerprint(paths: Sequence[str | Path]) -> str:
    """A hash of weight files that takes a moment for any size: names, lengths and 64 evenly
    spaced chunks of 64 KiB of each file.

    Training changes every tensor, so chunks tell checkpoints apart. Copies of a file have the same
    fingerprint, whatever their date.

    Args:
        paths: files, or folders of which every *.safetensors, *.bin, *.gguf and adapter_config.json
            counts.
    Raises:
        FileNotFoundError: no file there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(
                f
                for f in path.iterdir()
                if f.suffix in (".safetensors", ".bin", ".gguf") or f.name == "adapter_config.json"
            )
        else:
            files.append(path)
    if not files:
        raise FileNotFoundError(f"No weight files in {', '.join(map(str, paths))}.")
    digest = hashlib.sha256()
    chunk = 1 << 16
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as f:
            for i in range(64):
                f.seek(max(0, size - chunk) * i // 63)
                digest.update(f.read(chunk))
                if size <= chunk:
                    break
    return digest.hexdigest()[:32]


def document_check(row: Row, index: int) -> int:
    """A checksum of what the log-probability of document `index` is about: all tokens that it sees,
    and its labels.

    The same for an answer that is a branch of a shared prompt and for one that carries its prompt
    itself. `row` is on the host.
    """
    d = row.documents[index]
    check = 0
    if d.parent >= 0:
        parent = row.documents[d.parent]
        check = zlib.crc32(row.input_ids[parent.start : parent.stop].numpy().tobytes(), check)
    check = zlib.crc32(row.input_ids[d.start : d.stop].numpy().tobytes(), check)
    labels = row.labels[d.start : d.stop]
    return zlib.crc32(labels[labels != IGNORE].numpy().tobytes(), check)


# -- the cache -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReferenceCache:
    """One float64 and one checksum for every (role, sample).

    `logps[role]` is [S], NaN where nothing was computed; `checks[role]` is [S] int64.
    """

    logps: Mapping[str, Tensor]
    checks: Mapping[str, Tensor]

    def attach(self, row: Row) -> Row:
        """The row (on the host) with `reference_logp` on every document of a role that has a
        reference.

        Raises:
            UserError: no number for a document, or the number of another text.
        """
        documents = list(row.documents)
        for i, d in enumerate(documents):
            if d.role not in ROLES:
                continue
            known = d.role in self.logps and 0 <= d.sample < len(self.logps[d.role])
            value = float(self.logps[d.role][d.sample]) if known else float("nan")
            if value != value:
                raise UserError(
                    f"There is no reference log-probability for the {d.role} answer of sample"
                    f" {d.sample}. The reference pass did not see this sample: delete the cached"
                    " reference log-probabilities and start again."
                )
            if int(self.checks[d.role][d.sample]) != document_check(row, i):
                raise UserError(
                    f"The reference log-probability of the {d.role} answer of sample {d.sample} was"
                    " computed for other tokens. The data changed since: delete the cached"
                    " reference log-probabilities and start again."
                )
            documents[i] = dataclasses.replace(d, reference_logp=value)
        return dataclasses.replace(row, documents=tuple(documents))


def precompute(
    rows: Iterable[Row],
    logps_of: Callable[[Row], Tensor],
    samples: int,
    *,
    ld_alpha: float | None = None,
    dp_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> ReferenceCache:
    """One forward over the data. Collective: every rank comes here, with the rows of its
    data-parallel group.

    Give it the rows as training will see them (same batch size): then the first loss of DPO is log
    2 to the last bit, because the same matrix products were made. Other rows give the same numbers
    up to rounding.

    Args:
        rows: on the host, every group as many as `logps_of`'s collectives need.
        logps_of: [T] log-probabilities of a row's labels in natural order, under `as_reference`.
        samples: number of samples of the data set: `Document.sample` lies in [0, samples).
        ld_alpha: the stage's.
        dp_sum: adds a tensor over data-parallel groups.
    Raises:
        UserError: a sample number outside of the range.
    """
    # [role, (sum, check, how often), sample]
    table = torch.zeros(len(ROLES), 3, samples, dtype=torch.float64)
    device: torch.device | None = None
    # read in blocks: each read waits for the device
    pending: list[tuple[list[tuple[int, int, int]], Tensor]] = []
    for row in rows:
        logps = logps_of(row)
        device = logps.device
        sums = document_logps(logps.detach(), row.to(device), ld_alpha)
        places = []
        for i, d in enumerate(row.documents):
            if d.role in ROLES:
                if not 0 <= d.sample < samples:
                    raise UserError(
                        f"Sample number {d.sample} is not one of the {samples} samples of the data"
                        " set."
                    )
                places.append((i, ROLES.index(d.role), d.sample))
                table[ROLES.index(d.role), 1, d.sample] += document_check(row, i)
        pending.append((places, sums))
        if len(pending) == 64:
            _enter(pending, table)
            pending = []
    _enter(pending, table)
    table = dp_sum(table if device is None else table.to(device)).cpu()
    often = table[:, 2]
    logps_table = torch.where(
        often > 0, table[:, 0] / often.clamp(min=1), torch.full_like(often, float("nan"))
    )
    checks = (table[:, 1] / often.clamp(min=1)).round().to(torch.int64)
    return ReferenceCache(
        {r: logps_table[i].clone() for i, r in enumerate(ROLES) if bool((often[i] > 0).any())},
        {r: checks[i].clone() for i, r in enumerate(ROLES) if bool((often[i] > 0).any())},
    )


def _enter(pending: list[tuple[list[tuple[int, int, int]], Tensor]], table: Tensor) -> None:
    if not pending:
        return
    sums = torch.cat([s for _, s in pending]).cpu()
    start = 0
    for places, s in pending:
        for i, role, sample in places:
            table[role, 0, sample] += sums[start + i]
            table[role, 2, sample] += 1
        start += s.shape[0]


def cache_file(folder: str | Path, parts: Mapping[str, Any]) -> Path:
    """The file for numbers that depend on `parts`: model path, weights and data fingerprints,
    template, cutoff length, dtype, ld_alpha.
    """
    key = hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"reference_logps-{key}.safetensors"


def save(cache: ReferenceCache, file: Path, parts: Mapping[str, Any]) -> None:
    """Writes beside `file` and renames: a killed run leaves either no file or a whole one.

    Raises:
        DataError: the disk is full, or cannot be written. Nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    private_folder(file.parent)
    for abandoned in file.parent.glob(".reference_logps-*"):  # by a killed process
        if time.time() - abandoned.stat().st_mtime > ABANDONED:
            abandoned.unlink(missing_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    tensors = {f"{r}.logps": t for r, t in cache.logps.items()} | {
        f"{r}.checks": t for r, t in cache.checks.items()
    }
    about = {"parts": json.dumps(dict(parts), sort_keys=True), "sha256": _digest(tensors)}
    try:
        with written(file.parent):
            try:
                save_file(tensors, beside, metadata=about)
            except SafetensorError as error:  # its word for an OSError
                raise OSError(str(error)) from error
            os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def damage(file: Path) -> str | None:
    """What is wrong with a file that `save` wrote, or None. An older version wrote no checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as f:
            about = f.metadata() or {}
            json.loads(about["parts"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        return f"it cannot be read ({error})"
    if about.get("sha256", _digest(tensors)) != _digest(tensors):
        return "its checksum has changed since it was written"
    return None


def _is_there(file: Path) -> bool:
    """Whether the numbers are there and whole; of damaged ones it is logged what is wrong."""
    if not file.exists():
        return False
    problem = damage(file)
    if problem is not None:
        log.warning(
            "The cached reference log-probabilities %s are damaged (%s) and will be computed "
            "again.",
            file,
            problem,
        )
    return problem is None


def load(file: Path, parts: Mapping[str, Any], samples: int) -> ReferenceCache:
    """Reads what `save` wrote.

    Raises:
        UserError: it was computed for something else (named), for another number of samples, or the
            file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as f:
            stored = json.loads((f.metadata() or {}).get("parts", "{}"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as e:
        raise UserError(
            f"The cached reference log-probabilities in {file} cannot be read ({e}). Delete the"
            " file."
        ) from e
    wanted = json.loads(json.dumps(dict(parts)))
    differ = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    if differ:
        k = differ[0]
        raise UserError(
            f"The cached reference log-probabilities in {file} are stale: {', '.join(differ)}"
            f" changed ({k} was {stored.get(k)!r}, is now {wanted.get(k)!r}). Delete the file to"
            " compute them again."
        )
    if any(len(t) != samples for t in tensors.values()) or not tensors:
        raise UserError(
            f"The cached reference log-probabilities in {file} are not of {samples} samples. Delete"
            " the file."
        )
    roles = [r for r in ROLES if f"{r}.logps" in tensors]
    return ReferenceCache(
        {r: tensors[f"{r}.logps"] for r in roles}, {r: tensors[f"{r}.checks"] for r in roles}
    )


def load_or_precompute(
    folder: str | Path,
    parts: Mapping[str, Any],
    rows: Callable[[], Iterable[Row]],
    logps_of: Callable[[Row], Tensor],
    samples: int,
    *,
    ld_alpha: float | None = None,
    dp_sum: Callable[[Tensor], Tensor] = lambda x: x,
    everywhere: Callable[[bool], bool] = lambda x: x,
    write: bool = True,
) -> tuple[ReferenceCache, bool]:
    """The cached numbers, or a reference pass that fills the cache. Returns them and whether they
    came from disk.

    Collective. `everywhere` tells each rank whether all ranks say yes: they must agree on reading
    or computing. `write` is true on one rank of each file system.
    """
    parts = {**parts, "ld_alpha": ld_alpha}
    file = cache_file(folder, parts)
    if everywhere(_is_there(file)):
        return load(file, parts, samples), True
    cache = precompute(rows(), logps_of, samples, ld_alpha=ld_alpha, dp_sum=dp_sum)
    if write:
        save(cache, file, parts)
    return cache, False
