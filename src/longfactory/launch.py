"""Starting as many processes as the run needs, through torchrun."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longfactory.errors import UserError

if TYPE_CHECKING:
    from longfactory.config import RunConfig

USER_ERROR = 2
"""Exit status of a process that has told the user what to put right."""


def is_worker() -> bool:
    """Whether a launcher (torchrun, deepspeed, accelerate) has started this process."""
    return "LOCAL_RANK" in os.environ


def is_on(name: str) -> bool:
    """Whether an environment variable says yes: 1, true, y, yes or on."""
    return os.environ.get(name, "0").strip().lower() in ("1", "true", "y", "yes", "on")


def number(name: str, default: int) -> int:
    """An environment variable as a whole number.

    Raises:
        UserError: it is set and is not one.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"Environment variable {name}: got {text!r}, expected a whole number."
        ) from None


def device_count() -> int:
    """Accelerators that this process can see. Does not claim any of them."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def local_processes(cfg: RunConfig) -> int:
    """Processes to start on this machine: as asked (key, then NPROC_PER_NODE), else one for each
    device.
    """
    asked = cfg.parallel.nproc_per_node or number("NPROC_PER_NODE", 0)
    devices = 0 if cfg.trainer.use_cpu else device_count()
    if asked and devices and asked > devices:
        raise UserError(
            f"nproc_per_node: {asked} processes need a device each, and this machine shows"
            f" {devices}. Lower it, or use_cpu: true."
        )
    return asked or max(devices, 1)


def needs_torchrun(cfg: RunConfig, local: int) -> bool:
    """More than one process, or a way of training that wants a process group even for one."""
    return (
        local > 1
        or number("NNODES", 1) > 1
        or is_on("FORCE_TORCHRUN")
        or cfg.trainer.deepspeed is not None
    )


def set_environment(processes: int) -> None:
    """Defaults that long sequences want. What the user has set stays."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if processes > 1 else "true")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def torchrun_arguments(local: int, module: str, argv: Sequence[str]) -> list[str]:
    """torchrun's own command line, from LLaMA-Factory's environment variables.

    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT place a fixed number of machines; RDZV_ID,
    MIN_NNODES, MAX_NNODES, MAX_RESTARTS an elastic run.
    """
    nodes = number("NNODES", 1)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    restarts = number("MAX_RESTARTS", 0)
    head = [f"--nproc-per-node={local}", f"--max-restarts={restarts}"]
    elastic = os.environ.get("RDZV_ID")
    if elastic is not None:
        low, high = os.environ.get("MIN_NNODES"), os.environ.get("MAX_NNODES")
        count = f"{low}:{high}" if low is not None and high is not None else str(nodes)
        endpoint = f"{address or '127.0.0.1'}:{port or 29500}"
        head += [
            f"--nnodes={count}",
            f"--rdzv-id={elastic}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
        ]
    elif nodes > 1:
        if address is None:
            raise UserError(
                f"NNODES is {nodes}: set MASTER_ADDR to the first machine's address, and NODE_RANK"
                " on each machine."
            )
        rank = number("NODE_RANK", 0)
        if not 0 <= rank < nodes:
            raise UserError(
                f"NODE_RANK is {rank}; with NNODES {nodes} it runs from 0 to {nodes - 1}."
            )
        head += [
            f"--nnodes={nodes}",
            f"--node-rank={rank}",
            f"--master-addr={address}",
            f"--master-port={port or 29500}",
        ]
    elif port is not None:
        head += [f"--master-addr={address or '127.0.0.1'}", f"--master-port={port}"]
    else:
        head += ["--standalone"]
    return [*head, "--module", module, *argv]


TOLD = "LONGFACTORY_TOLD"
"""Environment variable of the workers: a path that the one who tells the user of an error creates.
"""


def claim_the_word() -> bool:
    """Whether this process is the one that tells the user: the first of a launch that asks, or any
    where there is no launch of ours.
    """
    path = os.environ.get(TOLD)
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as e:
        return not isinstance(e, FileExistsError)
    return True


def torchrun(arguments: list[str]) -> int:
    """`_torchrun`, with a word that one of the workers may take."""
    with tempfile.TemporaryDirectory(prefix="longfactory-") as folder:
        os.environ[TOLD] = os.path.join(folder, "told")
        try:
            return _torchrun(arguments)
        finally:
            del os.environ[TOLD]


def _torchrun(arguments: list[str]) -> int:
    """Runs torchrun in this process, and returns an exit status. When one worker ends with an
    error, the others are ended too.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    debug = is_on("LONGFACTORY_DEBUG")
    if not debug:
        # Its report of a failed worker says again, at length, what the worker has said.
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(parse_args(arguments))
    except ChildFailedError as e:
        if debug:
            raise
        rank, failure = e.get_first_failure()
        status = failure.exitcode
        if status == USER_ERROR:
            return USER_ERROR
        if status < 0:
            hint = " (killed: often the machine ran out of memory)" if status == -9 else ""
            print(
                f"Process {rank} was ended by signal {-status}{hint}; the others were stopped.",
                file=sys.stderr,
            )
            return 128 - status
        print(
            f"Process {rank} ended with status {status}; the others were stopped. Its own message"
            " is above.",
            file=sys.stderr,
        )
        return status
    return 0


def die_with_parent() -> None:
    """Ends this worker when its launcher is killed. Without it a killed launcher would leave
    workers that hold their devices.
    """
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
