"""What the rows of `_peers.py` share: the job, the shapes, the process and its clock."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from _device_time import divided, exposed_by_operation, kernels_of, longest
from _peer_passes import passes
from _table import variant

# The file alone: its package imports the engine, and DeepSpeed's processes import none of it.
SIZES = runpy.run_path(
    str(Path(__file__).resolve().parent.parent / "src/longfactory/plan/sizes.py")
)["SIZES"]
GiB = 2**30
DEEPSPEED = ("ulysses", "alst", "alst-bf16")
SHAPES: dict[str, dict[str, Any]] = {
    "7b": SIZES["7b"][1],
    "14b": SIZES["14b"][1],
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


@dataclasses.dataclass
class Job:
    row: str
    tokens: list[int]
    shape: str = "7b"
    layers: int | None = None  # fewer layers than the shape has; said in the result
    kernel: str = "auto"  # attention backend: auto (cuDNN on Hopper), flash (FlashAttention 2), cpu
    steps: int = 2  # timed steps at each length, the fastest counts; at most one from 100,000
    # tokens up; 0: that of `profile` alone
    warm: bool = True  # one more step at each length before them
    memory: str = "auto"  # auto, fast, long
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: bool = True
    host_share: float = 1.0  # of the host's memory, as if the machine had less
    mode: str = "zigzag-ring"
    profile: bool = False  # one further timed step under the profiler: where its time goes. Without
    # a GPU its products are counted
    turn: str = ""  # a folder in which the row says that it is ready, and is told to begin
    name: str = ""  # what the table calls it, where rows differ in their settings alone


def make_config(shape: str, layers: int | None = None) -> Any:
    """The transformers configuration of a shape, with another number of layers if asked."""
    from transformers import AutoConfig

    keys = SHAPES[shape] | {
        "max_position_embeddings": 1 << 22,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
    }
    if layers is not None:
        keys["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**keys)
    config.use_cache = False
    return config


class Bench:
    """The process: its device, its group, and how it reports."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.cuda
            else torch.device("cpu")
        )
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.tokens = 0
        self.begun = time.time()
        self.kernels: set[str] = set()  # attention kernels that ran

    def open_group(self) -> None:
        if self.world > 1:
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", device_id=self.device if self.cuda else None
            )

    def say(self, **facts: Any) -> None:
        job = self.job
        about = {
            "row": job.row,
            "kernel": job.kernel,
            "tokens": self.tokens,
            "gpus": self.world,
            **variant(dataclasses.asdict(job)),
        }
        print("RESULT " + json.dumps(about | facts), flush=True)

    def log(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.begun:6.1f} s] {text}", flush=True)

    def sync(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.time()

    def model(self, attention: str) -> Any:
        """Random bf16 weights, made on the device."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        torch.set_default_device(self.device)
        try:
            model = AutoModelForCausalLM.from_config(
                make_config(self.job.shape, self.job.layers),
                dtype=torch.bfloat16,
                attn_implementation=attention,
            )
        finally:
            torch.set_default_device(None)
        self.log(f"model made: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
        return model.train()

    def row(self, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
        """ids [T], and the labels of the next token; -100 at the end."""
        g = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, vocab, (tokens,), generator=g)
        return ids, torch.cat([ids[1:], torch.tensor([-100])])

    def measure(
        self,
        step: Callable[[int], tuple[float, dict[str, float]]],
        before: Callable[[int], dict[str, Any]] = lambda tokens: {},
        after: Callable[[], dict[str, Any]] = lambda: {},
    ) -> None:
        """Runs the steps at every length and reports each.

        `step` returns the loss and the seconds of its parts; `before` and `after` what else is
        known of a length.
        """
        packages = ["torch", "transformers", *(["deepspeed"] if self.job.row in DEEPSPEED else [])]
        versions = {package: importlib.metadata.version(package) for package in packages}
        self.wait_for_turn()
        for tokens in self.job.tokens:
            self.tokens = tokens
            facts = before(tokens)
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            facts |= self.timed_steps(step)
            facts |= {"kernels": sorted(self.kernels), **after(), "versions": versions}
            if self.rank == 0:
                self.say(**facts)

    def timed_steps(self, step: Callable[[int], tuple[float, dict[str, float]]]) -> dict[str, Any]:
        """What the steps at this length took, the fastest after the first one counting."""
        job, tokens = self.job, self.tokens
        times: list[tuple[float, dict[str, float]]] = []
        loss = math.nan

        def timed_step() -> None:
            nonlocal loss
            if self.world > 1:
                dist.barrier()
            start = self.sync()
            loss, parts = step(tokens)
            times.append((self.sync() - start, parts))
            self.log(
                f"{job.row} {tokens} tokens, step {len(times) - 1}: {times[-1][0]:.2f} s,"
                f" loss {loss:.4f}, {parts}"
            )

        for _ in range((job.steps if tokens < 100_000 else min(1, job.steps)) + job.warm):
            timed_step()
        profiled: dict[str, Any] = {}
        if job.profile and self.cuda:
            kernels = kernels_of(timed_step)
            profiled["device_ms"] = divided(kernels)
            profiled["exposed_ms"] = exposed_by_operation(kernels)
            profiled["rest_ms"] = longest(kernels, "rest")
        elif job.profile:
            config = make_config(job.shape, job.layers)
            profiled["passes"] = passes(timed_step, config, tokens // self.world)
        seconds, parts = min(times[1:] if job.warm else times, key=lambda t: t[0])
        return {
            "seconds": seconds,
            "first": times[0][0],
            "loss": loss,
            "peak": torch.cuda.max_memory_allocated() if self.cuda else 0,
            "reserved": torch.cuda.max_memory_reserved() if self.cuda else 0,
            "parts": parts,
            **profiled,
        }

    def wait_for_turn(self) -> None:
        """Where rows start at once, their steps follow each other: see `_many_peers.in_turn`."""
        if not self.job.turn:
            return
        if self.world > 1:
            dist.barrier()
        self.sync()
        if self.rank == 0:
            (Path(self.job.turn) / f"{self.job.row}-ready").touch()
        while not (Path(self.job.turn) / f"{self.job.row}-begins").exists():
            time.sleep(0.05)
