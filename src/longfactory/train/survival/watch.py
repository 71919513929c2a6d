"""The threads that look after a process: signals, signs of life, time limits, and the end of a run
that does not move.

Twice a second it looks for signals and at the board, where every rank writes a sign of life. The
first rank watches all others, and they watch the first, so that the store answers two requests a
rank and second. Ages are measured by the reader's own monotonic clock: clocks of machines may be
hours apart, and jump.

A process does not move: its main thread has not said so (`longfactory.progress`) within the limit
of its phase. A process gives no sign of life: it is stopped, or its machine is lost. Either way the
one that notices writes it on the board; every rank then writes the stacks of its threads into a
file and says on the board where it is; one rank tells the user which rank the others wait for; all
leave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from longfactory import progress, terminal
from longfactory.errors import STALLED, STOPPED
from longfactory.processes import state_of
from longfactory.train.survival import launched
from longfactory.train.survival.board import Board, wait_for
from longfactory.train.survival.signals import StopSignals, name_of
from longfactory.train.survival.stopping import FINISHED, StopAgreement
from longfactory.train.survival.words import stopped_before_training

POLL = 0.5
ANSWER = 5.0
"""Seconds that ranks have to say where they are, once one does not move."""
UNWIND = 5.0
"""Seconds that the main thread has to close what it has opened, when nobody has begun to train."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds. The defaults count until the configuration is read."""

    startup: float = 3600
    step: float = 1800
    save: float = 3600
    evaluation: float = 3600
    heartbeat: float = 300
    grace: float = 300

    def of(self, phase: progress.Phase) -> tuple[float, str]:
        """The limit of a phase, and its key."""
        return {
            "start-up": (self.startup, "startup_timeout"),
            "step": (self.step, "step_timeout"),
            "save": (self.save, "save_timeout"),
            "evaluation": (self.evaluation, "evaluation_timeout"),
        }[phase]


