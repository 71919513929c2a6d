"""Starting processes: what is asked of torchrun, and that one worker's end is every worker's end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longfactory import launch
from longfactory.config import RunConfig, from_mapping
from longfactory.errors import UserError
from longfactory.train.survival import launched

VARIABLES = (
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_ID",
    "MIN_NNODES",
    "MAX_NNODES",
    "MAX_RESTARTS",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *VARIABLES,
        "FORCE_TORCHRUN",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
    ):
        monkeypatch.delenv(name, raising=False)


def config(**keys: object) -> RunConfig:
    return from_mapping(
        {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out", **keys}
    )


def asked(monkeypatch: pytest.MonkeyPatch, local: int = 2, **env: str) -> list[str]:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return launch.torchrun_arguments(local, "module", ["x.yaml"])


def test_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) == [
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--signals-to-handle=SIGQUIT",
        "--master-addr=127.0.0.1",
        "--master-port=29500",
        "--rdzv-id=attempt-0",
        "--module",
        "module",
        "x.yaml",
    ]
    assert "--master-port=29777" in asked(monkeypatch, MASTER_PORT="29777")


def test_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        asked(monkeypatch, NNODES="2")
    words = asked(
        monkeypatch, 8, NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29501"
    )
    assert {
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29501",
        "--nproc-per-node=8",
    } <= set(words)
    with pytest.raises(UserError, match="it runs from 0 to 1"):
        asked(monkeypatch, NODE_RANK="2")
    with pytest.raises(UserError, match="NNODES: got 'two', expected a whole number"):
        asked(monkeypatch, NNODES="two")


def test_elastic(monkeypatch: pytest.MonkeyPatch) -> None:
    words = asked(
        monkeypatch,
        RDZV_ID="job",
        MIN_NNODES="1",
        MAX_NNODES="4",
        MAX_RESTARTS="3",
        MASTER_ADDR="a",
        MASTER_PORT="1",
    )
    assert {
        "--nnodes=1:4",
        "--rdzv-id=job",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=a:1",
        "--max-restarts=3",
    } <= set(words)


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_count", lambda: 0)
    assert launch.local_processes(config()) == 1
    assert launch.local_processes(config(nproc_per_node=2)) == 2
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert launch.local_processes(config()) == 3
    monkeypatch.delenv("NPROC_PER_NODE")
    monkeypatch.setattr(launch, "device_count", lambda: 8)
    assert launch.local_processes(config()) == 8
    assert launch.local_processes(config(use_cpu=True)) == 1
    with pytest.raises(UserError, match="this machine has 8 visible"):
        launch.local_processes(config(nproc_per_node=9))


def test_when_torchrun_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch.needs_torchrun(config(), 1)
    assert launch.needs_torchrun(config(), 2)
    assert launch.needs_torchrun(
        config(deepspeed={"zero_optimization": {"stage": 0}}, dry_run=True), 1
    )
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert launch.needs_torchrun(config(), 1)
    monkeypatch.delenv("FORCE_TORCHRUN")
    monkeypatch.setenv("NNODES", "2")
    assert launch.needs_torchrun(config(), 1)


def test_environment_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    launch.set_environment(1)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "mine")
    launch.set_environment(2)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "mine"


def test_one_process_has_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launched.TOLD, raising=False)
    assert launched.claim_the_word() and launched.claim_the_word()
    monkeypatch.setenv(launched.TOLD, str(tmp_path / "told"))
    assert [launched.claim_the_word() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv(launched.TOLD, str(tmp_path / "absent" / "told"))
    assert launched.claim_the_word()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


WORKER = """
import os, sys, time
rank = int(os.environ["RANK"])
open(os.path.join({folder!r}, f"pid{{rank}}"), "w").write(str(os.getpid()))
if rank == 1:
    while not os.path.exists(os.path.join({folder!r}, "pid0")):
        time.sleep(0.05)
    {end}
