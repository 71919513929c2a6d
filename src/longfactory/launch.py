"""Starting as many processes as the run needs, through torchrun."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfactory.errors import PEER_LOST, STALLED, STOPPED, USER_ERROR, UserError
from longfactory.processes import children_of, state_of
from longfactory.startup import BEGAN, begun
from longfactory.train.survival import launched
from longfactory.train.survival.board import ATTEMPT
from longfactory.train.survival.lock import HOLDER
from longfactory.train.survival.signals import DEFAULT, StopSignals
from longfactory.train.survival.words import stopped_before_training

if TYPE_CHECKING:
    from longfactory.config import RunConfig


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
            f"nproc_per_node: {asked} processes need one device each, and this machine has "
            f"{devices} visible. Lower it, or set use_cpu: true."
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


def quiet_torch() -> None:
    """Leaves out torch's C++ messages, before torch is imported: of a store or a process that has
    ended they print stack traces, and say less than our own message. What the user has set stays.
    The workers' errors are told (`start`): those of NCCL say more.
    """
    if not is_on("LONGFACTORY_DEBUG"):
        os.environ.setdefault(CPP_LOG, "ERROR" if is_worker() else "FATAL")


CPP_LOG = "TORCH_CPP_LOG_LEVEL"


def set_environment(processes: int) -> None:
    """Defaults that long sequences want. What the user has set stays."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if processes > 1 else "true")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def torchrun_arguments(
    local: int,
    module: str,
    argv: Sequence[str],
    attempt: int = 0,
    port: int | None = None,
    startup: float = 3600.0,
) -> list[str]:
    """torchrun's own command line, from LLaMA-Factory's environment variables.

    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT place a fixed number of machines; RDZV_ID,
    MIN_NNODES, MAX_NNODES, MAX_RESTARTS an elastic run, whose restarts are torchrun's; others are
    ours (`start`).

    Args:
        local: processes on this machine.
        module: what each of them runs, with `argv`.
        attempt: how often they were started before.
        port: of the store on this machine (`host_store`), for one machine.
        startup: seconds to wait for the other machines.
    """
    nodes = number("NNODES", 1)
    address, given_port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    elastic = os.environ.get("RDZV_ID")
    restarts = 0 if elastic is None else number("MAX_RESTARTS", 0)
    # Signals that ask for a stop are ours: torchrun would end the workers, without a save.
    head = [
        f"--nproc-per-node={local}",
        f"--max-restarts={restarts}",
        "--signals-to-handle=SIGQUIT",
    ]
    if elastic is not None:
        low, high = os.environ.get("MIN_NNODES"), os.environ.get("MAX_NNODES")
        count = f"{low}:{high}" if low is not None and high is not None else str(nodes)
        endpoint = f"{address or '127.0.0.1'}:{given_port or 29500}"
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
            f"--master-port={given_port or 29500}",
            f"--rdzv-id=attempt-{attempt}",
            f"--rdzv-conf=timeout={int(startup)}",
        ]
    else:
        head += [
            f"--master-addr={address or '127.0.0.1'}",
            f"--master-port={given_port or port or 29500}",
            f"--rdzv-id=attempt-{attempt}",
        ]
    return [*head, "--module", module, *argv]


