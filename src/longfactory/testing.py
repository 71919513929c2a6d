"""For tests: a pool of ranks that stays alive between tests, and tiny models.

def body(x):  # runs on every rank; a function of a module, with picklable arguments
    t = torch.ones(1)
    dist.all_reduce(t)
    return t.item() + x

assert run_ranks(2, body, 1) == [3.0, 3.0]
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import gc
import importlib
import multiprocessing as mp
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from longfactory.sp.distance import largest


class RankError(RuntimeError):
    """A function raised on some rank, or a rank died. The message holds every rank's traceback."""


IMPORTED = (
    "longfactory.train.run",
    "longfactory.train.verify",
    "longfactory.sp.hf",
    "peft",
    "deepspeed",
)
"""What a rank of a CPU has already imported when it starts: it is forked from a process that did so
once for all pools.
"""


class RankPool:
    """`size` processes with a process group, gloo on CPUs or nccl with one GPU each.

    The first call of the first pool costs seconds (imports), later ones milliseconds. Groups of
    gloo that a function made end with it, on every rank: each holds threads that wake up a hundred
    times a second. `keep_groups` is for a library that keeps its own.

    A rank that died, hung or raised in the middle of a collective leaves the group unusable: the
    pool then starts afresh at the next call. The group meets through a file, so no port is needed.
    """

    def __init__(
        self, size: int, threads: int = 1, backend: str = "gloo", keep_groups: bool = False
    ) -> None:
        self.size = size
        self.keep_groups = keep_groups
        self.backend = backend
        self.threads = threads
        self._processes: list[Any] = []
        self._tasks: list[Any] = []
        self._results: Any = None

    def start(self) -> None:
        context = process_context(self.backend)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(self.size)]
        # Workers find the same modules as this process: test modules are not installed anywhere.
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        surroundings = (list(sys.path), dict(os.environ))
        args = (self.size, self.backend, rendezvous, self.threads, *surroundings, self._results)
        self._processes = [
            context.Process(target=_serve, args=(rank, *args, self._tasks[rank]), daemon=True)
            for rank in range(self.size)
        ]
        for p in self._processes:
            p.start()

    def stop(self) -> None:
        for p in self._processes:
            if p.is_alive():
                p.kill()
            p.join()
        if self._processes:
            self._folder.cleanup()
        self._processes = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Calls `function(*args, **kwargs)` on every rank and returns the results in rank order.

        `function` is a plain function of an importable module, and everything that goes in or out
        can be pickled.

        Raises:
            RankError: it raised somewhere, a rank died, or not all answered within `timeout`
                seconds.
        """
        if not self._processes or not all(p.is_alive() for p in self._processes):
            self.stop()
            self.start()
            timeout += 60.0  # importing torch on a busy machine
        job = (function.__module__, function.__qualname__, args, kwargs)
        for tasks in self._tasks:
            tasks.put(job)
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(answers) + len(errors) < self.size:
            try:
                rank, ok, value = self._results.get(timeout=0.2)
            except queue.Empty:
                dead = [
                    r
                    for r, p in enumerate(self._processes)
                    if not p.is_alive() and r not in answers and r not in errors
                ]
                for r in dead:
                    errors[r] = f"the process ended with exit code {self._processes[r].exitcode}"
                if errors or time.monotonic() > deadline:
                    break
                continue
            if ok:
                answers[rank] = value
            else:
                errors[rank] = value
                # The others may be waiting for this rank in a collective: they get a moment to fail
                # by themselves.
                deadline = min(deadline, time.monotonic() + 2.0)
        if len(answers) == self.size:
            if self.backend == "gloo" and not self.keep_groups:
                for tasks in self._tasks:
                    tasks.put(None)  # all are done with the groups, so that none waits for another
            return [answers[r] for r in range(self.size)]
        self_healed = len(answers) + len(errors) == self.size and not any(
            "exit code" in e for e in errors.values()
        )
        missing = [r for r in range(self.size) if r not in answers and r not in errors]
        if not self_healed:
            self.stop()
        report = "\n".join(f"--- rank {r} ---\n{e}" for r, e in sorted(errors.items()))
        if missing:
            report += f"\n--- no answer from ranks {missing} ---"
        raise RankError(f"{function.__qualname__} failed on {self.size} ranks\n{report}")


_pools: dict[tuple[int, str], RankPool] = {}


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    process_group: str = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """`RankPool.run` on a pool of `size` processes that lives as long as this process.
    `process_group`: gloo, or nccl for GPUs.
    """
    key = (size, process_group)
    if key not in _pools:
        _pools[key] = RankPool(size, backend=process_group)
        atexit.register(_pools[key].stop)
    return _pools[key].run(function, *args, timeout=timeout, **kwargs)


def process_context(backend: str = "gloo") -> Any:
    """How ranks are started: forked from a process that has imported what they need; with GPUs,
    each by itself.

    CUDA does not survive a fork, and some of the imports ask it for its devices.
    """
    if backend != "gloo" or torch.cuda.is_available():
        return mp.get_context("spawn")
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _end_groups() -> None:
    """Ends every process group but the world's."""
    if not dist.is_initialized():
        return  # a function may have left even that one
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _end_with_the_caller() -> None:
    """Ends this process when the one that made the pool is gone. It waits for tasks else, or for
    other ranks, with threads of gloo that take time of the cores.
    """
    caller = mp.parent_process()  # not the parent where a server forked this process
    if caller is not None:
        wait([caller.sentinel])
        os._exit(1)


def _serve(
    rank: int,
    size: int,
    backend: str,
    rendezvous: str,
    threads: int,
    path: list[str],
    environment: dict[str, str],
    results: Any,
    tasks: Any,
) -> None:
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    if backend == "nccl":
        torch.cuda.set_device(rank)  # else every rank sits on the first GPU
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=100),
    )
    modules = 0
    while True:
        # a collection need not look at what was imported: half a million objects
        if len(sys.modules) > modules:
            modules = len(sys.modules)
            gc.collect()
            gc.freeze()
        task = tasks.get()
        if task is None:
            _end_groups()
            continue
        module, name, args, kwargs = task
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            result = (rank, True, function(*args, **kwargs))
        except BaseException:  # an exit in the function is an answer too
            result = (rank, False, traceback.format_exc())
        results.put(result)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest |a - b| / max(1, |b|) among tensors, and where."""

    name: str
    value: float


def largest_difference(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> Difference:
    """Compares tensors by name. A name on one side only, or another shape, is an infinite
    difference.
    """
    worst = Difference("", 0.0)
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        if a is None or b is None or a.shape != b.shape:
            return Difference(name, float("inf"))
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        value = largest(a, b).item() / scale
        if not value <= worst.value:  # catches nan
            worst = Difference(name, value if value == value else float("inf"))
    return worst


def assert_matches_single_process(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Raises AssertionError naming the tensor that differs most, where one differs by more than
    `tolerance` (see Difference).
    """
    worst = largest_difference(found, expected)
    assert worst.value <= tolerance, (
        f"{worst.name} differs from the single process by {worst.value:.3e}, more than"
        f" {tolerance:.0e}"
    )


_TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 12},
    "phi3": {"pad_token_id": 0},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    **overrides: Any,
) -> Any:
    """A random causal language model of some ten thousand parameters, the same on every process for
    the same arguments.

    Args:
        family: a `model_type` of transformers.
        attn: attn_implementation.
        overrides: fields of the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**fields, **_TINY.get(family, {}), **overrides})
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    finally:
        torch.set_rng_state(state)
    return model.to(dtype)