class Watch:
    """Of one process. Made in the main thread, before anything slow.

    Args:
        rank, world: from the launcher's environment.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.limits = Limits()
        self.stacks: Path | None = None
        """Folder for the stacks of a run that does not move; None: the system's temporary one."""
        self.signals = StopSignals()
        self.agreement = StopAgreement()
        self.stop: int | None = None
        """The signal that asked for a stop."""
        self._stop_at = 0.0
        self._board: Board | None = None
        self._connect: Callable[[], Board] | None = None
        self._answered_at = 0.0
        self._beats: dict[int, tuple[Any, float]] = {}
        self._stopped: dict[int, float] = {}
        self._turn = 0
        self._closing = threading.Event()
        self._unwinding: float | None = None
        self._thread = threading.Thread(target=self._run, name="longfactory-watch", daemon=True)

    def start(self) -> None:
        launched.register(self.rank)
        self._thread.start()
        threading.Thread(target=self._guard, name="longfactory-guard", daemon=True).start()

    def configure(self, limits: Limits, stop_signals: tuple[str, ...], stacks: Path) -> None:
        """What the configuration says. In the main thread."""
        self.limits, self.stacks = limits, stacks
        self.signals.install(stop_signals)

    def attach(self, connect: Callable[[], Board]) -> None:
        """From now on this rank gives signs of life and sees the others'.

        Args:
            connect: opens a connection for this thread alone.
        """
        board = connect()
        board.put(f"beat/{self.rank}", [0, self._where()])  # a rank that has come can be lost
        self._connect, self._answered_at = connect, time.monotonic()
        self._board = board

    def close(self) -> None:
        """The run is over. In the main thread."""
        self._closing.set()
        self.signals.wake()
        self._thread.join(ANSWER)
        self.signals.close(ending=self.stop is not None)

    # ---- for the main thread ---------------------------------------------------------------------

    def at_boundary(self, following: int) -> bool:
        """See `StopAgreement.arrive`."""
        self.signals.renew()
        return self.agreement.arrive(following)

    def finished(self) -> None:
        """The last step is done: a stop that is asked for from now on changes nothing."""
        self.agreement.arrive(FINISHED)

    def all_left(self) -> None:
        """Waits until every rank has come here, so that the launcher finds none at work."""
        self._closing.set()
        connect = self._connect
        if connect is None:
            return

        def leave() -> None:
            with contextlib.suppress(Exception):
                board = connect()
                board.put(f"left/{self.rank}", True)
                wait_for(lambda: board.get_all("left"), ANSWER * 2)

        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(ANSWER * 3)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        told = False
        while not self._closing.is_set():
            again = self.signals.wait(POLL)
            now = time.monotonic()
            if now - before > 20 * POLL:
                # This process was stopped itself, and goes on: what it has not seen is no sign.
                self._beats = {r: (beat, now) for r, (beat, _) in self._beats.items()}
                self._answered_at = now
            before = now
            try:
                self._look(again)
            except Exception as error:
                if not told:
                    _say(f"the watch of process {self.rank} failed: {error!r}")
                told = True

    def _look(self, again: bool) -> None:
        heard = self.signals.first
        if heard is not None and self._unwinding is None and launched.a_sibling_is_gone():
            os._exit(128 + heard)  # by torchrun; why, the other has said
        if again:
            self._end_all(f"A second signal: the run ends now. {self._kept()}")
        if self._board is not None:
            self._look_at_board()
        self._look_at_siblings()
        asked = self.signals.first if self.signals.first is not None else launched.asked_to_stop()
        if asked is not None:
            self._request(asked, tell_others=True)
        if self.stop is not None:
            self._stopping()
        self._check_limits()

    # ---- a stop ----------------------------------------------------------------------------------

    def _request(self, signum: int, tell_others: bool) -> None:
        if self.stop is not None:
            return
        self.stop, self._stop_at = signum, time.monotonic()
        if tell_others:
            launched.ask_to_stop(signum)
            if self._board is not None:
                self._board.first("stop", signum)
        if self.rank != 0:
            return
        if progress.NOW.step:
            _say(
                f"{name_of(signum)}: saving a checkpoint after this step, then ending the run, "
                f"within {self.limits.grace:g} s. A second signal ends it at once."
            )
        else:
            _say(f"{name_of(signum)}: the run ends before its first step.")

    def _stopping(self) -> None:
        if self._board is None and self.world > 1:
            # This rank has not met the others, so none of them has begun to train.
            self.agreement.answer(None)
        else:
            self.agreement.answer(self._board)
        if self.agreement.boundary == 0:
            self._leave_before_training()
        if time.monotonic() - self._stop_at > self.limits.grace:
            self._end_all(
                f"{name_of(self.stop)}: signal_grace, {self.limits.grace:g} s, ran out during "
                f"{progress.NOW.detail or progress.NOW.phase}. {self._kept()}"
            )

    def _leave_before_training(self) -> None:
        """The main thread closes what it has opened; where it cannot, it is left behind."""
        if self._unwinding is None:
            self._unwinding = time.monotonic()
            self.signals.unwind()
        elif time.monotonic() - self._unwinding > UNWIND:
            if self.rank == 0 and launched.claim_the_word():
                _say(stopped_before_training(self.stop))
            self._leave(STOPPED)

    def _kept(self) -> str:
        return "Steps since the last checkpoint are lost."

    def _end_all(self, words: str) -> None:
        """The run ends without a save: a second signal, or the grace is over."""
        signum = self.stop or self.signals.first or 15
        if self._board is not None:
            with contextlib.suppress(Exception):
                self._board.first("ended", {"status": 128 + signum, "words": words})
        if launched.claim_the_word():
            _say(words)
        self._leave(128 + signum)

    def _leave(self, status: int) -> None:
        """Ends the process without unwinding: its main thread may wait for a rank that is gone."""
        terminal.close_bars()
        sys.stdout.flush()
        sys.stderr.flush()
        if launched.write_status(status) and status == STOPPED:
            status = 0  # torchrun would take another one for a failure, and start again
        os._exit(status)

    # ---- signs of life ---------------------------------------------------------------------------

    def _look_at_board(self) -> None:
        assert self._board is not None and self._connect is not None
        try:
            self._exchange(self._board)
            self._answered_at = time.monotonic()
        except Exception:
            # What was asked is still on the way: a new connection begins with nothing.
            with contextlib.suppress(Exception):
                self._board = self._connect()

    def _look_at_siblings(self) -> None:
        """Workers of this machine that are stopped before they have met the others."""
        now, lost = time.monotonic(), {}
        for rank, pid in launched.workers().items():
            if rank == self.rank or state_of(pid) != "T":
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > self.limits.heartbeat:
                lost[rank] = self._where() | {"rank": rank, "pid": pid, "step": 0}
        if lost:
            stall: Any = {"lost": lost, "by": self.rank}
            board = self._board
            self._end_stalled(board, stall if board is None else board.first("stall", stall))

    def _guard(self) -> None:
        """Of a thread of its own: the store's requests have no time limit, and one on a network
        that is lost holds up the other thread for as long as the kernel tries.
        """
        before = time.monotonic()
        while not self._closing.wait(POLL):
            now = time.monotonic()
            if now - before > 20 * POLL:
                self._answered_at = now  # this process was stopped, and goes on
            before = now
            silent = now - self._answered_at
            if self._board is not None and silent > self.limits.heartbeat + 2 * POLL:
                self._lost_store(silent)

    def _lost_store(self, silent: float) -> None:
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        folder = self._dump()
        if launched.claim_the_word():
            now = progress.NOW
            _say(
                f"Process {self.rank} on {socket.gethostname()} has not reached the run's store at"
                f" {host}:{port} for {silent:.0f} s (heartbeat_timeout: {self.limits.heartbeat:g})."
                " The machine that holds it, or the network, is lost; or the command was stopped."
                f" It was in step {now.step}, {now.detail or now.phase}. The run ends.\n"
                f"  Its stacks: {folder}/rank-{self.rank}.txt"
            )
        self._leave(STALLED)

    def _exchange(self, board: Board) -> None:
        """One turn: what is new for all, my sign of life, and theirs."""
        if (stop := board.get("stop")) is not None:
            self._request(stop, tell_others=False)
        if (ended := board.get("ended")) is not None:
            if launched.claim_the_word():
                _say(ended["words"])
            self._leave(ended["status"])
        if (stall := board.get("stall")) is not None:
            self._end_stalled(board, stall)
        self._turn += 1
        if self._turn % 2:
            return
        board.put(f"beat/{self.rank}", [self._turn, self._where()])
        watched = range(1, self.world) if self.rank == 0 else (0,)
        now, lost = time.monotonic(), {}
        for rank in watched:
            beat = board.get(f"beat/{rank}")
            if beat is None:
                continue  # it has never come: the limit of start-up is for it
            turn, last = beat
            if rank not in self._beats or self._beats[rank][0] != turn:
                self._beats[rank] = (turn, now)
            elif now - self._beats[rank][1] > self.limits.heartbeat:
                lost[rank] = last
        if lost:
            self._end_stalled(board, board.first("stall", {"lost": lost, "by": self.rank}))

    # ---- an end to what does not move ------------------------------------------------------------

    def _check_limits(self) -> None:
        now = progress.NOW
        limit, _ = self.limits.of(now.phase)
        if now.age() <= limit or self._closing.is_set():
            return
        if self._board is not None and self._waits_for_a_longer_phase(self._board, limit):
            return
        stall: dict[str, Any] = {"lost": {}, "by": self.rank}
        if self._board is None:
            self._end_stalled(None, stall)
        else:
            self._end_stalled(self._board, self._board.first("stall", stall))

    def _waits_for_a_longer_phase(self, board: Board, limit: float) -> bool:
        """Whether another rank is in a phase with a longer limit, and within it: this one may have
        gone on to its next step and wait there for one that still saves.
        """
        for rank, (_, last) in board.present("beat").items():
            theirs, _ = self.limits.of(last["phase"])
            if rank != self.rank and theirs > limit and last["age"] <= theirs:
                return True
        return False

    def _end_stalled(self, board: Board | None, stall: Mapping[str, Any]) -> None:
        """Stacks of this rank, a report by one rank, and the end."""
        if self._closing.is_set():
            return
        folder = self._dump()
        mine = self._where()
        lost = {int(rank): last for rank, last in stall["lost"].items()}
        found = {self.rank: mine}
        if board is not None:
            board.put(f"where/{self.rank}", mine)
            if self.rank != stall["by"]:
                wait_for(lambda: board.get("reported"), 2 * ANSWER)
                self._leave(STALLED)
            expected = set(range(self.world)) - set(lost)
            wait_for(lambda: expected <= set(board.present("where")) or None, ANSWER)
            found = board.present("where")
        _say(report(found, lost, self.world, self.limits, folder))
        if board is not None:
            board.put("reported", True)
        self._leave(STALLED)

    def _dump(self) -> Path:
        """Writes the stacks of all threads of this process; returns the folder."""
        folder = self.stacks or Path(os.environ.get("TMPDIR", "/tmp")) / f"stacks-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self.rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        return folder

    def _where(self) -> dict[str, Any]:
        """What this rank does, for `report`."""
        now = progress.NOW
        place, collective = main_thread_is_at()
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": now.phase,
            "detail": now.detail,
            "step": now.step,
            "age": now.age(),
            "place": place,
            "collective": collective,
        }