time.sleep(120)
"""


def start(folder: Path, end: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = launched_by(folder, WORKER.format(folder=str(folder), end=end), **variables)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def launched_by(folder: Path, worker: str, **variables: str) -> subprocess.Popen[str]:
    """The launcher of two processes that run `worker`, as a process."""
    (folder / "worker_module.py").write_text(worker)
    code = (
        "import sys; from longfactory import launch; sys.exit(launch.start('worker_module', [], 2))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env | variables,
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(2)", 2, ""),
        ("sys.exit(7)", 7, "Process 1 ended with status 7; the others were stopped"),
        (
            "os.kill(os.getpid(), 9)",
            137,
            "Process 1 was ended by signal 9 (killed: often the machine ran out of memory)",
        ),
    ],
    ids=["told the user", "failed", "killed"],
)
def test_one_worker_s_end_is_every_worker_s(
    tmp_path: Path, end: str, status: int, words: str
) -> None:
    done = start(tmp_path, end)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    deadline = time.time() + 5
    pids = [int((tmp_path / f"pid{r}").read_text()) for r in (0, 1)]
    while any(is_alive(p) for p in pids) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(p) for p in pids)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("fails", "status", "restarts"),
    [
        pytest.param("os.kill(os.getpid(), 9)", 0, 1, id="killed"),
        pytest.param("sys.exit(2)", 2, 0, id="told the user", marks=pytest.mark.slow),
        pytest.param("stop()", 75, 0, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_what_is_started_again(tmp_path: Path, fails: str, status: int, restarts: int) -> None:
    """Each attempt finds the store empty of what the last one wrote."""
    worker = f"""
import os, sys
from longfactory.train.survival import board, launched

def stop():
    launched.write_status(75)
    sys.exit(0)

rank = int(os.environ["RANK"])
mine = board.Board(board.open_store(rank, 2, 20), rank, 2)
assert not mine.has(f"here/{{rank}}"), "old keys"
mine.put(f"here/{{rank}}", True)
board.wait_for(lambda: mine.get_all("here"), 20)
if board.attempt() == 0:
    if rank == 1 or "stop" in {fails!r}:
        {fails}
    import time
    time.sleep(60)
"""
    process = launched_by(tmp_path, worker, MAX_RESTARTS="2")
    _, err = process.communicate(timeout=100)
    assert process.returncode == status, err
    assert err.count("(MAX_RESTARTS)") == restarts


SLEEPER = """
import os, time
from longfactory.processes import die_with_parent
from longfactory.train.survival import launched

die_with_parent()
rank = int(os.environ["RANK"])
launched.register(rank)
open(os.path.join({folder!r}, f"pid{{rank}}"), "w").write(str(os.getpid()))
while launched.asked_to_stop() is None or {stubborn}:
    time.sleep(0.05)
launched.write_status(75)
"""


def workers_of(folder: Path) -> list[int]:
    """Process ids of the two workers, once they have started."""
    paths = [folder / f"pid{rank}" for rank in (0, 1)]
    deadline = time.time() + 60
    while not all(p.exists() and p.read_text() for p in paths) and time.time() < deadline:
        time.sleep(0.05)
    return [int(p.read_text()) for p in paths]


@pytest.mark.slow
@pytest.mark.processes
def test_a_signal_to_the_launcher_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    process = launched_by(tmp_path, SLEEPER.format(folder=str(tmp_path), stubborn=False))
    workers_of(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.processes
def test_a_second_signal_ends_workers_that_do_not(tmp_path: Path) -> None:
    process = launched_by(tmp_path, SLEEPER.format(folder=str(tmp_path), stubborn=True))
    pids = workers_of(tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    assert all(is_alive(p) for p in pids)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert err.count("A second signal: the run ends now.") == 1 and "Traceback" not in err
    assert not any(is_alive(p) for p in pids)


@pytest.mark.processes
def test_workers_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = launched_by(tmp_path, SLEEPER.format(folder=str(tmp_path), stubborn=True))
    pids = workers_of(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.time() + 5
    while any(is_alive(p) for p in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(p) for p in pids)