def start(
    module: str,
    argv: Sequence[str],
    local: int,
    *,
    stop_signals: Sequence[str] = DEFAULT,
    grace: float = 300.0,
    startup: float = 3600.0,
    locked: bool = False,
) -> int:
    """Starts the run's processes on this machine through torchrun, as often as MAX_RESTARTS allows
    where one of them fails, and returns an exit status.

    A signal that asks for a stop is passed on to the processes, which save and end by themselves;
    torchrun would end them after half a minute. The first machine's launcher holds the store by
    which they find each other: it outlives each of them, and answers a restarted run with nothing
    old (each attempt has its own store, or its own names in one at a fixed port).

    Args:
        module: what each process runs, with `argv`.
        local: processes on this machine.
        stop_signals: names of signals that ask for a stop.
        grace: seconds from such a signal to the end.
        startup: seconds to wait for the other machines.
        locked: this process holds the lock of the output folder.
    """
    import torch.distributed  # noqa: F401  reads the level of its messages, of this process

    if os.environ.get(CPP_LOG) == "FATAL":
        os.environ[CPP_LOG] = "ERROR"
    elastic = "RDZV_ID" in os.environ
    # An elastic run's workers meet at a new store after each restart, which the first of them
    # holds: torchrun's shared one keeps the keys of the last round, on which the new one fails.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    restarts = 0 if elastic else number("MAX_RESTARTS", 0)
    remove_stale_folders()
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-") as folder:
        os.environ[launched.TOLD] = os.path.join(folder, "told")
        if locked:
            os.environ[HOLDER] = str(os.getpid())
        launcher = Launcher(Path(folder), stop_signals, grace)
        try:
            store = None
            for attempt in range(restarts + 1):
                os.environ[ATTEMPT] = str(attempt)
                counted = begun() if attempt == 0 else None
                os.environ[BEGAN] = str(time.time() if counted is None else counted.began)
                if not elastic and (store is None or "MASTER_PORT" not in os.environ):
                    store = host_store()
                launcher.clear()
                tell = functools.partial(tell_other_machines, store, attempt)
                launcher.tell = tell
                port = store.port if store is not None else None
                arguments = torchrun_arguments(local, module, argv, attempt, port, startup)
                status = _torchrun(arguments, launcher)
                if status not in (0, STOPPED, PEER_LOST):
                    words = f"The run ended on {socket.gethostname()} with status {status}."
                    theirs = USER_ERROR if status == USER_ERROR else PEER_LOST
                    tell("ended", {"status": theirs, "words": words})
                if status in FINAL or launcher.asked is not None:
                    return status
                if attempt < restarts:
                    print(
                        f"longfactory: restart {attempt + 1} of {restarts} (MAX_RESTARTS).",
                        file=sys.stderr,
                        flush=True,
                    )
            return status
        finally:
            launcher.close()
            for name in (launched.TOLD, ATTEMPT, HOLDER, BEGAN):
                os.environ.pop(name, None)


FINAL = (0, USER_ERROR, STOPPED)
"""Exit statuses after which nothing is started again."""
FOLDER = "longfactory-"


def host_store() -> Any:
    """The store of a run on this machine, or None where another machine holds it. torchrun and the
    workers find it by its port; torchrun takes it for its own.
    """
    from torch.distributed import TCPStore

    several = number("NNODES", 1) > 1
    if several and number("NODE_RANK", 0) != 0:
        return None
    address = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    port = number("MASTER_PORT", 29500 if several else 0)
    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise UserError(
            f"The run's store cannot be opened at {address}:{port} ({first_line(error)}). Set"
            " MASTER_PORT to a free port, and MASTER_ADDR to an address of this machine."
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tell_other_machines(store: Any, attempt: int, name: str, value: Any) -> None:
    """Writes on the board of an attempt (`survival.board`) what other machines need not wait for:
    a stop, or that the processes have failed here.
    """
    import json
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    if number("NNODES", 1) < 2 or "RDZV_ID" in os.environ:
        return
    with contextlib.suppress(RuntimeError):
        if store is None:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                number("MASTER_PORT", 29500),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=10),
            )
        board = PrefixStore(f"longfactory/{attempt}", store)
        board.compare_set(name, "", json.dumps(value))