def _say(words: str) -> None:
    terminal.say(f"longfactory: {words}")


# ---- who holds up the others ---------------------------------------------------------------------


def culprits(
    found: Mapping[int, Mapping[str, Any]], lost: Mapping[int, Mapping[str, Any]], world: int
) -> list[int]:
    """The ranks that the others wait for.

    Args:
        found: what each rank said of itself (`Watch._where`).
        lost: ranks without a sign of life, and what they last said.
        world: number of ranks.
    Returns:
        Those that are lost, else those that never came, else those that are behind, else those
        that are not in a collective while others are. Empty where all are in the same place.
    """
    if lost:
        return sorted(lost)
    if missing := sorted(set(range(world)) - set(found)):
        return missing
    first = min(f["step"] for f in found.values())
    behind = [r for r, f in found.items() if f["step"] == first]
    if len(behind) < len(found):
        return behind
    # Some wait, in a collective or for a file: those that do not are whom they wait for.
    outside = [
        r
        for r, f in found.items()
        if f["collective"] is None and not f["detail"].startswith("waiting for")
    ]
    return outside if 0 < len(outside) < len(found) else []


def report(
    found: Mapping[int, Mapping[str, Any]],
    lost: Mapping[int, Mapping[str, Any]],
    world: int,
    limits: Limits,
    folder: Path,
) -> str:
    """What the user reads of a run that did not move: who, where, the limit, a line a rank."""
    guilty = culprits(found, lost, world)
    lines = []
    if lost:
        names = ", ".join(map(str, lost))
        lines.append(
            f"No sign of life from rank {names} for {limits.heartbeat:g} s (heartbeat_timeout): "
            "the process is stopped, or its machine is lost. The run ends."
        )
    else:
        worst = max(found.values(), key=lambda f: f["age"])
        limit, key = limits.of(worst["phase"])
        who = f"rank {', '.join(map(str, guilty))}" if guilty else "no rank"
        missing = set(guilty) - set(found)
        did = "has never come" if missing else "holds up the others"
        lines.append(
            f"The run has not moved for {worst['age']:.0f} s in {worst['phase']} ({key}:"
            f" {limit:g}): {who} {did if guilty else 'is ahead or behind'}. The run ends."
        )
    for rank, f in lost.items():
        state = state_of(f["pid"]) if f["host"] == socket.gethostname() else None
        now = {"T": "stopped (state T)", "Z": "ended", "X": "ended"}.get(state or "", "silent")
        doing = f"step {f['step']}, {f['detail'] or f['phase']}"
        lines.append(f"  rank {rank} ({f['host']}, pid {f['pid']}): {now}; last seen in {doing}")
    shown = sorted(found, key=lambda r: (r not in guilty, r))[:8]
    for rank in shown:
        f = found[rank]
        doing = f["detail"] or f["phase"]
        at = f"in {f['collective']}, called by {f['place']}" if f["collective"] else f["place"]
        lines.append(
            f"  rank {rank} ({f['host']}, pid {f['pid']}): step {f['step']}, {doing}; {at}"
        )
    if len(found) > len(shown):
        lines.append(f"  ... and {len(found) - len(shown)} more")
    lines.append(f"  Stacks of every rank: {folder}/rank-*.txt")
    return "\n".join(lines)


