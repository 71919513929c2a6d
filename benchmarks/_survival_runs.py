"""Runs of the command that are killed, changed and started again, for the parts `kills`, `damaged`
and `resumed`: started from a warm process that has imported everything once, watched, compared.

A run of one process is `longfactory train` in a forked process. For more, the forked process stands
for torchrun: it starts the ranks with torchrun's environment and ends the others when one fails.
`real=True` starts the command itself, with the real torchrun.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_OURS = [str(ROOT / "src"), str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks")]
sys.path[:0] = _OURS
# the warm process that others are forked from is a new one
os.environ["PYTHONPATH"] = os.pathsep.join([*_OURS, os.environ.get("PYTHONPATH", "")])

STEPS, SAVE = 6, 2
COMMON: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "template": "chatml",
    "cutoff_len": 96,
    "output_dir": "out",
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 3,
    "save_steps": SAVE,
    "report_to": "none",
    "use_cpu": True,
    "preprocessing_num_workers": 1,
    "optim": "adamw_torch",
    "plot_loss": True,
    "disable_tqdm": True,
    "include_num_input_tokens_seen": True,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "lora_dropout": 0.2}
EVALUATED = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sft": (1, {"dataset": "talks", **EVALUATED}),
    "lora dropout": (1, {"dataset": "talks", **LORA, "save_total_limit": 2}),
    "packing": (1, {"dataset": "talks,more", "packing": True}),
    "streaming": (1, {"dataset": "talks,more", "streaming": True, "buffer_size": 4}),
    "dpo": (1, {"dataset": "pairs", "stage": "dpo", "save_total_limit": 1}),
    "best": (
        1,
        {
            "dataset": "talks",
            **LORA,
            **EVALUATED,
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "overwrite_output_dir": True,
        },
    ),
    # the second save is of the last step of an epoch, before the evaluation that ends it
    "epochs": (
        1,
        {
            "dataset": "talks",
            **LORA,
            "max_samples": 8,
            "eval_dataset": "more",
            "eval_strategy": "epoch",
            "logging_strategy": "epoch",
        },
    ),
    "sp2": (2, {"dataset": "talks", "sequence_parallel_size": 2}),
    "ddp2 lora dropout": (2, {"dataset": "talks", **LORA, "gradient_accumulation_steps": 1}),
    "reward sp2": (
        2,
        {"dataset": "pairs", "stage": "rm", **LORA, "sequence_parallel_size": 2},
    ),
}
"""Name -> (processes, keys beside `COMMON`)."""

RUNTIMES = (
    *("runtime", "per_second", "elapsed", "remaining_time", "throughput", "per_step"),
    *("mfu", "peak_memory", "data_wait", "padding", "packing"),  # of the steps since the start
    "startup",
)


def write_inputs(home: Path) -> None:
    """A tiny model and three data sets."""
    from small_runs import text, write_model

    write_model(home / "model", 0)
    random.seed(0)
    for name, count in (("talks", 20), ("more", 9)):
        rows = [{"instruction": text(12 + i), "output": text(30 - i)} for i in range(count)]
        (home / f"{name}.json").write_text(json.dumps(rows))
    pairs = [
        {"instruction": text(12 + i), "chosen": text(20), "rejected": text(9 + i)}
        for i in range(16)
    ]
    (home / "pairs.json").write_text(json.dumps(pairs))
    sets: dict[str, Any] = {n: {"file_name": f"{n}.json"} for n in ("talks", "more")}
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    sets["pairs"] = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    (home / "dataset_info.json").write_text(json.dumps(sets))


@functools.cache
def inputs() -> Path:
    """The folder of `write_inputs`, made once a process."""
    holder = tempfile.TemporaryDirectory(prefix="survival-inputs-")
    _kept.append(holder)
    write_inputs(Path(holder.name))
    return Path(holder.name)


_kept: list[Any] = []


def words(run: str, **changes: Any) -> list[str]:
    """The command line of a run, after `longfactory`."""
    given = {"model_name_or_path": inputs() / "model", "dataset_dir": inputs(), **COMMON}
    given |= {"nproc_per_node": RUNS[run][0], **RUNS[run][1]}
    given |= changes
    return ["train", *(f"{k}={_word(v)}" for k, v in given.items() if v is not None)]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- in the forked processes ---------------------------------------------------------------------


def _serve(argv: list[str], home: str, processes: int, plan: dict[str, Any] | None) -> None:
    """The launcher's body: one run of the command, in a session of its own."""
    os.setsid()
    log = os.open(os.path.join(home, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(home)
    os.environ |= {"LONGFACTORY_CACHE": os.path.join(home, "cache"), "TQDM_DISABLE": "1"}
    if processes == 1:
        _rank(argv, 0, plan)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            _rank(argv, rank, plan)
        ranks.append(pid)
    status = 0
    while ranks:
        pid, code = os.wait()
        ranks.remove(pid)
        if code and not status:
            status = os.waitstatus_to_exitcode(code)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while ranks and time.monotonic() < deadline:
                done, _ = os.waitpid(-1, os.WNOHANG)
                if done:
                    ranks.remove(done)
                time.sleep(0.02)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(status if status >= 0 else 128 - status)


def _rank(argv: list[str], rank: int, plan: dict[str, Any] | None) -> None:
    from longfactory import cli

    sys.argv = ["longfactory", *argv]
    watch(rank, plan)
    try:
        status = cli.main(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def in_save(out: Path) -> bool:
    """Whether a temporary folder of a save is there."""
    return out.is_dir() and any(p.name.startswith("tmp-checkpoint-") for p in out.iterdir())


def watch(rank: int, plan: dict[str, Any] | None) -> None:
    """Counts this process's events (steps, writes, renames), records them, and kills at the one
    that the plan names: `cut` leaves the file that was to be written half.

    Args:
        plan: {"rank", "event", "victim", "cut"}, or None.
    """
    import peft.peft_model
    import safetensors.torch
    import torch
    import transformers.modeling_utils
    from peft.peft_model import PeftModel  # noqa: F401  what is imported later finds the patches

    from longfactory.train.trainer import RowTrainer

    out, launcher = Path("out"), os.getppid() if "RANK" in os.environ else os.getpid()
    count = 0

    def event(label: str, cut: Callable[[], Any] | None = None) -> None:
        nonlocal count
        count += 1
        saving = in_save(out)
        with open(f"events-{rank}", "a") as f:
            f.write(json.dumps([label, saving]) + "\n")
        if plan is None or plan["rank"] != rank or plan["event"] != count:
            return
        if plan["cut"] and cut is not None:
            cut()
        Path("killed").write_text(json.dumps([label, in_save(out)]))
        if plan["victim"] == "launcher":
            os.kill(launcher, signal.SIGKILL)
            time.sleep(30)
        elif plan["victim"] == "tree":
            os.killpg(os.getsid(0), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def patched(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            event(label)
            return inner(*args, **kwargs)

        setattr(owner, name, call)

    def half(path: Any) -> None:
        size = os.path.getsize(path)
        with open(path, "r+b") as f:
            f.truncate(size // 2)

    def writes(owner: Any, name: str, label: str, where: int) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[where] if len(args) > where else kwargs.get("filename") or kwargs.get("f")

            def cut() -> None:
                inner(*args, **kwargs)
                half(path)

            event(label, cut if isinstance(path, (str, os.PathLike)) else None)
            return inner(*args, **kwargs)

        setattr(owner, name, call)

    patched(os, "fsync", "fsync")
    patched(os, "replace", "replace")
    patched(os, "rename", "rename")
    patched(shutil, "rmtree", "rmtree")
    patched(RowTrainer, "training_step", "step")
    patched(RowTrainer, "evaluation_loop", "evaluation")
    writes(torch, "save", "torch.save", 1)
    writes(safetensors.torch, "save_file", "safetensors", 1)
    for module in (transformers.modeling_utils, peft.peft_model):
        for name in ("safe_save_file", "save_file"):
            if hasattr(module, name):
                writes(module, name, "safetensors", 1)


# ---- from outside --------------------------------------------------------------------------------


class Run:
    """A run that was started."""

    def __init__(self, argv: list[str], home: Path, processes: int, plan: Any = None) -> None:
        from longfactory.testing import process_context

        home.mkdir(parents=True, exist_ok=True)
        (home / "killed").unlink(missing_ok=True)
        self.home, self.begun = home, time.monotonic()
        self.process = process_context().Process(
            target=_serve, args=(argv, str(home), processes, plan)
        )
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None where it goes on."""
        self.process.join(max(0.0, seconds))
        return self.process.exitcode

    def kill(self, victim: str, rank: int = 0) -> None:
        """SIGKILL from outside."""
        members = session(self.pid)
        if victim == "tree" and members:
            os.killpg(self.pid, signal.SIGKILL)
        elif victim == "rank" and len(members) > 1:
            os.kill(sorted(members - {self.pid})[rank % (len(members) - 1)], signal.SIGKILL)
        elif members:
            os.kill(self.pid, signal.SIGKILL)

    def gone(self, seconds: float) -> bool:
        """Whether all its processes end within some seconds; kills them where not."""
        end = time.monotonic() + seconds
        while session(self.pid) and time.monotonic() < end:
            self.process.join(0.05)
            time.sleep(0.02)
        left = session(self.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.join(5)
        return not left


def session(leader: int) -> set[int]:
    """Living processes of a session."""
    found = set()
    for p in Path("/proc").iterdir():
        if p.name.isdigit():
            try:
                fields = (p / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.add(int(p.name))
    return found


def run_whole(run: str, home: Path, limit: float = 120, **changes: Any) -> int | None:
    """A run to its end; its exit status."""
    started = Run(words(run, **changes), home, RUNS[run][0])
    status = started.wait(limit)
    started.gone(0.0 if status is None else 5.0)
    return status


@functools.cache
def reference(run: str) -> tuple[Path, dict[str, str], list[list[Any]], float]:
    """The uninterrupted run: its folder, what `state_of` says of it, each rank's events, and the
    seconds that it took.
    """
    holder = tempfile.TemporaryDirectory(prefix="survival-reference-")
    _kept.append(holder)
    home, begun = Path(holder.name), time.monotonic()
    status = run_whole(run, home)
    seconds = time.monotonic() - begun
    if status != 0:
        raise RuntimeError(f"{run} ended with {status}: {(home / 'log').read_text()[-2000:]}")
    events = [
        [json.loads(line) for line in (home / f"events-{rank}").read_text().splitlines()]
        for rank in range(RUNS[run][0])
    ]
    return home, state_of(home / "out"), events, seconds


def unfinish(out: Path, keep: int | None = None) -> None:
    """Makes a finished run's folder that of a run which was killed before its last files: only
    checkpoints and the log are left. `keep`: the last step whose checkpoint stays.
    """
    record = out / "longfactory_run.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "finished": False}))
    for p in out.iterdir():
        step = p.name.removeprefix("checkpoint-")
        if p.is_dir() and keep is not None and step.isdigit() and int(step) > keep:
            shutil.rmtree(p)
        elif p.is_file() and not p.name.startswith("longfactory") and p.name != "trainer_log.jsonl":
            p.unlink()


def state_of(out: Path) -> dict[str, str]:
    """Every file of an output folder by its path, with a hash of its content; times, rates and the
    drawn name of the run are left out.
    """
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(_content(p)).hexdigest()[:16]
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }


def _content(path: Path) -> bytes:
    if path.name in ("longfactory_manifest.json", "longfactory_run.json"):
        return b""  # names the run, which is drawn, and holds the others' checksums
    if path.suffix not in (".json", ".jsonl") or path.name.startswith(("tokenizer", "config")):
        return path.read_bytes()
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    plain = [_without_times(json.loads(line)) for line in lines]
    if path.name == "adapter_config.json":
        # PEFT writes sets, whose order another process has not
        plain = [{k: sorted(v) if isinstance(v, list) else v for k, v in plain[0].items()}]
    return json.dumps(plain, sort_keys=True).encode()


def _without_times(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _without_times(v) for k, v in x.items() if not any(t in k for t in RUNTIMES)}
    return [_without_times(v) for v in x] if isinstance(x, list) else x


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """One phrase a file that is missing, too many or other."""
    lines = [f"{n} is missing" for n in expected if n not in found]
    lines += [f"{n} is left behind" for n in found if n not in expected]
    return lines + [f"{n} differs" for n in expected if n in found and expected[n] != found[n]]


def command(argv: list[str], home: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command itself, with the real torchrun, in a session of its own."""
    home.mkdir(parents=True, exist_ok=True)
    given = {
        **os.environ,
        "LONGFACTORY_CACHE": str(home / "cache"),
        "TQDM_DISABLE": "1",
        **environment,
    }
    with open(home / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "longfactory.cli", *argv],
            cwd=home,
            env=given,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def runs_in_turn() -> Iterator[str]:
    """The names of the runs, again and again."""
    while True:
        yield from RUNS