def remove_stale_folders() -> None:
    """Folders of launchers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        pid = path.name.removeprefix(FOLDER).split("-")[0]
        if pid.isdigit() and state_of(int(pid)) is None:
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid():
                    shutil.rmtree(path, ignore_errors=True)


class Launcher:
    """What the launcher does while torchrun waits for the workers: passes a stop on to them, and
    ends those that cannot end themselves.
    """

    def __init__(self, folder: Path, stop_signals: Sequence[str], grace: float):
        self.folder, self.grace = folder, grace
        self.asked: int | None = None
        """The signal that asked for a stop."""
        self.ended: int | None = None
        """The signal by which the workers were ended without a save."""
        self.tell: Callable[[str, Any], None] = lambda name, value: None
        """Writes for the other machines."""
        self._asked_at = 0.0
        self._stalled_at: float | None = None
        self.signals = StopSignals(stop_signals)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longfactory-launcher", daemon=True)
        self._thread.start()

    def clear(self) -> None:
        """Before the workers are started again."""
        for path in self.folder.iterdir():
            if path.name != "stop":
                path.unlink()
        self._stalled_at = None

    def close(self) -> None:
        self._closing.set()
        self.signals.wake()
        self._thread.join(5)
        self.signals.close(ending=self.asked is not None)

    def _run(self) -> None:
        while not self._closing.is_set():
            again = self.signals.wait(0.2)
            now = time.monotonic()
            if self.signals.first is not None:
                launched.ask_to_stop(self.signals.first)
            if self.asked is None and (signum := launched.asked_to_stop()) is not None:
                self.asked, self._asked_at = signum, now
                self.tell("stop", signum)
            if self.asked is not None:
                overdue = now - self._asked_at > self.grace + 15
                if again or overdue:
                    self._end_workers(again)
                elif now - self._asked_at > 3 and not self._has_workers():
                    self._leave_alone()
            if launched.read_status(self.folder) == STALLED:
                self._stalled_at = self._stalled_at or now
                if now - self._stalled_at > 3:
                    kill(launched.workers(self.folder).values())

    def _has_workers(self) -> bool:
        """Whether any were started: those that have ended have left a file or a status."""
        left = launched.workers(self.folder) or launched.read_status(self.folder) is not None
        return bool(left or children_of(os.getpid()))

    def _end_workers(self, again: bool) -> None:
        assert self.asked is not None
        if self.ended is None and launched.read_status(self.folder) is None:
            why = "A second signal" if again else "signal_grace ran out"
            print(
                f"longfactory: {why}: the run ends now. Steps since the last checkpoint are lost.",
                file=sys.stderr,
                flush=True,
            )
        self.ended = self.asked
        kill({*launched.workers(self.folder).values(), *children_of(os.getpid())})

    def _leave_alone(self) -> None:
        """torchrun waits for other machines and has started nothing: it would go on waiting."""
        print(f"longfactory: {stopped_before_training(self.asked)}", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(STOPPED)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to workers and all that they have started: each has a session of its own."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)


def _torchrun(arguments: list[str], launcher: Launcher) -> int:
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
        failure = None
    except ChildFailedError as e:
        if debug:
            raise
        failure = e.get_first_failure()
    except RuntimeError as e:  # of the store: the first machine is not there
        if debug or "torch.distributed" not in type(e).__module__ + str(type(e)):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 29500)}"
        what = (
            f"the store of the first machine, {where}, was not reached"
            if number("NODE_RANK", 0)
            else f"not all of the {number('NNODES', 1)} machines have come to {where}"
        )
        print(
            f"longfactory: {what} within startup_timeout: {first_line(e)}",
            file=sys.stderr,
        )
        return PEER_LOST
    if launcher.ended is not None:
        return 128 + launcher.ended
    if (left := launched.read_status(launcher.folder)) is not None:
        return left
    if failure is None:
        return 0
    rank, status = failure[0], failure[1].exitcode
    if launcher.asked is not None and status == -launcher.asked:
        # It had not come so far as to catch the signal.
        print(f"longfactory: {stopped_before_training(launcher.asked)}", file=sys.stderr)
        return STOPPED
    if status in (USER_ERROR, STALLED, STOPPED, PEER_LOST):
        return status
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
