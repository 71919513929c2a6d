"""A signal stops all ranks after the same step, and the run goes on as if it had not been stopped."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longfactory.errors import Stopped
from longfactory.train.survival.board import Board
from longfactory.train.survival.signals import TOGETHER, StopSignals
from longfactory.train.survival.stopping import FINISHED, StopAgreement
from longfactory.train.survival.watch import Watch
from small_runs import POOLS, home, keys, steps  # noqa: F401  a fixture
from survival_worker import HOOK, run_until_stopped


def stopped_run(folder: Path, name: str, size: int, hook: dict[str, Any], **changes: Any) -> str:
    (folder / "hook.py").write_text(HOOK.format(**hook))
    given = keys(
        folder,
        name,
        sequence_parallel_size=1,
        loss_path=f"{folder / 'hook.py'}:loss",
        overwrite_output_dir=False,
        packing=False,
        **changes,
    )
    argv = [f"{k}={v}" for k, v in given.items()]
    store = folder / f"store-{name}-{time.monotonic_ns()}"
    said = POOLS[size].run(run_until_stopped, argv, str(folder / "cache"), str(store))
    assert len(set(said)) == 1
    return said[0]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("size", "rank", "number"),
    [(2, 1, "SIGUSR1"), pytest.param(1, 0, "SIGINT", marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    home: Path,  # noqa: F811
    size: int,
    rank: int,
    number: str,
) -> None:
    quiet = {"rank": -1, "step": -1, "signal": "SIGTERM"}
    assert stopped_run(home, f"whole-{size}", size, quiet) == ""
    out = home / f"stopped-{size}"
    said = stopped_run(home, out.name, size, {"rank": rank, "step": 2, "signal": number})
    assert said.startswith(f"Stopped by {number} after step 2: {out}/checkpoint-2 is saved.")
    left = {p.name for p in out.iterdir()}
    assert not left & {"train_results.json", "all_results.json", "model.safetensors"}
    assert "_longfactory.lock" not in left
    assert stopped_run(home, out.name, size, quiet) == ""
    whole, again = (
        steps(json.loads((home / f / "trainer_state.json").read_text())["log_history"])
        for f in (f"whole-{size}", out.name)
    )
    assert [(h["step"], h["loss"], h["grad_norm"]) for h in again] == [
        (h["step"], h["loss"], h["grad_norm"]) for h in whole
    ]
    assert (out / "train_results.json").exists()


def simulate(seed: int, ranks: int, last: int) -> set[int]:
    """Ranks whose threads hear of a stop at random moments; where each of them stopped."""
    draw = random.Random(seed)
    store = dist.HashStore()
    ended: dict[int, int] = {}
    agreements = [StopAgreement() for _ in range(ranks)]
    barrier = threading.Barrier(ranks)
    pauses = [[draw.random() * 0.002 for _ in range(last)] for _ in range(ranks)]

    def main(rank: int) -> None:
        agreement = agreements[rank]
        if agreement.arrive(1):
            ended[rank] = 0
            barrier.abort()
            return
        for step in range(1, last + 1):
            time.sleep(pauses[rank][step - 1])
            try:
                barrier.wait(20)  # the step's collective
            except threading.BrokenBarrierError:
                ended[rank] = -step
                return
            if agreement.arrive(step + 1 if step < last else FINISHED):
                ended[rank] = step
                return
        ended[rank] = FINISHED

    def thread(rank: int, after: float) -> None:
        time.sleep(after)
        board = Board(store, rank, ranks)  # type: ignore[arg-type]
        while agreements[rank].boundary is None:
            agreements[rank].answer(board)
            time.sleep(0.0005)

    first = draw.random() * 0.02
    threads = [threading.Thread(target=main, args=(r,)) for r in range(ranks)]
    threads += [
        threading.Thread(target=thread, args=(r, first + draw.random() * 0.01))
        for r in range(ranks)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(ended) == ranks
    return set(ended.values())


def test_ranks_agree_on_a_step_whenever_they_hear_of_the_stop() -> None:
    ends = [simulate(seed, 3, 12) for seed in range(25)]
    assert all(len(end) == 1 for end in ends)
    found = {next(iter(end)) for end in ends}
    assert len(found) > 3 and all(step >= 0 for step in found)


@pytest.mark.usefixtures("as_a_command")
def test_signals_are_counted_once_when_they_come_together() -> None:
    signals = StopSignals(("SIGUSR1",))
    try:
        assert not signals.wait(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not signals.wait(1.0)
        assert signals.first == signal.SIGUSR1
        signals._first_at -= TOGETHER + 0.1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.wait(1.0)
    finally:
        signals.close()


@pytest.mark.usefixtures("as_a_command")
def test_the_main_thread_leaves_what_it_waits_in() -> None:
    signals = StopSignals(("SIGUSR1",))
    timer = threading.Timer(0.1, signals.unwind)
    timer.start()
    try:
        with pytest.raises(Stopped):
            time.sleep(20)
    finally:
        timer.join()
        signals.close()


@pytest.mark.usefixtures("as_a_command")
def test_a_handler_that_a_library_has_put_in_place_of_ours() -> None:
    """LLVM does so in a process in which Triton compiles, and swallows SIGUSR1."""
    swallow = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)
    watch = Watch(0, 1)
    try:
        ctypes.CDLL(None).signal(signal.SIGUSR1, swallow)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not watch.signals.wait(0.2) and watch.signals.first is None
        watch.at_boundary(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        watch.signals.wait(1.0)
        assert watch.signals.first == signal.SIGUSR1
    finally:
        watch.signals.close()
