"""Rates that `longfactory plan --calibrate` measured on a machine, in place of those of its kind.

A small JSON file. Training takes the one in the cache folder where the run is on one machine, or
the one that LONGFACTORY_CALIBRATION names; all ranks compare it before they start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from longfactory.errors import UserError
from longfactory.memory.shapes import Machine, kind_of

NAME = "calibration.json"
VARIABLE = "LONGFACTORY_CALIBRATION"
IN_A_STEP = 650 / 770
"""Products within a step, of products alone: the rate that steps of H200s follow (`shapes`), and
what the same GPUs reached without anything else (benchmarks/results/throughput_2xH200_7b*.json).
"""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured, in FLOP/s and bytes/s; None for what was not.

    Attributes:
        gpu: its name, as its driver has it.
        products, attention_forward, attention_backward: in bf16, each alone.
        copies: from pinned host memory or to it, whichever is slower.
        wide_heads: what attention with heads of 256 dims reaches, of its rates.
        links: that one GPU receives of parameters gathered over the GPUs of the host.
        gpus: over which `links` was measured.
        host_memory: that AdamW on the host reads and writes, with all cores.
        cores: of the host.
    """

    host_memory: float
    cores: int
    gpu: str | None = None
    products: float | None = None
    attention_forward: float | None = None
    attention_backward: float | None = None
    copies: float | None = None
    wide_heads: float | None = None
    links: float | None = None
    gpus: int = 0

    def of_machine(self, machine: Machine) -> Machine:
        """The machine with what was measured."""
        measured: dict[str, Any] = {
            "gemm": self.products and IN_A_STEP * self.products,
            "attention_forward": self.attention_forward,
            "attention_backward": self.attention_backward,
            "copies": self.copies,
            "wide_heads": self.wide_heads,
            "links": self.links,
            "host_memory": self.host_memory,
        }
        return dataclasses.replace(machine, **{k: v for k, v in measured.items() if v is not None})

    def is_of(self, gpu: str) -> bool:
        """Whether it was measured on this kind of GPU: the rates of a host alone are of any."""
        if self.gpu is None or self.gpu == gpu:
            return True
        kind = kind_of(gpu)
        return kind is not None and kind == kind_of(self.gpu)


def default_path() -> Path:
    """Where `plan --calibrate` writes and training looks: $LONGFACTORY_CALIBRATION, else
    calibration.json in $LONGFACTORY_CACHE, else in ~/.cache/longfactory.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("LONGFACTORY_CACHE") or Path.home() / ".cache" / "longfactory"
    return Path(home) / NAME


def found(one_machine: bool) -> Path | None:
    """The file whose rates a run takes, or None. That of the cache folder is a machine's own, and
    is not for runs on several.

    Raises:
        UserError: LONGFACTORY_CALIBRATION names a file that is not there.
    """
    path = default_path()
    if os.environ.get(VARIABLE):
        if not path.is_file():
            raise UserError(
                f"{VARIABLE}: got {path}, which is not a file. Write it with longfactory plan"
                " --calibrate, or unset the variable."
            )
        return path
    return path if one_machine and path.is_file() else None


def write(calibration: Calibration, path: Path) -> None:
    """Raises:
    UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(calibration), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def read(path: Path) -> Calibration:
    """Raises:
    UserError: the file cannot be read, or is not one that `plan --calibrate` wrote.
    """
    fields = {field.name: field for field in dataclasses.fields(Calibration)}
    again = "Create it again with longfactory plan --calibrate."
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. {again}") from error
    if not isinstance(values, dict) or not {"host_memory", "cores"} <= values.keys():
        raise UserError(f"{path} does not hold measured rates (host_memory, cores, ...). {again}")
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise UserError(f"{path} holds rates that are not known: {', '.join(unknown)}. {again}")
    for name, value in values.items():
        _check(path, name, value)
    return Calibration(**values)


def of_file(path: Path, machine: Machine, gpu: str) -> Machine:
    """A machine with GPUs called so, with the rates of a file.

    Raises:
        UserError: as `read`; the file is of another kind of GPU.
    """
    measured = read(path)
    if not measured.is_of(gpu):
        raise UserError(
            f"{path} was measured on {measured.gpu}, and the plan is for {gpu}. Give the kind that"
            " it was measured on (--gpu), or leave --calibrated out."
        )
    return measured.of_machine(machine)


def _check(path: Path, name: str, value: Any) -> None:
    """Raises:
    UserError: a value that is no rate.
    """
    if name == "gpu":
        fine = value is None or isinstance(value, str)
    elif name == "gpus":
        fine = isinstance(value, int) and value >= 0
    elif value is None:
        fine = name not in ("host_memory", "cores")
    else:
        fine = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    if not fine:
        raise UserError(f"{path}: {name}: got {value!r}, expected a number above 0.")