def main_thread_is_at() -> tuple[str, str | None]:
    """The innermost place of the package on the main thread's stack ("file.py:12 in function"),
    and the collective that the process is in, where one is seen in Python.
    """
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident or 0, None)
    own = frames.pop(threading.get_ident(), None)
    del own
    place = _place(main)
    collective = _collective(main)
    if collective is None:
        # Hooks of the backward pass run in autograd's own threads.
        collective = next((c for c in map(_collective, frames.values()) if c is not None), None)
    return place, collective


def _place(frame: FrameType | None) -> str:
    innermost = frame
    while frame is not None:
        path = frame.f_code.co_filename
        if f"{os.sep}longfactory{os.sep}" in path:
            return f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    if innermost is None:
        return "an unknown place"
    name = Path(innermost.f_code.co_filename).name
    return f"{name}:{innermost.f_lineno} in {innermost.f_code.co_name}"


def _collective(frame: FrameType | None) -> str | None:
    while frame is not None:
        path = frame.f_code.co_filename
        name = frame.f_code.co_name
        if path.endswith("distributed_c10d.py") and not name.startswith("_"):
            return name
        if path.endswith("_functional_collectives.py"):
            return name
        if f"{os.sep}_fully_shard{os.sep}" in path:
            return f"FSDP2 {name.strip('_')}"
        if name == "_engine_run_backward":
            return "the backward pass"
        frame = frame.f_back
    return None
