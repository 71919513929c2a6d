"""Runs of the command for the parts of `survival.py` that signal, stop and restart processes: a tiny
model, conversations, and hooks that make a step, a save, tokenising or loading slow or unequal on a
rank.

The hooks are in a `loss_path` file, which the command itself runs in every process: nothing of the
package is replaced for the purpose, but where a hook says so.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STARTED = 150.0
"""Seconds that two processes may take on a machine of two cores, busy with other work, until they
train.
"""

HOOKS = '''
"""What is slow, in this process: SURVIVAL holds {place: seconds}, for rank SURVIVAL_RANK or all."""

import json
import os
import time
from pathlib import Path

PLAN = json.loads(os.environ.get("SURVIVAL", "{}"))
RANK = os.environ.get("RANK", "0")
MINE = os.environ.get("SURVIVAL_RANK", RANK) == RANK


def pause(place):
    if place in PLAN:
        folder = Path(os.environ["SURVIVAL_MARKS"])
        (folder / f"{place}-{RANK}").write_text(str(os.getpid()))
        if MINE:
            time.sleep(PLAN[place])


def before(owner, name, place):
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        pause(place)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


if "SURVIVAL_CLOCK" in os.environ:
    true_time = time.time
    time.time = lambda: true_time() + float(os.environ["SURVIVAL_CLOCK"])
if "tokenise" in PLAN:
    from longfactory.data import store

    before(store, "write", "tokenise")
if "save" in PLAN:
    import transformers

    before(transformers.Trainer, "_save_rng_state", "save")
if "load" in PLAN:
    from longfactory.model import load

    before(load, "load_model", "load")


def loss(outputs, row):
    from longfactory import progress

    if progress.NOW.step >= int(os.environ.get("SURVIVAL_FROM", "0")):
        pause("step")
    return -outputs.logps
'''


def make_home(home: Path, rows: int = 24) -> Path:
    """A model, data and the hooks, in a folder that is empty or that it has made before."""
    if (home / "hooks.py").exists():
        return home
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from small_runs import text, write_model

    home.mkdir(parents=True, exist_ok=True)
    write_model(home / "model", 0)
    random.seed(0)
    data = [{"instruction": text(12 + i % 9), "output": text(25 - i % 9)} for i in range(rows)]
    (home / "talks.json").write_text(json.dumps(data))
    (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
    (home / "hooks.py").write_text(HOOKS)
    return home


def keys(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The keys of a run: sft of a tiny model on a CPU, twelve steps, a checkpoint every four."""
    given: dict[str, Any] = {
        "model_name_or_path": home / "model",
        "stage": "sft",
        "finetuning_type": "full",
        "dataset": "talks",
        "dataset_dir": home,
        "template": "chatml",
        "cutoff_len": 128,
        "output_dir": out,
        "max_steps": 12,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": "1e-3",
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "preprocessing_num_workers": 1,
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "loss_path": f"{home / 'hooks.py'}:loss",
        "nproc_per_node": 2,
        **changes,
    }
    return {k: v for k, v in given.items() if v is not None}


def words(given: Mapping[str, Any]) -> list[str]:
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in given.items()]


@dataclasses.dataclass
class Command:
    """`longfactory train`, running. `marks` is a folder of the hooks that were reached."""

    process: subprocess.Popen[str]
    marks: Path
    log: Path
    out: Path
    begun: float

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int | None:
        """The exit status, None where it has not ended in time: then the whole tree is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """SIGKILL to all of it."""
        for pid in {self.process.pid, *self.workers().values(), *descendants(self.process.pid)}:
            send(pid, signal.SIGKILL)
        self.process.wait(30)

    def workers(self) -> dict[int, int]:
        """Process ids of the ranks on this machine, by rank."""
        found = {}
        for pid in descendants(self.process.pid):
            variables = environment(pid)
            if "RANK" in variables and b"longfactory.cli" in command_line(pid):
                found.setdefault(int(variables["RANK"]), pid)
        return found

    def reached(self, place: str, rank: int) -> bool:
        """Whether a rank has come to a hook."""
        return (self.marks / f"{place}-{rank}").exists()

    def steps(self) -> int:
        """Optimizer steps that were logged."""
        path = self.out / "trainer_log.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def until(self, condition: Callable[[], bool], seconds: float = STARTED) -> bool:
        """Waits for something; False where the command ended before, or the time was up."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return condition()


def start(
    home: Path,
    given: Mapping[str, Any],
    slow: Mapping[str, float] | None = None,
    slow_rank: int | None = None,
    name: str = "log",
    prefix: Sequence[str] = (),
    **variables: str,
) -> Command:
    """Starts the command.

    Args:
        home: of `make_home`.
        given: its keys.
        slow: seconds to sleep at a hook (step, save, tokenise, load) each time it is reached.
        slow_rank: on this rank alone.
        name: of its output's file.
        prefix: words before the command (`ip netns exec ...`).
        variables: of the environment.
    """
    out = Path(given["output_dir"])
    marks = home / f"marks-{name}"
    marks.mkdir(exist_ok=True)
    for old in marks.iterdir():
        old.unlink()
    dropped = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LONGFACTORY_TOLD", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), env.get("PYTHONPATH", "")]),
        "LONGFACTORY_CACHE": str(
            home / f"cache-{name}" if slow and "tokenise" in slow else home / "cache"
        ),
        "OMP_NUM_THREADS": "1",
        "SURVIVAL": json.dumps(slow or {}),
        "SURVIVAL_MARKS": str(marks),
        "HF_HUB_OFFLINE": "1",
        **({} if slow_rank is None else {"SURVIVAL_RANK": str(slow_rank)}),
        **variables,
    }
    if given.get("use_cpu"):
        env["CUDA_VISIBLE_DEVICES"] = ""
    log = home / f"{name}.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "longfactory.cli", "train", *words(given)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=home,
            text=True,
            start_new_session=True,
        )
    return Command(process, marks, log, out, time.monotonic())


# ---- processes -----------------------------------------------------------------------------------


def send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(p) for p in path.read_text().split()]
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def catches(pid: int, number: int) -> bool:
    """Whether a process has installed a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def all_gone(pids: Sequence[int], seconds: float = 5.0) -> bool:
    """Whether all of them have ended within the time."""
    end = time.monotonic() + seconds
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(p) for p in pids)


# ---- what a run has left -------------------------------------------------------------------------


def checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoints in an output folder."""
    found = [re.fullmatch(r"checkpoint-(\d+)", p.name) for p in out.glob("checkpoint-*")]
    return sorted(int(m[1]) for m in found if m)


def losses(out: Path) -> dict[int, tuple[float, float]]:
    """(loss, grad_norm) by step, of the last checkpoint's or the run's own history."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {h["step"]: (h["loss"], h["grad_norm"]) for h in history if "loss" in h}


def weights_digest(folder: Path) -> str:
    """Of the tensors of a model's folder."""
    import hashlib

    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


@functools.cache
def reference(processes: int) -> dict[str, Any]:
    """An uninterrupted run: its losses by step and the digest of its weights. Once a process."""
    folder = Path(tempfile.mkdtemp(prefix="survival-reference-"))
    atexit.register(shutil.rmtree, folder, True)
    home = make_home(folder)
    out = home / "out"
    command = start(home, keys(home, out, nproc_per_node=processes))
    status = command.wait(5 * STARTED)
    if status != 0:
        raise RuntimeError(f"the reference run ended with {status}: {command.text()[-2000:]}")
    return {"losses": losses(out), "weights": weights_digest(out)}


def same_end(out: Path, processes: int) -> str:
    """Empty where a run has ended with the rows, the weights and the files of one that was never
    interrupted, else what differs.
    """
    expected = reference(processes)
    for name in ("train_results.json", "all_results.json", "trainer_state.json", "README.md"):
        if not (out / name).is_file():
            return f"{name} is missing"
    if losses(out) != expected["losses"]:
        return "other losses in trainer_state.json"
    if weights_digest(out) != expected["weights"]:
        return "other weights"
    left = [p.name for p in out.iterdir() if p.name.startswith((".longfactory", "_longfactory"))]
    return f"left behind: {left}" if left else ""


def problems(command: Command, pids: Sequence[int], traceback: bool = False) -> list[str]:
    """What must not be, of a command that has ended: a stack trace, a process that lives."""
    found = [] if traceback or "Traceback" not in command.text() else ["a stack trace"]
    if not all_gone(pids):
        found.append("processes are left")
    return found


def result(
    ok: bool, begun: float, limit: float, end: str, command: Command | None = None, **more: Any
) -> dict[str, Any]:
    """What `survival.py` records; the last lines of the output where a case has failed."""
    if not ok and command is not None:
        end += " | " + " / ".join(command.text().strip().splitlines()[-6:])[-900:]
    return {"ok": ok, "seconds": time.monotonic() - begun, "limit": limit, "end": end, **more}
